"""The lines of manifests (a JSON object each) and of lists (a path each)."""
import json
import math
import os

from plumbing.errors import InputError, printable

MANIFESTS = (".jsonl", ".ndjson")
LISTS = (".txt",)
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst",
                   ".tar.lz4")
IMAGE_KEYS = ("image", "file_name", "image_path")   # of a manifest row: the first that is there
MAX_LINE = 2 ** 24      # bytes: a longer line is not metadata
MAX_PATH = 10_000       # characters: no file system has as many


def read_lines(file):
    """Lines without their ends and byte order mark; of one that is too long, the beginning."""
    mark = b"\xef\xbb\xbf"
    while line := file.readline(MAX_LINE + 2):
        end = line
        while not end.endswith(b"\n") and (end := file.readline(MAX_LINE)):
            pass
        yield line.removeprefix(mark).removesuffix(b"\n").removesuffix(b"\r")
        mark = b""


def listed(line):
    """A line of a list -> the path of an image."""
    name = os.fsdecode(line)
    if name.lower().endswith((".tar", *COMPRESSED_TARS, *MANIFESTS, *LISTS)):
        raise InputError(f"{printable(name)} is not an image; name it as an input of its own")
    return checked_name(name), {}


def manifest_row(line):
    """A line of a manifest -> the path of its image, and its other fields."""
    fields = parse_object(line)
    for key in IMAGE_KEYS:
        if isinstance(fields.get(key), str) and fields[key]:
            return checked_name(fields.pop(key)), fields
    raise InputError(f"none of {', '.join(IMAGE_KEYS)} is the path of an image")


def checked_name(name):
    """InputError for what no file can be called."""
    try:
        if len(name) <= MAX_PATH and b"\0" not in os.fsencode(name):
            return name
    except UnicodeEncodeError:      # half of a surrogate pair, which JSON can spell
        pass
    raise InputError(f"{name[:100]!r} cannot be the path of a file")


def finite(text):
    value = float(text)
    return value if math.isfinite(value) else None


def parse_object(data):
    """The JSON object in some bytes. NaN and 1e999, which rows could not hold, become null."""
    if len(data) > MAX_LINE:
        raise InputError(f"more than the {MAX_LINE} bytes that are allowed")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError):
        raise InputError("not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise InputError("not a JSON object")
    return value
