"""sft.py as a user runs it: what it learns, what it leaves alone, and that no stop, kill or broken row changes the rest."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import stages
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import adapters
import chunking
import plumbing.data
import plumbing.train
import sft
from chunking import BOXES, views
from model import QwenVL
from plumbing import parts, weights
from plumbing.images import open_image

SIDE = 28  # of a view of the tiny base
QUICK = ("--workers", 0, "--lr", 0.01, "--warmup", 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return stages.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def kept(monkeypatch):
    """The models that stages in this process load, last one last."""
    models, from_pretrained = [], QwenVL.from_pretrained

    def keeping(*args, **kwargs):
        models.append(from_pretrained(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(QwenVL, "from_pretrained", keeping)
    return models


def train(base, data, out, *more):
    """One process, ten rows, none held out, unless said otherwise."""
    return stages.run(
        sft,
        "--base",
        base,
        "--data",
        data / "captions.jsonl",
        "--out",
        out,
        "--holdout",
        0,
        *QUICK,
        *more,
    )


def captions(data, name="captions.jsonl"):
    return [(data / row["image"], row["caption"]) for row in stages.read_rows(data / name)]


def logits_of(model, path):
    """The logits that follow an image and the caption prompt, in eval mode."""
    with torch.no_grad():
        return model.eval()(
            torch.tensor([model.caption_prompt(len(BOXES))]), views(open_image(path), SIDE)
        )


def reference_nll(model, rows):
    """Sum of -log p and number of target tokens of (image, caption) rows: one by one, unpadded, from all the logits."""
    total, n = 0.0, 0
    for path, caption in rows:
        target = [*model.tokenizer.encode(" " + caption), model.tokenizer.eos_id]
        ids = torch.tensor([model.caption_prompt(len(BOXES)) + target])
        logits = model(ids, views(open_image(path), SIDE))[0]
        total = total + F.cross_entropy(
            logits[-len(target) - 1 : -1].double(), torch.tensor(target), reduction="sum"
        )
        n += len(target)
    return total, n


@pytest.fixture(scope="module")
def moved_captioner(tiny_base, tmp_path_factory):
    """An adapter folder that is far from fresh."""
    model = QwenVL.from_pretrained(tiny_base)
    torch.manual_seed(3)
    for name in adapters.attach(model, "caption", reduction=4, soft_prompt=True):
        model.get_parameter(name).data += 0.05 * torch.randn(model.get_parameter(name).shape)
    adapters.save(model, tmp_path_factory.mktemp("out") / "moved", "caption", stage="sft")
    return tmp_path_factory.getbasetemp() / "out0/moved"


# ---------------------------------------------------------------- what it learns
def test_one_batch_overfits(tiny_base, data, tmp_path):
    two = stages.write_rows(data / "two.jsonl", stages.read_rows(data / "captions.jsonl")[:2])
    code = stages.run(
        sft,
        "--base",
        tiny_base,
        "--data",
        two,
        "--out",
        tmp_path,
        "--holdout",
        0,
        "--workers",
        0,
        "--lr",
        0.02,
        "--batch",
        2,
        "--micro-batch",
        2,
        "--max-steps",
        100,
    )
    rows = stages.steps_of(tmp_path)
    assert code == 0 and rows[1]["loss"] > 3 and rows[100]["loss"] < 0.1
    model = QwenVL.from_pretrained(tiny_base)
    adapters.load(model, tmp_path)
    total, n = reference_nll(model.train(), captions(data, "two.jsonl"))
    assert total / n < 0.1


def test_a_step_s_loss_gradient_and_update_are_their_formulas(
    tiny_base, data, tmp_path, moved_captioner
):
    """Ten rows of unequal lengths in uneven micro-batches: the sum of NLL over the number of target tokens."""
    train(
        tiny_base,
        data,
        tmp_path,
        "--init",
        moved_captioner,
        "--batch",
        10,
        "--micro-batch",
        4,
        "--max-steps",
        2,
        "--grad-clip",
        0.5,
        "--weight-decay",
        0.1,
    )
    model = QwenVL.from_pretrained(tiny_base)
    adapters.load(model, moved_captioner)
    trained = {
        name: model.get_parameter(name).requires_grad_(True)
        for name in adapters.names_of(model, "caption")
    }
    groups = [
        {
            "params": [p for p in trained.values() if (p.ndim > 1) == decays],
            "weight_decay": 0.1 * decays,
        }
        for decays in (True, False)
    ]
    adam, model = torch.optim.AdamW(groups, lr=0.005, betas=(0.9, 0.95)), model.train()
    logged = stages.steps_of(tmp_path)
    for step, expected_lr in ((1, 0.005), (2, 0.01)):  # two steps of warm-up
        total, n = reference_nll(model, captions(data))
        (total / n).backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(trained.values(), 0.5).item()
        assert logged[step]["loss"] == pytest.approx((total / n).item(), rel=1e-5)
        assert logged[step]["grad_norm"] == pytest.approx(expected_norm, rel=1e-4)
        assert logged[step]["learning_rate"] == pytest.approx(expected_lr)
        for group in adam.param_groups:
            group["lr"] = expected_lr
        adam.step()
        adam.zero_grad()
    written = stages.weights_of(tmp_path)
    assert written.keys() == trained.keys()
    for name, p in trained.items():
        torch.testing.assert_close(written[name], p.detach(), atol=2e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probs_in_chunks_equal_those_of_full_logits(
    tiny_model, data, monkeypatch, checkpointing
):
    adapters.attach(tiny_model, "caption", reduction=4, soft_prompt=True)
    tiny_model.train().checkpointing = checkpointing
    prompt = tiny_model.caption_prompt(len(BOXES))
    examples = [
        {
            "ids": prompt + tiny_model.tokenizer.encode(" " + caption),
            "n_prompt": len(prompt),
            "views": views(open_image(path), SIDE),
        }
        for path, caption in captions(data)[:3]
    ]
    batch = plumbing.data.collate(examples, tiny_model.tokenizer.eos_id)
    targets = batch.pop("logp_of")
    real = targets != -100
    n_targets = int(real.sum())
    assert 20 < n_targets < targets.numel()
    trained = {n: p for n, p in tiny_model.named_parameters() if p.requires_grad}
    logits = tiny_model(**batch)
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected, made = picked.masked_fill(~real, 0.0), []
    tiny_model.lm_head.register_forward_hook(lambda module, x, y: made.append(len(y)))
    weights = torch.linspace(-1, 2, targets.numel()).view(targets.shape)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), trained.values())
    for rows in (1, 7, n_targets, 1000):
        monkeypatch.setattr(parts, "LOGITS_AT_ONCE", rows)
        made.clear()
        logps = tiny_model(**batch, logp_of=targets)
        # nowhere else, and never more at once
        assert max(made) <= rows and sum(made) == n_targets
        torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
        gradients = torch.autograd.grad((logps * weights).sum(), trained.values())
        for found, wanted, name in zip(gradients, expected_gradients, trained):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4, msg=name)


def test_the_base_stays_bit_equal_and_exactly_the_listed_names_move(
    tiny_base, data, tmp_path, kept
):
    assert train(tiny_base, data, tmp_path, "--batch", 5, "--max-steps", 4) == 0
    before, (model,) = load_file(tiny_base / "model.safetensors"), kept
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.checkpointing and model.training and model.lm_head.weight.dtype == torch.float32
    names = adapters.names_of(model, "caption")
    torch.manual_seed(0)  # as a run of seed 0 starts
    fresh = QwenVL.from_pretrained(tiny_base)
    adapters.attach(fresh, "caption", soft_prompt=True)
    assert sorted(after.keys() - before.keys()) == names == sorted(stages.weights_of(tmp_path))
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == names
    assert len(names) == 4 * 2 * 3 + 1 and all(after[name].dtype == torch.float32 for name in names)
    moves = [(after[name] - fresh.get_parameter(name)).abs().max().item() for name in names]
    assert all(0 < move < 4 * 2 * 0.01 for move in moves)  # four steps at this learning rate


def test_a_base_in_bfloat16_has_adapters_in_float32(tiny_base, data, tmp_path, kept):
    assert (
        train(tiny_base, data, tmp_path, "--batch", 5, "--max-steps", 3, "--dtype", "bfloat16") == 0
    )
    assert {p.dtype for n, p in kept[0].named_parameters() if not p.requires_grad} == {
        torch.bfloat16
    }
    assert {p.dtype for p in stages.weights_of(tmp_path).values()} == {torch.float32}
    moments = torch.load(tmp_path / "resume/step-00000003/moments-0.pt")
    assert {t.dtype for m in moments.values() for t in m.values()} == {torch.float32}
    assert all(math.isfinite(row["loss"]) for row in stages.steps_of(tmp_path).values())


def test_images_are_decoded_by_the_workers(tiny_base, data, tmp_path, monkeypatch):
    opened, opens = [], chunking.open_image
    monkeypatch.setattr(chunking, "open_image", lambda path: opened.append(path) or opens(path))
    for workers, expected in ((1, 0), (0, 10)):
        train(
            tiny_base,
            data,
            tmp_path / str(workers),
            "--batch",
            5,
            "--max-steps",
            2,
            "--workers",
            workers,
        )
        assert len(opened) == expected  # by this process


TUNED = {
    "adapters": r".*_slot\.caption\.(down|up)\.(weight|bias)|soft_prompts\.caption\.vectors",
    "lora": r".*\.attn\.lora_slot\.caption\.(down|up)\.weight|soft_prompts\.caption\.vectors",
    "prompt": r"soft_prompts\.caption\.vectors",
}


@pytest.mark.parametrize(
    "tune, more",
    [
        ("adapters", []),
        ("lora", ["--rank", 4]),
        ("prompt", ["--no-soft-prompt"]),
        ("adapters", ["--no-soft-prompt", "--reduction", 16]),
    ],
)
def test_what_a_way_of_tuning_trains_and_that_it_reloads(
    tiny_base, data, tmp_path, kept, tune, more
):
    assert (
        train(tiny_base, data, tmp_path, "--batch", 4, "--max-steps", 3, "--tune", tune, *more) == 0
    )
    model, path = kept[0], captions(data)[0][0]
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(re.fullmatch(TUNED[tune], name) for name in names)
    assert sorted(names) == sorted(stages.weights_of(tmp_path))
    has_prompt = tune == "prompt" or "--no-soft-prompt" not in more
    assert any("soft_prompts" in name for name in names) == has_prompt
    sizes = {p.shape[0] for n, p in model.named_parameters() if n.endswith("down.weight")}
    assert sizes == (
        {4}
        if tune == "lora"
        else {2, 8}
        if "--reduction" in more
        else {4, 16}
        if tune == "adapters"
        else set()
    )
    again, expected = QwenVL.from_pretrained(tiny_base), logits_of(model, path)
    card = adapters.load(again, tmp_path)
    assert torch.equal(logits_of(again, path), expected)
    assert not torch.allclose(
        logits_of(QwenVL.from_pretrained(tiny_base), path), expected, atol=1e-3
    )
    assert (
        card["kind"] == ("lora" if tune == "lora" else "adapter")
        and card["soft_prompt"] == has_prompt
    )
    assert "lora" not in tune or card["reduction"] == 4


def test_full_tuning_moves_everything_and_leaves_a_base(tiny_base, data, tmp_path, kept):
    assert (
        train(
            tiny_base,
            data,
            tmp_path,
            "--batch",
            10,
            "--max-steps",
            4,
            "--tune",
            "full",
            "--lr",
            0.001,
        )
        == 0
    )
    model, before = kept[0], load_file(tiny_base / "model.safetensors")
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, _ in model.named_parameters()} and len(moved) > 40
    losses = [row["loss"] for row in stages.steps_of(tmp_path).values()]
    assert losses[-1] < losses[0] and not (tmp_path / "adapters.json").exists()
    again, path = QwenVL.from_pretrained(tmp_path), captions(data)[0][0]
    for name, p in model.named_parameters():
        assert torch.equal(
            again.get_parameter(name), p.bfloat16().float()
        )  # the released layout is bfloat16
    model.load_state_dict(
        {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}
    )
    assert torch.equal(logits_of(again, path), logits_of(model, path))


def test_full_tuning_starts_only_where_memory_will_do_and_on_a_base_alone(
    tiny_base, data, tmp_path, monkeypatch, capsys, moved_captioner
):
    numbers = sum(t.numel() for t in load_file(tiny_base / "model.safetensors").values())
    full = ("--tune", "full", "--max-steps", 1)
    for argv, free, expected_word in (
        (full, 8 * numbers, "--tune full needs 0.0 GB"),  # the weights fit, their moments do not
        ((*full, "--dtype", "bfloat16"), 10**12, "float32"),
        ((*full, "--init", moved_captioner), 10**12, "--init"),
    ):
        monkeypatch.setattr(weights, "free_bytes", lambda device, free=free: free)
        code, err = train(tiny_base, data, tmp_path / "x", *argv), capsys.readouterr().err
        assert (
            code in (1, 2)
            and expected_word in err.splitlines()[-1]
            and not (tmp_path / "x").exists()
        )
    monkeypatch.setattr(weights, "free_bytes", lambda device: 13 * numbers)
    assert train(tiny_base, data, tmp_path / "x", *full) == 0


# ---------------------------------------------------------------- captions as they come
def test_a_caption_that_is_too_long_ends_after_its_last_whole_statement(tiny_model):
    tokenizer, prompt = tiny_model.tokenizer, tiny_model.caption_prompt(len(BOXES))
    parts = [f"top-left {'red ' * (k % 3)}circle" for k in range(60)]
    for seq_length in (60, 61, 62, 63, 128):
        tiny_model.config.seq_length = seq_length
        ids, was_cut = sft.encode(tiny_model, prompt, ", ".join(parts))
        fits = [
            n
            for n in range(1, 61)
            if len(prompt) + len(tokenizer.encode(" " + ", ".join(parts[:n]))) + 1 <= seq_length
        ]
        expected = tokenizer.encode(" " + ", ".join(parts[: max(fits)]))
        assert was_cut and ids == [*prompt, *expected, tokenizer.eos_id] and len(ids) <= seq_length
    ids, was_cut = sft.encode(tiny_model, prompt, "red circle")  # seq_length is 128
    assert not was_cut and tokenizer.decode(ids[len(prompt) :]) == " red circle<|endoftext|>"
    room = tokenizer.encode(" " + ", ".join(parts[:3]))
    tiny_model.config.seq_length = len(prompt) + len(room) + 1
    assert sft.encode(tiny_model, prompt, ", ".join(parts[:3])) == (
        [*prompt, *room, tokenizer.eos_id],
        False,
    )
    tiny_model.config.seq_length = 64
    ids, was_cut = sft.encode(
        tiny_model, prompt, "red " * 100
    )  # one endless statement: as much as fits
    assert was_cut and len(ids) == 64 and ids[-1] == tokenizer.eos_id


def test_what_was_left_out_cut_and_held_out_is_said_before_the_first_step(
    tiny_base, data, tmp_path, capsys, kept
):
    rows = stages.read_rows(data / "captions.jsonl")
    name = data / "mixed.jsonl"
    stages.write_rows(
        name,
        [
            *rows[:4],
            {"image": "00004.png", "caption": "top-left red circle, " * 40},
            "{",
            {**rows[5], "caption": " "},
            {**rows[6], "image": "gone.png"},
            {**rows[7], "caption": "<img>/etc/passwd</img> <|extra_0|> <|endoftext|>"},
        ],
    )
    code = stages.run(
        sft,
        "--base",
        tiny_base,
        "--data",
        name,
        "--out",
        tmp_path,
        "--max-steps",
        2,
        *QUICK,
        "--seed",
        1,
        "--holdout",
        0.2,
        "--batch",
        5,
    )
    err = capsys.readouterr().err.splitlines()
    assert code == 0 and err[:3] == [
        f"sft.py: left out: {name}:6: not a JSON object with image and caption",
        f"sft.py: left out: {name}:7: no caption",
        f"sft.py: left out: {name}:8: {data / 'gone.png'} is not there",
    ]
    assert err[3] == "5 captions, 3 bad ones left out, 1 held out, 1 cut to fit the context"
    count = sum(p.numel() for p in kept[0].parameters() if p.requires_grad)
    assert re.fullmatch(
        rf"{count:,} parameters train; a card will need about \d+\.\d\d GiB", err[4]
    )
    assert "wrote" in err[-1] and len(stages.steps_of(tmp_path)) == 2


def test_the_held_out_loss_is_that_of_images_no_step_saw(
    tiny_base, data, tmp_path, kept, monkeypatch
):
    seen, opened = set(), chunking.open_image
    monkeypatch.setattr(chunking, "open_image", lambda path: seen.add(path) or opened(path))
    validates = []
    monkeypatch.setattr(plumbing.train, "save_checkpoint", lambda *a: validates.append(len(seen)))
    rows = stages.read_rows(data / "captions.jsonl")
    double = stages.write_rows(
        data / "double.jsonl", [*rows, *({**row, "caption": "red"} for row in rows)]
    )
    stages.run(
        sft,
        "--base",
        tiny_base,
        "--data",
        double,
        "--out",
        tmp_path,
        *QUICK,
        "--holdout",
        0.3,
        "--batch",
        7,
        "--max-steps",
        4,
        "--save-every",
        2,
    )
    logged = stages.steps_of(tmp_path)
    assert [step for step, row in logged.items() if "held_out_loss" in row] == [2, 4]
    training, held = plumbing.data.split(plumbing.data.read_captions(double)[0], 0.3, 0)
    assert (
        len(held) == 6 and validates[-1] == 10
    )  # all images were opened: seven to train, three to validate
    assert not {row["image"] for row in training} & {row["image"] for row in held}
    with torch.no_grad():
        total, n = reference_nll(kept[0].train(), [(row["image"], row["caption"]) for row in held])
    assert logged[4]["held_out_loss"] == pytest.approx((total / n).item(), rel=1e-5)


def test_three_forms_of_the_same_captions_train_the_same(tiny_base, data, tmp_path):
    rows = stages.read_rows(data / "captions.jsonl")
    for form in ("folder", "texts"):
        (tmp_path / form).mkdir()
        for row in rows:
            shutil.copy(data / row["image"], tmp_path / form)
            if form == "texts":
                (tmp_path / form / row["image"]).with_suffix(".txt").write_text(
                    row["caption"] + "\n"
                )
    stages.write_rows(
        tmp_path / "folder/metadata.jsonl",
        [{"file_name": r["image"], "text": r["caption"]} for r in rows],
    )
    sources = (data / "captions.jsonl", tmp_path / "folder", tmp_path / "texts")
    for k, source in enumerate(sources):
        stages.run(
            sft,
            "--base",
            tiny_base,
            "--data",
            source,
            "--out",
            tmp_path / str(k),
            *QUICK,
            "--batch",
            3,
            "--max-steps",
            2,
            "--holdout",
            0,
        )
    assert stages.same_run(tmp_path / "1", tmp_path / "0") and stages.same_run(
        tmp_path / "2", tmp_path / "0"
    )


# ---------------------------------------------------------------- what it leaves behind
def test_the_folder_says_where_it_came_from(tiny_base, data, tmp_path, moved_captioner):
    train(tiny_base, data, tmp_path, "--init", moved_captioner, "--max-steps", 1, "--batch", 3)
    card = json.loads((tmp_path / "adapters.json").read_text())
    assert (card["stage"], card["base"], card["name"]) == ("sft", str(tiny_base), "caption")
    assert (card["parent"], card["parent_hash"]) == (
        str(moved_captioner),
        adapters.folder_hash(moved_captioner),
    )
    assert (
        card["arguments"].items()
        >= {
            "batch": 3,
            "lr": 0.01,
            "holdout": 0.0,
            "data": str(data / "captions.jsonl"),
            "tune": "adapters",
            "soft_prompt": True,
            "max_steps": 1,
        }.items()
    )
    assert card["reduction"] == 4 and "torch" in card["versions"]  # the shape is that of --init
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapters.json",
        "adapters.safetensors",
        "README.md",
        "log.jsonl",
        "resume",
    }
    row = stages.read_rows(tmp_path / "log.jsonl")[0]
    assert row.keys() == {"step", "loss", "grad_norm", "learning_rate", "seconds"}


@pytest.mark.parametrize(
    "damage, expected_word",
    [
        (lambda argv: [*argv, "--base", "nowhere"], "nowhere"),
        (lambda argv: [*argv, "--data", "gone.jsonl"], "gone.jsonl"),
        (lambda argv: [*argv, "--init", "gone"], "gone: no adapters.json"),
        (lambda argv: [*argv, "--data", "empty"], "empty"),
        (lambda argv: [*argv, "--reduction", "0"], "--reduction"),
        (lambda argv: [*argv, "--device", "tpu"], "--device tpu"),
        (lambda argv: [*argv, "--tune", "lora", "--rank", "-1"], "--rank"),
    ],
)
def test_a_user_s_mistake_is_one_line(
    tiny_base, data, tmp_path, monkeypatch, capsys, damage, expected_word
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    code = train(tiny_base, data, tmp_path / "out", *damage(["--max-steps", 1]))
    err = capsys.readouterr().err
    assert (
        code == 1 and err.count("\n") == 1 and err.startswith("sft.py: ") and expected_word in err
    )
    assert not (tmp_path / "out").exists()


def test_a_prompt_longer_than_the_context_is_one_line(data, tmp_path, capsys):
    from conftest import write_tiny_base

    base = write_tiny_base(tmp_path / "short", seq_length=32)
    code, err = train(base, data, tmp_path / "out", "--max-steps", 1), capsys.readouterr().err
    assert code == 1 and err.count("\n") == 1 and "context" in err


# ---------------------------------------------------------------- the same run, however it is split
@pytest.fixture(scope="module")
def whole(tiny_base, data, tmp_path_factory):
    """An uninterrupted run: 6 steps of 4 of 8 rows, so that an epoch ends at every second step; 2 rows held out."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert stages.run(sft, *arguments(tiny_base, data, out)) == 0
    return out


def arguments(base, data, out, *more):
    return [
        "--base",
        base,
        "--data",
        data / "captions.jsonl",
        "--out",
        out,
        *QUICK,
        "--holdout",
        0.2,
        "--batch",
        4,
        "--max-steps",
        6,
        "--save-every",
        4,
        *more,
    ]


def test_a_run_is_the_same_twice_and_another_seed_another(whole, tiny_base, data, tmp_path):
    assert stages.run(sft, *arguments(tiny_base, data, tmp_path / "a", "--workers", 2)) == 0
    assert stages.same_run(tmp_path / "a", whole)  # and workers change nothing
    assert stages.run(sft, *arguments(tiny_base, data, tmp_path / "b", "--seed", 1)) == 0
    assert not stages.same_run(tmp_path / "b", whole)


def test_one_times_eight_is_eight_times_one_is_two_ranks(tiny_base, data, tmp_path):
    """Rows per step 8; then 7, which neither two ranks nor micro-batches of 3 divide."""
    for batch, micro in ((8, 8), (7, 7)):
        more = ("--batch", batch, "--max-steps", 3)
        one = tmp_path / f"one-{batch}"
        assert stages.run(sft, *arguments(tiny_base, data, one, *more, "--micro-batch", micro)) == 0
        assert stages.run(sft, *arguments(tiny_base, data, tmp_path / f"many-{batch}", *more)) == 0
        stages.assert_close_run(tmp_path / f"many-{batch}", one)
    argv = arguments(tiny_base, data, tmp_path / "ranks", *more, "--micro-batch", 3)
    assert stages.run_ranks("sft", argv, tmp_path / "report", 2) == [0, 0], (
        tmp_path / "report"
    ).read_text()
    stages.assert_close_run(tmp_path / "ranks", one)
    report = (tmp_path / "report").read_text()
    assert (
        report.count("held out") == report.count("wrote") == 1 and "step/s" in report
    )  # only the first rank speaks
    first, second = (
        torch.load(file).keys()
        for file in (tmp_path / "ranks/resume/step-00000003").glob("moments-*.pt")
    )
    assert (
        not first & second and first | second == stages.weights_of(one).keys()
    )  # the optimizer's state is shared


# ---------------------------------------------------------------- stop and go on
@pytest.mark.parametrize("at, expected_step", [(1, 0), (7, 1), (12, 2), (17, 4), (24, 5)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    whole, tiny_base, data, tmp_path, at, expected_step
):
    """SIGTERM with the at-th of 24 micro-batches: in the middle of a step, of an epoch, right behind a checkpoint."""
    argv = arguments(tiny_base, data, tmp_path / "out")
    with mock.patch.object(
        plumbing.data, "collate", stages.at_micro_batch(at, stages.kill_me(signal.SIGTERM))
    ):
        assert stages.run(sft, *argv) == 143
    assert (
        stages.checkpoint_of(tmp_path / "out")
        == expected_step
        == len(stages.steps_of(tmp_path / "out"))
    )
    assert not (tmp_path / "out/adapters.json").exists()  # not a finished stage yet
    assert stages.run(sft, *argv) == 0
    assert stages.same_run(tmp_path / "out", whole)


def test_a_killed_run_goes_on_from_its_last_checkpoint(whole, tiny_base, data, tmp_path):
    """kill -9 in step 6, two steps after the checkpoint; another while that checkpoint was half written."""
    out, report = tmp_path / "out", tmp_path / "report"
    argv = arguments(tiny_base, data, out, "--workers", 1)
    assert stages.run_ranks("sft", argv, report, at=(0, 26, signal.SIGKILL)) == [
        -9
    ]  # 2 of them validate
    assert stages.checkpoint_of(out) == 4 and list(stages.steps_of(out)) == [1, 2, 3, 4, 5]
    shutil.copytree(out / "resume/step-00000004", out / "resume/step-00000005.tmp")
    (out / "resume/step-00000005.tmp/run.json").unlink()
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert stages.run(sft, *argv) == 0
    assert stages.same_run(out, whole) and stages.checkpoint_of(out) == 6


def test_a_finished_run_started_again_changes_nothing(whole, tiny_base, data, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert stages.run(sft, *arguments(tiny_base, data, out)) == 0
    after = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    for path, content in before.items():
        assert (
            path.name in ("adapters.json", "README.md") or after[path] == content
        )  # those name the folder
    assert (
        stages.run(sft, *arguments(tiny_base, data, out, "--max-steps", 7)) == 0
    )  # and longer goes on
    assert len(stages.steps_of(out)) == 7


@pytest.mark.parametrize(
    "more, expected_word",
    [
        (["--lr", 0.02], "lr"),
        (["--batch", 5], "batch"),
        (["--seed", 1], "(seed|rows)"),
        (["--reduction", 4], "reduction"),
        (["--tune", "lora"], "tune"),
        (["--no-soft-prompt"], "soft_prompt"),
        (["--holdout", 0.3], "captions"),
        (["--init", "moved"], "init"),
        (["--weight-decay", 0], "weight_decay"),
        (["--warmup", 3], "warmup"),
        (["--data", "captions-2.jsonl"], "(caption|rows)"),
        (["--base", "other"], "base"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    whole, tiny_base, data, tmp_path, capsys, more, expected_word, moved_captioner
):
    out = shutil.copytree(whole, tmp_path / "out")
    if "captions-2.jsonl" in more:  # as many rows, other words
        rows = stages.read_rows(data / "captions.jsonl")
        more = [
            "--data",
            stages.write_rows(
                data / more[1], [{**row, "caption": "a " + row["caption"]} for row in rows]
            ),
        ]
    if "other" in more:
        from conftest import write_tiny_base

        more = ["--base", write_tiny_base(tmp_path / "other", seed=5)]
    if "moved" in more:
        more = ["--init", moved_captioner, "--reduction", 8]
    before = (out / "log.jsonl").read_bytes(), (out / "adapters.safetensors").read_bytes()
    code, err = stages.run(sft, *arguments(tiny_base, data, out, *more)), capsys.readouterr().err
    last = err.splitlines()[-1]
    assert (
        code == 1
        and last.startswith(f"sft.py: {out}: holds a run with another")
        and re.search(expected_word, last)
    )
    assert before == ((out / "log.jsonl").read_bytes(), (out / "adapters.safetensors").read_bytes())


# ---------------------------------------------------------------- two ranks
@pytest.fixture(scope="module")
def two_ranks(tiny_base, data, tmp_path_factory):
    """An uninterrupted run on two ranks: 9 steps of 5 of 8 rows, two or three rows a rank."""
    out = tmp_path_factory.mktemp("two") / "out"
    argv = pair_arguments(tiny_base, data, out)
    assert stages.run_ranks("sft", argv, out.parent / "report", 2) == [0, 0], (
        out.parent / "report"
    ).read_text()
    return out


def pair_arguments(base, data, out):
    return arguments(base, data, out, "--batch", 5, "--max-steps", 9)


def test_two_ranks_stop_together_and_go_on(two_ranks, tiny_base, data, tmp_path):
    """Only the second rank gets the signal, in the middle of step 6."""
    argv, report = pair_arguments(tiny_base, data, tmp_path / "out"), tmp_path / "report"
    assert stages.run_ranks("sft", argv, report, 2, at=(1, 12, signal.SIGTERM)) == [143, 143], (
        report.read_text()
    )
    assert stages.checkpoint_of(tmp_path / "out") == 5 == len(stages.steps_of(tmp_path / "out"))
    shutil.copytree(tmp_path / "out", tmp_path / "alone")
    assert stages.run_ranks("sft", argv, report, 2) == [0, 0], report.read_text()
    assert stages.same_run(tmp_path / "out", two_ranks)
    assert (
        stages.run(sft, *pair_arguments(tiny_base, data, tmp_path / "alone")) == 0
    )  # on one rank, to rounding
    stages.assert_close_run(tmp_path / "alone", two_ranks)


def test_when_a_rank_dies_the_other_ends(two_ranks, tiny_base, data, tmp_path):
    argv, report = pair_arguments(tiny_base, data, tmp_path / "out"), tmp_path / "report"
    codes = stages.run_ranks("sft", argv, report, 2, at=(1, 13, signal.SIGKILL))
    assert codes[1] == -9 and codes[0] not in (0, None)
    assert stages.checkpoint_of(tmp_path / "out") == 4


def wait_for_step(out, step, process, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if (out / "log.jsonl").is_file() and (out / "log.jsonl").read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"step {step} did not come")


@pytest.mark.skipif(
    not os.environ.get("ATAC_TORCHRUN"),
    reason="kills a rank of a real torchrun, for half a minute: ATAC_TORCHRUN=1",
)
def test_torchrun_restarts_after_kill_9_and_saves_at_sigterm(tiny_base, data, tmp_path):
    """Real torchrun with loader workers: a rank dies, --max-restarts goes on; SIGTERM saves the last step's end.

    The restarted ranks must not meet the dead ones' addresses, which torchrun's store still holds; the second rank
    comes late, as it may, so that they would.
    """
    out, expected, report = tmp_path / "out", tmp_path / "expected", tmp_path / "report"
    argv = [
        str(a)
        for a in arguments(
            tiny_base, data, out, "--batch", 5, "--max-steps", 40, "--save-every", 10
        )
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "1",
        str(late_rank(tmp_path / "late.py")),
        *argv,
        "--workers",
        "1",
    ]
    with report.open("w") as err:
        process = subprocess.Popen(
            command, stdout=err, stderr=err, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        wait_for_step(out, 12, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        wait_for_step(
            out, len(stages.read_rows(out / "log.jsonl")) + 3, process
        )  # neither rank gets there alone
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.terminate()
        process.wait(60)
        err = report.read_text()
        print(err)
    assert process.returncode != 0 and "exitcode: -9" in err and "DataLoader worker" not in err
    assert 13 <= stages.checkpoint_of(out) == len(stages.steps_of(out)) < 40
    for folder in (out, expected):
        argv[argv.index(str(out))] = str(folder)
        assert stages.run_ranks("sft", argv, tmp_path / "report", 2) == [0, 0], (
            tmp_path / "report"
        ).read_text()
    assert stages.same_run(out, expected)


def late_rank(path):
    """sft.py as a script, in which the second rank comes two seconds late after a restart."""
    path.write_text(f"""import os, sys, time
sys.path.insert(0, {str(stages.CODE)!r})
import sft
time.sleep(2 * (os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"))
sys.exit(sft.main())
""")
    return path


# ---------------------------------------------------------------- broken images, and numbers that are none
@pytest.fixture
def broken(data, tmp_path):
    """The ten scenes; two images of the training part end in the middle of their pixels."""
    copy = shutil.copytree(data, tmp_path / "broken")
    training, _ = plumbing.data.split(
        plumbing.data.read_captions(copy / "captions.jsonl")[0], 0.2, 0
    )
    for row in training[1:3]:
        stages.break_pixels(row["image"])
    return copy, [row["image"] for row in training[1:3]]


def replaced_by_the_next(rows, bad):
    """Each of some (image, caption) rows, or the next one whose image is not bad."""
    good = [k for k, (path, _) in enumerate(rows) if path not in bad]
    return [rows[next((g for g in good if g >= k), good[0])] for k in range(len(rows))]


def test_an_image_with_broken_pixels_is_replaced_by_the_next(tiny_base, broken, tmp_path, capsys):
    data, bad = broken
    assert (
        stages.run(sft, *arguments(tiny_base, data, tmp_path / "a", "--batch", 8, "--max-steps", 2))
        == 0
    )
    err = capsys.readouterr().err
    lines = [line for line in re.split("[\r\n]", err) if "replaced: " in line]
    assert len(lines) == 2  # each once, though there are two epochs
    for path in bad:
        (line,) = (line for line in lines if str(path) in line)
        number = [row["image"] for row in stages.read_rows(data / "captions.jsonl")].index(
            path.name
        ) + 1
        assert f"captions.jsonl:{number}: " in line and "damaged" in line
    assert err.splitlines()[-1].endswith("2 rows had a broken image")
    training, _ = plumbing.data.split(
        plumbing.data.read_captions(data / "captions.jsonl")[0], 0.2, 0
    )
    rows = [(row["image"], row["caption"]) for row in training]
    model = QwenVL.from_pretrained(tiny_base)
    adapters.attach(model, "caption", soft_prompt=True)
    total, n = reference_nll(model.train(), replaced_by_the_next(rows, bad))
    assert stages.steps_of(tmp_path / "a")[1]["loss"] == pytest.approx((total / n).item(), rel=1e-5)


def test_a_run_with_broken_images_resumes_with_the_same_rows(tiny_base, broken, tmp_path):
    data, _ = broken
    argv = arguments(tiny_base, data, tmp_path / "whole")
    assert stages.run(sft, *argv) == 0
    argv = arguments(tiny_base, data, tmp_path / "stopped")
    with mock.patch.object(plumbing.data, "collate", stages.at_micro_batch(10, stages.kill_me(signal.SIGTERM))):
        assert stages.run(sft, *argv) == 143
    assert stages.run(sft, *argv) == 0
    assert stages.same_run(tmp_path / "stopped", tmp_path / "whole")


def test_broken_images_on_two_ranks_never_hang_one(tiny_base, broken, tmp_path):
    """Whole micro-batches of one rank, and once all that a rank has in a step, are broken rows."""
    data, _ = broken
    argv = arguments(tiny_base, data, tmp_path / "two", "--batch", 2, "--max-steps", 8)
    assert stages.run_ranks("sft", argv, tmp_path / "report", 2) == [0, 0]
    report = (tmp_path / "report").read_text()
    assert report.count("2 rows had a broken image") == 1 and report.count("damaged") >= 2
    assert (
        stages.run(
            sft, *arguments(tiny_base, data, tmp_path / "one", "--batch", 2, "--max-steps", 8)
        )
        == 0
    )
    stages.assert_close_run(tmp_path / "two", tmp_path / "one")


def test_a_broken_image_of_the_held_out_part_is_told(tiny_base, data, tmp_path, capsys):
    copy = shutil.copytree(data, tmp_path / "data")
    held = plumbing.data.split(plumbing.data.read_captions(copy / "captions.jsonl")[0], 0.2, 0)[1]
    stages.break_pixels(held[0]["image"])
    assert stages.run(sft, *arguments(tiny_base, copy, tmp_path / "out", "--save-every", 2)) == 0
    err = capsys.readouterr().err
    assert (
        err.count(f"{held[0]['image']}: ") == 1
        and "held_out_loss" in stages.steps_of(tmp_path / "out")[6]
    )
    model = QwenVL.from_pretrained(tiny_base)
    adapters.load(model, tmp_path / "out")
    with torch.no_grad():
        total, n = reference_nll(model.train(), [(held[1]["image"], held[1]["caption"])])
    assert stages.steps_of(tmp_path / "out")[6]["held_out_loss"] == pytest.approx(
        (total / n).item(), rel=1e-5
    )


def test_no_usable_row_is_one_line(tiny_base, data, tmp_path, capsys):
    stages.write_rows(tmp_path / "rows.jsonl", ["{", {"image": "gone.png", "caption": "x"}])
    code = stages.run(
        sft,
        "--base",
        tiny_base,
        "--data",
        tmp_path / "rows.jsonl",
        "--out",
        tmp_path / "out",
        *QUICK,
    )
    err = capsys.readouterr().err
    assert code == 1 and err.count("\n") == 1 and "no usable" in err and "rows.jsonl:1" in err


def test_two_ranks_skip_a_step_together_where_one_has_no_finite_loss(
    two_ranks, tiny_base, data, tmp_path
):
    """The images of one of the second rank's micro-batches, in step 9, are not numbers."""
    argv, report = pair_arguments(tiny_base, data, tmp_path / "out"), tmp_path / "report"
    assert stages.run_ranks("sft", argv, report, 2, at=(1, 20, "nan")) == [0, 0], report.read_text()
    mine, theirs = stages.steps_of(tmp_path / "out"), stages.steps_of(two_ranks)
    assert [mine[k] for k in range(1, 9)] == [theirs[k] for k in range(1, 9)]
    assert mine[9]["loss"] is None and all(
        torch.isfinite(t).all() for t in tensors_of(tmp_path / "out")
    )
    files = sorted((tmp_path / "out/resume").glob("*/moments-*.pt"))
    assert [{int(m["step"]) for m in torch.load(file).values()} for file in files] == [{8}, {8}]


def tensors_of(out):
    return stages.weights_of(out).values()


def test_a_run_whose_losses_stay_infinite_ends_with_a_line(
    tiny_base, data, tmp_path, capsys, moved_captioner
):
    init = shutil.copytree(moved_captioner, tmp_path / "init")
    from safetensors.torch import save_file

    tensors = load_file(init / "adapters.safetensors")
    tensors["soft_prompts.caption.vectors"][0, 0] = float("inf")
    save_file(tensors, init / "adapters.safetensors")
    code = train(tiny_base, data, tmp_path / "out", "--init", init, "--max-steps", 30, "--batch", 2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        code == 1
        and "finite" in last
        and f"{plumbing.train.MAX_SKIPPED} steps" in last
        and last.startswith("sft.py: ")
    )
    assert len(stages.steps_of(tmp_path / "out")) == plumbing.train.MAX_SKIPPED - 1
    assert not (tmp_path / "out/adapters.json").exists()


def test_a_folder_with_nothing_but_a_frozen_prompt_is_one_line(tiny_base, data, tmp_path, capsys):
    assert train(tiny_base, data, tmp_path / "prompt", "--tune", "prompt", "--max-steps", 1) == 0
    capsys.readouterr()
    more = ("--init", tmp_path / "prompt", "--no-soft-prompt", "--max-steps", 1)
    code, err = train(tiny_base, data, tmp_path / "out", *more), capsys.readouterr().err
    assert code == 1 and err.count("\n") == 1 and "--no-soft-prompt" in err
