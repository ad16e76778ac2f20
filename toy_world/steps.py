"""The steps of the toy loop. Each is a command of the real scripts, run as a process and skipped
once it is done."""
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
# From round two on most rows have no pair, and the pairs that remain are unusual ones. A larger
# weight of the cross entropy keeps captions from repeating statements.
LATER = ("--ce", "4")
# From the bare base: both toy bases answer this prompt with one to three facts, so that there is
# much to learn, and no QA adapter says which threshold suits their answers. Threshold and epochs
# were chosen on seed 100.
BARE = ("--caption-prompt", world.CAPTION_PROMPT)
BARE_GOLDEN, BARE_DPO = ("--threshold", ".85"), ("--epochs", "3")
BATCH = ("--batch", "32", "--micro-batch", "32")


class Loop:
    """Runs scripts, each as a process of its own, and skips those whose output exists."""

    def __init__(self, out, processes=1, log=None):
        """log: a file for everything the scripts print, instead of the screen."""
        self.out, self.processes, self.log = out, processes, log
        self.commands = out / "commands.jsonl"
        self.began = time.monotonic()

    def progress(self, line):
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        print(f"[{minutes:2d}:{seconds:02d}] {line}", flush=True)

    def run(self, makes, script, *arguments, stdout=None, stage=True, allowed=(0,)):
        """Run a script of the repository unless `makes` exists.

        makes: a file that appears under this name only once it is complete. stdout: a file for what
        the script prints. stage: the script may run under torchrun. allowed: exit codes of success.
        InputError where the script fails, and where `makes` was made by another command.
        """
        words = [os.path.relpath(CODE / script), *map(str, arguments)]
        torchrun = []
        if stage and self.processes > 1:
            torchrun = ["torchrun", "--nproc_per_node", str(self.processes)]
        typed = shlex.join([*(torchrun or ["python"]), *words])
        if stdout:
            typed += f" > {shlex.quote(str(stdout))}"
        record = {"makes": str(makes.resolve()), "command": [script, *absolute(arguments)]}
        if makes.exists():
            self.progress(f"done: {typed}")
            self.check_made_by(makes, record)
            return
        self.progress(f"$ {typed}")
        module = ["-m", "torch.distributed.run", *torchrun[1:]] if torchrun else []
        code = self.start([sys.executable, *module, *words], stdout)
        where = f"in {self.log}" if self.log else "above"
        if code not in allowed:
            raise InputError(f"{script} exited with {code}; fix the error reported {where} and run "
                             "the same command again")
        if not makes.exists():
            raise InputError(f"{script} exited with 0 without writing {makes}; see its output "
                             f"{where}")
        with self.commands.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def check_made_by(self, makes, record):
        """InputError where commands.jsonl holds another command for this file, for example after
        the flags above were edited."""
        if not self.commands.is_file():
            return
        rows = map(json.loads, self.commands.read_text("utf-8").splitlines())
        last = {row["makes"]: row for row in rows}.get(record["makes"], record)
        if last != record:
            raise InputError(f"{makes}: was made by another command, {shlex.join(last['command'])};"
                             " delete it and everything made from it, or give another --out")

    def start(self, command, stdout):
        """Run a command -> its exit code; `stdout` gets its name only if the command succeeds."""
        temporary = stdout and stdout.with_suffix(".tmp")
        with contextlib.ExitStack() as files:
            log = output = None
            if self.log:
                log = output = files.enter_context(self.log.open("a", encoding="utf-8"))
            if stdout:
                stdout.parent.mkdir(parents=True, exist_ok=True)
                output = files.enter_context(temporary.open("w", encoding="utf-8"))
            code = run_command(command, output, log)
        if stdout and code == 0:
            os.replace(temporary, stdout)
        return code

    # ---- the steps of the method
    def sft(self, base, data, out, *more, makes="adapters.json"):
        self.run(out / makes, "sft.py", "--base", base, "--data", data / "captions.jsonl",
                 "--out", out, *SFT, *BATCH, *more)

    def qa(self, captioner, data, out, *more):
        self.run(out / "adapters.json", "qa_adapter.py", "--init", captioner,
                 "--data", data / "questions.jsonl", "--out", out, *QA, *BATCH, *more)

    def golden(self, captioner, qa, images, out, *more):
        self.run(out / "golden.jsonl", "golden.py", "--images", images, "--captioner", captioner,
                 "--qa", qa, "--out", out, *more)

    def dpo(self, captioner, golden, out, *more):
        self.run(out / "adapters.json", "dpo.py", "--init", captioner,
                 "--data", golden / "golden.jsonl", "--out", out, *DPO, *BATCH, *more)

    def sft_on_golden(self, captioner, golden, out, *more):
        """SFT on the chosen captions with the flags of dpo.py; the soft prompt stays frozen."""
        self.run(out / "adapters.json", "sft.py", "--init", captioner,
                 "--data", golden / "golden.jsonl", "--out", out, "--no-soft-prompt",
                 *DPO, *BATCH, *more)

    def judge(self, name, images, truth, *adapters, seed):
        """Caption images greedily and by sampling and score both: {"greedy": figures, "sampled":
        figures}."""
        figures = {}
        for way, temperature in (("greedy", 0), ("sampled", 1)):
            captions = self.out / f"captions/{name}-{way}.jsonl"
            scores = self.out / f"scores/{name}-{way}.json"
            self.run(captions, "caption.py", images, *adapters, "--jsonl",
                     "--temperature", temperature, "--seed", seed, stdout=captions, stage=False)
            figures[way] = self.scored(captions, truth, scores)
        return figures

    def judge_golden(self, name, golden, truth):
        """Score a golden folder: {"sample", "combined", "golden", "gate"}."""
        return self.scored(golden / "record.jsonl", truth, self.out / f"scores/{name}.json")

    def scored(self, captions, truth, scores):
        """The figures of evaluate.py, which also go to the file `scores`."""
        self.run(scores, "evaluate.py", captions, truth, "--json", scores,
                 stdout=scores.with_suffix(".txt"), stage=False)
        return json.loads(scores.read_text("utf-8"))


def absolute(arguments):
    """A command's arguments as text, paths absolute."""
    return [str(argument.resolve() if isinstance(argument, Path) else argument)
            for argument in arguments]


def run_command(command, stdout=None, stderr=None):
    """Run a command -> its exit code. ^C reaches it too; it is given the time to save its state."""
    with subprocess.Popen(command, stdout=stdout, stderr=stderr) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:       # subprocess.run would kill it after a quarter of a second
            process.wait()
            raise


def make_split(out, name, n, seed, wants, draw_scenes=world.draw_scenes):
    """Draw n scenes -> the folder of their pictures and the file of their truth.

    wants: the kinds of rows a stage may read ("captions", "questions"), which are written next to
    the pictures. The truth goes to another folder. draw_scenes: of a world, by default the easy
    one.
    """
    folder, truth = out / "data" / name, out / "truth" / f"{name}.jsonl"
    if not truth.is_file():             # it is written last
        rows = draw_scenes(folder, [f"{name} {seed} {i}" for i in range(n)])
        for kind in wants:
            world.write_rows(folder / f"{kind}.jsonl", rows[kind], folder)
        world.write_rows(truth, rows["truth"], folder)
    return folder, truth


def rows_of_runs(paths, read=None):
    """The rows of files of several runs, images told apart by the run's number.

    read(path): in place of toy_rows.
    """
    return [{**row, "image": f"{k}/{row['image']}"}
            for k, path in enumerate(paths) for row in (read or toy_rows)(path)]


def toy_rows(path):
    """The rows of a JSONL file, their images by file name."""
    rows = map(json.loads, path.read_bytes().splitlines())
    return [{**row, "image": Path(row["image"]).name} for row in rows]
