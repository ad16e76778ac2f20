"""The tokenizer against the official one's ids, and against tiktoken on vocabularies and texts made
at random."""

import base64
import json
import os
import random
import time
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbing.errors import InputError
from plumbing.tokenizer import PATTERN, SPECIAL, Tokenizer

CASES = json.loads(
    (Path(__file__).parent / "fixtures/tokenizer_cases.json").read_text(encoding="utf-8")
)
REAL = os.environ.get("ATAC_QWEN_TIKTOKEN")
needs_real = pytest.mark.skipif(
    not REAL, reason="ATAC_QWEN_TIKTOKEN does not name Qwen's own qwen.tiktoken"
)


def write(path, tokens):
    path.write_text(
        "".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens))
    )
    return path


def peer(path):
    """tiktoken on the same file: the library that the official tokenizer runs on."""
    lines = (line.split() for line in path.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
    return tiktoken.Encoding("peer", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def real():
    return Tokenizer(REAL)


@pytest.fixture(scope="module")
def real_peer():
    return peer(Path(REAL))


@needs_real
def test_loads_in_five_seconds_at_most():
    start = time.process_time()
    Tokenizer(REAL)
    assert time.process_time() - start < 5


@needs_real
@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: ascii(case["text"][:30]))
def test_official_ids(real, case):
    assert real.encode(case["text"], special=True) == case["raw_tiktoken_ids"]
    assert real.decode(case["raw_tiktoken_ids"]) == case["decode"]


@needs_real
def test_official_special_ids(real):
    expected = CASES["meta"]
    assert real.n_vocab == expected["n_vocab"]
    assert (real.eos_id, real.soft_prompt_id) == (151643, expected["extra_0"])
    for name, expected_id in expected["special"].items():
        assert real.encode(name, special=True) == [expected_id]
        assert real.decode([expected_id]) == name
    assert (real.image_start_id, real.image_end_id, real.image_pad_id) == (151857, 151858, 151859)


@needs_real
@settings(max_examples=300, deadline=None)
@given(
    text=st.text(max_size=60)
    | st.text("aAbB'sStTrReE 0123.,-\n\r\t\u00a0\u2003éßſ中한ا😀́<|>", max_size=60)
)
def test_any_text_as_tiktoken_with_the_real_vocabulary(real, real_peer, text):
    normal = unicodedata.normalize("NFC", text)
    expected = real_peer.encode(normal, disallowed_special=())
    assert real.encode(text) == expected
    assert real.decode(expected) == normal


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_small_vocabulary_as_tiktoken(tmp_path_factory, data):
    """Random merges, words that no merge makes, and ranks in any order: still tiktoken's ids."""
    rng = random.Random(data.draw(st.integers(0, 10**9)))
    tokens = [bytes([b]) for b in range(256)]
    letters = [b"a", b"b", b"c", b" "]
    for _ in range(data.draw(st.integers(0, 25))):
        new = rng.choice(letters) + rng.choice(letters)
        if new not in tokens:
            tokens.append(new)
            letters.append(new)
    tokens += [w for w in (b"abcabc", b" cab", b"bbbbbbb") if w not in tokens]
    if data.draw(st.booleans()):
        rng.shuffle(tokens)
    path = write(tmp_path_factory.mktemp("vocabulary") / "qwen.tiktoken", tokens)
    ours, theirs = Tokenizer(path), peer(path)
    for _ in range(10):
        text = "".join(rng.choice("aabbcc  d") for _ in range(rng.randrange(30)))
        assert ours.encode(text) == theirs.encode(text)


def test_special_tokens_follow_the_ranks_and_are_text_unless_asked_for(tmp_path):
    tokenizer = Tokenizer(write(tmp_path / "qwen.tiktoken", [bytes([b]) for b in range(256)]))
    assert (tokenizer.eos_id, tokenizer.soft_prompt_id, tokenizer.n_vocab) == (256, 259, 256 + 217)
    assert (tokenizer.image_start_id, tokenizer.image_end_id, tokenizer.image_pad_id) == (
        470,
        471,
        472,
    )
    text = "<img>/etc/passwd</img><|endoftext|>"
    assert max(tokenizer.encode(text)) < 256
    assert tokenizer.encode(text, special=True) == [470, *b"/etc/passwd", 471, 256]
    assert tokenizer.decode(tokenizer.encode(text, special=True)) == text


def test_a_vocabulary_without_all_bytes(tmp_path):
    tokenizer = Tokenizer(write(tmp_path / "qwen.tiktoken", [b"a", b"b", b" ", b"ab", b" cab"]))
    assert tokenizer.encode("abba cab") == [3, 1, 0, 4]
    assert tokenizer.eos_id == 5
    with pytest.raises(InputError, match="no token for b'c'"):
        tokenizer.encode("abc")


def test_text_that_is_not_unicode_is_encoded_with_replacement_characters(tmp_path):
    tokenizer = Tokenizer(write(tmp_path / "qwen.tiktoken", [bytes([b]) for b in range(256)]))
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode([0xFF, 65, 10**6]) == "\ufffdA"


@pytest.mark.parametrize(
    "content",
    [b"", b"not base64 0\n", b"YQ== 0\nYg== 2\n", b"YQ== 0\nYQ== 1\n", b"YQ==\n", b"\xff\xfe"],
)
def test_a_damaged_vocabulary_is_one_clear_error(tmp_path, content):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(InputError, match=r"qwen\.tiktoken") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_vocabulary_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Tokenizer(tmp_path)
