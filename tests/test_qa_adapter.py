"""qa_adapter.py as a user runs it: what it learns below the captioner, the gate it measures, and what it leaves alone."""

import functools
import itertools
import json
import random
import re
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import stages
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import adapters
import generate
import plumbing.data
import plumbing.train
import qa_adapter
import sft
from chunking import BOXES, views
from generate import yes_probability
from model import QwenVL
from plumbing.errors import InputError
from plumbing.images import open_image

SIDE = 28  # of a view of the tiny base
QUICK = ("--workers", 0, "--lr", 0.01, "--warmup", 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return stages.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def captioner(tiny_base, data, tmp_path_factory):
    """What three steps of sft.py leave."""
    out = tmp_path_factory.mktemp("captioner") / "sft"
    code = stages.run(
        sft,
        "--base",
        tiny_base,
        "--data",
        data / "captions.jsonl",
        "--out",
        out,
        *QUICK,
        "--batch",
        5,
        "--max-steps",
        3,
    )
    assert code == 0
    return out


def arguments(captioner, data, out, *more):
    """30 questions to train in steps of 7, ten held out: an epoch ends in the middle of step 5."""
    return [
        "--init",
        captioner,
        "--data",
        data / "questions.jsonl",
        "--out",
        out,
        *QUICK,
        "--holdout",
        0.25,
        "--batch",
        7,
        "--max-steps",
        6,
        "--save-every",
        4,
        *more,
    ]


@pytest.fixture(scope="module")
def whole(captioner, data, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert stages.run(qa_adapter, *arguments(captioner, data, out)) == 0
    return out


@pytest.fixture
def kept(monkeypatch):
    """The models that stages in this process load, last one last."""
    models, from_pretrained = [], QwenVL.from_pretrained

    def keeping(*args, **kwargs):
        models.append(from_pretrained(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(QwenVL, "from_pretrained", keeping)
    return models


def fresh_qa(captioner):
    """The captioner with QA adapters as a run of seed 0 starts with -> model, their names."""
    torch.manual_seed(0)
    model = QwenVL.from_pretrained(adapters.read_card(captioner)["base"])
    adapters.load(model, captioner)
    return model, adapters.attach(model, "qa", ("language",), below="caption")


def with_qa(captioner, qa):
    """The base with the captioner and a QA folder, all switched on."""
    model = QwenVL.from_pretrained(adapters.read_card(captioner)["base"])
    adapters.load(model, captioner)
    adapters.load(model, qa)
    return model


def logits_of(model, path):
    """Logits after an image and two prompts, the caption's and a question's, in eval mode."""
    model.eval()
    prompts = [
        model.caption_prompt(len(BOXES)),
        model.head(len(BOXES)) + model.request("Is it red? Answer:"),
    ]
    with torch.no_grad():
        return [model(torch.tensor([ids]), views(open_image(path), SIDE)) for ids in prompts]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def reference_nll(model, rows):
    """Sum of -log p and number of target tokens of question rows: one by one, unpadded, from all the logits."""
    total, n = 0.0, 0
    for row in rows:
        t = model.tokenizer
        prompt = ([t.image_start_id] + [t.image_pad_id] * 4 + [t.image_end_id]) * 6 + t.encode(
            f"{row['question']} Answer:"
        )
        target = [*t.encode(" " + row["answer"]), t.eos_id]
        logits = model(torch.tensor([prompt + target]), views(open_image(row["image"]), SIDE))[0]
        total = total + F.cross_entropy(
            logits[-len(target) - 1 : -1].double(), torch.tensor(target), reduction="sum"
        )
        n += len(target)
    return total, n


def questions(data):
    return [
        {**row, "image": data / row["image"]} for row in stages.read_rows(data / "questions.jsonl")
    ]


# ---------------------------------------------------------------- what it learns
def test_one_batch_overfits(captioner, data, tmp_path):
    rows = stages.read_rows(data / "questions.jsonl")[:4]
    assert {row["answer"][:2] for row in rows} == {"Ye", "No"}
    few = stages.write_rows(data / "few.jsonl", rows)
    code = stages.run(
        qa_adapter,
        "--init",
        captioner,
        "--data",
        few,
        "--out",
        tmp_path,
        "--workers",
        0,
        "--lr",
        0.02,
        "--batch",
        4,
        "--micro-batch",
        4,
        "--holdout",
        0,
        "--max-steps",
        100,
    )
    logged = stages.steps_of(tmp_path)
    assert code == 0 and logged[1]["loss"] > 2 and logged[100]["loss"] < 0.1
    model = with_qa(captioner, tmp_path)
    p_yes = yes_probability(
        model, views(open_image(data / rows[0]["image"]), SIDE), [row["question"] for row in rows]
    )
    assert (
        [p > 0.9 for p in p_yes]
        == [p > 0.1 for p in p_yes]
        == [row["answer"].startswith("Yes") for row in rows]
    )


def test_a_step_s_loss_and_gradient_are_their_formulas(captioner, data, tmp_path):
    """All 40 questions in uneven micro-batches, on fresh QA adapters: the captioner's own loss on their answers."""
    stages.run(
        qa_adapter,
        *arguments(
            captioner,
            data,
            tmp_path,
            "--holdout",
            0,
            "--batch",
            40,
            "--micro-batch",
            7,
            "--max-steps",
            1,
        ),
    )
    model, names = fresh_qa(captioner)
    total, n = reference_nll(model.train(), questions(data))
    gradients = torch.autograd.grad(total / n, [model.get_parameter(name) for name in names])
    logged = stages.steps_of(tmp_path)[1]
    assert logged["loss"] == pytest.approx((total / n).item(), rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(
        torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-4
    )


def test_base_and_captioner_stay_bit_equal_and_exactly_the_listed_names_move(
    captioner, data, tmp_path, kept
):
    assert stages.run(qa_adapter, *arguments(captioner, data, tmp_path)) == 0
    (model,), base = (
        kept,
        load_file(Path(adapters.read_card(captioner)["base"]) / "model.safetensors"),
    )
    after, frozen = model.state_dict(), {**base, **stages.weights_of(captioner)}
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    names = sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert (
        names
        == adapters.names_of(model, "qa")
        == sorted(after.keys() - frozen.keys())
        == sorted(stages.weights_of(tmp_path))
    )
    assert len(names) == 4 * 2 * 2 and all(
        re.match(r"transformer\.h\.\d\.(attn|mlp)_slot\.qa\.", n) for n in names
    )
    fresh = fresh_qa(captioner)[0]
    moves = [(after[name] - fresh.get_parameter(name)).abs().max().item() for name in names]
    assert all(0 < move < 6 * 2 * 0.01 for move in moves)  # six steps at this learning rate
    assert model.transformer.h[0].attn_slot.stack == ("qa", "caption")


def test_switched_off_it_is_exactly_the_captioner(captioner, whole, data):
    path = data / "00000.png"
    alone = QwenVL.from_pretrained(adapters.read_card(captioner)["base"])
    bare = logits_of(alone, path)
    adapters.load(alone, captioner)
    expected, model = logits_of(alone, path), with_qa(captioner, whole)
    both = logits_of(model, path)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(both, expected))
    with adapters.active(model, ["caption"]):
        assert same(logits_of(model, path), expected)
    with adapters.active(model, []):
        assert same(logits_of(model, path), bare)
    assert same(logits_of(model, path), both)


def test_with_vision_adapters_stand_in_both_towers_below_the_captioner_s(
    captioner, whole, data, tmp_path
):
    assert stages.run(qa_adapter, *arguments(captioner, data, tmp_path, "--vision")) == 0
    card, usual = adapters.read_card(tmp_path), adapters.read_card(whole)
    assert card["where"] == ["vision", "language"] and usual["where"] == ["language"]
    assert card["below"] == usual["below"] == "caption"
    model, path = with_qa(captioner, tmp_path), data / "00000.png"
    assert {slot.stack for tower in adapters.TOWERS for slot, *_ in model.places(tower)} == {
        ("qa", "caption")
    }
    names = adapters.names_of(model, "qa")
    assert names == sorted(stages.weights_of(tmp_path)) and len(names) == 4 * 2 * (2 + 1)
    assert sum(".visual." in name for name in names) == 4 * 2
    assert not any(".visual." in name for name in stages.weights_of(whole))
    assert all(
        model.get_parameter(name).any() for name in names if ".up." in name
    )  # all of them have learned
    pixels, see = views(open_image(path), SIDE), model.transformer.visual
    with torch.no_grad():
        seen, usual_seen = see(pixels), with_qa(captioner, whole).transformer.visual(pixels)
        with adapters.active(model, ["caption"]):
            of_captioner, logits = see(pixels), logits_of(model, path)
    assert torch.equal(usual_seen, of_captioner) and not torch.allclose(
        seen, of_captioner, atol=1e-3
    )
    alone = QwenVL.from_pretrained(adapters.read_card(captioner)["base"])
    adapters.load(alone, captioner)
    assert same(logits_of(alone, path), logits)


# ---------------------------------------------------------------- questions on disk
def test_answers_start_with_yes_or_no_and_the_rest_is_told(data, capsys):
    good = [
        ("Yes", "Yes", True),
        ("no", "No", False),
        ("YES, a red one", "Yes, a red one", True),
        (" No.\n It is\tblue", "No. It is blue", False),
        ("yes; two", "Yes; two", True),
    ]
    bad = [
        "maybe",
        "Nothing like it",
        "Yesterday",
        "None",
        "Not at all",
        "north",
        "",
        " ",
        "1",
        None,
        3,
        True,
    ]
    path, image = data / "answers.jsonl", {"image": "00000.png", "question": " Is it\n red? "}
    stages.write_rows(
        path, [{**image, "answer": answer} for answer in [*(a for a, _, _ in good), *bad]]
    )
    rows, found = plumbing.data.read_questions(path)
    assert [(row["answer"], row["yes"]) for row in rows] == [
        (text, truth) for _, text, truth in good
    ]
    assert {row["question"] for row in rows} == {"Is it red?"} and rows[0][
        "image"
    ] == data / "00000.png"
    assert [where for where, _ in found] == [f"{path}:{k}" for k in range(6, 18)]
    assert all("yes nor no" in reason for _, reason in found[:6])


@pytest.mark.parametrize(
    "row, expected_word",
    [
        ("{", "JSON"),
        ("[]", "JSON"),
        ({"image": "00000.png", "answer": "Yes"}, "question"),
        ({"image": "gone.png", "question": "x?", "answer": "Yes"}, "gone.png is not there"),
        ("[" * 100_000, "JSON"),
        ({"image": "00000.png", "question": " ", "answer": "Yes"}, "question"),
        ({"image": "x" * 300, "question": "x?", "answer": "Yes"}, "not there"),
    ],
)
def test_a_bad_question_is_told_with_file_and_line(data, row, expected_word):
    path = stages.write_rows(
        data / "bad.jsonl", [row, {"image": "00001.png", "question": "x?", "answer": "No"}]
    )
    rows, bad = plumbing.data.read_questions(path)
    assert (
        len(rows) == 1
        and [where for where, _ in bad] == [f"{path}:1"]
        and expected_word in bad[0][1]
    )
    stages.write_rows(path, [row])
    with pytest.raises(InputError, match=r"no usable .*bad\.jsonl:1") as error:
        plumbing.data.read_questions(path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the gate
def test_the_gate_counts(seed=0):
    figures = generate.gate([0.9, 0.5, 0.4, 0.2, 0.8], [True, False, True, False, True], 0.5)
    assert figures == {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3}
    assert generate.gate([0.1], [True], 0.5) == {"accuracy": 0, "precision": 0, "recall": 0}
    assert generate.gate([0.5], [True], 0.5) == {
        "accuracy": 1,
        "precision": 1,
        "recall": 1,
    }  # ≥ threshold


def f_beta(p_yes, truth, beta, threshold):
    """(1 + β²) P R / (β² P + R)."""
    figures = generate.gate(p_yes, truth, threshold)
    precision, recall = figures["precision"], figures["recall"]
    both = beta**2 * precision + recall
    return (1 + beta**2) * precision * recall / both if both else 0.0


@pytest.mark.parametrize("beta", [0.5, 1])
def test_the_threshold_has_the_best_f_of_all(beta):
    rng = random.Random(0)
    for case in range(150):
        n = rng.randint(1, 12)
        p_yes = [rng.choice((0.0, 1.0, rng.random(), round(rng.random(), 1))) for _ in range(n)]
        truth = [rng.random() < (0.3 + 0.5 * p if case % 2 else 0.5) for p in p_yes]

        score = functools.partial(f_beta, p_yes, truth, beta)
        found = generate.calibrate(p_yes, truth, beta)
        edges = sorted({0.0, 1.0, *p_yes})
        candidates = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
        best = max(map(score, candidates))
        assert 0 < found < 1 and score(found) == pytest.approx(best)
        assert (
            best >= max(score(k / 1000) for k in range(1, 1000)) - 1e-9
        )  # no other threshold does better
        closest = min((t for t in candidates if score(t) > best - 1e-9), key=lambda t: abs(t - 0.5))
        assert abs(found - 0.5) == pytest.approx(abs(closest - 0.5))
    assert generate.calibrate([0.2, 0.8], [False, True], beta) == 0.5


def test_precision_counts_for_more_than_recall_by_default():
    """A threshold below .4 accepts three more true ones, and two false ones."""
    p_yes = [0.9] * 10 + [0.4] * 5 + [0.1] * 5
    truth = [True] * 10 + [True] * 3 + [False] * 7
    assert generate.calibrate(p_yes, truth) == pytest.approx(0.65)
    assert generate.calibrate(p_yes, truth, beta=1) == pytest.approx(0.25)


def test_what_is_printed_logged_and_kept_is_that_of_the_held_out_questions(
    captioner, data, tmp_path, capsys
):
    code = stages.run(qa_adapter, *arguments(captioner, data, tmp_path))
    out, err = capsys.readouterr()
    _, held = plumbing.data.split(
        plumbing.data.read_questions(data / "questions.jsonl")[0], 0.25, 0
    )
    model = with_qa(captioner, tmp_path)
    p_yes = [
        yes_probability(model, views(open_image(row["image"]), SIDE), [row["question"]]).item()
        for row in held
    ]
    truth, threshold = (
        [row["yes"] for row in held],
        json.loads((tmp_path / "adapters.json").read_text())["threshold"],
    )
    expected_threshold = generate.calibrate(p_yes, truth)
    assert (
        code == 0
        and len(held) == 8
        and {row["image"] for row in held} == {held[0]["image"], held[-1]["image"]}
    )
    assert threshold == pytest.approx(expected_threshold, abs=1e-4)
    expected = {
        "at .5": generate.gate(p_yes, truth, 0.5),
        "calibrated": generate.gate(p_yes, truth, threshold),
    }
    for line, name in zip(out.splitlines(), expected):
        assert line == f"8 held-out questions, {name}: " + ", ".join(
            f"{k} {v:.3f}" for k, v in expected[name].items()
        )
    assert out.splitlines()[2] == f"threshold {threshold:.4f}"
    logged = stages.steps_of(tmp_path)
    assert {key: logged[6]["held_out_" + key] for key in expected["at .5"]} == expected["at .5"]
    assert [step for step, row in logged.items() if "held_out_accuracy" in row] == [4, 6]
    card = json.loads((tmp_path / "adapters.json").read_text())
    assert card["held_out"] == expected
    assert err.startswith(f"captioner {captioner}; 32 questions, 0 bad ones left out, 8 held out")
    assert "GiB" in err.splitlines()[1]


def test_without_a_held_out_part_the_threshold_is_one_half(captioner, data, tmp_path, capsys):
    assert (
        stages.run(
            qa_adapter, *arguments(captioner, data, tmp_path, "--holdout", 0, "--max-steps", 1)
        )
        == 0
    )
    assert "threshold 0.5000" in capsys.readouterr().out
    assert json.loads((tmp_path / "adapters.json").read_text())["threshold"] == 0.5


# ---------------------------------------------------------------- from stage to stage
def test_its_defaults_are_the_previous_stage_s_outputs(
    tiny_base, data, tmp_path, monkeypatch, capsys
):
    """sft.py and qa_adapter.py, each with no word about where things are, but for the base."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, "data")
    shutil.copy("data/captions.jsonl", "data/sft.jsonl")
    shutil.copy("data/questions.jsonl", "data/qa.jsonl")
    assert stages.run(sft, "--base", tiny_base, "--max-steps", 1, "--workers", 0, "--batch", 2) == 0
    assert stages.run(qa_adapter, "--max-steps", 1, "--workers", 0, "--batch", 2) == 0
    assert "captioner out/sft" in capsys.readouterr().err
    card = adapters.read_card("out/qa")
    assert (card["base"], card["stage"], card["name"], card["below"]) == (
        str(tiny_base),
        "qa",
        "qa",
        "caption",
    )
    assert (card["parent"], card["parent_hash"]) == ("out/sft", adapters.folder_hash("out/sft"))
    assert card["where"] == ["language"] and not card["soft_prompt"] and 0 < card["threshold"] < 1
    assert (
        card["arguments"].items()
        >= {
            "init": "out/sft",
            "data": "data/qa.jsonl",
            "batch": 2,
            "holdout": 0.1,
            "base": None,
            "reduction": 8,
        }.items()
    )
    moved = shutil.copytree(
        tiny_base, tmp_path / "elsewhere"
    )  # the base may be said to stand elsewhere
    assert (
        stages.run(qa_adapter, "--base", moved, "--out", "qa-2", "--max-steps", 1, "--workers", 0)
        == 0
    )
    assert adapters.read_card("qa-2")["base"] == str(moved)


@pytest.mark.parametrize("tune", ["adapters", "prompt", "lora"])
def test_a_qa_folder_goes_with_its_own_captioner_alone(tiny_base, data, tmp_path, tune):
    for seed, name in enumerate(("mine", "other")):
        stages.run(
            sft,
            "--base",
            tiny_base,
            "--data",
            data / "captions.jsonl",
            "--out",
            tmp_path / name,
            *QUICK,
            "--tune",
            tune,
            "--seed",
            seed,
            "--max-steps",
            1,
            "--batch",
            2,
        )
    assert (
        stages.run(
            qa_adapter, *arguments(tmp_path / "mine", data, tmp_path / "qa", "--max-steps", 1)
        )
        == 0
    )
    assert len(adapters.names_of(with_qa(tmp_path / "mine", tmp_path / "qa"), "qa")) == 16
    with pytest.raises(InputError, match="captioner"):
        with_qa(tmp_path / "other", tmp_path / "qa")
    with pytest.raises(InputError, match="captioner"):
        adapters.load(QwenVL.from_pretrained(tiny_base), tmp_path / "qa")


def test_a_user_s_mistake_is_one_line(captioner, whole, data, tmp_path, monkeypatch, capsys):
    from conftest import write_tiny_base

    monkeypatch.chdir(tmp_path)
    other = write_tiny_base(tmp_path / "other", seed=5)
    unlike = shutil.copytree(captioner, tmp_path / "unlike")
    stages.write_rows(
        tmp_path / "none.jsonl", [{"image": "x.png", "question": "x?", "answer": "maybe"}]
    )
    for more, expected_word in (
        (["--init", "gone"], "gone: no adapters.json"),
        (["--data", "gone.jsonl"], "gone.jsonl"),
        (["--init", whole], "captioner"),
        (["--base", other], "another base"),
        (["--base", "nowhere"], "nowhere"),
        (["--data", "none.jsonl"], "none.jsonl:1"),
        (["--reduction", "0"], "--reduction"),
        (["--init", tiny_file(unlike)], "unlike"),
        (["--device", "tpu"], "--device tpu"),
    ):
        code = stages.run(qa_adapter, *arguments(captioner, data, tmp_path / "out", *more))
        out, err = capsys.readouterr()
        assert (
            code == 1 and out == "" and err.count("\n") == 1 and err.startswith("qa_adapter.py: ")
        ), err
        assert expected_word in err and not (tmp_path / "out").exists()


def test_a_qa_folder_is_no_captioner_for_sft_either(tiny_base, whole, data, tmp_path, capsys):
    code = stages.run(
        sft,
        "--base",
        tiny_base,
        "--data",
        data / "captions.jsonl",
        "--out",
        tmp_path / "out",
        "--init",
        whole,
        "--max-steps",
        1,
    )
    err = capsys.readouterr().err
    assert (
        code == 1 and err.count("\n") == 1 and str(whole) in err and not (tmp_path / "out").exists()
    )


def tiny_file(folder):
    """The folder, its weights cut off."""
    (folder / "adapters.safetensors").write_bytes(b"short")
    return folder


@pytest.mark.parametrize(
    "more, expected_word",
    [
        (["--lr", 0.02], "lr"),
        (["--reduction", 4], "reduction"),
        (["--vision"], "vision"),
        (["--holdout", 0.5], "questions"),
        ("captioner", "captioner"),
        ("answers", "(questions|rows)"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    captioner, whole, tiny_base, data, tmp_path, capsys, more, expected_word
):
    out = shutil.copytree(whole, tmp_path / "out")
    if more == "captioner":
        stages.run(
            sft,
            "--base",
            tiny_base,
            "--data",
            data / "captions.jsonl",
            "--out",
            tmp_path / "sft",
            *QUICK,
            "--max-steps",
            1,
        )
        more = ["--init", tmp_path / "sft"]
    if more == "answers":
        rows = stages.read_rows(data / "questions.jsonl")
        more = [
            "--data",
            stages.write_rows(data / "changed.jsonl", [{**row, "answer": "No"} for row in rows]),
        ]
    capsys.readouterr()
    code, err = (
        stages.run(qa_adapter, *arguments(captioner, data, out, *more)),
        capsys.readouterr().err,
    )
    last = err.splitlines()[-1]
    assert (
        code == 1 and f"{out}: holds a run with another" in last and re.search(expected_word, last)
    )
    assert stages.same_run(out, whole)


# ---------------------------------------------------------------- the same run, however it is split or stopped
@pytest.mark.parametrize("at, expected_step", [(3, 0), (29, 4), (40, 5)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    captioner, whole, data, tmp_path, at, expected_step
):
    argv = arguments(captioner, data, tmp_path / "out")
    with mock.patch.object(
        plumbing.data, "collate", stages.at_micro_batch(at, stages.kill_me(signal.SIGTERM))
    ):
        assert stages.run(qa_adapter, *argv) == 143
    assert (
        stages.checkpoint_of(tmp_path / "out") == expected_step
        and not (tmp_path / "out/adapters.json").exists()
    )
    assert stages.run(qa_adapter, *argv) == 0
    assert stages.same_run(tmp_path / "out", whole)
    mine, theirs = (
        json.loads((folder / "adapters.json").read_text()) for folder in (tmp_path / "out", whole)
    )
    assert mine["threshold"] == theirs["threshold"] and mine["held_out"] == theirs["held_out"]


def test_two_ranks_are_one_and_go_on_after_a_kill(captioner, whole, data, tmp_path):
    """kill -9 of one rank in step 6, after the checkpoint of step 4; 7 rows a step fall on two ranks as 4 and 3."""
    argv, report = (
        arguments(captioner, data, tmp_path / "out", "--micro-batch", 2),
        tmp_path / "report",
    )
    codes = stages.run_ranks("qa_adapter", argv, report, 2, at=(1, 11, signal.SIGKILL))
    assert codes[1] == -9 and codes[0] != 0 and stages.checkpoint_of(tmp_path / "out") == 4
    assert stages.run_ranks("qa_adapter", argv, report, 2) == [0, 0], report.read_text()
    argv[argv.index(tmp_path / "out")] = tmp_path / "straight"
    assert stages.run_ranks("qa_adapter", argv, tmp_path / "second", 2) == [0, 0]
    assert stages.same_run(tmp_path / "out", tmp_path / "straight")
    stages.assert_close_run(tmp_path / "out", whole)
    said = (tmp_path / "second").read_text()
    assert said.count("held-out questions") == 2 and said.count("threshold") == 1
    mine, theirs = (
        json.loads((folder / "adapters.json").read_text()) for folder in (tmp_path / "out", whole)
    )
    assert mine["threshold"] == pytest.approx(theirs["threshold"], abs=1e-4)


# ---------------------------------------------------------------- broken images, and what does not fit
def test_broken_images_are_reported_and_replaced_or_left_out(captioner, data, tmp_path, capsys):
    """One image of the training part and one of the two held-out ones end in the middle of their pixels."""
    copy = shutil.copytree(data, tmp_path / "data")
    training, held = plumbing.data.split(
        plumbing.data.read_questions(copy / "questions.jsonl")[0], 0.25, 0
    )
    bad = [training[0]["image"], held[0]["image"]]
    for path in bad:
        stages.break_pixels(path)
    assert stages.run(qa_adapter, *arguments(captioner, copy, tmp_path / "out")) == 0
    out, err = capsys.readouterr()
    lines = [line for line in re.split("[\r\n]", err) if re.search("(left out|replaced): ", line)]
    assert all(any(str(path) in line and "damaged" in line for line in lines) for path in bad)
    assert all("replaced: " in line for line in lines if str(bad[0]) in line)
    assert all("left out: " in line for line in lines if str(bad[1]) in line)
    assert all(re.search(r"questions\.jsonl:\d+: ", line) for line in lines if str(bad[0]) in line)
    assert len(lines) == len(set(lines)) and "4 held-out questions, at .5" in out
    assert json.loads((tmp_path / "out/adapters.json").read_text())["threshold"] > 0


def test_a_question_that_does_not_fit_is_told(captioner, data, tmp_path, capsys):
    """A prompt longer than the trained context is no row to learn from; an answer cut by it is counted."""
    rows = stages.read_rows(data / "questions.jsonl")
    rows[0]["question"], rows[1]["answer"] = "red " * 200, "Yes, " + "red " * 200
    path = stages.write_rows(data / "long.jsonl", rows)
    assert (
        stages.run(
            qa_adapter, *arguments(captioner, data, tmp_path, "--data", path, "--holdout", 0)
        )
        == 0
    )
    err = capsys.readouterr().err
    assert "long.jsonl:1: " in err and re.search(
        r"39 questions, 1 bad .*, 1 cut to fit the context", err
    )


def test_a_loss_that_is_not_finite_ends_with_a_line(captioner, data, tmp_path, capsys):
    from safetensors.torch import save_file

    broken = shutil.copytree(captioner, tmp_path / "sft")
    tensors = load_file(broken / "adapters.safetensors")
    tensors["transformer.h.1.mlp_slot.caption.up.bias"][3] = float("nan")
    save_file(tensors, broken / "adapters.safetensors")
    code, err = (
        stages.run(qa_adapter, *arguments(broken, data, tmp_path / "out")),
        capsys.readouterr().err,
    )
    last = err.splitlines()[-1]
    assert (
        code == 1
        and last.startswith("qa_adapter.py: ")
        and f"{plumbing.train.MAX_SKIPPED} steps" in last
    )
    assert not (tmp_path / "out/adapters.json").exists()
