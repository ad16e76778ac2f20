"""The steps of the toy loop: each is a command of the real scripts, run as a process, and skipped when it is done."""
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from plumbing.errors import InputError
from toy_world import world

CODE = Path(__file__).resolve().parent.parent
SFT = ("--epochs", "3", "--lr", "2e-3")
QA = ("--max-steps", "60", "--lr", "1e-3")
DPO = ("--epochs", "1", "--lr", "2e-3")
LATER = ("--ce", "4")                   # from round two on, when the pairs that are left are odd: fewer captions repeat
BATCH = ("--batch", "32", "--micro-batch", "32")


class Loop:
    """Runs the scripts, each as a process of its own, and skips what is there already."""

    def __init__(self, out, processes=1, log=None):
        """log: a file for what the scripts print, instead of the screen."""
        self.out, self.processes, self.log, self.began = out, processes, log, time.monotonic()

    def tell(self, line):
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        print(f"[{minutes:2d}:{seconds:02d}] {line}", flush=True)

    def run(self, makes, script, *arguments, stdout=None, stage=True):
        """Run a script unless `makes`, the file that it gives its name only when whole, is there.

        stdout: a file for what it prints. stage: it may run under torchrun. out/commands.jsonl remembers what made
        what: InputError where `makes` is of another command.
        """
        path, record = os.path.relpath(CODE / script), self.out / "commands.jsonl"
        mine = {"makes": str(makes.resolve()), "command": [Path(script).name, *(
            str(argument.resolve() if isinstance(argument, Path) else argument) for argument in arguments)]}
        ranks = ("--nproc_per_node", str(self.processes)) if stage and self.processes > 1 else ()
        arguments = [str(argument) for argument in arguments]
        shown = shlex.join([*(("torchrun", *ranks) if ranks else ("python",)), path, *arguments])
        to = f" > {shlex.quote(str(stdout))}" if stdout else ""
        self.tell(f"{'done: ' if makes.exists() else '$ '}{shown}{to}")
        if makes.exists():
            rows = record.read_text("utf-8").splitlines() if record.is_file() else []
            made = {row["makes"]: row for row in map(json.loads, rows)}
            if made.get(mine["makes"], mine) != mine:
                raise InputError(f"{makes}: was made by another command, {shlex.join(made[mine['makes']]['command'])}; "
                                 "delete it, and what was made from it, or give another --out")
            return
        command = [sys.executable, *(("-m", "torch.distributed.run", *ranks) if ranks else ()), path, *arguments]
        if stdout:
            stdout.parent.mkdir(parents=True, exist_ok=True)
        temporary = stdout and stdout.with_suffix(".tmp")
        with contextlib.ExitStack() as files:
            log = files.enter_context(self.log.open("a", encoding="utf-8")) if self.log else None
            out = files.enter_context(temporary.open("w", encoding="utf-8")) if stdout else log
            code = run_command(command, out, log)
        if stdout and code == 0:
            os.replace(temporary, stdout)
        if code or not makes.exists():
            where = f"in {self.log}" if self.log else "above"
            raise InputError(f"{script} ended with {code}; mend what it says {where} and run the same command again")
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(mine) + "\n")

    # ---- the steps of the method
    def sft(self, base, data, out, *more, makes="adapters.json"):
        self.run(out / makes, "sft.py", "--base", base, "--data", data / "captions.jsonl", "--out", out, *SFT, *BATCH,
                 *more)

    def qa(self, captioner, data, out, *more):
        self.run(out / "adapters.json", "qa_adapter.py", "--init", captioner, "--data", data / "questions.jsonl",
                 "--out", out, *QA, *BATCH, *more)

    def golden(self, captioner, qa, images, out, *more):
        self.run(out / "golden.jsonl", "golden.py", "--images", images, "--captioner", captioner, "--qa", qa, "--out",
                 out, *more)

    def dpo(self, captioner, golden, out, *more):
        self.run(out / "adapters.json", "dpo.py", "--init", captioner, "--data", golden / "golden.jsonl", "--out", out,
                 *DPO, *BATCH, *more)

    def judge(self, name, images, truth, *adapters, seed):
        """Caption images greedily and by sampling, and score both -> {"greedy": figures, "sampled": figures}."""
        found = {}
        for way in ("greedy", "sampled"):
            captions, scores = self.out / f"captions/{name}-{way}.jsonl", self.out / f"scores/{name}-{way}.json"
            self.run(captions, "caption.py", images, *adapters, "--jsonl", "--temperature", int(way == "sampled"),
                     "--seed", seed, stdout=captions, stage=False)
            self.run(scores, "evaluate.py", captions, truth, "--json", scores, stdout=scores.with_suffix(".txt"),
                     stage=False)
            found[way] = json.loads(scores.read_text("utf-8"))
        return found

    def judge_golden(self, name, golden, truth):
        """Score a golden file -> {"sample", "combined", "golden", "gate"}."""
        scores = self.out / f"scores/{name}.json"
        self.run(scores, "evaluate.py", golden / "record.jsonl", truth, "--json", scores,
                 stdout=scores.with_suffix(".txt"), stage=False)
        return json.loads(scores.read_text("utf-8"))


def run_command(command, stdout=None, stderr=None):
    """Run a command -> its exit code. ^C reaches it, too, and it is waited for while it saves how far it came."""
    with subprocess.Popen(command, stdout=stdout, stderr=stderr) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:       # subprocess.run would kill it after a quarter of a second
            process.wait()
            raise


def make_split(out, name, n, seed, wants):
    """Draw n scenes into out/data/NAME; of their rows, write those that a stage may see beside them, truth apart."""
    folder, truth = out / "data" / name, out / "truth" / f"{name}.jsonl"
    if not truth.is_file():
        rows = world.draw_scenes(folder, [f"{name} {seed} {i}" for i in range(n)])
        for kind in wants:
            world.write_rows(folder / f"{kind}.jsonl", rows[kind], folder)
        world.write_rows(truth, rows["truth"], folder)
    return folder, truth


def toy_rows(path):
    """The rows of a JSONL file, their images by file name."""
    rows = map(json.loads, path.read_text("utf-8").splitlines())
    return [{**row, "image": Path(row["image"]).name} for row in rows]
