"""What the stages share: rows and their order, the sharded optimizer, checkpoints, log, signals, the loop itself."""

import argparse
import copy
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import stages
import torch
from PIL import Image

import adapters
import plumbing.data
import plumbing.train
from model import Config, QwenVL
from plumbing.data import MicroBatches
from plumbing.errors import InputError
from plumbing.train import Ranks, ShardedAdamW, Stop

ALONE = Ranks(0, 1, torch.device("cpu"))


def ranks_of(world):
    return [Ranks(rank, world, torch.device("cpu")) for rank in range(world)]


# ---------------------------------------------------------------- arguments
def parser():
    p = plumbing.train.stage_parser(
        "A stage.", out="out/x", data="x.jsonl", rows="rows", lr=1e-3, batch=8, epochs=1.0
    )
    p.add_argument("--init", type=Path)
    return p


@pytest.mark.parametrize(
    "argv, expected_word",
    [
        ("--batch 0", "--batch"),
        ("--batch 2.5", "--batch"),
        ("--micro-batch -1", "--micro-batch"),
        ("--lr nan", "--lr"),
        ("--lr 0", "--lr"),
        ("--epochs inf", "--epochs"),
        ("--max-steps 0", "--max-steps"),
        ("--save-every 0", "--save-e"),
        ("--grad-clip 0", "--grad-clip"),
        ("--holdout 1", "--holdout"),
        ("--holdout nan", "--holdout"),
        ("--warmup -1", "--warmup"),
        ("--workers -1", "--workers"),
        ("--weight-decay -1", "--weight-decay"),
        ("--dtype int8", "--dtype"),
        ("--colour", "--colour"),
    ],
)
def test_nonsense_is_refused_in_a_line(argv, expected_word, capsys):
    with pytest.raises(SystemExit) as stop:
        plumbing.train.checked(parser(), argv.split())
    message = capsys.readouterr().err.split("error: ")[1]
    assert stop.value.code == 2 and message.count("\n") == 1 and expected_word in message


def test_a_mistake_is_one_line_of_the_first_rank_and_a_bug_is_not_hidden(capsys, monkeypatch):
    def mistaken(ranks):
        raise InputError("x.jsonl: is not there")

    assert plumbing.train.run_stage("sft.py", "cpu", mistaken) == 1
    assert capsys.readouterr().err == "sft.py: x.jsonl: is not there\n"
    monkeypatch.setattr(plumbing.train, "start_ranks", lambda device, patient: ranks_of(2)[1])
    monkeypatch.setattr(Ranks, "close", lambda self: None)
    assert plumbing.train.run_stage("sft.py", "cpu", mistaken) == 1
    assert capsys.readouterr().err == ""
    assert (
        plumbing.train.run_stage("golden.py", "cpu", mistaken, patient=True) == 1
    )  # such ranks make mistakes of their own
    assert capsys.readouterr().err == "golden.py: x.jsonl: is not there\n"
    with pytest.raises(ZeroDivisionError):
        plumbing.train.run_stage("sft.py", "cpu", lambda ranks: 1 / 0)


def test_a_device_that_is_not_there_is_one_line(capsys):
    assert plumbing.train.run_stage("sft.py", "cuda:99", lambda ranks: 0) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--device cuda:99" in err


# ---------------------------------------------------------------- rows on disk
@pytest.fixture
def images(tmp_path):
    for name in ("a.png", "b.jpg", "c.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def test_jsonl_imagefolder_and_texts_beside_read_the_same(images):
    captions = {"a.png": "red, a  square", "b.jpg": "rot,\nein Qüadrat", "c.png": " 赤い "}
    expected = [
        {"image": images / name, "caption": " ".join(text.split())}
        for name, text in captions.items()
    ]

    def read(data):
        rows, bad = plumbing.data.read_captions(data)
        assert bad == []
        return [{key: row[key] for key in ("image", "caption")} for row in rows]

    rows = stages.write_rows(
        images / "rows.jsonl", [{"image": n, "caption": t} for n, t in captions.items()]
    )
    assert read(rows) == expected
    odd = b"\xef\xbb\xbf" + rows.read_bytes().replace(b"\n", b"\r\n\r\n")  # BOM, CRLF, empty lines
    (images / "odd.jsonl").write_bytes(odd.removesuffix(b"\r\n\r\n"))
    assert read(images / "odd.jsonl") == expected
    for key in ("text", "caption"):
        stages.write_rows(
            images / "metadata.jsonl", [{"file_name": n, key: t} for n, t in captions.items()]
        )
        assert read(images) == read(images / "metadata.jsonl") == expected
    (images / "metadata.jsonl").unlink()
    for name, text in captions.items():
        (images / name).with_suffix(".txt").write_text(text, "utf-8")
    assert read(images) == expected
    (images / "deep").mkdir()
    shutil.move(images / "a.png", images / "deep/a.png")
    shutil.move(images / "a.txt", images / "deep/a.txt")
    assert images / "deep/a.png" in [row["image"] for row in read(images)]


def test_bad_rows_are_told_with_file_and_line(images, capsys):
    good = {"image": "a.png", "caption": "red"}
    path = stages.write_rows(
        images / "rows.jsonl",
        [
            good,
            "{",
            {"image": "a.png"},
            "",
            {"image": "a.png", "caption": " \n"},
            {"image": "none.png", "caption": "x"},
            {"caption": "x"},
            "[1, 2]",
            {"image": "a.png", "caption": 3},
            {"image": 3, "caption": "x"},
            "null",
            {"image": "", "caption": "x"},
            {"image": "a\0b.png", "caption": "x"},
            '{"image": "a.png", "caption": "\ufeff',
            {**good, "caption": "blue"},
        ],
    )
    path.write_bytes(path.read_bytes() + b'{"image": "a.png", "caption": "\xff"}\n')
    rows, bad = plumbing.data.read_captions(path)
    assert [row["caption"] for row in rows] == ["red", "blue"]
    expected = {
        2: "JSON",
        3: "no caption",
        5: "no caption",
        6: "none.png is not there",
        7: "JSON",
        8: "JSON",
        9: "no caption",
        10: "JSON",
        11: "JSON",
        12: "not there",
        13: "not there",
        14: "JSON",
        16: "JSON",
    }
    assert [where for where, _ in bad] == [f"{path}:{line}" for line in expected]
    assert all(word in reason for (_, reason), word in zip(bad, expected.values()))
    plumbing.data.tell_bad("sft.py", bad)
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0].startswith(f"sft.py: left out: {path}:2: ")
        and lines[-1] == "sft.py: left out: 3 more"
    )
    assert len(lines) == 11


@pytest.mark.parametrize(
    "row",
    ["[" * 100_000, {"image": "x" * 300 + ".png", "caption": "x"}, '{"a":' * 50_000],
    ids=["nested", "long name", "nested objects"],
)
def test_no_row_ends_a_run(images, row):
    """Python's JSON reader and Path.is_file raise their own errors for these."""
    path = stages.write_rows(images / "rows.jsonl", [{"image": "a.png", "caption": "red"}, row])
    rows, bad = plumbing.data.read_captions(path)
    assert len(rows) == 1 and [where for where, _ in bad] == [f"{path}:2"]


def test_data_without_a_usable_row_is_an_error(images):
    with pytest.raises(InputError, match="no usable"):
        plumbing.data.read_captions(images)  # no text beside any of the three
    path = stages.write_rows(images / "rows.jsonl", ["{", {"image": "a.png", "caption": ""}])
    with pytest.raises(InputError, match=r"no usable .*; the first of 2 bad .*rows\.jsonl:1: "):
        plumbing.data.read_captions(path)
    with pytest.raises(InputError, match="cannot be read") as error:
        plumbing.data.read_captions(images / "nowhere.jsonl")
    assert "\n" not in str(error.value)


def test_the_held_out_part_is_whole_images(images):
    rows = [{"image": images / f"{k % 10}.png", "n": k} for k in range(40)]
    train, held = plumbing.data.split(rows, 0.2, seed=0)
    theirs = {row["image"] for row in held}
    assert len(theirs) == 2 and len(held) == 8 and not theirs & {row["image"] for row in train}
    assert sorted(row["n"] for row in train + held) == list(range(40)) and [
        r["n"] for r in train
    ] == sorted(row["n"] for row in train)
    assert plumbing.data.split(rows, 0.2, seed=0) == (train, held)
    assert plumbing.data.split(list(reversed(rows)), 0.2, seed=0)[1] == list(
        reversed(held)
    )  # whatever their order
    assert any(plumbing.data.split(rows, 0.2, seed)[1] != held for seed in range(1, 5))
    assert plumbing.data.split(rows, 0, seed=0) == (rows, [])
    assert (
        len({row["image"] for row in plumbing.data.split(rows, 1e-9, seed=0)[1]}) == 1
    )  # asked for, so at least one
    assert plumbing.data.split(rows[:1], 0.5, seed=0) == (rows[:1], [])  # but training comes first
    assert {row["image"] for row in plumbing.data.split(rows, 0.999, seed=0)[0]} != set()


# ---------------------------------------------------------------- batches
@pytest.mark.parametrize("n_rows, batch", [(10, 4), (3, 8), (1, 2), (7, 7)])
def test_every_epoch_takes_every_row_once_in_an_order_of_its_own(n_rows, batch):
    steps = [plumbing.data.step_rows(n_rows, batch, step, seed=0) for step in range(5 * n_rows)]
    assert all(len(rows) == batch for rows in steps)
    taken = [row for rows in steps for row in rows]
    assert [epoch for _, epoch in taken] == [k // n_rows for k in range(len(taken))]
    orders = [tuple(n for n, _ in taken[k : k + n_rows]) for k in range(0, len(taken), n_rows)]
    assert all(sorted(order) == list(range(n_rows)) for order in orders)
    assert n_rows < 7 or len(set(orders)) > 3
    random.seed(1)  # and no other state matters
    assert plumbing.data.step_rows(n_rows, batch, 3, seed=0) == steps[3]
    assert n_rows < 7 or plumbing.data.step_rows(n_rows, batch, 0, seed=1) != steps[0]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("batch, micro_batch", [(8, 1), (8, 8), (7, 2), (1, 1), (5, 4)])
def test_ranks_share_a_step_without_gap_or_overlap(world, batch, micro_batch):
    parts = [MicroBatches(11, batch, micro_batch, 0, 4, 0, ranks) for ranks in ranks_of(world)]
    (per_step,) = {
        part.per_step for part in parts
    }  # the same on all ranks, or they would wait for each other
    lists = [list(part) for part in parts]
    assert all(len(part) == len(micro) == 4 * per_step for part, micro in zip(parts, lists))
    assert all(len(micro) <= micro_batch for rank in lists for micro in rank)
    for step in range(4):
        found = [
            row
            for rank in lists
            for micro in rank[step * per_step : (step + 1) * per_step]
            for row in micro
        ]
        assert sorted(found) == sorted(plumbing.data.step_rows(11, batch, step, 0))
    later = MicroBatches(11, batch, micro_batch, 2, 4, 0, ranks_of(world)[-1])
    assert list(later) == lists[-1][2 * per_step :]  # a resumed run goes on at the same row


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_made_takes_the_place_of_its_row(workers):
    def make(row, epoch):
        if row["x"] == "bad":
            raise InputError("bad.png: damaged")
        return row["x"], epoch

    batches = [[(0, 0), (2, 0)], [], [(1, 0)], [(2, 1)]]
    found = list(
        plumbing.data.loader(
            [{"x": x, "where": "rows:1"} for x in ("a", "bad", "c")], make, batches, workers
        )
    )
    assert [len(part) for part in found] == [2, 0, 1, 1]
    assert found[0] == [("a", 0), ("c", 0)] and found[3] == [("c", 1)]
    assert isinstance(found[2][0], InputError) and "bad.png" in str(found[2][0])


def test_workers_start_whatever_python_s_default_is():
    """It is forkserver from 3.14 on, and spawn on a Mac: they would have to pickle the stages' inner functions."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        assert list(
            plumbing.data.loader([{"x": 5}], lambda row, epoch: row["x"], [[(0, 0)]], 1)
        ) == [[5]]
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_collate_pads_on_the_right_and_aims_at_what_follows_the_prompt(tiny_model):
    prompts, targets = (
        [tiny_model.image_prompt(1, text) for text in ("", " red")],
        [[7, 8], [9, 10, 11, 12]],
    )
    rows = [
        {
            "ids": prompt + target,
            "n_prompt": len(prompt),
            "views": torch.full((1, 3, 28, 28), float(k)),
        }
        for k, (prompt, target) in enumerate(zip(prompts, targets))
    ]
    batch = plumbing.data.collate(rows, tiny_model, "cpu")
    assert batch["targets"].tolist() == [7, 8, 9, 10, 11, 12]
    assert batch["mask"].sum(1).tolist() == [len(row["ids"]) for row in rows]
    assert batch["images"].shape == (2, 3, 28, 28) and batch["images"][1, 0, 0, 0] == 1
    for b, row in enumerate(rows):
        n, whole = row["n_prompt"], len(row["ids"])
        assert batch["ids"][b, :whole].tolist() == row["ids"]
        assert batch["positions"][b].nonzero().flatten().tolist() == list(range(n - 1, whole - 1))
    blank = plumbing.data.collate([], tiny_model, "cpu")
    assert tiny_model(**blank).shape == (1,)  # something to run, where a rank has no row left


# ---------------------------------------------------------------- optimizer and learning rate
def test_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [plumbing.train.cosine(step, 100, 1e-3, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([1e-4 * k for k in range(1, 11)])
    assert max(rates) == pytest.approx(1e-3) and rates[10] == pytest.approx(1e-3)
    assert rates[55] == pytest.approx(5.5e-4) and rates[100] == pytest.approx(1e-4)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert plumbing.train.cosine(0, 5, 1e-3, 0) == pytest.approx(1e-3)
    assert plumbing.train.cosine(0, 3, 1e-3, 20) == pytest.approx(5e-5)  # shorter than its warm-up


def parameters(seed=0):
    torch.manual_seed(seed)
    shapes = {
        "a.weight": (8, 4),
        "a.bias": (8,),
        "b.weight": (4, 8),
        "b.bias": (4,),
        "c.weight": (2, 2),
    }
    return {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def give_gradients(trained, seed):
    torch.manual_seed(seed)
    for parameter in trained.values():
        parameter.grad = torch.randn(parameter.shape)


def test_one_rank_is_plain_adamw_without_decay_of_vectors():
    trained, plain = parameters(), parameters()
    groups = [
        {
            "params": [p for p in plain.values() if (p.ndim > 1) == decays],
            "weight_decay": 0.1 * decays,
        }
        for decays in (True, False)
    ]
    optimizer, expected = (
        ShardedAdamW(trained, 0.1, ALONE),
        torch.optim.AdamW(groups, betas=(0.9, 0.95)),
    )
    for step in range(3):
        give_gradients(trained, step)
        give_gradients(plain, step)
        for group in expected.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        expected.step()
        optimizer.step(1e-2 / (step + 1))
    assert all(torch.equal(trained[name], plain[name]) for name in plain)


def test_state_is_spread_over_the_ranks_and_may_be_taken_over_by_another_number(monkeypatch):
    monkeypatch.setattr(plumbing.train.dist, "broadcast", lambda tensor, src: None)
    trained = parameters()
    parts = [ShardedAdamW({**trained}, 0.1, ranks) for ranks in ranks_of(2)]
    assert sorted(parts[0].own + parts[1].own) == sorted(trained)
    loads = [sum(trained[name].numel() for name in part.own) for part in parts]
    assert max(loads) <= 1.3 * min(loads)
    for step in range(2):
        give_gradients(trained, step)
        for part in parts:
            part.step(1e-2)
    moments = copy.deepcopy(parts[0].state() | parts[1].state())
    assert moments.keys() == trained.keys()
    alone = ShardedAdamW(
        {name: torch.nn.Parameter(p.detach().clone()) for name, p in trained.items()}, 0.1, ALONE
    )
    alone.load(moments)
    for optimizer in (alone, *parts):
        give_gradients(optimizer.trained, 5)
        optimizer.step(1e-2)
    assert all(torch.equal(alone.trained[name], trained[name]) for name in trained)
    many = [
        ShardedAdamW(parameters(), 0.1, ranks) for ranks in ranks_of(7)
    ]  # more ranks than parameters
    assert sorted(name for part in many for name in part.own) == sorted(trained)
    assert many[6].state() == {} and many[6].step(1e-2) is None


# ---------------------------------------------------------------- checkpoints
RUN = {"lr": "0.01", "base": "abc"}


def stepped(seed, steps=1):
    optimizer = ShardedAdamW(parameters(seed), 0.1, ALONE)
    for step in range(steps):
        give_gradients(optimizer.trained, step)
        optimizer.step(1e-2)
    return optimizer


def test_a_checkpoint_gives_back_all_of_it(tmp_path):
    written, read = stepped(0, 3), stepped(1, 1)
    assert plumbing.train.load_checkpoint(tmp_path, RUN, stepped(0)) == 0
    plumbing.train.save_checkpoint(tmp_path, ALONE, 3, RUN, written)
    assert plumbing.train.load_checkpoint(tmp_path, RUN, read) == 3
    for optimizer in (written, read):
        give_gradients(optimizer.trained, 9)
        optimizer.step(1e-2)
    assert all(torch.equal(read.trained[name], written.trained[name]) for name in written.trained)


def test_only_the_newest_whole_checkpoint_counts(tmp_path):
    for step in (1, 10, 9):
        plumbing.train.save_checkpoint(tmp_path, ALONE, step, RUN, stepped(step))
    assert stages.checkpoint_of(tmp_path) == 9  # the others went when it was whole
    torn = tmp_path / "resume/step-00000012.tmp"
    torn.mkdir()
    (torn / "moments-0.pt").write_bytes(b"half")
    assert plumbing.train.load_checkpoint(tmp_path, RUN, stepped(0)) == 9
    shutil.copytree(
        tmp_path / "resume/step-00000009", tmp_path / "resume/step-00000011"
    )  # killed before the tidying
    (tmp_path / "resume/step-00000011/run.json").write_text(json.dumps({"step": 11, "run": RUN}))
    assert plumbing.train.load_checkpoint(tmp_path, RUN, stepped(0)) == 11
    plumbing.train.save_checkpoint(tmp_path, ALONE, 12, RUN, stepped(0))
    assert stages.checkpoint_of(tmp_path) == 12


def test_a_step_may_be_saved_twice(tmp_path):
    """As where a stop comes right behind a checkpoint, or before a resumed run's first step is done."""
    plumbing.train.save_checkpoint(tmp_path, ALONE, 2, RUN, stepped(0, 2))
    plumbing.train.save_checkpoint(tmp_path, ALONE, 2, RUN, stepped(0, 2))
    read = stepped(1)
    assert (
        stages.checkpoint_of(tmp_path) == 2
        and plumbing.train.load_checkpoint(tmp_path, RUN, read) == 2
    )
    assert all(torch.equal(read.trained[name], p) for name, p in stepped(0, 2).trained.items())


@pytest.mark.parametrize("fails_at", range(3))
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, fails_at):
    plumbing.train.save_checkpoint(tmp_path, ALONE, 1, RUN, stepped(0))
    write_whole, calls = plumbing.train.write_whole, []

    def failing(path, write):
        calls.append(path)
        if len(calls) > fails_at:
            path.write_bytes(b"as far as it went")
            raise OSError(28, "No space left on device")
        write_whole(path, write)

    monkeypatch.setattr(plumbing.train, "write_whole", failing)
    with pytest.raises(OSError):
        plumbing.train.save_checkpoint(tmp_path, ALONE, 2, RUN, stepped(0, 2))
    monkeypatch.undo()
    read = stepped(1)
    assert plumbing.train.load_checkpoint(tmp_path, RUN, read) == 1
    assert all(torch.equal(read.trained[name], p) for name, p in stepped(0).trained.items())
    plumbing.train.save_checkpoint(tmp_path, ALONE, 2, RUN, stepped(0, 2))
    assert stages.checkpoint_of(tmp_path) == 2


def test_another_run_is_refused_by_the_name_of_what_differs(tmp_path):
    plumbing.train.save_checkpoint(tmp_path, ALONE, 1, RUN, stepped(0))
    for run, expected_word in (
        ({**RUN, "lr": "0.02"}, "another lr"),
        ({**RUN, "new": "1"}, "another new"),
    ):
        with pytest.raises(InputError, match=expected_word) as error:
            plumbing.train.load_checkpoint(tmp_path, run, stepped(0))
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_write_whole_leaves_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    plumbing.train.write_whole(path, lambda p: p.write_text("old"))

    def failing(p):
        p.write_text("ne")
        raise OSError

    with pytest.raises(OSError):
        plumbing.train.write_whole(path, failing)
    assert path.read_text() == "old"
    plumbing.train.write_whole(path, lambda p: p.write_text("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_log_forgets_what_came_after_the_checkpoint(tmp_path):
    log = plumbing.train.Log(tmp_path, 0, ALONE)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / 3})
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')  # torn by a kill
    plumbing.train.Log(tmp_path, 5, ALONE).write({"step": 6, "loss": 0.1})
    assert [row["step"] for row in stages.read_rows(log.path)] == [1, 2, 3, 4, 5, 6]
    plumbing.train.Log(tmp_path, 3, ALONE).write({"step": 4, "loss": 0.2})
    rows = stages.read_rows(log.path)
    assert (
        [row["step"] for row in rows] == [1, 2, 3, 4]
        and rows[3]["loss"] == 0.2
        and rows[0]["loss"] == 1 / 3
    )
    plumbing.train.Log(tmp_path, 1, ranks_of(2)[1]).write({"step": 9})  # only the first rank writes
    assert len(stages.read_rows(log.path)) == 4
    assert plumbing.train.Log(tmp_path, 0, ALONE).path.read_text() == ""


# ---------------------------------------------------------------- signals
@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop(handlers, number):
    stop = Stop()
    assert stop.asked == 0
    os.kill(os.getpid(), number)
    assert stop.asked == number


def test_a_second_interrupt_quits_at_once_and_a_second_sigterm_does_not(handlers, monkeypatch):
    """SIGTERM comes twice where a whole group gets it (timeout, a cluster's scheduler) and torchrun passes it on."""
    codes = []
    monkeypatch.setattr(plumbing.train.os, "_exit", codes.append)
    stop = Stop()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    assert codes == [] and stop.asked == signal.SIGTERM
    stop = Stop()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [128 + signal.SIGINT]


# ---------------------------------------------------------------- the loop, on a model of one linear layer
class Line(torch.nn.Linear):
    """A policy that needs no image: its loss on number x is (w x + b - 1)²."""

    def __init__(self):
        super().__init__(1, 1)
        torch.nn.init.constant_(self.weight, 0.5)
        torch.nn.init.constant_(self.bias, 0.0)


def number_of(row, epoch):
    return row["x"]


def fit_line(
    out, numbers, steps=6, batch=2, validate=dict, ranks=ALONE, make=number_of, loss=None, **more
):
    """plumbing.train.fit on numbers -> code, counts, weight and bias."""
    line = Line()
    rows = [{"x": x, "where": f"rows:{k}"} for k, x in enumerate(numbers, 1)]
    optimizer = ShardedAdamW(dict(line.named_parameters()), 0.0, ranks)
    args = argparse.Namespace(
        **{
            "out": out,
            "max_steps": steps,
            "epochs": 1,
            "batch": batch,
            "micro_batch": 1,
            "seed": 0,
            "workers": 0,
            "grad_clip": 1.0,
            "lr": 0.1,
            "warmup": 2,
            "save_every": 100,
            **more,
        }
    )

    def loss_of(policy, examples):
        x = torch.tensor(examples).view(-1, 1).float()
        value = ((policy(x) - 1) ** 2).sum()
        return (loss(value, examples) if loss else value), {"seen": float(len(examples))}

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code, counts = plumbing.train.fit(
            args, ranks, line, optimizer, rows, make, len, loss_of, validate, RUN
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, counts, [p.item() for p in line.parameters()]


def test_the_loop_logs_sums_over_weights_and_validates_at_checkpoints(tmp_path):
    asked = []
    code, counts, _ = fit_line(
        tmp_path,
        [1.0, 2.0, 3.0],
        batch=3,
        save_every=2,
        steps=5,
        lr=1e-12,
        validate=lambda: asked.append(1) or {"held_out_loss": 7.0},
    )
    rows = stages.steps_of(tmp_path)
    assert code == 0 and len(asked) == 3 and not any(counts.values())
    expected_loss = sum((0.5 * x - 1) ** 2 for x in (1, 2, 3)) / 3
    assert all(
        row["loss"] == pytest.approx(expected_loss) and row["seen"] == 1 for row in rows.values()
    )
    assert [step for step, row in rows.items() if "held_out_loss" in row] == [2, 4, 5]
    expected_norm = math.hypot(
        *(
            2 * sum((0.5 * x - 1) * k for x, k in zip((1, 2, 3), f)) / 3
            for f in ((1, 2, 3), (1, 1, 1))
        )
    )
    assert rows[1]["grad_norm"] == pytest.approx(expected_norm)
    assert rows[1]["learning_rate"] == 0.5e-12 and stages.checkpoint_of(tmp_path) == 5


def test_epochs_count_rows_and_max_steps_overrides_them_upwards_too(tmp_path):
    for epochs, max_steps, expected_steps in ((2.0, None, 4), (0.5, None, 1), (1.0, 7, 7)):
        out = tmp_path / str(expected_steps)
        fit_line(out, [1.0] * 5, batch=3, epochs=epochs, steps=max_steps)
        assert len(stages.steps_of(out)) == expected_steps


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, bad):
    def loss(value, examples):
        return value * bad if calls.pop(0) else value

    calls = [0, 0, 0, 1] + [0] * 8  # one of the second step's two micro-batches
    code, counts, after = fit_line(tmp_path / "a", [1.0, 2.0], steps=2, loss=loss)
    assert code == 0 and counts["skipped"] == 1
    calls = [0, 0, 0, 0]
    lines = fit_line(tmp_path / "b", [1.0, 2.0], steps=2, loss=loss)[2]
    expected = torch.load(tmp_path / "a/resume/step-00000002/trained.pt")
    assert after == [p.item() for p in expected.values()] != lines
    one_step = fit_line(
        tmp_path / "c", [1.0, 2.0], steps=2, loss=lambda v, e: v
    )  # what step 1 alone leaves
    moments = torch.load(tmp_path / "a/resume/step-00000002/moments-0.pt")
    assert all(m["step"] == 1 for m in moments.values()) and one_step[2] == lines
    assert stages.read_rows(tmp_path / "a/log.jsonl")[1]["loss"] is None  # JSON has no NaN


def test_several_steps_in_a_row_that_are_not_finite_stop_the_run(tmp_path):
    def loss(value, examples):
        seen.append(1)
        return value * (
            float("nan") if len(seen) > 4 and len(seen) != 9 else 1.0
        )  # one good step in between

    seen = []
    with pytest.raises(InputError, match=f"{plumbing.train.MAX_SKIPPED} steps on end") as error:
        fit_line(tmp_path, [1.0], steps=50, batch=1, save_every=2, loss=loss)
    message = str(error.value)
    assert "\n" not in message and "resume" in message and "--lr" in message
    assert len(seen) == 9 + plumbing.train.MAX_SKIPPED and f"step {len(seen)}" in message
    assert all(
        torch.isfinite(p).all()
        for p in torch.load(sorted(tmp_path.glob("resume/*/trained.pt"))[0]).values()
    )


def test_rows_that_cannot_be_made_are_told_counted_and_left_out(tmp_path, capsys):
    def make(row, epoch):
        if row["x"] < 0:
            raise InputError(f"{row['x']}.png: damaged")
        return row["x"]

    code, counts, _ = fit_line(tmp_path / "a", [1.0, -2.0, 3.0], batch=3, steps=3, make=make)
    err = capsys.readouterr().err
    assert code == 0 and "left out: " in err and "-2.0.png: damaged" in err
    assert counts["broken"] == 1  # a row, however often it comes up
    assert err.count("-2.0.png: damaged") == 1
    assert all(
        row["seen"] == 1 for row in stages.steps_of(tmp_path / "a").values()
    )  # per row that counted


def test_a_run_that_finds_no_image_any_more_stops(tmp_path):
    """As where a disk is gone: not a single step is made of nothing, weight decay included."""

    def make(row, epoch):
        if epoch > 1:
            raise InputError("x.png: no such image file")
        return row["x"]

    with pytest.raises(InputError, match=f"{plumbing.train.MAX_SKIPPED} steps on end") as error:
        fit_line(tmp_path, [1.0, 2.0], steps=50, make=make, save_every=2)
    assert "\n" not in str(error.value)
    (checkpoint,) = (tmp_path / "resume").iterdir()
    assert {m["step"].item() for m in torch.load(checkpoint / "moments-0.pt").values()} == {2}


def stopped(out, number, at, workers=0, **more):
    """A line whose at-th micro-batch comes with a signal to this process."""

    def loss(value, examples):
        seen.append(1)
        if len(seen) == at:
            os.kill(os.getpid(), number)
        return value

    seen = []
    return fit_line(out, [float(k) for k in range(5)], loss=loss, workers=workers, **more)


@pytest.mark.parametrize("at", [1, 2, 5, 6, 7, 12])
@pytest.mark.parametrize("number, expected_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_at_any_micro_batch_saves_the_last_step_boundary(
    tmp_path, number, expected_code, at
):
    """Two micro-batches a step, a checkpoint every second step: also right after one, and before the first step."""
    code, _, _ = stopped(tmp_path / "a", number, at, save_every=2)
    assert code == expected_code
    assert (
        stages.checkpoint_of(tmp_path / "a")
        == len(stages.steps_of(tmp_path / "a"))
        == (at - 1) // 2
    )
    code, _, after = stopped(tmp_path / "a", number, 0, save_every=2)
    assert (code, after) == (0, stopped(tmp_path / "b", number, 0, save_every=2)[2])
    assert stages.steps_of(tmp_path / "a") == stages.steps_of(tmp_path / "b")


def test_a_stop_while_validating_is_heeded(tmp_path):
    def validate():
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return {"held_out_loss": 1.0}

    sent = []
    code, _, _ = fit_line(tmp_path, [1.0], steps=6, save_every=2, validate=validate)
    assert (
        code == 143 and stages.checkpoint_of(tmp_path) == 2 and len(stages.steps_of(tmp_path)) == 2
    )
    assert (
        fit_line(tmp_path, [1.0], steps=6, save_every=2)[0] == 0
        and len(stages.steps_of(tmp_path)) == 6
    )


def test_a_loader_s_workers_are_out_of_reach_of_their_group_s_signals(tmp_path, handlers):
    """torchrun sends SIGTERM to a rank's whole process group; a worker that died of it would take the rank along."""

    def make(row, epoch):
        return float(os.getpgid(0) == os.getppid() or os.getpgid(0) == group)

    group = os.getpgid(0)
    batches = MicroBatches(4, 2, 2, 0, 2, 0, ALONE)
    found = list(plumbing.data.loader([0] * 4, make, batches, 1))
    assert found == [[0.0, 0.0], [0.0, 0.0]]


# ---------------------------------------------------------------- memory
def test_the_estimate_of_a_full_size_card_is_that_of_the_design():
    with torch.device("meta"):
        model = QwenVL(Config())
    model.to(torch.bfloat16)
    adapters.attach(model, "caption")
    for name in adapters.names_of(model, "caption"):
        assert model.get_parameter(name).dtype == torch.float32
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    six, one = (model.training_bytes(trained, world, 1) / 2**30 for world in (6, 1))
    # 17.99 base, 1.25 adapters, 1.25 gradients, 2.50 moments over the ranks, activations 0.53 + 0.92 + a block
    expected_without_activations = 17.99 + 1.25 + 1.25 + 2.50 / 6
    assert expected_without_activations + 1 < six < 24 and one - six == pytest.approx(
        2.5 * 5 / 6, abs=0.01
    )
    two = model.training_bytes(trained, 6, 2) / 2**30
    assert two - six > 1.45
