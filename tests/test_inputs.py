"""plumbing/inputs.py, lines.py and tars.py: every input is one item, which opens or is one line."""

import io
import json
import math
import os
import pickle
import random
import subprocess
import tarfile
from pathlib import Path

import corpus
import numpy as np
import pytest
from corpus import CORPUS, NAMES, encode, photo, tar, write

from plumbing import inputs, lines
from plumbing.errors import InputError
from plumbing.inputs import details, find, open_item, read

GOOD = CORPUS["png rgb"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(path, data=GOOD):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, data)


def outcome(item):
    """The image, or the text of the InputError, which is one line. Else the test fails."""
    try:
        image = open_item(item)
    except InputError as error:
        assert str(error).isprintable() and str(error)
        return str(error)
    assert image.mode == "RGB" and min(image.size) > 0
    return image


def ids(*arguments, **options):
    return [item.id for item in find(list(arguments), **options)]


def errors(*arguments, **options):
    return [item.error for item in find(list(arguments), **options) if item.error]


# ---------------------------------------------------------------- the corpus
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "all"
    corpus.make_corpus(folder)
    return folder


def everything(folder):
    return {path: path.lstat().st_mtime_ns for path in [folder.parent, *folder.rglob("*")]}


def test_the_corpus_is_large(folder):
    files = [path for path in everything(folder) if not path.is_dir()]
    assert len(files) >= 500 and len(list(find(corpus.arguments(folder)))) >= 800


def test_every_input_opens_or_is_one_line(folder, capfd):
    before = everything(folder)
    for item in find(corpus.arguments(folder)):
        image = outcome(item)
        try:
            data = read(item)
        except InputError as error:
            assert isinstance(image, str) and str(error).isprintable()
        else:
            assert item.offset is None or len(data) == item.size
        try:
            fields, existing = details(item)
            json.dumps(fields, allow_nan=False)
            assert existing is None or existing.strip()
        except InputError as error:
            assert "json" in str(error) and str(error).isprintable()
    assert everything(folder) == before  # nothing was extracted, and nothing written


def test_ids_are_unique_and_the_same_at_every_start(folder):
    arguments = corpus.arguments(folder)
    items = list(find(arguments))
    assert items == list(find(arguments))
    assert len({item.id for item in items}) == len(items)
    assert pickle.loads(pickle.dumps(items)) == items and len(set(items)) == len(items)


def test_targets_stay_inside(folder):
    for item in find(corpus.arguments(folder)):
        parts = item.target.split("/")
        assert bool(item.error) or item.target
        assert item.error or not {"", ".", ".."} & set(parts)
        assert "\0" not in item.target


def test_one_item_per_target(folder):
    arguments = corpus.arguments(folder)
    items = list(find(arguments, one_per_target=True))
    targets = [item.target for item in items if not item.error]
    assert len(set(targets)) == len(targets)
    assert [item.id for item in items] == ids(*arguments)
    assert all(isinstance(outcome(item), str) for item in items if item.error)


def test_broken_files_are_errors_and_good_ones_are_not(folder):
    root = f"{folder}/"
    outcomes = {
        item.id.removeprefix(root): outcome(item) for item in find(corpus.arguments(folder))
    }
    for name, got in outcomes.items():
        parts = name.split("/")
        if "whole" in parts or parts[1:2] in (["PNG"], ["TIFF"], ["WEBP"], ["JPEG"], ["AVIF"]):
            assert not isinstance(got, str), got
        if parts[-1].startswith(("bomb ", "not ")):
            assert isinstance(got, str), name


def test_the_corpus_in_another_order_is_the_same_images(folder):
    arguments = corpus.arguments(folder)
    shuffled = random.Random(0).sample(arguments, len(arguments))
    assert {i.path for i in find(arguments)} == {i.path for i in find(shuffled)}


# ---------------------------------------------------------------- files and folders
def test_folders_are_sorted_and_searched(here):
    for name in (
        "b.jpg",
        "a/z.PNG",
        "a/sub/b.avif",
        "a/notes.txt",
        "a/c.webp",
        "c/folder.jpg/x.gif",
    ):
        put(here / name)
    (here / "a" / "empty.jpg").mkdir()
    items = list(find(["b.jpg", "a", "c/"]))
    assert [(item.id, item.name, item.target) for item in items] == [
        ("b.jpg", "b.jpg", "b"),
        ("a/c.webp", "c.webp", "c"),
        ("a/z.PNG", "z.PNG", "z"),
        ("a/sub/b.avif", "sub/b.avif", "sub/b"),
        ("c/folder.jpg/x.gif", "folder.jpg/x.gif", "folder.jpg/x"),
    ]
    assert all(item.image == item.path == item.id for item in items)
    assert [i.name for i in find([here / "a"])] == [i.name for i in find(["./a//"])]


def test_a_file_that_is_named_twice_is_found_once(here):
    for name in ("a/1.jpg", "a/2.jpg", "a/b/3.jpg"):
        put(here / name)
    (here / "list.txt").write_text("a/2.jpg\na/1.jpg\na/1.jpg\n")
    put(here / "s.tar", tar(("0.jpg", GOOD)))
    assert ids("a", "./a", "a/1.jpg", "a/b", str(here / "a" / "2.jpg")) == [
        *("a/1.jpg", "a/2.jpg", "a/b/3.jpg")
    ]
    assert ids("a/1.jpg", "a/1.jpg", "a/../a/1.jpg", "a/b", "a") == [
        *("a/1.jpg", "a/b/3.jpg", "a/2.jpg")
    ]
    assert ids("a/1.jpg", "list.txt") == ["a/1.jpg", "list.txt:1"]
    assert ids("list.txt") == ["list.txt:1", "list.txt:2", "list.txt:3"]
    assert ids("s.tar", "./s.tar") == ["s.tar/0.jpg"]


def test_what_is_not_there(here):
    (here / "empty").mkdir()
    put(here / "notes" / "a.txt", b"")
    os.mkfifo(here / "pipe.jpg")
    missing = [
        "empty",
        "notes",
        "x.jpg",
        "x.tar",
        "x.jsonl",
        "x.txt",
        "x.tar.gz",
        "x" * 300,
        "pipe.jpg",
    ]
    items = list(find(missing))
    assert [item.id for item in items] == missing
    assert all(item.error.startswith(f"{item.id}: ") for item in items)
    assert "without images" in items[0].error and "no such image file" in items[2].error


def test_links(here):
    put(here / "real" / "a.jpg")
    (here / "in").mkdir()
    (here / "in" / "a.jpg").symlink_to("../real/a.jpg")
    (here / "in" / "loop").symlink_to(".")
    (here / "in" / "self.jpg").symlink_to("self.jpg")
    (here / "in" / "folder.jpg").symlink_to("../real")
    got = {item.id: outcome(item) for item in find(["in"])}
    assert set(got) == {"in/a.jpg", "in/loop", "in/self.jpg", "in/folder.jpg"}
    assert not isinstance(got["in/a.jpg"], str) and "not followed" in got["in/loop"]
    assert "no such image file" in got["in/self.jpg"]


def test_a_folder_that_cannot_be_read(here, monkeypatch):
    put(here / "a" / "1.jpg")
    put(here / "b" / "2.jpg")
    scan = os.scandir

    def denied(place):  # root, who may run this test, may read anything
        if place == "./a":
            raise PermissionError(13, "Permission denied")
        return scan(place)

    monkeypatch.setattr(os, "scandir", denied)
    assert [item.error for item in find(["."])] == [
        "./a: this folder cannot be read (Permission denied)",
        "",
    ]


def test_odd_names(here):
    for name in NAMES:
        put(here / "in" / name)
    items = list(find(["in"]))
    assert sorted(item.name for item in items) == sorted(NAMES)
    assert not any(isinstance(outcome(item), str) for item in items)
    targets = {item.name: item.target for item in items}
    assert targets["a.b.c..jpg"] == "a.b.c." and targets[".hidden.jpg"] == ".hidden"
    assert targets["...jpg"] == "...jpg" and targets["line\nbreak.jpg"] == "line\nbreak"


def test_a_very_deep_folder(here):
    place = here / "deep"
    place.mkdir()
    descriptor = os.open(place, os.O_RDONLY)
    for _ in range(1100):  # more than Python recurses
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(os.open("a.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)
    try:
        assert ids("deep") == ["deep" + "/d" * 1100 + "/a.jpg"]
    finally:
        subprocess.run(["rm", "-r", place], check=True)  # shutil, and so pytest, cannot


def test_two_images_for_one_caption_file(here):
    for name in ("a/1.jpg", "a/1.png", "b/1.jpg", "b/2.jpg"):
        put(here / name)
    items = list(find(["a", "b"], one_per_target=True))
    assert [bool(item.error) for item in items] == [False, True, True, False]
    assert "a/1.jpg" in items[1].error and "a/1.jpg" in items[2].error
    assert not errors("a", "b")


# ---------------------------------------------------------------- manifests and lists
def test_manifests(here):
    put(here / "m" / "in" / "a.png")
    rows = [
        {
            "image": "in/a.png",
            "caption": " old ",
            "id": 5,
            "n": float("nan"),
            "x": [-math.inf, 2.5],
        },
        {"file_name": "in/a.png", "text": ["x", "y "]},
        {"image": 3, "image_path": str(here / "m" / "in" / "a.png"), "text": ""},
    ]
    text = "\n\n".join(json.dumps(row) for row in rows)
    put(here / "m" / "rows.jsonl", f'{text}\n{{"image":\n'.encode())
    first, second, third, last = find(["m/rows.jsonl"])
    assert (first.id, first.name, first.image) == ("m/rows.jsonl:1", "in/a.png", "m/in/a.png")
    assert first.target == second.target == "in/a" and third.target.endswith("m/in/a")
    assert second.id == "m/rows.jsonl:3"  # blank lines count as lines
    assert details(first) == ({"id": 5, "n": None, "x": [None, 2.5]}, "old")
    assert details(second) == ({}, "x\ny")
    assert details(third) == ({"image": 3, "text": ""}, None)
    assert last.id == "m/rows.jsonl:6" and last.error == "m/rows.jsonl:6: not JSON in UTF-8"
    assert not any(isinstance(outcome(item), str) for item in (first, second, third))


@pytest.mark.parametrize(
    "written, target",
    [
        ("a/b.c.jpg", "a/b.c"),
        ("../../a.jpg", "a"),
        ("/etc/a.jpg", "etc/a"),
        ("//etc//a.jpg", "etc/a"),
        ("a/../b.jpg", "b"),
        ("a/./b.jpg", "a/b"),
        ("..", "unnamed"),
        ("../..", "unnamed"),
        (".", "unnamed"),
        ("/", "unnamed"),
        ("a/...jpg", "a/...jpg"),
        ("x/.. .jpg", "x/.. "),
        ("~/a.jpg", "~/a"),
        ("..\\a.jpg", "..\\a"),
        ("a", "a"),
    ],
)
def test_targets(written, target):
    (item,) = find(["-"], stdin=io.BytesIO(written.encode()))
    assert item.target == target and item.name == written


def test_lists(here):
    put(here / "in" / os.fsdecode(b"\xff .png"))
    put(here / "in" / "list.txt", b"\xef\xbb\xbf\xff .png\r\n\r\n\xff .png\nx.tar\n")
    first, second, third = find(["in/list.txt"])
    assert (first.id, first.name) == ("in/list.txt:1", "\udcff .png")
    assert second.id == "in/list.txt:3" and second.path == first.path
    assert not isinstance(outcome(first), str) and "not an image" in third.error
    (item,) = find(["-"], stdin=io.BytesIO(b"in/\xff .png"))
    assert item.id == "-:1" and not isinstance(outcome(item), str)
    (item,) = find(["-"], stdin=io.BytesIO(b"in\n"))
    assert "is a folder" in outcome(item)


def test_a_line_that_never_ends(here, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE", 100)
    put(here / "m.jsonl", b'{"image": "' + b"a" * 5000 + b'"}\n{"image": "b.jpg"}\n' + b"[" * 999)
    items = list(find(["m.jsonl"]))
    assert [item.id for item in items] == ["m.jsonl:1", "m.jsonl:2", "m.jsonl:3"]
    assert "100 bytes" in items[0].error and not items[1].error and items[2].error


def test_an_argument_that_is_spelled_like_a_line_or_a_member(here):
    for name in ("a.jpg", "m.jsonl:1"):
        put(here / name)
    put(here / "m.jsonl", b'{"image": "a.jpg"}\n')
    put(
        here / "s.tar",
        tar(("0.jpg", GOOD), ("0.jpg", GOOD), ("0.jpg#2", GOOD), ("0.jpg#2.png", GOOD)),
    )
    got = ids("m.jsonl:1", "s.tar/0.jpg", "m.jsonl", "s.tar")
    assert len(set(got)) == len(got) == 6


# ---------------------------------------------------------------- tars
def test_tars(here):
    row = b'{"url": "x", "similarity": NaN, "caption": "from json"}'
    data = tar(
        ("in", (b"5", "")),
        ("in/0.jpg", GOOD),
        ("in/0.json", row),
        ("in/0.TXT", b"from txt\n"),
        ("in/0.npy", b""),
        ("./1.a.png", CORPUS["gif"]),
        ("./1.json", row),
        ("2.jpg", b""),
    )
    put(here / "d" / "s.tar", data)
    first, second, third = find(["d/s.tar"])
    assert (first.id, first.image, first.name) == (
        "d/s.tar/in/0.jpg",
        "d/s.tar/in/0.jpg",
        "in/0.jpg",
    )
    assert first.path == "d/s.tar" and [item.target for item in (first, second)] == [
        "s/in/0",
        "s/1",
    ]
    assert read(first) == GOOD and read(second) == CORPUS["gif"] and read(third) == b""
    assert np.array_equal(open_item(first), photo())
    assert details(first)[1] == "from txt" and details(first)[0]["similarity"] is None
    assert details(second) == ({"url": "x", "similarity": None}, "from json")
    assert details(third) == ({}, None)
    assert outcome(third).startswith("d/s.tar/2.jpg: cannot be read as any of")


def test_members_that_are_not_read(folder):
    got = list(find([str(folder / "types.tar")]))
    assert [not item.error for item in got] == [True, *[False] * 7, True]
    got = {item.name: item for item in find([str(folder / "traversal.tar")])}
    outside = {item.name.split("tar/", 1)[1] for item in got.values() if item.error}
    assert outside == {"../../evil.jpg", "/etc/evil.jpg", "a/../../evil.jpg", ".."}
    assert got["./dot.jpg"].target == "traversal/dot" and got["x//y.jpg"].target == "traversal/x/y"
    (item,) = find([str(folder / "sparse.tar")])
    assert "sparse" in item.error


def test_duplicates(folder):
    path = str(folder / "duplicates.tar")
    items = list(find([path], one_per_target=True))
    names = [item.id.removeprefix(f"{path}/") for item in items]
    assert names == ["0.jpg#2", "0.jpg", "0.jpg#3", "0.jpg#4"]  # the first is a pipe of that name
    assert [bool(item.error) for item in items] == [True, False, True, True]
    path = folder.parent / "many.tar"
    write(path, tar(*[("a.jpg", b"")] * 5000))
    assert len(set(ids(str(path)))) == 5000  # in no time


def test_a_tar_that_is_cut_anywhere(here):
    """Images that are whole before the cut are read, then comes one error."""
    small = encode(photo(9, 9), "PNG")
    names = [f"{number}.{kind}" for number in range(3) for kind in ("png", "json")]
    data = tar(*((name, small if "png" in name else b"{}") for name in names))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        ends = [m.offset_data + m.size for m in archive if "png" in m.name]
        last = archive.offset
    for length in range(0, last + 1024, 128):
        items = list(find([str(put(here / "cut.tar", data[:length]))]))
        good = [item for item in items if not item.error]
        assert len(good) == sum(end <= length for end in ends), length
        assert all(read(item) == small for item in good)
        assert len(items) - len(good) == (length <= last), length
        assert items[len(good) :] == items[-1:] or length > last


def test_damaged_tars(folder):
    for name in ("joined", "a hole", "no end", "damaged header", "backwards", "negative size"):
        items = list(find([str(folder / f"{name}.tar")]))
        assert [bool(item.error) for item in items][-1:] == [True], name
        assert not items[0].error and not isinstance(outcome(items[0]), str)
        assert sum(bool(item.error) for item in items) == 1
    assert "decompress" in errors(str(folder / "compressed.tar"))[0]
    assert "decompress" in errors(str(folder / "whole.tar.gz"))[0]


def test_samples_without_an_image(folder):
    items = list(find([str(folder / "no image.tar")]))
    assert [item.id.split("tar/")[1] for item in items] == ["0", "1.jpg", "2"]
    assert [bool(item.error) for item in items] == [True, False, True]
    assert "no images" in errors(str(folder / "other kinds.tar"))[0]


def test_broken_metadata_is_an_error_that_names_it(folder):
    first, second = find([str(folder / "bad json.tar")])
    for item in (first, second):
        with pytest.raises(InputError, match=r"bad json\.tar/.*json"):
            details(item)


# ---------------------------------------------------------------- reading
def test_what_changes_between_finding_and_reading(here, monkeypatch):
    put(here / "a.jpg")
    path = put(here / "s.tar", tar(("0.jpg", GOOD)))
    image, member = find(["a.jpg", "s.tar"])
    os.truncate(path, 600)
    assert "cut off, 88 of" in outcome(member)
    (here / "a.jpg").unlink()
    path.unlink()
    assert "no such image file" in outcome(image) and "no such image file" in outcome(member)
    os.mkfifo(path)
    assert "no such image file" in outcome(member)
    with pytest.raises(InputError, match="no such"):
        read(image)


def test_members_that_are_too_large_are_not_read(here):
    path = put(here / "s.tar", tar(("0.jpg", GOOD)))
    data = corpus.with_size(path.read_bytes(), b"\x80" + bytes(6) + (2**31).to_bytes(5, "big"))
    put(path, data)
    os.truncate(path, 2**31 + 4096)  # takes no room on the disk
    (item,) = find(["s.tar"])
    assert item.size == 2**31 and "allowed" in outcome(item)


def test_real_photographs_are_found_and_opened(here):
    names = ["astronaut", "coffee", "chelsea"]
    import skimage.data
    from PIL import Image

    files = {f"{name}.avif": Image.fromarray(getattr(skimage.data, name)()) for name in names}
    for name, image in files.items():
        put(here / "in" / name, encode(image, "AVIF", speed=10))
    put(here / "s.tar", tar(*((name, (here / "in" / name).read_bytes()) for name in files)))
    loose, packed = list(find(["in"])), list(find(["s.tar"]))
    assert [item.name for item in loose] == sorted(files)
    for item, member in zip(loose, sorted(packed, key=lambda item: item.name), strict=True):
        assert read(item) == read(member)
        assert open_item(item).tobytes() == open_item(member).tobytes()


def test_finding_opens_no_image(here, monkeypatch):
    for number in range(50):
        put(here / "in" / f"{number}.jpg")
    put(here / "list.txt", b"in/1.jpg\n")
    put(here / "m.jsonl", b'{"image": "in/1.jpg"}\n')
    opened = []
    monkeypatch.setattr(inputs, "open_image", lambda *_: opened.append(_))
    monkeypatch.setattr(Path, "open", lambda *_: opened.append(_))
    assert len(list(find(["in", "list.txt", "m.jsonl", "in/3.jpg"]))) == 51 and not opened
