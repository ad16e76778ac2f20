"""evaluate.py and scoring.py: metrics by hand, intervals, golden files, CHAIR, and the script."""

import json
import math
import os
import time
from fractions import Fraction

import pytest
import stages
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from plumbing import scoring
from plumbing.errors import InputError
from toy_world import world


def fact(text, kind, detail=False):
    return {"text": text, "about": text.split()[0], "kind": kind, "detail": detail}


# b's planted statements have no "about": it is "left", their text without its last word
TRUTH = [
    {
        "image": "a.png",
        "facts": [
            fact("background gray", "background"),
            fact("left red circle", "object"),
            fact("left stripes", "mark", True),
            fact("right blue ring", "object"),
        ],
        "planted": [
            {"text": f"right {mark}", "about": "right", "group": "cold"}
            for mark in ("stripes", "checks")
        ],
        "also_true": ["Round thing", "red on gray"],
    },
    {
        "image": "b.png",
        "facts": [
            fact("background black", "background"),
            fact("left green square", "object"),
            fact("center red ring", "center", True),
        ],
        "planted": [{"text": f"left {mark}", "group": "warm"} for mark in ("stripes", "checks")],
    },
]
CAPTIONS = [
    {
        "image": "a.png",
        "caption": "Left  red circle, background gray., left red circle, "
        "right stripes, round thing",
        "finish": "eos",
        "tokens": 12,
    },
    {
        "image": "b.png",
        "caption": "left green square, left checks, left stripes, center blue ring, "
        "background black, sky",
        "finish": "length",
        "tokens": 20,
    },
    {
        "image": "b.png",
        "caption": "center red ring, left green square",
        "finish": "repeat",
        "tokens": 4,
    },
]
# true ones of the 4 + 6 + 2 different statements: 3 + 2 + 2;
# facts stated of 4 + 3 + 3: 2 + 2 + 2; beyond the facts: 1
EXPECTED = {
    "precision": 7 / 12,
    "recall": (6 + 1) / (10 + 1),
    "f1": 2 * (7 / 12) * (7 / 11) / (7 / 12 + 7 / 11),
    "detail_precision": 1
    / 5,  # right stripes; left checks, left stripes, center blue ring; center red ring
    "detail_recall": 1 / 3,
    "planted": 2 / 3,
    "eos": 1 / 3,
    "repeat": 2 / 3,
    "length": 36 / 3,
    "statements": 13 / 3,
    "captions": 3,
    "images": 2,
    "errors": 0,
    "unknown": 0,
    "missing": 0,
}


def one(caption, *facts, **row):
    """The score of one caption of one image with these facts."""
    return evaluate.score(
        [{"image": "x", "caption": caption, **row}], [{"image": "x", "facts": list(facts)}]
    )


# ---------------------------------------------------------------- the metrics
def test_every_metric_by_hand():
    scores = evaluate.score(CAPTIONS, TRUTH)
    assert {name: scores[name] for name in EXPECTED} == pytest.approx(EXPECTED)
    assert "intervals" not in scores
    for name in EXPECTED:
        assert type(scores[name]) in (float, int), name


def test_categories_and_groups_by_hand():
    scores = evaluate.score(CAPTIONS, TRUTH)
    nan = pytest.approx(math.nan, nan_ok=True)
    # "left stripes" is a mark on another image, "left checks" has the form of one,
    # and "right stripes" the form of nothing
    assert scores["categories"] == {
        "background": {"precision": 1, "recall": pytest.approx(2 / 3), "n": 2},
        "center": {"precision": 0.5, "recall": 0.5, "n": 2},
        "mark": {"precision": 0, "recall": 0, "n": 2},
        "object": {"precision": 1, "recall": 0.75, "n": 3},
        "other": {"precision": pytest.approx(1 / 3), "recall": nan, "n": 3},
    }  # right stripes, round thing, sky
    assert scores["planted_groups"] == {"cold": 1, "warm": 0.5}


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("A cat,  a   DOG .,a dog", ["a cat", "a dog", "a dog"]),
        ("", []),
        (" , ,. ,", []),
        ("Straße\n1.5 m wide...", ["strasse 1.5 m wide"]),
    ],
)
def test_statements_are_parts_between_commas(caption, expected):
    assert scoring.statements(caption) == expected


def test_the_truth_is_normalised_as_captions_are():
    truth = [
        {
            "image": "x",
            "facts": [{"text": "A  Cat.", "about": "A", "detail": True}],
            "also_true": ["It is DARK"],
            "planted": [{"text": "A  Bell."}],
        }
    ]
    scores = evaluate.score([{"image": "x", "caption": "a cat, it is dark, a bell"}], truth)
    assert (scores["precision"], scores["recall"], scores["planted"]) == (
        pytest.approx(2 / 3),
        1,
        1,
    )
    assert (scores["detail_precision"], scores["detail_recall"]) == (0.5, 1)


def test_true_statements_beyond_the_facts_raise_recall_and_need_not_be_made():
    truth = [
        {
            "image": "x",
            "facts": [{"text": "a"}, {"text": "b"}, {"text": "c"}, {"text": "d"}],
            "also_true": ["e", "f", "a"],
        }
    ]

    def recall(caption):
        return evaluate.score([{"image": "x", "caption": caption}], truth)["recall"]

    assert recall("a, b") == 2 / 4  # a is a fact: it counts once, though it is also in also_true
    assert recall("a, b, e, f") == (2 + 2) / (4 + 2)
    assert recall("a, b, e, e, z") == (2 + 1) / (4 + 1)
    assert recall("e") == 1 / 5


def test_a_repeated_statement_counts_once_and_is_reported():
    plain, twice = one("a, z", fact("a", "k")), one("a, z, A ., z", fact("a", "k"))
    assert plain["precision"] == twice["precision"] == 0.5
    assert (plain["repeat"], twice["repeat"]) == (0, 1) and (plain["length"], twice["length"]) == (
        2,
        4,
    )
    assert one("a", fact("a", "k"), finish="repeat")["repeat"] == 1


def test_nothing_over_nothing_is_nan_and_all_wrong_is_zero():
    empty = one("", fact("a", "k"))
    assert math.isnan(empty["precision"]) and math.isnan(empty["f1"]) and empty["recall"] == 0
    for name in ("detail_precision", "detail_recall", "planted", "eos"):
        assert math.isnan(empty[name]), name
    wrong = one("z", fact("a", "k"))
    assert (wrong["precision"], wrong["recall"], wrong["f1"]) == (0, 0, 0)
    nobody = evaluate.score([], TRUTH, bootstrap=10)
    assert all(math.isnan(nobody[name]) for name in ("precision", "repeat", "length"))
    assert all(math.isnan(end) for ends in nobody["intervals"].values() for end in ends)
    assert nobody["missing"] == 2 and nobody["categories"] == nobody["planted_groups"] == {}


def test_rows_without_finish_or_tokens_do_not_count_for_these():
    truth = [{"image": "x", "facts": [fact("a", "k")]}]
    rows = [
        {"image": "x", "caption": "a, b, c"},
        {"image": "x", "caption": "a", "finish": "eos", "tokens": 7},
        {"image": "x", "caption": "a", "finish": "length", "tokens": 8},
    ]
    scores = evaluate.score(rows, truth)
    assert (scores["eos"], scores["length"], scores["statements"]) == (
        0.5,
        7.5,
        pytest.approx(5 / 3),
    )
    without = evaluate.score(rows[:1], truth)
    assert math.isnan(without["eos"]) and without["length"] == without["statements"] == 3


def test_errors_unknown_and_missing_images_are_counted_and_change_nothing():
    others = [{"image": "c.png", "caption": "sky, sky"}, {"image": "a.png", "error": "broken"}]
    truth = [*TRUTH, {"image": "d.png", "facts": [{"text": "sea"}]}]
    scores = evaluate.score(CAPTIONS + others, truth)
    expected = {**EXPECTED, "errors": 1, "unknown": 1, "missing": 1}
    assert {name: scores[name] for name in expected} == pytest.approx(expected)


# ---------------------------------------------------------------- details and kinds of false statem
def sorted_by(facts, *texts):
    """(kind, whether it claims a detail) of texts that are not facts of their image."""
    known = scoring.read_truth(
        [{"image": "x", "facts": facts}, {"image": "y", "facts": [{"text": "nothing"}]}]
    )
    return [known["y"].vocabulary.classify(text) for text in texts]


def test_a_statement_claims_a_detail_by_its_text_or_its_about():
    facts = [
        fact("top red", "object"),
        fact("top dots", "mark", True),
        fact("tip red", "tip", True),
        {"text": "bare", "detail": True},
    ]
    claims = [
        detail
        for _, detail in sorted_by(
            facts, "top dots", "top blue", "tip blue", "tip", "tipped blue", "bare", "bare blue"
        )
    ]
    # top has facts that are not details; "tip" alone and "tipped" do not begin with "tip ";
    # "bare" is the about of no fact
    assert claims == [True, False, True, False, False, True, False]


def test_the_longest_about_rules():
    facts = [
        {"text": "top dot", "about": "top", "kind": "dot", "detail": True},
        {"text": "top left red", "about": "Top  left", "kind": "object", "detail": False},
    ]
    assert sorted_by(facts, "top left blue", "top right blue", "top line") == [
        ("object", False),
        ("other", True),
        ("dot", True),
    ]


def test_the_kind_of_a_false_statement():
    facts = [
        fact("top red ring", "object"),
        fact("top dots", "mark"),
        fact("low red ring", "object"),
        fact("low blue line", "line"),
        {"text": "no kind"},
        {"text": "lone fact", "kind": "thing"},
    ]
    assert [
        kind
        for kind, _ in sorted_by(
            facts,
            "top red ring",
            "top blue ring",
            "top lines",
            "low green ring",
            "top",
            "side red ring",
            "no kind",
            "lone fact",
        )
    ] == [
        "object",
        "object",
        "mark",
        "other",
        "other",
        "other",
        "other",
        "thing",
    ]  # low ones of three words are of two kinds


def test_a_true_statement_is_of_the_kind_that_it_has_on_its_image():
    truth = [
        {"image": "x", "facts": [{"text": "mill", "kind": "house"}]},
        {"image": "y", "facts": [{"text": "mill", "kind": "tool"}]},
    ]
    scores = evaluate.score([{"image": "y", "caption": "mill"}], truth)["categories"]
    assert scores == {"tool": {"precision": 1, "recall": 1, "n": 1}}


def test_a_thing_with_two_planted_statements_is_one_thing():
    truth = [
        {
            "image": "x",
            "facts": [{"text": "z"}],
            "planted": [
                {"text": "top left dots", "about": "top left", "group": "g"},
                {"text": "top left lines"},
                {"text": "low dots"},
                {"text": "low lines"},
            ],
        }
    ]
    both = evaluate.score([{"image": "x", "caption": "top left dots, top left lines"}], truth)
    assert both["planted"] == 0.5 and both["planted_groups"] == {"g": 1}
    assert evaluate.score([{"image": "x", "caption": "low lines, top left"}], truth)[
        "planted_groups"
    ] == {"g": 0}


def test_toy_scenes_described_in_full_score_one():
    truth = [world.truth(world.make_scene(k), str(k)) for k in range(20)]
    full = [
        {"image": row["image"], "caption": ", ".join(f["text"] for f in row["facts"])}
        for row in truth
    ]
    scores = evaluate.score(full, truth)
    assert all(
        scores[name] == 1
        for name in ("precision", "recall", "f1", "detail_precision", "detail_recall")
    )
    assert scores["planted"] == scores["repeat"] == 0 and set(scores["planted_groups"]) == {
        "warm",
        "cold",
    }
    tempted = [
        {"image": row["image"], "caption": row["planted"][0]["text"]}
        for row in truth
        if row["planted"]
    ]
    scores = evaluate.score(tempted, truth)
    assert scores["precision"] == scores["detail_precision"] == 0 < scores["planted"] < 1
    assert list(scores["categories"]) == ["background", "center", "mark", "object"]


# ---------------------------------------------------------------- against slow counting
WORDS = st.sampled_from(tuple("abcdefg"))
ROW = st.fixed_dictionaries(
    {
        "facts": st.lists(WORDS, min_size=1, max_size=4, unique=True),
        "also": st.sets(WORDS),
        "captions": st.lists(st.lists(WORDS, max_size=6), max_size=3),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=4))
def test_pooled_precision_and_recall_agree_with_slow_counting(world):
    truth = [
        {
            "image": str(k),
            "facts": [{"text": text} for text in row["facts"]],
            "also_true": sorted(row["also"]),
        }
        for k, row in enumerate(world)
    ]
    captions = [
        {"image": str(k), "caption": ", ".join(stated)}
        for k, row in enumerate(world)
        for stated in row["captions"]
    ]
    right = claims = recalled = could = 0
    for row in world:
        for stated in row["captions"]:
            beyond = 0
            for k, word in enumerate(stated):
                if word not in stated[:k]:
                    claims += 1
                    right += word in row["facts"] or word in row["also"]
                    beyond += word not in row["facts"] and word in row["also"]
            recalled += sum(word in stated for word in row["facts"]) + beyond
            could += len(row["facts"]) + beyond
    scores = evaluate.score(captions, truth)
    for name, over, under in (("precision", right, claims), ("recall", recalled, could)):
        expected = float(Fraction(over, under)) if under else math.nan
        assert scores[name] == pytest.approx(expected, nan_ok=True)


# ---------------------------------------------------------------- intervals
def coins(n, right, each=1):
    """n images with `each` captions of one statement, true for the first `right` images."""
    truth = [{"image": str(k), "facts": [{"text": "a"}]} for k in range(n)]
    return [
        {"image": str(k), "caption": "a" if k < right else "z"}
        for k in range(n)
        for _ in range(each)
    ], truth


def test_an_interval_is_as_wide_as_theory_says_and_images_are_what_is_drawn():
    expected = 2 * 1.96 * math.sqrt(0.3 * 0.7 / 400)
    for each in (1, 5):  # five captions of an image say no more than one
        scores = evaluate.score(*coins(400, 120, each), bootstrap=1000)
        low, high = scores["intervals"]["precision"]
        assert low < scores["precision"] == 0.3 < high and high - low == pytest.approx(
            expected, rel=0.12
        )
        assert scores["intervals"]["recall"] == [low, high]
    assert evaluate.score(*coins(1, 1, 9), bootstrap=50)["intervals"]["precision"] == [1, 1]


def test_intervals_hold_their_values_and_depend_on_the_seed_alone():
    captions, truth = coins(30, 12)
    captions[0] |= {"finish": "eos", "tokens": 3}
    scores, again, other = (evaluate.score(captions, truth, 200, seed) for seed in (0, 0, 1))
    assert json.dumps(scores) == json.dumps(again)
    assert scores["intervals"]["precision"] != other["intervals"]["precision"]
    for name in ("precision", "recall", "f1", "repeat", "eos", "length", "statements"):
        low, high = scores["intervals"][name]
        assert low <= scores[name] <= high, name
    assert scores["intervals"]["eos"] == [1, 1]  # resamples without such a row do not count
    assert all(math.isnan(end) for end in scores["intervals"]["planted"])


def test_a_thousand_resamples_of_a_thousand_images_are_quick():
    captions, truth = coins(1000, 300)
    plain, began = evaluate.score(captions, truth), time.process_time()
    scores = evaluate.score(captions, truth, bootstrap=1000)
    assert time.process_time() - began < 2 and scores["precision"] == plain["precision"]


def test_the_difference_of_two_captioners():
    captions, truth = coins(100, 40)
    better = [{**row, "caption": "a"} if int(row["image"]) % 10 == 9 else row for row in captions]
    assert scoring.difference(captions, captions, truth, "precision", 200) == (0, 0, 0)
    gain, low, high = scoring.difference(captions, better, truth, "precision", 500)
    assert gain == pytest.approx(0.06) and 0 < low < 0.06 < high < 0.12
    # the same images are drawn for both: by themselves their intervals overlap
    ends = [
        evaluate.score(rows, truth, 500)["intervals"]["precision"] for rows in (captions, better)
    ]
    assert ends[0][1] > ends[1][0]
    assert scoring.difference(better, captions, truth, "precision", 500) == pytest.approx(
        (-gain, -high, -low)
    )
    once, again, other = (
        scoring.difference(captions, better, truth, "f1", 100, seed) for seed in (3, 3, 4)
    )
    assert once == again != other
    assert math.isnan(scoring.difference(captions, better, truth, "recall", bootstrap=0)[1])


def test_a_difference_is_over_the_images_of_both():
    captions, truth = coins(10, 5)
    gain, _, _ = scoring.difference(captions[:6], captions[4:], truth, "precision", 10)
    assert gain == 0
    gain, _, _ = scoring.difference(
        captions[:6], [{"image": "5", "caption": "a, z"}], truth, "precision", 10
    )
    assert gain == 0.5
    with pytest.raises(InputError, match="both"):
        scoring.difference(captions[:5], captions[5:], truth, "precision")
    timed = [{**row, "tokens": 9} for row in captions]
    assert scoring.difference(timed, timed, truth, "length", 10) == (0, 0, 0)
    with pytest.raises(InputError, match="tokens"):
        scoring.difference(captions, timed, truth, "length")


# ---------------------------------------------------------------- golden files
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from((0.0, 0.25, 0.5, 0.75, 1.0)), st.booleans()), max_size=12)
)
def test_auroc_is_the_share_of_pairs_in_order(pairs):
    wins = [(a > b) + (a == b) / 2 for a, true in pairs if true for b, other in pairs if not other]
    expected = sum(wins) / len(wins) if wins else math.nan
    assert scoring.auroc([p for p, _ in pairs], [true for _, true in pairs]) == pytest.approx(
        expected, nan_ok=True
    )


def asked(text, p_yes, kept, votes):
    return {
        "text": text,
        "question": f"{text}?",
        "about": None,
        "group": None,
        "votes": votes,
        "p_yes": p_yes,
        "kept": kept,
    }


GOLDEN = [
    {
        "image": "a.png",
        "chosen": "left red circle, round thing",
        "combined": "left red circle, right stripes, round thing",
        "samples": [
            {"caption": "left red circle, round thing", "finish": "eos"},
            {"caption": "right stripes, right stripes", "finish": "repeat"},
        ],
        "statements": [
            asked("left red circle", 0.9, True, 2),
            asked("Round thing.", 0.6, True, 1),
            asked("right stripes", 0.6, False, 1),
        ],
    },
    {
        "image": "b.png",
        "chosen": None,
        "left_out": "nothing kept",
        "combined": "sky",
        "statements": [asked("sky", 0.7, False, 2)],
        "samples": [{"caption": "sky", "finish": "length"}],
    },
    {
        "image": "b.png",
        "chosen": "sky",
        "left_out": "golden equal to its samples",
        "combined": "sky",
        "samples": [],
        "statements": [{"text": "sky"}],
    },
    {"image": "b.png", "error": "broken"},
]


def test_golden_rows_by_hand():
    scores = evaluate.score_golden(GOLDEN, TRUTH, bootstrap=20)
    sample, combined, golden = (scores[name] for name in ("sample", "combined", "golden"))
    assert (sample["captions"], combined["captions"], golden["captions"], golden["left_out"]) == (
        3,
        3,
        3,
        3,
    )
    assert (sample["precision"], combined["precision"], golden["precision"]) == pytest.approx(
        (0.5, 2 / 5, 2 / 3)
    )
    assert sample["recall"] == pytest.approx((1 + 1) / (4 + 4 + 3 + 1)) and golden["recall"] == (
        1 + 1
    ) / (4 + 1 + 3 + 3)
    assert (sample["eos"], golden["eos"]) == (pytest.approx(1 / 3), 1) and math.isnan(
        combined["eos"]
    )
    assert sample["repeat"] == pytest.approx(1 / 3) and golden["length"] == (2 + 0 + 1) / 3
    assert "precision" in sample["intervals"]
    # P(yes) .9 and .6 of the true ones against .6 and .7; votes 2 and 1 against 1 and 2
    assert scores["gate"] == {
        "n": 4,
        "base_rate": 0.5,
        "precision": 1,
        "recall": 1,
        "auroc": (1 + 1 + 0.5 + 0) / 4,
        "votes_auroc": (1 + 0.5 + 0.5 + 0) / 4,
    }


def test_a_gate_that_errs_and_a_gate_without_questions():
    rows = [
        {
            "image": "a.png",
            "chosen": "",
            "statements": [
                asked("left red circle", 0.2, False, 1),
                asked("background gray", 0.8, True, 3),
                asked("sky", 0.9, True, None),
                asked("sea", 0.1, False, 2),
            ],
        },
        {"image": "elsewhere.png", "chosen": "", "statements": [asked("sky", 0.9, True, 1)]},
    ]
    gate = evaluate.score_golden(rows, TRUTH)["gate"]
    # .2 and .8 of the true ones against .9 and .1; votes 1 and 3 against 2
    assert gate == {
        "n": 4,
        "base_rate": 0.5,
        "precision": 0.5,
        "recall": 0.5,
        "auroc": 2 / 4,
        "votes_auroc": 1 / 2,
    }
    nothing = evaluate.score_golden([{"image": "a.png", "chosen": "sky"}], TRUTH)
    assert nothing["gate"]["n"] == 0 and all(
        math.isnan(v) for k, v in nothing["gate"].items() if k != "n"
    )
    assert nothing["golden"]["precision"] == 0 and nothing["sample"]["captions"] == 0


# ---------------------------------------------------------------- CHAIR
OBJECTS = {"1": {"dog", "person"}, "2": {"hot dog"}, "3": set()}
SYNONYMS = {
    "dog": "dog",
    "puppy": "dog",
    "hot dog": "hot dog",
    "person": "person",
    "men": "person",
    "bus": "bus",
}


def named(caption, synonyms=SYNONYMS):
    """The categories that a caption names: those that a chair() of one category covers."""
    names = [
        name
        for name in set(synonyms.values())
        if evaluate.chair([{"image": "i", "caption": caption}], {"i": {name}}, synonyms)["coverage"]
        == 1
    ]
    return set(names)


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("A hot dog on a plate", {"hot dog"}),
        ("a hot-dog", {"hot dog"}),
        ("two Hot dogs.", {"hot dog"}),
        ("a hot, dog", {"dog"}),
        ("a hot dog and a dog", {"hot dog", "dog"}),
        ("puppies", {"dog"}),
        ("one puppy", {"dog"}),
        ("the dog's bone", {"dog"}),
        ("three buses", {"bus"}),
        ("persons, men", {"person"}),
        ("hotdog dogma busy", set()),
        ("", set()),
        ("hot", set()),
    ],
)
def test_objects_that_a_caption_names(caption, expected):
    assert named(caption) == expected


def test_a_phrase_in_the_synonyms_is_not_a_plural():
    assert named("two glasses", {"glass": "cup", "glasses": "eyewear"}) == {"eyewear"}
    assert named("two glasses", {"glasses": "eyewear", "glass": "cup"}) == {"eyewear"}
    assert named("two glasses", {"glass": "cup"}) == {"cup"}


def test_the_longest_phrase_counts():
    assert named(
        "a dog house of a dog sled team",
        {"dog": "dog", "dog house": "house", "dog sled team": "sled"},
    ) == {"house", "sled"}


def test_chair_by_hand():
    rows = [
        {
            "image": "1",
            "caption": "a puppy, a dog, two men, a bus",
        },  # dog, person; bus is not there
        {"image": "1", "caption": "a field"},
        {"image": "2", "caption": "a hot dog"},
        {"image": "3", "caption": "a person and a dog"},
        {"image": "4", "caption": "a bus"},
        {"image": "1", "error": ""},
    ]
    scores = evaluate.chair(rows, OBJECTS, SYNONYMS, bootstrap=100)
    expected = {
        "chair_i": 3 / 6,
        "chair_s": 2 / 4,
        "coverage": 3 / 5,
        "captions": 4,
        "images": 3,
        "errors": 1,
        "unknown": 1,
        "missing": 0,
    }
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
    assert set(scores["intervals"]) == {"chair_i", "chair_s", "coverage"}
    low, high = scores["intervals"]["chair_i"]
    assert 0 <= low < 0.5 < high <= 1
    assert math.isnan(evaluate.chair(rows[1:2], OBJECTS, SYNONYMS)["chair_i"])


# ---------------------------------------------------------------- the script
def run(*argv):
    return evaluate.main([str(argument) for argument in argv])


def figures(out):
    """The printed table of one column -> {label: its cell}."""
    return {
        line.split("  ")[0]: line.split("  ", 1)[1].strip()
        for line in out.splitlines()
        if "  " in line
    }


@pytest.fixture
def files(tmp_path):
    return stages.write_rows(tmp_path / "captions.jsonl", CAPTIONS), stages.write_rows(
        tmp_path / "truth.jsonl", TRUTH
    )


def test_the_table_and_the_json_file(files, tmp_path, capsys):
    out = tmp_path / "new/all.json"
    assert run(*files, "--json", out, "--bootstrap", 100) == 0
    captured = capsys.readouterr()
    table = figures(captured.out)
    assert captured.err == "" and str(files[0]) in captured.out.splitlines()[0]
    assert table["precision"].startswith("0.583  [0.") and table["captions"] == "3"
    assert table["categories mark precision"] == "0.000" and table["categories other recall"] == "-"
    assert table["planted_groups warm"] == "0.500"

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    stored = json.loads(out.read_text(), parse_constant=refuse)
    expected = evaluate.score(CAPTIONS, TRUTH, 100, 0)
    assert {name: stored[name] for name in EXPECTED} == pytest.approx(EXPECTED)
    assert (
        stored["intervals"] == expected["intervals"]
        and stored["categories"]["other"]["recall"] is None
    )
    assert stored["arguments"]["seed"] == 0 and os.listdir(out.parent) == ["all.json"]


def test_without_a_bootstrap_there_are_no_intervals(files, capsys):
    assert run(*files, "--bootstrap", 0) == 0
    assert figures(capsys.readouterr().out)["precision"] == "0.583"


def test_names_are_relative_to_their_file_or_the_current_folder(tmp_path, monkeypatch, capsys):
    for folder in ("scenes", "out", "elsewhere"):
        (tmp_path / folder).mkdir()
    truth = stages.write_rows(tmp_path / "scenes/truth.jsonl", TRUTH)
    (tmp_path / "link").symlink_to(tmp_path / "scenes")
    monkeypatch.chdir(tmp_path)
    for place, name in (
        ("out/c.jsonl", "../scenes/{}"),  # beside the captions
        ("out/c.jsonl", "scenes/{}"),  # from the current folder
        ("out/c.jsonl", str(tmp_path / "scenes/{}")),
        ("out/c.jsonl", "link/./{}"),
    ):
        # both file names occur twice, so that only the path decides
        rows = [{**row, "image": name.format(row["image"])} for row in CAPTIONS]
        rows += [{"image": f"no/{row['image']}", "caption": "sky"} for row in CAPTIONS[:2]]
        assert run(stages.write_rows(tmp_path / place, rows), truth, "--bootstrap", 0) == 0
        captured = capsys.readouterr()
        assert (
            figures(captured.out)["precision"] == "0.583"
            and figures(captured.out)["unknown"] == "2"
        ), name
        assert captured.err == (
            f"evaluate.py: {tmp_path / place}: of 4 images, {truth} has 2 by their path, another 0 "
            "by file name alone; 2 are unknown\n"
        )


def test_a_file_name_that_each_side_has_once_is_the_same_image(files, tmp_path, capsys):
    rows = [{**row, "image": "/moved/" + row["image"]} for row in CAPTIONS]
    moved = stages.write_rows(tmp_path / "moved.jsonl", rows)
    assert run(moved, files[1], "--bootstrap", 0) == 0
    captured = capsys.readouterr()
    assert (
        figures(captured.out)["precision"] == "0.583"
        and "another 2 by file name alone" in captured.err
    )
    assert captured.err.count("\n") == 1
    twice = [*TRUTH, {**TRUTH[0], "image": "other/a.png"}]  # which a.png?
    assert run(moved, stages.write_rows(tmp_path / "twice.jsonl", twice), "--bootstrap", 0) == 0
    captured = capsys.readouterr()
    assert figures(captured.out)["unknown"] == "1" and figures(captured.out)["images"] == "1"


def test_an_imagefolder_and_bad_rows(files, tmp_path, capsys):
    rows = [{"file_name": row["image"], "text": row["caption"]} for row in CAPTIONS]
    bad = [
        "{",
        "[1]",
        {"caption": "a"},
        {"image": "a.png"},
        {"image": 3, "caption": "a"},
        {"image": "a.png", "caption": 3},
    ]
    path = stages.write_rows(tmp_path / "metadata.jsonl", rows + bad)
    assert run(path, files[1], "--bootstrap", 0) == 0
    captured = capsys.readouterr()
    assert figures(captured.out)["precision"] == "0.583" and figures(captured.out)["eos"] == "-"
    lines = captured.err.splitlines()
    assert (
        len(lines) == len(bad)
        and lines[0] == f"evaluate.py: left out: {path}:4: not a JSON object with an image"
    )
    assert lines[3] == f"evaluate.py: left out: {path}:7: has neither a caption nor an error"


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"image": "c.png"}, "no facts"),
        ({"image": "c.png", "facts": []}, "no facts"),
        ({"image": "c.png", "facts": ["a"]}, "no facts"),
        ({"image": "c.png", "facts": [{"text": "a", "kind": ["b"]}]}, "no facts"),
        ({"image": "c.png", "facts": [{"text": "a, b"}]}, "'a, b' is not a statement"),
        ({"image": "c.png", "facts": [{"text": "a"}], "also_true": [3]}, "3 is not a statement"),
        ({"image": "c.png", "facts": [{"text": "a"}], "also_true": "abc"}, "also_true"),
        ({"image": "c.png", "facts": [{"text": "a"}], "planted": [{"about": "a"}]}, "planted"),
        ({"facts": [{"text": "a"}]}, "not a JSON object with an image"),
        ("nonsense", "not a JSON object with an image"),
    ],
)
def test_a_bad_row_of_truth_is_reported_and_left_out(files, tmp_path, capsys, row, expected):
    truth = stages.write_rows(tmp_path / "bad.jsonl", [*TRUTH, row])
    assert run(files[0], truth, "--bootstrap", 0) == 0
    captured = capsys.readouterr()
    assert (
        captured.err.startswith(f"evaluate.py: left out: {truth}:3: ") and expected in captured.err
    )
    assert captured.err.count("\n") == 1 and figures(captured.out)["missing"] == "0"


def test_odd_values_do_not_crash(files, tmp_path, capsys):
    rows = [
        {**CAPTIONS[0], "tokens": 10**400, "finish": 3},
        {"image": "a\0b\ud800.png", "caption": "a", "tokens": "12"},
        {**CAPTIONS[1], "tokens": None},
        {"image": "", "caption": "b"},
        {"image": "a.png", "caption": None, "error": None},
    ]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(path, files[1], "--bootstrap", 5) == 0
    table = figures(capsys.readouterr().out)
    assert (
        table["captions"] == "2"
        and table["unknown"] == "2"
        and table["errors"] == "1"
        and table["length"].startswith("5.500")
    )


def test_a_golden_file(files, tmp_path, capsys):
    path, out = stages.write_rows(tmp_path / "record.jsonl", GOLDEN), tmp_path / "golden.json"
    assert run(path, files[1], "--bootstrap", 10, "--json", out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["sample", "combined", "golden"]
    assert [cell.split()[0] for cell in lines[1].split("precision")[1].split("]")[:3]] == [
        "0.500",
        "0.400",
        "0.667",
    ]
    assert next(line for line in lines if line.startswith("left_out")).split() == [
        "left_out",
        "-",
        "-",
        "3",
    ]
    assert (
        lines[-1] == "gate: n 4, base_rate 0.500, precision 1.000, recall 1.000, auroc 0.625, "
        "votes_auroc 0.500"
    )
    stored = json.loads(out.read_text())
    assert (
        set(stored) == {"sample", "combined", "golden", "gate", "arguments"}
        and stored["combined"]["eos"] is None
    )


def test_a_broken_golden_row_is_left_out(files, tmp_path, capsys):
    broken = [
        {**GOLDEN[0], "samples": ["a"]},
        {**GOLDEN[0], "statements": [{"p_yes": 1}]},
        {**GOLDEN[0], "chosen": 3},
    ]
    path = stages.write_rows(tmp_path / "golden.jsonl", [*GOLDEN[:1], *broken])
    assert run(path, files[1], "--bootstrap", 0) == 0
    captured = capsys.readouterr()
    assert captured.err.count("golden file") == 3 and captured.out.splitlines()[-1].startswith(
        "gate: n 3,"
    )


COCO = {
    "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}],
    "categories": [
        {"id": 1, "name": "dog"},
        {"id": 2, "name": "Hot dog"},
        {"id": 3, "name": "person"},
    ],
    "annotations": [
        {"image_id": 7, "category_id": 1},
        {"image_id": 7, "category_id": 1},
        {"image_id": 8, "category_id": 2},
    ],
}


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "instances.json").write_text(json.dumps(COCO))
    (tmp_path / "synonyms.txt").write_text("dog: puppy, little friend\n\nperson, man, Men,\n")
    rows = [
        {"image": "a.png", "caption": "a little friend and two men"},
        {"image": "b.png", "caption": "a hot dog"},
    ]
    return [
        stages.write_rows(tmp_path / "c.jsonl", rows),
        "--coco",
        tmp_path / "instances.json",
        "--synonyms",
        tmp_path / "synonyms.txt",
    ]


def test_coco_end_to_end(coco, capsys):
    assert run(*coco, "--bootstrap", 50) == 0
    table = figures(capsys.readouterr().out)
    assert table["chair_i"].startswith("0.333  [0.000, 0.5") and table["chair_s"].startswith(
        "0.500  ["
    )
    assert table["coverage"].startswith("1.000") and table["images"] == "2"


def test_coco_reads_synonyms_in_both_forms(coco):
    objects, categories = evaluate.read_coco(coco[2])
    assert objects == {"a.png": {"dog"}, "b.png": {"hot dog"}} and categories == {
        "dog",
        "hot dog",
        "person",
    }
    assert evaluate.read_synonyms(coco[4], categories) == {
        "dog": "dog",
        "hot dog": "hot dog",
        "person": "person",
        "puppy": "dog",
        "little friend": "dog",
        "man": "person",
        "men": "person",
    }


# ---------------------------------------------------------------- a user's mistakes
def one_line(capsys, *argv):
    """The one line on stderr of a failed run."""
    assert run(*argv) == 1
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and captured.err.startswith("evaluate.py: ")
        and captured.err.count("\n") == 1
    ), captured.err
    return captured.err


def test_files_that_cannot_be_used(files, tmp_path, capsys):
    empty, text = tmp_path / "empty.jsonl", tmp_path / "text.jsonl"
    empty.write_text("\n")
    text.write_text("hello\n")
    assert "nowhere.jsonl: cannot be read" in one_line(capsys, tmp_path / "nowhere.jsonl", files[1])
    assert "nowhere.jsonl: cannot be read" in one_line(capsys, files[0], tmp_path / "nowhere.jsonl")
    assert "cannot be read" in one_line(capsys, files[0], tmp_path)
    assert f"{empty}: no usable row" in one_line(capsys, empty, files[1])
    assert f"{text}:1: not a JSON object" in one_line(capsys, files[0], text)
    assert "no facts" in one_line(capsys, files[0], files[0])
    doubled = stages.write_rows(tmp_path / "doubled.jsonl", TRUTH + TRUTH[:1])
    assert "'a.png' twice" in one_line(capsys, files[0], doubled)


def test_no_image_in_common(files, tmp_path, capsys):
    other = stages.write_rows(tmp_path / "other.jsonl", [{"image": "x/y.png", "caption": "a"}])
    line = one_line(capsys, other, files[1])
    assert f"none of its 1 images is in {files[1]}" in line
    assert f"'{tmp_path / 'x/y.png'}' with '{tmp_path / 'a.png'}'" in line and "file names" in line


def test_a_json_file_that_cannot_be_written(files, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert run(*files, "--bootstrap", 0, "--json", tmp_path / "taken/x.json") == 1
    error = capsys.readouterr().err
    assert error.startswith("evaluate.py: ") and error.count("\n") == 1 and "taken" in error


def test_coco_files_that_cannot_be_used(coco, files, tmp_path, capsys):
    synonyms, instances = coco[4], coco[2]
    synonyms.write_text("dog: puppy\n\nCat: kitten\n")
    assert f"{synonyms}:3: 'cat' is not one of the categories" in one_line(capsys, *coco)
    assert "nowhere" in one_line(capsys, *coco[:3], "--synonyms", tmp_path / "nowhere.txt")
    for broken in (
        "[]",
        "{",
        '{"images": []}',
        json.dumps({**COCO, "annotations": [{"image_id": 7, "category_id": 9}]}),
        json.dumps({**COCO, "categories": [{"id": 1, "name": None}]}),
    ):
        instances.write_text(broken)
        assert "is not COCO's JSON" in one_line(capsys, *coco)
    assert "nowhere" in one_line(capsys, coco[0], "--coco", tmp_path / "nowhere.json", *coco[3:])
    synonyms.write_text("")
    for images in ([], [{"id": 7, "file_name": None}]):
        instances.write_text(json.dumps({**COCO, "images": images}))
        assert "none of its 2 images is in" in one_line(capsys, *coco)
    golden = stages.write_rows(tmp_path / "golden.jsonl", GOLDEN)
    assert "is a golden file" in one_line(capsys, golden, *coco[1:])


@pytest.mark.parametrize(
    "argv",
    [
        "c",
        "c t --coco i --synonyms s",
        "c --coco i",
        "c t --synonyms s",
        "c t --bootstrap -1",
        "c t --seed -1",
        "c t --colour",
    ],
)
def test_senseless_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*argv.split())
    message = capsys.readouterr().err.split("error: ")[1]
    assert stop.value.code == 2 and message.count("\n") == 1
