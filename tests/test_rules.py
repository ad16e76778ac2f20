"""rules.py: the rules of the five operations, and what they promise about any captions."""

import itertools
import random
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from plumbing import rules
from plumbing.rules import (
    MOST_QUESTIONS,
    Unreadable,
    combine_rule,
    correct_rule,
    decompose_rule,
    question_of,
    rewrite_rule,
    slots,
    statements,
    triplets_rule,
)
from toy_world import world

WORDS = st.sampled_from(
    [
        "dog",
        "cat",
        "red",
        "ring",
        "picture",
        "view",
        "black-and-white",
        "3",
        "Éclair",
        "and",
        "image",
    ]
)
PHRASES = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)
STATEMENTS = st.tuples(
    st.sampled_from(["top-left", "Top-left", "center", "background", "dog", "sky", "zebra"]),
    st.lists(st.sampled_from(["red", "Red", "blue", "ring", "circle", "stripes"]), max_size=3),
).map(lambda parts: " ".join([parts[0], *parts[1]]))
CAPTIONS = st.lists(STATEMENTS, min_size=1, max_size=6).map(", ".join)

some = settings(max_examples=60, deadline=None)


def texts(rows):
    return [row["text"] for row in rows]


# ---------------------------------------------------------------- statements
@pytest.mark.parametrize(
    "caption, expected",
    [
        ("b, a, c", ["b", "a", "c"]),  # in their order
        ("Dog brown, sky, dog BROWN", ["Dog brown", "sky"]),  # the first spelling of two
        ("a dog.. , . sky ., .", ["a dog", "sky"]),  # dots
        (" a \n big\tdog ,,  , \u2028", ["a big dog"]),  # blanks of any kind
        ("at 10.30, v1.5.", ["at 10.30", "v1.5"]),
        ("STRASSE, straße", ["STRASSE"]),
        ("", []),
        (" , .,", []),
    ],
)
def test_statements_come_in_order_once_without_dots_and_blanks(caption, expected):
    assert statements(caption) == expected


def test_statements_can_be_written_as_utf_8_whatever_comes_in():
    assert statements("dog \ud83d, \udc80 sky") == ["dog ?", "? sky"]
    assert all(text.encode() for text in statements("a\ud800, \udfffb"))


@some
@given(st.text(st.characters(categories=["L", "P", "Z", "Cc", "Cs", "N"]), max_size=60))
def test_statements_of_statements_are_the_same(text):
    parts = statements(text)
    assert statements(", ".join(parts)) == parts
    assert len({part.casefold() for part in parts}) == len(parts)
    assert all(part == " ".join(part.split()) and part.strip(" .,") == part != "" for part in parts)


def test_clean_turns_anything_but_text_into_nothing():
    assert [rules.clean(value) for value in (None, 3, ["a"], {"a": 1}, " a \n b ")] == [
        "",
        "",
        "",
        "",
        "a b",
    ]


# ---------------------------------------------------------------- rewrite
FILLERS = (
    "",
    "the ",
    "A ",
    "the image shows ",
    "The picture depicts a ",
    "In this photo ",
    "in the image there is an ",
    "Overall ",
    "also ",
    "and the ",
    "there are ",
    "There seems to be a ",
    "we can see the ",
    "one sees ",
    "it appears that the ",
    "However the scene features ",
    "a photograph of the ",
    "this image is of a ",
)
FILLER_WORDS = set(
    re.findall(
        r"\w+",
        """
    overall also additionally finally and but then however in on the this a an
    image picture photo photograph scene view
    is of shows depicts features captures presents displays contains portrays
    there are seems seem to be appears appear we you one can see sees it that""",
    )
)
PUNCTUATION = st.sampled_from([". ", ", ", "; ", ": ", "! ", "? ", "\n", ".\n\n", " , "])


@some
@given(st.lists(st.tuples(st.sampled_from(FILLERS), PHRASES, PUNCTUATION), min_size=1, max_size=6))
def test_rewrite_drops_filler_and_keeps_what_follows_word_for_word(clauses):
    assume(not any(rules.FILLER.match(f"{phrase} ") for _, phrase, _ in clauses))
    caption = "".join(filler + phrase + end for filler, phrase, end in clauses)
    assert statements(rewrite_rule(caption)) == statements(
        ", ".join(phrase for _, phrase, _ in clauses)
    )


@some
@given(
    st.lists(
        st.one_of(
            WORDS, st.sampled_from(sorted(FILLER_WORDS)), st.sampled_from([",", ".", "12:45", "x"])
        ),
        max_size=25,
    ).map(" ".join)
)
def test_rewrite_adds_no_word_and_loses_only_filler(caption):
    try:
        shorthand = rewrite_rule(caption)
    except Unreadable:
        shorthand = ""
    before, after = (
        [word.strip(".") for word in re.findall(r"[^\s,]+", text.casefold())]
        for text in (caption, shorthand)
    )
    rest = iter(before)
    assert all(word in rest for word in after)  # in the order of the caption
    assert {word for word in before if word} - set(after) <= FILLER_WORDS


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("The image shows a red circle. There is a dog; it sleeps!", "red circle, dog, it sleeps"),
        ("In the image, a dog runs.", "dog runs"),
        ("A photo of a cat on the table", "cat on the table"),
        ("The picture on the wall is crooked.", "picture on the wall is crooked"),
        ("a clock at 10:30, made in 1.5 days", "clock at 10:30, made in 1.5 days"),
        ("Dog. dog. DOG", "Dog"),
    ],
)
def test_rewrite_of_a_few_captions(caption, expected):
    assert rewrite_rule(caption) == expected


def test_shorthand_rewritten_is_the_same():
    for seed in range(20):
        caption = ", ".join(fact["text"] for fact in world.facts(world.make_scene(seed)))
        assert rewrite_rule(caption) == caption


@pytest.mark.parametrize(
    "rule, item",
    [
        (rewrite_rule, " ... , "),
        (rewrite_rule, "Overall."),
        (triplets_rule, {"caption": " ,", "slots": {}}),
    ],
)
def test_nothing_in_is_unreadable(rule, item):
    with pytest.raises(Unreadable):
        rule(item)


# ---------------------------------------------------------------- combine
@pytest.mark.parametrize(
    "captions, expected",
    [
        ([], []),
        (["", " . ,"], []),
        (["center", "top-left, bottom"], []),
        (
            ["center background black, top-left red ring background"],
            ["background black", "top-left red ring"],
        ),
        (["top top-right purple triangle"], ["top-right purple triangle"]),
        (
            ["top-left red, top-left stripes", "top-left red ring"],
            ["top-left red ring", "top-left stripes"],
        ),
        (["top-left red"], ["top-left red"]),
        (["dog", "dog brown"], ["dog brown"]),
        (["Center"], []),
        (
            ["woman on the left, tree in background, dog right of the bench"],
            ["dog right of the bench", "tree in background", "woman on the left"],
        ),
        (["left hand on the right knee"], ["left hand on the right knee"]),
        (["foreground of Left and right"], ["foreground of Left and right"]),
    ],
)
def test_combine_splits_run_together_statements_and_drops_lone_places(captions, expected):
    assert [row["text"] for row in combine_rule(captions)] == expected


def seen(rows):
    """The content of rows, without spelling and the names of groups."""
    members = [
        frozenset(
            other["text"].casefold() for other in rows if row["group"] == other["group"] is not None
        )
        for row in rows
    ]
    return [(row["text"].casefold(), row["votes"], group) for row, group in zip(rows, members)]


@some
@given(st.lists(CAPTIONS, min_size=1, max_size=5), st.randoms())
def test_combine_does_not_depend_on_the_order_of_captions_and_statements(captions, rng):
    expected = seen(combine_rule(captions))
    shuffled = [
        ", ".join(rng.sample(statements(caption), len(statements(caption)))) for caption in captions
    ]
    assert seen(combine_rule(rng.sample(shuffled, len(shuffled)))) == expected


def test_combine_sorts_by_place_and_then_by_the_alphabet():
    caption = (
        "zebra, foreground grass, dog brown, center ring, bottom car, "
        "Top-left red ring, top-left dots, background gray"
    )
    expected = [
        "background gray",
        "Top-left red ring",
        "top-left dots",
        "bottom car",
        "center ring",
        "foreground grass",
        "dog brown",
        "zebra",
    ]
    assert texts(combine_rule([caption])) == expected


def test_combine_loses_nothing_and_counts_captions():
    rows = combine_rule(["dog, sky, Dog", "DOG, tree", "dog"])
    assert [(row["text"], row["votes"]) for row in rows] == [("dog", 3), ("sky", 1), ("tree", 1)]


def test_combine_groups_contradictions_about_one_place_and_nothing_else():
    rows = combine_rule(
        [
            "top-left red circle, top-left stripes, center ring",
            "Top-left blue circle, dog brown",
            "dog black, dog white, bottom-left red circle",
        ]
    )
    groups = {row["text"]: row["group"] for row in rows}
    assert groups["top-left red circle"] == groups["Top-left blue circle"] is not None
    assert all(
        group is None
        for text, group in groups.items()
        if not text.casefold().startswith("top-left") or "stripes" in text
    )


@some
@given(st.lists(CAPTIONS, min_size=1, max_size=5))
def test_combine_never_groups_what_is_at_no_place_or_alone(captions):
    rows = combine_rule(captions)
    for row in rows:
        if row["text"].split()[0].casefold() not in rules.PLACES:
            assert row["group"] is None
        mates = [other for other in rows if other["group"] == row["group"] is not None]
        assert len(mates) != 1
        assert (
            len({(other["about"].casefold(), len(other["text"].split())) for other in mates}) <= 1
        )


def test_all_true_facts_of_a_scene_are_in_no_group():
    for seed in range(50):
        caption = ", ".join(fact["text"] for fact in world.facts(world.make_scene(seed)))
        assert [row["group"] for row in combine_rule([caption])] == [None] * len(
            statements(caption)
        )


# ---------------------------------------------------------------- decompose and correct
@some
@given(st.lists(CAPTIONS, min_size=1, max_size=5))
def test_decompose_asks_one_question_that_names_its_statement(captions):
    combined = combine_rule(captions)
    facts = decompose_rule(combined)
    assert [{**row, "question": None} for row in facts] == [
        {**row, "question": None} for row in combined
    ]
    assert [row["question"] for row in facts] == [
        f"Does the image show {row['text']}?" for row in combined
    ]


def test_the_toy_world_asks_the_same_question():
    assert (
        world.ask("top-left red circle")
        == question_of("top-left red circle")
        == "Does the image show top-left red circle?"
    )


@some
@given(st.lists(st.integers(1, 8), min_size=MOST_QUESTIONS - 2, max_size=MOST_QUESTIONS + 60))
def test_decompose_keeps_the_statements_with_the_most_votes_in_their_order(votes):
    rows = [
        {"text": f"thing {k}", "about": "thing", "group": None, "votes": n}
        for k, n in enumerate(votes)
    ]
    facts = decompose_rule(rows)
    assert len(facts) == min(len(votes), MOST_QUESTIONS)
    kept = [int(row["text"].split()[1]) for row in facts]
    assert kept == sorted(kept)
    least = min(votes[k] for k in kept)
    dropped = [k for k in range(len(votes)) if k not in kept]
    assert all(votes[k] <= least for k in dropped)
    assert all(
        k < other for k in kept for other in dropped if votes[k] == votes[other]
    )  # of equals, the first


def test_decompose_leaves_no_group_of_one_where_the_other_was_dropped():
    rows = [
        {"text": f"thing {k}", "about": "thing", "group": None, "votes": 2}
        for k in range(MOST_QUESTIONS - 1)
    ]
    rows += [
        {"text": f"top {k}", "about": "top", "group": "top 2", "votes": 2 - k} for k in range(2)
    ]
    assert decompose_rule(rows)[-1]["text"] == "top 0"
    assert decompose_rule(rows)[-1]["group"] is None


def test_correct_keeps_what_was_confirmed_in_its_order():
    rows = [
        {"text": text, "kept": kept}
        for text, kept in (("c", True), ("a", False), ("b, b", True), ("d", False))
    ]
    assert correct_rule({"statements": rows}) == "c, b, b"
    assert correct_rule({"statements": rows[1:2]}) == ""


# ---------------------------------------------------------------- triplets
def asked(row):
    return re.fullmatch(r"Does the image show (.+)\?", row["question"])[1]


@some
@given(st.lists(CAPTIONS, min_size=1, max_size=6))
def test_triplets_are_true_or_one_word_away_from_true(captions):
    known = slots(captions)
    own = {text.casefold() for text in statements(captions[0])}
    rows = triplets_rule({"caption": captions[0], "slots": known})
    yes, no = (
        [row for row in rows if row["answer"].startswith(word)] for word in ("Yes, ", "No, ")
    )
    assert len(yes) + len(no) == len(rows)
    assert (
        [asked(row) for row in yes] == statements(captions[0]) == [row["answer"][5:] for row in yes]
    )
    for row in no:
        miss, truth = asked(row).split(), row["answer"][4:].split()
        assert len(miss) == len(truth) and sum(a != b for a, b in zip(miss, truth)) == 1
        assert miss[0] == truth[0]
        assert " ".join(truth).casefold() in own and " ".join(miss).casefold() not in own


def test_triplets_take_the_other_word_from_other_captions_and_no_word_of_its_own():
    captions = [
        "dog brown, dog big",
        "dog black",
        "Dog BIG",
        "cat grey",
        "dog very old",
        "cat brown",
        "dog",
    ]
    rows = triplets_rule({"caption": captions[0], "slots": slots(captions)})
    assert [(asked(row), row["answer"]) for row in rows] == [
        ("dog brown", "Yes, dog brown"),
        ("dog black", "No, dog brown"),
        ("dog big", "Yes, dog big"),
        ("dog black", "No, dog big"),
    ]
    assert triplets_rule({"caption": "dog brown", "slots": slots(["dog brown"])}) == [
        {"question": "Does the image show dog brown?", "answer": "Yes, dog brown"}
    ]


def test_triplets_are_the_same_every_time_and_of_all_words():
    captions = [
        ", ".join(fact["text"] for fact in world.facts(world.make_scene(seed)))
        for seed in range(60)
    ]
    known, changes = slots(captions), set()
    for caption in captions:
        rows = triplets_rule({"caption": caption, "slots": known})
        random.shuffle(shuffled := list(captions))
        assert triplets_rule({"caption": caption, "slots": slots(shuffled)}) == rows
        for row in rows:
            if row["answer"].startswith("No"):
                changed = [
                    k
                    for k, (a, b) in enumerate(zip(asked(row).split(), row["answer"][4:].split()))
                    if a != b
                ]
                changes.update(itertools.product([len(asked(row).split())], changed))
    assert changes == {(2, 1), (3, 1), (3, 2)}  # marks and backgrounds; colours; shapes
