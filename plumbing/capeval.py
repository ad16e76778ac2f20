"""CAPEval: how many items of a checklist a caption covers, and how many of these it has right.

The judge sees a caption and no image. It answers each item of the image's checklist with yes, no
(the caption says otherwise) or not_mentioned. As in CAPEval (https://arxiv.org/abs/2608.02589),
over the items that have an answer,

    coverage C = 100 (yes + no) / items             precision P = 100 yes / (yes + no)

verdicts.py asks the judge; captionqa.py has the same functions for another benchmark.
"""
import os
import re

from plumbing.quotes import DATA, has_words_of, numbered, quoted
from plumbing.rules import Unreadable, clean
from plumbing.scoring import ratio

NAME = "CAPEval"
VERSION = 1                 # of verdicts: raise it when a prompt, a reader or a rule changes
# Items in a request, first and for items that got no answer. CAPEval asks about all items of an
# image at once, 50 on average.
AT_ONCE = 50, 10
VERDICTS = "yes", "no", "not_mentioned"
# by the letters with which a file name begins
CATEGORIES = {"SO": "Scene & Object", "PA": "People & Activity", "TI": "Text & Interface",
              "DK": "Design & Knowledge"}


# ---------------------------------------------------------------- the checklist
def items_of(row):
    """A row of checklist.jsonl -> (name of its image, items, what is wrong with the others).

    The lists of a row are named instance_checklist, text_checklist and so on, and their entries
    are {"Question", "Tags"}. An item is {"item": text, "category"}.
    """
    image = row.get("img_path")
    if not isinstance(image, str) or not image:
        return None, [], ['not a JSON object with "img_path"']
    lists = [value or [] for key, value in row.items() if key.endswith("_checklist")]
    if not all(isinstance(part, list) for part in lists):
        return image, [], ["a checklist is not a list"]
    entries = [entry for part in lists for entry in part]
    texts = [clean(entry.get("Question")) if isinstance(entry, dict) else "" for entry in entries]
    items = [{"item": text, "category": category_of(image)} for text in texts if text]
    faults = [] if items else ['no "…_checklist" with a "Question"']
    if items and not all(texts):
        faults = [f'{texts.count("")} entries without a "Question"']
    return image, items, faults


def category_of(image):
    letters = re.match("[A-Z]*", os.path.basename(image))[0]
    return CATEGORIES.get(letters, "other")


def asked(item):
    """What the judge sees of an item."""
    return item["item"]


def submission(captions, items):
    """{name in the checklist: caption} as the file that CAPEval's own code reads."""
    return [{"image_id": os.path.basename(image), "caption": captions[image]}
            for image in sorted(captions)]


# ---------------------------------------------------------------- the judge
PROMPT = """\
You are given the caption of an image that you cannot see, and a numbered list of items, most of \
them questions about\nwhat the caption says. Judge each item by the caption alone, not by what is \
likely:
"yes": the caption says so, in whatever words. For an item that denies something: the caption \
agrees that it is not so.
"no": the caption speaks of the same thing and says otherwise.
"not_mentioned": the caption does not speak of it, or too vaguely to decide.
Judge every item. Answer with JSON alone, an answer for each number:
{"1": "yes", "2": "not_mentioned", "3": "no"}
"""


def prompt(question):
    """The prompt about {"caption", "items"}."""
    return (f"{PROMPT}{DATA}Caption:\n{quoted(question['caption'])}\n"
            f"Items:\n{numbered(map(asked, question['items']))}")


def read(value, question):
    """-> a verdict for each item. Unreadable if one is missing; its `partial` has None for it."""
    n_items = len(question["items"])
    verdicts = [None] * n_items
    for number, answer in numbered_answers(value, n_items):
        if 1 <= number <= n_items:
            verdicts[number - 1] = verdict_of(answer)
    if not any(verdicts):
        raise Unreadable(f"want an answer for each number, one of {', '.join(VERDICTS)}")
    if None in verdicts:
        raise Unreadable(f"item {verdicts.index(None) + 1} has no answer among "
                         f"{', '.join(VERDICTS)}", verdicts)
    return verdicts


def numbered_answers(value, n_items):
    """[(number, answer)] of a judge's JSON, which may be inside another object.

    It is an object by number, a list of entries with a number and an answer, or a list of as many
    answers as there are items.
    """
    if isinstance(value, dict):
        by_number = [(int(key), answer) for key, answer in value.items() if is_number(key)]
        inner = (part for part in value.values() if isinstance(part, list | dict))
        return by_number or numbered_answers(next(inner, None), n_items)
    if not isinstance(value, list):
        return []
    if len(value) == n_items and all(isinstance(answer, str) for answer in value):
        return list(enumerate(value, 1))
    return [pair for entry in value if (pair := entry_pair(entry))]


def entry_pair(entry):
    """(number, answer) of {"item": 3, "answer": "yes"}, whatever the names of its fields, or of
    [3, "yes"]; None where there is no such pair."""
    fields = list(entry.values()) if isinstance(entry, dict) else entry
    if not isinstance(fields, list):
        return None
    number = next((int(field) for field in fields if is_number(field)), None)
    return None if number is None else (number, fields)


def is_number(value):
    """Whether a value is a whole number, as a number or as text."""
    if isinstance(value, str):
        return re.fullmatch("[0-9]{1,6}", value.strip()) is not None
    return isinstance(value, int) and not isinstance(value, bool)


def verdict_of(answer):
    """"yes", "no" or "not_mentioned", whatever the spelling, also as a field among others.

    None for anything else: "No dog is mentioned" may be either of two.
    """
    if isinstance(answer, dict | list):
        fields = answer.values() if isinstance(answer, dict) else answer
        texts = (field for field in fields if isinstance(field, str))
        return next((verdict for field in texts if (verdict := verdict_of(field))), None)
    spelled = re.sub(r"[\s_-]+", "_", answer.casefold()) if isinstance(answer, str) else ""
    verdict = re.fullmatch(r"\W*(not_mentioned|yes|no)\W*", spelled)
    return verdict[1] if verdict else None


def rule(question):
    """The shorthand tool's verdicts: yes where the caption has all words of an item."""
    return ["yes" if has_words_of(question["caption"], asked(item)) else "not_mentioned"
            for item in question["items"]]


# ---------------------------------------------------------------- figures
def count(item, verdict):
    """The counts of one item with a verdict."""
    return {"items": 1, verdict: 1}


def formulas(n):
    """The figures from a Counter of sums, which are numbers, or arrays over resamples."""
    spoken_of = n["yes"] + n["no"]
    return {"C": 100 * ratio(spoken_of, n["items"]), "P": 100 * ratio(n["yes"], spoken_of)}
