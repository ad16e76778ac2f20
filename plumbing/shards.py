"""A pass over images that can be stopped at any moment and resumed with any number of ranks.

A pass appends to PASS-RANK.jsonl, a file per rank, one row per image: {"image": name, ...} or
{"image": name, "error": reason}. An image is done when the file of any rank has a row for it. Each
rank takes the images whose hashed names fall to it, so ranks need not talk to each other.
"""
import errno
import hashlib
import json
import os
import time

from tqdm import tqdm

from plumbing import files
from plumbing.errors import InputError

NAMES = f"{'[0-9]' * 5}-of-{'[0-9]' * 5}"       # a pattern of the names of caption.py's workers


# ---------------------------------------------------------------- settings
def check_settings(out, ranks, passes, settings):
    """Remember the settings {pass: {...}} of the passes of this run in out/settings.json.

    InputError if `out` already has rows of one of these passes that were made with other settings.
    """
    path = out / "settings.json"
    saved = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for name in passes:
        old, new = saved.get(name), settings[name]
        if old and old != new and any(out.glob(f"{name}-*.jsonl")):
            key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
            raise InputError(f"{out}: {name} was done with another {key} ({old.get(key)!r}, now "
                             f"{new.get(key)!r}); give another --out, or delete the files "
                             f"{name}-*.jsonl in it and those of later passes")
    if ranks.is_master:
        files.write_json(path, saved | {name: settings[name] for name in passes})


# ---------------------------------------------------------------- rows of all ranks
def owner(image, world):
    """The rank of an image: a hash of its name, the same on every machine."""
    name = image.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") % world


def finished(out, name):
    """The rows of a pass -> ({image: its (file, offset)}, the set of images with only an error).

    A last line without its newline was torn by a kill and does not count. A row without an error
    takes precedence over an error of the same image, in whichever file and order they are.
    """
    good, failed = {}, {}
    for path in sorted(out.glob(f"{name}-*.jsonl")):
        offset = 0
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    row = json.loads(line)
                    rows = failed if "error" in row else good
                    rows[row["image"]] = path, offset
                offset += len(line)
    return {**failed, **good}, failed.keys() - good.keys()


def rows_at(places):
    """Yield the row at each (file, offset)."""
    for path, offset in places:
        with path.open("rb") as file:
            file.seek(offset)
            yield json.loads(file.readline())


class Appender:
    """The file that a rank appends the rows of a pass to; opening it cuts off a torn last line."""

    def __init__(self, out, name, rank):
        self.path = out / f"{name}-{rank}.jsonl"
        # unbuffered, so that a row is in the file once it is written, and no forked worker holds a
        # part of a row that it could write a second time
        self.file = self.path.open("a+b", buffering=0)
        end, block = self.file.seek(0, os.SEEK_END), b""
        while end and b"\n" not in block:
            end = max(end - (1 << 16), 0)
            self.file.seek(end)
            block = self.file.read(1 << 16)
        self.file.truncate(end + block.rfind(b"\n") + 1)

    def write(self, row):
        """Append a row in a single call: a kill leaves the line, or a beginning without newline."""
        line = json.dumps(row).encode() + b"\n"
        try:
            # where there is room for a part of the line, the system writes it and reports no error
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}; make room and run the same command "
                             "again") from None


# ---------------------------------------------------------------- a pass
class Pass:
    """The images that a rank still has to do in one pass, and the file that it appends rows to.

        with Pass(out, ranks, "verify", before="combine") as todo:
            if todo.images:                     # otherwise no model need be opened
                model = open_model()
                for row in todo.rows():
                    todo.write({**row, "verdict": model(row)})

    images  names, sorted: those of this rank whose row is missing. With `before`, they are the
            images that the pass of this name has a row for; without, the names in `images`.
            retry_errors adds the images whose only row in this pass is an error.
    source  {image: (file, offset) of its row in the pass before, or None}: the images of all ranks
    count, seconds      of the images done here, errors included, known after the with statement

    An image whose row in the pass before is an error is not among `images`. Its row is copied when
    the with statement ends without an exception, so that every pass has a row for every image.
    """

    def __init__(self, out, ranks, name, images=(), before=None, retry_errors=False):
        self.out, self.ranks, self.name = out, ranks, name
        self.source, failed_before = dict.fromkeys(images), set()
        if before:
            self.source, failed_before = finished(out, before)
        done, failed = finished(out, name)
        finally_done = done.keys() - failed if retry_errors else done.keys()
        missing = sorted(image for image in self.source.keys() - finally_done
                         if owner(image, ranks.world) == ranks.rank)
        self.images = [image for image in missing if image not in failed_before]
        self.failed_before = [image for image in missing if image in failed_before]
        self.count, self.seconds = len(missing), 0.0

    def __enter__(self):
        if self.count:              # a pass with nothing to do leaves no file
            self.began, self.errors = time.perf_counter(), 0
            self.appender = Appender(self.out, self.name, self.ranks.rank)
            self.bar = tqdm(total=self.count, desc=self.name, unit="image",
                            disable=not self.ranks.is_master)
        return self

    def row(self, image):
        """The row of an image in the pass before; in the first pass, {"image": name}."""
        place = self.source[image]
        return next(rows_at([place])) if place else {"image": image}

    def rows(self):
        """Yield the row of each of `images`, read only when it is asked for."""
        return map(self.row, self.images)

    def write(self, row):
        """Append the row of an image. It stays in the file, whatever happens next."""
        self.appender.write(row)
        self.errors += "error" in row
        self.bar.set_postfix(errors=self.errors, refresh=False)
        self.bar.update()

    def __exit__(self, kind, error, traceback):
        if not self.count:
            return
        try:
            if kind is None:
                for image in self.failed_before:
                    self.write(self.row(image))
        finally:
            self.bar.close()
            self.appender.file.close()
        self.seconds = time.perf_counter() - self.began
