"""CAPEval: how much of a checked list a caption covers, and how much of that it has right.

READS   captions, rows {"image", "caption"}; CAPEval's checklist.jsonl, matched by file name
WRITES  a table to stdout; --json: the figures and every answer; --submission: the captions in the
        form that CAPEval's own code reads

    python -m runs.capeval captions.jsonl data/capeval/checklist.jsonl \
                           --tool hf:Qwen/Qwen2.5-7B-Instruct --json capeval.json

The tool LLM, which sees a caption and no image, answers each item with yes, no (the caption says
otherwise) or not_mentioned. As in CAPEval (https://arxiv.org/abs/2608.02589), over all items of the
images that have a caption,

    coverage C = 100 (yes + no) / items             precision P = 100 yes / (yes + no)

Published figures come from Qwen2.5-72B-Instruct and a prompt of their own. Ours compare captioners
with one another, by one judge; for figures to set beside the published ones, give the submission to
CAPEval's code. The shorthand tool only looks whether the words of an item are in the caption.
"""
import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import torch

import tool_llm
from plumbing import data, files
from plumbing.answers import entries, field
from plumbing.errors import InputError
from plumbing.rules import Unreadable
from plumbing.weights import usable_device

AT_ONCE = 25                # items in one prompt
ANSWERS = ("yes", "no", "not_mentioned")
CATEGORIES = {"SO": "Scene & Object", "PA": "People & Activity", "TI": "Text & Interface",
              "DK": "Design & Knowledge"}      # by the letters with which a file name begins
# words of an item that are about the caption, not about the image
ABOUT_CAPTIONS = tool_llm.words("""does do is are was were the a an any there it its that which as
    caption text description according mention mentioned describe described state stated include
    specify indicate refer note of to in on at with by and or one""")


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("captions", type=Path, help="JSONL of captions of CAPEval's images")
    p.add_argument("checklist", type=Path, help="CAPEval's checklist.jsonl")
    p.add_argument("--json", type=Path, help="file to write all figures and answers to")
    p.add_argument("--submission", type=Path, help="file to write the captions to, for CAPEval's "
                   "own code")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu or cuda, for hf:")
    tool_llm.add_flags(p)
    args = p.parse_args(argv)
    tool_llm.check_flags(p, args)
    return args


# ---------------------------------------------------------------- files
def read_captions(path):
    """{file name of an image: caption}; error rows are left out."""
    rows = [row for _, row in data.read_jsonl(path) if row]
    captions = {Path(row["image"]).name: row["caption"] for row in rows
                if isinstance(row.get("image"), str) and isinstance(row.get("caption"), str)}
    if not captions:
        raise InputError(f"{path}: no row with image and caption")
    return captions


def read_checklist(path):
    """{file name of an image: its items}. A row's lists are named instance_checklist,
    text_checklist …, and an entry is {"Question", "Tags"}."""
    items = {}
    for where, row in data.read_jsonl(path):
        if row is None or not isinstance(row.get("img_path"), str):
            raise InputError(f"{where}: is not a row of CAPEval's checklist, with img_path")
        lists = [row[key] or [] for key in sorted(row) if key.endswith("_checklist")]
        items[Path(row["img_path"]).name] = [entry["Question"] for part in lists for entry in part]
    return items


# ---------------------------------------------------------------- the judge
PROMPT = """\
Judge a caption of an image that you cannot see, item by item, by what the caption says and nothing
else. Answer "yes" if the caption says so, in whatever words; "no" if it speaks of the thing and
says otherwise; "not_mentioned" if it does not speak of it. Answer every item, by its number, with
JSON alone:
{"answers": [{"item": 1, "answer": "yes"}, {"item": 2, "answer": "not_mentioned"}]}
"""


def judge_prompt(question):
    return (f"{PROMPT}{tool_llm.DATA}Caption:\n{tool_llm.quoted(question['caption'])}\n"
            f"Items:\n{tool_llm.numbered(question['items'])}")


def read_judge(value, question):
    """-> an answer for each item. Unreadable, with those that are there, if one is missing."""
    answers = [None] * len(question["items"])
    for entry in entries(value):
        number = entry.get("item") if isinstance(entry, dict) else None
        answer = field(entry, "answer").casefold().replace(" ", "_")
        if isinstance(number, int) and 1 <= number <= len(answers) and answer in ANSWERS:
            answers[number - 1] = answer
    if None in answers:
        raise Unreadable(f"item {answers.index(None) + 1} has no answer among {', '.join(ANSWERS)}",
                         answers)
    return answers


def judge_rule(question):
    said = tool_llm.words(question["caption"])
    asked = [tool_llm.words(item) - ABOUT_CAPTIONS for item in question["items"]]
    return ["yes" if words and words <= said else "not_mentioned" for words in asked]


JUDGE = tool_llm.Operation("judge", judge_prompt, read_judge, judge_rule)


def judge(tool, captions, checklist):
    """{image: [(item, answer or None)]} for the images with a caption."""
    questions = [{"image": image, "caption": captions[image], "items": items[k:k + AT_ONCE]}
                 for image, items in checklist.items() if image in captions
                 for k in range(0, len(items), AT_ONCE)]
    if not questions:
        raise InputError("no image of the captions is in the checklist")
    answered = {question["image"]: [] for question in questions}
    for k, answers in tool.run(JUDGE, questions):
        items = questions[k]["items"]
        failed = isinstance(answers, tool_llm.ToolError)
        answered[questions[k]["image"]] += zip(items, [None] * len(items) if failed else answers)
    return answered


def figures(answers):
    """A list of answers -> items, unanswered, C and P; an unanswered item counts for nothing."""
    n = Counter(answers)
    items, spoken_of = len(answers) - n[None], n["yes"] + n["no"]
    return {"items": items, "unanswered": n[None],
            "C": 100 * spoken_of / items if items else None,
            "P": 100 * n["yes"] / spoken_of if spoken_of else None}


# ---------------------------------------------------------------- main
def run(args):
    """Judge the captions, print the figures and write the files that were asked for."""
    captions, checklist = read_captions(args.captions), read_checklist(args.checklist)
    if args.submission:
        rows = [{"image_id": image, "caption": captions[image]} for image in sorted(captions)]
        files.write_json(args.submission, rows)
    tool = tool_llm.open_tool(args, usable_device(args.device))
    answered = judge(tool, captions, checklist)

    groups = {"all": [answer for rows in answered.values() for _, answer in rows]}
    for image, rows in answered.items():
        category = CATEGORIES.get(re.match("[A-Z]*", image)[0], "other")
        groups.setdefault(category, []).extend(answer for _, answer in rows)
    table = {name: figures(answers) for name, answers in groups.items()}
    print(f"{len(answered)} of {len(checklist)} images, judge {tool.name}")
    for name, row in table.items():
        c, p = ("-" if row[key] is None else f"{row[key]:.1f}" for key in "CP")
        print(f"{name:20} C {c:>5}  P {p:>5}  items {row['items']}, unanswered {row['unanswered']}")
    if args.json:
        files.write_json(args.json, {"judge": tool.name, "images": len(answered),
                                     "figures": table, "answers": answered})
    return 1 if table["all"]["unanswered"] else 0


def main(argv=None):
    args = parse_args(argv)
    try:
        return run(args)
    except InputError as error:
        print(f"capeval.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
