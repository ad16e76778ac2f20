"""caption.py over many images, end to end: inputs, outputs, trainers, workers, proofs, accidents."""

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import corpus
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageOps
from stages import CODE, read_rows, run, write_rows

import adapters
import caption
from base import open_base
from plumbing import inputs, jobs, shards
from plumbing.texts import on_one_line
from plumbing.workers import Division
from toy_world import world

TOY = CODE / "assets/toy"
KINDS = ("files", "folder", "manifest", "list", "stdin", "tar", "mixed")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Eight toy scenes, two of them in a subfolder."""
    folder = tmp_path_factory.mktemp("scenes")
    world.draw_scenes(folder, [f"mass {k}" for k in range(8)])
    (folder / "sub").mkdir()
    for name in ("00006.png", "00007.png"):
        (folder / name).rename(folder / "sub" / name)
    return folder


@pytest.fixture
def photos(scenes, tmp_path, monkeypatch):
    """A copy of the scenes in a folder where a test may write; tmp_path is the working folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(scenes, tmp_path / "photos")


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def tell(*argv, base=TOY):
    """caption.main with a toy base -> exit code."""
    return run(caption, *argv, "--base", base, "--adapters", "none")


def rows_of(out, *argv, code=0):
    """The rows of captions.jsonl after a run with --out."""
    assert tell(*argv, "--out", out) == code
    return read_rows(Path(out) / "captions.jsonl")


def captions_by_name(rows):
    return {row["image"].split("photos/")[-1].split(".tar/")[-1]: row["caption"] for row in rows}


def make_tar(path, folder, names, **extras):
    """A tar of images, each with the members of extras: {suffix: function of its name to bytes}."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.add(folder / name, name)
            for suffix, data_of in extras.items():
                member = tarfile.TarInfo(f"{os.path.splitext(name)[0]}.{suffix}")
                member.size = len(data_of(name))
                tar.addfile(member, io.BytesIO(data_of(name)))
    return path


def make_input(kind, photos, names, monkeypatch):
    """The arguments that name these photos in one of the ways that there are."""
    lines = "".join(f"photos/{name}\n" for name in names)
    if kind == "files":
        return [photos / name for name in names]
    if kind == "folder":
        return [photos]
    if kind == "manifest":
        rows = [{"image_path": f"photos/{name}"} for name in names]
        return [write_rows(photos.parent / "rows.jsonl", rows)]
    if kind == "list":
        (photos.parent / "list.txt").write_text(lines)
        return ["list.txt"]
    if kind == "stdin":
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines.encode())))
        return ["-"]
    if kind == "tar":
        return [make_tar(photos.parent / "in.tar", photos, names)]
    head, tail = make_tar(photos.parent / "in.tar", photos, names[:3]), names[3:]
    rows = [{"image": f"photos/{name}"} for name in tail[:2]]
    write_rows(photos.parent / "rows.jsonl", rows)
    return [head, "rows.jsonl", *(photos / name for name in tail[2:4]), photos / "sub"]


# ---------------------------------------------------------------- every way in, every way out
@pytest.fixture(scope="module")
def expected(scenes, tmp_path_factory):
    """{name: caption}: greedy captions do not depend on what images are called."""
    out = tmp_path_factory.mktemp("expected")
    rows = rows_of(out, scenes)
    return {str((out / row["image"]).resolve().relative_to(scenes)): row["caption"] for row in rows}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", jobs.WRITE)
def test_every_input_is_one_row_in_every_output(kind, write, photos, expected, monkeypatch):
    names = names_in(photos)
    argv = make_input(kind, photos, names, monkeypatch)
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    rows = rows_of("out", *argv, "--write", write)
    assert len({row["id"] for row in rows}) == len(rows) == len(names)
    full = {name.split("/")[-1]: text for name, text in expected.items()}
    assert {row["image"].split("/")[-1]: row["caption"] for row in rows} == full
    for row in rows:
        assert (row["width"], row["height"], row["finish"]) == (64, 64, "eos") and row["tokens"] > 1
        place = Path("out", row["image"].partition(".tar/")[0])
        assert place.is_file() or place.with_suffix(".tar").is_file()
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before
    if write == "txt":
        texts = {path.stem: path.read_bytes().decode() for path in Path("out").rglob("*.txt")}
        assert texts == {Path(name).stem: text + "\n" for name, text in full.items()}
    if write == "parquet":
        table = pyarrow.parquet.read_table("out/captions.parquet").to_pylist()
        assert [{**json.loads(row.pop("more")), **row} for row in table] == [
            {"error": None, **row} for row in rows
        ]
    if write == "webdataset":
        check_tars(photos, full)


def check_tars(photos, full):
    members = {}
    for path in Path("out/shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in members
                members[member.name] = tar.extractfile(member).read()
    assert len(members) == 3 * len(full)
    images = [name for name in members if name.endswith(".png")]
    for name in images:
        stem, base = name[:-4], name.split("/")[-1]
        source = next(path for path in photos.rglob(base))
        assert members[name] == source.read_bytes()
        assert members[f"{stem}.txt"].decode() == full[base]
        assert json.loads(members[f"{stem}.json"])["caption"] == full[base]


def test_text_files_beside_the_images(photos, expected):
    assert tell(photos, "--write", "txt") == 0
    for name, text in expected.items():
        assert (photos / name).with_suffix(".txt").read_bytes() == text.encode() + b"\n"
    assert len([path for path in photos.rglob("*") if path.is_file()]) == 2 * len(expected)


def test_the_same_command_again_does_nothing(photos, capsys):
    first = rows_of("out", photos, "--write", "webdataset")
    before = {path: path.read_bytes() for path in Path("out/shards").iterdir()}
    capsys.readouterr()
    assert rows_of("out", photos, "--write", "webdataset") == first
    assert "base " not in capsys.readouterr().err  # no model was loaded
    assert {path: path.read_bytes() for path in Path("out/shards").iterdir()} == before


# ---------------------------------------------------------------- captions that are there
OLD = "an old caption"


def with_captions(kind, photos, names):
    """Arguments for photos of which every second has an old caption."""
    old = set(names[::2])
    if kind == "txt":
        for name in old:
            path = Path("out", name).with_suffix(".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(OLD + "\n")
        return [photos, "--write", "txt"], old
    if kind == "manifest":
        rows = [
            {"image": f"photos/{name}", **({"text": OLD} if name in old else {})} for name in names
        ]
        return [write_rows(Path("rows.jsonl"), rows)], old
    tar = make_tar(Path("in.tar"), photos, names, txt=lambda name: OLD.encode() * (name in old))
    return [tar], old


@pytest.mark.parametrize("existing", ["skip", "overwrite", "append"])
@pytest.mark.parametrize("kind", ["txt", "manifest", "tar"])
def test_existing_captions(kind, existing, photos, expected):
    argv, old = with_captions(kind, photos, names_in(photos))
    rows = rows_of("out", *argv, "--existing", existing)
    assert len(rows) == len(expected)
    for name, text in captions_by_name(rows).items():
        new = expected[name]
        file = Path("out", name).with_suffix(".txt")
        if name not in old:
            assert text == new
        elif existing == "append":
            assert text == (new if kind == "txt" else [OLD, new])
        else:
            assert text == (OLD if existing == "skip" else new)
        if kind == "txt":
            lines = [OLD, new] if existing == "append" and name in old else [text]
            assert file.read_text() == "".join(line + "\n" for line in lines)
    if existing == "skip":
        assert Counter(row["finish"] for row in rows) == {"eos": 4, "kept": 4}


@pytest.mark.parametrize("existing", ["skip", "overwrite", "append"])
def test_existing_text_files_beside_the_images(existing, photos, expected):
    names = names_in(photos)
    for name in names[::2]:
        (photos / name).with_suffix(".txt").write_text(OLD)
    (photos / names[1]).with_suffix(".txt").write_text("")  # a trainer would stop at it
    for _ in range(2):  # the second time changes nothing
        assert tell(photos, "--write", "txt", "--existing", existing) == 0
        for name in names:
            lines = {"skip": [OLD], "overwrite": [expected[name]], "append": [OLD, expected[name]]}
            lines = lines[existing] if name in names[::2] else [expected[name]]
            assert (photos / name).with_suffix(".txt").read_text().splitlines() == lines


# ---------------------------------------------------------------- what rows hold
FIELDS = {"width": 5, "tags": ["a", {"b": None}], "source": "the web", "id": 7, "ü": "é"}


@pytest.mark.parametrize("kind", ["manifest", "tar"])
def test_fields_are_kept(kind, photos):
    names = names_in(photos)
    if kind == "manifest":
        rows = [{"image": f"photos/{name}", **FIELDS} for name in names]
        argv = [write_rows(Path("rows.jsonl"), rows)]
    else:
        data = json.dumps(FIELDS).encode()
        argv = [make_tar(Path("in.tar"), photos, names, json=lambda name: data)]
    rows = rows_of("out", *argv, "--write", "webdataset")
    wanted = {f"input_{key}" if key in ("width", "id") else key: FIELDS[key] for key in FIELDS}
    for row in rows:
        assert {key: row[key] for key in wanted} == wanted
        assert (row["width"], row["height"]) == (64, 64)
    with tarfile.open(next(Path("out/shards").glob("*.tar"))) as tar:
        texts = [tar.extractfile(m).read() for m in tar if m.name.endswith(".json")]
    assert all(json.loads(text)["tags"] == FIELDS["tags"] for text in texts)


@pytest.mark.parametrize("keys", ["image_path,caption", "file_name,text"])
def test_keys(keys, photos, expected):
    image, text = keys.split(",")
    rows = rows_of("out", photos, "--keys", keys, "--write", "parquet")
    assert {Path("out", row[image]).resolve() for row in rows} == {photos / n for n in expected}
    assert sorted(row[text] for row in rows) == sorted(expected.values())
    assert all("image" not in row and (text == "caption" or "caption" not in row) for row in rows)
    table = pyarrow.parquet.read_table("out/captions.parquet")
    assert {image, text, "width", "height"} <= set(table.column_names)


def test_several_captions_are_lists_and_lines(photos):
    argv = (photos, "--n", 3, "--temperature", 1)
    rows = rows_of("out", *argv, "--write", "txt")
    rows_of("tars", *argv, "--write", "webdataset")
    assert all(len(row["caption"]) == len(row["finish"]) == len(row["tokens"]) == 3 for row in rows)
    assert any(len(set(row["caption"])) > 1 for row in rows)
    with tarfile.open(next(Path("tars/shards").glob("*.tar"))) as tar:
        for name, texts in captions_by_name(rows).items():
            stem = os.path.splitext(name)[0]
            assert Path("out", f"{stem}.txt").read_text() == "".join(t + "\n" for t in texts)
            assert tar.extractfile(f"{stem}.txt").read().decode().splitlines() == texts
    assert tell(*argv, "--write", "txt") == 0
    assert (photos / "00000.txt").read_bytes() == Path("out/00000.txt").read_bytes()
    table = pyarrow_of(*argv)
    assert table == captions_by_name(rows)


def pyarrow_of(*argv):
    rows_of("columns", *argv, "--write", "parquet")
    return captions_by_name(pyarrow.parquet.read_table("columns/captions.parquet").to_pylist())


def statements(text):
    return [piece.strip() for piece in text.split(",")]


def test_words_around_captions_and_their_number(photos, expected):
    argv = (photos, "--prefix", "zqx, a picture: ", "--suffix", " (drawn)")
    for name, text in captions_by_name(rows_of("around", *argv)).items():
        assert text == f"zqx, a picture: {expected[name]} (drawn)"
    for name, text in captions_by_name(rows_of("words", photos, "--max-words", 6)).items():
        assert len(text.split()) <= 6 and expected[name].startswith(text)
        assert set(statements(text)) <= set(statements(expected[name]))


def raw_captions(capsys, *argv):
    """Captions as the model wrote them."""
    capsys.readouterr()
    assert tell(*argv, "--jsonl") == 0
    return captions_by_name(map(json.loads, capsys.readouterr().out.splitlines()))


def test_long_captions_say_nothing_twice_and_short_ones_end_well(photos, expected, capsys):
    longer = ("--min-tokens", 40, "--max-new-tokens", 60, "--temperature", 1)
    rows = rows_of("long", photos, *longer)
    assert all(row["tokens"] >= 40 or row["finish"] == "repeat" for row in rows)
    raw = raw_captions(capsys, photos, *longer)
    assert any(len(set(statements(text))) < len(statements(text)) for text in raw.values())
    for name, text in captions_by_name(rows).items():
        assert len(set(statements(text))) == len(statements(text))
        assert set(statements(text)) <= set(statements(on_one_line(raw[name])))
    rows = rows_of("cut", photos, "--max-new-tokens", 6)
    raw = raw_captions(capsys, photos, "--max-new-tokens", 6)
    assert any(row["finish"] == "length" for row in rows)
    for name, text in captions_by_name(rows).items():
        if len(statements(raw[name])) > 1:
            assert set(statements(text)) <= set(statements(expected[name])), "an unfinished end"


# ---------------------------------------------------------------- what trainers read
def kohya(image):
    """The caption of sd-scripts: the first line of the first of two files that is there."""
    stem = os.path.splitext(image)[0]
    for path in (Path(f"{stem}.txt"), Path(f"{stem}.caption")):
        if path.is_file():
            lines = path.read_bytes().decode("utf-8").split("\n")
            assert lines != [""], "an empty file stops sd-scripts"
            return lines[0].strip()
    raise AssertionError("without a caption")


def one_trainer(image):
    """The captions of OneTrainer and SimpleTuner: each line that is not blank."""
    text = Path(os.path.splitext(image)[0] + ".txt").read_bytes().decode("utf-8")
    return [line.strip() for line in text.split("\n") if line.strip()]


def ai_toolkit(image):
    """The caption of ai-toolkit and diffusion-pipe: the file."""
    return Path(os.path.splitext(image)[0] + ".txt").read_bytes().decode("utf-8").strip()


def test_what_trainers_read_in_text_files(photos, expected):
    for name in ("two.dots.png", "Upper.PNG", "写真 é.png"):  # the stem is all before the last dot
        shutil.copy(photos / "00000.png", photos / name)
    (photos / "broken.png").write_bytes(b"broken")
    assert tell(photos, "--write", "txt") == 1
    images = [path for path in photos.rglob("*") if path.suffix in (".png", ".PNG")]
    images.remove(photos / "broken.png")
    assert not (photos / "broken.txt").exists()
    for image in images:
        text = expected.get(str(image.relative_to(photos)), expected["00000.png"])
        assert kohya(image) == ai_toolkit(image) == text and one_trainer(image) == [text]
    texts = list(photos.rglob("*.txt"))
    assert len(texts) == len(images) == 11
    assert not any(path.read_bytes().startswith(b"\xef\xbb\xbf") for path in texts)
    assert tell(photos, "--write", "txt", "--existing", "append", "--prefix", "new: ") == 1
    for image in images:
        assert one_trainer(image)[1] == f"new: {kohya(image)}" and len(one_trainer(image)) == 2


def test_datasets_imagefolder_reads_metadata(photos, expected):
    """Captions in the folder of the images, with paths relative to it."""
    datasets = pytest.importorskip("datasets")
    rows_of(photos, photos, "--keys", "file_name,text")
    (photos / "captions.jsonl").rename(photos / "metadata.jsonl")
    rows = datasets.load_dataset(
        "imagefolder", data_dir=str(photos), split="train", cache_dir="cache"
    )
    names = {(photos / name).read_bytes(): name for name in expected}
    assert len(rows) == len(expected)
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    for row, file in zip(rows, undecoded["image"]):
        data = file["bytes"] or Path(file["path"]).read_bytes()
        assert row["text"] == expected[names[data]] and row["image"].size == (64, 64)
        assert (row["width"], row["height"], row["finish"]) == (64, 64, "eos")


def test_datasets_reads_a_folder_with_an_error_in_it(photos, expected):
    datasets = pytest.importorskip("datasets")
    (photos / "broken.png").write_bytes(b"broken")
    rows_of("out", photos, "--write", "parquet", code=1)
    for kind, file in (("json", "out/captions.jsonl"), ("parquet", "out/captions.parquet")):
        rows = datasets.load_dataset(kind, data_files=file, split="train", cache_dir="cache")
        good = [row for row in rows if row["error"] is None]
        assert captions_by_name(good) == expected and len(rows) == len(expected) + 1
        assert next(row for row in rows if row["error"])["caption"] is None


def test_webdataset_reads_the_shards(photos, expected, monkeypatch):
    webdataset = pytest.importorskip("webdataset")
    monkeypatch.setattr(jobs.Job.__init__, "__defaults__", ("jsonl", "overwrite", False, 3))
    rows_of("out", photos, "--write", "webdataset")
    tars = sorted(map(str, Path("out/shards").glob("*.tar")))
    assert len(tars) == 3
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert {f"{sample['__key__']}.png": sample["txt"] for sample in samples} == expected
    for sample in samples:
        assert sample["png"].size == (64, 64)
        assert sample["json"]["caption"] == sample["txt"] and sample["json"]["width"] == 64
    again = rows_of("again", *tars)  # what we write, we read
    assert captions_by_name(again) == expected and all(row["finish"] == "eos" for row in again)


# ---------------------------------------------------------------- workers
SAMPLED = ("--temperature", 1)


def as_rank(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def test_captions_depend_on_neither_batch_nor_workers_nor_shards(photos, monkeypatch):
    rows_of("one", photos, *SAMPLED, "--write", "webdataset")
    result = Path("one/captions.jsonl").read_bytes()
    rows_of("loader", photos, *SAMPLED, "--batch", 3, "--workers", 2)
    rows_of("alone", photos, *SAMPLED, "--batch", 1)
    for k in (2, 0, 1):
        assert tell(photos, *SAMPLED, "--out", "shards", "--shard", f"{k}/3") == 0
    for rank in (1, 0):
        as_rank(monkeypatch, rank, 2)
        for k in range(2):
            assert tell(photos, *SAMPLED, "--out", "both", "--shard", f"{k}/2") == 0
    for out in ("loader", "alone", "shards", "both"):
        assert Path(out, "captions.jsonl").read_bytes() == result, out
    assert len(list(Path("both/rows").glob("*-of-00004.json"))) == 4


@pytest.mark.parametrize(
    "flag, value",
    [
        ("temperature", 0.5),
        ("seed", 1),
        ("prefix", "a "),
        ("n", 2),
        ("max-new-tokens", 9),
        ("keys", "file_name,text"),
        ("write", "txt"),
        ("top-p", 0.9),
        ("views", "one"),
    ],
)
def test_settings_are_frozen(flag, value, photos, capsys):
    argv = (photos, *SAMPLED, "--out", "out")
    assert tell(*argv, "--shard", "0/2") == 0
    before = snapshot(Path("out"))
    capsys.readouterr()
    assert tell(*argv, "--shard", "1/2", f"--{flag}", value) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("caption.py: out: was begun with another")
    assert flag.replace("-", "_") in said[0]
    assert snapshot(Path("out")) == before


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_inputs_are_refused_and_speed_may_change(photos, capsys):
    assert tell(photos, "--out", "out", "--shard", "0/2") == 0
    capsys.readouterr()
    assert tell(photos / "00000.png", "--out", "out") == 1
    assert "another inputs" in capsys.readouterr().err
    assert tell(photos, "--out", "out", "--shard", "1/2", "--batch", 2, "--workers", 1) == 0


def status(capsys, out="out"):
    """--status -> exit code, and its lines."""
    capsys.readouterr()
    code = run(caption, "--status", out)
    return code, capsys.readouterr().out.splitlines()


def test_status_and_merge_of_shards_of_a_slurm_array(photos, monkeypatch, capsys):
    (photos / "broken.png").write_bytes(b"broken")
    for name, value in (("COUNT", 3), ("MIN", 1), ("MAX", 5), ("STEP", 2)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    for done, task in enumerate((3, 5, 1)):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        tell(photos, "--out", "out")
        code, lines = status(capsys)
        assert f"3 workers: {done + 1} whole, 0 running, {2 - done} unfinished" in lines
        inputs = 9
        rows = sum(len(read_rows(path)) for path in Path("out/rows").glob("*.jsonl"))
        assert lines[0].startswith(f"{inputs} inputs: ")
        assert lines[0].endswith(f"{inputs - rows} missing")
        assert (code == 0) == (rows == inputs) and lines[-1].startswith("next: ")
    assert lines[0] == "9 inputs: 8 captions, 1 errors, 0 missing" and "--merge" in lines[-1]
    assert Path("out/captions.jsonl").exists()  # the last one merges
    merged = Path("out/captions.jsonl").read_bytes()
    Path("out/captions.jsonl").unlink()
    assert run(caption, "--merge", "out") == 0
    assert Path("out/captions.jsonl").read_bytes() == merged


def test_a_merge_of_what_is_there_so_far(photos):
    assert tell(photos, "--out", "out", "--shard", "1/2") == 0
    assert not Path("out/captions.jsonl").exists()
    assert run(caption, "--merge", "out") == 0
    some = read_rows("out/captions.jsonl")
    assert 0 < len(some) < 8 and some == sorted(some, key=lambda row: row["id"])
    assert tell(photos, "--out", "out", "--shard", "0/2") == 0
    assert len(read_rows("out/captions.jsonl")) == 8


def test_no_folder_of_captions(tmp_path, capsys):
    for flag in ("--status", "--merge"):
        assert run(caption, flag, tmp_path) == 1
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and str(tmp_path) in said.err


def test_errors_are_tried_again_on_request(photos, expected):
    whole = (photos / "00000.png").read_bytes()
    (photos / "00000.png").write_bytes(whole[:100])
    rows = rows_of("out", photos, code=1)
    assert ["error" in row for row in rows] == [True] + [False] * 7
    (photos / "00000.png").write_bytes(whole)
    assert rows_of("out", photos, code=1) == rows  # an error is a result
    assert captions_by_name(rows_of("out", photos, "--retry-errors")) == expected


# ---------------------------------------------------------------- workers that run
def start(*argv, **env):
    """caption.py in a process of its own."""
    command = [sys.executable, CODE / "caption.py", *argv, "--base", TOY, "--adapters", "none"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), env=env, **how)


@contextlib.contextmanager
def paused(*argv):
    """caption.py as a process that is stopped once it has written a row, and continues at the end."""
    worker = start(*argv, "--out", "out")
    try:
        end = time.monotonic() + 100
        while not any(map(os.path.getsize, Path().glob("out/rows/*.jsonl"))):
            assert worker.poll() is None and time.monotonic() < end
            time.sleep(0.005)
        worker.send_signal(signal.SIGSTOP)
        yield worker
        worker.send_signal(signal.SIGCONT)
        said = worker.communicate(timeout=100)[1]
        assert worker.returncode == 0, said
    finally:
        worker.kill()
        worker.wait()


def refusal(capsys, *argv):
    capsys.readouterr()
    assert tell(*argv, "--out", "out") == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    return said[0]


def test_a_shard_that_another_process_writes(photos, capsys):
    for k in range(40):
        shutil.copy(photos / "00000.png", photos / f"copy {k}.png")
    argv = (photos, "--batch", 2)
    with paused(*argv) as worker:
        assert f"already being written by another process (process {worker.pid}" in refusal(
            capsys, *argv
        )
        assert "one of 1 workers still runs" in refusal(capsys, *argv, "--shard", "0/2")
        code, lines = status(capsys)
        assert code == 1 and "1 workers: 0 whole, 1 running, 0 unfinished" in lines
        assert lines[0].startswith("48 inputs: ") and not lines[0].endswith(" 0 missing")
    code, lines = status(capsys)
    assert code == 0 and lines[0] == "48 inputs: 48 captions, 0 errors, 0 missing"


def test_a_worker_that_is_told_to_stop(photos, capsys):
    for k in range(40):
        shutil.copy(photos / "00000.png", photos / f"copy {k}.png")
    argv = (photos, "--batch", 2, "--workers", 1, "--write", "txt")
    worker = start(*argv, "--out", "out")
    while not any(map(os.path.getsize, Path().glob("out/rows/*.jsonl"))):
        assert worker.poll() is None
        time.sleep(0.005)
    worker.terminate()
    said = worker.communicate(timeout=60)[1]
    assert worker.returncode == 128 + signal.SIGTERM and "Traceback" not in said
    assert "unfinished: 00000-of-00001" in status(capsys)[1]
    assert len(rows_of("out", *argv)) == 48 == len(list(Path("out").rglob("*.txt")))


# ---------------------------------------------------------------- captions with their proof
@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A QA folder for the toy that believes some statements and not others, at random."""
    model = open_base(str(TOY), torch.float32, "cpu")
    torch.manual_seed(0)
    for name in adapters.attach(model, "qa", reduction=4):
        parameter = model.get_parameter(name)
        parameter.data += 0.15 * torch.randn(parameter.shape)
    folder = tmp_path_factory.mktemp("judge")
    adapters.save(model, folder, "qa", stage="qa", threshold=0.5)
    return folder


UNION = ("--union", 6, "--temperature", 1.3)


def test_verified_captions_hold_what_the_judge_confirms(photos, judge):
    rows = rows_of("out", photos, "--verify", judge, *UNION)
    told = [statement for row in rows for statement in row["statements"]]
    assert 0.2 < sum(s["kept"] for s in told) / len(told) < 0.8
    for row in rows:
        kept = [s["text"] for s in row["statements"] if s["kept"]]
        assert statements(row["caption"]) == kept and len(row["samples"]) == 6
        samples = [set(statements(sample["caption"])) for sample in row["samples"]]
        for s in row["statements"]:
            assert 0 <= s["p_yes"] <= 1 and s["text"] in s["question"]
            assert s["votes"] == sum(s["text"] in sample for sample in samples) > 0
            assert not s["kept"] or s["p_yes"] >= 0.5  # the folder's threshold
        assert {s["text"] for s in row["statements"]} == set().union(*samples)
    page = Path("out/index.html").read_text()
    assert page.count("<article>") == len(rows) and page.count("<img ") == len(rows)
    assert page.count('class="s refused"') == sum(not s["kept"] for s in told) + 1  # its legend


def test_the_threshold_is_a_dial(photos, judge):
    kept = []
    for threshold in (0.1, 0.5, 0.9):
        argv = (photos, "--verify", judge, *UNION, "--threshold", threshold)
        tell(*argv, "--out", f"at {threshold}")
        rows = read_rows(f"at {threshold}/captions.jsonl")
        proof = [(row["id"], s) for row in rows for s in row["statements"]]
        kept.append({(id, s["text"]) for id, s in proof if s["kept"]})
        assert all(s["p_yes"] >= threshold for _, s in proof if s["kept"])
        for row in rows:  # where nothing is left, the proof is
            assert ("caption" in row) == any(s["kept"] for s in row["statements"])
    assert kept[0] > kept[1] > kept[2]


def test_the_bare_base_judges_and_proofs_do_not_depend_on_workers(photos, judge, monkeypatch):
    rows = rows_of("bare", photos, "--verify", "base")
    assert all(len(row["samples"]) == 1 and row["statements"] for row in rows)
    argv = (photos, "--verify", judge, *UNION)
    rows_of("one", *argv)
    for rank in (0, 1):
        as_rank(monkeypatch, rank, 2)
        assert tell(*argv, "--out", "two", "--batch", 3, "--workers", 1) == 0
    one, two = (read_rows(f"{out}/captions.jsonl") for out in ("one", "two"))
    for a, b in zip(one, two):
        for s, t in zip(a.pop("statements"), b.pop("statements")):
            assert s.pop("p_yes") == pytest.approx(t.pop("p_yes"), abs=2e-4) and s == t
    assert one == two


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_page_of_renamed_columns_and_of_errors(kind, photos, judge, monkeypatch):
    (photos / "00000.png").write_bytes(b"broken")
    argv = make_input(kind, photos, names_in(photos), monkeypatch)
    argv += ["--verify", judge, "--keys", "file_name,text"]
    rows = rows_of("out", *argv, "--threshold", 0.1, code=1)
    page = Path("out/index.html").read_text()
    assert page.count("<article>") == len(rows) == 8 and page.count("<img ") == 7
    for row in rows:
        assert row["file_name"] in page and row.get("text", "") in page


# ---------------------------------------------------------------- whatever lies in a folder
@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd") / "corpus"
    corpus.make_corpus(folder)
    return folder


def census(folder):
    """Everything in a folder: what it is, how large, and when it was changed."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            state = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = state.st_mode, state.st_size, state.st_mtime_ns
    return found


@pytest.mark.parametrize("write", ["parquet", "txt", "webdataset"])
def test_the_corpus_of_odd_files(write, odd, tmp_path):
    before = census(odd.parent)
    out = tmp_path / "some" / "where" / "out"
    how = ("--write", write, "--max-new-tokens", 6, "--batch", 32, "--workers", 1)
    worker = start(*corpus.arguments(odd), "--out", out, *how)
    said = worker.communicate(timeout=200)[1]
    assert worker.returncode == 1 and "Traceback" not in said and "Warning" not in said, said[
        -3000:
    ]
    lines = (
        (out / "captions.jsonl").read_bytes().split(b"\n")
    )  # names have other line breaks in them
    rows = [json.loads(line) for line in lines[:-1]]
    items = list(inputs.find(corpus.arguments(odd)))
    assert len(items) > 600 and {row["id"] for row in rows} == {item.id for item in items}
    assert len(rows) == len(items)
    captions = [row for row in rows if "error" not in row]
    assert all(row["caption"] for row in captions)
    assert all(row["error"].isprintable() for row in rows if "error" in row)
    assert len(captions) > 200 and len(rows) - len(captions) > 200
    assert f"{len(captions)} captions, {len(rows) - len(captions)} errors" in said
    assert census(odd.parent) == before
    inside = (str(out), *map(str, out.parents))
    assert all(path in inside or path.startswith(f"{out}/") for path in census(tmp_path))
    assert not any(Path(f"/etc/evil.{suffix}").exists() for suffix in ("jpg", "txt", "json"))
    assert not list(out.rglob("*.tmp"))
    if write == "txt":
        texts = [path for path in out.rglob("*.txt") if path.is_file()]
        assert len(texts) == len(captions) and all(map(kohya_line, texts))
    if write == "webdataset":
        assert tar_samples(out) == len(captions)
    if write == "parquet":
        assert len(pyarrow.parquet.read_table(out / "captions.parquet")) == len(rows)


def kohya_line(path):
    return path.read_bytes().decode("utf-8").split("\n")[0].strip()


def tar_samples(out):
    names = []
    for path in out.rglob("*.tar"):
        with tarfile.open(path) as tar:
            names += [member.name for member in tar if member.name.endswith(".json")]
    assert len(set(names)) == len(names)
    return len(names)


PHOTOGRAPHS = CODE.parent / "shared/data/capeval/image"


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="needs the photographs beside the repository")
def test_real_photographs(tmp_path):
    rows = rows_of(tmp_path / "out", PHOTOGRAPHS, "--workers", 1)
    assert len(rows) == sum(path.is_file() for path in PHOTOGRAPHS.rglob("*"))
    for row in rows:
        image = ImageOps.exif_transpose(Image.open(tmp_path / "out" / row["image"]))
        assert row["caption"] and (row["width"], row["height"]) == image.size


# ---------------------------------------------------------------- disks and ranks that fail
@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KB, and a function that makes it read-only or not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("cannot mount a small file system here")
    remount = ["mount", "-o", "remount,{}", str(folder)]
    yield folder, lambda how: subprocess.run([a.format(how) for a in remount], check=True)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def one_line(capsys):
    """The line on stderr of a run that failed, besides that with the base and what a bar leaves."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("base ")]
    assert len(lines) == 1 and lines[0].startswith("caption.py: "), lines
    return lines[0]


@pytest.mark.parametrize("write", ["jsonl", "txt", "webdataset"])
def test_a_disk_that_fills_up_or_becomes_read_only(write, photos, small_disk, capsys):
    disk, remount = small_disk
    expected_rows = rows_of("expected", photos, "--write", write)
    ballast, argv = disk / "ballast", (photos, "--write", write, "--out", disk / "out")
    assert tell(*argv, "--shard", "0/2") == 0  # some is done
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):  # to the last block
            pass
    capsys.readouterr()
    assert tell(*argv) == 1
    assert "No space left" in one_line(capsys)
    ballast.unlink()
    remount("ro")
    assert tell(*argv) == 1
    assert "Read-only" in one_line(capsys)
    remount("rw")
    rows = rows_of(disk / "out", photos, "--write", write)
    assert without_place(rows) == without_place(expected_rows)


def without_place(rows):
    return [{**row, "image": row["image"].split("photos/")[-1]} for row in rows]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_write_that_fails(number, photos, capsys, monkeypatch):
    write, count = shards.Appender.write, iter(range(100))

    def failing(self, row):
        if next(count) == 4:
            raise OSError(number, os.strerror(number))
        write(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(shards.Appender, "write", failing)
        capsys.readouterr()
        assert tell(photos, "--write", "txt", "--out", "out") == 1
        assert os.strerror(number) in one_line(capsys)
    assert len(list(Path("out").rglob("*.txt"))) == 4
    assert (
        len(rows_of("out", photos, "--write", "txt")) == 8 == len(list(Path("out").rglob("*.txt")))
    )


DYING = """
import os, sys
from plumbing import shards
import caption
write, count = shards.Appender.write, iter(range(100))
def dying(self, row):
    write(self, row)
    if os.environ["RANK"] == "1" and next(count) == 1:
        os.kill(os.getpid(), int(os.environ["KILL_BY"]))
if "KILL_BY" in os.environ:
    shards.Appender.write = dying
sys.exit(caption.main(sys.argv[1:]))
"""


def under_torchrun(*argv, **env):
    Path("dying.py").write_text(DYING)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2]
    command += [
        "--master-port",
        free_port(),
        "dying.py",
        *argv,
        "--base",
        TOY,
        "--adapters",
        "none",
    ]
    env = {**os.environ, "PYTHONPATH": f"{CODE}:{os.environ['PYTHONPATH']}", **env}
    how = {"capture_output": True, "text": True, "timeout": 150, "env": env}
    return subprocess.run(list(map(str, command)), **how)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_rank_that_dies_under_torchrun(photos, capsys):
    rows_of("expected", photos)
    done = under_torchrun(photos, "--out", "out", KILL_BY=str(int(signal.SIGKILL)))
    assert done.returncode != 0 and "Signal 9" in done.stderr
    code, lines = status(capsys)
    assert code == 1 and " 0 whole" not in lines[0]
    assert any("00001-of-00002" in line for line in lines if line.startswith("unfinished: "))
    done = under_torchrun(photos, "--out", "out")
    assert done.returncode == 0, done.stderr
    assert Path("out/captions.jsonl").read_bytes() == Path("expected/captions.jsonl").read_bytes()


def test_a_bad_image_does_not_end_the_other_ranks(photos, capsys):
    """Under torchrun, a rank that ended with 1 would have the others killed, at every start."""
    workers = [Division(0, 1, rank, 2) for rank in range(2)]
    name = next(f"bad-{k}.png" for k in range(99) if workers[0].owns(f"photos/bad-{k}.png"))
    Path("photos", name).write_bytes(b"no image")
    assert under_torchrun("photos", "--out", "out").returncode == 0
    rows = read_rows("out/captions.jsonl")
    assert len(rows) == len(names_in(Path("photos")))
    assert [row["image"] for row in rows if "error" in row] == [f"../photos/{name}"]


def test_nothing_of_others_is_written_over(photos, capsys):
    """A captions.jsonl that is the input, or that somebody else wrote."""
    manifest = Path("photos/captions.jsonl")
    manifest.write_text('{"image": "00000.png", "caption": "by hand"}\n')
    before = manifest.read_text()
    assert run(caption, manifest, "--out", "photos", "--base", TOY, "--adapters", "none") == 1
    assert "another --out" in one_line(capsys) and manifest.read_text() == before
    assert not Path("photos/settings.json").exists()


def test_a_batch_may_repeat_ids_and_its_errors_are_short(photos):
    files = [str(Path("photos", name)) for name in names_in(Path("photos"))[:2]]
    captioner = caption.Captioner("--base", str(TOY), "--adapters", "none")
    found = captioner({"id": ["x", "x", 1], "image": [*files, b"\0" * 5000]})
    alone = [captioner({"id": [0], "image": [file]})["caption"][0] for file in files]
    assert found["caption"] == [*alone, None] and alone[0] != alone[1]
    assert found["error"][:2] == [None, None] and len(found["error"][2]) < 200


@pytest.mark.parametrize("more", [(), ("--threshold", "0.5")])
def test_a_judge_that_is_not_there(more, photos, capsys):
    assert tell(photos, "--out", "out", "--verify", "nowhere", *more) == 1
    assert "nowhere" in one_line(capsys)


def test_a_judge_without_a_threshold(photos, judge, tmp_path, capsys):
    folder = shutil.copytree(judge, tmp_path / "judge")
    card = json.loads((folder / "adapters.json").read_text())
    del card["threshold"]
    (folder / "adapters.json").write_text(json.dumps(card))
    assert tell(photos, "--out", "out", "--verify", folder) == 1
    assert "has no threshold" in one_line(capsys)


@pytest.mark.parametrize("flags", [("--status=a", "--merge=b"), ("--merge", "a", "--jsonl")])
def test_status_and_merge_take_nothing_else(flags, capsys):
    assert run(caption, *flags) == 2
    assert "nothing else" in capsys.readouterr().err
