"""What crosses from file to file: rows read, split and hashed, whole files, batches, decoding ahead."""

import json
import math
import multiprocessing
import os
import random
import shutil

import pytest
import stages
import torch
from PIL import Image

import plumbing.data
import plumbing.files
from plumbing.data import MicroBatches
from plumbing.errors import InputError
from plumbing.train import Ranks


def ranks_of(world):
    return [Ranks(rank, world, torch.device("cpu")) for rank in range(world)]


# ---------------------------------------------------------------- whole files
def test_a_file_gets_its_name_only_once_it_is_whole(tmp_path):
    path = tmp_path / "file"
    with plumbing.files.whole(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(OSError), plumbing.files.whole(path) as temporary:
        temporary.write_text("ne")
        raise OSError
    assert path.read_text() == "old"
    with plumbing.files.whole(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_json_is_written_whole_in_a_folder_of_its_own_and_without_nan(tmp_path):
    path = tmp_path / "new/folder/figures.json"
    plumbing.files.write_json(path, {"a": math.nan, "b": [math.inf, 1.5], "c": "é"})
    assert json.loads(path.read_text("utf-8")) == {"a": None, "b": [None, 1.5], "c": "é"}
    assert path.read_text().endswith("}\n") and list(path.parent.iterdir()) == [path]


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
    plumbing.data.report_bad("sft.py", bad)
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
        assert batch < world or all(rank[(step + 1) * per_step - 1] for rank in lists)  # DDP averages after the last
    later = MicroBatches(11, batch, micro_batch, 2, 4, 0, ranks_of(world)[-1])
    assert list(later) == lists[-1][2 * per_step :]  # a resumed run goes on at the same row


def made(row, epoch=0):
    if row["x"].startswith("bad"):
        raise InputError(f"{row['x']}.png: damaged")
    return row["x"], epoch


def rows_named(*names):
    return [{"x": name, "where": f"rows:{k}"} for k, name in enumerate(names, 1)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_made_is_replaced_by_the_next_one_that_can(workers):
    rows = rows_named("a", "bad", "bad too", "c", "bad at the end")
    batches = [[(0, 0), (2, 0)], [], [(1, 0)], [(4, 1), (3, 1)]]
    examples = plumbing.data.Examples(rows, made)
    found = list(plumbing.data.loader(examples, workers, batch_sampler=batches))
    assert [[example for example, _ in part] for part in found] == [
        [("a", 0), ("c", 0)], [], [("c", 0)], [("a", 1), ("c", 1)]]
    problems = ["rows:2: bad.png: damaged", "rows:3: bad too.png: damaged", "rows:5: bad at the end.png: damaged"]
    assert [[problems_of for _, problems_of in part] for part in found] == [
        [[], problems[1:2]], [], [problems[:2]], [problems[2:], []]]


def test_where_no_row_can_be_made_there_is_no_example():
    example, problems = plumbing.data.Examples(rows_named("bad", "bad 2"), made)[1, 0]
    assert example is None and [problem.split(":")[1] for problem in problems] == ["2", "1"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_items_are_made_ahead_in_order_and_errors_take_their_places(workers, batch):
    items = rows_named("a", "b", "bad", "c", "d")
    parts = list(plumbing.data.ahead(items, made, workers, batch))
    assert [len(part) for part in parts[:-1]] == [batch] * (len(parts) - 1)
    pairs = [pair for part in parts for pair in part]
    assert [item for item, _ in pairs] == items
    assert [result if isinstance(result, tuple) else str(result) for _, result in pairs] == [
        ("a", 0), ("b", 0), "bad.png: damaged", ("c", 0), ("d", 0)]
    assert list(plumbing.data.ahead([], made, workers, batch)) == []


def process_of(item):
    return os.getpid()


def test_items_are_made_by_other_processes_where_there_are_several_batches():
    def processes(n, workers):
        return {process for part in plumbing.data.ahead(list(range(n)), process_of, workers, 2) for _, process in part}

    assert os.getpid() not in processes(6, 2) and len(processes(6, 2)) == 2
    assert processes(6, 0) == processes(2, 2) == {os.getpid()}  # one batch: nothing to be ahead of


def tensors_of(item):
    return {"views": torch.full((2, 3), float(item)), "ids": [item], "nested": (torch.arange(item), "x")}


@pytest.mark.parametrize("workers", [0, 1])
def test_tensors_arrive_as_they_were_and_take_no_shared_memory(workers, monkeypatch):
    def refused(*_):
        raise AssertionError("a tensor went through shared memory")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", refused)
    parts = plumbing.data.ahead([1, 2, 3], tensors_of, workers)
    for item, [(name, result)] in zip((1, 2, 3), parts, strict=True):
        expected = tensors_of(item)
        assert name == item and result.keys() == expected.keys() and result["ids"] == [item]
        assert torch.equal(result["views"], expected["views"]) and result["nested"][1] == "x"
        assert torch.equal(result["nested"][0], expected["nested"][0])


def test_rows_are_not_tried_for_ever():
    rows = rows_named(*["bad"] * 150, "good")
    examples = plumbing.data.Examples(rows, made)
    example, problems = examples[0, 0]
    assert example is None and len(problems) == plumbing.data.MOST_UNREADABLE
    assert examples[60, 0][0] == ("good", 0)


def test_batched_makes_lists_of_up_to_n():
    assert list(plumbing.data.batched(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(plumbing.data.batched(iter([]), 2)) == []


def test_workers_start_whatever_python_s_default_is():
    """It is forkserver from 3.14 on, and spawn on a Mac: they would have to pickle the stages' inner functions."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        examples = plumbing.data.Examples([{"x": 5}], lambda row, epoch: row["x"])
        assert list(plumbing.data.loader(examples, 1, batch_sampler=[[(0, 0)]])) == [[(5, [])]]
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_collate_pads_on_the_right_and_aims_at_what_follows_the_prompt(tiny_model):
    prompts, targets = (
        [tiny_model.head(1) + tiny_model.request(text) for text in ("", " red")],
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
    batch = plumbing.data.collate(rows, tiny_model.tokenizer.eos_id)
    assert batch["logp_of"].tolist() == [[7, 8, -100, -100], [9, 10, 11, 12]]
    assert batch["mask"].sum(1).tolist() == [len(row["ids"]) for row in rows]
    assert batch["images"].shape == (2, 3, 28, 28) and batch["images"][1, 0, 0, 0] == 1
    for b, row in enumerate(rows):
        n, whole = row["n_prompt"], len(row["ids"])
        assert batch["ids"][b, :whole].tolist() == row["ids"]
        assert batch["positions"][b, : whole - n].tolist() == list(range(n - 1, whole - 1))
    logps = tiny_model(**batch)
    assert logps.shape == (2, 4) and (logps != 0).tolist() == [[True, True, False, False], [True] * 4]
    assert plumbing.data.count_targets(rows) == 6


def test_a_loader_s_workers_are_out_of_reach_of_their_group_s_signals():
    """torchrun sends SIGTERM to a rank's whole process group; a worker that died of it would take the rank along."""

    def make(row, epoch):
        return float(os.getpgid(0) == os.getppid() or os.getpgid(0) == group)

    group = os.getpgid(0)
    batches = MicroBatches(4, 2, 2, 0, 2, 0, ranks_of(1)[0])
    examples = plumbing.data.Examples([0] * 4, make)
    found = list(plumbing.data.loader(examples, 1, batch_sampler=batches))
    assert found == [[(0.0, []), (0.0, [])]] * 2
