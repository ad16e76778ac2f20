"""Data for the training stages, and runs of them: in this process, or as ranks in processes of their own."""

import errno
import gc
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

import plumbing.data
import plumbing.train
from plumbing import shards
from toy_world import world

CODE = Path(plumbing.train.__file__).parent.parent


# ---------------------------------------------------------------- data
def write_rows(path, rows):
    """JSONL; a row that is a string is written as it is."""
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8"
    )
    return path


def write_data(folder, n=10):
    """n scenes with captions.jsonl, a row each, and questions.jsonl, four rows each."""
    captions, questions = [], []
    for k in range(n):
        scene, image = world.make_scene(k), f"{k:05d}.png"
        world.draw(scene).save(folder / image)
        captions.append(
            {"image": image, "caption": ", ".join(fact["text"] for fact in world.facts(scene))}
        )
        questions += [
            {"image": image, "question": world.ask(text), "answer": answer}
            for text, answer, _ in world.questions(scene, 4, random.Random(k))
        ]
    write_rows(folder / "captions.jsonl", captions)
    write_rows(folder / "questions.jsonl", questions)
    return folder


def break_pixels(path):
    """Cut an image file in its pixels: its header is whole, so that only decoding shows it."""
    path.write_bytes(path.read_bytes()[:400])


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


class Full:
    """A file on a disk with room for only `room` more bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.file.write(data[: self.room])  # as the system does, without an error
        self.room -= taken
        return taken

    def close(self):
        self.file.close()


# ---------------------------------------------------------------- runs in this process
def run(stage, *argv):
    """stage.main with these arguments -> its exit code; SIGTERM and SIGINT are ours again afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return stage.main([str(argument) for argument in argv])
    except SystemExit as stop:  # argparse's
        return stop.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def at_micro_batch(count, act):
    """Have `act(arguments of the forward)` done to the count-th micro-batch from now on that is made into tensors.

    Of use with a patch of plumbing.data.collate: mock.patch.object(plumbing.data, "collate", at_micro_batch(3, act)).
    """
    collate, seen = plumbing.data.collate, [0]

    def counting(*args):
        batch = collate(*args)
        seen[0] += 1
        if seen[0] == count:
            act(batch)
        return batch

    return counting


def at_row(what, count, torn, number):
    """A shards.Appender.write that sends a signal to its process at the count-th row of a pass of golden.py: when half
    of the line is on disk, if torn, or all of it."""
    write, seen = shards.Appender.write, [0]

    def striking(self, row):
        mine = self.path.name.startswith(f"{what}-")
        seen[0] += mine
        if mine and seen[0] == count and torn:
            self.file.write(json.dumps(row).encode()[:-20])
        else:
            write(self, row)
        if mine and seen[0] == count:
            os.kill(os.getpid(), number)

    return striking


def kill_me(number):
    return lambda batch: os.kill(os.getpid(), number)


def spoil(batch):
    batch["images"].fill_(float("nan"))


# ---------------------------------------------------------------- ranks in processes of their own
def fork_server():
    """Processes come from one that has torch and the stages imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sft", "qa_adapter", "golden"])
    paths = os.pathsep.join([str(CODE), str(CODE / "tests"), str(CODE / "tests/mend")])
    with mock.patch.dict(os.environ, {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


def rank_main(stage, argv, variables, report, at, cpu):
    """What a rank's process does; at = (rank, micro-batch, signal number or "nan") happens to that rank alone.

    In golden.py's case at = (rank, (pass, row, torn), signal number), see at_row. After `cpu` seconds of its own the
    kernel ends it, as abruptly as kill -9 does, and at the same point however busy the machine is.
    """
    os.environ.update(variables)
    file = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # not our own way of starting, for its children
    if cpu:
        signal.setitimer(signal.ITIMER_PROF, cpu)
    gc.freeze()  # what came with the fork is never garbage: golden.py collects it after each pass
    if at and at[0] == int(variables["RANK"]) and isinstance(at[1], tuple):
        shards.Appender.write = at_row(*at[1], at[2])
    elif at and at[0] == int(variables["RANK"]):
        plumbing.data.collate = at_micro_batch(at[1], spoil if at[2] == "nan" else kill_me(at[2]))
    sys.exit(importlib.import_module(stage).main(argv))


def end_together(ranks, end):
    """Wait for all ranks until `end`; when one of them fails, kill the others."""
    running = ranks
    while running and time.monotonic() < end and not any(process.exitcode for process in ranks):
        multiprocessing.connection.wait(
            [process.sentinel for process in running], end - time.monotonic()
        )
        running = [process for process in ranks if process.exitcode is None]
    for process in running:
        process.kill()


def run_ranks(stage, argv, report, world=1, at=None, seconds=60, cpu=None):
    """`world` ranks of a stage, as torchrun would start them -> their exit codes. Their stdout and stderr go to a file.

    Fails where one hangs. Exit codes are negative for a process that a signal ended. With `cpu`, when one was ended
    the others are killed, as torchrun does; otherwise they are left to end by themselves.
    """
    context = fork_server()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in range(world):
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        variables = {key: str(value) for key, value in variables.items()}
        argv = [str(argument) for argument in argv]
        ranks.append(
            context.Process(target=rank_main, args=(stage, argv, variables, str(report), at, cpu))
        )
        ranks[-1].start()
    end = time.monotonic() + seconds
    try:
        if cpu:
            end_together(ranks, end)
        for process in ranks:
            process.join(max(end - time.monotonic(), 0))
        codes = [process.exitcode for process in ranks]
        assert None not in codes, f"a rank hangs: {codes}\n{Path(report).read_text()}"
        return codes
    finally:
        for process in ranks:
            process.kill()


# ---------------------------------------------------------------- what runs leave
def steps_of(out):
    """log.jsonl without how long the steps took, as {step: figures}; every step stands there once, in order."""
    rows = read_rows(Path(out) / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return {
        row.pop("step"): {key: value for key, value in row.items() if key != "seconds"}
        for row in rows
    }


def weights_of(out):
    return load_file(Path(out) / "adapters.safetensors")


def checkpoint_of(out):
    """The step of the one checkpoint in a folder."""
    folders = list((Path(out) / "resume").iterdir())
    assert len(folders) == 1 and folders[0].name.startswith("step-"), folders
    return int(folders[0].name.removeprefix("step-"))


def same_run(out, expected):
    """Whether two runs left the same losses, gradient norms, learning rates and weights, bit for bit."""
    mine, theirs = weights_of(out), weights_of(expected)
    return (
        steps_of(out) == steps_of(expected)
        and mine.keys() == theirs.keys()
        and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    )


def assert_close_run(out, expected, rtol=1e-4):
    """Two runs agree to rounding."""
    mine, theirs = steps_of(out), steps_of(expected)
    assert mine.keys() == theirs.keys()
    for step, row in mine.items():
        assert row.keys() == theirs[step].keys()
        for key, value in row.items():
            torch.testing.assert_close(
                value, theirs[step][key], rtol=rtol, atol=1e-6, msg=f"{key} of step {step}"
            )
    mine, theirs = weights_of(out), weights_of(expected)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
