"""runs/: each script from its downloads to its last captions, on toy scenes in the layouts of the released data sets.
The commands that download are replaced by ones that copy those; every other command is the real one."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import stages
from stages import read_rows, write_rows

from runs import prepare
from toy_world import world

ROOT = stages.CODE
SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))
TRAIN = "--max-steps 2 --batch 4 --micro-batch 4 --workers 0 --device cpu"
GOLDEN = "--threshold 0 --samples 2 --max-new-tokens 40 --device cpu"
TOY = {
    "BASE": "assets/toy",
    "TOOL": "shorthand",
    "TOOL_FLAGS": "--tool-batch 1",
    "SFT_FLAGS": f"--lr 1e-3 {TRAIN}",
    "QA_FLAGS": f"--lr 1e-3 {TRAIN}",
    "DPO_FLAGS": f"--lr 1e-3 --watch 0 {TRAIN}",
    "GOLDEN_FLAGS": GOLDEN,
    "CAPTION_FLAGS": "--max-new-tokens 40 --device cpu",
}

# What downloads: each copies from $RELEASED instead, and leaves its arguments in $RELEASED/log.
FAKES = {
    "hf": """
repo=$(basename "$2")
while [ "$1" != --local-dir ]; do shift; done
mkdir -p "$2" && cp -r "$RELEASED/$repo/." "$2"
""",
    "wget": """
last=${*: -1}
while [ "$1" != --directory-prefix ]; do shift; done
mkdir -p "$2"
if [ "$last" = - ]; then cat; else echo "$last"; fi | while read -r url; do
    cp "$RELEASED/files/$(basename "$url")" "$2"
done
""",
    "img2dataset": """
while [ "$1" != --url_list ]; do shift; done
ls "$2"/*.parquet > /dev/null
while [ "$1" != --output_folder ]; do shift; done
cp -r "$RELEASED/gpt4v" "$2"
""",
}


def command(folder, name, text):
    path = folder / name
    path.write_text(
        f'#!/usr/bin/env bash\nset -euo pipefail\necho "{name} $*" >> "$RELEASED/log"\n{text}'
    )
    path.chmod(0o755)


@pytest.fixture
def desk(tmp_path):
    """A folder with commands/, which downloads come from, and released/, what they copy."""
    (tmp_path / "commands").mkdir()
    (tmp_path / "released/files").mkdir(parents=True)
    for name, text in FAKES.items():
        command(tmp_path / "commands", name, text)
    return tmp_path


def run(desk, script, path=None, **variables):
    """A script with these variables -> its exit code; what it prints is shown if the test fails."""
    path = path or f"{desk}/commands:{Path(sys.executable).parent}:{os.environ['PATH']}"
    more = {
        "RELEASED": desk / "released",
        "DATA": desk / "data",
        "OUT": desk / "out",
        "HF_HUB_OFFLINE": "1",
    }
    env = {**os.environ, **TOY, "OMP_NUM_THREADS": "1", "PATH": path}
    env |= {name: str(value) for name, value in {**more, **variables}.items()}
    done = subprocess.run(
        ["bash", ROOT / "runs" / script], env=env, capture_output=True, text=True, cwd=desk
    )
    print(done.stdout, done.stderr)
    return done.returncode


def written(desk):
    """{file: time of its last change} of everything that a script wrote."""
    return {
        p: p.stat().st_mtime_ns
        for top in ("data", "out")
        for p in (desk / top).rglob("*")
        if p.is_file()
    }


def assert_done(desk, script, **variables):
    """The script once more starts no command and changes no file."""
    before = written(desk)
    idle = desk / "idle"
    idle.mkdir()
    for name in ("python", "torchrun", *FAKES):
        command(idle, name, f"echo {name} was started >&2\nexit 9")
    assert run(desk, script, path=f"{idle}:{os.environ['PATH']}", **variables) == 0
    assert written(desk) == before


# ---------------------------------------------------------------- toy scenes in released layouts
def scene(k):
    made = world.make_scene(k)
    return world.draw(made), [fact["text"] for fact in world.facts(made)]


def draw(path, k):
    """Scene k as a file -> its facts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture, facts = scene(k)
    picture.save(path)
    return facts


def scenes(folder, n, start=0):
    for k in range(start, start + n):
        draw(folder / f"{k:05d}.png", k)
    return folder


def release_gpt4v(released, n=8):
    """LAION's links, and what img2dataset makes of them: shards with an image, a text and a JSON file each."""
    (released / "gpt4v-dataset/data").mkdir(parents=True)
    (released / "gpt4v-dataset/data/train-00000-of-00001.parquet").write_bytes(b"links")
    for k in range(n):
        image = released / f"gpt4v/00000/{k:09d}.jpg"
        facts = draw(image, k)
        image.with_suffix(".txt").write_text(f"The image shows {', '.join(facts)}.")
        image.with_suffix(".json").write_text("{}")


def release_docci(released):
    """Descriptions of all splits, and an archive of images/."""
    names = [f"{split}_{k:05d}" for split in ("train", "test", "qual_dev") for k in range(8)]
    rows = []
    with tarfile.open(released / "files/docci_images.tar.gz", "w:gz") as archive:
        for k, name in enumerate(names):
            facts = draw(released / f"{name}.jpg", k)
            archive.add(released / f"{name}.jpg", f"images/{name}.jpg")
            row = {"example_id": name, "split": name[:-6], "image_file": f"{name}.jpg"}
            rows.append({**row, "description": f"{', '.join(facts)}."})
    write_rows(released / "files/docci_descriptions.jsonlines", rows)


def release_vsr(released, n=6):
    rows = []
    for k in range(n):
        name = f"{k:012d}.jpg"
        draw(released / "files" / name, 50 + k)
        link = f"http://images.cocodataset.org/{('train2017', 'val2017')[k % 2]}/{name}"
        rows.append(
            {
                "image": name,
                "image_link": link,
                "caption": "The ring is left of the disc.",
                "label": k % 2,
            }
        )
    (released / "vsr_random").mkdir()
    write_rows(released / "vsr_random/train.jsonl", rows)


def release_naturalbench(folder, kind="Question_Type", n=3):
    """Parquet of n rows of yes/no questions and one of another kind, in two files."""
    rows = []
    for k in range(n + 1):
        row = {"Index": k, kind: "yes_no" if k < n else "multiple_choice", "Source": "toy"}
        for i in (0, 1):
            data = io.BytesIO()
            scene(70 + 2 * k + i)[0].save(data, "JPEG")
            row[f"Image_{i}"] = {"bytes": data.getvalue(), "path": f"{k}-{i}.jpg"}
            row[f"Question_{i}"] = world.ask(scene(70 + 2 * k + i)[1][0])
            row |= {f"Image_{i}_Question_{j}": ("No", "Yes")[i == j] for j in (0, 1)}
        rows.append(row)
    (folder / "data").mkdir(parents=True)
    for k, part in enumerate((rows[:2], rows[2:])):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(part), folder / f"data/train-{k:05d}-of-00002.parquet"
        )


def release_capeval(folder):
    rows = []
    for k, name in enumerate(("SO001.jpg", "TI002.png")):
        facts = draw(folder / "image" / name, 90 + k)
        items = [
            {"Tags": "object", "Question": f"Does the caption mention a {fact}?"} for fact in facts
        ]
        rows.append(
            {
                "id": name[:5],
                "img_path": name,
                "instance_checklist": items[:1],
                "text_checklist": items[1:],
            }
        )
    write_rows(folder / "checklist.jsonl", rows)


# ---------------------------------------------------------------- the scripts
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash_that_stops_at_errors(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "\nset -euo pipefail\n" in script.read_text()


def test_every_script_is_run_below():
    assert {path.name for path in SCRIPTS} == {"source.sh", "qwen3_vl_24gb.sh", "no_data.sh"}


def captions_of(path, n):
    rows = read_rows(path)
    return len(rows) == n and all(row["caption"] for row in rows)


def test_source(desk):
    """On one rank under torchrun. It is stopped once, by a flag that a later stage refuses, and then goes on."""
    release_gpt4v(desk / "released")
    images = {"IMAGES": scenes(desk / "images", 4, 20), "MORE": scenes(desk / "more", 4, 30)}
    variables = {"GPUS": 1, "QA_IMAGES": 6, "TEST": scenes(desk / "test", 2, 40), **images}
    assert run(desk, "source.sh", DPO_FLAGS="--no-such-flag", **variables) != 0
    assert (desk / "out/golden/index.html").is_file() and not (desk / "out/dpo").exists()
    before = written(desk)

    assert run(desk, "source.sh", **variables) == 0
    assert before.items() <= written(desk).items(), "a step that was done was done again"
    for folder in ("sft", "qa", "dpo", "qa-2", "dpo-2"):
        assert (desk / "out" / folder / "adapters.safetensors").is_file()
    parent = json.loads((desk / "out/dpo-2/adapters.json").read_text())["parent"]
    assert Path(parent).name == "dpo"
    assert captions_of(desk / "out/captions.jsonl", 8) and captions_of(
        desk / "out/qa-captions.jsonl", 6
    )
    assert "image shows" not in (desk / "out/captions.jsonl").read_text()
    for stage in ("sft", "dpo", "dpo-2"):
        assert captions_of(desk / f"out/test-{stage}.jsonl", 2)
    log = (desk / "released/log").read_text().splitlines()
    assert [line.split()[0] for line in log] == ["hf", "img2dataset"]
    assert_done(desk, "source.sh", **variables)


def test_qwen3_vl_24gb(desk):
    released = desk / "released"
    release_docci(released)
    release_vsr(released)
    release_naturalbench(released / "NaturalBench")
    release_capeval(released / "CAPEval")
    assert run(desk, "qwen3_vl_24gb.sh", QA_IMAGES=4) == 0
    for folder in ("sft", "qa", "dpo", "qa-2", "dpo-2"):
        assert (desk / "out" / folder / "adapters.safetensors").is_file()
    assert captions_of(desk / "out/captions.jsonl", 8)
    questions = read_rows(desk / "out/questions.jsonl")
    assert len(questions) == len(read_rows(desk / "out/docci-questions.jsonl")) + 6
    assert all((desk / "out" / row["image"]).is_file() for row in questions)
    for k, numbers in ((1, "02468"), (2, "13579")):
        rows = read_rows(
            desk / ("out/golden/record.jsonl" if k == 1 else "out/golden-2/record.jsonl")
        )
        assert len(rows) == 4 and all(
            row["image"][-5] in numbers and "test_" in row["image"] for row in rows
        )
        assert "12 questions" in (desk / f"out/naturalbench-{k}.txt").read_text()
    for stage in ("base", "sft", "dpo", "dpo-2"):
        assert captions_of(desk / f"out/capeval-{stage}.jsonl", 2)
        figures = json.loads((desk / f"out/capeval-{stage}.json").read_text())["figures"]
        assert set(figures) == {"all", "Scene & Object", "Text & Interface"}
        assert figures["all"]["items"] == sum(figures[name]["items"] for name in figures) / 2 > 4
        submission = json.loads((desk / f"out/capeval-{stage}-submission.json").read_text())
        assert [row["image_id"] for row in submission] == ["SO001.jpg", "TI002.png"]
    assert_done(desk, "qwen3_vl_24gb.sh", QA_IMAGES=4)


def test_no_data(desk):
    variables = {"IMAGES": scenes(desk / "images", 4, 20), "TEST": scenes(desk / "test", 2, 40)}
    variables["PROMPT"] = "Generate the caption in English:"
    assert run(desk, "no_data.sh", **variables) == 0
    assert not (desk / "released/log").exists() and not (desk / "data").exists()
    for folder in ("dpo", "dpo-2"):
        assert (desk / "out" / folder / "adapters.safetensors").is_file()
    for stage in ("base", "dpo", "dpo-2"):
        assert captions_of(desk / f"out/test-{stage}.jsonl", 2)
    assert_done(desk, "no_data.sh", **variables)


@pytest.mark.parametrize("script", ("source.sh", "no_data.sh"))
def test_a_missing_folder_is_one_line(desk, script, capfd):
    assert run(desk, script, IMAGES="", TEST="") != 0
    assert "IMAGES: a folder of images" in capfd.readouterr().out
    assert not (desk / "out").exists()


# ---------------------------------------------------------------- data sets as rows
def prepared(desk, name, folder):
    assert prepare.main([name, str(folder), "--out", str(desk / "rows" / f"{name}.jsonl")]) == 0
    rows = read_rows(desk / "rows" / f"{name}.jsonl")
    assert all((desk / "rows" / row["image"]).is_file() for row in rows)
    return rows


def test_docci_gives_its_training_captions(desk):
    draw(desk / "docci/images/train_00000.jpg", 0)
    draw(desk / "docci/images/test_00000.jpg", 1)
    rows = [
        {"split": s, "image_file": f"{s}_0000{k}.jpg", "description": "a\n b "}
        for s, k in (("train", 0), ("train", 1), ("test", 0))
    ]
    write_rows(desk / "docci/docci_descriptions.jsonlines", rows)
    assert prepared(desk, "docci", desk / "docci") == [
        {"image": "../docci/images/train_00000.jpg", "caption": "a b"}
    ]


@pytest.mark.parametrize(
    "statement, question",
    [
        ("The cat is inside the refrigerator.", "Is the cat inside the refrigerator?"),
        ("The dining table is left of the person.", "Is the dining table left of the person?"),
        ("The books are on the shelf.", "Are the books on the shelf?"),
        ("The suitcase contains the cat.", "Is it true that the suitcase contains the cat?"),
    ],
)
def test_a_statement_of_vsr_becomes_a_question(statement, question):
    assert prepare.ask(statement) == question


def test_vsr_gives_yes_and_no(desk):
    release_vsr(desk / "released")
    (desk / "released/files").rename(desk / "released/vsr_random/images")
    rows = prepared(desk, "vsr", desk / "released/vsr_random")
    assert [row["answer"] for row in rows] == ["No", "Yes"] * 3


@pytest.mark.parametrize("kind", ("Question_Type", "Question Type"))
def test_naturalbench_gives_four_questions_a_row(desk, kind):
    release_naturalbench(desk / "nb", kind)
    rows = prepared(desk, "naturalbench", desk / "nb")
    assert len(rows) == 12 and len({row["image"] for row in rows}) == 6
    assert [row["answer"] for row in rows[:4]] == ["Yes", "No", "No", "Yes"]
    assert rows[0]["question"] == rows[2]["question"] != rows[1]["question"]


def test_a_folder_without_the_files_is_one_line(desk):
    for name in prepare.DATA_SETS:
        with pytest.raises(SystemExit) as stop:
            prepare.main([name, str(desk), "--out", str(desk / "rows.jsonl")])
        assert str(stop.value).startswith("prepare.py: ") and "\n" not in str(stop.value)
    assert not (desk / "rows.jsonl").exists()
