"""Captions as lines of a data set, and what is reported of many."""

from collections import Counter

import pytest

from plumbing.tally import Tally, kind_of
from plumbing.texts import on_one_line, pieces, tidy


def result(caption, finish="eos"):
    return {"caption": caption, "finish": finish, "tokens": 9}


@pytest.mark.parametrize(
    ("caption", "finish", "expected"),
    [
        (" a red cup, two dogs, A red cup, a cat", "eos", "a red cup, two dogs, a cat"),
        ("A man in the U.S. buys 3.5 kg. He smiles. He smiles.", "eos", None),
        ("a red cup, two dogs, a c", "length", "a red cup, two dogs"),
        ("a red c", "length", "a red c"),
        ("a red tower, about 3.5 metres tall and", "length", "a red tower"),
        ("a red tower, 3.5 metres, 1,000 ste", "length", "a red tower, 3.5 metres"),
        ("می\u200cروم", "eos", "می\u200cروم"),
        ("a red cup, a dog, a dog, a dog", "repeat", "a red cup, a dog"),
        ("a red cup\n\na dog\na red cup", "eos", "a red cup a dog"),
        ("红色，蓝色，红色。", "eos", "红色，蓝色"),
        ("a cup, , . ,", "eos", "a cup"),
        (" , .", "eos", ""),
        ("", "eos", ""),
        ("a \x07bell", "eos", "a \ufffdbell"),
    ],
)
def test_a_caption_is_one_tidy_line(caption, finish, expected):
    expected = "A man in the U.S. buys 3.5 kg. He smiles." if expected is None else expected
    assert tidy(result(caption, finish)) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [(1, "a"), (2, "a cup"), (4, "a cup"), (5, "a cup, two red dogs"), (9, "a cup, two red dogs")],
)
def test_it_is_cut_where_a_statement_ends(words, expected):
    assert tidy(result("a cup, two red dogs"), words) == expected


def test_pieces_lose_nothing():
    for text in ("a, b. c", "a,b", "x\n\ny", "，。a", "", "no end", "end. "):
        assert "".join(pieces(text)) == text


def test_one_line_has_no_line_break():
    assert on_one_line("a\r\n\u2028b\tc") == "a b c"


# ---------------------------------------------------------------- tally
def test_errors_are_counted_by_kind_and_not_by_name():
    kinds = {
        kind_of("a.png: cannot be read, the file is damaged (image file is truncated)"),
        kind_of("b: c.png: cannot be read, the file is damaged (broken PNG file)"),
    }
    assert len(kinds) == 1
    assert kind_of("x.png: 9×700000000 pixels; at most 5") == "N×N pixels"


def test_the_summary_adds_up():
    tally = Tally()
    tally.add({"caption": "a", "finish": "eos", "tokens": 4})
    tally.add({"caption": ["a", "b"], "finish": ["eos", "length"], "tokens": [6, 8]})
    tally.add({"caption": "old", "finish": "kept"})
    tally.add({"error": "a.png: no such image file"})
    shown = [{"kept": True}, {"kept": False}]
    tally.add({"caption": "a", "finish": "eos", "tokens": 2, "statements": shown})
    text = "\n".join(tally.lines(2.0, Counter(wait=1.0, decode=3.0)))
    assert "5 images: 3 captioned, 1 kept as they were, 1 errors, 2.5 images/s" in text
    assert "1 × no such image file" in text
    assert "5.0 on average, 2 to 8; 75.0% ended" in text and "50.0% of them refused" in text
    assert "decode 75%" in text
    assert list(Tally().lines(1.0, Counter())) == ["0 images: 0 captioned, 0 errors, 0 images/s"]
