"""The shorthand tool: what a tool LLM is asked, done by rules, for captions that are comma-separated statements.

The first word of a statement says what it is about ("top-left red circle", "background gray"). No model, no cost, and
the same answer every time: what the toy world and the tests use.
"""
import random
import re

MOST_QUESTIONS = 120        # about one image [the source: 30 to 120]


class Unreadable(ValueError):
    """There is no answer to be had from this; half: as much of it as could be read, if any."""

    def __init__(self, reason, half=None):
        super().__init__(reason)
        self.half = half


# ---------------------------------------------------------------- statements
def clean(text):
    """A text on one line, without what UTF-8 cannot hold; "" for what is no text."""
    return " ".join(text.encode("utf-8", "replace").decode().split()) if isinstance(text, str) else ""


def statements(caption):
    """The statements of a shorthand caption, in order, without repetition."""
    found = {}
    for part in caption.split(","):
        text = clean(part).strip(" .")
        found.setdefault(text.casefold(), text)
    return [text for text in found.values() if text]


def question_of(statement):
    """The question that the shorthand tool makes of a statement."""
    return f"Does the image show {statement}?"


def lone_groups_dropped(rows):
    """Rows in which a group of one is none: nothing excludes it."""
    names = [row["group"] for row in rows]
    return [{**row, "group": row["group"] if names.count(row["group"]) > 1 else None} for row in rows]


def fewer(rows):
    """At most MOST_QUESTIONS rows, in order: those with the most votes."""
    best = sorted(range(len(rows)), key=lambda k: (-rows[k]["votes"], k))[:MOST_QUESTIONS]
    return [rows[k] for k in sorted(best)]


# ---------------------------------------------------------------- the five operations
FILLER = re.compile(r"""(?ix)^(?:(?:overall|also|additionally|finally|and|but|then|however)(?:\s+|$)
    |(?:in|on)\s+(?:the|this|an?)\s+(?:image|picture|photo|photograph|scene|view)(?:\s+|$)
    |(?:the|this|an?)\s+(?:image|picture|photo|photograph|scene|view)      # not "the picture on the wall"
      \s+(?:(?:is\s+)?of|shows?|depicts?|features?|captures?|presents?|displays?|contains?|portrays?)\s+
    |there\s+(?:is|are|seems?\s+to\s+be|appears?\s+to\s+be)\s+|(?:we|you|one)\s+(?:can\s+)?sees?\s+
    |it\s+(?:appears|seems)\s+(?:that|to\s+be)\s+|(?:an?|the)\s+)""")


def rewrite_rule(caption):
    """Sentences and clauses as statements, without their filler and articles."""
    parts = [part.strip() for part in re.split(r"[,;!?\n]+|[.:](?=\s|$)", caption)]
    kept = []
    for part in parts:
        while FILLER.match(part):
            part = FILLER.sub("", part)
        kept.append(part)
    if not statements(", ".join(kept)):
        raise Unreadable("nothing is left of the caption")
    return ", ".join(statements(", ".join(kept)))


# Where something can be, in the order in which a caption goes through it; other things follow, in alphabetical order.
PLACES = ("background", "top-left", "top", "top-right", "left", "right", "bottom-left", "bottom", "bottom-right",
          "center", "centre", "foreground")


# After these a place is part of what is said: "left hand on the right knee".
LINKS = {"the", "a", "an", "its", "his", "her", "of", "on", "in", "at", "to", "from", "by", "near", "with", "and"}


def parted(caption):
    """The statements of a caption, parted also where a comma was forgotten: where one begins with a place, the next
    place begins another ("top-left red circle top-right stripes", but not "woman on the left"). A place alone says
    nothing."""
    for text in statements(caption):
        words = text.split()
        folded = [word.casefold() for word in words]
        starts = [k for k, word in enumerate(folded) if k == 0 or (
            folded[0] in PLACES and word in PLACES and folded[k - 1] not in LINKS)]
        for k, end in zip(starts, [*starts[1:], len(words)]):
            if end - k > 1 or folded[k] not in PLACES:
                yield " ".join(words[k:end])


def combine_rule(captions):
    """What any of the captions says, once, always in the same order, and how many of them say it.

    One place has one thing of a form: statements about the same place with as many words exclude each other
    ("top-left red circle" and "top-left red ring", but not "top-left stripes"), and so share a group. Half a statement
    ("top-left red") is dropped where the whole is said.
    """
    rows = {}
    for caption in captions:
        for key, text in {text.casefold(): text for text in parted(caption)}.items():
            about = text.split()[0]
            group = f"{about.casefold()} {len(text.split())}" if about.casefold() in PLACES else None
            row = rows.setdefault(key, {"text": text, "about": about, "group": group, "votes": 0})
            row["votes"] += 1
    said = {key: key.split() for key in rows}
    whole = [row for key, row in rows.items() if not any(
        said[key][0] == more[0] and set(said[key]) < set(more) for more in said.values())]

    def order(row):
        about = row["about"].casefold()
        place = PLACES.index(about) if about in PLACES else len(PLACES)
        return place, about, -len(row["text"].split()), row["text"].casefold()
    return lone_groups_dropped(sorted(whole, key=order))


def decompose_rule(rows):
    return lone_groups_dropped([{"text": row["text"], "question": question_of(row["text"]), "about": row["about"],
                                 "group": row["group"], "votes": row["votes"]} for row in fewer(rows)])


def correct_rule(item):
    """The kept statements, in their order."""
    return ", ".join(row["text"] for row in item["statements"] if row["kept"])


def slots(captions):
    """What words stand in the same slot of like statements -> {(first word, number of words, place): words}."""
    found = {}
    for caption in captions:
        for text in statements(caption):
            parts = text.casefold().split()
            for place, word in enumerate(parts):
                found.setdefault((parts[0], len(parts), place), set()).add(word)
    return found


def triplets_rule(item):
    """Each statement asked as it is, and with one word (not the first) changed for another that stands there in other
    captions and in none of this one's statements."""
    rng, mine, rows = random.Random(item["caption"]), slots([item["caption"]]), []
    for text in statements(item["caption"]):
        parts = text.split()
        rows.append({"question": question_of(text), "answer": f"Yes, {text}"})
        keys = [(parts[0].casefold(), len(parts), place) for place in range(1, len(parts))]
        others = [(key[2], word) for key in keys for word in sorted(item["slots"].get(key, set()) - mine[key])]
        if others:
            place, word = rng.choice(others)
            miss = " ".join([*parts[:place], word, *parts[place + 1:]])
            rows.append({"question": question_of(miss), "answer": f"No, {text}"})
    if not rows:
        raise Unreadable("the caption says nothing")
    return rows
