"""outputs.py: text files, tar shards and merged results, read by those who will read them."""

import errno
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from plumbing import inputs, jobs, outputs
from plumbing.errors import InputError
from plumbing.workers import Division


def png(color):
    file = io.BytesIO()
    Image.new("RGB", (2, 2), color).save(file, "png")
    return file.getvalue()


def photos(folder, names):
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png((k, 0, 0)))
    return list(inputs.find([str(folder)]))


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            outputs.add(tar, name, data)
    return path


def do(out, items, division=None, caption=lambda item: f"a {item.name}", **how):
    with jobs.Job(out, division or Division(), **how) as job:
        todo = job.todo(items)
        for item in todo:
            job.write(item, {"error": item.error} if item.error else {"caption": caption(item)})
        job.finish()
    return [item.id for item in todo]


def merged(out, **how):
    outputs.merge(out, **how)
    into = how.get("into") or out / "captions.jsonl"
    return [json.loads(line) for line in into.read_text("utf-8").splitlines()]


# ---------------------------------------------------------------- text files
def test_a_text_file_has_a_line_for_each_caption_and_the_exact_stem(tmp_path):
    items = photos(tmp_path / "in", ["a.b.png", "deep/ä.png"])
    out = tmp_path / "out"
    do(out, items, write="txt", caption=lambda item: [f"one {item.name}", "two"])
    assert (out / "a.b.txt").read_bytes() == b"one a.b.png\ntwo\n"
    assert (out / "deep/ä.txt").read_text("utf-8") == "one deep/ä.png\ntwo\n"
    assert not list(out.rglob("*.tmp"))
    assert outputs.text_path(items[0]) == tmp_path / "in/a.b.txt"


@pytest.mark.parametrize("there", ["", "old", "old\n", "\ufeffold\r\n", "old\nnew\n"])
def test_appending_adds_lines_once(tmp_path, there):
    path = tmp_path / "a.txt"
    path.write_text(there, "utf-8", newline="")
    for _ in range(2):
        outputs.replace_text(path, "new", append=True)
        assert path.read_bytes() == (b"old\n" if there else b"") + b"new\n"
    outputs.replace_text(path, ["x", "y"])
    assert path.read_bytes() == b"x\ny\n"


def test_a_caption_that_is_there_is_kept(tmp_path):
    item = photos(tmp_path / "in", ["a.png"])[0]
    assert jobs.kept(item, text=True) is None
    (tmp_path / "in/a.txt").write_text(" \n")
    assert jobs.kept(item, text=True) is None
    (tmp_path / "in/a.txt").write_text("\ufeffwritten by hand\n", "utf-8")
    assert jobs.kept(item, text=True) == "written by hand" and jobs.kept(item) is None
    (tmp_path / "m.jsonl").write_text('{"image": "in/a.png", "text": "in the manifest", "n": 1}\n')
    item = next(inputs.find([str(tmp_path / "m.jsonl")]))
    assert jobs.kept(item, tmp_path / "out", text=True) == "in the manifest"
    with jobs.Job(tmp_path / "out", Division(), write="txt", existing="skip") as job:
        job.todo([item])
        job.write(item, {"caption": "in the manifest", "finish": "kept"})
        job.finish()
    assert (tmp_path / "out/in/a.txt").read_text() == "in the manifest\n"
    assert jobs.kept(item, tmp_path / "out", text=True) == "in the manifest"


def test_append_keeps_the_caption_of_the_manifest_before_the_new_one(tmp_path):
    photos(tmp_path / "in", ["a.png"])
    (tmp_path / "m.jsonl").write_text('{"image": "in/a.png", "caption": ["old", "older"]}\n')
    items = list(inputs.find([str(tmp_path / "m.jsonl")]))
    do(tmp_path / "out", items, write="txt", existing="append", caption=lambda item: "new")
    assert (tmp_path / "out/in/a.txt").read_text() == "old\nolder\nnew\n"
    assert merged(tmp_path / "out")[0]["caption"] == ["old", "older", "new"]


def test_a_text_file_that_cannot_be_is_an_error_row(tmp_path):
    """A folder of its name, a file where its folder should be, a name that is too long."""
    items = photos(tmp_path / "in", ["a.png", "b.txt/c.png", "b.png", "f.png"])
    long = inputs.Item("long", "l", items[0].image, items[0].path, target="l" * 254)
    out = tmp_path / "out"
    out.mkdir()
    (out / "f.txt").mkdir()
    do(out, [*items, long], write="txt")
    rows = {row["id"]: row for row in merged(out)}
    failed = {Path(id).name for id, row in rows.items() if "error" in row}
    assert len(rows) == 5 and failed == {"f.png", "long", "c.png"}
    assert "\n" not in rows["long"]["error"] and "too long" in rows["long"]["error"]


def test_a_name_of_the_greatest_length_has_its_text(tmp_path):
    items = photos(tmp_path / "in", ["l" * 251 + ".png"])
    do(tmp_path / "out", items, write="txt")
    assert (tmp_path / "out" / ("l" * 251 + ".txt")).is_file()


def test_text_beside_a_link_does_not_go_through_a_link_of_the_text(tmp_path):
    items = photos(tmp_path / "in", ["a.png"])
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "in/a.txt").symlink_to(tmp_path / "secret")
    outputs.replace_text(outputs.text_path(items[0]), "new")
    assert (tmp_path / "secret").read_text() == "secret"
    assert (tmp_path / "in/a.txt").read_text() == "new\n"


# ---------------------------------------------------------------- tar shards
def samples_of(out):
    """{key: {suffix: data}} of all tars; fails if a key is there twice, or a member."""
    samples = {}
    for path in sorted((out / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                folder, base = os.path.split(member.name)
                stem, _, suffix = base.partition(".")
                sample = samples.setdefault(os.path.join(folder, stem), {})
                assert suffix not in sample, member.name
                sample[suffix] = tar.extractfile(member).read()
    return samples


def test_shards_hold_the_bytes_as_they_were_the_text_and_the_row(tmp_path):
    items = photos(tmp_path / "in", ["x/a.b.PNG", "x/a_b.PNG", "c.png", "d.png", "x/e.png"])
    items.append(inputs.broken("gone.png", "no such image file"))
    out = tmp_path / "out"
    do(out, items, write="webdataset", shard_size=2)
    samples = samples_of(out)
    assert samples.keys() == {"x/a_b", "x/a_b-2", "c", "d", "x/e"}
    assert samples["c"]["png"] == (tmp_path / "in/c.png").read_bytes()
    assert samples["c"]["txt"] == b"a c.png"
    assert json.loads(samples["c"]["json"]) == {"image": "../in/c.png", "caption": "a c.png"}
    sizes = [json.loads(path.read_text()) for path in sorted((out / "shards").glob("*.json"))]
    assert [size["captions"] for size in sizes] == [2, 2, 1] and sizes[0]["end"] == sizes[1][
        "start"
    ]


def test_keys_and_fields_of_tars_are_kept(tmp_path):
    data = png("red")
    for name in "ab":
        tar_of(
            tmp_path / f"{name}.tar",
            {
                "000.seg.png": data,
                "000.json": b'{"width": 7, "id": 5}',
                f"d.x/{name}.jpg": data,
                f"d.x/{name}.txt": b"old",
            },
        )
    items = list(inputs.find([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]))
    out = tmp_path / "out"
    do(out, items, write="webdataset")
    samples = samples_of(out)
    assert samples.keys() == {"000", "b/000", "d.x/a", "d.x/b"}
    assert samples["b/000"]["seg.png"] == data
    row = json.loads(samples["000"]["json"])
    assert row["input_width"] == 7 and row["id"] == 5
    assert merged(out)[0]["input_id"] == 5 and merged(out)[0]["id"] == str(
        tmp_path / "a.tar/000.seg.png"
    )


def test_an_image_that_is_gone_is_left_out_and_reported(tmp_path):
    items = photos(tmp_path / "in", ["a.png", "b.png"])
    with jobs.Job(tmp_path / "out", Division(), write="webdataset") as job:
        for item in job.todo(items):
            job.write(item, {"caption": "c"})
        Path(items[0].path).unlink()
        job.finish()
    assert samples_of(tmp_path / "out").keys() == {"b"}
    report = jobs.status(tmp_path / "out")
    assert list(report["left_out"]) == [items[0].id]
    assert any("not in a tar shard" in line for line in report["lines"])


def test_webdataset_reads_the_shards(tmp_path):
    wds = pytest.importorskip("webdataset")
    names = [f"{'long' * 40}/{k}.png" for k in range(4)] + ["ä ' \".png"]
    do(tmp_path / "out", photos(tmp_path / "in", names), write="webdataset", shard_size=2)
    urls = sorted(map(str, (tmp_path / "out/shards").glob("*.tar")))
    dataset = wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil")
    rows = {row["__key__"]: row for row in dataset}
    assert rows.keys() == {name[:-4] for name in names}
    assert all(
        row["png"].size == (2, 2) and row["txt"] == f"a {key}.png" for key, row in rows.items()
    )


def test_names_that_are_not_text_are_in_shards_and_results(tmp_path):
    name = os.fsdecode(b"caf\xe9\n.png")
    items = photos(tmp_path / "in", [name])
    out = tmp_path / "out"
    do(out, items, write="webdataset")
    assert samples_of(out).keys() == {name[:-4]}
    (row,) = merged(out, parquet=True)
    assert os.path.samefile(out / row["image"], items[0].path) and row["id"] == items[0].id


# ---------------------------------------------------------------- merged results
def test_a_result_is_sorted_has_each_id_once_and_a_caption_before_an_error(tmp_path):
    items = photos(tmp_path / "in", [f"{k}.png" for k in range(9)])
    out = tmp_path / "out"
    with jobs.Job(out, Division()) as job:
        for item in reversed(job.todo(items)):
            job.write(item, {"error": f"{item.id}: broken"})
    division = [Division(shard=k, shards=2) for k in (0, 1)]
    for one in division:
        do(out, items[:7], one, retry_errors=True)
    rows = merged(out)
    assert [row["id"] for row in rows] == sorted(item.id for item in items)
    assert [row["caption"] for row in rows if "error" not in row] == [
        f"a {k}.png" for k in range(7)
    ]
    assert not any({"source", "fields", "target"} & row.keys() for row in rows)
    assert outputs.merge(out) == (7, 2)


def test_images_are_relative_to_the_result_also_through_links(tmp_path):
    (tmp_path / "disk/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/deep")
    items = photos(tmp_path / "in", ["a.png"])
    tar = tar_of(tmp_path / "t.tar", {"./x.png": png("red")})
    items += inputs.find([str(tar)])
    out = tmp_path / "link/out"
    do(out, items, caption=lambda item: "c")
    (tmp_path / "other").mkdir()
    for into in (None, tmp_path / "other/all.jsonl", tmp_path / "all.jsonl"):
        rows = merged(out, into=into, keys=("file_name", "text"))
        folder = (into or out / "captions.jsonl").parent
        assert os.path.samefile(folder / rows[0]["file_name"], tmp_path / "in/a.png")
        assert rows[1]["file_name"].endswith("t.tar/./x.png") and rows[0]["text"] == "c"
        assert os.path.samefile(folder / rows[1]["file_name"][: -len("/./x.png")], tar)


@pytest.mark.parametrize("many", [False, True])
def test_a_parquet_has_the_same_rows(tmp_path, many):
    pq = pytest.importorskip("pyarrow.parquet")
    photos(tmp_path / "in", ["a.png", "b.png", "c.png"])
    lines = [{"image": f"in/{k}.png", "x": x} for k, x in zip("abc", (1, "text", [None]))]
    (tmp_path / "m.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, lines))) + "bad\n")
    items = list(inputs.find([str(tmp_path / "m.jsonl")]))
    out = tmp_path / "out"
    do(out, items, caption=lambda item: ["one", "two"] if many and "a" in item.name else "c")
    rows = merged(out, keys=("image_path", "caption"), parquet=True)
    table = pq.read_table(out / "captions.parquet").to_pylist()
    assert [row["image_path"] for row in table] == [row["image_path"] for row in rows]
    assert [json.loads(row["more"]).get("x") for row in table] == [1, "text", [None], None]
    assert table[1]["caption"] == (["c"] if many else "c") and "JSON" in table[3]["error"]


def test_datasets_reads_the_result_as_an_imagefolder(tmp_path):
    datasets = pytest.importorskip("datasets")
    do(tmp_path, photos(tmp_path / "in", ["a.png", "b.png"]))
    outputs.merge(tmp_path, tmp_path / "metadata.jsonl", keys=("file_name", "text"))
    rows = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train")
    assert sorted(row["text"] for row in rows) == ["a a.png", "a b.png"]


# ---------------------------------------------------------------- disks
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_cannot_be_written_to_is_one_line_and_no_row(tmp_path, monkeypatch, code):
    items = photos(tmp_path / "in", ["a.png", "b.png"])

    def fail(path, data):
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(InputError, match="run the same command again") as error:
            do(tmp_path / "out", items, write="txt")
    assert "\n" not in str(error.value)
    assert do(tmp_path / "out", items, write="txt") == [item.id for item in items]
