"""The hard world: its long tail, companions and counts, and what a base and the claims make of it."""

import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import toy
from base import open_base
from generate import judge
from plumbing import rules
from plumbing.errors import InputError
from plumbing.scoring import score
from plumbing.tokenizer import Tokenizer
from toy_world import base as toy_base
from toy_world import claims, hard, longtail, shapes, world, worlds
from toy_world import lab as lab_module
from toy_world.lab import TUNE, Lab

SCENES = [hard.make_scene(k) for k in range(1500)]
TAIL = [hard.make_scene(k, tail=hard.TAIL) for k in range(600)]


def texts_of(scene):
    return [fact["text"] for fact in hard.facts(scene)]


# ---------------------------------------------------------------- scenes
def test_a_seed_is_a_scene_and_a_picture():
    a, b, c = (hard.make_scene(s) for s in ("x", "x", "y"))
    assert a == b != c
    assert np.array_equal(np.asarray(hard.draw(a)), np.asarray(hard.draw(b)))


def test_scenes_are_long_and_no_fact_is_stated_twice():
    lengths = Counter(len(texts_of(scene)) for scene in SCENES + TAIL)
    assert max(lengths) == hard.MOST_FACTS and lengths[hard.MOST_FACTS] > 100
    assert all(len(set(texts_of(scene))) == len(texts_of(scene)) for scene in SCENES)
    kinds = {fact["kind"] for scene in SCENES for fact in hard.facts(scene)}
    assert kinds == {"background", "object", "mark", "companion", "center", "count", "largest"}


def test_words_are_as_frequent_as_said_and_the_rarest_are_seen_a_handful_of_times():
    counts = Counter(thing.shape for scene in SCENES for thing in hard.objects(scene))
    n, most, least = counts.total(), *(pick(hard.SHAPE_RATES.values()) for pick in (max, min))
    for shape, rate in hard.SHAPE_RATES.items():
        assert abs(counts[shape] / n - rate) < 5 * (rate / n) ** 0.5 + 1e-3
    sightings = 64_000 * n / len(SCENES) * least  # of the rarest, in 2000 steps of 32 scenes
    assert 5 < sightings < 40 and most / least > 1000
    assert sum(hard.COLOR_RATES.values()) == pytest.approx(1)


def test_a_fact_is_rare_by_its_words_and_a_heavier_tail_has_more_of_them():
    rare = {"maroon", "heart", "hearts", "sand", "net"}
    assert rare <= hard.RARE_WORDS and not hard.RARE_WORDS & {"red", "circle", "circles", "lines"}
    share = {}
    for name, scenes in (("usual", SCENES), ("tail", TAIL)):
        rows = [fact for scene in scenes for fact in hard.facts(scene)]
        assert all(
            row["rare"] == any(w in hard.RARE_WORDS for w in row["text"].split()) for row in rows
        )
        share[name] = np.mean([row["rare"] for row in rows])
    assert 0 < share["usual"] < 0.03 and share["tail"] > 0.07


def cover(thing):
    """Which share of each pixel an object covers."""
    pixels = np.zeros((hard.SIDE, hard.SIDE, 3))
    shapes.paint(pixels, thing, np.ones(3))
    return pixels[:, :, 0]


@pytest.mark.parametrize("relation", hard.RELATIONS)
def test_a_companion_is_beside_its_object_or_one_hides_a_part_of_the_other(relation):
    pairs = [
        t for s in SCENES for t in s.things if t.companion and t.companion.relation == relation
    ]
    shared = []
    for thing in pairs[:60]:
        pair = [
            hard.Thing("", "", "circle", None, t.x, t.y, t.radius) for t in (thing, thing.companion)
        ]
        large, small = map(cover, pair)
        assert small[[0, -1]].sum() == small[:, [0, -1]].sum() == 0  # within the picture
        shared.append((large * small).sum() / small.sum())
    low, high = {"beside": (0, 0.02), "behind": (0.1, 0.6), "front": (0.9, 1.01)}[relation]
    assert low <= min(shared) and max(shared) <= high


def test_what_is_in_front_is_seen_and_what_is_behind_is_hidden():
    def drawn(relation):
        small = hard.Thing("top-left", "yellow", "circle", None, 20, 16, 4, relation)
        thing = hard.Thing("top-left", "blue", "circle", None, 16, 16, 8, None, small)
        return np.asarray(hard.draw(hard.Scene("black", [thing], 0, 0.0)))[16, 20].astype(int)

    assert drawn("front")[0] > 150 > 100 > drawn("behind")[0]


@pytest.mark.parametrize("kind", hard.MARKS)
def test_halving_leaves_nothing_of_any_mark(kind):
    mark = hard.hatch(kind, 10, 12)
    assert abs(world.HALVING @ mark @ world.HALVING.T).max() < 1e-9 and mark.std() > 0.09
    others = [hard.hatch(other, 10, 12) for other in hard.MARKS if other != kind]
    assert min(abs(mark - other).sum() for other in others) > 20


# ---------------------------------------------------------------- questions
def test_questions_are_answered_by_the_truth():
    rng, answers, kinds = random.Random(0), [], Counter()
    for number, scene in enumerate(TAIL):
        if number % 3 == 0:
            scene = hard.as_close_up(scene, scene.things[0])
        row = hard.truth(scene, "")
        parts = {f"{t.place} {part}" for t in scene.things for part in (t.color, t.shape)}
        true = {fact["text"] for fact in row["facts"]}.union(row["also_true"], parts)
        for text, answer, kind in hard.questions(scene, 8, rng):
            assert answer.startswith("Yes") == (text in true), (text, answer)
            assert answer.startswith("Yes") or answer.removeprefix("No, ") in true, (text, answer)
            answers.append(answer.startswith("Yes"))
            kinds[kind] += 1
    assert np.mean(answers) == pytest.approx(0.5, abs=0.03)
    assert set(kinds) == {
        *("background", "object", "mark", "companion", "center", "count", "largest", "part"),
        *(kind for _, kind, _ in hard.MISSES),
    }


def test_a_rare_word_does_not_give_the_answer_away():
    rng, answers = random.Random(1), {True: [], False: []}
    for scene in TAIL:
        for text, answer, kind in hard.questions(scene, 16, rng):
            if kind in ("object", "wrong shape", "wrong color"):
                answers[hard.is_rare(text)].append(answer.startswith("Yes"))
    assert abs(np.mean(answers[True]) - np.mean(answers[False])) < 0.12 and len(answers[True]) > 500


# ---------------------------------------------------------------- statements by the rules
def test_all_facts_of_a_scene_are_kept_in_order_and_in_no_group():
    for scene in SCENES[:300]:
        texts = texts_of(scene)
        shuffled = ", ".join(random.Random(len(texts)).sample(texts, len(texts)))
        rows = rules.combine_rule([shuffled, ", ".join(texts)])
        assert [row["text"] for row in rows] == texts
        assert all(row["group"] is None and row["votes"] == 2 for row in rows)


@pytest.mark.parametrize(
    "one, other, contradict",
    [
        ("circles two", "circles three", True),
        ("circles two", "rings three", False),
        ("largest top-left", "largest center", True),
        ("top-left red star behind", "top-left red star beside", True),
        ("top-left red star", "top-left red star behind", False),
        ("top-left red star behind", "top-right red star beside", False),
        ("two", "three", False),
    ],
)
def test_contradictions_share_a_group_and_one_of_them_is_kept(one, other, contradict):
    rows = rules.combine_rule([one, other])
    groups = [row["group"] for row in rows]
    assert (groups[0] is not None and groups[0] == groups[1]) == contradict
    judged = judge([{**row, "p_yes": 0.9} for row in rows], 0.5, 1, resolve=True)
    assert sum(row["kept"] for row in judged) == (1 if contradict else 2)


# ---------------------------------------------------------------- scores
def test_rare_facts_are_scored_apart():
    def fact(text, rare):
        return {"text": text, "about": text.split()[0], "kind": "k", "rare": rare}

    truth = [
        {"image": "a", "facts": [fact("left red ring", False), fact("right pink ring", True)]},
        {"image": "b", "facts": [fact("left red cross", False), fact("right sand", True)]},
    ]
    captions = [
        {"image": "a", "caption": "left red ring, right pink ring, left pink cross"},
        {"image": "b", "caption": "left red ring"},
    ]
    scores = score(captions, truth)
    assert (scores["rare_precision"], scores["rare_recall"]) == (0.5, 0.5)
    assert (scores["common_precision"], scores["common_recall"]) == (0.5, 0.5)
    assert (scores["precision"], scores["recall"]) == (0.5, 0.5)
    for row in truth:
        for each in row["facts"]:
            del each["rare"]
    assert not {name for name in score(captions, truth) if "rare" in name or "common" in name}


def test_full_descriptions_score_one_and_the_table_has_the_rare_ones():
    truth = [hard.truth(scene, str(k)) for k, scene in enumerate(TAIL[:60])]
    full = [
        {"image": row["image"], "caption": ", ".join(f["text"] for f in row["facts"])}
        for row in truth
    ]
    scores = score(full, truth)
    for name in ("precision", "recall", "detail_recall", "rare_precision", "rare_recall"):
        assert scores[name] == 1
    figures = dict.fromkeys(toy.COLUMNS, 0.25)
    header, row = toy.table(
        {"sft": {"greedy": figures | {"rare_precision": 1.0, "rare_recall": 0.125}}}
    )
    assert header.split()[-2:] == ["rare", "R"] and row.split()[-2:] == ["1.000", "0.125"]
    header, _ = toy.table({"sft": {"greedy": figures}})
    assert "rare" not in header


# ---------------------------------------------------------------- bases
def test_every_word_of_the_world_is_one_token(tmp_path):
    world.write_vocabulary(tmp_path / "qwen.tiktoken", hard.WORDS)
    tokenizer = Tokenizer(tmp_path)
    for scene in TAIL[:100]:
        asked = hard.questions(scene, 8, random.Random(0))
        texts = [" " + ", ".join(texts_of(scene))]
        texts += [f"{world.ask(text)} Answer: {answer}" for text, answer, _ in asked]
        for text in texts:
            n_words = len(re.sub(r"([-,?:])", r" \1", text).replace("- ", "-").split())
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and len(ids) == n_words


@pytest.fixture(scope="module")
def hard_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hard") / "base"
    flags = ["--steps", "1", "--batch", "1", "--questions", "2"]
    assert toy.main(["pretrain", "--world", "hard", "--out", str(folder), *flags]) == 0
    assert toy.main(["pretrain", "--out", str(folder), *flags]) == 0  # it is remembered
    return folder


def test_a_base_remembers_its_world(hard_base, tmp_path, capsys):
    assert worlds.name_of(hard_base) == worlds.name_of(hard_base, "hard") == "hard"
    assert worlds.name_of(tmp_path) == "easy" and worlds.name_of(tmp_path, "hard") == "hard"
    before = {path.name: path.read_bytes() for path in hard_base.iterdir()}
    run = ["--out", str(tmp_path / "run")]
    for command in (
        ["pretrain", "--out", str(hard_base), "--world", "easy"],
        ["report", "--base", str(hard_base), "--world", "easy"],
        ["--base", str(hard_base), "--world", "easy", *run],
    ):
        capsys.readouterr()
        assert toy.main(command) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--world easy" in error and "hard" in error
    assert before == {path.name: path.read_bytes() for path in hard_base.iterdir()}
    assert not (tmp_path / "run").exists()
    (tmp_path / "world.json").write_text('{"world": "flat"}')
    with pytest.raises(InputError, match=r"world\.json"):
        worlds.name_of(tmp_path)


@pytest.mark.parametrize("base", ["assets/toy", "assets/toy-qwen3-vl"])
def test_the_shipped_bases_are_of_the_easy_world(base, tmp_path, capsys):
    run = ["--base", base, "--world", "hard", "--out", str(tmp_path / "run")]
    assert toy.main(run) == 1 and not (tmp_path / "run").exists()
    assert "easy world" in capsys.readouterr().err


def test_a_report_has_the_rare_ones_apart(hard_base, capsys):
    assert toy.main(["report", "--base", str(hard_base), "--scenes", "2"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert json.loads(first)["world"] == "hard"
    figures = {name: json.loads(value) for name, value in (line.split(": ", 1) for line in lines)}
    for views in ("six views", "six views, more rare words"):
        recall, answers = figures[f"{views}, recall"], figures[f"{views}, yes/no"]
        for of in (recall, answers):
            assert of["common"][1] + of.get("rare", [0, 0])[1] == of["all"][1] > 0
    assert figures["six views, more rare words, recall"]["rare"][1] > 0


# ---------------------------------------------------------------- the claim
def test_the_scenes_of_a_lab_are_those_of_its_base(hard_base, tmp_path):
    lab = Lab(tmp_path, 3, hard_base)
    _, truth = lab.split("train", 2, "captions")
    rows = [json.loads(line) for line in truth.read_text().splitlines()]
    assert rows[1]["facts"] == hard.facts(hard.make_scene("train 3 1"))


def test_longtail_tests_what_was_tuned_on_scenes_with_more_rare_words(
    hard_base, tmp_path, monkeypatch
):
    """With stages that change nothing and captions that state all facts."""
    tuned = []

    def tune(lab, name, tune, lr):
        tuned.append((lab.seed, tune, lr))
        return hard_base

    def judge(lab, name, images, truth, *how, seed):
        if lab.seed != TUNE:
            assert how == ("--base", hard_base, "--adapters", "none")
        rows = [json.loads(line) for line in truth.read_text().splitlines()]
        captions = [
            {
                "image": row["image"],
                "caption": ", ".join(fact["text"] for fact in row["facts"]),
                "finish": "eos",
            }
            for row in rows
        ]
        return dict.fromkeys(("greedy", "sampled"), score(captions, rows))

    monkeypatch.setattr(Lab, "tuned", tune)
    monkeypatch.setattr(Lab, "judge", judge)
    monkeypatch.setattr(Lab, "load", lambda lab, *folders: open_base(lab.base))
    for module, name, value in (
        (longtail, "SCENES", 1),
        (longtail, "HELD_OUT", 6),
        (longtail, "LRS", ("1e-3",)),
        (longtail, "TUNES", ("adapters", "full")),
        (lab_module, "HELD_OUT", 2),
    ):
        monkeypatch.setattr(module, name, value)
    lab = Lab(tmp_path, 0, hard_base)
    figures = longtail.longtail(lab)
    assert tuned == [
        (seed, tune, "1e-3") for tune in ("adapters", "full") for seed in (TUNE, lab.seed)
    ]
    assert set(figures) == {"base", "adapters", "full"}
    before = figures["base"]
    for arm in ("adapters", "full"):
        assert before.items() <= figures[arm].items() and len(before) == 6
        assert longtail.lost(figures, arm, "common") == longtail.lost(figures, arm, "rare") == 0
        assert figures[arm]["caption recall, rare"] == figures[arm]["caption recall, common"] == 1
    (truth,) = (tmp_path / "seed-0/truth").glob("held-out-tail.jsonl")
    rows = [json.loads(line) for line in truth.read_text().splitlines()]
    assert rows[5]["facts"] == hard.facts(hard.make_scene("held-out-tail 0 5", tail=hard.TAIL))


def of_tunes(**recalls):
    """Figures in which the base recalls all, and each tune the shares (common, rare)."""
    pairs = {"base": (1, 1), "prompt": (1, 1), **recalls}
    keys = [f"dense recall, {frequency}" for frequency in longtail.FREQUENCIES]
    return {tune: dict(zip(keys, pair)) for tune, pair in pairs.items()}


@pytest.mark.parametrize(
    "holds, recalls",
    [
        (True, {"adapters": (0.9, 0.9), "lora": (0.9, 0.8), "full": (0.95, 0.5)}),
        (False, {"adapters": (0.9, 0.8), "lora": (0.9, 0.8), "full": (0.95, 0.5)}),
        (False, {"adapters": (0.9, 0.9), "lora": (0.9, 0.8), "full": (0.5, 0.5)}),
        (False, {"adapters": (0.9, 0.9), "lora": (0.8, 0.8), "full": (0.95, 0.5)}),
    ],
)
def test_the_rule_of_the_long_tail(holds, recalls):
    assert claims.CLAIMS["longtail"].rule([of_tunes(**recalls)]) == [holds]


def test_claims_are_tested_on_a_base_of_their_world(hard_base, tmp_path):
    def chosen(base=None, only=None):
        return claims.chosen(SimpleNamespace(base=base, only=only))

    assert chosen(hard_base) == chosen(hard_base, "longtail") == ["longtail"]
    assert "longtail" not in chosen() and "forgetting" in chosen()
    for base, only in (
        (hard_base, "forgetting"),
        (None, "longtail"),
        (tmp_path, None),
        (None, "x"),
    ):
        with pytest.raises(InputError):
            chosen(base, only)


def test_close_ups_and_training_rows_are_of_the_world(tmp_path):
    model = toy_base.fresh_model("qwen_vl", tmp_path, 0, hard)
    for k in range(30):
        scene, pictures = toy_base.scene_views("close", k, hard)
        assert len(pictures) == 1 and scene.is_close_up and pictures[0].size == (32, 32)
        assert {text.split()[0] for text in texts_of(scene)} == {"background", "close-up"}
    batch, task = toy_base.make_batch(model, "six", 0, 0, 2, 2, 0.0, hard)
    assert batch["logp_of"].shape == task.shape
    tokens = batch["logp_of"][0][task[0] == toy_base.TASK_NAMES.index("dense")].tolist()
    dense = model.tokenizer.decode([t for t in tokens if t >= 0 and t != model.tokenizer.eos_id])
    scene, _ = toy_base.scene_views("six", "0 0 0", hard)
    assert dense.strip() == ", ".join(texts_of(scene))
