"""The toy world: its facts, its pictures, the mark that only crops show, its questions; and the small base."""

import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import toy
from chunking import views
from generate import sample
from model import QwenVL
from plumbing.errors import InputError
from plumbing.images import open_image
from plumbing.tokenizer import Tokenizer
from toy_world import base as toy_base
from toy_world import world

SHIPPED = Path(toy.__file__).parent / "assets/toy"


# ---------------------------------------------------------------- scenes
def test_a_seed_is_a_scene_and_a_picture():
    a, b, c = (world.make_scene(s) for s in ("x", "x", "y"))
    assert a == b != c
    assert np.array_equal(np.asarray(world.draw(a)), np.asarray(world.draw(b)))


def test_the_world_is_as_described():
    scenes = [world.make_scene(i) for i in range(3000)]
    things = [t for s in scenes for t in s.things if t.place != "center"]
    for group in ("warm", "cold"):
        marked = [t.mark for t in things if t.group == group and t.mark]
        rate = np.mean([bool(t.mark) for t in things if t.group == group])
        assert rate == pytest.approx(world.MARK_RATE[group], abs=0.02)
        usual = world.MARKS[group == "cold"]
        assert np.mean([m == usual for m in marked]) == pytest.approx(
            world.MARK_KIND_RATE, abs=0.03
        )
    assert {len([t for t in s.things if t.place != "center"]) for s in scenes} == {2, 3, 4}
    assert np.mean([any(t.place == "center" for t in s.things) for s in scenes]) == pytest.approx(
        0.6, abs=0.03
    )
    assert {t.color for t in things} == set(world.COLORS) and {t.shape for t in things} == set(
        world.SHAPES
    )
    even = [
        t
        for i in range(1500)
        for t in world.make_scene(i, planted=False).things
        if t.place != "center"
    ]
    for group in ("warm", "cold"):
        assert np.mean([bool(t.mark) for t in even if t.group == group]) == pytest.approx(
            0.5, abs=0.04
        )


def test_truth_names_every_fact_and_every_temptation():
    for i in range(200):
        scene = world.make_scene(i)
        row = world.truth(scene, "x.png")
        texts = [fact["text"] for fact in row["facts"]]
        assert (
            len(set(texts))
            == len(texts)
            == 1 + len(scene.things) + sum(bool(t.mark) for t in scene.things)
        )
        assert texts[0] == f"background {scene.background}"
        assert all(text.startswith(fact["about"]) for text, fact in zip(texts, row["facts"]))
        bare = [t for t in scene.things if t.place != "center" and not t.mark]
        assert len(row["planted"]) == 2 * len(bare) and not {
            p["text"] for p in row["planted"]
        } & set(texts)


def test_questions_are_answered_by_the_facts():
    rng, answers, kinds = random.Random(0), [], Counter()
    for i in range(600):
        scene = world.make_scene(i)
        if i % 3 == 0:
            scene = world.as_close_up(scene, scene.things[0])
        true = {f["text"] for f in world.facts(scene)}
        parts = {f"{t.place} {part}" for t in scene.things for part in (t.color, t.shape)}
        for text, answer, kind in world.questions(scene, 8, rng):
            assert answer.startswith("Yes") == (text in true | parts), (text, answer)
            assert (kind in ("part", "wrong part")) == (
                len(text.split()) == 2 and text.split()[1] in (*world.COLORS, *world.SHAPES)
            )
            answers.append(answer.startswith("Yes"))
            kinds[kind] += 1
    assert np.mean(answers) == pytest.approx(0.5, abs=0.03)
    assert set(kinds) == {
        "background",
        "object",
        "mark",
        "center",
        "part",
        "wrong shape",
        "wrong color",
        "wrong place",
        "wrong mark",
        "wrong background",
        "wrong part",
    }


# ---------------------------------------------------------------- the mark
@pytest.mark.parametrize("kind", world.MARKS)
def test_halving_leaves_nothing_of_a_mark(kind):
    for x, y in ((16, 16), (13.6, 18.4), (48.2, 47)):
        mark = world.draw_mark(kind, x, y)
        assert abs(world.HALVING @ mark @ world.HALVING.T).max() < 1e-9
        assert (
            mark.std() * world.SIDE / world.MARK_SIDE > 0.9
        )  # at full resolution nothing of it is lost


def test_halving_is_what_pillow_does():
    picture = np.random.default_rng(0).uniform(0, 255, (world.SIDE, world.SIDE)).astype(np.float32)
    expected = np.asarray(Image.fromarray(picture).resize((32, 32), Image.BICUBIC))
    np.testing.assert_allclose(world.HALVING @ picture @ world.HALVING.T, expected, atol=1e-3)


def test_a_probe_on_view_0_sees_no_mark_and_a_probe_on_a_crop_does():
    """Ridge regression from pixels around the object to marked or not, marks independent of the colour."""
    low, high, marked = [], [], []
    for i in range(1600):
        scene = world.make_scene(f"probe {i}", planted=False)
        pixels = views(world.draw(scene), 32)
        for number, place in enumerate(world.PLACES):
            for thing in scene.things:
                if thing.place == place:
                    x, y = (c // 2 - 8 for c in world.PLACES[place])
                    patch = pixels[0, :, y : y + 16, x : x + 16].double()
                    crop = pixels[1 + number, :, 8:24, 8:24].double()
                    low.append(torch.cat([patch.flatten(), patch.mean(0).flatten() ** 2]))
                    high.append(
                        torch.cat([crop.flatten(), crop.mean(0).diff(dim=1).abs().flatten()])
                    )
                    marked.append(1.0 if thing.mark else -1.0)

    def held_out_accuracy(features):
        X, y = torch.stack(features), torch.tensor(marked, dtype=torch.float64)
        X = torch.cat([(X - X.mean(0)) / X.std(0), torch.ones(len(X), 1, dtype=torch.float64)], 1)
        half = len(X) // 2
        ridge = 300 * torch.eye(X.shape[1], dtype=torch.float64)
        w = torch.linalg.solve(X[:half].T @ X[:half] + ridge, X[:half].T @ y[:half])
        return ((X[half:] @ w > 0) == (y[half:] > 0)).double().mean().item()

    assert held_out_accuracy(high) > 0.9
    assert held_out_accuracy(low) < 0.54  # half of over 4000 held-out objects is .5 ± .011


# ---------------------------------------------------------------- files
def test_every_word_of_the_world_is_one_token(tmp_path):
    world.write_vocabulary(tmp_path / "qwen.tiktoken")
    tokenizer = Tokenizer(tmp_path)
    for i in range(100):
        scene = world.make_scene(i)
        texts = [" " + ", ".join(f["text"] for f in world.facts(scene))]
        asked = world.questions(scene, 8, random.Random(i))
        texts += [f"{world.ask(text)} Answer: {answer}" for text, answer, _ in asked]
        for text in texts:
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert len(tokenizer.encode(text)) == len(
                re.sub(r"([-,?:])", r" \1", text).replace("- ", "-").split()
            )
    assert [len(tokenizer.encode(word)) for word in (" Yes", " No", "yes", "no")] == [1] * 4


def test_scenes_command_writes_pictures_and_truth(tmp_path):
    assert toy.main(["scenes", "--out", str(tmp_path / "s"), "--n", "3", "--seed", "7"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "s/truth.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == ["00000.png", "00001.png", "00002.png"]
    scene = world.make_scene("scenes 7 1")
    assert rows[1] == world.truth(scene, "00001.png")
    captions, questions = (
        [json.loads(line) for line in (tmp_path / f"s/{kind}.jsonl").read_text().splitlines()]
        for kind in ("captions", "questions")
    )
    for row, caption in zip(rows, captions):
        stated, true = world.statements(caption["caption"]), {fact["text"] for fact in row["facts"]}
        assert (
            caption["image"] == row["image"]
            and len(set(stated)) == len(stated) >= 2
            and set(stated) <= true
        )
    assert len(questions) == 9 and all(q["answer"].startswith(("Yes", "No")) for q in questions)
    assert np.array_equal(
        np.asarray(open_image(tmp_path / "s/00001.png")), np.asarray(world.draw(scene))
    )


def test_the_scenes_behind_recorded_results_never_change(tmp_path):
    rows = world.draw_scenes(tmp_path, [f"train 0 {i}" for i in range(20)])
    content = json.dumps([rows["captions"], rows["truth"]]).encode()
    assert hashlib.sha256(content).hexdigest() == (
        "a7130018b3c092f68f03db2fec3e1e880807a1a69e6ea1fad43b57c2edeffa7c"
    )


def test_no_question_of_an_image_is_asked_twice(tmp_path):
    """The questions are those of `questions`, drawn until there are three different ones; all else stays as it is."""
    seeds = [f"train 0 {i}" for i in range(150)]
    rows = world.draw_scenes(tmp_path, seeds)
    n_repeated = 0
    for number, seed in enumerate(seeds):
        scene, rng = world.make_scene(seed), random.Random(f"rows {seed}")
        assert rows["captions"][number]["caption"] == world.short_caption(world.facts(scene), rng)
        drawn = [world.ask(text) for text, _, _ in world.questions(scene, 30, rng)]
        asked = rows["questions"][3 * number : 3 * number + 3]
        assert {row["image"] for row in asked} == {f"{number:05d}.png"}
        assert [row["question"] for row in asked] == list(dict.fromkeys(drawn))[:3]
        n_repeated += len(set(drawn[:3])) < 3
    assert len(rows["questions"]) == 3 * len(seeds) and n_repeated > 3


# ---------------------------------------------------------------- the base
def test_pretraining_writes_the_released_layout_and_resumes_where_it_stopped(tmp_path, monkeypatch):
    """Stopped in the fourth step and resumed: log and weights are those of an uninterrupted run, bit for bit."""
    arguments = [
        "pretrain",
        "--steps",
        "6",
        "--batch",
        "2",
        "--questions",
        "2",
        "--save-every",
        "2",
    ]
    assert toy.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    forward, calls = toy_base.weighted_loss, []

    def interrupted(*batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(*batch)

    monkeypatch.setattr(toy_base, "weighted_loss", interrupted)
    assert toy.main([*arguments, "--out", str(tmp_path / "stopped")]) == 130
    assert not (tmp_path / "stopped/model.safetensors").exists()
    assert toy.main([*arguments, "--out", str(tmp_path / "stopped")]) == 0
    assert len(calls) == 4 + 4
    for name in ("model.safetensors", "config.json", "qwen.tiktoken", "log.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "stopped" / name
        ).read_bytes(), name
    model = QwenVL.from_pretrained(tmp_path / "whole")
    assert (
        model.config.visual.image_size == 32
        and len((tmp_path / "whole/log.jsonl").read_text().splitlines()) == 6
    )


@pytest.mark.parametrize("flag, value", [("--steps", "8"), ("--lr", "0.5"), ("--seed", "1")])
def test_pretraining_does_not_resume_with_other_arguments(tmp_path, capsys, flag, value):
    arguments = ["pretrain", "--steps", "1", "--batch", "1", "--out", str(tmp_path)]
    assert toy.main(arguments) == 0
    before, _ = (tmp_path / "model.safetensors").read_bytes(), capsys.readouterr()
    assert toy.main([*arguments, flag, value]) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and f"another {flag} " in errors and f"now {value})" in errors
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_packed_training_row_asks_for_what_follows_each_prompt(tmp_path):
    model = toy_base.fresh_model("qwen_vl", tmp_path, 0)
    scene = world.make_scene(3)
    rows = toy_base.continuations(model, scene, 4, random.Random(0))
    ids, branch, target, task = toy_base.pack(model, 6, rows)
    decode = model.tokenizer.decode
    for k, (name, prompt, answer) in enumerate(rows, 1):
        own = [i for i, b in enumerate(branch) if b == k]
        assert [ids[i] for i in own] == prompt + answer and decode(answer)[0] == " "
        asked = [i for i in own if target[i] >= 0]
        assert [target[i] for i in asked] == [*answer, model.tokenizer.eos_id]
        names = [toy_base.TASK_NAMES[task[i]] for i in asked]
        assert names == (
            ["answer"] + ["reason"] * (len(asked) - 1) if name == "answer" else [name] * len(asked)
        )
    assert decode(rows[0][1]) == world.DENSE_PROMPT and decode(rows[2][1]).endswith("? Answer:")
    assert [name for name, _, _ in rows] == ["dense", "short"] + ["answer"] * 4 and branch.count(
        0
    ) == 36


@pytest.mark.parametrize("kind", ["close", "six"])
def test_the_loss_is_a_weighted_mean_over_the_targets_of_each_task(tmp_path, kind):
    """Every continuation in a row of its own, after a prefix of its own, gives the same loss."""
    model = toy_base.fresh_model("qwen_vl", tmp_path, 0)
    loss, means = toy_base.weighted_loss(model, *toy_base.make_batch(model, kind, 0, 1, 3, 4))
    nll = {name: [] for name in toy_base.TASKS}
    for name in ("0 1 0", "0 1 1", "0 1 2"):
        scene, pictures = toy_base.scene_views(kind, name)
        pixels, rng = model.look(pictures), random.Random("rows " + name)
        prefix = model.head(len(pixels))
        for task, prompt, answer in toy_base.continuations(model, scene, 4, rng):
            targets = [*answer, model.tokenizer.eos_id]
            logits = model(torch.tensor([prefix + prompt + answer]), pixels)[0, -len(targets) :]
            losses = F.cross_entropy(logits, torch.tensor(targets), reduction="none").tolist()
            nll[task] += losses if task != "answer" else losses[:1]
            nll["reason"] += losses[1:] if task == "answer" else []
    expected = {name: np.mean(losses) for name, losses in nll.items()}
    assert {name: mean.item() for name, mean in means.items()} == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(
        sum(toy_base.TASKS[name] * mean for name, mean in expected.items()), rel=1e-4
    )


def test_the_report_counts_right():
    truth = {
        "facts": [
            {"text": "background gray", "kind": "background"},
            {"text": "top-left red ring", "kind": "object"},
            {"text": "top-right red ring", "kind": "object"},
            {"text": "top-right stripes", "kind": "mark"},
        ],
        "planted": [
            {"text": "top-left stripes", "group": "warm"},
            {"text": "top-left checks", "group": "warm"},
        ],
    }
    caption = ["background gray", "top-left red ring", "top-left stripes", "top-left red ring"]
    figures = toy_base.caption_report([caption], [truth])
    assert figures["precision"] == {"all": [0.667, 3], "mark": [0.0, 1]}
    assert figures["recall"] == {
        "all": [0.5, 4],
        "background": [1.0, 1],
        "object": [0.5, 2],
        "mark": [0.0, 1],
    }
    assert figures["mark invented on"] == {"warm": [1.0, 1], "cold": [0.0, 0]}


def test_a_missing_base_is_one_line(capsys, tmp_path):
    assert toy.main(["report", "--base", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("toy.py: ") and error.count("\n") == 1


# ---------------------------------------------------------------- the shipped base
def test_the_shipped_base_is_small_and_its_captions_are_mostly_right():
    assert sum(p.stat().st_size for p in SHIPPED.rglob("*") if p.is_file()) <= 5_000_000
    model = QwenVL.from_pretrained(SHIPPED)
    rows = [
        json.loads(line) for line in (SHIPPED / "examples/truth.jsonl").read_text().splitlines()
    ]
    pixels = torch.stack(
        [views(open_image(SHIPPED / "examples" / row["image"]), 32) for row in rows]
    )
    stated = [
        (text, {fact["text"] for fact in row["facts"]})
        for row, (result,) in zip(
            rows, sample(model, pixels, [row["image"] for row in rows], 1, temperature=0)
        )
        for text in world.statements(result["caption"])
    ]
    assert len(stated) >= len(rows)
    assert np.mean([text in true for text, true in stated]) >= 0.8


def test_the_shipped_base_sees_the_mark_in_six_views_and_invents_it_in_one(capsys):
    """A small run of `toy.py report`, far from the edge of its figures in docs/toy-world.md."""
    assert toy.main(["report", "--base", str(SHIPPED), "--scenes", "40"]) == 0
    lines = dict(
        line.split(": ", 1)
        for line in capsys.readouterr().out.splitlines()
        if not line.startswith("{")
    )
    figures = {name: json.loads(value) for name, value in lines.items()}
    assert (
        figures["six views, precision"]["mark"][0] > 0.9
        and figures["six views, recall"]["mark"][0] > 0.9
    )
    assert figures["one low-resolution view, mark invented on"]["warm"][0] > 0.6
    assert figures["six views, mark invented on"]["warm"][0] < 0.1
    assert figures["six views, yes/no"]["wrong shape"][0] > 0.7
    assert figures["close-ups, marks at even odds"]["mark told"][0] > 0.95


def test_a_folder_that_is_not_a_base_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        QwenVL.from_pretrained(tmp_path)
