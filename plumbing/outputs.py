"""What trainers read of a captioning job: text files, tar shards, and one merged result.

All of it is made of rows (see jobs.py), and appears under its name only when it is whole: whatever
a kill prevents, the next start makes of the same rows.
"""
import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

from plumbing import files
from plumbing.errors import InputError, explained, printable
from plumbing.shards import NAMES

# What is wrong with the disk or folder, not with one file name in it: no row is to blame for it.
SYSTEM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
          errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}
INTERNAL = ("fields", "target", "source")   # of a row in rows/: not in a result
RESERVED = ("image", "caption", "finish", "tokens", "width", "height", "error")


def relative(path, folder, real=os.path.realpath):
    """A path as seen from a folder, links before its last part followed: ".." of a folder that is a
    link leads out of the folder that it points to. `real` may remember folders."""
    if path == "-":
        return path
    place = os.path.join(real(os.path.dirname(path)), os.path.basename(path))
    return os.path.relpath(place, real(os.fspath(folder)))


# ---------------------------------------------------------------- rows
def rows_of(path, start=0):
    """Yield (where it begins, where it ends, row) of the rows from an offset on.

    A last line without its newline was torn by a kill, or is just being written: it does not count.
    Nor does a line that is not JSON, which only a power failure leaves: its image is done again.
    """
    with open(path, "rb") as file:
        file.seek(start)
        while (line := file.readline()).endswith(b"\n"):
            end = start + len(line)
            with contextlib.suppress(ValueError):
                yield start, end, json.loads(line)
            start = end


def lines_of(caption):
    """A row's caption, a text or several -> lines of a text file."""
    captions = caption if isinstance(caption, list) else [caption]
    lines = [line.strip() for text in captions for line in text.splitlines() if line.strip()]
    assert lines, "a row without any text is an error row"
    return lines


def public(row, image, keys=("image", "caption")):
    """A row as results have it, its input's fields behind ours: of the same name, input_NAME."""
    names = dict(zip(("image", "caption"), keys))
    result = {names.get(key, key): image if key == "image" else value
              for key, value in row.items() if key not in INTERNAL}
    reserved = {*RESERVED, *keys, *result}
    return result | {f"input_{key}" if key in reserved else key: value
                     for key, value in row["fields"].items()}


# ---------------------------------------------------------------- text files
def text_path(item, out=None):
    """The text file of an item: its target under `out`, or without it beside the image."""
    if out is not None:
        return Path(out, f"{item.target}.txt")
    if item.offset is not None:
        raise InputError(f"{printable(item.image)}: there is no place beside a member of a tar; "
                         "give --out")
    return Path(f"{os.path.splitext(item.path)[0]}.txt")


def beside(items):
    """Items -> the same, but errors where the text file beside one would be an earlier one's."""
    owners = {}
    for item in items:
        try:
            owner = item.error or owners.setdefault(text_path(item), item.image)
            if not item.error and owner != item.image:
                raise InputError(f"{printable(item.image)}: its text would be in the same file as "
                                 f"that of {printable(owner)}; rename one")
        except InputError as error:
            item = replace(item, error=str(error))
        yield item


def text_in(path):
    """The text of a file; None where there is no such file, or nothing in it."""
    if not os.path.isfile(path):
        return None
    return path.read_text("utf-8-sig", "replace").strip() or None


def replace_text(path, caption, append=False):
    """Write a caption to a text file, a line each where there are several; errors as of
    prepare_text."""
    if temporary := prepare_text(path, caption, append):
        os.replace(temporary, path)


def prepare_text(path, caption, append=False):
    """Write what is to become a text file -> its temporary path, or None if it is as it should be.

    `append`: behind the lines that are there, unless these are already the last of them.
    InputError if no such file can be; OSError for what is wrong with the whole disk or folder.

    The files are not synced, as a million of them would take hours: after a power failure, some
    may be empty.
    """
    lines = [line.encode("utf-8", "replace") for line in lines_of(caption)]
    # of a length of its own: with ".tmp" behind it, a name could be too long
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    temporary = path.parent / f".{digest}.tmp"
    try:
        os.makedirs(path.parent, exist_ok=True)
        there = path.read_bytes() if append and path.exists() else b""
        there = there.removeprefix(b"\xef\xbb\xbf").splitlines()
        if there and there[-len(lines):] == lines:
            return None
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary.write_bytes(b"".join(line + b"\n" for line in there + lines))
        return temporary
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno in SYSTEM:
            raise
        raise InputError(f"{printable(path)}: {error.strerror}; rename the image") from None


# ---------------------------------------------------------------- tar shards
def pack(out, rows, size, read, rest=False):
    """Make tar shards of `size` samples of a file of rows, as far as it goes; `rest`: of all.

    read(row) gives the bytes of its image, or raises an InputError: it is left out then.

    shards/NAME-NUMBER.json says which bytes of the rows are in the tar of that name. It is written
    after the tar, so a tar without one is made again: nothing is left out, and nothing is twice.
    """
    samples, (number, start) = [], packed(out, rows.stem)
    end = start
    for _, end, row in rows_of(rows, start):
        if "caption" in row:
            samples.append(row)
        if len(samples) == size:
            write_shard(out, f"{rows.stem}-{number:05d}", samples, start, end, read)
            number, start, samples = number + 1, end, []
    if rest and samples:
        write_shard(out, f"{rows.stem}-{number:05d}", samples, start, end, read)


def packed(out, name):
    """The number of tar shards of a file of rows, and where in it the last of them ends."""
    end = 0
    for number in itertools.count():
        sidecar = out / f"shards/{name}-{number:05d}.json"
        if not sidecar.is_file():
            return number, end
        end = json.loads(sidecar.read_bytes())["end"]


def write_shard(out, name, samples, start, end, read):
    """A tar of samples, then the file beside it."""
    (out / "shards").mkdir(exist_ok=True)
    taken, left_out = set(), {}
    with files.whole(out / f"shards/{name}.tar") as path, \
         tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as tar:
        for row in samples:
            try:
                data = read(row)
            except InputError as error:
                left_out[row["id"]] = str(error)
                continue
            key, suffix = key_of(row, taken)
            details = public({k: v for k, v in row.items() if k != "id"}, row["image"])
            add(tar, f"{key}.{suffix}", data)
            add(tar, f"{key}.txt", "\n".join(lines_of(row["caption"])).encode("utf-8", "replace"))
            add(tar, f"{key}.json", json.dumps(details).encode())
    files.write_json(out / f"shards/{name}.json",
                     {"start": start, "end": end, "captions": len(samples) - len(left_out),
                      "left_out": left_out})


def key_of(row, taken):
    """A sample's key, unlike those that are taken in its tar, and the suffix of its image.

    From a tar, both are as they were there; only where another of its name is in the same new tar
    does the old tar's name go before the key. Otherwise the key is the target, without dots: what
    follows the first one would be the suffix.
    """
    base = os.path.basename(row["image"])
    if row["source"][1] is None:
        folder, stem = os.path.split(row["target"])
        keys = [os.path.join(folder, stem.replace(".", "_"))]
        suffix = os.path.splitext(base)[1][1:] or "jpg"     # readers look into the bytes
    else:
        keys = [row["target"].partition("/")[2], row["target"].replace(".", "_")]
        suffix = base.partition(".")[2]
    numbered = (f"{keys[-1]}-{n}" for n in itertools.count(2))
    key = next(key for key in itertools.chain(keys, numbered) if key not in taken)
    taken.add(key)
    return key, suffix


def add(tar, name, data):
    """A member without a time, owner or place: the same rows make the same tar."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


# ---------------------------------------------------------------- the merged result
def merge(out, into=None, keys=("image", "caption"), parquet=False):
    """Write one result of all rows, sorted by id -> (captions, errors).

    Each id is there once, with its caption if there is one. It is out/captions.jsonl, or the file
    `into`, and with `parquet` also a .parquet beside it. Images are relative to that file's folder.
    `keys` are what it calls image and caption. Only places of rows are in memory, not rows. One
    process at a time: who calls it holds a lock.
    """
    into = Path(into) if into else out / "captions.jsonl"
    out = Path(out)
    # a file name need not be text: what is not is written as JSON's escape, such as \udcff
    as_text = {"mode": "w", "encoding": "utf-8", "errors": "backslashreplace"}
    with explained(into):
        places, errors = places_of(out)
        with files.whole(into) as path, path.open(**as_text) as file:
            for row in merged_rows(places, out, into.parent, keys):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if parquet:
            write_parquet(into, keys)
    return len(places) - errors, errors


def places_of(out):
    """{id: (file, offset)} of the row of each id, and how many of them are errors."""
    good, failed = {}, {}
    for path in sorted((out / "rows").glob(f"{NAMES}.jsonl")):
        for start, _, row in rows_of(path):
            (failed if "error" in row else good).setdefault(row["id"], (path, start))
    return failed | good, len(failed.keys() - good.keys())


def merged_rows(places, out, folder, keys):
    """Yield the rows of a result in a folder, sorted by id."""
    shift = os.path.relpath(os.path.realpath(out), os.path.realpath(folder))
    opened = {}
    with contextlib.ExitStack() as stack:
        for rows, start in (places[id] for id in sorted(places)):
            if rows not in opened and len(opened) == 100:       # systems allow a few hundred
                stack.close()
                opened.clear()
            if rows not in opened:
                opened[rows] = stack.enter_context(rows.open("rb"))
            opened[rows].seek(start)
            row = json.loads(opened[rows].readline())
            path = row["source"][0]
            place = path if path == "-" else os.path.normpath(os.path.join(shift, path))
            yield public(row, place + row["image"][len(path):], keys)


def write_parquet(into, keys):
    """A result again as a .parquet. What has no column of its own is in `more`, as JSON.

    The type of a column must be known before its first row, but a manifest may have any fields.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError("--write parquet needs pyarrow: pip install pyarrow") from None
    text, number = pa.string(), pa.int64()
    with into.open(encoding="utf-8") as file:
        many = any(isinstance(json.loads(line).get(keys[1]), list) for line in file)
    types = {"id": text, keys[0]: text, keys[1]: pa.list_(text) if many else text,
             "width": number, "height": number, "error": text, "more": text}
    with (files.whole(into.with_suffix(".parquet")) as path, into.open(encoding="utf-8") as file,
          pq.ParquetWriter(path, pa.schema(list(types.items()))) as writer):
        while lines := list(itertools.islice(file, 10_000)):
            rows = [parquet_row(json.loads(line), types, many, keys[1]) for line in lines]
            writer.write_table(pa.Table.from_pylist(rows, writer.schema))


def parquet_row(row, types, many, caption):
    """The columns of a row."""
    columns = {key: utf8(row.pop(key, None)) for key in types if key != "more"}
    if many and isinstance(columns[caption], str):
        columns[caption] = [columns[caption]]
    return {**columns, "more": json.dumps(row)}


def utf8(value):
    """A name may have bytes that are not UTF-8: they are spelled out, as in caf\\udce9.png."""
    if isinstance(value, list):
        return list(map(utf8, value))
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "backslashreplace").decode()
