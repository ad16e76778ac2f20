"""caption.py killed again and again, restarted with other numbers of ranks and shards.

    python tests/kills.py               # 100 kills, thousands of toy images
    python tests/kills.py --kills 20 --images 600

Each of jsonl, txt and webdataset output gets a share of the kills, SIGKILL or SIGTERM, some at random and some at
placed moments: just before or after a file operation. In the end the merged result must hold every
input once and equal that of a run that nothing interrupted.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

CODE = Path(__file__).parent.parent
sys.path.insert(0, str(CODE))
OPERATIONS = ("replace", "fsync", "link", "write", "mkdir", "unlink")
# Run in place of caption.py: the k-th call of a function of os, and of a file's write, kills.
PLACED = """
import io, os, signal, sys
name, k, after = os.environ["KILL_AT"].split(":")
left = [int(k)]
def deadly(function):
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and after == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
import caption
from plumbing import shards
if name == "write":
    write = shards.Appender.write
    shards.Appender.write = deadly(write)
else:
    setattr(os, name, deadly(getattr(os, name)))
sys.exit(caption.main(sys.argv[1:]))
"""


def start(command, rank, world, placed=None):
    """A worker of caption.py as a process."""
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    program = ["caption.py"]
    if placed:
        program, env["KILL_AT"] = ["-c", PLACED], placed
    return subprocess.Popen(
        [sys.executable, *program, *command],
        cwd=CODE,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows_in(out):
    return sum(path.read_bytes().count(b"\n") for path in (out / "rows").glob("*.jsonl"))


def attempt(command, out, rng):
    """Start the ranks of some shard, and kill them or wait until they are done -> (killed, text)."""
    world, shards = rng.choice((1, 2, 2, 2, 3)), rng.choice((1, 1, 2, 3))
    shard = rng.randrange(shards)
    placed = None
    if rng.random() < 0.4:
        placed = f"{rng.choice(OPERATIONS)}:{rng.randint(1, 40)}:{rng.randint(0, 1)}"
    before, began = rows_in(out), time.monotonic()
    workers = [
        start([*command, "--shard", f"{shard}/{shards}"], rank, world, placed if not rank else None)
        for rank in range(world)
    ]
    wanted = before + rng.randint(1, 60)
    while any(worker.poll() is None for worker in workers):
        if time.monotonic() - began > 300:
            raise AssertionError("a worker hangs")
        if any(worker.poll() == -signal.SIGKILL for worker in workers):
            wanted = 0  # one is dead by its placed kill; the others soon are, as under torchrun
        if rows_in(out) >= wanted and rng.random() < 0.3:
            break
        time.sleep(0.01)
    how = rng.choice((signal.SIGKILL, signal.SIGTERM))
    for worker in workers:
        worker.send_signal(how)
    texts = [worker.communicate()[1] for worker in workers]
    codes = [worker.returncode for worker in workers]
    for code, text in zip(codes, texts):
        if code not in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
            raise AssertionError(f"a worker ended with {code}:\n{text[-2000:]}")
        assert "Traceback" not in text, text[-2000:]
    return any(codes)


def contents(out, write):
    """Everything that a finished folder says, without which worker wrote what."""
    rows = [json.loads(line) for line in (out / "captions.jsonl").read_text("utf-8").splitlines()]
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == len(ids) and ids == sorted(ids)
    said = {"rows": rows}
    if write == "txt":
        texts = sorted(out.rglob("*.txt"))
        said["files"] = {str(path.relative_to(out)): path.read_bytes() for path in texts}
    if write == "webdataset":
        samples = {}
        for path in sorted(out.rglob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    assert member.name not in samples, f"{member.name} is in two tars"
                    samples[member.name] = tar.extractfile(member).read()
        said["samples"] = samples
    assert not list(out.rglob("*.tmp")), "temporary files are left"
    return said


def run(folder, write, images, kills, seed):
    """Kill a run so many times -> the number of kills; AssertionError where anything differs."""
    rng = random.Random(f"{seed} {write}")
    command = [str(folder / "scenes"), "--base", str(CODE / "assets/toy"), "--adapters", "none"]
    command += ["--write", write, "--temperature", "1", "--batch", "8"]
    quiet, killed = folder / f"{write}-quiet", folder / f"{write}-killed"
    worker = start([*command, "--out", str(quiet)], 0, 1)
    text = worker.communicate()[1]
    assert worker.returncode == 0, text[-2000:]
    count = attempts = 0
    while count < kills and attempts < 3 * kills and rows_in(killed) < images:
        count += attempt([*command, "--out", str(killed)], killed, rng)
        attempts += 1
    worker = start([*command, "--out", str(killed)], 0, 1)
    text = worker.communicate()[1]
    assert worker.returncode == 0, text[-2000:]
    expected, found = contents(quiet, write), contents(killed, write)
    assert len(found["rows"]) == images
    for key in expected:
        assert found[key] == expected[key], f"{write}: {key} differ"
    return count


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--kills", type=int, default=100)
    p.add_argument("--images", type=int, default=4000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    from toy_world import world

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        world.draw_scenes(folder / "scenes", [f"kills {k}" for k in range(args.images)])
        total = 0
        for write, share in zip(("jsonl", "txt", "webdataset"), (0.3, 0.3, 0.4)):
            count = run(folder, write, args.images, round(share * args.kills), args.seed)
            print(f"{write}: {count} kills, every input once, as without kills", flush=True)
            total += count
        print(f"{total} kills")
    return 0


if __name__ == "__main__":
    sys.exit(main())
