"""caption.py killed twenty times; tests/kills.py does it more often, over more images."""

import os
import sys
from pathlib import Path

import kills
import pytest
import torch
from stages import CODE, fork_server

import caption
from toy_world import world

IMAGES = 400


def worker_main(command, variables, report):
    """What a worker's process does."""
    os.environ.update(variables)
    os.chdir(CODE)
    file = os.open(report, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.argv = ["caption.py", *command]
    if "KILL_AT" in variables:
        exec(kills.PLACED, {})
    sys.exit(caption.main(command))


class Worker:
    """A process as kills.py uses it, forked from one that has torch imported, which saves seconds each time."""

    def __init__(self, command, variables, report):
        self.report = Path(report)
        arguments = (command, variables, str(report))
        self.process = fork_server().Process(target=worker_main, args=arguments)
        self.process.start()

    def poll(self):
        return self.process.exitcode

    @property
    def returncode(self):
        return self.process.exitcode

    def send_signal(self, number):
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def communicate(self):
        self.process.join()
        return None, self.report.read_text("utf-8") if self.report.exists() else ""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    world.draw_scenes(tmp_path / "scenes", [f"kills {k}" for k in range(IMAGES)])
    (tmp_path / "reports").mkdir()

    def start(command, rank, world, placed=None):
        variables = {"RANK": str(rank), "WORLD_SIZE": str(world)}
        if placed:
            variables["KILL_AT"] = placed
        number = len(list((tmp_path / "reports").iterdir()))
        report = tmp_path / "reports" / str(number)
        report.touch()
        return Worker(command, variables, report)

    monkeypatch.setattr(kills, "start", start)
    return tmp_path


@pytest.mark.parametrize("write, count", [("jsonl", 6), ("txt", 6), ("webdataset", 8)])
def test_every_input_is_there_once_whatever_is_killed(write, count, folder):
    assert kills.run(folder, write, IMAGES, count, seed=0) == count
