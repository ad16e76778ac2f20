"""Qwen's byte-level BPE tokenizer, from `qwen.tiktoken` alone.

The file lists the vocabulary, a base64 token and its rank per line; the special tokens follow by position after the
last rank, so that a small vocabulary works by the same rule as the released one. The `tokenizers` library does the
work; it wants merges instead of ranks, and they are recovered here.
"""
import base64
import re
import unicodedata
from itertools import pairwise
from pathlib import Path

from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from plumbing.errors import InputError

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)), "<ref>", "</ref>",
           "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"]

SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")


def byte_letters():
    """One printable character for each byte, the GPT-2 table that the `tokenizers` library works in."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


def read_ranks(path):
    """`qwen.tiktoken` -> {token bytes: rank}, with ranks 0 … n-1. InputError for anything else."""
    ranks = {}
    try:
        for line in filter(bytes.strip, Path(path).read_bytes().splitlines()):
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a base needs qwen.tiktoken beside its config.json") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a vocabulary of 'base64 rank' lines ({error})") from None
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{path}: ranks must be 0 … n-1, each once; the file is damaged")
    return ranks


def last_merge(token, ranks):
    """The two parts whose merge makes `token` when BPE runs on its bytes, lowest rank first; None where none does.

    It is the same pair wherever the token comes up: if a merge makes it, no merge crossed its ends before.
    """
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        lowest = min(pairs)
        if lowest == len(ranks):
            return None
        at = pairs.index(lowest)
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


class Tokenizer:
    """Text <-> ids of the vocabulary in a folder's (or file's) qwen.tiktoken.

    eos_id, image_start_id, image_end_id, image_pad_id and soft_prompt_id are ids; n_vocab counts ranks and specials.
    """

    def __init__(self, path):
        path = Path(path)
        ranks = read_ranks(path / "qwen.tiktoken" if path.is_dir() else path)
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
        self.n_vocab = len(ranks) + len(SPECIAL)
        self.eos_id, self.soft_prompt_id = special["<|endoftext|>"], special["<|extra_0|>"]
        self.image_start_id, self.image_end_id = special["<img>"], special["</img>"]
        self.image_pad_id = special["<imgpad>"]
        self._special = special
        self._bytes = {i: token for token, i in ranks.items()} | {i: name.encode() for name, i in special.items()}

        letters = byte_letters()
        spelled = {token: "".join([letters[b] for b in token]) for token in ranks}
        vocab = {spelled[token]: rank for token, rank in ranks.items()}
        # bytes that a small vocabulary lacks get ids beyond it, so that encode can name what it cannot write
        lacking = [b for b in range(256) if bytes([b]) not in ranks]
        vocab |= {letters[b]: self.n_vocab + i for i, b in enumerate(lacking)}
        self._lacking = {self.n_vocab + i: b for i, b in enumerate(lacking)}
        parts = (last_merge(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1)
        merges = [tuple("".join([letters[b] for b in part]) for part in pair) for pair in parts if pair]
        self._bpe = FastTokenizer(BPE(vocab, merges, ignore_merges=True))
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    def encode(self, text, special=False):
        """Text -> list of ids, after NFC. Spelled special tokens such as <img> are text, unless special=True.

        InputError where a small vocabulary lacks a byte of the text.
        """
        text = unicodedata.normalize("NFC", text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        ids = []
        for piece in SPLIT.split(text) if special else [text]:
            ids += [self._special[piece]] if special and piece in self._special else self._bpe.encode(piece).ids
        if missing := sorted({self._lacking[i] for i in ids if i in self._lacking}):
            raise InputError(f"the vocabulary has no token for {bytes(missing)!r} in {text[:60]!r}; use other words")
        return ids

    def decode(self, ids):
        """Ids (any iterable of ints) -> text; broken UTF-8 becomes U+FFFD, ids outside the vocabulary nothing."""
        return b"".join(self._bytes.get(int(i), b"") for i in ids).decode("utf-8", errors="replace")
