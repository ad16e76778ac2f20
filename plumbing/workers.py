"""Workers that do one job without talking to each other: their numbers, locks and settings."""
import argparse
import contextlib
import fcntl
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from plumbing import files
from plumbing.errors import InputError, explained
from plumbing.shards import owner


# ---------------------------------------------------------------- divisions
def shard(text):
    """"i/n", a type for argparse -> (i, n): part i of n, counted from 0."""
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: want I/N with I from 0 to N - 1, such as 0/16")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class Division:
    """The place of this worker among all: a rank of a shard."""
    shard: int = 0
    shards: int = 1
    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls, shard=None):
        """The shard (i, n), without it the task of a SLURM array; and torchrun's rank."""
        count, number = shard_of_array() if shard is None else shard[::-1]
        rank, world = (int(os.environ.get(*of)) for of in (("RANK", 0), ("WORLD_SIZE", 1)))
        if count * world > 99_999:
            raise InputError(f"{count} shards of {world} ranks; at most 99999 workers can be named")
        return cls(number, count, rank, world)

    @property
    def worker(self):
        return self.shard * self.world + self.rank

    @property
    def workers(self):
        return self.shards * self.world

    @property
    def name(self):
        return name_of(self.worker, self.workers)

    def owns(self, id):
        return owner(id, self.workers) == self.worker


def shard_of_array():
    """How many tasks a SLURM array has, and which of them this is; without one, (1, 0)."""
    task, first, step, count = (int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
                                for name, default in (("ID", 0), ("MIN", 0), ("STEP", 1),
                                                      ("COUNT", 1)))
    number, rest = divmod(task - first, max(step, 1))
    if count > 1 and (rest or not 0 <= number < count):
        raise InputError("the tasks of this SLURM array are not evenly spaced, such as 0-15; give "
                         "--shard I/N")
    return count, number if count > 1 else 0


def name_of(worker, workers):
    return f"{worker:05d}-of-{workers:05d}"


def numbers_of(path):
    """The path of a worker's file -> (worker, workers)."""
    worker, workers = path.stem.split("-of-")
    return int(worker), int(workers)


# ---------------------------------------------------------------- locks
LOCKS = set()       # of this process; a lock lasts while any process has its file open


def close_locks():
    """In a forked process, which may outlive this one after a kill: it must not keep our locks."""
    for file in LOCKS:
        file.close()
    LOCKS.clear()


os.register_at_fork(after_in_child=close_locks)


@contextlib.contextmanager
def locked(path, seconds, busy):
    """Hold the lock of a file; InputError "FILE `busy`" if another process does for that long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with path.open("a+b", buffering=0) as file:
        while not acquired(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read(200).decode("utf-8", "replace")
                raise InputError(f"{path}: {busy}{holder and f' ({holder})'}")
            time.sleep(0.05)
        LOCKS.add(file)
        try:
            yield file
        finally:
            LOCKS.discard(file)


def acquired(file, kind):
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def is_held(path):
    """Whether a process holds the lock of a file."""
    with path.open("rb") as file:
        return not acquired(file, fcntl.LOCK_SH)


# ---------------------------------------------------------------- settings
def freeze(out, settings):
    """Keep the settings {name: value} of the first start in out/settings.json; check later ones."""
    path = Path(out, "settings.json")
    settings = json.loads(json.dumps(settings))
    with explained(path), locked(path.parent / "rows/settings.lock", 60, "cannot be locked"):
        if not path.exists():
            files.write_json(path, settings)
        try:
            frozen = dict(json.loads(path.read_text("utf-8")))
        except ValueError:
            raise InputError(f"{path}: is damaged; give another --out") from None
    for key in {**frozen, **settings}:
        if frozen.get(key) != settings.get(key):
            raise InputError(f"{out}: was begun with another {key} ({short(frozen.get(key))}, "
                             f"now {short(settings.get(key))}); give that, or another --out")


def short(value):
    """A value as a message shows it: thousands of inputs would bury what differs."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} …"
