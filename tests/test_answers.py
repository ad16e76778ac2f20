"""answers.py: lists and objects read from whatever a model answers."""

import contextlib
import json
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from plumbing.answers import loose_json
from plumbing.rules import Unreadable


@pytest.mark.parametrize(
    "reply",
    [
        '["a", "b"]',
        'Sure! Here it is:\n```json\n["a", "b"]\n```\nAnything else?',
        'As in [1] and {so}, and [see there]: ["a", "b"] is {it} [2].',
        '["a", "b",]',
        '["a",\n"b" , \n ]',
        '<think>Perhaps ["x", "y", "z"]? Or {"no": 1}.</think>\n["a", "b"]',
        'I think that ["x", "y", "z"] </think> no: </think>["a", "b"]',
        "1. a\n2. b",
        "Here:\n\n  1) a\n\n  2) b\nDone.",
        "- a\n- b  \n",
        "* a\r\n* b\r\n",
        '1: "a"\n2: "b"',
        "• a\n• b",
    ],
)
def test_the_same_list_in_many_wrappings(reply):
    assert loose_json(reply) == (["a", "b"], True)


def test_objects_with_trailing_commas_and_line_breaks_in_strings():
    reply = 'Yes: {"statements": [{"text": "two\nlines\t", "in": [1, 2,], "group": null,},\n], }'
    assert loose_json(reply) == (
        {"statements": [{"text": "two\nlines\t", "in": [1, 2], "group": None}]},
        True,
    )


def test_brackets_quotes_and_commas_inside_strings_are_text():
    expected = {"a": ["],}", '"[{,]', "\\", ", ]", "{"]}
    assert loose_json(f"so: {json.dumps(expected)}.") == (expected, True)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "no",
        "I cannot do that.",
        "[]",
        "{}",
        "[,]",
        "1.5 of them",
        "-",
        "a - b",
        "[not json]",
        "{'a': 1}",
        "<think>[1, 2]</think> I give up",
        '\n<think>First, ["a", "b"]. Then',
        "\ud800",
        "[\x00]",
    ],
)
def test_no_json_is_unreadable(reply):
    with pytest.raises(Unreadable):
        loose_json(reply)


@pytest.mark.parametrize("reply", ['["a [1] \\', '{"a": "b [1, 2] \\'])
def test_brackets_in_a_string_that_was_cut_off_after_a_backslash_are_text(reply):
    with pytest.raises(Unreadable):
        loose_json(reply)


ANSWERS = [
    ["a", "b ] , [", 'say "hi"', "\\", "é\n☃"],
    [
        {"text": "a", "in": [1, 2], "group": None},
        {"text": "}]", "in": [], "of": ["x", {"y": ["z"]}]},
        {"text": "c"},
    ],
    [["a", "b"], [], ["c", ["d", "e"]]],
    {"statements": ["one", "two", "three"]},
    {
        "triplets": [
            {"question": "Is it {x}?", "answer": "Yes, [x]"},
            {"question": "?", "answer": "No"},
        ]
    },
]


@pytest.mark.parametrize(
    "form", ["{}", "Here you are:\n```json\n{}\n```\nBye.", "<think>a [b] {{c}}</think>{}"]
)
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("value", ANSWERS, ids=range(len(ANSWERS)))
def test_an_answer_cut_off_anywhere_gives_its_complete_entries(value, indent, form):
    """At every position: the complete entries, and True only if the answer is complete."""
    answer = json.dumps(value, indent=indent)
    expected = next(iter(value.values())) if isinstance(value, dict) else value
    text = form.format(answer)
    begin = text.index(answer)
    ends, at = [], begin
    for entry in expected:  # where each entry ends
        piece = (
            json.dumps(entry)
            if indent is None
            else json.dumps(entry, indent=1).replace(
                "\n", "\n" + " " * (1 + isinstance(value, dict))
            )
        )
        at = text.index(piece, at) + len(piece)
        ends.append(at)
    for cut in range(begin + 1, len(text) + 1):
        n = sum(end <= cut for end in ends)
        try:
            cut_value, complete = loose_json(text[:cut])
        except Unreadable:
            assert n == 0
            continue
        listed = next(iter(cut_value.values())) if isinstance(value, dict) else cut_value
        assert listed == expected[:n] and n > 0
        assert complete == (cut >= begin + len(answer))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{" * 100_000,
        "[{" * 50_000,
        "]}" * 50_000,
        "[" * 50_000 + '""' * 25_000,
        "{" * 50_000 + "[" + '"",' * 17_000,
        "[" * 45 + '""' * 50_000,
        '["' + "\\" * 100_001,
        "[" + "," * 100_000,
        '{"a":' * 20_000,
        "[" * 50_000 + "]" * 50_000,
        "\n" * 100_000,
        "- a" + " " * 100_000 + "b",
        " " * 100_000,
        "1" * 100_000,
        "-" * 100_000,
        "[1" + "0" * 100_000 + "]",
        "</think>" * 12_000,
    ],
    ids=lambda text: ascii(text[:6]),
)
def test_garbage_is_read_or_refused_quickly(text):
    began = time.process_time()
    with contextlib.suppress(Unreadable):
        loose_json(text)
    assert time.process_time() - began < 1


ANY_TEXT = st.text(max_size=12)
PROSE = st.text(st.characters(exclude_characters="[]{}"), max_size=30)
JSON = st.recursive(
    ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
).filter(lambda value: value and not isinstance(value, str))


@settings(max_examples=100, deadline=None)
@given(JSON, PROSE, PROSE, st.booleans(), st.sampled_from([None, 0, 2]))
def test_json_in_prose_comes_back_as_it_is(value, before, after, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assume("</think>" not in text + after)
    assert loose_json(before + text + after) == (value, True)


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from('[]{}",:\\ \n1a-.`'), max_size=40) | st.text(max_size=30))
def test_anything_is_read_or_unreadable(text):
    try:
        value, complete = loose_json(text)
    except Unreadable:
        return
    assert value and isinstance(value, list | dict) and isinstance(complete, bool)
