"""dpo.py: each loss against its formula, packed pairs against plain sequences, runs against stops and bad rows."""

import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import stages
import torch
from conftest import write_tiny_base
from safetensors.torch import load_file
from stages import weights_of

import adapters
import dpo
import plumbing.data
import plumbing.train
import sft
from chunking import BOXES, views
from model import LOGITS_AT_ONCE, QwenVL
from plumbing.data import read_golden
from plumbing.images import open_image
from toy_world import world

KINDS = ("dpo", "hinge", "ipo", "kto")
N_ROWS = 6
NAMES = (
    "loss",
    "preference_loss",
    "nll_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logps/chosen_per_token",
    "logps/rejected_per_token",
    "grad_norm",
    "learning_rate",
)


@pytest.fixture(autouse=True)
def handlers_restored():
    """A stage in this process takes over SIGTERM and SIGINT; pytest gets them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ---------------------------------------------------------------- a tiny captioner and its golden rows
def caption_of(scene):
    return ", ".join(fact["text"] for fact in world.facts(scene))


def sample_of(k, j):
    """The j-th rejected sample of row k, raw: another scene's first statements, its finish in turn."""
    statements = world.statements(caption_of(world.make_scene([8, k, j])))
    turn = (k + j) % 3
    return {
        "caption": " " + ", ".join(statements[: 3 + turn]),
        "finish": ("eos", "length", "repeat")[turn],
    }


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """golden.jsonl of N_ROWS scenes with one to three rejected samples each."""
    folder, rows = tmp_path_factory.mktemp("golden"), []
    for k in range(N_ROWS):
        scene, rejected = world.make_scene([7, k]), [sample_of(k, j) for j in range(1 + k % 3)]
        world.draw(scene).save(folder / f"{k}.png")
        rows.append(
            {
                "image": f"{k}.png",
                "chosen": caption_of(scene),
                "rejected": rejected,
                "samples": rejected,
            }
        )
    return stages.write_rows(folder / "golden.jsonl", rows)


def write_captioner(base, folder, seed=0, **how):
    """A captioner's folder whose adapters and soft prompt are away from their start."""
    model = QwenVL.from_pretrained(base)
    torch.manual_seed(seed)
    for name in adapters.attach(model, "caption", **{"reduction": 4, "soft_prompt": True, **how}):
        model.get_parameter(name).data += 0.05 * torch.randn(model.get_parameter(name).shape)
    adapters.save(model, folder, "caption", stage="sft")
    return folder


@pytest.fixture(scope="session")
def captioner(tiny_base, tmp_path_factory):
    return write_captioner(tiny_base, tmp_path_factory.mktemp("start") / "sft")


def flags(init, data, out, *more):
    """A command line with small settings; what comes later wins."""
    return [
        str(flag)
        for flag in (
            "--init",
            init,
            "--data",
            data,
            "--out",
            out,
            "--workers",
            0,
            "--device",
            "cpu",
            "--holdout",
            0,
            "--warmup",
            0,
            "--lr",
            1e-3,
            "--batch",
            N_ROWS,
            "--watch",
            0,
            *more,
        )
    ]


@pytest.fixture
def train(captioner, golden, tmp_path):
    """train("out", "--max-steps", 1, …) -> the folder of a run that must succeed."""

    def run(out, *more, data=golden, init=captioner):
        assert dpo.main(flags(init, data, tmp_path / out, *more)) == 0
        return tmp_path / out

    return run


def log_of(out):
    return stages.read_rows(out / "log.jsonl")


def loaded(base, folder):
    model = QwenVL.from_pretrained(base)
    adapters.load(model, folder)
    return model


# ---------------------------------------------------------------- the plain way, written from method.md
def targets_of(tokenizer, caption, ends):
    return tokenizer.encode(" " + caption.strip()) + [tokenizer.eos_id] * ends


def plain_logp(model, prompt, pixels, target):
    """log p of one caption as a sequence of its own, from full logits, in float64."""
    logits = model(torch.tensor([prompt + target]), pixels)[0].double()
    return (
        logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(target)[:, None]).sum()
    )


def formula(
    kind, chosen, rejected, ref_chosen, ref_rejected, beta, chosen_len, rejected_len, kl=None
):
    """method.md section 7, as it stands there, without regard to overflow."""
    r_w, r_l = chosen - ref_chosen, rejected - ref_rejected

    def sigma(x):
        return 1 / (1 + torch.exp(-x))

    if kind == "dpo":
        return -torch.log(sigma(beta * (r_w - r_l)))
    if kind == "hinge":
        return torch.where(beta * (r_w - r_l) < 1, 1 - beta * (r_w - r_l), 0.0)
    if kind == "ipo":
        return (r_w / chosen_len - r_l / rejected_len - 1 / (2 * beta)) ** 2
    z0 = max(0.0, sum(kl.flatten().tolist()) / kl.numel())
    return ((1 - sigma(beta * (r_w - z0))) + (1 - sigma(beta * (z0 - r_l)))) / 2


def plain_step(policy, ref, golden, kind, beta, ce, numbers=range(N_ROWS), drawn=None):
    """What a step over these rows must log; drawn: {row number: rejected numbers}, by itself all.

    Mean over a row's pairs, then over rows, plus ce times the chosen's NLL over its own tokens, mean over rows.
    """
    rows = [json.loads(line) for line in golden.read_text().splitlines()]
    tokenizer, prompt = policy.tokenizer, policy.caption_prompt(len(BOXES))
    trained = [p for n, p in sorted(policy.named_parameters()) if "_slot.caption." in n]
    for p in trained:
        p.requires_grad_(True)
    found = []
    for k in numbers:
        pixels = views(open_image(golden.parent / rows[k]["image"]), 28)
        samples = [
            rows[k]["rejected"][j] for j in (drawn or {}).get(k, range(len(rows[k]["rejected"])))
        ]
        targets = [
            targets_of(tokenizer, rows[k]["chosen"], True),
            *(targets_of(tokenizer, s["caption"], s["finish"] == "eos") for s in samples),
            targets_of(tokenizer, rows[(k + 1) % len(rows)]["chosen"], True),
        ]
        logps = torch.stack([plain_logp(policy, prompt, pixels, target) for target in targets])
        with torch.no_grad():
            refs = torch.stack([plain_logp(ref, prompt, pixels, target) for target in targets])
        found.append((logps, refs, torch.tensor([float(len(target)) for target in targets])))
    kl = torch.stack([logps[-1].detach() - refs[-1] for logps, refs, _ in found])
    total, sums = 0.0, Counter()
    for logps, refs, lengths in found:
        pairs = range(1, len(logps) - 1)
        losses = [
            formula(kind, logps[0], logps[j], refs[0], refs[j], beta, lengths[0], lengths[j], kl)
            for j in pairs
        ]
        preference, nll = sum(losses) / len(losses), -logps[0] / lengths[0]
        total = total + preference + ce * nll
        rewards = beta * (logps - refs).detach()
        margins = [rewards[0] - rewards[j] for j in pairs]
        sums.update(
            {
                "preference_loss": preference.item(),
                "nll_loss": nll.item(),
                "rewards/chosen": rewards[0].item(),
                "rewards/rejected": rewards[1:-1].mean().item(),
                "rewards/margins": sum(margins).item() / len(pairs),
                "rewards/accuracies": sum(m > 0 for m in margins).item() / len(pairs),
                "logps/chosen": logps[0].item(),
                "logps/rejected": logps[1:-1].mean().item(),
                "logps/chosen_per_token": -nll.item(),
                "logps/rejected_per_token": (logps[1:-1] / lengths[1:-1]).mean().item(),
            }
        )
    loss = total / len(found)
    gradients = torch.autograd.grad(loss, trained)
    return {
        "loss": loss.item(),
        **{name: value / len(found) for name, value in sums.items()},
        "grad_norm": math.sqrt(sum(g.double().pow(2).sum().item() for g in gradients)),
    }


# ---------------------------------------------------------------- preference_loss
def random_pairs(n, dtype, seed=0, spread=20.0):
    generator = torch.Generator().manual_seed(seed)
    policy = [
        -60 + spread * torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2)
    ]
    refs = [
        -60 + spread * torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2)
    ]
    lengths = [torch.randint(1, 90, (n,), generator=generator) for _ in range(2)]
    kl = 5 * torch.randn(n, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in policy], [x.to(dtype) for x in refs], lengths, kl.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
def test_each_loss_is_its_formula_in_values_and_gradients(kind, beta):
    for seed, dtype, tolerance in (
        (0, torch.float64, 1e-9),
        (1, torch.float64, 1e-9),
        (2, torch.float32, 2e-4),
    ):
        policy, refs, lengths, kl = random_pairs(64, dtype, seed)
        weights = torch.rand(64, generator=torch.Generator().manual_seed(seed)).double()
        ours = [p.clone().requires_grad_() for p in policy]
        theirs = [p.double().requires_grad_() for p in policy]
        found = dpo.preference_loss(kind, *ours, *refs, beta, *lengths, kl=kl)
        constants = [*(r.double() for r in refs), beta, *(n.double() for n in lengths), kl.double()]
        expected = formula(kind, *theirs, *constants)
        assert found.shape == (64,) and found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        (found.double() * weights).sum().backward()
        (expected * weights).sum().backward()
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(
                one.grad.double(), other.grad, rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize(
    "kind, expected", [("dpo", math.log(2)), ("hinge", 1.0), ("ipo", 25.0), ("kto", 0.5)]
)
def test_policy_equal_to_reference_gives_the_known_value(kind, expected):
    chosen, rejected = torch.tensor([-31.5, -200.25]), torch.tensor([-12.0, -77.5])
    lengths = torch.tensor([9, 44]), torch.tensor([3, 20])
    found = dpo.preference_loss(
        kind, chosen, rejected, chosen, rejected, 0.1, *lengths, kl=torch.zeros(2)
    )
    torch.testing.assert_close(found, torch.full((2,), expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e3, 1e6])
def test_extreme_log_probs_stay_finite(kind, size):
    ends = torch.tensor([-size, 0.0, -size, 0.0])
    chosen, rejected = ends.clone().requires_grad_(), ends.flip(0).clone().requires_grad_()
    refs, lengths, kl = (
        torch.tensor([0.0, -size, -size, 0.0]),
        torch.tensor([1, 1, 500, 500]),
        torch.tensor([size, -1]),
    )
    loss = dpo.preference_loss(
        kind, chosen, rejected, refs, refs.flip(0), 0.1, lengths, lengths, kl=kl
    )
    loss.sum().backward()
    assert all(t.isfinite().all() for t in (loss, chosen.grad, rejected.grad))
    assert (loss >= 0).all()
    if kind != "ipo":  # ipo pulls a margin that is too large back
        assert (chosen.grad <= 0).all() and (rejected.grad >= 0).all()


def test_kl_is_detached_and_not_below_zero():
    chosen, rejected, zero, ones = (
        torch.tensor([-5.0]),
        torch.tensor([-9.0]),
        torch.zeros(1),
        torch.ones(1),
    )

    def loss(kl):
        return dpo.preference_loss("kto", chosen, rejected, zero, zero, 0.1, ones, ones, kl=kl)

    kl = torch.tensor([3.0, 1.0], requires_grad=True)
    policy = chosen.clone().requires_grad_()
    dpo.preference_loss(
        "kto", policy, rejected, zero, zero, 0.1, ones, ones, kl=kl
    ).sum().backward()
    assert kl.grad is None and policy.grad is not None
    assert torch.equal(
        loss(torch.tensor([-4.0, 1.0])), loss(torch.zeros(1))
    )  # their mean is below zero
    assert torch.equal(
        loss(torch.tensor([[3.0], [1.0]])), loss(torch.tensor([2.0]))
    )  # the mean, of any shape
    assert loss(torch.tensor([2.0])) != loss(torch.zeros(1))


def test_none_is_zero_and_pulls_at_nothing():
    policy, refs, lengths, _ = random_pairs(64, torch.float32)
    ours = [p.clone().requires_grad_() for p in policy]
    found = dpo.preference_loss("none", *ours, *refs, 0.1, *lengths)
    assert torch.equal(found, torch.zeros(64))
    gradients = torch.autograd.grad((found + 0 * sum(ours)).sum(), ours)
    assert all(torch.equal(g, torch.zeros(64)) for g in gradients)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="simpo"):
        dpo.preference_loss("simpo", *[torch.zeros(1)] * 4, 0.1, torch.ones(1), torch.ones(1))


# ---------------------------------------------------------------- rows on disk and their ids
def golden_row(**more):
    return {
        "image": "0.png",
        "chosen": "background gray",
        "rejected": [{"caption": " top", "finish": "eos"}],
        **more,
    }


def encoded(model, room, *rows):
    rows = [{"rejected": [], "id": str(k), **row} for k, row in enumerate(rows)]
    return dpo.encode_rows(model, rows, room)


def test_the_end_token_is_scored_only_where_a_caption_ended(tiny_model):
    tokenizer = tiny_model.tokenizer
    ends = [
        {"caption": " red circle", "finish": finish} for finish in ("eos", "length", "repeat", None)
    ]
    (row,), too_long = encoded(tiny_model, 80, {"chosen": " red ring ", "rejected": ends})
    circle = tokenizer.encode(" red circle")
    assert too_long == 0 and row["chosen_ids"] == [*tokenizer.encode(" red ring"), tokenizer.eos_id]
    assert row["rejected_ids"] == [[*circle, tokenizer.eos_id], circle, circle, circle]


def test_the_first_token_carries_the_space_and_a_loop_is_kept_raw(tiny_model):
    tokenizer = tiny_model.tokenizer
    loop = " red, red, red,"
    (row,), _ = encoded(
        tiny_model,
        80,
        {
            "chosen": "red",
            "rejected": [
                {"caption": "ring", "finish": "length"},
                {"caption": loop, "finish": "repeat"},
            ],
        },
    )
    assert row["chosen_ids"][:-1] == tokenizer.encode(" red")
    assert row["rejected_ids"] == [tokenizer.encode(" ring"), tokenizer.encode(loop)]


def test_special_tokens_spelled_in_captions_are_text(tiny_model):
    text = "red<|endoftext|></img>"
    (row,), _ = encoded(
        tiny_model,
        80,
        {"chosen": text, "rejected": [{"caption": text, "finish": "length"}]},
    )
    assert max(row["chosen_ids"][:-1] + row["rejected_ids"][0]) < tiny_model.tokenizer.eos_id


def test_what_does_not_fit_is_left_out_if_chosen_and_cut_without_an_end_if_rejected(tiny_model):
    tokenizer = tiny_model.tokenizer
    five, six = " red" * 5, " red" * 6  # a token a word
    red = tokenizer.encode(" red")
    rows, too_long = encoded(
        tiny_model,
        6,
        {"chosen": five, "rejected": [{"caption": six, "finish": "eos"}]},
        {"chosen": six},
        {
            "chosen": "ring",
            "rejected": [
                {"caption": five, "finish": "eos"},
                {"caption": " red" * 40, "finish": "eos"},
            ],
        },
    )
    assert too_long == 1 and [row["id"] for row in rows] == ["0", "2"]
    assert rows[0]["chosen_ids"] == red * 5 + [tokenizer.eos_id]  # fits to the token
    assert rows[0]["rejected_ids"] == [red * 6]
    assert rows[1]["rejected_ids"] == [red * 5 + [tokenizer.eos_id], red * 6]


def test_the_mismatched_caption_is_the_next_chosen_one_in_file_order(tiny_model):
    words = ["red", "ring", "red " * 30, "square"]
    rows, _ = encoded(tiny_model, 10, *({"chosen": word} for word in words))
    expected_mismatched = [
        tiny_model.tokenizer.encode(f" {word}") for word in ("ring", "square", "red")
    ]
    assert all("mismatched_ids" not in row for row in rows)  # kto alone needs them
    rows = dpo.add_mismatched(rows)
    assert [row["mismatched_ids"][:-1] for row in rows] == expected_mismatched


def test_bad_golden_rows_are_told_with_file_and_line(golden, tmp_path):
    shutil.copy(golden.parent / "0.png", tmp_path)
    good = [golden_row(), golden_row(rejected=[{"caption": "red"}])]
    bad = [
        "{",
        "[]",
        "7",
        '{"image": "0.png"}',
        *map(
            json.dumps,
            (
                golden_row(chosen=" "),
                golden_row(chosen=None),
                golden_row(rejected=[]),
                golden_row(rejected="red"),
                golden_row(rejected=["red"]),
                golden_row(rejected=[{"caption": ""}]),
                golden_row(rejected=[{"finish": "eos"}]),
                golden_row(image=3),
                golden_row(image="none.png"),
                golden_row(image="."),
                golden_row(image="a\0b.png"),
            ),
        ),
    ]
    lines = [json.dumps(good[0]), "", *bad, '{"image": "\xff"}', json.dumps(good[1])]
    (tmp_path / "rows.jsonl").write_bytes("\n".join(lines).encode("latin-1"))  # \xff is no UTF-8
    rows, found = read_golden(tmp_path / "rows.jsonl")
    assert [row["chosen"] for row in rows] == ["background gray"] * 2 and len(
        {row["id"] for row in rows}
    ) == 2
    assert [where for where, _ in found] == [
        f"{tmp_path / 'rows.jsonl'}:{n}" for n in range(3, 3 + len(bad) + 1)
    ]
    assert "none.png" in dict(found)[f"{tmp_path / 'rows.jsonl'}:15"]


def test_an_image_name_that_no_file_can_have_is_a_bad_row(golden, tmp_path):
    shutil.copy(golden.parent / "0.png", tmp_path)
    rows, bad = read_golden(
        stages.write_rows(tmp_path / "rows.jsonl", [golden_row(image="x" * 300), golden_row()])
    )
    assert len(rows) == 1 and bad[0][0].endswith("rows.jsonl:1")


# ---------------------------------------------------------------- packed pairs
def test_pack_lays_the_captions_behind_one_prefix():
    found = dpo.pack([7, 8, 9], [[1, 2, 3], [4], [5, 6]])
    assert found == {
        "ids": [7, 8, 9, 1, 2, 5],
        "branch": [0, 0, 0, 1, 1, 3],
        "targets": [1, 2, 3, 4, 5, 6],
        "positions": [2, 3, 4, 2, 2, 5],
        "owner": [0, 0, 0, 1, 2, 2],
    }


def packed_examples(model, golden):
    """Examples with two to five captions of different lengths, and their caption lists."""
    rows, _ = dpo.encode_rows(model, read_golden(golden)[0], 80)
    rows = dpo.add_mismatched(rows)
    captions = [
        [rows[0]["chosen_ids"], rows[0]["mismatched_ids"], *rows[0]["rejected_ids"]],
        [rows[2]["chosen_ids"], rows[2]["mismatched_ids"], *rows[2]["rejected_ids"]],
        [rows[4]["rejected_ids"][0][:1], rows[1]["chosen_ids"]],
    ]
    prompt = model.caption_prompt(len(BOXES))
    images = [views(open_image(rows[k]["image"]), 28) for k in (0, 2, 4)]
    return (
        [{**dpo.pack(prompt, c), "views": pixels} for c, pixels in zip(captions, images)],
        captions,
        prompt,
    )


def test_packed_captions_equal_separate_sequences_in_values_and_gradients(
    tiny_base, captioner, golden
):
    model = loaded(tiny_base, captioner).train()
    trained = [model.get_parameter(n).requires_grad_() for n in adapters.names_of(model, "caption")]
    examples, captions, prompt = packed_examples(model, golden)
    assert [len(c) for c in captions] == [3, 5, 2] and len({len(e["ids"]) for e in examples}) == 3
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) / 40
    model.checkpointing, images, rows = True, [], []
    hooks = [
        model.transformer.visual.register_forward_pre_hook(
            lambda _, args: images.append(len(args[0]))
        ),
        model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0]))),
    ]
    found = dpo.caption_logps(model, examples, model.tokenizer.eos_id, "cpu")
    assert images == [3 * 6]  # the ViT sees each row's views once
    assert (
        max(rows) <= LOGITS_AT_ONCE < sum(rows)
    )  # logits exist for a chunk of the targets at a time
    gradients = torch.autograd.grad((found * weights).sum(), trained)
    model.checkpointing = False
    for hook in hooks:
        hook.remove()
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for i, (example, own) in enumerate(zip(examples, captions)):
        for k, caption in enumerate(own):
            expected[i, k] = plain_logp(model, prompt, example["views"], caption)
    lengths = torch.tensor([[len(c) for c in own] + [1] * (5 - len(own)) for own in captions])
    assert found.shape == (3, 5) and found.dtype == torch.float32
    torch.testing.assert_close(found.double() / lengths, expected / lengths, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert found[0, 3:].tolist() == [0, 0] and found[2, 2:].tolist() == [
        0,
        0,
        0,
    ]  # no such captions
    expected_gradients = torch.autograd.grad((expected * weights).sum(), trained)
    for one, other in zip(gradients, expected_gradients):
        torch.testing.assert_close(
            one, other, rtol=1e-4, atol=1e-5 * max(1.0, other.abs().max().item())
        )


def test_the_first_token_is_predicted_by_the_prompts_last_position(tiny_base, captioner, golden):
    model = loaded(tiny_base, captioner).train()
    prompt, pixels = (
        model.caption_prompt(len(BOXES)),
        views(open_image(golden.parent / "0.png"), 28),
    )
    first = model.tokenizer.encode(" red blue green")
    example = {**dpo.pack(prompt, [[token] for token in first]), "views": pixels}
    with torch.no_grad():
        found = dpo.caption_logps(model, [example], model.tokenizer.eos_id, "cpu")[0]
        expected = model(torch.tensor([prompt]), pixels)[0, -1].log_softmax(-1)[first]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- a whole step
@pytest.mark.parametrize(
    "kind, beta, ce",
    [("dpo", 0.1, 1), ("dpo", 0.3, 0), ("hinge", 0.05, 0.5), ("ipo", 0.1, 1), ("kto", 0.1, 1)],
)
def test_two_steps_log_what_the_formulas_give(train, tiny_base, captioner, golden, kind, beta, ce):
    more = (
        "--loss",
        kind,
        "--beta",
        beta,
        "--ce",
        ce,
        "--max-rejected",
        9,
        "--micro-batch",
        N_ROWS,
    )
    out = train("out", *more, "--max-steps", 1)
    start, after = loaded(tiny_base, captioner), loaded(tiny_base, out)
    train("out", *more, "--max-steps", 2)
    log = log_of(out)
    assert [row["step"] for row in log] == [1, 2] and log[0]["learning_rate"] == 1e-3
    assert all(isinstance(row[name], float) for row in log for name in NAMES) and all(
        "seconds" in row for row in log
    )
    for row, policy in zip(log, (loaded(tiny_base, captioner), after)):
        expected = plain_step(policy, start, golden, kind, beta, ce)
        assert {
            name: row[name] for name in expected if name != "rewards/accuracies"
        } == pytest.approx(
            {name: value for name, value in expected.items() if name != "rewards/accuracies"},
            rel=2e-4,
            abs=2e-4,
        )
    assert log[1]["rewards/accuracies"] == pytest.approx(expected["rewards/accuracies"])
    assert abs(log[1]["rewards/margins"]) > 0.01  # the second step says something


@pytest.mark.parametrize(
    "kind, expected", [("dpo", math.log(2)), ("hinge", 1.0), ("ipo", 25.0), ("kto", 0.5)]
)
def test_the_first_step_of_a_fresh_run_has_no_reward_yet(train, kind, expected):
    (row,) = log_of(
        train("out", "--loss", kind, "--max-steps", 1, "--batch", 5, "--micro-batch", 2)
    )
    assert row["preference_loss"] == pytest.approx(expected, abs=1e-4)
    assert max(abs(row[f"rewards/{name}"]) for name in ("chosen", "rejected", "margins")) < 1e-4
    assert row["loss"] == pytest.approx(row["preference_loss"] + row["nll_loss"], rel=1e-6)
    assert set(NAMES) <= row.keys()


@pytest.mark.parametrize("ce", [1, 0.5])
def test_without_a_preference_loss_cross_entropy_on_the_chosen_captions_is_left(
    train, tiny_base, captioner, golden, ce
):
    """Loss and gradient of a step: --ce times the mean over rows of the NLL per token, whatever was rejected."""
    (row,) = log_of(
        train("out", "--loss", "none", "--ce", ce, "--max-steps", 1, "--micro-batch", 4)
    )
    policy = loaded(tiny_base, captioner)
    prompt, trained = (
        policy.caption_prompt(len(BOXES)),
        [p for n, p in policy.named_parameters() if "_slot.caption." in n],
    )
    for p in trained:
        p.requires_grad_(True)
    nll = 0.0
    for line in stages.read_rows(golden):
        target = targets_of(policy.tokenizer, line["chosen"], True)
        nll = nll - plain_logp(
            policy, prompt, views(open_image(golden.parent / line["image"]), 28), target
        ) / len(target)
    nll = nll / N_ROWS
    gradients = torch.autograd.grad(ce * nll, trained)
    expected_norm = math.sqrt(sum(g.double().pow(2).sum().item() for g in gradients))
    assert row["preference_loss"] == 0 and row["nll_loss"] == pytest.approx(nll.item(), rel=1e-4)
    assert row["loss"] == pytest.approx(ce * nll.item(), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(expected_norm, rel=1e-3)
    (other,) = log_of(train("dpo", "--ce", ce, "--max-steps", 1, "--micro-batch", 4))
    assert (
        other["nll_loss"] == pytest.approx(row["nll_loss"], rel=1e-5)
        and other["loss"] > row["loss"] + 0.5
    )


def drawn_by(monkeypatch, calls):
    """Let caption_logps note (row id, drawn) of every example that is trained on."""
    real = dpo.caption_logps

    def noted(model, examples, *rest):
        calls.extend(
            (example["id"], tuple(example["drawn"])) for example in examples if "drawn" in example
        )
        return real(model, examples, *rest)

    monkeypatch.setattr(dpo, "caption_logps", noted)


def visits(calls):
    """{row id: what was drawn at its first, second … visit}"""
    found = defaultdict(list)
    for row, drawn in calls:
        found[row].append(drawn)
    return dict(found)


def test_rejected_captions_are_drawn_by_seed_row_and_epoch_alone(train, monkeypatch):
    calls, found = [], []
    drawn_by(monkeypatch, calls)
    for number, (seed, batch, micro) in enumerate([(0, 6, 1), (0, 3, 2), (1, 6, 6)]):
        train(
            f"out{number}", "--seed", seed, "--batch", batch, "--micro-batch", micro, "--epochs", 6
        )
        found.append(visits(calls))
        calls.clear()
    assert found[0] == found[1] and all(len(drawn) == 6 for drawn in found[0].values())
    assert found[0] != found[2] and found[0].keys() == found[2].keys()
    assert all(len(one) == 1 for drawn in found[0].values() for one in drawn)
    expected_most = {str(k + 1): 1 + k % 3 for k in range(N_ROWS)}  # rejected captions of each row
    assert all(
        set(drawn) <= {(j,) for j in range(expected_most[row])} for row, drawn in found[0].items()
    )
    assert all(len(set(drawn)) > 1 for row, drawn in found[0].items() if expected_most[row] == 3)
    assert found[0]["3"] != found[0]["6"]  # two rows with three each


def test_more_rejected_captions_are_packed_where_a_row_has_them(
    train, tiny_base, captioner, golden, monkeypatch
):
    calls = []
    drawn_by(monkeypatch, calls)
    out = train("out", "--max-rejected", 2, "--max-steps", 1, "--micro-batch", 2)
    drawn = {int(row) - 1: choice for row, choice in calls}
    assert [len(set(drawn[k])) for k in range(N_ROWS)] == [1, 2, 2, 1, 2, 2]
    start = loaded(tiny_base, captioner)
    expected = plain_step(loaded(tiny_base, captioner), start, golden, "dpo", 0.1, 1, drawn=drawn)
    (row,) = log_of(out)
    assert [row[name] for name in ("loss", "logps/rejected", "grad_norm")] == pytest.approx(
        [expected[name] for name in ("loss", "logps/rejected", "grad_norm")], rel=1e-4
    )


# ---------------------------------------------------------------- reference log-probs
@pytest.fixture
def referenced(monkeypatch):
    """How many rows went through the reference pass since last asked."""
    caption_logps, reference_logps, rows, inside = dpo.caption_logps, dpo.reference_logps, [], []

    def counted(model, examples, *rest):
        rows.extend(examples if inside else [])
        return caption_logps(model, examples, *rest)

    def entered(*args):
        inside.append(True)
        found = reference_logps(*args)
        inside.clear()
        return found

    monkeypatch.setattr(dpo, "caption_logps", counted)
    monkeypatch.setattr(dpo, "reference_logps", entered)

    def count():
        n = len(rows)
        rows.clear()
        return n

    return count


def reference_files(out):
    return {path: path.read_text() for path in out.glob("reference-*.jsonl")}


def references_of(text):
    """{row id: the reference's answers by name} of a reference file."""
    rows = map(json.loads, filter(None, text.splitlines()))
    return {row.pop("id"): row for row in rows}


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_reference_log_probs_are_computed_once_and_reused(
    train, tiny_base, captioner, golden, referenced, kind
):
    """Mismatched captions are there for kto alone."""
    out = train("out", "--max-steps", 2, "--holdout", 0.3, "--loss", kind)
    assert referenced() == N_ROWS  # held-out rows too
    ((path, text),) = reference_files(out).items()
    model = loaded(tiny_base, captioner)
    rows, _ = dpo.encode_rows(model, read_golden(golden)[0], 80)
    stored = references_of(text)
    with torch.no_grad():
        for row in dpo.add_mismatched(rows):
            pixels = views(open_image(row["image"]), 28)
            prompt = model.caption_prompt(6)

            def expected(ids, pixels=pixels, prompt=prompt):
                logp = plain_logp(model, prompt, pixels, ids).item()
                return pytest.approx(logp, rel=1e-5)

            answer = {
                "chosen": expected(row["chosen_ids"]),
                "rejected": [expected(ids) for ids in row["rejected_ids"]],
            }
            if kind == "kto":
                answer["mismatched"] = expected(row["mismatched_ids"])
            assert stored[row["id"]] == answer
    # resumed, with another policy by now
    train("out", "--max-steps", 3, "--holdout", 0.3, "--loss", kind)
    assert referenced() == 0
    shutil.rmtree(out / "resume")
    others = ("--loss", "kto") if kind == "kto" else ("--loss", "hinge")
    others = (*others, "--beta", 0.5, "--ce", 0, "--max-rejected", 3)
    train("out", "--max-steps", 1, "--holdout", 0.3, *others)
    assert referenced() == 0  # it depends on none of these
    assert list(reference_files(out)) == [path] and path.read_text().split() == text.split()
    shutil.rmtree(out / "resume")
    train("out", "--max-steps", 1, "--holdout", 0.3, "--loss", "ipo" if kind == "kto" else "kto")
    assert referenced() == N_ROWS and len(reference_files(out)) == 2


def test_a_torn_or_missing_line_is_computed_again(train, referenced):
    out = train("out", "--max-steps", 1)
    ((path, text),) = reference_files(out).items()
    lines = text.split("\n")
    path.write_text("\n".join(lines[:-3]) + "\n" + lines[-3][:20])  # one line gone, one torn
    train("again", "--max-steps", 1)
    assert referenced() == 2 * N_ROWS
    train("out", "--max-steps", 2)
    assert referenced() == 2
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert sorted(rows, key=lambda row: row["id"]) == [
        json.loads(line) for line in sorted(lines) if line
    ]


def test_other_rows_another_start_or_another_image_have_references_of_their_own(
    train, tiny_base, captioner, golden, tmp_path, referenced
):
    out = train("out", "--max-steps", 1)
    assert referenced() == N_ROWS
    data = tmp_path / "data"
    shutil.copytree(golden.parent, data)

    def count(**how):
        shutil.rmtree(out / "resume")
        train("out", "--max-steps", 1, **how)
        return referenced()

    assert count(init=write_captioner(tiny_base, tmp_path / "other", seed=1)) == N_ROWS
    assert count(data=data / "golden.jsonl") == N_ROWS
    lines = (data / "golden.jsonl").read_text().splitlines()
    first, *others = map(json.loads, lines)
    stages.write_rows(data / "golden.jsonl", [{**first, "chosen": "background red"}, *others])
    assert count(data=data / "golden.jsonl") > 0
    assert len(reference_files(out)) == 4
    assert count() == 0 and count(data=data / "golden.jsonl") == 0  # all four are kept
    world.draw(world.make_scene([9, 9])).save(data / "1.png")  # another image under the old name
    assert count(data=data / "golden.jsonl") > 0


# ---------------------------------------------------------------- learning
def test_one_batch_overfits_and_only_the_adapters_move(train, tiny_base, captioner, monkeypatch):
    models, real = [], QwenVL.from_pretrained
    monkeypatch.setattr(
        QwenVL, "from_pretrained", lambda *a, **k: models.append(real(*a, **k)) or models[-1]
    )
    out = train("out", "--max-steps", 25, "--lr", 3e-3, "--micro-batch", 6, "--max-rejected", 3)
    log = log_of(out)
    assert (
        log[-1]["rewards/margins"] > log[0]["rewards/margins"] + 1
        and log[-1]["rewards/accuracies"] > 0.9
    )
    assert log[-1]["nll_loss"] < 0.7 * log[0]["nll_loss"] and log[-1]["preference_loss"] < 0.4
    assert log[-1]["logps/chosen"] > log[0]["logps/chosen"]
    before, after, base = (
        weights_of(captioner),
        weights_of(out),
        load_file(tiny_base / "model.safetensors"),
    )
    moved = sorted(name for name in after if not torch.equal(before[name], after[name]))
    slots = [f"transformer.h.{k}.{slot}_slot" for k in range(2) for slot in ("attn", "mlp")]
    slots += [f"transformer.visual.transformer.resblocks.0.{slot}_slot" for slot in ("attn", "mlp")]
    expected_moved = sorted(
        f"{slot}.caption.{part}.{leaf}"
        for slot in slots
        for part in ("down", "up")
        for leaf in ("weight", "bias")
    )
    assert moved == expected_moved
    assert after.keys() - set(moved) == {"soft_prompts.caption.vectors"}
    assert models[0].checkpointing
    trained = dict(models[0].named_parameters())
    assert all(
        torch.equal(trained[name], tensor) for name, tensor in base.items() if name in trained
    )
    assert base.keys() <= models[0].state_dict().keys()


def test_the_folder_says_where_it_came_from(train, captioner, tiny_base):
    out = train("out", "--max-steps", 1, "--beta", 0.07)
    card = adapters.read_card(out)
    expected = {
        "stage": "dpo",
        "parent": str(captioner),
        "parent_hash": adapters.folder_hash(captioner),
        "base": str(tiny_base),
        "name": "caption",
        "soft_prompt": True,
        "reduction": 4,
    }
    assert {key: card[key] for key in expected} == expected and card["arguments"]["beta"] == 0.07
    assert train("round2", "--max-steps", 1, init=out).is_dir()  # a further round starts from it
    assert adapters.read_card(out.parent / "round2")["parent"] == str(out)


def test_the_same_command_after_the_end_changes_nothing(train, referenced):
    out = train("out", "--epochs", 2, "--batch", 4, "--holdout", 0.34)
    expected_log, expected = log_of(out), weights_of(out)
    assert len(expected_log) == 2 and referenced() == N_ROWS
    train("out", "--epochs", 2, "--batch", 4, "--holdout", 0.34)
    assert log_of(out) == expected_log and referenced() == 0
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(out).items())


def test_a_base_in_bfloat16_trains_adapters_in_fp32(train, referenced):
    out = train("out", "--max-steps", 1)
    shutil.rmtree(out / "resume")
    assert referenced() == N_ROWS
    (row,) = log_of(train("out", "--max-steps", 1, "--dtype", "bfloat16"))
    assert referenced() == N_ROWS  # log-probs of another dtype are others
    assert {tensor.dtype for tensor in weights_of(out).values()} == {torch.float32}
    assert row["preference_loss"] == pytest.approx(math.log(2), abs=0.05) and row["grad_norm"] > 0


def test_a_lora_captioner_trains_too(train, tiny_base, tmp_path):
    start = write_captioner(tiny_base, tmp_path / "lora", kind="lora", reduction=4)
    out = train("out", "--max-steps", 2, init=start)
    before, after = weights_of(start), weights_of(out)
    assert {name for name in after if torch.equal(before[name], after[name])} == {
        "soft_prompts.caption.vectors"
    }


# ---------------------------------------------------------------- what makes a collapse visible
@pytest.mark.parametrize("kind", KINDS)
def test_held_out_rows_have_their_figures_at_checkpoints(train, tiny_base, captioner, golden, kind):
    out = train(
        "out",
        "--loss",
        kind,
        "--max-steps",
        3,
        "--save-every",
        2,
        "--holdout",
        0.34,
        "--max-rejected",
        9,
    )
    log = log_of(out)
    rows, _ = read_golden(golden)
    held = [int(row["id"]) - 1 for row in plumbing.data.split(rows, 0.34, 0)[1]]
    assert len(held) == 2
    assert [any(key.startswith("held_out") for key in row) for row in log] == [False, True, True]
    assert {f"held_out_{name}" for name in NAMES[:11]} <= log[1].keys()
    expected = plain_step(
        loaded(tiny_base, out), loaded(tiny_base, captioner), golden, kind, 0.1, 1, numbers=held
    )
    loss = (
        () if kind == "kto" else ("loss", "preference_loss")
    )  # z0 may be of other rows than these two
    names = [*loss, *(name for name in NAMES[2:11] if name != "rewards/accuracies")]
    found = [log[2][f"held_out_{name}"] for name in names]
    assert found == pytest.approx([expected[name] for name in names], rel=2e-4, abs=2e-4)


def test_held_out_rows_are_never_trained_on(train, golden, monkeypatch):
    trained_on, real = set(), dpo.caption_logps

    def noted(model, examples, *rest):
        if torch.is_grad_enabled():
            trained_on.update(example["id"] for example in examples)
        return real(model, examples, *rest)

    monkeypatch.setattr(dpo, "caption_logps", noted)
    train("out", "--epochs", 2, "--holdout", 0.34)
    held = {row["id"] for row in plumbing.data.split(read_golden(golden)[0], 0.34, 0)[1]}
    assert len(trained_on) == 4 and not trained_on & held


def test_captions_of_held_out_images_are_watched(train, monkeypatch):
    said = [
        {"caption": " red, blue, red", "finish": "repeat", "tokens": 5},
        {"caption": " red", "finish": "eos", "tokens": 2},
    ]
    asked = []

    def sample(model, pixels, names, n, **how):
        asked.append((tuple(torch.stack(pixels).shape), names, n))
        return [[said[len(asked) % 2]]]

    monkeypatch.setattr(dpo, "sample", sample)
    out = train("out", "--max-steps", 2, "--save-every", 2, "--holdout", 0.34, "--watch", 8)
    log = log_of(out)
    assert [shape for shape, _, _ in asked] == [(1, 6, 3, 28, 28)] * 2 and len(
        {n[0] for _, n, _ in asked}
    ) == 2
    assert not any(key.startswith("watch") for key in log[0])
    expected = {"watch/length": 3.5, "watch/eos": 0.5, "watch/repeat": 0.5}
    assert {key: log[1][key] for key in expected} == expected
    asked.clear()
    train("less", "--max-steps", 1, "--holdout", 0.34, "--watch", 1)
    assert len(asked) == 1


def test_real_captions_are_watched(train):
    (row,) = log_of(train("out", "--max-steps", 1, "--holdout", 0.34, "--watch", 2))
    assert (
        0 <= row["watch/eos"] <= 1
        and 0 <= row["watch/repeat"] <= 1
        and 0 <= row["watch/length"] <= 86
    )


# ---------------------------------------------------------------- a short SFT on golden captions first
def sft_on_golden(captioner, golden, out, *more):
    """The command that comes before dpo.py where a round begins with SFT."""
    argv = ("--init", captioner, "--data", golden, "--out", out, "--no-soft-prompt", "--holdout", 0)
    more = ("--workers", 0, "--warmup", 0, "--lr", 1e-3, "--batch", N_ROWS, *more)
    assert stages.run(sft, *argv, *more) == 0
    return out


def test_a_short_sft_may_be_the_start_and_the_reference(
    train, tiny_base, captioner, golden, tmp_path
):
    first = sft_on_golden(captioner, golden, tmp_path / "first", "--epochs", 2, "--batch", 3)
    short = log_of(first)
    assert len(short) == 4 and short[0]["step"] == 1 and all(row["loss"] > 0 for row in short)
    tensors = weights_of(first)
    assert [n for n in tensors if torch.equal(tensors[n], weights_of(captioner)[n])] == [
        "soft_prompts.caption.vectors"
    ]
    out = train("out", "--batch", 3, "--max-rejected", 9, "--max-steps", 2, init=first)
    log = log_of(out)
    assert (
        log[0]["preference_loss"] == pytest.approx(math.log(2), abs=1e-4)
        and abs(log[0]["rewards/chosen"]) < 1e-4
    )
    rows = [row for row, _ in plumbing.data.step_rows(N_ROWS, 3, 0, 0)]
    model = loaded(tiny_base, first)
    expected = plain_step(model, loaded(tiny_base, first), golden, "dpo", 0.1, 1, numbers=rows)
    assert log[0]["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert log[0]["logps/chosen"] == pytest.approx(expected["logps/chosen"], rel=1e-4)
    assert adapters.read_card(out)["parent_hash"] == adapters.folder_hash(first)


def test_sft_on_golden_rows_is_cross_entropy_per_token_of_the_whole_step(
    tiny_base, captioner, golden, tmp_path
):
    more = ("--max-steps", 1, "--micro-batch", 2)
    first = sft_on_golden(captioner, golden, tmp_path / "first", *more)
    model = loaded(tiny_base, captioner)
    total, tokens = 0.0, 0
    for line in golden.read_text().splitlines():
        row = json.loads(line)
        ids, pixels = (
            targets_of(model.tokenizer, row["chosen"], True),
            views(open_image(golden.parent / row["image"]), 28),
        )
        with torch.no_grad():
            total -= plain_logp(model, model.caption_prompt(6), pixels, ids).item()
        tokens += len(ids)
    assert log_of(first)[0]["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_two_commands_stopped_in_either_resume_as_if_they_had_not_been(
    train, captioner, golden, tmp_path, monkeypatch
):
    short = ("--epochs", 1.5, "--batch", 4, "--micro-batch", 2)
    more = ("--batch", 4, "--max-steps", 3, "--micro-batch", 2)
    expected_first = sft_on_golden(captioner, golden, tmp_path / "whole-first", *short)
    expected = train("whole", *more, init=expected_first)
    first, out = tmp_path / "first", tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patched(patch, plumbing.data, "collate", 4, signal.SIGTERM)
        sft_on_golden(captioner, golden, first, *short)
    assert (first / "adapters.json").exists() is False
    sft_on_golden(captioner, golden, first, *short)
    assert stages.same_run(first, expected_first)
    with monkeypatch.context() as patch:
        patched(patch, dpo, "caption_logps", 4, signal.SIGTERM)
        assert dpo.main(flags(first, golden, out, *more)) == 128 + signal.SIGTERM
    assert (out / "adapters.json").exists() is False
    train("out", *more, init=first)
    assert stages.same_run(out, expected) and len(log_of(out)) == 3


# ---------------------------------------------------------------- batches, stops
def patched(patch, module, name, call, what):
    """The call-th training call of module.name first sends this process a signal."""
    real, calls = getattr(module, name), []

    def striking(*args, **how):
        if torch.is_grad_enabled():
            calls.append(name)
            if len(calls) == call:
                os.kill(os.getpid(), what)
        return real(*args, **how)

    patch.setattr(module, name, striking)


def as_rank(argv, rank, world, port, err, strike, slow):
    """One rank of dpo.py, as torchrun would start it; strike (rank, call, signal): it sends itself a signal; slow: the
    rank that comes late to the reference pass."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if strike and strike[0] == rank:
        patched(pytest.MonkeyPatch(), dpo, "caption_logps", *strike[1:])
    if slow == rank:
        reference_logps = dpo.reference_logps
        dpo.reference_logps = lambda *args: time.sleep(1.5) or reference_logps(*args)
    sys.exit(dpo.main(argv))


def run_ranks(world, argv, err, strike=None, slow=None, timeout=60):
    """dpo.py on `world` ranks -> their exit codes; None for one that had to be ended after `timeout` seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = stages.fork_server()
    children = [
        context.Process(target=as_rank, args=(argv, rank, world, port, str(err), strike, slow))
        for rank in range(world)
    ]
    for child in children:
        child.start()
    end, codes = time.monotonic() + timeout, []
    for child in children:
        child.join(max(0.1, end - time.monotonic()))
        codes.append(child.exitcode)
        if child.exitcode is None:
            child.kill()
            child.join()
    return codes


def moments_of(out):
    (path,) = (out / "resume").glob("step-*")
    parts = [torch.load(part, weights_only=True) for part in sorted(path.glob("moments-*.pt"))]
    return {name: state["exp_avg"] for part in parts for name, state in part.items()}


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_one_by_six_equals_six_by_one_equals_two_ranks(train, captioner, golden, tmp_path, kind):
    more = ("--max-steps", 3, "--max-rejected", 2, "--loss", kind)
    runs = [
        train("1x6", *more, "--micro-batch", 6),
        train("6x1", *more, "--micro-batch", 1),
        tmp_path / "ranks",
    ]
    assert run_ranks(
        2, flags(captioner, golden, runs[2], *more, "--micro-batch", 2), tmp_path / "err"
    ) == [0, 0]
    expected_log, *logs = [stages.steps_of(out) for out in runs]
    for log in (expected_log, *logs):
        log[1].pop("rewards/accuracies")  # of margins that are zero but for rounding
    for log in logs:
        assert log.keys() == expected_log.keys()
        for step, row in log.items():
            assert row == pytest.approx(expected_log[step], rel=2e-4, abs=2e-4)
    expected, moments = weights_of(runs[0]), moments_of(runs[0])
    for out in runs[1:]:
        found = weights_of(out)
        assert all(
            torch.allclose(found[n], expected[n], rtol=0, atol=1e-4) for n in expected
        )  # a tenth of one step
        assert all(
            torch.allclose(m, moments[n], rtol=1e-3, atol=1e-5) for n, m in moments_of(out).items()
        )


# Five rows for training and four a step: stops are within an epoch, and within a step of four micro-batches.
STOPPED = ("--max-steps", 5, "--batch", 4, "--save-every", 2, "--holdout", 0.17)


@pytest.fixture(scope="module")
def unstopped(captioner, golden, tmp_path_factory):
    """The same run on one rank, in a process of its own."""
    out = tmp_path_factory.mktemp("unstopped") / "out"
    assert run_ranks(1, flags(captioner, golden, out, *STOPPED), out.parent / "err") == [0]
    return out


@pytest.mark.parametrize(
    "call", [1, 7, 13]
)  # the first micro-step, inside of a step, and at its start
def test_sigterm_leaves_a_checkpoint_from_which_the_run_goes_on_bit_equal(
    train, captioner, golden, tmp_path, monkeypatch, unstopped, call
):
    with monkeypatch.context() as patch:
        patched(patch, dpo, "caption_logps", call, signal.SIGTERM)
        assert (
            dpo.main(flags(captioner, golden, tmp_path / "out", *STOPPED)) == 128 + signal.SIGTERM
        )
    expected_step = (call - 1) // 4  # the unfinished one is dropped
    assert [path.name for path in (tmp_path / "out" / "resume").iterdir()] == [
        f"step-{expected_step:08d}"
    ]
    out = train("out", *STOPPED)
    assert stages.same_run(out, unstopped) and len(log_of(out)) == 5


def test_worker_processes_change_nothing_however_they_are_started(
    captioner, golden, tmp_path, unstopped
):
    """These children start theirs by "forkserver", as Python 3.14 does by itself ("spawn" on a Mac)."""
    argv = flags(captioner, golden, tmp_path / "out", *STOPPED, "--workers", 2)
    assert run_ranks(1, argv, tmp_path / "err") == [0], (tmp_path / "err").read_text()
    assert stages.same_run(tmp_path / "out", unstopped)


def test_a_run_killed_outright_goes_on_bit_equal(train, captioner, golden, tmp_path, unstopped):
    argv = flags(captioner, golden, tmp_path / "out", *STOPPED)
    assert run_ranks(1, argv, tmp_path / "err", strike=(0, 15, signal.SIGKILL)) == [-signal.SIGKILL]
    assert len(log_of(tmp_path / "out")) == 3 and (tmp_path / "out/resume/step-00000002").is_dir()
    out = train("out", *STOPPED)
    assert stages.same_run(out, unstopped)


@pytest.fixture(scope="module")
def unstopped_ranks(captioner, golden, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "out"
    assert run_ranks(2, flags(captioner, golden, out, *STOPPED), out.parent / "err") == [0, 0]
    return out


@pytest.mark.parametrize(
    "strike", [(1, 4, signal.SIGTERM), (0, 7, signal.SIGKILL)], ids=["SIGTERM", "SIGKILL"]
)
def test_two_ranks_stop_together_and_go_on_bit_equal(
    captioner, golden, tmp_path, unstopped_ranks, unstopped, strike
):
    argv, out = flags(captioner, golden, tmp_path / "out", *STOPPED), tmp_path / "out"
    codes = run_ranks(2, argv, tmp_path / "err", strike)
    if strike[2] == signal.SIGTERM:
        assert codes == [143, 143]
    else:
        assert codes[0] == -signal.SIGKILL and codes[1] not in (
            0,
            None,
        )  # the other one ends too, and says so
    assert not (out / "adapters.json").exists()
    assert run_ranks(2, argv, tmp_path / "err") == [0, 0]
    assert stages.same_run(out, unstopped_ranks)
    for row, expected in zip(log_of(unstopped_ranks), log_of(unstopped)):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert stored_ids(out) == [str(k + 1) for k in range(N_ROWS)]  # each computed by one rank, once


def stored_ids(out):
    lines = [
        line for text in reference_files(out).values() for line in text.splitlines() if line.strip()
    ]
    return sorted(json.loads(line)["id"] for line in lines)


def test_a_rank_that_is_late_leaves_no_row_without_a_reference(train, captioner, golden, tmp_path):
    argv = flags(captioner, golden, tmp_path / "ranks", "--max-steps", 1)
    assert run_ranks(2, argv, tmp_path / "err", slow=1) == [0, 0]
    assert stored_ids(tmp_path / "ranks") == [str(k + 1) for k in range(N_ROWS)]
    (row,), (expected,) = log_of(tmp_path / "ranks"), log_of(train("one", "--max-steps", 1))
    assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def stopped_in_reference(argv, call, number):
    """dpo.py with a signal before the call-th row of the reference pass."""
    real, calls = dpo.caption_logps, []

    def striking(*args):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args)

    dpo.caption_logps = striking
    sys.exit(dpo.main(argv))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_a_stop_in_the_reference_pass_ends_it_and_keeps_what_was_computed(
    train, captioner, golden, tmp_path, referenced, number
):
    argv = flags(captioner, golden, tmp_path / "out", "--max-steps", 1)
    child = stages.fork_server().Process(target=stopped_in_reference, args=(argv, 5, number))
    child.start()
    child.join(60)
    assert child.exitcode in (-number, 128 + number)
    train("out", "--max-steps", 1)
    assert referenced() <= N_ROWS - 4


# ---------------------------------------------------------------- bad rows
@pytest.fixture
def broken(golden, tmp_path):
    """The golden rows with the image of the fourth cut off."""
    shutil.copytree(golden.parent, tmp_path / "broken")
    image = tmp_path / "broken" / "3.png"
    image.write_bytes(image.read_bytes()[:500])
    return tmp_path / "broken" / "golden.jsonl"


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_broken_image_is_reported_and_replaced_and_hangs_no_rank(
    train, tiny_base, captioner, broken, tmp_path, kind
):
    more = ("--max-steps", 2, "--batch", 6, "--micro-batch", 1, "--max-rejected", 9, "--loss", kind)
    argv = flags(captioner, broken, tmp_path / "ranks", *more)
    assert run_ranks(2, argv, tmp_path / "err", timeout=60) == [0, 0]
    told = (tmp_path / "err").read_text()
    assert "3.png" in told and "Traceback" not in told
    assert "1 rows had a broken image" in told  # one row, however often it comes up
    log = log_of(tmp_path / "ranks")
    start = loaded(tiny_base, captioner)
    rows = [0, 1, 2, 4, 4, 5]  # the next row takes its place
    expected = plain_step(loaded(tiny_base, captioner), start, broken, kind, 0.1, 1, numbers=rows)
    assert [log[0][name] for name in ("loss", "nll_loss", "grad_norm")] == pytest.approx(
        [expected[name] for name in ("loss", "nll_loss", "grad_norm")], rel=1e-4
    )


def test_a_broken_image_is_told_with_file_and_line(train, broken, capfd):
    train("out", "--max-steps", 1, data=broken)
    told = [line for line in capfd.readouterr().err.splitlines() if "3.png" in line]
    assert told and all(f"{broken}:4" in line for line in told)


def test_rows_of_broken_images_are_replaced_by_the_next_that_can_be_read(
    train, captioner, golden, tmp_path, monkeypatch
):
    shutil.copytree(golden.parent, tmp_path / "broken")
    for k in range(4):
        (tmp_path / "broken" / f"{k}.png").write_bytes(b"no image")
    calls = []
    drawn_by(monkeypatch, calls)
    more = ("--epochs", 1, "--batch", 1, "--weight-decay", 0)
    log = log_of(train("out", *more, data=tmp_path / "broken" / "golden.jsonl"))
    assert len(log) == N_ROWS and all(row["loss"] > 0 for row in log)
    assert Counter(row for row, _ in calls) == {"5": 5, "6": 1}


def test_a_row_without_a_reference_is_replaced_too(
    train, tiny_base, captioner, broken, golden, monkeypatch
):
    """Its image could not be read in the reference pass, but is there again when its turn comes."""
    real = dpo.reference_logps

    def and_then_repaired(*args):
        found = real(*args)
        shutil.copy(golden.parent / "3.png", broken.parent / "3.png")
        return found

    monkeypatch.setattr(dpo, "reference_logps", and_then_repaired)
    (row,) = log_of(train("out", "--max-steps", 1, "--max-rejected", 9, data=broken))
    model, start = loaded(tiny_base, captioner), loaded(tiny_base, captioner)
    expected = plain_step(
        model, start, broken, "dpo", 0.1, 1, numbers=[0, 1, 2, 4, 4, 5]
    )
    assert row["nll_loss"] == pytest.approx(expected["nll_loss"], rel=1e-4)


def test_too_long_rows_are_counted_and_told(train, captioner, golden, tmp_path, capfd):
    shutil.copytree(golden.parent, tmp_path / "long")
    rows = [json.loads(line) for line in golden.read_text().splitlines()]
    rows[1]["chosen"] = ", ".join(["top-left red circle"] * 40)
    rows[2]["rejected"] = [{"caption": " red" * 300, "finish": "eos"}]
    rows[3]["chosen"] = ""
    data = stages.write_rows(tmp_path / "long" / "golden.jsonl", rows)
    out = train("out", "--max-steps", 1, "--max-rejected", 9, "--loss", "kto", data=data)
    told = capfd.readouterr().err
    assert re.search("4 golden rows, 1 bad .* 1 too long", told) and f"{data}:4" in told
    assert str(captioner) in told and "will need about" in told  # what it took over, and the memory
    (row,) = log_of(out)
    assert math.isfinite(row["loss"]) and row["preference_loss"] == pytest.approx(0.5, abs=1e-4)


# ---------------------------------------------------------------- mistakes
def told_in_one_line(capfd, argv):
    """dpo.main on a user's mistake -> its one line on stderr."""
    capfd.readouterr()
    assert dpo.main(argv) == 1
    out, err = capfd.readouterr()
    (line,) = (
        line for line in err.splitlines() if line.startswith("dpo.py: ") and "left out" not in line
    )
    assert out == "" and "Traceback" not in err
    return line


def test_files_that_are_not_there_or_not_usable_are_one_line(capfd, captioner, golden, tmp_path):
    def told(init=captioner, data=golden, *more):
        return told_in_one_line(capfd, flags(init, data, tmp_path / "out", *more))

    assert str(tmp_path / "no.jsonl") in told(data=tmp_path / "no.jsonl")
    assert str(tmp_path) in told(data=tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    assert str(tmp_path / "empty.jsonl") in told(data=tmp_path / "empty.jsonl")
    bad = stages.write_rows(tmp_path / "bad.jsonl", [{"image": "0.png", "caption": "red"}])
    assert f"{bad}:1" in told(data=bad)
    shutil.copy(golden.parent / "0.png", tmp_path)
    long = stages.write_rows(tmp_path / "long.jsonl", [golden_row(chosen="red " * 500)])
    assert str(long) in told(data=long)
    assert "no adapters.json" in told(init=tmp_path / "nowhere")
    assert str(tmp_path / "nobase") in told(captioner, golden, "--base", tmp_path / "nobase")


def test_folders_that_are_no_captioner_of_this_base_are_one_line(
    capfd, tiny_base, captioner, golden, tmp_path
):
    other = write_tiny_base(tmp_path / "other", seed=1)
    assert "another base" in told_in_one_line(
        capfd, flags(captioner, golden, tmp_path / "out", "--base", other)
    )
    model = loaded(tiny_base, captioner)
    adapters.attach(model, "qa", ("language",), below="caption")
    adapters.save(model, tmp_path / "qa", "qa", stage="qa", **adapters.lineage(captioner))
    assert str(tmp_path / "qa") in told_in_one_line(
        capfd, flags(tmp_path / "qa", golden, tmp_path / "out")
    )


def test_a_captioner_without_adapters_is_refused(capfd, tiny_base, golden, tmp_path):
    prompt_only = write_captioner(tiny_base, tmp_path / "prompt", where=())
    assert str(prompt_only) in told_in_one_line(
        capfd, flags(prompt_only, golden, tmp_path / "out", "--max-steps", 1)
    )


def test_another_run_in_the_folder_is_refused_by_name(train, capfd, captioner, golden, tmp_path):
    train("out", "--max-steps", 1)
    for flag, value in (
        ("beta", 0.2),
        ("loss", "ipo"),
        ("ce", 0),
        ("max-rejected", 2),
        ("lr", 3),
    ):
        more = ("--max-steps", 1, f"--{flag}", value)
        line = told_in_one_line(capfd, flags(captioner, golden, tmp_path / "out", *more))
        assert flag.replace("-", "_") in line or flag in line
    assert log_of(tmp_path / "out")[-1]["step"] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        ("--beta", 0),
        ("--beta", -1),
        ("--beta", "nan"),
        ("--ce", -1),
        ("--ce", "nan"),
        ("--max-rejected", 0),
        ("--watch", -1),
        ("--loss", "simpo"),
        ("--loss", "none", "--ce", 0),
        ("--batch", 0),
        ("--holdout", 1),
        ("--epochs", 0),
        ("--epochs", "inf"),
        ("--lr", "nan"),
        ("--weight-decay", "nan"),
        ("--unknown", 1),
    ],
    ids=lambda wrong: " ".join(map(str, wrong)),
)
def test_wrong_flags_are_refused_by_argparse(capfd, captioner, golden, tmp_path, wrong):
    with pytest.raises(SystemExit) as stop:
        dpo.main(flags(captioner, golden, tmp_path / "out", "--max-steps", 1, *wrong))
    err = capfd.readouterr().err
    assert (
        stop.value.code == 2
        and wrong[0] in err.splitlines()[-1]
        and not (tmp_path / "out").exists()
    )


def test_the_default_command_follows_the_previous_stages(monkeypatch):
    args = dpo.parse_args([])
    expected = {
        "init": Path("out/sft"),
        "data": Path("out/golden/golden.jsonl"),
        "out": Path("out/dpo"),
        "loss": "dpo",
        "max_rejected": 1,
        "ce": 1.0,
    }
    assert {key: getattr(args, key) for key in expected} == expected and 0 < args.beta <= 0.1
