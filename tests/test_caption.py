"""caption.py as a user runs it: what is said where, with what, and that no mistake ends in a traceback."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import write_tiny_base
from PIL import Image
from safetensors.torch import load_file, save_file

import adapters
import caption
from model import CAPTION_PROMPT, QwenVL
from plumbing.tokenizer import Tokenizer

SHORT = ("--max-new-tokens", "5")


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """An empty current folder, so that no out/ of the repository is found; and no network."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def unreachable(*_, **__):
        raise ConnectionError("no route to the Hub\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)


@pytest.fixture
def photos(tmp_path):
    """A folder of five pictures, one of them in a subfolder, and other files."""
    folder = tmp_path / "photos"
    (folder / "more" / "deep").mkdir(parents=True)
    for k, name in enumerate(("b.png", "a.JPG", "c.webp", "more/deep/a.png", "more/z.gif")):
        picture(folder / name, k)
    (folder / "notes.md").write_text("no image")
    (folder / "looks.png").mkdir()
    return folder


def picture(path, seed):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(
        path
    )
    return path


def run(capsys, *argv):
    """caption.main -> exit code, lines of stdout, lines of stderr."""
    code = caption.main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    assert out == "" or out.endswith("\n")
    return code, out.split("\n")[:-1], err.splitlines()


def rows(capsys, *argv):
    """The JSON rows of a run that must succeed."""
    code, lines, _ = run(capsys, *argv, "--jsonl")
    assert code == 0
    return [json.loads(line) for line in lines]


def base_that_says(folder, tiny_base, *words):
    """A base that follows its caption prompt by these words whatever the image, each leading to the next, as a loop
    where a word comes twice. None is the end token."""
    shutil.copytree(tiny_base, folder)
    tokenizer, tensors = Tokenizer(folder), load_file(folder / "model.safetensors")
    chain = tokenizer.encode(CAPTION_PROMPT)[-1:]
    for word in words:
        ids = [tokenizer.eos_id] if word is None else tokenizer.encode(word)
        assert len(ids) == 1
        chain += ids
    for name, tensor in tensors.items():
        if name.startswith("transformer.h.") and name.endswith("c_proj.weight"):
            tensor.zero_()  # the next token depends on the last one alone
    table = torch.nn.functional.normalize(tensors["transformer.wte.weight"], dim=-1)
    head = torch.zeros_like(table)
    for last, following in dict.fromkeys(pairwise(chain)):
        head[following] += table[last]
    save_file(
        {**tensors, "transformer.wte.weight": table, "lm_head.weight": head},
        folder / "model.safetensors",
    )
    return folder


def train(base, folder, seed=0):
    """An adapter folder as a training stage leaves it: adapters in both towers and a soft prompt, moved by noise."""
    model = QwenVL.from_pretrained(base)
    torch.manual_seed(seed)
    for name in adapters.attach(model, "caption", reduction=4, soft_prompt=True):
        model.get_parameter(name).data += 0.2 * torch.randn(model.get_parameter(name).shape)
    adapters.save(model, folder, "caption", stage="sft")
    return folder


# ---------------------------------------------------------------- one image, several, folders
def test_one_image_is_one_line_on_stdout(tiny_base, tmp_path, photos, capsys):
    base = base_that_says(tmp_path / "base", tiny_base, " top", "-", " red", " ring", None)
    code, out, err = run(capsys, photos / "b.png", "--base", base)
    assert (code, out) == (0, ["top- red ring"])
    assert err == [f"base {base}, no adapters, its own caption prompt, float32 on cpu"]


def test_several_images_are_named_and_in_the_order_given(tiny_base, photos, capsys):
    files = [photos / name for name in ("more/z.gif", "b.png", "a.JPG")]
    alone = [run(capsys, file, "--base", tiny_base, *SHORT)[1][0] for file in files]
    assert len(set(alone)) == 3  # the captions are of the images
    code, out, err = run(capsys, *files, "--base", tiny_base, *SHORT)
    assert code == 0 and len(err) == 1
    assert out == [f"{file}: {text}" for file, text in zip(files, alone)]


def test_a_folder_is_searched_with_its_subfolders(tiny_base, photos, capsys):
    found = rows(capsys, photos, "--base", tiny_base, *SHORT)
    expected_images = ["a.JPG", "b.png", "c.webp", "more/z.gif", "more/deep/a.png"]
    assert [row["image"] for row in found] == [str(photos / name) for name in expected_images]
    mixed = rows(capsys, photos / "c.webp", photos / "more", "--base", tiny_base, *SHORT)
    assert mixed == [found[2], found[3], found[4]]


def test_rows_of_json(tiny_base, tmp_path, photos, capsys):
    base = base_that_says(
        tmp_path / "base", tiny_base, " background", " gray", ",", " red", " ring", None
    )
    code, out, _ = run(capsys, photos / "b.png", photos / "a.JPG", "--base", base, "--jsonl")
    expected = {"caption": " background gray, red ring", "finish": "eos", "tokens": 5}
    assert code == 0
    assert json.loads(out[0]) == {"image": str(photos / "b.png"), **expected}
    assert json.loads(out[1]) == {"image": str(photos / "a.JPG"), **expected} and len(out) == 2


def test_captions_in_json_are_readable_text(tiny_base, tmp_path, capsys):
    path = picture(tmp_path / "写真 ü.png", 0)
    code, out, _ = run(capsys, path, "--base", tiny_base, *SHORT, "--jsonl")
    assert code == 0 and f'"image": "{path}"' in out[0]


# ---------------------------------------------------------------- bad images
def damage(photos):
    whole = (photos / "b.png").read_bytes()
    (photos / "bad.png").write_bytes(whole[: len(whole) // 2])
    return photos / "bad.png"


@pytest.mark.parametrize("batch", [(), ("--batch", "1"), ("--batch", "2")])
def test_a_bad_image_is_named_and_the_others_are_captioned(batch, tiny_base, photos, capsys):
    bad, missing, text = damage(photos), photos / "missing.png", photos / "notes.md"
    files = [bad, photos / "b.png", missing, photos / "a.JPG", text]
    code, out, err = run(capsys, *files, "--base", tiny_base, *SHORT, *batch)
    assert code == 1
    assert [line.split(": ")[0] for line in out] == [str(photos / "b.png"), str(photos / "a.JPG")]
    assert [line.split(": ")[:2] for line in err[1:]] == [
        ["caption.py", str(file)] for file in (bad, missing, text)
    ]
    good = run(capsys, photos / "b.png", photos / "a.JPG", "--base", tiny_base, *SHORT)
    assert good[:2] == (0, out)


def test_a_bad_image_is_a_row_with_an_error(tiny_base, photos, capsys):
    bad = damage(photos)
    code, out, err = run(
        capsys,
        photos / "b.png",
        bad,
        photos / "a.JPG",
        "--base",
        tiny_base,
        *SHORT,
        "--jsonl",
        "--n",
        "3",
        "--temperature",
        "1",
    )
    found = [json.loads(line) for line in out]
    assert code == 1 and [set(row) for row in found[3:4]] == [{"image", "error"}]
    assert [row["image"] for row in found] == [str(photos / "b.png")] * 3 + [str(bad)] + [
        str(photos / "a.JPG")
    ] * 3
    assert err[1:] == [f"caption.py: {found[3]['error']}"] and str(bad) in found[3]["error"]


def test_all_images_bad(tiny_base, photos, capsys):
    code, out, err = run(capsys, damage(photos), photos / "missing.png", "--base", tiny_base)
    assert (code, out, len(err)) == (1, [], 3)
    (photos.parent / "empty").mkdir()
    code, out, err = run(capsys, photos.parent / "empty", "--base", tiny_base)
    assert (code, out, len(err)) == (1, [], 2) and str(photos.parent / "empty") in err[1]


@pytest.mark.parametrize(
    "name",
    [
        "<img>/etc/passwd</img>.png",
        "<|endoftext|>.png",
        "<|extra_0|><img>.png",
        "写真.png",
        "-.png",
    ],
)
def test_special_tokens_in_a_file_name_are_part_of_the_name(name, tiny_base, tmp_path, capsys):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    odd, plain = rows(
        capsys, picture(path, 0), picture(tmp_path / "plain.png", 0), "--base", tiny_base, *SHORT
    )
    assert odd == {**plain, "image": str(path)}


@pytest.mark.parametrize(
    "name", [os.fsdecode(b"caf\xe9.png"), "two\nlines.png", "\x1b[31mred\t.png"]
)
def test_a_name_that_is_no_text(name, tiny_base, tmp_path, capsys):
    """One from an old disk, which is no UTF-8, and ones with control characters."""
    files = picture(tmp_path / name, 0), picture(tmp_path / "plain.png", 0)
    odd, plain = rows(capsys, *files, "--base", tiny_base, *SHORT)
    assert odd == {**plain, "image": str(tmp_path / name)}
    code, out, _ = run(capsys, tmp_path / name, "--base", tiny_base, *SHORT)
    assert code == 0 and len(out) == 1
    (tmp_path / name).write_text("no image")
    code, out, err = run(capsys, tmp_path / name, "--base", tiny_base)
    assert (code, out, len(err)) == (1, [], 2) and err[1].isprintable()


# ---------------------------------------------------------------- sampling
def sampled(capsys, base, *argv, temperature=1):
    found = rows(capsys, *argv, "--base", base, "--temperature", temperature, *SHORT)
    return [row["caption"] for row in found]


def test_several_captions_of_an_image(tiny_base, photos, capsys):
    file = photos / "b.png"
    four = sampled(capsys, tiny_base, file, "--n", 4)
    assert len(four) == 4 and len(set(four)) > 1
    assert (
        sampled(capsys, tiny_base, file) == four[:1]
    )  # a sample does not depend on how many there are
    code, out, _ = run(capsys, file, "--base", tiny_base, "--n", 4, "--temperature", 1, *SHORT)
    assert code == 0 and len(out) == 4


def test_the_seed_decides(tiny_base, photos, capsys):
    first = sampled(capsys, tiny_base, photos, "--seed", 7)
    assert sampled(capsys, tiny_base, photos, "--seed", 7) == first
    assert all(a != b for a, b in zip(first, sampled(capsys, tiny_base, photos, "--seed", 8)))


def test_samples_depend_on_the_name_in_the_folder_not_on_where_it_lies(
    tiny_base, photos, tmp_path, capsys
):
    elsewhere = shutil.copytree(photos, tmp_path / "elsewhere" / "copy")
    first = sampled(capsys, tiny_base, photos)
    assert sampled(capsys, tiny_base, elsewhere) == first
    (elsewhere / "b.png").rename(elsewhere / "bb.png")
    renamed = sampled(capsys, tiny_base, elsewhere)
    assert renamed[1] != first[1] and renamed[:1] + renamed[2:] == first[:1] + first[2:]


@pytest.mark.parametrize("options", [("--temperature", "0"), ("--temperature", "1", "--n", "3")])
def test_the_batch_does_not_change_captions(options, tiny_base, photos, capsys):
    several = [
        rows(capsys, photos, "--base", tiny_base, "--max-new-tokens", 12, *options, *batch)
        for batch in ((), ("--batch", "1"), ("--batch", "2"), ("--batch", "100"))
    ]
    assert all(found == several[0] for found in several)


def test_temperature_and_top_p_near_their_limits_are_the_likeliest_token(tiny_base, photos, capsys):
    greedy = sampled(capsys, tiny_base, photos, temperature=0)
    assert sampled(capsys, tiny_base, photos, temperature=1) != greedy
    assert sampled(capsys, tiny_base, photos, temperature=1e-6) == greedy
    assert sampled(capsys, tiny_base, photos, "--top-p", 1e-9) == greedy


# ---------------------------------------------------------------- length and loops
def test_max_new_tokens(tiny_base, tmp_path, photos, capsys):
    base = base_that_says(
        tmp_path / "base", tiny_base, " background", " gray", ",", " red", " ring", None
    )
    for most, expected in (
        (1, " background"),
        (2, " background gray"),
        (5, " background gray, red ring"),
    ):
        row = rows(capsys, photos / "b.png", "--base", base, "--max-new-tokens", most)[0]
        assert (row["caption"], row["tokens"], row["finish"]) == (expected, most, "length")
    assert (
        rows(capsys, photos / "b.png", "--base", base, "--max-new-tokens", 6)[0]["finish"] == "eos"
    )


def test_the_context_is_the_longest_unless_told(tiny_base, photos, capsys):
    views_and_prompt = 6 * (4 + 2) + len(Tokenizer(tiny_base).encode(CAPTION_PROMPT))
    expected_room = 128 - views_and_prompt
    wild = (
        photos / "b.png",
        "--base",
        tiny_base,
        "--temperature",
        3,
    )  # so that it does not loop or end
    for options, expected_tokens in (
        ((), expected_room),
        (("--max-new-tokens", 1000), expected_room),
        (("--max-new-tokens", 100, "--past-context"), 100),
    ):
        row = rows(capsys, *wild, *options)[0]
        assert (row["finish"], row["tokens"]) == ("length", expected_tokens)


def test_a_repeated_tail_is_said_once_and_kept_in_json(tiny_base, tmp_path, photos, capsys):
    base = base_that_says(
        tmp_path / "base", tiny_base, " background", " gray", ",", " red", " ring", ","
    )
    row = rows(capsys, photos / "b.png", "--base", base)[0]
    expected_caption = " background gray, red ring, red ring, red ring"
    assert (row["caption"], row["finish"]) == (expected_caption, "repeat")
    code, out, _ = run(capsys, photos / "b.png", "--base", base)
    assert (code, out) == (0, ["background gray, red ring"])


def test_one_word_over_and_over_is_a_loop_too(tiny_base, tmp_path, photos, capsys):
    base = base_that_says(tmp_path / "base", tiny_base, " gray", " red", " red")
    assert rows(capsys, photos / "b.png", "--base", base)[0]["finish"] == "repeat"
    assert run(capsys, photos / "b.png", "--base", base)[:2] == (0, ["gray red"])


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    "argv, expected_word",
    [
        ([], "give images"),
        (["x.png", "--n", "0"], "--n"),
        (["x.png", "--n", "-1"], "--n"),
        (["x.png", "--n", "two"], "--n"),
        (["x.png", "--n", "2"], "--temperature"),
        (["x.png", "--temperature", "-0.1"], "--temperature"),
        (["x.png", "--temperature", "nan"], "--temperature"),
        (["x.png", "--temperature", "inf"], "--temperature"),
        (["x.png", "--temperature", "hot"], "--temperature"),
        (["x.png", "--top-p", "0"], "--top-p"),
        (["x.png", "--top-p", "1.01"], "--top-p"),
        (["x.png", "--top-p", "nan"], "--top-p"),
        (["x.png", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["x.png", "--max-new-tokens", "1.5"], "--max-new"),
        (["x.png", "--past-context"], "--max-new-tokens"),
        (["x.png", "--batch", "0"], "--batch"),
        (["x.png", "--seed", "a"], "--seed"),
        (["x.png", "--dtype", "int8"], "--dtype"),
        (["x.png", "--colour"], "--colour"),
        (["x.png", "--temperature", ""], "--temperature"),
    ],
)
def test_nonsense_is_refused_in_a_line(argv, expected_word, capsys):
    with pytest.raises(SystemExit) as stop:
        caption.main(argv)
    out, err = capsys.readouterr()
    usage, message = err.split("error: ")
    assert stop.value.code == 2 and out == "" and usage.startswith("usage: ")
    assert message.count("\n") == 1 and expected_word in message


def refused(capsys, *argv):
    """The one line of stderr of a run that must fail before it captions anything."""
    code, out, err = run(capsys, *argv)
    assert (code, out, len(err)) == (1, [], 1) and err[0].startswith("caption.py: ")
    return err[0]


def test_a_base_that_is_not_there(tiny_base, photos, tmp_path, capsys):
    file = photos / "b.png"
    for argv, name in (
        ([file], "Qwen/Qwen-VL"),
        ([file, "--base", "someone/model"], "someone/model"),
    ):
        message = refused(capsys, *argv)
        assert name in message and "no route to the Hub" in message and "second line" not in message
        assert f"hf download {name}" in message and "--base assets/toy" in message  # both ways out
    for name in ("nowhere", "/nowhere/at/all", str(file)):
        assert name in refused(capsys, file, "--base", name)
    (tmp_path / "hollow").mkdir()
    assert str(tmp_path / "hollow") in refused(capsys, file, "--base", tmp_path / "hollow")
    broken = shutil.copytree(tiny_base, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"half a file")
    assert str(broken) in refused(capsys, file, "--base", broken)


@pytest.mark.parametrize("device", ["toaster", "meta", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_there(device, tiny_base, photos, capsys):
    assert "--device" in refused(
        capsys, photos / "b.png", "--base", tiny_base, f"--device={device}"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype, tiny_base, photos, capsys):
    code, out, err = run(
        capsys, photos / "b.png", "--base", tiny_base, "--dtype", dtype, "--device", "cpu", *SHORT
    )
    assert code == 0 and len(out) == 1 and out[0]
    assert err == [f"base {tiny_base}, no adapters, its own caption prompt, {dtype} on cpu"]


def test_a_base_whose_context_is_too_short(tmp_path, photos, capsys):
    base = write_tiny_base(tmp_path / "short", seq_length=40)
    code, out, err = run(capsys, photos / "b.png", "--base", base)
    assert (code, out) == (1, []) and "context" in err[-1] and "40" in err[-1]


# ---------------------------------------------------------------- adapters
def with_adapters(capsys, *argv):
    """Caption and the line on stderr that says what made it."""
    code, out, err = run(capsys, *argv, *SHORT)
    assert (code, len(out), len(err)) == (0, 1, 1)
    return out[0], err[0]


def test_the_newest_adapters_are_found(tiny_base, photos, capsys):
    file = photos / "b.png"
    bare = with_adapters(capsys, file, "--base", tiny_base)[0]
    said = {}
    for when, name in enumerate(("out/dpo-2", "out/sft", "out/dpo")):
        folder = train(tiny_base, Path(name), seed=when)
        os.utime(folder / "adapters.json", (1e9 + when, 1e9 + when))
        said[name] = with_adapters(capsys, file, "--adapters", name)[0]
    assert len({bare, *said.values()}) == 4  # all four speak differently

    def expect(name, *argv):
        caption_, used = with_adapters(capsys, file, *argv)
        assert (
            caption_ == said[name] and used == f"base {tiny_base}, adapters {name}, float32 on cpu"
        )

    expect("out/dpo")  # the newest, though not the last by name
    expect("out/dpo", "--base", tiny_base)
    os.utime("out/dpo-2/adapters.json", (2e9, 2e9))
    expect("out/dpo-2")
    Path("out/best.txt").write_text("out/dpo\n")
    expect("out/dpo")
    Path("out/best.txt").write_text("sft\n")  # a name within out/ will do
    expect("out/sft")
    expect("out/dpo-2", "--adapters", "out/dpo-2")  # what is asked for goes before what is best
    assert with_adapters(capsys, file, "--adapters", "none", "--base", tiny_base)[0] == bare
    Path("out/best.txt").unlink()
    shutil.rmtree("out/dpo")
    shutil.rmtree("out/dpo-2")
    (Path("out") / "dpo-3").mkdir()  # a run that has not saved yet
    expect("out/sft")


def test_adapters_of_another_base(tiny_base, tmp_path, photos, capsys):
    other = write_tiny_base(tmp_path / "other", seed=1)
    train(tiny_base, Path("out/sft"))
    message = refused(capsys, photos / "b.png", "--base", other, "--adapters", "out/sft")
    assert str(tiny_base) in message and str(other) in message and "out/sft" in message
    _, used = with_adapters(
        capsys, photos / "b.png", "--base", other
    )  # found, not asked for: left, and said
    assert used == f"base {other}, no adapters, its own caption prompt, float32 on cpu"


def test_adapters_that_are_none(tiny_base, photos, tmp_path, capsys):
    file, folder = photos / "b.png", train(tiny_base, tmp_path / "sft")
    assert "nowhere" in refused(capsys, file, "--base", tiny_base, "--adapters", "nowhere")
    assert str(photos) in refused(capsys, file, "--base", tiny_base, "--adapters", photos)
    Path("out").mkdir()
    Path("out/best.txt").write_text("out/gone\n")
    assert "gone" in refused(capsys, file)
    for name, text in (
        ("adapters.safetensors", "half"),
        ("adapters.json", "{"),
        ("adapters.json", "[]"),
    ):
        shutil.copytree(folder, tmp_path / "broken", dirs_exist_ok=True)
        (tmp_path / "broken" / name).write_text(text)
        assert str(tmp_path / "broken") in refused(
            capsys, file, "--base", tiny_base, "--adapters", tmp_path / "broken"
        )


# ---------------------------------------------------------------- reported, and not so yet
@pytest.mark.parametrize("spelled", ["{}/", "{}/../{}", "./{}"])
def test_another_spelling_of_the_base_keeps_its_adapters(spelled, tiny_base, photos, capsys):
    """`--base assets/toy/`, as a shell completes it, silently drops the adapters trained on assets/toy."""
    shutil.copytree(tiny_base, "toy")
    train("toy", Path("out/sft"))
    assert (
        "adapters out/sft"
        in with_adapters(capsys, photos / "b.png", "--base", spelled.format("toy", "toy"))[1]
    )


def test_an_image_given_twice_under_two_names(tiny_base, photos, capsys):
    """By its folder and by itself; both have their own random numbers, whatever the batch."""
    both = (photos, photos / "more/deep/a.png")
    assert sampled(capsys, tiny_base, *both) == sampled(capsys, tiny_base, *both, "--batch", 1)


def test_a_context_that_is_too_short_for_a_chosen_batch(tmp_path, photos, capsys):
    base = write_tiny_base(tmp_path / "short", seq_length=40)
    code, out, err = run(capsys, photos / "b.png", "--base", base, "--batch", "1")
    assert (code, out) == (1, []) and "context" in err[-1]


def test_a_path_that_is_too_long(tiny_base, capsys):
    code, out, err = run(capsys, "a" * 300 + ".jpg", "--base", tiny_base)
    assert (code, out) == (1, []) and "too long" in err[-1]


def test_a_best_txt_that_is_no_text(tiny_base, photos, capsys):
    Path("out").mkdir()
    Path("out/best.txt").write_bytes(b"\xff\xfe")
    assert "best.txt" in refused(capsys, photos / "b.png", "--base", tiny_base)


def test_a_line_break_in_a_name_does_not_break_the_row(tiny_base, tmp_path, capsys):
    odd, plain = picture(tmp_path / "two\nlines.png", 0), picture(tmp_path / "plain.png", 0)
    code, out, _ = run(capsys, odd, plain, "--base", tiny_base, *SHORT)
    assert code == 0 and len(out) == 2 and out[0].split(": ")[1:] == out[1].split(": ")[1:]


# ---------------------------------------------------------------- as a program
def program(*argv, cwd, **options):
    """caption.py in a process of its own, offline."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd), **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, caption.__file__, *map(str, argv)],
        cwd=cwd,
        env=env,
        timeout=120,
        text=True,
        encoding="utf-8",
        stderr=subprocess.PIPE,
        **{"stdout": subprocess.PIPE, **options},
    )


def test_the_program_with_good_and_bad_images(tiny_base, tmp_path, photos):
    base = base_that_says(tmp_path / "base", tiny_base, " red", " ring", None)
    (photos / "cut.tif").write_bytes(b"II*\0\x08\0\0\0\xff\xff" + bytes(90))
    done = program("photos", "missing.jpg", "--base", "base", cwd=tmp_path)
    expected_images = ["a.JPG", "b.png", "c.webp", "more/z.gif", "more/deep/a.png"]
    assert done.stdout == "".join(f"photos/{name}: red ring\n" for name in expected_images)
    said = done.stderr.splitlines()
    assert said[0] == f"base {base.name}, no adapters, its own caption prompt, float32 on cpu"
    assert [line.split(": ")[1] for line in said[1:]] == ["photos/cut.tif", "missing.jpg"]
    assert done.returncode == 1


def test_the_program_without_a_base(tmp_path, photos):
    done = program("photos", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "Qwen/Qwen-VL" in done.stderr and "--base assets/toy" in done.stderr


def test_the_program_whose_reader_has_gone(tiny_base, tmp_path, photos):
    """As with `python caption.py photos/ | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = program("photos", "--base", tiny_base, *SHORT, cwd=tmp_path, stdout=writer)
    finally:
        os.close(writer)
    assert done.stderr == f"base {tiny_base}, no adapters, its own caption prompt, float32 on cpu\n"


def ascii_run(tiny_base, folder, *argv):
    """Names that ASCII has no letters for, where stdout is ASCII: a bare container, or a pipe on Windows."""
    base = base_that_says(folder / "base", tiny_base, " red", " ring", None)
    files = [picture(folder / name, 0).name for name in ("é.png", "写.png", "😀.png")]
    done = program(*files, "--base", base, *argv, cwd=folder, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "Traceback" not in done.stderr
    return files, done.stdout.splitlines()


def test_the_program_where_stdout_knows_no_unicode(tiny_base, tmp_path):
    _, out = ascii_run(tiny_base, tmp_path)
    assert [line.split(": ")[1] for line in out] == ["red ring"] * 3


def test_rows_of_json_where_stdout_knows_no_unicode(tiny_base, tmp_path):
    """Python's escapes for é and an emoji (\\xe9, \\U0001f600) are none of JSON's."""
    files, out = ascii_run(tiny_base, tmp_path, "--jsonl")
    assert [json.loads(line)["image"] for line in out] == files
