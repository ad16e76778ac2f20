"""CaptionQA: how many multiple-choice questions about an image its caption answers.

The judge sees a caption and no image. It chooses one of the answers, or says that the caption holds
none. As in CaptionQA (https://arxiv.org/abs/2511.21025), over the questions that it dealt with,

    accuracy = 100 right / questions                cannot = 100 "cannot answer" / questions
    score    = 100 / questions · (right + Σ of 1 / choices + 0.05 over those it cannot answer)

where yes/no questions have no "cannot answer". Choices are shown in an order of their own, which
depends on the question alone. verdicts.py asks the judge; capeval.py has the same functions.
"""
import os
import random
import re
import string

from plumbing.answers import field
from plumbing.quotes import DATA, has_words_of, quoted, words
from plumbing.rules import Unreadable, clean
from plumbing.scoring import normal, ratio

NAME = "CaptionQA"
VERSION = 1                 # of verdicts: raise it when a prompt, a reader or a rule changes
# Questions in a request. One would give away another: "What color is the dog?", "Is there a dog?"
AT_ONCE = 1,
CANNOT = "Cannot answer from the caption"
LETTERS = string.ascii_uppercase


# ---------------------------------------------------------------- rows of questions
def items_of(row):
    """A row of questions -> (name of its image, items, what is wrong with the others).

    A row is {"image", "question", "choices", "answer", "category"}, or has a list "questions" of
    such objects; "image_paths" [name] counts as the image. An item is {"question", "choices",
    "answer": the right choice, "category", "id"}.
    """
    image = image_of(row)
    if image is None:
        return None, [], ["not a JSON object with an image"]
    items, faults = [], []
    questions = row.get("questions", [row])
    for entry in questions if isinstance(questions, list) and questions else [None]:
        fault = fault_of(entry)
        if fault:
            faults.append(fault)
        else:
            items.append(item_of(entry, row, image))
    return image, items, faults


def image_of(row):
    """The name of a row's image, or None."""
    paths = row.get("image_paths")
    first = paths[0] if isinstance(paths, list) and paths else None
    names = row.get("image"), row.get("file_name"), first
    return next((name for name in names if isinstance(name, str) and name), None)


def fault_of(entry):
    """What is wrong with a question, or None."""
    if not isinstance(entry, dict) or not clean(entry.get("question")):
        return "no question"
    choices = entry.get("choices")
    texts = list(map(text_of, choices)) if isinstance(choices, list) else []
    if not all(texts) or len({normal(text) for text in texts}) < max(len(texts), 2):
        return "choices is not a list of two or more different texts"
    if len(texts) >= len(LETTERS):
        return f"{len(texts)} choices are more than there are letters for"
    if right_choice(entry.get("answer"), texts) is None:
        return f"the answer {entry.get('answer')!r:.60} is not one of the choices"
    return None


def text_of(choice):
    """A choice as text; numbers are choices too."""
    choice = choice.get("text") if isinstance(choice, dict) else choice
    is_number = isinstance(choice, int | float) and not isinstance(choice, bool)
    return clean(str(choice) if is_number else choice)


def right_choice(answer, choices):
    """The choice that an answer names by its text, its letter, or its index from 0; or None."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return choices[answer] if 0 <= answer < len(choices) else None
    return named_choice(answer, choices, by_letter=False) or named_choice(answer, choices)


def named_choice(answer, choices, by_letter=True):
    """The choice that a text names, by its letter ("B", "(b)", "B. red") or by its own text; or
    None."""
    answer = clean(answer)
    letter = re.match(r"\W*([A-Za-z])(?:\W*$|[.):])", answer)
    if by_letter and letter and LETTERS.index(letter[1].upper()) < len(choices):
        return choices[LETTERS.index(letter[1].upper())]
    return next((choice for choice in choices if normal(choice) == normal(answer)), None)


def item_of(entry, row, image):
    """A question of a row as an item; a category "Attribute - Color" counts as "Attribute"."""
    choices = list(map(text_of, entry["choices"]))
    category = entry.get("category", row.get("category"))
    if isinstance(category, list):
        category = category[0] if category else None
    name = row.get("id") if isinstance(row.get("id"), str) else os.path.basename(image)
    return {"question": clean(entry["question"]), "choices": choices,
            "answer": right_choice(entry["answer"], choices),
            "category": clean(category).split(" - ")[0] or "other", "id": name}


def asked(item):
    """What the judge sees of an item."""
    return [item["question"], item["choices"]]


def submission(captions, items):
    """{image: caption} as the file that CaptionQA's own code reads, by the ids of its rows."""
    return {items[image][0]["id"]: captions[image] for image in sorted(captions)}


# ---------------------------------------------------------------- the judge
PROMPT = """\
You are given the caption of an image that you cannot see, and a question about the image. Choose \
the option that follows\nfrom the caption. Answer with JSON alone, the letter of one option:
{"answer": "A"}
"""


def options(item):
    """The choices as the judge sees them: with CANNOT where it is offered, in shuffled order.

    The order depends on the question alone, so a second run asks the same.
    """
    offered = item["choices"] if is_yes_or_no(item) else [*item["choices"], CANNOT]
    return random.Random(item["question"]).sample(offered, len(offered))


def is_yes_or_no(item):
    return {"yes", "no"} <= {normal(choice).split(" ")[0].rstrip(",") for choice in item["choices"]}


def prompt(question):
    """The prompt about {"caption", "items": [item]}."""
    [item] = question["items"]
    lines = (f"{letter}. {quoted(text)}" for letter, text in zip(LETTERS, options(item)))
    return (f"{PROMPT}{DATA}Caption:\n{quoted(question['caption'])}\n"
            f"Question:\n{quoted(item['question'])}\nOptions:\n" + "\n".join(lines))


def read(value, question):
    """-> [the chosen option]. Unreadable if none is named."""
    [item] = question["items"]
    fields = list(value.values()) if isinstance(value, dict) else value
    answer = fields[0] if len(fields) == 1 else field(value, "answer")
    choice = named_choice(answer, options(item))
    if choice is None:
        raise Unreadable('want an object with "answer", the letter of one of the options')
    return [choice]


def rule(question):
    """The shorthand tool's answer: the only choice whose words are all in the caption; or yes where
    the caption has all words of a yes/no question, else no."""
    [item] = question["items"]
    caption = question["caption"]
    if is_yes_or_no(item):
        answer = "yes" if has_words_of(caption, item["question"]) else "no"
        return [next(choice for choice in item["choices"] if normal(choice).startswith(answer))]
    fitting = [choice for choice in item["choices"] if words(choice) <= words(caption)]
    return fitting if len(fitting) == 1 else [CANNOT]


# ---------------------------------------------------------------- figures
def count(item, verdict):
    """The counts of one question that was answered with a choice, or with CANNOT."""
    cannot, right = verdict == CANNOT, verdict == item["answer"]
    points = 1 / len(item["choices"]) + 0.05 if cannot else right
    return {"items": 1, "right": right, "cannot": cannot, "points": points}


def formulas(n):
    """The figures from a Counter of sums, which are numbers, or arrays over resamples."""
    return {"accuracy": 100 * ratio(n["right"], n["items"]),
            "cannot": 100 * ratio(n["cannot"], n["items"]),
            "score": 100 * ratio(n["points"], n["items"])}
