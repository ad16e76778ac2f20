"""All four stages and caption.py on models of transformers, from their command lines."""

import json
import signal
from unittest import mock

import families
import pytest
import torch
from stages import (
    CODE,
    assert_close_run,
    kill_me,
    read_rows,
    run,
    run_ranks,
    same_run,
    steps_of,
    weights_of,
    write_data,
    write_rows,
)

import adapters
import caption
import dpo
import golden
import plumbing.data
import qa_adapter
import sft
from base import open_base

FAMILIES = families.NEEDED  # test_hf_model.py has the others: stages know no family
FEW = (
    "--batch",
    4,
    "--micro-batch",
    2,
    "--max-steps",
    3,
    "--save-every",
    2,
    "--lr",
    2e-3,
    "--reduction",
    4,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), 8)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of families, each written once."""
    made = {}

    def base(name):
        if name not in made:
            made[name] = families.make_usable(name, tmp_path_factory.mktemp(name))
        return made[name]

    return base


def golden_rows(folder, data, n=8):
    """Golden rows for dpo.py, and what golden.py would have noted beside them."""
    rows = [
        {
            "image": str(data / f"{k:05d}.png"),
            "chosen": f"a red cup, {k} dogs",
            "rejected": [
                {"caption": "a blue cup", "finish": "eos"},
                {"caption": "dogs, dogs, ", "finish": "length"},
            ],
        }
        for k in range(n)
    ]
    folder.mkdir()
    return write_rows(folder / "golden.jsonl", rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_runs(family, bases, data, tmp_path, capsys):
    base, out = bases(family), tmp_path
    assert (
        run(sft, "--base", base, "--data", data / "captions.jsonl", "--out", out / "sft", *FEW) == 0
    )
    assert (
        run(
            qa_adapter,
            "--init",
            out / "sft",
            "--data",
            data / "questions.jsonl",
            "--out",
            out / "qa",
            *FEW,
        )
        == 0
    )
    sampling = ("--samples", 2, "--max-new-tokens", 12, "--min-statements", 1, "--threshold", 0.0)
    assert (
        run(
            golden,
            "--images",
            data,
            "--captioner",
            out / "sft",
            "--qa",
            out / "qa",
            "--out",
            out / "golden",
            *sampling,
        )
        == 0
    )
    rows = read_rows(out / "golden/record.jsonl")
    assert len(rows) == 8 and all(len(row["samples"]) == 2 for row in rows)
    golden_file = golden_rows(out / "rows", data)
    assert (
        run(
            dpo,
            "--init",
            out / "sft",
            "--data",
            golden_file,
            "--out",
            out / "dpo",
            "--watch",
            1,
            *FEW[:-2],
        )
        == 0
    )
    assert len(steps_of(out / "dpo")) == 3
    before, after = weights_of(out / "sft"), weights_of(out / "dpo")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "soft_prompts" not in name}
    capsys.readouterr()
    image = data / "00000.png"
    assert run(caption, image, "--adapters", out / "dpo", "--jsonl", "--max-new-tokens", 5) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["tokens"] <= 5 and row["image"] == str(image)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "qwen3_5"])
def test_two_ranks_learn_what_one_does(family, bases, data, tmp_path):
    argv = ["--base", bases(family), "--data", data / "captions.jsonl", "--holdout", 0, *FEW]
    assert run(sft, *argv, "--out", tmp_path / "one") == 0
    codes = run_ranks(
        "sft", [*argv, "--out", tmp_path / "two"], tmp_path / "report", world=2, seconds=120
    )
    assert codes == [0, 0], (tmp_path / "report").read_text()
    assert_close_run(tmp_path / "two", tmp_path / "one", rtol=1e-3)
    golden_file = golden_rows(tmp_path / "rows", data)
    argv = ["--init", tmp_path / "one", "--data", golden_file, "--holdout", 0, *FEW[:-2]]
    assert run(dpo, *argv, "--out", tmp_path / "dpo1") == 0
    codes = run_ranks(
        "dpo", [*argv, "--out", tmp_path / "dpo2"], tmp_path / "report", world=2, seconds=120
    )
    assert codes == [0, 0], (tmp_path / "report").read_text()
    assert_close_run(tmp_path / "dpo2", tmp_path / "dpo1", rtol=1e-3)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "lfm2_vl"])
def test_golden_samples_do_not_depend_on_the_ranks(family, bases, data, tmp_path):
    argv = [
        "--images",
        data,
        "--captioner",
        "none",
        "--qa",
        "none",
        "--base",
        bases(family),
        "--samples",
        2,
        "--max-new-tokens",
        8,
        "--min-statements",
        1,
    ]
    assert run(golden, *argv, "--out", tmp_path / "one") == 0
    codes = run_ranks(
        "golden", [*argv, "--out", tmp_path / "two"], tmp_path / "report", world=2, seconds=120
    )
    assert codes == [0, 0], (tmp_path / "report").read_text()
    samples = [
        {row["image"]: row["samples"] for row in read_rows(tmp_path / way / "record.jsonl")}
        for way in ("one", "two")
    ]
    assert samples[0] == samples[1] and len(samples[0]) == 8


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "qwen3_5"])
def test_a_stopped_run_resumes_bit_for_bit(family, bases, data, tmp_path):
    argv = [
        "--init",
        "none",
        "--base",
        bases(family),
        "--data",
        golden_rows(tmp_path / "rows", data),
        *FEW,
    ]
    assert run(dpo, *argv, "--out", tmp_path / "whole") == 0
    argv += ["--out", tmp_path / "stopped"]
    steps, stopped = plumbing.data.padded, [0]

    def strike(*args):
        stopped[0] += 1
        if stopped[0] == 60:
            kill_me(signal.SIGTERM)(None)
        return steps(*args)

    with mock.patch.object(plumbing.data, "padded", strike):
        code = run(dpo, *argv)
    assert code not in (0, None)
    assert run(dpo, *argv) == 0
    assert same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("tune", ["lora", "prompt"])
def test_other_ways_of_tuning(tune, bases, data, tmp_path):
    argv = [
        "--base",
        bases("qwen3_vl"),
        "--data",
        data / "captions.jsonl",
        "--out",
        tmp_path / "sft",
        "--tune",
        tune,
    ]
    assert run(sft, *argv, *FEW, "--rank", 4) == 0
    names = set(weights_of(tmp_path / "sft"))
    assert all(("lora_slot" in name) != ("soft_prompts" in name) for name in names)
    assert any("soft_prompts" in name for name in names) and (tune == "prompt" or len(names) > 1)
    assert (
        run(caption, data / "00000.png", "--adapters", tmp_path / "sft", "--max-new-tokens", 3) == 0
    )


def test_full_tuning_writes_a_base(bases, data, tmp_path):
    argv = [
        "--base",
        bases("qwen3_vl"),
        "--data",
        data / "captions.jsonl",
        "--out",
        tmp_path / "sft",
    ]
    assert run(sft, *argv, "--tune", "full", *FEW) == 0
    model, before = open_base(tmp_path / "sft"), open_base(bases("qwen3_vl"))
    assert model.fingerprint != before.fingerprint
    assert (
        run(
            caption,
            data / "00000.png",
            "--base",
            tmp_path / "sft",
            "--adapters",
            "none",
            "--max-new-tokens",
            3,
        )
        == 0
    )


# ---------------------------------------------------------------- the loop without outside data
@pytest.mark.parametrize("kind", ["qwen3_vl", "toy"])
def test_the_loop_from_a_bare_base(kind, bases, data, tmp_path, capsys):
    """golden.py and dpo.py with nothing but images; the second command takes the base from the first's folder."""
    base, out = CODE / "assets/toy" if kind == "toy" else bases(kind), tmp_path
    common = ("--samples", 2, "--max-new-tokens", 12, "--min-statements", 1)
    argv = [
        "--images",
        data,
        "--captioner",
        "none",
        "--qa",
        "none",
        "--base",
        base,
        "--out",
        out / "golden",
        *common,
    ]
    prompt = ["--caption-prompt", "a red circle:"]
    assert run(golden, *argv, *prompt, "--threshold", 0.0) == 0
    made = json.loads((out / "golden/settings.json").read_text())
    assert (
        made["sample"]["caption_prompt"] == "a red circle:" and made["compose"]["threshold"] == 0.0
    )
    argv = ["--init", "none", "--data", out / "golden/golden.jsonl", "--out", out / "dpo", *FEW]
    assert run(dpo, *argv, "--lr", 0.05) == 0
    card = adapters.read_card(out / "dpo")
    assert (
        card["base"] == str(base)
        and card["caption_prompt"] == "a red circle:"
        and not card["soft_prompt"]
    )
    first = steps_of(out / "dpo")[1]
    assert abs(first["rewards/margins"]) < 1e-4 and abs(first["preference_loss"] - 0.6931) < 1e-3
    # the next round: the captioner's samples, the bare base's answers
    argv = [
        "--images",
        data,
        "--captioner",
        out / "dpo",
        "--qa",
        "none",
        "--out",
        out / "golden-2",
        *common,
    ]
    assert run(golden, *argv) == 0
    one, two = (read_rows(out / folder / "record.jsonl") for folder in ("golden", "golden-2"))
    assert [row["samples"] for row in one] != [row["samples"] for row in two]
    asked = {
        (row["image"][-9:], s["question"]): s["p_yes"] for row in one for s in row["statements"]
    }
    again = {
        (row["image"][-9:], s["question"]): s["p_yes"] for row in two for s in row["statements"]
    }
    assert all(asked[key] == again[key] for key in asked.keys() & again.keys())
    capsys.readouterr()
    assert run(caption, data / "00000.png", "--adapters", out / "dpo", "--max-new-tokens", 3) == 0


def test_the_bare_judge_is_calibrated_on_questions(bases, data, tmp_path):
    argv = [
        "--images",
        data,
        "--captioner",
        "none",
        "--qa",
        "none",
        "--base",
        bases("qwen3_vl"),
        "--samples",
        2,
        "--max-new-tokens",
        12,
        "--min-statements",
        1,
        "--out",
        tmp_path / "golden",
    ]
    argv += ["--calibrate", data / "questions.jsonl"]
    assert run(golden, *argv) == 0
    made = json.loads((tmp_path / "golden/calibration.json").read_text())
    assert made["questions"] == 32 and made["threshold"] != 0.5
    kept = [s for row in read_rows(tmp_path / "golden/record.jsonl") for s in row["statements"]]
    assert all(s["p_yes"] >= made["threshold"] - 1e-4 for s in kept if s["kept"])
    assert run(golden, *argv) == 0


def test_dpo_without_a_base_says_what_to_give(data, tmp_path, capsys):
    code = run(
        dpo,
        "--init",
        "none",
        "--data",
        golden_rows(tmp_path / "rows", data),
        "--out",
        tmp_path / "dpo",
    )
    assert code == 1 and "give --base" in capsys.readouterr().err.strip().splitlines()[-1]


def test_another_file_of_questions_is_asked_again(bases, data, tmp_path):
    rows = read_rows(data / "questions.jsonl")
    argv = [
        "--images",
        data,
        "--captioner",
        "none",
        "--qa",
        "none",
        "--base",
        bases("qwen3_vl"),
        "--samples",
        1,
    ]
    argv += ["--max-new-tokens", 4, "--min-statements", 1, "--out", tmp_path / "golden"]
    for n in (8, 12):
        for file in (tmp_path / "golden").glob("compose-*.jsonl"):
            file.unlink()
        some = [{**row, "image": str(data / row["image"])} for row in rows[:n]]
        file = write_rows(tmp_path / f"{n}.jsonl", some)
        assert run(golden, *argv, "--calibrate", file) == 0
        assert json.loads((tmp_path / "golden/calibration.json").read_text())["questions"] == n


def test_the_room_of_a_golden_caption_is_that_behind_the_captioners_prompt(
    data, tmp_path, tiny_base
):
    prompt = "a red circle " * 4
    argv = ["--base", tiny_base, "--data", data / "captions.jsonl", "--out", tmp_path / "sft", *FEW]
    assert run(sft, *argv, "--caption-prompt", prompt) == 0
    seen = []
    room_left = golden.room_left

    def remembered(*args):
        seen.append(room_left(*args))
        return seen[-1]

    argv = [
        "--images",
        data,
        "--captioner",
        tmp_path / "sft",
        "--qa",
        "none",
        "--samples",
        1,
        "--max-new-tokens",
        4,
    ]
    with mock.patch.object(golden, "room_left", remembered):
        assert run(golden, *argv, "--min-statements", 1, "--out", tmp_path / "golden") == 0
    model = open_base(tiny_base, caption_prompt=prompt)
    assert seen[0] == model.seq_length - len(model.caption_prompt(6))
