"""jobs.py and workers.py: kills, locks, divisions that change, disks that fill up."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
from stages import Full, read_rows

from plumbing import inputs, jobs, outputs, workers
from plumbing.errors import InputError
from plumbing.workers import Division

CODE = Path(jobs.__file__).parent.parent
FORK = multiprocessing.get_context("fork")


def photos(folder, n):
    """n files, of which each seventh is to be an error."""
    folder.mkdir()
    for k in range(n):
        (folder / f"{k:03d}.png").write_bytes(b"image %d" % k)
    return list(inputs.find([str(folder)]))


def row_of(item):
    number = int(item.name[:3])
    if number % 7 == 6:
        return {"error": f"{item.image}: broken (at byte {number})"}
    return {"caption": f"caption of {item.name}", "finish": "eos", "tokens": number}


def work(out, items, division, until=None, pause=0.0, **how):
    """Do a worker's share, or some of it -> the ids done now."""
    with jobs.Job(out, division, **how) as job:
        todo = job.todo(items)
        for item in todo[:until]:
            job.write(item, row_of(item))
            time.sleep(pause)
        if until is None:
            job.finish()
    return [item.id for item in todo[:until]]


def all_workers(shards, world=1):
    return [Division(k, shards, rank, world) for k in range(shards) for rank in range(world)]


def merged(out):
    outputs.merge(out)
    return read_rows(out / "captions.jsonl")


def started(target, *args, **how):
    process = FORK.Process(target=target, args=args, kwargs=how)
    process.start()
    return process


def check_whole(out, items, kind):
    """Every input exactly once, in the result and in the files."""
    rows = merged(out)
    assert [row["id"] for row in rows] == sorted(item.id for item in items)
    wanted = {item.id: row_of(item) for item in items}
    for row in rows:
        assert row_of_result(row) == wanted[row["id"]]
    captions = {row["id"]: row["caption"] for row in rows if "caption" in row}
    lines = Counter(row["id"] for path in (out / "rows").glob("*.jsonl") for row in rows_in(path))
    assert set(lines.values()) == {1}
    if kind == "txt":
        texts = {path.stem: path.read_text() for path in out.glob("*.txt")}
        assert texts == {Path(id).stem: caption + "\n" for id, caption in captions.items()}
    if kind == "webdataset":
        names = Counter()
        for path in (out / "shards").glob("*.tar"):
            with tarfile.open(path) as tar:
                names.update(tar.getnames())
        stems = [Path(id).stem for id in captions]
        assert names == Counter(
            f"{stem}.{suffix}" for stem in stems for suffix in ("png", "txt", "json")
        )


def row_of_result(row):
    return {key: value for key, value in row.items() if key not in ("id", "image")}


# ---------------------------------------------------------------- divisions
@pytest.mark.parametrize(
    "text", ["", "1", "1/1", "-1/2", "a/b", "2/2", "0/0", "1/2/3", "1.0/2", " 1/2"]
)
def test_a_bad_shard_is_refused(text):
    with pytest.raises(Exception, match="such as 0/16"):
        workers.shard(text)
    assert workers.shard("3/16") == (3, 16)


ARRAY = ("ID", "MIN", "STEP", "COUNT")


@pytest.mark.parametrize(
    "array, shard",
    [
        ((0, 0, 1, 4), (0, 4)),
        ((3, 0, 1, 4), (3, 4)),
        ((4, 1, 1, 4), (3, 4)),
        ((30, 10, 10, 3), (2, 3)),
        ((7, 7, 1, 1), (0, 1)),
        ((7, 3, 1, 2), None),
        ((4, 3, 2, 2), None),
    ],
)
def test_a_division_comes_from_the_flag_the_array_and_torchrun(monkeypatch, array, shard):
    for name in ("RANK", "WORLD_SIZE", *(f"SLURM_ARRAY_TASK_{name}" for name in ARRAY)):
        monkeypatch.delenv(name, raising=False)
    assert Division.from_environment() == Division(0, 1, 0, 1)
    for name, value in zip(ARRAY, array):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    if shard is None:
        with pytest.raises(InputError, match="give --shard"):
            Division.from_environment()
    else:
        assert Division.from_environment() == Division(*shard, 2, 3)
    one = Division.from_environment((1, 5))
    assert (one.worker, one.workers, one.name) == (5, 15, "00005-of-00015")


def test_every_input_has_one_owner():
    for shards, world in ((1, 1), (3, 1), (2, 4)):
        owners = [d for d in all_workers(shards, world) if d.owns("a.png")]
        assert len(owners) == 1


# ---------------------------------------------------------------- settings
def test_the_first_settings_stay(tmp_path):
    first = {"n": 2, "inputs": ["a", "\udcff"], "pair": (1, 2)}
    workers.freeze(tmp_path, first)
    before = (tmp_path / "settings.json").read_bytes()
    workers.freeze(tmp_path, first)
    for other, message in (
        ({**first, "n": 3}, r"another n \(2, now 3\)"),
        ({**first, "new": 1}, r"another new \(None, now 1\)"),
        ({"inputs": first["inputs"], "pair": [1, 2]}, r"another n \(2, now None\)"),
    ):
        with pytest.raises(InputError, match=message):
            workers.freeze(tmp_path, other)
    assert (tmp_path / "settings.json").read_bytes() == before
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        workers.freeze(tmp_path, first)


def freeze_quietly(out, value):
    try:
        workers.freeze(out, {"seed": value})
    except InputError:
        sys.exit(3)


def test_of_workers_that_start_at_once_with_other_settings_one_wins(tmp_path):
    starts = [started(freeze_quietly, tmp_path / "out", k) for k in range(8)]
    for process in starts:
        process.join()
    assert sorted(process.exitcode for process in starts) == [0] + [3] * 7
    winner = [process.exitcode for process in starts].index(0)
    assert json.loads((tmp_path / "out/settings.json").read_text()) == {"seed": winner}


# ---------------------------------------------------------------- locks
def hold(out, division, path):
    with jobs.Job(out, division):
        path.touch()
        time.sleep(60)


@pytest.fixture
def running(tmp_path):
    """Another process that is worker 0 of 2."""
    out, ready = tmp_path / "out", tmp_path / "ready"
    process = started(hold, out, Division(0, 2), ready)
    while not ready.exists():
        time.sleep(0.01)
    yield out, process
    process.kill()
    process.join()


def test_a_worker_that_runs_is_refused_and_so_is_another_division(running):
    out, process = running
    with (
        pytest.raises(
            InputError,
            match=r"00000-of-00002\.lock: is already being written by another process \(process \d+ on ",
        ),
        jobs.Job(out, Division(0, 2)),
    ):
        pass
    with (
        pytest.raises(InputError, match="one of 2 workers still runs, and this would be one of 3"),
        jobs.Job(out, Division(0, 3)),
    ):
        pass
    with jobs.Job(out, Division(1, 2)):
        assert jobs.status(out)["running"] == ["00000-of-00002", "00001-of-00002"]
    process.kill()
    process.join()
    with jobs.Job(out, Division(0, 3)):
        assert jobs.status(out)["running"] == ["00000-of-00003"]


def test_a_process_that_outlives_its_worker_does_not_keep_the_lock(tmp_path):
    """As a loader's does, for seconds, after the worker was killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        with jobs.Job(tmp_path, Division()):
            child = os.fork()
            if not child:
                time.sleep(30)
                os._exit(0)
            os.write(writing, b"%d" % child)
            time.sleep(30)
    child = int(os.read(reading, 20))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        with jobs.Job(tmp_path, Division()):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def enter(out, division, barrier):
    barrier.wait()
    try:
        with jobs.Job(out, division):
            time.sleep(0.5)
    except InputError:
        os._exit(3)
    os._exit(0)


def test_of_divisions_that_start_at_once_at_most_one_runs(tmp_path):
    for attempt in range(3):
        barrier = FORK.Barrier(4)
        divisions = [Division(0, 1), Division(0, 2), Division(1, 2), Division(0, 3)]
        processes = [started(enter, tmp_path / str(attempt), one, barrier) for one in divisions]
        for process in processes:
            process.join()
        entered = {
            one.workers for one, process in zip(divisions, processes) if process.exitcode == 0
        }
        assert len(entered) <= 1
    work(tmp_path / "0", [], Division())


# ---------------------------------------------------------------- kills
def rows_in(path):
    """The rows of whole lines."""
    return [row for _, _, row in outputs.rows_of(path)]


def last_files_gone(out, kind):
    """What a kill between a row and its file leaves, in every file of rows at once."""
    for path in (out / "rows").glob("*.jsonl"):
        rows = rows_in(path)
        if kind == "txt" and rows and "caption" in rows[-1]:
            (out / f"{rows[-1]['target']}.txt").unlink()


@pytest.mark.parametrize("kind", ["jsonl", "txt", "webdataset"])
def test_any_number_of_workers_resumes_what_others_left(tmp_path, kind):
    """Stopped at every few rows, with another division each time, torn lines and lost files."""
    items, out, rng = photos(tmp_path / "in", 80), tmp_path / "out", random.Random(0)
    seen = []
    for shards, world, until in ((1, 1, 5), (3, 1, 4), (2, 2, 6), (1, 1, 0), (5, 1, 3), (2, 2, 2)):
        for division in rng.sample(all_workers(shards, world), shards * world):
            seen += work(out, items, division, until, write=kind, shard_size=4)
        last_files_gone(out, kind)
        for path in (out / "rows").glob("*.jsonl"):
            with path.open("a") as file:
                file.write('{"id": "' * rng.randrange(2))
        for path in (out / "shards").glob("*.json"):
            if rng.random() < 0.3 and not path.with_name(next_name(path)).exists():
                path.unlink()  # killed between a tar and its sidecar
    for division in all_workers(2, 1):
        seen += work(out, items, division, write=kind, shard_size=4)
    assert sorted(seen) == sorted(item.id for item in items)
    check_whole(out, items, kind)
    assert work(out, items, Division(), write=kind) == []


def next_name(path):
    stem, number = path.stem.rsplit("-", 1)
    return f"{stem}-{int(number) + 1:05d}.json"


@pytest.mark.parametrize("kind", ["txt", "webdataset"])
def test_kills_at_random_moments(tmp_path, kind):
    items, out, rng = photos(tmp_path / "in", 120), tmp_path / "out", random.Random(1)
    for shards in (2, 1, 3, 2):
        how = {"write": kind, "shard_size": 5, "pause": 0.002}
        running = [started(work, out, items, one, **how) for one in all_workers(shards)]
        time.sleep(rng.uniform(0.03, 0.15))
        for process in running:
            process.kill()
            process.join()
    for division in all_workers(3):
        work(out, items, division, write=kind, shard_size=5)
    check_whole(out, items, kind)
    assert not jobs.status(out, [item.id for item in items])["missing"]


def test_a_share_that_is_whole_keeps_what_its_owner_changes(tmp_path):
    items, out = photos(tmp_path / "in", 3), tmp_path / "out"
    work(out, items, Division(), write="txt")
    for path in out.glob("*.txt"):
        path.write_text("by hand\n")
    for division in [Division(), *all_workers(2)]:
        assert work(out, items, division, write="txt") == []
    assert {path.read_text() for path in out.glob("*.txt")} == {"by hand\n"}


def test_a_line_that_a_power_failure_left_is_done_again(tmp_path):
    items, out = photos(tmp_path / "in", 3), tmp_path / "out"
    work(out, items, Division(), write="txt")
    path = out / "rows/00000-of-00001.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * 50 + b"\n" + lines[2])
    assert work(out, items, Division(), write="txt") == [items[1].id]
    assert outputs.merge(out) == (3, 0)


def test_errors_are_tried_again_only_when_that_is_asked_for(tmp_path):
    items, out = photos(tmp_path / "in", 14), tmp_path / "out"
    work(out, items, Division())
    assert work(out, items, Division()) == []
    again = work(out, items, Division(), retry_errors=True)
    assert [Path(id).name for id in again] == ["006.png", "013.png"]
    assert outputs.merge(out) == (12, 2) and len(merged(out)) == 14


def test_tars_continue_behind_a_last_short_one(tmp_path):
    items, out = photos(tmp_path / "in", 20), tmp_path / "out"
    how = {"write": "webdataset", "shard_size": 4}
    work(out, items[:6], Division(), **how)
    work(out, items, Division(), **how)
    counts = [
        json.loads(path.read_text())["captions"] for path in sorted(out.glob("shards/*.json"))
    ]
    assert counts == [4, 2, 4, 4, 4] and sum(counts) == outputs.merge(out)[0]
    check_whole(out, items, "webdataset")


# ---------------------------------------------------------------- status
def test_a_status_lists_what_is_missing_and_what_to_run(tmp_path):
    items, out = photos(tmp_path / "in", 28), tmp_path / "out"
    ids = [item.id for item in items]
    report = jobs.status(out, ids)
    assert report["missing"] == ids and not report["running"]
    assert "next: the same command again" in report["lines"][-1]
    work(out, items, Division(0, 3))
    work(out, items, Division(1, 3), until=2)
    report = jobs.status(out, ids)
    assert report["whole"] == ["00000-of-00003"]
    assert report["unfinished"] == ["00001-of-00003", "00002-of-00003"]
    done = report["captions"] + sum(report["errors"].values())
    assert done + len(report["missing"]) == report["inputs"] == 28
    work(out, items, Division())
    report = jobs.status(out, ids)
    assert (report["captions"], report["errors"], report["missing"]) == (24, {"broken": 4}, [])
    assert report["whole"] == ["00000-of-00001"] and "--merge" in report["lines"][-1]
    manifest = json.loads((out / "rows/00000-of-00001.json").read_text())
    assert manifest == {
        "worker": 0,
        "workers": 1,
        "inputs": 28,
        "captions": 24,
        "errors": {"broken": 4},
        "whole": True,
    }


# ---------------------------------------------------------------- disks
@pytest.mark.parametrize("room", [0, 10])
def test_a_full_disk_is_one_line_and_no_row_follows_a_part_of_one(tmp_path, room):
    items, out = photos(tmp_path / "in", 5), tmp_path / "out"
    with jobs.Job(out, Division(), write="txt") as job:
        job.todo(items)
        job.write(items[0], row_of(items[0]))
        file, job.appender.file = job.appender.file, Full(job.appender.file, room)
        with pytest.raises(InputError, match="make room and run the same command again"):
            job.write(items[1], row_of(items[1]))
        job.appender.file = file
        with pytest.raises(ValueError, match="closed file"):
            job.write(items[2], row_of(items[2]))
    assert work(out, items, Division(), write="txt") == [item.id for item in items[1:]]
    check_whole(out, items, "txt")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["jsonl", "txt", "webdataset"])
def test_a_disk_that_fills_up_and_one_that_becomes_read_only(tmp_path, small_disk, kind):
    items, out = photos(tmp_path / "in", 60), small_disk / "out"
    for path in (tmp_path / "in").iterdir():
        path.write_bytes(path.name.encode() * 400)
    ballast = small_disk / "ballast"
    how = {"write": kind, "shard_size": 4}
    work(out, items, Division(), until=3, **how)
    ballast.write_bytes(b"x" * (int(shutil.disk_usage(small_disk).free) - 2 * 4096))
    with pytest.raises(InputError, match="make room and run the same command again") as error:
        work(out, items, Division(), **how)
    assert "\n" not in str(error.value)
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match=r"Read-only file system.*run the same command again"):
        work(out, items, Division(), **how)
    with pytest.raises(InputError, match="Read-only file system"):
        outputs.merge(out)
    with pytest.raises(InputError, match="Read-only file system"):
        workers.freeze(out, {})
    assert jobs.status(out)["captions"]
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    work(out, items, Division(), **how)
    check_whole(out, items, kind)
