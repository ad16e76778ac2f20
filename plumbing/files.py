"""Files that appear under their name only once they are whole and on disk, and the log of a run."""
import contextlib
import json
import os
from pathlib import Path


@contextlib.contextmanager
def whole(path):
    """Give a temporary path to write to; it becomes `path` only once it is whole and on disk."""
    temporary = Path(f"{path}.tmp")
    yield temporary
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def without_nan(value):
    """A value for JSON, which has no NaN and no infinities: they become None."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def write_json(path, value):
    """Write a value as JSON, and make the folder for it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_text(json.dumps(without_nan(value), indent=1) + "\n", "utf-8")


class Log:
    """out/log.jsonl, one object per step. Opened on resume, it drops what came after that step.

    Figures that are not finite, as of a skipped step, become null.
    """

    def __init__(self, out, step, ranks):
        self.path, self.ranks = Path(out) / "log.jsonl", ranks
        if ranks.is_master:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().splitlines(True) if self.path.is_file() else []
            kept = [line for line in lines
                    if line.endswith(b"\n") and json.loads(line)["step"] <= step]
            with whole(self.path) as temporary:
                temporary.write_bytes(b"".join(kept))

    def write(self, row):
        if self.ranks.is_master:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(without_nan(row)) + "\n")
