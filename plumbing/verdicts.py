"""A judge that sees captions and no images: what it is asked, its verdicts, and their figures.

A benchmark is a module, capeval.py or captionqa.py, that has: NAME, VERSION, AT_ONCE, and the
functions items_of, asked, submission, prompt, read, rule, count and formulas.
"""
import hashlib
import json
import math
from collections import Counter
from functools import partial
from pathlib import Path

from tqdm import tqdm

from plumbing import data
from plumbing.chat import ToolError
from plumbing.errors import explained
from plumbing.rules import clean
from plumbing.scoring import pooled, tally


# ---------------------------------------------------------------- the file of verdicts
class Verdicts:
    """A judge's verdicts on captions, in a JSONL file that only grows.

    A row is {"key", "judge", "image", "asked", "verdict"}, and the key is a hash of the judge, the
    version of the benchmark's prompts, the caption, and the item. So nothing is asked twice, and a
    killed run loses no more than the request that it waited for.
    """

    def __init__(self, path, judge, benchmark):
        self.path, self.judge, self.benchmark = Path(path), judge, benchmark
        with explained(path):       # now, not after the first reply
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        rows = [row for _, row in data.read_jsonl(path)]
        # a line that a kill tore is no JSON object, and its item is asked again
        self.known = {row["key"]: row["verdict"] for row in rows if is_verdict(row)}

    def key(self, caption, item):
        content = [self.judge, self.benchmark.NAME, self.benchmark.VERSION, clean(caption),
                   self.benchmark.asked(item)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def get(self, caption, item):
        """The verdict on an item, or None."""
        return self.known.get(self.key(caption, item))

    def add(self, question, verdicts):
        """Append the verdicts on a question's items, in a single write; None is no verdict."""
        lines = []
        for item, verdict in zip(question["items"], verdicts):
            key = self.key(question["caption"], item)
            if verdict is not None and key not in self.known:
                self.known[key] = verdict
                row = {"key": key, "judge": self.judge, "image": question["image"],
                       "asked": self.benchmark.asked(item), "verdict": verdict}
                lines.append(json.dumps(row) + "\n")
        if not lines:
            return
        with explained(self.path), self.path.open("a+b") as file:
            file.seek(max(file.seek(0, 2) - 1, 0))
            is_torn = file.read(1) not in (b"", b"\n")
            file.write(("\n" * is_torn + "".join(lines)).encode())


def is_verdict(row):
    return row is not None and all(isinstance(row.get(key), str) for key in ("key", "verdict"))


# ---------------------------------------------------------------- asking
def ask_judge(tool, operation, rows, items, verdicts):
    """Ask for every verdict that is not known yet; those that cannot be had remain unknown.

    rows: captions, of images that items {image: [item]} has. Returns the ToolErrors. What the tool
    cannot answer in its three readings is asked once more, in smaller requests.
    """
    errors = []
    for at_once in verdicts.benchmark.AT_ONCE:
        questions = unanswered(rows, items, verdicts, at_once)
        errors = []
        answers = tool.run(operation, questions)
        for k, answer in tqdm(answers, total=len(questions), unit="request", disable=not questions):
            if isinstance(answer, ToolError):
                errors.append(answer)
            else:
                verdicts.add(questions[k], answer)
    return errors


def unanswered(rows, items, verdicts, at_once=1):
    """Questions {"image", "caption", "items"} of at most `at_once` items that have no verdict."""
    questions = {}
    for row in rows:
        waiting = {verdicts.key(row["caption"], item): item for item in items[row["image"]]
                   if verdicts.get(row["caption"], item) is None}
        n_requests = max(math.ceil(len(waiting) / at_once), 1)
        size = max(math.ceil(len(waiting) / n_requests), 1)      # 51 items are 26 + 25, not 50 + 1
        for part in data.batched(list(waiting), size):
            # by its items, since several rows may have one caption
            questions[tuple(part)] = {"image": row["image"], "caption": row["caption"],
                                      "items": [waiting[key] for key in part]}
    return list(questions.values())


# ---------------------------------------------------------------- figures
def count_verdicts(row, items, verdicts):
    """A Counter of what the verdicts on a caption's items count, by (name, category or "all")."""
    n = Counter()
    for item in items:
        verdict = verdicts.get(row["caption"], item)
        counts = {"unreadable": 1} if verdict is None else verdicts.benchmark.count(item, verdict)
        for category in ("all", item["category"]):
            n.update({(name, category): value for name, value in counts.items()})
    return n


def judged_figures(rows, items, verdicts, bootstrap=0, seed=0):
    """All figures of caption rows by a judge's verdicts.

    Returns the numbers of captions, images, error rows, unknown and missing images, as in
    scoring.score, and "figures" {category, "all" first: the benchmark's formulas, the numbers of
    images, items with a verdict ("items") and without ("unreadable"), and "intervals"}.
    """
    counts, numbers = tally(rows, items, partial(count_verdicts, verdicts=verdicts))
    categories = sorted({category for n in counts.values() for _, category in n} - {"all"})
    figures = {}
    for category in ["all", *categories]:
        of_category = {image: part for image, n in counts.items() if (part := part_of(n, category))}
        total, of_sums = pooled(of_category, verdicts.benchmark.formulas, bootstrap, seed)
        figures[category] = {**of_sums, "images": len(of_category), "items": int(total["items"]),
                             "unreadable": int(total["unreadable"])}
    return {**numbers, "figures": figures}


def part_of(n, category):
    """The counts of one category."""
    return Counter({name: value for (name, part), value in n.items() if part == category})


# ---------------------------------------------------------------- the table
def table(figures):
    """The lines of a table of a judge's figures: a line for each category, figures in per cent."""
    rows = figures["figures"]
    n_images = figures["images"] + figures["missing"]
    cells = [["", *(name for name in rows["all"] if name != "intervals")]]
    cells += [[category, *(cell(row, name) for name in cells[0][1:])]
              for category, row in rows.items()]
    widths = [max(map(len, column)) + 2 for column in zip(*cells)]
    lines = ["".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    note = " (rules that look for words, no language model)" * (figures["judge"] == "shorthand")
    return [f"{figures['benchmark']}, judged by {figures['judge']}{note}",
            f"captions of {figures['images']} of {n_images} images: {figures['captions']}; error "
            f"rows: {figures['errors']}; captions of other images: {figures['unknown']}", *lines]


def cell(row, name):
    """A count, or a figure with its interval if it has one."""
    if isinstance(row[name], int):
        return str(row[name])
    numbers = [row[name], *row.get("intervals", {}).get(name, ())]
    value, *interval = ("-" if math.isnan(number) else f"{number:.1f}" for number in numbers)
    return f"{value} [{', '.join(interval)}]" if interval else value
