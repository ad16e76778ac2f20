"""Texts that a model wrote, by their form alone: loops, what a cut leaves, repeated statements."""
import re

COPIES = 3              # a statement this many times in a row is a loop
LOOP_TOKENS = 24        # so is a run this long of a shorter pattern, such as one endless word
END = r"[,;](?!\d)|\.(?=\s|$)"         # of a statement; 3.5 and 1,000 have none
STATEMENT_ENDS = ",.;:!?\n，。；、"

JOINERS = "\u200c\u200d"             # between letters, as in Persian, and between emoji


def loops(ids, text_of):
    """Whether a list of token ids, whose text is text_of(ids), ends in a loop.

    A loop is one or several whole statements COPIES times in a row, or a shorter pattern over
    LOOP_TOKENS tokens. Three dots or a long number are neither.
    """
    for period in range(1, len(ids) // COPIES + 1):
        if ids[-1] != ids[-1 - period]:
            continue                    # implied by the next comparison, and much faster
        pattern = ids[-period:]
        if pattern * COPIES != ids[-COPIES * period:]:
            continue
        text = text_of(pattern)
        is_statement = any(c in STATEMENT_ENDS for c in text) and any(c.isalpha() for c in text)
        long_run = ids[-LOOP_TOKENS:-period] == ids[period - LOOP_TOKENS:]
        if is_statement or (len(ids) >= LOOP_TOKENS and long_run):
            return True
    return False


def trimmed(result):
    """The text of a sample without its loop, or without the statement at which it was cut off."""
    if result["finish"] == "repeat":
        return without_loop(result["caption"])
    if result["finish"] == "length":
        ends = [match.start() for match in re.finditer(END, result["caption"])]
        return result["caption"][:ends[-1]] if ends else ""
    return result["caption"]


def without_loop(caption):
    """A caption that finished by "repeat" with its loop written once: for showing, not training."""
    longest, cut = 0, len(caption)      # of the loops that it may end in; where the second copy is
    for period in range(1, len(caption) // COPIES + 1):
        if caption[-period:] * COPIES != caption[-COPIES * period:]:
            continue
        start = len(caption) - COPIES * period
        while start > 0 and caption[start - 1] == caption[start - 1 + period]:
            start -= 1
        if len(caption) - start > longest:
            longest, cut = len(caption) - start, start + period
    return caption[:cut]


# ---------------------------------------------------------------- captions for a data set

def tidy(result, max_words=None):
    """A sample as a line of a data set: no loop, no unfinished end, no statement twice, at most
    max_words words where these end a statement; the cut text if nothing else is there."""
    text = trimmed(result)
    kept, seen, words = [], set(), 0
    for piece in pieces(text if text.strip() else result["caption"]):
        key = piece.strip(" \n,.;!?，。；").casefold()
        words += len(piece.split())
        if max_words and words > max_words:
            kept = kept or [" ".join(piece.split()[:max_words])]
            break
        if key and key not in seen:
            kept.append(piece)
        seen.add(key)
    return on_one_line("".join(kept)).rstrip(" ,;，；")


def pieces(text):
    """The statements of a text, each with the punctuation and space behind it.

    A comma or a point within a number or a name (3.5, U.S.) ends none.
    """
    return [piece for piece in re.findall(r".*?(?:[,.;!?]+(?:\s+|$)|[，。；]+|\n+|$)", text, re.S)
            if piece]


def on_one_line(text):
    """No line breaks, and nothing unprintable."""
    shown = (c if c.isprintable() or c in JOINERS else "\ufffd" for c in " ".join(text.split()))
    return "".join(shown)
