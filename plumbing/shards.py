"""Passes over images that stop and go on: every rank appends rows to files of its own, and owns images by their name.

A pass writes PASS-RANK.jsonl, one row per image, {"image": name, …} or {"image", "error"}. What is done is what stands
in the files of all ranks, so a run goes on with any number of them, and nothing is lost or done twice.
"""
import errno
import hashlib
import json
import os
import time
from itertools import chain

from tqdm import tqdm

from plumbing.errors import InputError
from plumbing.train import write_whole


def check_settings(out, ranks, passes, settings):
    """InputError where a folder holds rows of a pass that were made with other settings; else remember these."""
    path = out / "settings.json"
    saved = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for what in passes:
        old, new = saved.get(what), settings[what]
        if old and old != new and any(out.glob(f"{what}-*.jsonl")):
            key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
            raise InputError(f"{out}: {what} was done with another {key} ({old.get(key)!r}, now {new.get(key)!r}); "
                             f"give another --out, or delete the files {what}-*.jsonl in it and those of later passes")
    if ranks.is_master:
        saved |= {what: settings[what] for what in passes}
        write_whole(path, lambda temporary: temporary.write_text(json.dumps(saved, indent=1), "utf-8"))


def owner(image, world):
    """The rank that an image belongs to: a hash of its name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(image.encode("utf-8", "surrogatepass")).digest()[:8], "big") % world


def finished(out, what):
    """Where a pass has its rows, {image: (file, offset)}, and which images have none but an error.

    A torn last line is no row. An error that was done again is forgotten.
    """
    good, failed = {}, {}
    for path in sorted(out.glob(f"{what}-*.jsonl")):
        offset = 0
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    row = json.loads(line)
                    (failed if "error" in row else good)[row["image"]] = path, offset
                offset += len(line)
    return {**failed, **good}, failed.keys() - good.keys()


def rows_at(places):
    """Yield the rows at some (file, offset)."""
    for path, offset in places:
        with path.open("rb") as file:
            file.seek(offset)
            yield json.loads(file.readline())


class Appender:
    """A rank's file of a pass; a line that a killed run left torn is cut off first."""

    def __init__(self, out, what, rank):
        self.path = out / f"{what}-{rank}.jsonl"
        self.file = self.path.open("a+b", buffering=0)
        end, found = self.file.seek(0, os.SEEK_END), b""
        while end and b"\n" not in found:
            end = max(end - (1 << 16), 0)
            self.file.seek(end)
            found = self.file.read(1 << 16)
        self.file.truncate(end + found.rfind(b"\n") + 1)

    def write(self, row):
        line = json.dumps(row).encode() + b"\n"
        try:
            if self.file.write(line) < len(line):       # one call: a kill leaves the line, or its beginning
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))      # room for a part was no error to write
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}; make room and run the same command again") from None


def run_pass(out, ranks, what, source, make_work, retry_errors=False):
    """Do a pass for those of this rank's images that it has not been done for -> how many, and in how many seconds.

    source: {image: its (file, offset) in the pass before, or None}. make_work() opens the model of the pass and gives a
    generator function, rows -> the same rows with more in them, or with an "error", in any order. A row that has an
    error already is handed on as it is, so that every pass has a row for every image.
    """
    done, failed = finished(out, what)
    todo = sorted(image for image in source if owner(image, ranks.world) == ranks.rank
                  and (image not in done or (retry_errors and image in failed)))
    began, errors = time.perf_counter(), []
    if not todo:
        return 0, 0.0

    def good():
        for image in todo:
            row = next(rows_at([source[image]])) if source[image] else {"image": image}
            if "error" in row:
                errors.append(row)
            else:
                yield row

    def results():
        rows = good()
        for first in rows:                      # where nothing but errors is left, no model is opened
            yield from make_work()(chain([first], rows))
        yield from errors
    file, n_errors = Appender(out, what, ranks.rank), 0
    with tqdm(total=len(todo), desc=what, unit="image", disable=not ranks.is_master) as bar:
        for row in results():
            file.write(row)
            n_errors += "error" in row
            bar.set_postfix(errors=n_errors, refresh=False)
            bar.update()
    return len(todo), time.perf_counter() - began
