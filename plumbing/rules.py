"""The shorthand tool: rules in place of a tool LLM, for captions of comma-separated statements.

The first word of a statement names its subject ("top-left red circle", "background gray"). Rules
cost nothing and always give the same answer, so the toy world and the tests use them.
"""
import random
import re

MOST_QUESTIONS = 120        # about one image [the source: 30 to 120]


class Unreadable(ValueError):
    """No answer can be read from a text. `partial` holds as much of it as could be read, if any."""

    def __init__(self, reason, partial=None):
        super().__init__(reason)
        self.partial = partial


# ---------------------------------------------------------------- statements
def clean(text):
    """A text on one line, "?" for characters that UTF-8 cannot hold; "" for anything but text."""
    if not isinstance(text, str):
        return ""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def statements(caption):
    """The statements of a shorthand caption, in order, without repetition."""
    spellings = {}
    for part in caption.split(","):
        text = clean(part).strip(" .")
        spellings.setdefault(text.casefold(), text)
    return [text for text in spellings.values() if text]


def question_of(statement):
    """The question with which the shorthand tool checks a statement."""
    return f"Does the image show {statement}?"


def drop_lone_groups(rows):
    """Rows with "group" None where no other row is in the same group: nothing contradicts them."""
    groups = [row["group"] for row in rows]
    return [{**row, "group": row["group"] if groups.count(row["group"]) > 1 else None}
            for row in rows]


def fewer(rows):
    """At most MOST_QUESTIONS rows, those with the most votes, in their order."""
    ranked = sorted(range(len(rows)), key=lambda k: (-rows[k]["votes"], k))
    return [rows[k] for k in sorted(ranked[:MOST_QUESTIONS])]


# ---------------------------------------------------------------- rewrite
# A verb must follow "the picture" and the like: "the picture on the wall" is not filler.
FILLER = re.compile(r"""(?ix)^(?:
    (?:overall|also|additionally|finally|and|but|then|however)(?:\s+|$)
    |(?:in|on)\s+(?:the|this|an?)\s+(?:image|picture|photo|photograph|scene|view)(?:\s+|$)
    |(?:the|this|an?)\s+(?:image|picture|photo|photograph|scene|view)\s+
      (?:(?:is\s+)?of|shows?|depicts?|features?|captures?|presents?|displays?|contains?|portrays?)\s+
    |there\s+(?:is|are|seems?\s+to\s+be|appears?\s+to\s+be)\s+
    |(?:we|you|one)\s+(?:can\s+)?sees?\s+
    |it\s+(?:appears|seems)\s+(?:that|to\s+be)\s+
    |(?:an?|the)\s+)""")


def rewrite_rule(caption):
    """Sentences and clauses as statements, without their filler and articles."""
    clauses = []
    for clause in re.split(r"[,;!?\n]+|[.:](?=\s|$)", caption):
        clause = clause.strip()
        while FILLER.match(clause):
            clause = FILLER.sub("", clause)
        clauses.append(clause)
    shorthand = statements(", ".join(clauses))
    if not shorthand:
        raise Unreadable("the caption holds no statement")
    return ", ".join(shorthand)


# ---------------------------------------------------------------- combine
# The order in which a caption describes places; other subjects follow in alphabetical order.
PLACES = ("background", "top-left", "top", "top-right", "left", "right", "bottom-left", "bottom",
          "bottom-right", "center", "centre", "foreground")

# The last word of a statement about a second thing at a place: "top-left blue star behind".
RELATIONS = {"behind", "beside", "front"}

# Of these there is one: "largest top-left" and "largest top-right" contradict each other.
SUPERLATIVES = {"largest", "smallest"}

NUMBERS = {"none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
           "eleven", "twelve"}

# A place after one of these belongs to the statement: "left hand on the right knee".
LINKS = {"the", "a", "an", "its", "his", "her", "of", "on", "in", "at", "to", "from", "by", "near",
         "with", "and"}


def split_at_places(statement):
    """Yield the parts of a statement in which a comma was forgotten.

    In a statement that begins with a place, every further place begins another statement ("top-left
    red circle top-right stripes"), unless a linking word precedes it. A place alone states nothing.
    """
    words = statement.split()
    folded = [word.casefold() for word in words]
    starts = [0]
    if folded[0] in PLACES:
        starts += [k for k in range(1, len(words))
                   if folded[k] in PLACES and folded[k - 1] not in LINKS]
    for start, end in zip(starts, [*starts[1:], len(words)]):
        is_lone_place = end - start == 1 and folded[start] in PLACES
        if not is_lone_place:
            yield " ".join(words[start:end])


def combine_rule(captions):
    """Every statement of the captions once, in a fixed order, with the number of captions it is in.

    A place has one object of each kind: statements about one place with equally many words
    contradict each other, so they share a group ("top-left red circle" and "top-left red ring", but
    not "top-left stripes"). So do different numbers of one thing ("circles two", "circles three").
    Half a statement ("top-left red") is dropped if a whole one is there.
    """
    rows = {}
    for caption in captions:
        parts = [part for statement in statements(caption) for part in split_at_places(statement)]
        for key, text in {part.casefold(): part for part in parts}.items():
            row = rows.setdefault(key, combined_row(text))
            row["votes"] += 1
    all_words = [key.split() for key in rows]
    whole = [row for key, row in rows.items() if not is_half(key.split(), all_words)]
    return drop_lone_groups(sorted(whole, key=reading_order))


def combined_row(text):
    """A row for a statement that no caption has voted for yet."""
    about = text.split()[0]
    return {"text": text, "about": about, "group": group_of(text.casefold().split()), "votes": 0}


def group_of(words):
    """The group of a statement, in lower case, or None: statements in one contradict each other."""
    if words[0] in PLACES:
        return f"{words[0]} {len(words)}"
    is_exclusive = words[-1] in NUMBERS or words[0] in SUPERLATIVES
    return " ".join(words[:-1]) if is_exclusive and len(words) > 1 else None


def is_half(words, all_words):
    """Whether a statement about the same thing has all of these words and more."""
    return any(words[0] == others[0] and set(words) < set(others)
               and (words[-1] in RELATIONS) == (others[-1] in RELATIONS) for others in all_words)


def reading_order(row):
    """A sort key: by place, then by subject, a second thing last, longer statements first."""
    about, words = row["about"].casefold(), row["text"].casefold().split()
    place = PLACES.index(about) if about in PLACES else len(PLACES)
    return place, about, words[-1] in RELATIONS, -len(words), " ".join(words)


# ---------------------------------------------------------------- decompose and correct
def decompose_rule(rows):
    """A question for every statement, each of which is a single fact already."""
    facts = [{"text": row["text"], "question": question_of(row["text"]), "about": row["about"],
              "group": row["group"], "votes": row["votes"]} for row in fewer(rows)]
    return drop_lone_groups(facts)


def correct_rule(item):
    """The kept statements, in their order."""
    return ", ".join(row["text"] for row in item["statements"] if row["kept"])


# ---------------------------------------------------------------- triplets
def slots(captions):
    """The words that occur in each slot of similar statements.

    Returns {(first word, number of words, position): set of words}, all in lower case.
    """
    words_in = {}
    for caption in captions:
        for text in statements(caption):
            words = text.casefold().split()
            for position, word in enumerate(words):
                words_in.setdefault((words[0], len(words), position), set()).add(word)
    return words_in


def triplets_rule(item):
    """A question with the answer yes for each statement, and one with the answer no.

    The latter changes one word, never the first, for a word that other captions have in its slot
    and no statement of this caption has.
    """
    rng = random.Random(item["caption"])
    own_slots = slots([item["caption"]])
    rows = []
    for text in statements(item["caption"]):
        rows.append({"question": question_of(text), "answer": f"Yes, {text}"})
        miss = near_miss(text, item["slots"], own_slots, rng)
        if miss:
            rows.append({"question": question_of(miss), "answer": f"No, {text}"})
    if not rows:
        raise Unreadable("the caption holds no statement")
    return rows


def near_miss(text, known_slots, own_slots, rng):
    """A statement with one word changed as in triplets_rule; None if no word can be."""
    words = text.split()
    changes = []
    for position in range(1, len(words)):
        slot = words[0].casefold(), len(words), position
        others = known_slots.get(slot, set()) - own_slots[slot]
        changes += [(position, word) for word in sorted(others)]
    if not changes:
        return None
    position, word = rng.choice(changes)
    return " ".join([*words[:position], word, *words[position + 1:]])
