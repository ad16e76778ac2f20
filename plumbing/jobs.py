"""A job over many images: any number of workers, each of which may be killed at any moment.

A worker is a rank of a shard; an input belongs to one by a hash of its id. In the folder of a job:
    settings.json       of the first start; workers with others are refused
    rows/NAME.jsonl     what the worker NAME, such as 00003-of-00016, has done: a row per input
    rows/NAME.lock      held while it runs, and kept, as a lock file must not be deleted
    rows/NAME.json      once its share is whole: what became of it
An input is done when any of these files has a row for it, so the number of workers may change
between starts. While one of them runs, workers of another number are refused. A worker makes
its own missing text files and tar shards when it starts again; after a change of the number, the
worker that inherits its file of rows does, which is its number modulo the new number of workers.
"""
import contextlib
import json
import os
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from plumbing import files, inputs, outputs
from plumbing.errors import InputError, explained, printable
from plumbing.shards import NAMES, Appender
from plumbing.tally import kind_of
from plumbing.workers import is_held, locked, name_of, numbers_of

WRITE = ("jsonl", "txt", "webdataset", "parquet")
EXISTING = ("skip", "overwrite", "append")
SHARD_SIZE = 1000       # samples in a tar shard


# ---------------------------------------------------------------- a worker
class Job:
    """The share of one worker.

        with Job(out, division, write="txt") as job:
            for item in job.todo(inputs.find(arguments, one_per_target=True)):
                job.write(item, {"caption": ...} or {"error": ...})
            job.finish()                # not if it was stopped before the end

    InputError: a folder that cannot be written to, a full disk, a worker that runs already, one of
    another division. What was written before stays; the same command resumes.
    """

    def __init__(self, out, division, write="jsonl", existing="overwrite", retry_errors=False,
                 shard_size=SHARD_SIZE):
        self.out, self.division, self.kind, self.existing = Path(out), division, write, existing
        self.retry_errors, self.shard_size = retry_errors, shard_size
        self.rows = self.out / "rows"
        self.manifest = self.rows / f"{division.name}.json"
        self.captions, self.packing = 0, None
        self.real = lru_cache(maxsize=1024)(os.path.realpath)

    def __enter__(self):
        with contextlib.ExitStack() as stack, explained(self.out):
            lock = stack.enter_context(locked(self.rows / f"{self.division.name}.lock", 2,
                                              "is already being written by another process"))
            self.refuse_others()
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            # NAME.jsonl, its torn last line cut off
            self.appender = Appender(self.rows, *self.division.name.split("-", 1))
            stack.enter_context(self.appender.file)
            self.repair()
            self.manifest.unlink(missing_ok=True)
            self.done = done_in(self.out, self.division.owns)
            self.packer = stack.enter_context(ThreadPoolExecutor(1))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        with explained(self.out):
            self.stack.close()

    def refuse_others(self):
        """InputError if a worker of another division runs.

        Each takes its own lock before it looks at those of others: of two that start at the same
        moment, at least one sees the other.
        """
        for path in sorted(self.rows.glob(f"{NAMES}.lock")):
            workers = numbers_of(path)[1]
            if workers != self.division.workers and is_held(path):
                raise InputError(f"{self.out}: one of {workers} workers still runs, and this would "
                                 f"be one of {self.division.workers}; wait for it, or stop it")

    def inherited(self):
        """Files of rows that this worker looks after: its own, and what earlier divisions left."""
        own = self.rows / f"{self.division.name}.jsonl"
        return [own] + [path for path in sorted(self.rows.glob(f"{NAMES}.jsonl"))
                        if numbers_of(path)[1] != self.division.workers
                        and numbers_of(path)[0] % self.division.workers == self.division.worker]

    def repair(self):
        """Write the text files that kills prevented: of the last row of a file, at most.

        A share that is whole has all of its files, and a later change to one is its owner's.
        """
        for path in self.inherited() if self.kind == "txt" else ():
            row = None if path.with_suffix(".json").exists() else last_row(path)
            if row and "caption" in row:
                with contextlib.suppress(InputError):
                    self.replace(self.prepare(row), row)

    @property
    def failed(self):
        """The ids of this share whose only row is an error."""
        return {id for id, kind in self.done.items() if kind}

    def todo(self, items):
        """All items of the run -> a list of those that this worker still has to do."""
        share = [item for item in items if self.division.owns(item.id)]
        self.share = {item.id for item in share}
        again = self.failed if self.retry_errors else ()
        return [item for item in share if item.id not in self.done or item.id in again]

    def write(self, item, row):
        """Append the row of an item, {"caption", ...} or {"error"}, and make what belongs to it
        -> the row as it was written.

        The name of the text file is taken last: a kill before leaves a row without its text, and
        `repair` makes it. An error row is written where the text file cannot be.
        """
        with explained(self.out):
            row, temporary = self.whole_row(item, row), None
            if self.kind == "txt" and "caption" in row:
                try:
                    temporary = self.prepare(row)
                except InputError as error:
                    row = self.whole_row(item, {"error": str(error)})
            try:
                self.appender.write(row)
            except InputError:
                self.appender.file.close()      # no row may follow a part of one
                raise
            self.replace(temporary, row)
            self.done[item.id] = (kind_of(row["error"]) or "error") if "error" in row else None
            if self.kind == "webdataset" and "caption" in row:
                self.pack_beside()
            return row

    def whole_row(self, item, row):
        """The row of an item with all that its files, the merged result and restarts need."""
        fields, before = item.fields, None
        if "caption" in row:
            try:
                fields, before = inputs.details(item)
            except InputError as error:
                row = {"error": str(error)}
        if before and self.existing == "append" and "caption" in row:
            lines = outputs.lines_of(before)
            new = [line for line in outputs.lines_of(row["caption"]) if line not in lines]
            row = {**row, "caption": lines + new}
        path = outputs.relative(item.path or item.image, self.out, self.real)
        image = path + item.image[len(item.path or item.image):]
        return {"id": item.id, "image": image, **row, "fields": fields, "target": item.target,
                "source": [path, item.offset, item.size]}

    def prepare(self, row):
        """The temporary path of a row's text, or None where the file is to stay as it is."""
        path = self.out / f"{row['target']}.txt"
        if row.get("finish") == "kept" and outputs.text_in(path):
            return None
        return outputs.prepare_text(path, row["caption"], append=self.existing == "append")

    def replace(self, temporary, row):
        if temporary:
            os.replace(temporary, self.out / f"{row['target']}.txt")

    def pack_beside(self):
        """Make tar shards in a thread, each time that there are rows for one."""
        self.captions += 1
        if self.captions % self.shard_size == 0:
            if self.packing:
                self.packing.result()
            self.packing = self.packer.submit(outputs.pack, self.out, self.appender.path,
                                              self.shard_size, self.read)

    def read(self, row):
        """The bytes of a row's image, as they are in its file or tar."""
        path, offset, size = row["source"]
        path = os.path.join(os.path.realpath(self.out), path)
        return inputs.read(inputs.Item(row["id"], "", row["image"], path, offset, size))

    def finish(self):
        """Make the tar shards of what is left, then the manifest that says this share is whole."""
        assert self.share <= self.done.keys(), "there are inputs without a row"
        with explained(self.out):
            if self.packing:
                self.packing.result()
            for path in self.inherited() if self.kind == "webdataset" else ():
                outputs.pack(self.out, path, self.shard_size, self.read, rest=True)
            os.fsync(self.appender.file)
            errors = Counter(self.done[id] for id in self.share if self.done[id])
            files.write_json(self.manifest, {
                "worker": self.division.worker, "workers": self.division.workers,
                "inputs": len(self.share), "captions": len(self.share) - errors.total(),
                "errors": errors, "whole": True})


# ---------------------------------------------------------------- what is there
def kept(item, out=None, text=False):
    """The caption that an item already has, or None: with `text` in its text file, else with it.

    For --existing skip: its row is {"caption": that, "finish": "kept"}.
    """
    path = outputs.text_path(item, out) if text else None
    with explained(path):
        caption = outputs.text_in(path) if path else None
    return caption or inputs.details(item)[1]


def done_in(out, wanted=lambda id: True):
    """{id: None, or the kind of its error if it has no caption} of the wanted ids with a row."""
    done = {}
    for path in sorted(Path(out, "rows").glob(f"{NAMES}.jsonl")):
        for _, _, row in outputs.rows_of(path):
            if not wanted(row["id"]):
                continue
            if "error" not in row:
                done[row["id"]] = None
            else:
                done.setdefault(row["id"], kind_of(row["error"]) or "error")
    return done


def last_row(path):
    """The last whole row of a file, or None."""
    size, block = path.stat().st_size, 1 << 16
    while True:
        with path.open("rb") as file:
            file.seek(max(size - block, 0))
            lines = file.read(block).split(b"\n")       # the last is torn, or empty
        if len(lines) > 2 or block >= size:
            return json.loads(lines[-2]) if len(lines) > 1 else None
        block *= 2


def status(out, ids=None):
    """What became of a job's inputs, all `ids` of them, and of its workers -> a dict.

    inputs, captions: counts; errors: {kind: count}; missing: ids without a row; failed: with an
    error; whole, running,
    unfinished: names of workers of the latest division; left_out: {id: why} of captioned images
    that are in no tar shard; lines: all that to print. Without ids, none is missing.
    """
    out, latest = Path(out), None
    with explained(out):
        done = done_in(out)
        ids = done.keys() if ids is None else list(ids)
        kinds = Counter(done[id] for id in ids if id in done)
        locks = [path for path in (out / "rows").glob(f"{NAMES}.lock")
                 if path.stat().st_size]        # an empty one is of a worker that was refused
        if locks:
            latest = max(locks, key=lambda path: path.stat().st_mtime_ns)
        report = {"inputs": len(ids), "captions": kinds.pop(None, 0), "errors": dict(kinds),
                  "missing": [id for id in ids if id not in done],
                  "failed": [id for id in ids if done.get(id)],
                  "whole": [], "running": [], "unfinished": [], "left_out": {}}
        for name in names_beside(latest) if latest else ():
            report[state_of(out / "rows" / name)].append(name)
        for path in sorted((out / "shards").glob("*-of-*.json")):
            report["left_out"] |= json.loads(path.read_bytes())["left_out"]
    report["lines"] = lines_of_status(out, report)
    return report


def names_beside(path):
    """The names of all workers of the division that a worker's file belongs to."""
    workers = numbers_of(path)[1]
    return [name_of(worker, workers) for worker in range(workers)]


def state_of(path):
    lock = path.with_suffix(".lock")
    if lock.exists() and is_held(lock):
        return "running"
    return "whole" if path.with_suffix(".json").exists() else "unfinished"


def lines_of_status(out, report):
    """What to print, and what to run next."""
    errors, missing = sum(report["errors"].values()), len(report["missing"])
    lines = [f"{report['inputs']} inputs: {report['captions']} captions, {errors} errors, "
             f"{missing} missing"]
    lines += [f"  {count} × {kind}" for kind, count in Counter(report["errors"]).most_common()]
    lines += [f"  not in a tar shard: {error}" for error in report["left_out"].values()]
    workers = {state: len(report[state]) for state in ("whole", "running", "unfinished")}
    lines.append(f"{sum(workers.values())} workers: " + ", ".join(
        f"{count} {state}" for state, count in workers.items()))
    names = report["unfinished"]
    for what, some in (("missing", report["missing"]), ("unfinished", names),
                       ("failed", report["failed"])):
        if some:
            more = f" and {len(some) - 10} more" if len(some) > 10 else ""
            lines.append(f"{what}: {', '.join(map(printable, some[:10]))}{more}")
    if names or (missing and not report["running"]):
        lines.append("next: the same command again, with as many shards and ranks as you like"
                     + (" once none is running" if report["running"] else ""))
    elif not report["running"]:
        again = "; --retry-errors tries the errors again" if errors else ""
        lines.append(f"next: caption.py --merge {out}{again}")
    return lines
