"""Files that appear under their name only once they are whole and on disk."""
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
