"""Qwen's byte-level BPE tokenizer, from `qwen.tiktoken` alone.

The file lists the vocabulary, a base64 token and its rank per line. The special tokens get the ids
after the last rank, so that a small vocabulary works by the same rule as the released one. The
`tokenizers` library does the work; it wants merges instead of ranks, and they are recovered here.
"""
import base64
import contextlib
import re
import unicodedata
from itertools import pairwise
from pathlib import Path

from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from plumbing.errors import InputError

# How Qwen splits text before BPE: contractions, words, single digits, punctuation, white space.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)),
           "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>",
           "<img>", "</img>", "<imgpad>"]

SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")


def byte_letters():
    """{byte: printable character}, GPT-2's table, in which the `tokenizers` library works."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def read_ranks(path):
    """`qwen.tiktoken` -> {token bytes: rank}, with ranks 0 … n-1. InputError for anything else."""
    ranks = {}
    try:
        for line in filter(bytes.strip, Path(path).read_bytes().splitlines()):
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a base needs qwen.tiktoken next to its "
                         "config.json") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a vocabulary of 'base64 rank' lines "
                         f"({error})") from None
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{path}: ranks must be 0 … n-1, each once; the file is damaged")
    return ranks


def last_merge(token, ranks):
    """The two parts whose merge makes `token` when BPE runs on its bytes, lowest rank first.

    None if no merge makes it. The pair is the same wherever the token occurs in a text: if a merge
    makes it there, no earlier merge crossed its borders.
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


def byte_pair_encoder(ranks, first_free_id):
    """{token bytes: rank} -> the `tokenizers` object, and {id: byte} of the bytes without a token.

    Bytes that a small vocabulary lacks get ids from `first_free_id` on, so that Tokenizer.encode
    can name what it cannot write.
    """
    letters = byte_letters()
    spelled = {token: "".join([letters[byte] for byte in token]) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    vocab |= {letters[byte]: first_free_id + i for i, byte in enumerate(missing)}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pair = last_merge(token, ranks) if len(token) > 1 else None
        if pair:
            merges.append(tuple("".join([letters[byte] for byte in part]) for part in pair))
    encoder = FastTokenizer(BPE(vocab, merges, ignore_merges=True))
    encoder.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return encoder, {first_free_id + i: byte for i, byte in enumerate(missing)}


class Tokenizer:
    """Text <-> ids of the vocabulary in a folder's (or file's) qwen.tiktoken.

    eos_id, image_start_id, image_end_id, image_pad_id and soft_prompt_id are ids; n_vocab counts
    ranks and special tokens.
    """

    def __init__(self, path):
        path = Path(path)
        ranks = read_ranks(path / "qwen.tiktoken" if path.is_dir() else path)
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
        self.n_vocab = len(ranks) + len(SPECIAL)
        self.eos_id, self.soft_prompt_id = special["<|endoftext|>"], special["<|extra_0|>"]
        self.ends = {self.eos_id}               # tokens that end an answer
        self.image_start_id, self.image_end_id = special["<img>"], special["</img>"]
        self.image_pad_id = special["<imgpad>"]
        self._special = special
        self._bytes = {rank: token for token, rank in ranks.items()}
        self._bytes |= {i: name.encode() for name, i in special.items()}
        self._bpe, self._missing = byte_pair_encoder(ranks, self.n_vocab)

    def encode(self, text, special=False):
        """Text -> list of ids, after NFC.

        A special token spelled out in the text, such as <img>, is plain text unless special=True.
        InputError where a small vocabulary lacks a byte of the text.
        """
        # lone surrogates, which a tokenizer of bytes cannot write, become U+FFFD
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = unicodedata.normalize("NFC", text)
        ids = []
        for piece in SPLIT.split(text) if special else [text]:
            if special and piece in self._special:
                ids.append(self._special[piece])
            else:
                ids += self._bpe.encode(piece).ids
        if missing := sorted({self._missing[i] for i in ids if i in self._missing}):
            raise InputError(f"the vocabulary has no token for {bytes(missing)!r} in "
                             f"{text[:60]!r}; use other words")
        return ids

    def decode(self, ids):
        """Ids (any iterable of ints) -> text; broken UTF-8 becomes U+FFFD, unknown ids nothing."""
        text = b"".join(self._bytes.get(int(i), b"") for i in ids)
        return text.decode("utf-8", errors="replace")

    def plain_text(self, ids):
        """The text of ids without special tokens: as text they would mislead a reader."""
        return self.decode(i for i in ids if i < self.eos_id)

    def special_in(self, text):
        """The special tokens that are spelled out in a text."""
        return SPLIT.findall(text)


class ChatTokenizer:
    """The same for a tokenizer of transformers.

    eos_id is the token that ends an answer in training; in generation any of `ends` does. Tokens in
    `reserved`, special ones and placeholders of images, come from no text and are never sampled.
    """

    def __init__(self, fast, config, generation_config):
        self.fast = fast
        added = fast.added_tokens_decoder
        numbers = {**config.get_text_config().to_dict(), **config.to_dict()}
        self.placeholders = {i for key, i in numbers.items() if isinstance(i, int)
                             and re.search("(image|video|vision|audio).*_(id|index)$", key)}
        special = {i for i, token in added.items() if token.special} | set(fast.all_special_ids)
        self.reserved = special | self.placeholders
        ends = generation_config.eos_token_id if generation_config else None
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        ends += [fast.eos_token_id, numbers.get("eos_token_id")]
        self.ends = {i for i in ends if isinstance(i, int)}
        self.eos_id = next((i for i in ends if isinstance(i, int)), None)
        self._names = {i: str(token) for i, token in added.items() if i in self.reserved}
        self.filler_id = self.encode("a")[0]

    def end_with(self, token):
        """Take the token that a chat template puts behind an answer, if it has one."""
        if token is not None:
            self.eos_id = token
            self.ends.add(token)

    def encode(self, text, special=False):
        """Text -> list of ids. A special token spelled out in it is plain text, unless special."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self.fast(text, add_special_tokens=False,
                        split_special_tokens=not special)["input_ids"]
        if special or not self.reserved.intersection(ids):
            return ids
        # a placeholder that its tokenizer does not count as special: written in two halves
        name = next((name for name in self._names.values() if len(name) > 1 and name in text), None)
        if name is None:                        # letters that the vocabulary lacks
            return [i for i in ids if i not in self.reserved]
        at = text.index(name) + 1
        return self.encode(text[:at]) + self.encode(text[at:])

    def decode(self, ids):
        """Ids (any iterable of ints) -> text."""
        return self.fast.decode([int(i) for i in ids], clean_up_tokenization_spaces=False)

    def plain_text(self, ids):
        """The text of ids without special tokens: as text they would mislead a reader."""
        return self.decode(i for i in ids if i not in self.reserved and i not in self.ends)

    def special_in(self, text):
        """The special tokens that are spelled out in a text."""
        return [name for name in self._names.values() if name in text]


def yes_and_no(tokenizer):
    """Ids (two lists) of the spellings of yes and of no that are single tokens.

    InputError where a vocabulary has no such token for one of them.
    """
    sides = []
    for words in ((" Yes", "Yes", " yes", "yes"), (" No", "No", " no", "no")):
        side = []
        for word in words:
            with contextlib.suppress(InputError):       # a small vocabulary may lack the letters
                ids = tokenizer.encode(word)
                side += ids if len(ids) == 1 else []
        if not side:
            raise InputError(f"the vocabulary has none of {', '.join(map(repr, words))} as a "
                             "single token")
        sides.append(side)
    return sides
