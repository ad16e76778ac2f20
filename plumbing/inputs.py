"""What to caption: files, folders, manifests, lists and tar shards -> items, and an item's bytes.

Finding opens no image, and reads only the headers of a tar, so a million files take seconds.
Whatever is wrong with an input is an item too, with an `error`: every input is one row in the end.
Nothing is ever extracted from a tar.
"""
import os
import sys
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from plumbing import lines, tars
from plumbing.errors import InputError, printable
from plumbing.images import SUFFIXES, check_bytes, check_file, open_image

CAPTION_KEYS = ("caption", "text")


@dataclass(frozen=True, slots=True)
class Item:
    """One input. Paths are strings as given, and may hold any byte (as surrogate escapes)."""
    id: str             # unique in a run, and the same at every start with the same arguments
    name: str           # what random numbers depend on: does not say where the folder is
    image: str          # what rows call it: its path, or shard.tar/member
    path: str = ""      # the file that holds the bytes: the image, or the tar
    offset: int | None = None       # where the bytes begin in a tar; None: the whole file
    size: int = 0       # how many bytes in a tar
    target: str = ""    # the stem of files written for it: relative, stays inside its folder
    fields: dict = field(default_factory=dict, hash=False)      # of a manifest row, but its image
    extras: tuple = ()  # ("json" or "txt", offset, size) of the same sample in a tar
    error: str = ""     # why there is nothing to caption here


# ---------------------------------------------------------------- finding
def find(arguments, one_per_target=False, stdin=None):
    """Arguments -> an iterator of items, in the order of the arguments, folders sorted.

    A file that several files, folders and lists among the arguments name is found once, where the
    first names it; each row of a manifest is an item. `one_per_target` makes an item an error if an
    earlier one has its target. `stdin`, which "-" reads, is a binary file.
    """
    items = find_all(list(map(os.fspath, arguments)), stdin)
    return one_per_output(items) if one_per_target else items


def find_all(arguments, stdin):
    taken = dict.fromkeys(arguments, 1)     # one may be spelled like a line or member of another
    first = {}                              # a file -> the argument that named it first
    real_folder = lru_cache(maxsize=1024)(os.path.realpath)
    for number, argument in enumerate(arguments):
        if first.setdefault(identity(argument, real_folder), number) != number:
            continue
        plain, items = from_argument(argument, taken, stdin)
        for item in items:
            once = plain and len(arguments) > 1
            if not once or first.setdefault(identity(item.path, real_folder), number) == number:
                yield item


def from_argument(argument, taken, stdin):
    """An argument -> (whether its items are files and nothing more, its items)."""
    lower, empty = argument.lower(), "names no images"
    if argument == "-":
        file = stdin or sys.stdin.buffer
        return True, or_empty(from_lines("-", file, taken, lines.listed), "-", empty)
    if os.path.isdir(argument):
        text = "is a folder without images; name tars, manifests and lists in it one by one"
        return True, or_empty(from_folder(argument), argument, text)
    if lower.endswith(lines.COMPRESSED_TARS):
        return False, [broken(argument, tars.COMPRESSED)]
    if lower.endswith(".tar"):
        return False, or_empty(from_tar(argument, taken), argument, "holds no images")
    if lower.endswith(lines.MANIFESTS):
        return False, or_empty(from_file(argument, taken, lines.manifest_row), argument, empty)
    if lower.endswith(lines.LISTS):
        return True, or_empty(from_file(argument, taken, lines.listed), argument, empty)
    return True, [from_image(argument)]


def from_image(path):
    name = os.path.basename(path)
    try:
        check_file(printable(path), Path(path))
    except InputError:
        return broken(path, "no such image file")
    except OSError as error:
        return broken(path, f"cannot be read ({error.strerror})")
    return Item(path, name, path, path, target=target_of(name))


def or_empty(items, argument, text):
    """Items, or if there are not any, one that says so."""
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        yield broken(argument, text)


def broken(image, text, id=None, path=None):
    """The item of an input that cannot be captioned."""
    return Item(id or image, image, image, path or image, error=f"{printable(image)}: {text}")


def identity(path, real_folder=os.path.realpath):
    """Two spellings of a path are one file; a link to a file is another, with a name of its own."""
    return os.path.join(real_folder(os.path.dirname(path)), os.path.basename(path))


# ---------------------------------------------------------------- targets
def one_per_output(items):
    """Items -> the same, but an error for each whose target an earlier one has."""
    owners = {}
    for item in items:
        owner = item.id if item.error else owners.setdefault(item.target, item.id)
        if owner != item.id:
            text = f"its caption would have the same file as that of {printable(owner)}; rename one"
            item = replace(item, error=f"{printable(item.image)}: {text}")
        yield item


def target_of(name):
    return inside(os.path.splitext(name)[0])


def inside(target):
    """A path that stays below whatever folder it is joined with."""
    parts = os.path.normpath(target).split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "unnamed"


# ---------------------------------------------------------------- folders
def from_folder(folder):
    """The images of a folder, then of its subfolders. Links to folders may be loops: errors."""
    folders = [folder]
    while folders:
        place = folders.pop()
        try:
            files, subfolders, links = listing(place)
        except OSError as error:
            yield broken(place, f"this folder cannot be read ({error.strerror})")
            continue
        within = place[len(folder):].lstrip("/")
        for file in files:
            path, name = os.path.join(place, file), os.path.join(within, file)
            yield Item(path, name, path, path, target=target_of(name))
        for link in links:
            text = "links to folders are not followed; name this one as an input of its own"
            yield broken(os.path.join(place, link), text)
        folders += [os.path.join(place, name) for name in reversed(subfolders)]


def listing(place):
    """Sorted names in a folder: of its images, its subfolders, and its links to folders."""
    files, subfolders, links = [], [], []
    with os.scandir(place) as entries:
        for entry in entries:
            names = files
            if entry.is_dir(follow_symlinks=False):
                names = subfolders
            elif entry.is_symlink() and os.path.isdir(entry.path):
                names = links
            if names is not files or entry.name.lower().endswith(SUFFIXES):
                names.append(entry.name)
    return sorted(files), sorted(subfolders), sorted(links)


# ---------------------------------------------------------------- manifests and lists
def from_file(path, taken, parse):
    """The items of a manifest or list, line by line."""
    try:
        check_file(printable(path), Path(path))
        with open(path, "rb") as file:
            yield from from_lines(path, file, taken, parse)
    except InputError:
        yield broken(path, "no such file")
    except OSError as error:
        yield broken(path, f"cannot be read ({error.strerror})")


def from_lines(source, file, taken, parse):
    """Each line that is not blank -> an item, by parse(line) -> (path, other fields)."""
    folder = os.path.dirname(source)
    for number, line in enumerate(lines.read_lines(file), start=1):
        if not line.strip():
            continue
        line_id = f"{source}:{number}"
        id = f"{line_id}#2" if line_id in taken else line_id
        try:
            name, fields = parse(line)
            image = os.path.join(folder, name)
            yield Item(id, name, image, image, target=target_of(name), fields=fields)
        except InputError as error:
            yield broken(line_id, str(error), id, source)


# ---------------------------------------------------------------- tar shards
def from_tar(path, taken):
    """The images of a tar, sample by sample; then what is wrong with the tar as a whole."""
    taken, damage = dict(taken), []
    for key, headers in tars.samples(path, damage):
        for item in from_sample(path, key, headers):
            yield replace(item, id=unique(item.id, taken))
    for text in damage:
        yield broken(path, text)


def unique(id, taken):
    """The id, with a number if it is taken; `taken` counts."""
    numbered = id
    while numbered in taken:
        taken[id] += 1
        numbered = f"{id}#{taken[id]}"
    taken[numbered] = 1
    return numbered


def from_sample(path, key, headers):
    """The members of a sample -> an item for each image and for each member that cannot be read."""
    target = f"{target_of(os.path.basename(path))}/{inside(key)}"
    good = []
    for header in headers:
        if problem := tars.problem(header):
            yield broken(f"{path}/{header.name}", problem, path=path)
        else:
            good.append(header)
    extras = tuple((kind, header.offset_data, header.size) for header in good
                   if (kind := tars.extension(header.name)) in ("json", "txt"))
    images = [header for header in good if header.name.lower().endswith(SUFFIXES)]
    for header in images:
        image = f"{path}/{header.name}"
        place = path, header.offset_data, header.size
        yield Item(image, header.name, image, *place, target, extras=extras)
    if extras and not images:
        yield broken(f"{path}/{key}", "a sample without an image", path=path)


# ---------------------------------------------------------------- reading
def check_item(item):
    if item.error:
        raise InputError(item.error)
    if os.path.isdir(item.path):
        raise InputError(f"{printable(item.image)}: is a folder; name it as an input of its own")


def read(item):
    """The bytes of an item's image. InputError: one line."""
    check_item(item)
    name, path = printable(item.image), Path(item.path)
    try:
        check_file(name, path)
        size = path.stat().st_size if item.offset is None else item.size
        check_bytes(name, size)
        with path.open("rb") as file:
            file.seek(item.offset or 0)
            data = file.read(size)
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from None
    if len(data) < size:
        raise InputError(f"{name}: cut off, {len(data)} of {size} bytes are there")
    return data


def open_item(item):
    """The image of an item: RGB, upright. InputError: one line."""
    check_item(item)
    return open_image(item.path if item.offset is None else read(item), item.image)


def details(item):
    """What an item comes with -> (its fields, its caption so far or None). InputError: one line.

    The caption is the txt in a tar, or a field, which then is not among the fields.
    """
    fields, text = dict(item.fields), None
    for kind, offset, size in item.extras:
        image = f"{item.image} ({kind})"
        data = read(replace(item, image=image, offset=offset, size=size))
        if kind == "txt":
            text = data.decode("utf-8", "replace").strip()
            continue
        try:
            fields |= lines.parse_object(data)
        except InputError as error:
            raise InputError(f"{printable(image)}: {error}") from None
    return fields, text or pop_caption(fields)


def pop_caption(fields):
    """Take the caption out of fields: a text, or a list of texts as lines."""
    for key in CAPTION_KEYS:
        value = fields.get(key)
        texts = value if isinstance(value, list) else [value]
        if texts and all(isinstance(text, str) and text.strip() for text in texts):
            del fields[key]
            return "\n".join(text.strip() for text in texts)
    return None
