"""toy.py and toy_world/steps.py: the whole loop at a tiny size, interrupted and resumed; who may see the truth; table
and sheet."""

import contextlib
import importlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import stages
from PIL import Image

import adapters
import plumbing.weights
import toy
from base import open_base
from plumbing import scoring
from plumbing.errors import InputError
from toy_world import base, world
from toy_world import steps as toy_steps
from toy_world.steps import CODE, Loop, make_split

SIZES = {"--captions": 8, "--images": 6, "--held-out": 6, "--samples": 3, "--rounds": 2}
FEW = {
    "SFT": ("--max-steps", "2", "--lr", "2e-3"),
    "QA": ("--max-steps", "2", "--lr", "1e-3"),
    "DPO": ("--max-steps", "2", "--lr", "2e-3"),
    "BATCH": ("--batch", "4", "--micro-batch", "4", "--workers", "0", "--warmup", "0"),
}
KEYS = (
    "precision",
    "recall",
    "f1",
    "detail_precision",
    "detail_recall",
    "planted",
    "eos",
    "repeat",
    "length",
)
RUN_OF_A_ROUND = [
    "qa_adapter.py",
    "golden.py",
    "evaluate.py",
    "dpo.py",
    *("caption.py", "evaluate.py") * 2,
]


# ---------------------------------------------------------------- the scripts, run in this process
SEEN = {
    "script": None,
    "files": set(),
}  # the script that runs, if any, and (script, file or folder that it has opened)


def see(event, args):
    if (
        SEEN["script"]
        and event in ("open", "os.listdir", "os.scandir")
        and isinstance(args[0], str | bytes | os.PathLike)
    ):
        SEEN["files"].add((SEEN["script"], os.path.abspath(os.fsdecode(args[0]))))


sys.addaudithook(see)  # for good: no hook can be taken away again


class Here:
    """In place of steps.run_command: runs the scripts in this process.

    commands: all that was run, as (script, arguments); raw: the same as it was handed over. before(script, arguments)
    may return an exit code, or raise, in place of the script.
    """

    def __init__(self, before=lambda script, argv: None):
        self.before, self.commands, self.raw = before, [], []

    @property
    def scripts(self):
        return [script for script, _ in self.commands]

    def __call__(self, command, stdout=None, stderr=None):
        python, script, *argv = command
        script = Path(script).resolve()
        assert python == sys.executable and script.is_file()
        self.raw.append(command)
        self.commands.append((script.name, argv))
        with contextlib.ExitStack() as streams:
            if stdout:
                streams.enter_context(contextlib.redirect_stdout(stdout))
            if stderr:
                streams.enter_context(contextlib.redirect_stderr(stderr))
            code = self.before(script.name, argv)
            if code is None:
                streams.callback(SEEN.update, script=None)
                SEEN["script"] = script.name
                code = self.start(script, argv)
        return code or 0

    def start(self, script, argv):
        assert script.parent == CODE
        return stages.run(importlib.import_module(script.stem), *argv)


@contextlib.contextmanager
def running(here):
    """The loop's commands go to `here`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_steps, "run_command", here)
        yield here


@pytest.fixture(scope="module", autouse=True)
def small():
    """Two steps of training a stage; golden.py skips its garbage collection, which is slow after many imports."""
    with pytest.MonkeyPatch.context() as patch:
        for name, flags in FEW.items():
            patch.setattr(toy_steps, name, flags)
        patch.setattr(plumbing.weights, "gc", SimpleNamespace(collect=int))
        yield


def run_toy(out, *more, here=None):
    """toy.py's loop -> exit code, output of it and its scripts, commands."""
    here, printed, errors = here or Here(), io.StringIO(), io.StringIO()
    sizes = [part for pair in SIZES.items() for part in pair]
    with running(here), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = toy.main([str(part) for part in ("--out", out, *sizes, *more)])
    return SimpleNamespace(
        code=code,
        printed=printed.getvalue(),
        errors=errors.getvalue(),
        here=here,
        out=out,
        scripts=here.scripts,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of two rounds, and the files its scripts opened."""
    SEEN["files"].clear()
    run = run_toy(tmp_path_factory.mktemp("whole") / "out" / "toy")
    run.opened = set(SEEN["files"])
    return run


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the whole run's folder."""
    return shutil.copytree(whole.out, tmp_path / "out" / "toy")


def drop(out, *patterns):
    """Delete files and folders of a run."""
    for pattern in patterns:
        paths = list(out.glob(pattern))
        assert paths, pattern
        for path in paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def commands_in(printed, mark):
    """The commands that a loop printed after "$ " or "done: ", split as a shell would."""
    return [
        shlex.split(line)
        for line in re.findall(rf"^\[[ \d]+:\d\d\] {re.escape(mark)} (.*)$", printed, re.MULTILINE)
    ]


def figures_of(out):
    """results.json, without the file names in it."""
    results = json.loads((out / "results.json").read_text())
    return {
        name: {
            way: {key: figures[key] for key in (*KEYS, "statements")}
            for way, figures in ways.items()
            if way != "gate"
        }
        for name, ways in results.items()
    }


# ---------------------------------------------------------------- the whole loop
def test_the_loop_leaves_the_figures_of_every_captioner_and_golden_file(whole):
    assert whole.code == 0
    results = json.loads((whole.out / "results.json").read_text())
    assert list(results) == ["base", "sft", "golden1", "round1", "golden2", "round2"]
    for name in ("base", "sft", "round1", "round2"):
        file = name.replace("round", "round-")
        assert list(results[name]) == ["greedy", "sampled"]
        for way, figures in results[name].items():
            expected = scoring.score(
                toy.read_captions(whole.out, file, way),
                toy.toy_rows(whole.out / "truth/held-out.jsonl"),
            )
            assert figures["captions"] == SIZES["--held-out"]
            assert {key: figures[key] for key in KEYS} == pytest.approx(
                {key: expected[key] for key in KEYS}, nan_ok=True
            )
    for k in (1, 2):
        of_golden = results[f"golden{k}"]
        assert (
            list(of_golden) == ["sampled", "single", "union", "gate"]
            and set(KEYS) <= of_golden["sampled"].keys()
        )
        trained_on = stages.read_rows(whole.out / f"golden-{k}/golden.jsonl")
        assert of_golden["sampled"]["captions"] == SIZES["--images"] >= len(trained_on) > 0
        assert of_golden["single"]["captions"] == SIZES["--images"] * SIZES["--samples"]


def test_the_stages_follow_one_another(whole):
    """Every script runs in its turn, each on the output of the one before."""
    assert whole.scripts == [
        *("caption.py", "evaluate.py") * 2,
        "sft.py",
        *("caption.py", "evaluate.py") * 2,
        *RUN_OF_A_ROUND * 2,
    ]
    flags = [(script, dict(pairwise(argv))) for script, argv in whole.here.commands]
    of = {
        script: [flags for name, flags in flags if name == script]
        for script in ("qa_adapter.py", "golden.py", "dpo.py")
    }
    out = whole.out
    for k, start in enumerate((out / "sft", out / "dpo-1"), 1):
        qa, gold, dpo = (of[script][k - 1] for script in of)
        assert qa["--init"] == gold["--captioner"] == dpo["--init"] == str(start)
        assert gold["--qa"] == qa["--out"] and gold["--images"] == str(out / f"data/images-{k}")
        assert dpo["--data"] == str(out / f"golden-{k}/golden.jsonl") and dpo["--out"] == str(
            out / f"dpo-{k}"
        )
        assert dpo.get("--ce", "1") == {1: "1", 2: "4"}[k]
    first, second = (
        set(p.read_bytes() for p in (out / f"data/images-{k}").iterdir()) for k in (1, 2)
    )
    assert (
        len(first) == len(second) == SIZES["--images"] and not first & second
    )  # fresh images in each round


def test_the_seed_reaches_the_scenes_and_every_stage_that_trains_or_samples(whole, tmp_path):
    def first_stop(script, argv):
        return 1 if script == "sft.py" else None

    run = run_toy(tmp_path / "toy", "--seed", 5, here=Here(first_stop))
    (argv,) = [argv for script, argv in run.here.commands if script == "sft.py"]
    assert argv[argv.index("--seed") + 1] == "5"
    assert (tmp_path / "toy/truth/held-out.jsonl").read_bytes() != (
        whole.out / "truth/held-out.jsonl"
    ).read_bytes()
    seeds = [
        argv[argv.index("--seed") + 1]
        for script, argv in whole.here.commands
        if script != "evaluate.py"
    ]
    assert seeds == ["0"] * (7 + 2 * 4)


def test_the_printed_table_has_a_row_for_every_captioner_and_its_figures(whole):
    lines = whole.printed[whole.printed.index("] judged\n") :].splitlines()
    rows = {
        tuple(line.split()[:2]): line.split()[2:]
        for line in lines
        if line.startswith(("base", "sft", "round", "golden"))
        and ":" not in line
        and "against" not in line
    }
    assert list(rows) == [
        (name, way)
        for name in ("base", "sft", "golden1", "round1", "golden2", "round2")
        for way in (("golden", "single", "union") if "golden" in name else ("greedy", "sampled"))
    ]
    results = figures_of(whole.out)
    for (name, way), cells in rows.items():
        figures = results[name][{"golden": "sampled"}.get(way, way)]
        assert [None if cell == "-" else float(cell) for cell in cells] == [
            pytest.approx(figures[key], abs=0.051 if key == "statements" else 0.00051)
            if figures[key] is not None
            else None
            for key in toy.COLUMNS
        ]
    assert (
        len([line for line in lines if re.match(r"golden\d: the gate has a precision of", line)])
        == 2
    )
    assert (
        len(
            [
                line
                for line in lines
                if re.match(r"round \d against (sft|round 1): greedy P [+-]", line)
            ]
        )
        == 2
    )


def test_the_sheet_is_a_picture(whole):
    with Image.open(whole.out / "sheet.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 600 and picture.height > 600
        assert (
            len(picture.crop((216, 0, picture.width, 200)).getcolors(10**6)) > 2
        )  # something is written


def test_the_best_captioner_is_named_where_caption_py_looks(whole):
    folder = adapters.newest(whole.out.parent)
    results = figures_of(whole.out)
    of = {"sft": "sft", "dpo-1": "round1", "dpo-2": "round2"}
    both = {
        name: results[of[name]]["greedy"]["f1"] + results[of[name]]["sampled"]["f1"] for name in of
    }
    assert (
        both[folder.name] == max(both.values())
        and folder.resolve() == (whole.out / folder.name).resolve()
    )
    assert f"best: {whole.out / folder.name}" in whole.printed


def results_like(**f1):
    """results as `loop` gathers them, from {name: (greedy F1, sampled F1)}."""

    def figures(value):
        return {**dict.fromkeys((*KEYS, "statements"), 0.5), "f1": value}

    results = {
        name: {"greedy": figures(greedy), "sampled": figures(sampled)}
        for name, (greedy, sampled) in f1.items()
    }
    return {
        **results,
        "golden1": {
            "sample": figures(0.4),
            "combined": figures(0.5),
            "golden": figures(0.6),
            "gate": {"precision": 0.9, "recall": 0.8, "base_rate": 0.7},
        },
    }


@pytest.mark.parametrize(
    "scores, expected",
    [
        ({"sft": (0.6, 0.5), "round1": (0.7, 0.5), "round2": (0.5, 0.6)}, "dpo-1"),
        ({"sft": (0.6, 0.5), "round1": (0.7, 0.3), "round2": (0.4, 0.6)}, "sft"),
        ({"sft": (0.6, 0.5), "round1": (0.5, 0.5), "round2": (0.5, 0.7)}, "dpo-2"),
        ({"sft": (0.6, 0.5), "round1": (None, None), "round2": (None, 0.7)}, "sft"),
    ],
    ids=str,
)
def test_the_best_of_greedy_and_sampled_f1_together_is_named(
    whole, tmp_path, monkeypatch, capsys, scores, expected
):
    """F1 is None where captions have no statements."""
    out = tmp_path / "out" / "toy"
    out.mkdir(parents=True)
    monkeypatch.setattr(toy, "sheet", lambda *_: None)
    monkeypatch.setattr(toy, "gains", lambda *_: {})
    toy.finish(
        SimpleNamespace(out=out, rounds=2, no_data=False),
        results_like(base=(0.9, 0.9), **scores),
        None,
        None,
    )
    assert (tmp_path / "out/best.txt").read_text().strip() == f"toy/{expected}"
    assert f"best: {out / expected}," in capsys.readouterr().out


# ---------------------------------------------------------------- commands
def test_every_command_is_printed_as_one_would_type_it(whole):
    printed, handed = commands_in(whole.printed, "$"), whole.here.raw
    assert len(printed) == len(handed) > 20
    for words, command in zip(printed, handed):
        to = words[words.index(">") + 1] if ">" in words else None
        assert words[0] == "python" and words[1 : words.index(">") if to else None] == command[1:]
        assert Path(words[1]).resolve().parent == CODE
        assert (to is not None) == (Path(words[1]).name in ("caption.py", "evaluate.py"))
        assert to is None or Path(to).is_file()


def test_with_several_processes_the_stages_go_to_torchrun_and_the_rest_does_not(
    tmp_path, capsys, monkeypatch
):
    handed, out = [], tmp_path / "a folder"

    def run(command, stdout=None, stderr=None):
        handed.append(command)
        path = made.pop(0)  # it does its work
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return 0

    monkeypatch.setattr(toy_steps, "run_command", run)
    made, steps = (
        [out / "sft/adapters.json", out / "golden.jsonl", out / "captions/x.jsonl"],
        Loop(out, processes=2),
    )
    steps.sft("assets/toy", tmp_path, out / "sft", "--seed", 3)
    steps.golden(out / "sft", out / "qa", tmp_path, out)
    steps.run(
        out / "captions/x.jsonl",
        "caption.py",
        tmp_path,
        stdout=out / "captions/x.jsonl",
        stage=False,
    )
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    assert handed[0][:5] == handed[1][:5] == [sys.executable, *torchrun]
    assert Path(handed[0][5]).resolve() == CODE / "sft.py" and handed[0][-2:] == ["--seed", "3"]
    assert handed[2] == [sys.executable, os.path.relpath(CODE / "caption.py"), str(tmp_path)]
    printed = commands_in(capsys.readouterr().out, "$")
    assert printed[0] == ["torchrun", "--nproc_per_node", "2", *handed[0][5:]]
    assert printed[1] == ["torchrun", "--nproc_per_node", "2", *handed[1][5:]] and printed[1][
        -1
    ] == str(out)
    assert printed[2] == ["python", *handed[2][1:], ">", str(out / "captions/x.jsonl")]


def test_what_the_scripts_print_goes_to_the_log_where_there_is_one(tmp_path, capfd, monkeypatch):
    def run(command, stdout, stderr):
        stdout.write("printed\n")
        stderr.write("warned\n")
        (tmp_path / "made").touch()
        return 0

    monkeypatch.setattr(toy_steps, "run_command", run)
    (tmp_path / "log").write_text("before\n")
    Loop(tmp_path, log=tmp_path / "log").run(tmp_path / "made", "sft.py")
    assert (tmp_path / "log").read_text().splitlines()[0] == "before"
    assert sorted((tmp_path / "log").read_text().split()) == ["before", "printed", "warned"]
    assert capfd.readouterr().out.count("\n") == 1  # the command


def test_a_real_process_is_started_and_its_error_ends_in_one_line(tmp_path, capfd):
    """Nothing patched: evaluate.py refuses captions that are not there."""
    with pytest.raises(
        InputError, match=r"evaluate\.py exited with 1; fix the error reported above"
    ) as error:
        Loop(tmp_path).run(
            tmp_path / "x.json",
            "evaluate.py",
            tmp_path / "missing.jsonl",
            tmp_path / "truth.jsonl",
            stdout=tmp_path / "x.txt",
            stage=False,
        )
    assert "\n" not in str(error.value) and not (tmp_path / "x.txt").exists()
    assert capfd.readouterr().err.startswith("evaluate.py: ")


SAVING = """import os, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: None)
os.kill(os.getppid(), signal.SIGINT)
time.sleep(1)
open(sys.argv[1], "w").write("saved")"""


def test_control_c_leaves_a_command_the_time_to_save(tmp_path):
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            toy_steps.run_command([sys.executable, "-c", SAVING, str(tmp_path / "checkpoint")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "checkpoint").read_text() == "saved"


# ---------------------------------------------------------------- interrupted and resumed
def test_the_same_command_again_runs_nothing_and_prints_the_same_figures(whole, copied):
    run = run_toy(copied)
    assert (run.code, run.scripts) == (0, []) and commands_in(run.printed, "$") == []
    assert len(commands_in(run.printed, "done:")) == len(whole.scripts)
    assert figures_of(copied) == figures_of(whole.out)
    table, *_ = (
        text[text.index("] judged\n") :].split("best: ")[0] for text in (whole.printed, run.printed)
    )
    assert table.count("\n") > 18 and table in run.printed


def test_a_stage_whose_output_is_gone_is_the_only_one_that_runs_again(whole, copied):
    drop(copied, "golden-1", "captions/sft-greedy.jsonl", "dpo-2/adapters.json")
    run = run_toy(copied)
    assert run.code == 0 and run.scripts == ["caption.py", "golden.py", "dpo.py"]
    assert [Path(words[1]).name for words in commands_in(run.printed, "done:")] == [
        "caption.py",
        "evaluate.py",
        "caption.py",
        "evaluate.py",
        "sft.py",
        "evaluate.py",
        "caption.py",
        "evaluate.py",
        "qa_adapter.py",
        "evaluate.py",
        "dpo.py",
        *("caption.py", "evaluate.py") * 2,
        "qa_adapter.py",
        "golden.py",
        "evaluate.py",
        *("caption.py", "evaluate.py") * 2,
    ]
    assert figures_of(copied) == figures_of(whole.out)
    for name in ("golden-1/golden.jsonl", "dpo-2/adapters.safetensors"):
        assert (copied / name).read_bytes() == (whole.out / name).read_bytes()


def test_an_output_of_another_command_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        toy_steps, "run_command", lambda command, *_: (tmp_path / "made").touch() or 0
    )
    steps = Loop(tmp_path)
    steps.run(tmp_path / "made", "sft.py", "--lr", "1e-3")
    steps.run(tmp_path / "made", "sft.py", "--lr", "1e-3")
    with pytest.raises(
        InputError, match=r"made: was made by another command, sft.py --lr 1e-3; delete it"
    ):
        steps.run(tmp_path / "made", "sft.py", "--lr", "2e-3")
    (tmp_path / "made").unlink()
    steps.run(tmp_path / "made", "sft.py", "--lr", "2e-3")
    steps.run(tmp_path / "made", "sft.py", "--lr", "2e-3")


def second_round_gone(out):
    drop(
        out,
        "qa-2",
        "golden-2",
        "dpo-2",
        "captions/round-2-*",
        "scores/round-2-*",
        "scores/golden-2*",
        "results.json",
    )


def test_a_command_that_fails_ends_in_one_line_and_the_next_run_resumes_there(whole, copied):
    second_round_gone(copied)
    run = run_toy(copied, here=Here(lambda script, argv: 3 if script == "golden.py" else None))
    assert run.code == 1 and run.scripts == ["qa_adapter.py", "golden.py"]
    (line,) = [line for line in run.errors.splitlines() if line.startswith("toy.py: ")]
    assert "golden.py exited with 3" in line and run.errors.endswith(line + "\n")
    assert not (copied / "results.json").exists()
    again = run_toy(copied)
    assert again.code == 0 and again.scripts == RUN_OF_A_ROUND[1:]
    assert figures_of(copied) == figures_of(whole.out)
    for name in ("dpo-2/adapters.safetensors", "golden-2/golden.jsonl"):
        assert (copied / name).read_bytes() == (whole.out / name).read_bytes()


def test_captions_cut_short_by_a_failure_are_not_taken_for_whole(whole, copied):
    drop(copied, "captions/round-1-greedy.jsonl", "scores/round-1-greedy*")

    def half(script, argv):
        if script == "caption.py":
            print('{"image": "00000.png", "caption": "red", "finish": "eos", "tokens": 2}')
            return 1

    run = run_toy(copied, here=Here(half))
    assert (
        run.code == 1 and run.scripts == ["caption.py"] and "caption.py exited with 1" in run.errors
    )
    assert not (copied / "captions/round-1-greedy.jsonl").exists()
    assert run_toy(copied).scripts == ["caption.py", "evaluate.py"]
    assert figures_of(copied) == figures_of(whole.out)


def test_a_command_that_ends_well_without_its_file_is_no_success(copied):
    drop(copied, "dpo-2/adapters.json")
    run = run_toy(copied, here=Here(lambda script, argv: 0))
    assert run.code == 1 and "dpo.py exited with 0" in run.errors and run.scripts == ["dpo.py"]


def test_control_c_exits_with_130_and_the_next_run_resumes(whole, copied):
    second_round_gone(copied)

    def stop(script, argv):
        if script == "dpo.py":
            raise KeyboardInterrupt

    run = run_toy(copied, here=Here(stop))
    assert run.code == 130 and run.scripts[-1] == "dpo.py" and not (copied / "dpo-2").exists()
    assert run_toy(copied).scripts == RUN_OF_A_ROUND[3:]
    assert figures_of(copied) == figures_of(whole.out)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--seed", 1),
        ("--captions", 9),
        ("--images", 7),
        ("--held-out", 5),
        ("--samples", 2),
        ("--base", "elsewhere"),
    ],
)
def test_a_run_with_other_arguments_in_the_folder_is_refused_by_name(copied, flag, value):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    run = run_toy(copied, flag, value)
    assert run.code == 1 and run.scripts == [] and run.errors.count("\n") == 1
    shown = os.path.realpath(value) if flag == "--base" else value
    assert (
        run.errors.startswith("toy.py: ")
        and f"another {flag} " in run.errors
        and f"now {shown})" in run.errors
    )
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


def test_more_rounds_than_before_resume_with_the_third(whole, copied):
    run = run_toy(copied, "--rounds", 3)
    assert run.code == 0 and run.scripts == RUN_OF_A_ROUND
    assert run.here.commands[0][1][:2] == ["--init", str(copied / "dpo-2")]
    results = figures_of(copied)
    assert list(results)[-2:] == ["golden3", "round3"]
    assert {name: results[name] for name in list(results)[:-2]} == figures_of(whole.out)
    assert "round 3 against round 2: " in run.printed


@pytest.mark.parametrize(
    "name", ["rounds", "captions", "images", "held-out", "samples", "processes"]
)
def test_a_size_below_one_is_refused(capsys, name):
    with pytest.raises(SystemExit) as stop:
        toy.parse_args([f"--{name}", "0"])
    assert stop.value.code == 2 and f"--{name} must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--seed", "5", "report"], ["--out", "folder", "claims", "--table"]]
)
def test_flags_before_a_command_are_refused_where_they_would_mean_nothing(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        toy.parse_args(argv)
    assert (
        stop.value.code == 2 and f"flags of {argv[2]} must come after it" in capsys.readouterr().err
    )


# ---------------------------------------------------------------- who may see the truth
def test_only_evaluate_py_opens_a_file_of_the_truth(whole):
    def inside(folder):
        return {
            script for script, file in whole.opened if Path(file).is_relative_to(whole.out / folder)
        }

    assert inside("truth") == {"evaluate.py"}
    assert inside("data/held-out") == {"caption.py"}
    assert inside("data/train") == {"sft.py", "qa_adapter.py"} and inside("data/images-1") == {
        "golden.py",
        "dpo.py",
    }


def test_without_the_truth_every_stage_leaves_the_same_bytes_and_evaluate_py_one_line(
    whole, tmp_path, capfd
):
    """The commands of the whole run again, in a folder with the data of the loop and without its truth."""
    out, n_compared = tmp_path / "out" / "toy", 0
    shutil.copytree(whole.out / "data", out / "data")
    assert not list(out.rglob("*truth*"))
    blind = Here()
    for (script, argv), printed in zip(whole.here.commands, commands_in(whole.printed, "$")):
        argv = [part.replace(str(whole.out), str(out)) for part in argv]
        capfd.readouterr()
        output = io.StringIO()
        code = blind([sys.executable, str(CODE / script), *argv], stdout=output)
        if script == "evaluate.py":
            error = capfd.readouterr().err
            assert (
                code == 1
                and error.startswith("evaluate.py: ")
                and error.count("\n") == 1
                and "truth" in error
            )
            continue
        assert code == 0
        captions = Path(printed[-1].replace(str(whole.out), str(out)))
        if script == "caption.py":
            captions.parent.mkdir(exist_ok=True)
            captions.write_text(output.getvalue())
        flags = dict(pairwise(argv))
        files = (
            [captions]
            if script == "caption.py"
            else [
                Path(flags["--out"]) / name
                for name in (
                    ("golden.jsonl", "record.jsonl")
                    if script == "golden.py"
                    else ("adapters.safetensors",)
                )
            ]
        )
        for file in files:
            expected = Path(str(file).replace(str(out), str(whole.out))).read_text("latin-1")
            assert file.read_text("latin-1").replace(str(out), str(whole.out)) == expected, file
            n_compared += 1
    assert n_compared == 8 + 1 + 2 * (1 + 2 + 1)


def test_the_held_out_folder_holds_nothing_but_pictures(whole):
    for name, others in (
        ("held-out", []),
        ("images-1", []),
        ("train", ["captions.jsonl", "questions.jsonl"]),
    ):
        files = sorted(path.name for path in (whole.out / "data" / name).rglob("*"))
        pictures = [file for file in files if file.endswith(".png")]
        assert sorted(set(files) - set(pictures)) == others
        size = {"train": "--captions", "held-out": "--held-out"}.get(name, "--images")
        assert len(pictures) == SIZES[size]
        for file in pictures:
            with Image.open(whole.out / "data" / name / file) as picture:
                assert not picture.info  # text in the file itself could betray the truth, too


def test_captions_to_learn_from_are_true_and_incomplete(tmp_path):
    folder, truth = make_split(tmp_path, "train", 60, 0, ("captions", "questions"))
    known = {row["image"]: {fact["text"] for fact in row["facts"]} for row in toy.toy_rows(truth)}
    rows = stages.read_rows(folder / "captions.jsonl")
    assert [row["image"] for row in rows] == sorted(known)
    assert all(set(row) == {"image", "caption"} for row in rows)
    stated = {row["image"]: world.statements(row["caption"]) for row in rows}
    for image, statements in stated.items():
        assert 2 <= len(set(statements)) == len(statements) and set(statements) <= known[image]
    shares = [len(stated[image]) / len(known[image]) for image in known]
    assert 0.4 < np.mean(shares) < 0.75 and np.mean([share < 1 for share in shares]) > 0.8


def test_a_drawing_that_was_interrupted_is_done_again(tmp_path, monkeypatch):
    write_rows = world.write_rows

    def stop(path, rows, folder):
        write_rows(path, rows, folder)
        raise KeyboardInterrupt  # after the first file of several

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(world, "write_rows", stop)
        make_split(tmp_path, "train", 3, 0, ("captions",))
    (tmp_path / "data/train/00001.png").write_bytes(b"half")
    folder, truth = make_split(tmp_path, "train", 3, 0, ("captions",))
    assert len(toy.toy_rows(truth)) == 3 and (folder / "00001.png").stat().st_size > 1000
    (folder / "00001.png").unlink()
    make_split(tmp_path, "train", 3, 0, ("captions",))  # a complete split is not drawn again
    assert not (folder / "00001.png").exists()


# ---------------------------------------------------------------- the table, the gains, the sheet
def test_values_are_in_their_cells_of_the_table():
    def figures(first):
        return {key: first + k / 100 for k, key in enumerate(toy.COLUMNS)}

    results = {
        "sft": {
            "greedy": {**figures(0.1), "statements": 12.34, "planted": None},
            "sampled": figures(0.2),
        },
        "golden1": {
            "sampled": figures(0.3),
            "single": figures(0.4),
            "union": figures(0.5),
            "gate": {"precision": 0.876, "recall": 0.765, "base_rate": 0.654},
        },
    }
    head, *rows, gate = toy.table(results)
    assert re.split(r"  +", head.strip()) == [
        "P",
        "R",
        "F1",
        "detail P",
        "detail R",
        "planted",
        "ends",
        "repeats",
        "statements",
    ]
    assert [line.split() for line in rows] == [
        [
            "sft",
            "greedy",
            "0.100",
            "0.110",
            "0.120",
            "0.130",
            "0.140",
            "-",
            "0.160",
            "0.170",
            "12.3",
        ],
        [
            "sft",
            "sampled",
            "0.200",
            "0.210",
            "0.220",
            "0.230",
            "0.240",
            "0.250",
            "0.260",
            "0.270",
            "0.3",
        ],
        [
            "golden1",
            "golden",
            "0.300",
            "0.310",
            "0.320",
            "0.330",
            "0.340",
            "0.350",
            "0.360",
            "0.370",
            "0.4",
        ],
        [
            "golden1",
            "single",
            "0.400",
            "0.410",
            "0.420",
            "0.430",
            "0.440",
            "0.450",
            "0.460",
            "0.470",
            "0.5",
        ],
        [
            "golden1",
            "union",
            "0.500",
            "0.510",
            "0.520",
            "0.530",
            "0.540",
            "0.550",
            "0.560",
            "0.570",
            "0.6",
        ],
    ]
    ends = [match.end() for match in re.finditer(r"\S+(?: \S+)?(?=  |$)", head)]
    for line in rows:  # each value ends below its title
        assert [match.end() for match in re.finditer(r"\S+", line)][2:] == ends
    assert gate.startswith("golden1: ") and re.findall(r"0\.\d+", gate) == [
        "0.876",
        "0.765",
        "0.654",
    ]


@pytest.fixture
def judged(tmp_path):
    """Six held-out scenes with captions of two captioners, the second better at being complete, worse at being true."""
    images, truth = make_split(tmp_path, "held-out", 6, 0, ())
    (tmp_path / "captions").mkdir()
    rows = toy.toy_rows(truth)
    for way in ("greedy", "sampled"):
        for name, most, wrong in (
            ("sft", 2, ()),
            ("round-1", 4 if way == "greedy" else 3, ("top-left pink cow",)),
        ):
            captions = [
                {
                    "image": str(images / row["image"]),
                    "finish": "eos",
                    "tokens": 9,
                    "caption": ", ".join(
                        [
                            *(fact["text"] for fact in row["facts"][:most]),
                            *(wrong if k < 3 else ()),
                            *row["also_true"][:1],
                        ]
                    ),
                }
                for k, row in enumerate(rows)
            ]
            stages.write_rows(tmp_path / f"captions/{name}-{way}.jsonl", captions)
    return SimpleNamespace(out=tmp_path, images=images, truth=truth)


def test_the_gain_of_a_round_is_the_difference_that_evaluate_py_reports(judged):
    text = toy.in_words(toy.gains([judged.out], "sft", "round-1"))
    parts = re.findall(r"(greedy|sampled) (P|R|F1) ([+-]\S+) \[([+-]\S+), ([+-][.\d]+)\]", text)
    assert [part[:2] for part in parts] == [
        (way, name) for way in ("greedy", "sampled") for name in ("P", "R", "F1")
    ]
    truth = toy.toy_rows(judged.truth)
    for way, name, *numbers in parts:
        key = {"P": "precision", "R": "recall", "F1": "f1"}[name]
        before, after = (toy.read_captions(judged.out, which, way) for which in ("sft", "round-1"))
        expected = scoring.difference(before, after, truth, key)
        assert [float(number) for number in numbers] == pytest.approx(expected, abs=0.00051)
        change = scoring.score(after, truth)[key] - scoring.score(before, truth)[key]
        assert float(numbers[0]) == pytest.approx(change, abs=0.00051) and abs(change) > 0.01
        assert (change > 0) == (name != "P")


def red(out, first=0, last=None):
    """Reddish pixels in the written part of some rows of pixels of a sheet."""
    pixels = np.asarray(Image.open(out / "sheet.png").convert("RGB")).astype(int)[first:last, 216:]
    return int(
        ((pixels[..., 0] - pixels[..., 1] > 60) & (pixels[..., 0] - pixels[..., 2] > 60)).sum()
    )


def test_the_sheet_writes_wrong_statements_in_red_next_to_their_picture(judged):
    toy.sheet(judged.out, judged.images, judged.truth, "sft", "round-1", n=6)
    height = 192 + 16
    assert [red(judged.out, k * height, (k + 1) * height) > 50 for k in range(6)] == [True] * 3 + [
        False
    ] * 3
    toy.sheet(judged.out, judged.images, judged.truth, "sft", "sft", n=6)
    assert red(judged.out) == 0


def test_the_sheet_shows_the_pictures_in_order_and_missing_facts_in_grey(judged):
    toy.sheet(judged.out, judged.images, judged.truth, "sft", "sft", n=6)
    sheet = Image.open(judged.out / "sheet.png")
    for k in range(6):
        shown = np.asarray(sheet.crop((8, k * 208 + 8, 200, k * 208 + 200)))
        picture = Image.open(judged.images / f"{k:05d}.png")
        assert np.array_equal(shown[1::3, 1::3], np.asarray(picture))

    def grey(name):
        toy.sheet(judged.out, judged.images, judged.truth, name, name, n=6)
        pixels = np.asarray(Image.open(judged.out / "sheet.png"))[:, 216:]
        return int((pixels == 0x99).all(-1).sum())

    rows = toy.toy_rows(judged.truth)
    stages.write_rows(
        judged.out / "captions/full-sampled.jsonl",
        [
            {"image": row["image"], "caption": ", ".join(fact["text"] for fact in row["facts"])}
            for row in rows
        ],
    )
    assert grey("sft") > 3 * grey("full")  # in which only the labels are grey


# ---------------------------------------------------------------- without data, and other bases
def test_the_loop_without_data_needs_images_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_toy(Path("toy"), "--no-data")
    assert run.code == 0, run.errors
    results = json.loads(Path("toy/results.json").read_text())
    assert list(results) == ["base", "golden1", "round1", "golden2", "round2"]
    made = [
        json.loads(line)["command"] for line in Path("toy/commands.jsonl").read_text().splitlines()
    ]
    scripts = [command[0] for command in made]
    assert not {"sft.py", "qa_adapter.py"} & set(scripts)
    golden = [command for command in made if command[0] == "golden.py"]
    dpo = [command for command in made if command[0] == "dpo.py"]
    assert [command[command.index("--captioner") + 1].rsplit("/")[-1] for command in golden] == [
        "none",
        "dpo-1",
    ]
    assert [command[command.index("--qa") + 1] for command in golden] == ["none", "none"]
    assert [command[command.index("--init") + 1].rsplit("/")[-1] for command in dpo] == [
        "none",
        "dpo-1",
    ]
    assert not list(Path("toy/data").glob("train*"))
    assert set(json.loads(Path("toy/gains.json").read_text())) == {"round1", "round2"}
    assert "round 1 against base: greedy P" in run.printed
    with_data = run_toy(Path("toy"))
    assert with_data.code == 1 and "another --no-data" in with_data.errors


def test_pooled_runs_are_the_mean_and_all_scenes_together(judged, tmp_path, capsys):
    runs = [tmp_path / "a", tmp_path / "b"]
    for k, run in enumerate(runs):
        shutil.copytree(judged.out / "captions", run / "captions")
        shutil.copytree(judged.out / "truth", run / "truth")
        figures = dict.fromkeys(toy.COLUMNS, 0.5 + k / 4)
        stages.write_rows(
            run / "results.json", [{"sft": {"greedy": figures}, "round1": {"greedy": figures}}]
        )
    assert toy.main(["pool", *map(str, runs), "--json", str(tmp_path / "pool.json")]) == 0
    pooled = json.loads((tmp_path / "pool.json").read_text())
    assert pooled["mean"]["sft"]["greedy"]["f1"] == 0.625 and set(pooled["each"]) == set(
        map(str, runs)
    )
    alone = toy.gains([judged.out], "sft", "round-1")["greedy"]["precision"]
    change, low, high = pooled["gains"]["round1"]["greedy"]["precision"]
    assert change == pytest.approx(alone[0]) and alone[1] < low < change < high < alone[2]
    assert "0.625" in capsys.readouterr().out
    assert toy.main(["pool", str(tmp_path)]) == 1
    assert "let the run finish first" in capsys.readouterr().err


def test_the_dial_is_the_precision_and_recall_of_verified_captions(copied, tmp_path, capsys):
    """The curve's point at the run's own threshold is what evaluate.py would say of these captions."""
    out = tmp_path / "dial.json"
    with running(Here()):
        assert toy.main(["dial", str(copied), "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert set(figures["curves"]) == {"verified", "union of 6, verified"} == set(figures["gains"])
    rows = stages.read_rows(copied / "dial-6/captions.jsonl")
    assert len(rows) == int(SIZES["--held-out"]) and all("statements" in row for row in rows)
    recalls = [point["recall"] or 0 for point in figures["curves"]["union of 6, verified"]]
    assert recalls == sorted(recalls, reverse=True) and len(recalls) == len(figures["thresholds"])
    written = [
        {"image": Path(row["image"]).name, "caption": row.get("caption", "")} for row in rows
    ]
    truth = [
        {**row, "image": Path(row["image"]).name}
        for row in stages.read_rows(copied / "truth/held-out.jsonl")
    ]
    expected = scoring.score(written, truth)
    assert figures["union of 6, verified"]["recall"] == pytest.approx(expected["recall"])
    assert toy.main(["dial", str(tmp_path)]) == 1
    assert "no results.json" in capsys.readouterr().err


def test_captions_of_a_loose_base_call_some_rings_circles():
    rng = random.Random(0)
    said = [base.as_captioned("center blue ring", 0.6, rng) for _ in range(1000)]
    assert set(said) == {"center blue ring", "center blue circle"}
    assert 550 < said.count("center blue circle") < 650
    state = rng.getstate()
    assert base.as_captioned("center blue ring", 0.0, rng) == "center blue ring"
    assert base.as_captioned("background gray", 1.0, rng) == "background gray"
    assert rng.getstate() == state  # the qwen_vl base's random numbers are as before


def test_the_toy_base_of_todays_kind(tmp_path):
    """assets/toy-qwen3-vl: as transformers saves it, small, and good but not perfect."""
    folder = Path(toy.__file__).parent / "assets/toy-qwen3-vl"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4e6
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        "Qwen3VLForConditionalGeneration"
    ]
    figures = base.measure(open_base(folder), 60, 7)["six views"]
    assert 0.85 < figures["yes/no"]["all"][0] < 0.995
    assert 0.8 < figures["precision"]["all"][0] < 0.99 and figures["recall"]["all"][0] > 0.8
