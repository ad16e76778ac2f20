"""Captions against known truth, or a judge: what they get right, leave out and invent.

READS   captions (JSONL of {"image", "caption", "finish", "tokens"} or {"image", "error"}, one or
        more rows per image) or a golden file; the truth about the images, COCO's annotations
        and a file of synonyms, CAPEval's checklist, or CaptionQA's questions
WRITES  a table to stdout; with --json, all figures to a file; the verdicts of a judge

    python evaluate.py captions.jsonl truth.jsonl
    python evaluate.py out/golden/record.jsonl truth.jsonl --json out/golden.json
    python evaluate.py captions.jsonl --coco instances.json --synonyms synonyms.txt
    python evaluate.py captions.jsonl --checklist capeval/checklist.jsonl \
                       --tool hf:Qwen/Qwen2.5-7B-Instruct
    python evaluate.py captions.jsonl --captionqa questions.jsonl \
                       --tool http://localhost:8000/v1 --tool-model NAME

For a golden file the table has a column each for the samples, the combined and the golden captions,
and a line about the gate. plumbing/scoring.py defines a row of truth and every figure but CHAIR
(https://arxiv.org/abs/1809.02156), which this file computes from COCO's object categories:

    chair_i   categories named that are not in the image / categories named
    chair_s   captions that name a category that is not in the image / captions
    coverage  categories in the image that are named / categories in the image

Decided differently from the paper: a category counts once per caption, where published figures
count every mention; and only the annotations say what is in an image, where the paper adds the
objects of reference captions. The longest phrase counts, so that the synonyms can keep a
"baby bird" from counting as a baby.

A checklist and multiple-choice questions are answered by a judge, the tool LLM, which sees a
caption and no image. plumbing/capeval.py and plumbing/captionqa.py define what it is asked, and the
figures. Its verdicts are kept beside the captions, so that the same command asks nothing twice.
"""
import json
import math
import os
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch

import tool_llm
from plumbing import arguments, capeval, captionqa, data, files
from plumbing.arguments import count_or_none
from plumbing.errors import InputError
from plumbing.scoring import normal, pooled, ratio, score, score_golden, tally
from plumbing.verdicts import Verdicts, ask_judge, judged_figures, table, unanswered
from plumbing.weights import usable_device


def parse_args(argv):
    p = arguments.parser(__doc__)
    p.add_argument("captions", help="JSONL of captions, or a golden file")
    p.add_argument("truth", nargs="?", help="JSONL of the truth about the images")
    p.add_argument("--coco", help="COCO instances JSON, in place of a truth file")
    p.add_argument("--synonyms", help="with --coco: a file with one category per line, "
                                      "`name: word, word` or `name, word, word`")
    p.add_argument("--checklist", help="CAPEval's checklist.jsonl, in place of a truth file")
    p.add_argument("--captionqa", help="JSONL of multiple-choice questions, in place of a truth "
                                       "file")
    p.add_argument("--json", metavar="OUT", help="file to write all figures to")
    p.add_argument("--bootstrap", type=count_or_none, default=1000,
                   help="resamples for the intervals; 0: no intervals")
    p.add_argument("--seed", type=count_or_none, default=0, help="of the bootstrap")
    g = p.add_argument_group("judge, which is the tool LLM")
    g.add_argument("--verdicts", type=Path, help="JSONL that its verdicts are appended to; left "
                   "out, CAPTIONS with the ending .verdicts.jsonl")
    g.add_argument("--submission", type=Path, help="file to write the captions to, in the form "
                   "that CAPEval's or CaptionQA's own code reads")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu or cuda, for --tool hf:")
    tool_llm.add_flags(p)
    args = p.parse_args(argv)
    check_args(p, args)
    return args


def check_args(p, args):
    """argparse's one-line error for arguments that do not go together."""
    of_judge = args.checklist or args.captionqa
    sources = args.truth, args.coco, args.checklist, args.captionqa
    if sum(map(bool, sources)) != 1 or bool(args.coco) != bool(args.synonyms):
        p.error("give a truth file, --coco with --synonyms, --checklist, or --captionqa")
    if not of_judge and (args.verdicts or args.submission or args.tool != "shorthand"):
        p.error("--verdicts, --submission and --tool go with --checklist or --captionqa")
    tool_llm.check_flags(p, args)
    args.verdicts = args.verdicts or Path(args.captions).with_suffix(".verdicts.jsonl")
    if of_judge and args.verdicts.resolve() in {Path(args.captions).resolve(),
                                                Path(of_judge).resolve()}:
        p.error(f"--verdicts {args.verdicts} is an input; give another file")


# ---------------------------------------------------------------- CHAIR
def pieces(text):
    """Lower-case words, and signs, which separate phrases; hyphens are ignored."""
    return re.findall(r"\w+|[^\w\s-]", text.casefold())


def with_plurals(synonyms):
    """{phrase: category} with the simple plurals (-s, -es, -ies) that are not phrases already."""
    phrases = {" ".join(pieces(phrase)): category for phrase, category in synonyms.items()}
    plurals = {}
    for phrase, category in phrases.items():
        for plural in (f"{phrase}s", f"{phrase}es", re.sub("y$", "ies", phrase)):
            plurals[plural] = category
    return plurals | phrases


def named_categories(caption, phrases, longest):
    """The categories that a caption names, by {phrase: category} of up to `longest` words.

    At each word the longest phrase counts: a "hot dog" is not a dog.
    """
    words, categories, i = pieces(caption), set(), 0
    while i < len(words):
        candidates = (" ".join(words[i:i + n]) for n in range(longest, 0, -1))
        phrase = next((text for text in candidates if text in phrases), None)
        if phrase is None:
            i += 1
        else:
            categories.add(phrases[phrase])
            i += len(phrase.split(" "))
    return categories


def count_objects(row, present, phrases, longest):
    """The counts behind CHAIR of one caption row, given the set of categories in its image."""
    named = named_categories(row["caption"], phrases, longest)
    return Counter(captions=1, named=len(named), present=len(present),
                   invented=len(named - present), covered=len(named & present),
                   inventing=not named <= present)


def chair_metrics(n):
    """The metrics from a Counter of sums, which are numbers, or arrays over resamples."""
    return {"chair_i": ratio(n["invented"], n["named"]),
            "chair_s": ratio(n["inventing"], n["captions"]),
            "coverage": ratio(n["covered"], n["present"])}


def chair(captions, objects, synonyms, bootstrap=0, seed=0):
    """CHAIR and coverage of caption rows, as the top of this file defines them.

    objects {image: set of categories}, synonyms {phrase: category}. Returns the metrics, the
    numbers of rows and images, and, with `bootstrap` resamples, "intervals" {name: [low, high]}.
    """
    phrases = with_plurals(synonyms)
    longest = max((len(phrase.split(" ")) for phrase in phrases), default=1)
    count = partial(count_objects, phrases=phrases, longest=longest)
    counts, numbers = tally(captions, objects, count)
    _, figures = pooled(counts, chair_metrics, bootstrap, seed)
    return {**figures, **numbers}


def read_coco(path):
    """A COCO instances file -> {file name: set of categories}, and the set of all categories."""
    content = Path(path).read_bytes()
    try:
        coco = json.loads(content)
        names = {category["id"]: normal(category["name"]) for category in coco["categories"]}
        objects = {image["id"]: set() for image in coco["images"]}
        for annotation in coco["annotations"]:
            if annotation["image_id"] in objects:
                objects[annotation["image_id"]].add(names[annotation["category_id"]])
        objects = {str(image["file_name"]): objects[image["id"]] for image in coco["images"]}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: is not COCO's JSON of images, annotations and categories "
                         f"({error!r:.80})") from None
    return objects, set(names.values())


def read_synonyms(path, categories):
    """A file of synonyms -> {phrase: category}, which includes the categories themselves.

    Of several lines with a phrase the last one counts.
    """
    synonyms = {name: name for name in categories}
    lines = Path(path).read_text("utf-8", "replace").splitlines()
    for number, line in enumerate(lines, 1):
        name, *words = map(normal, line.replace(":", ",", 1).split(","))
        if line.strip() and name not in categories:
            raise InputError(f"{path}:{number}: {name!r} is not one of the categories; a line is "
                             "`category: word, word`")
        synonyms |= {word: name for word in words if word}
    return synonyms


# ---------------------------------------------------------------- files
def is_golden(row):
    return any(key in row for key in ("samples", "chosen", "left_out"))


def are_objects(items, required, *optional):
    """Whether items is a list of objects with text under `required`, text or null elsewhere."""
    keys = required, *optional
    return isinstance(items, list) and all(
        isinstance(item, dict) and isinstance(item.get(required), str)
        and all(isinstance(item.get(key), str | None) for key in keys) for item in items)


def caption_fault(row):
    """What is wrong with a row of captions or of a golden file, or None."""
    if not is_golden(row):
        is_valid = isinstance(row.get("caption"), str) or "error" in row
        return None if is_valid else "has neither a caption nor an error"
    is_valid = (are_objects(row.get("samples") or [], "caption")
                and are_objects(row.get("statements") or [], "text")
                and all(isinstance(row.get(key), str | None) for key in ("combined", "chosen")))
    return None if is_valid else ("samples, combined, chosen or statements are not those of a "
                                  "golden file")


def truth_fault(row):
    """What is wrong with a row of truth, or None."""
    facts, planted, also = (row.get(key) or [] for key in ("facts", "planted", "also_true"))
    if not facts or not are_objects(facts, "text", "about", "kind"):
        return 'no facts, a list of {"text", "about", "kind", "detail"}'
    if not are_objects(planted, "text", "about", "group"):
        return 'planted is not a list of {"text", "about", "group"}'
    if not isinstance(also, list):
        return "also_true is not a list of texts"
    for text in [*(item["text"] for item in facts + planted), *also]:
        if not isinstance(text, str) or "," in text:
            return f"{text!r} is not a statement: a text without a comma"
    return None


def read(path, fault):
    """The rows of a JSONL file in which fault(row) finds nothing; the others are reported."""
    rows, bad = [], []
    for where, row in data.read_jsonl(path):
        row = row or {}
        for key, imagefolder_key in (("image", "file_name"), ("caption", "text")):
            if imagefolder_key in row:
                row.setdefault(key, row[imagefolder_key])
        has_image = isinstance(row.get("image"), str)
        reason = fault(row) if has_image else "not a JSON object with an image"
        if reason:
            bad.append((where, reason))
        else:
            rows.append(row)
    rows, bad = data.need_rows(path, rows, bad)
    data.report_bad("evaluate.py", bad)
    return rows


# ---------------------------------------------------------------- images of two files
def resolved(name, file=""):
    """The real path of an image's name relative to a file, or else to the current folder."""
    path = os.path.join(os.path.dirname(file), name)
    try:
        return os.path.realpath(path)
    except ValueError:          # no file can have this name
        return path


def match_paths(images, path, names, truth):
    """{image of the file `path`: name in the file `truth`} for those with the same path."""
    by_path = {resolved(name, truth): name for name in names}
    matched = {}
    for image in images:
        for candidate in (resolved(image, path), resolved(image)):
            if candidate in by_path:
                matched.setdefault(image, by_path[candidate])
    return matched


def match_file_names(images, names):
    """{image: name} for those with the same file name, if it occurs once on each side."""
    n_images, n_names = (Counter(map(os.path.basename, side)) for side in (images, names))
    by_base = {os.path.basename(name): name for name in names}
    bases = {image: os.path.basename(image) for image in images}
    return {image: by_base[base] for image, base in bases.items()
            if n_images[base] == n_names[base] == 1}


def match(rows, path, names, truth):
    """Rows of the file `path` with their images named as in the file `truth` (names), or None.

    Names are relative to their file or, those of rows, to the current folder. An image whose path
    is not in the truth is looked up by its file name.
    """
    images = sorted({row["image"] for row in rows})
    by_path = match_paths(images, path, names, truth)
    matched = match_file_names(images, names) | by_path
    if not matched:
        known = min((resolved(name, truth) for name in names), default=None)
        raise InputError(f"{path}: none of its {len(images)} images is in {truth}; compared were "
                         f"paths, such as {resolved(images[0], path)!r} with {known!r}, and file "
                         "names that occur once on each side")
    if len(by_path) < len(images):
        print(f"evaluate.py: {path}: of {len(images)} images, {truth} has {len(by_path)} by their "
              f"path, another {len(matched) - len(by_path)} by file name alone; "
              f"{len(images) - len(matched)} are unknown", file=sys.stderr)
    return [{**row, "image": matched.get(row["image"])} for row in rows]


# ---------------------------------------------------------------- the judge
def read_items(path, benchmark):
    """{image: [item]} of a benchmark's file; what cannot be used is reported."""
    items, bad = {}, []
    for where, row in data.read_jsonl(path):
        image, usable, reasons = benchmark.items_of(row or {})
        if usable:
            items.setdefault(image, []).extend(usable)
        bad += [(where, reason) for reason in reasons]
    items, bad = data.need_rows(path, items, bad)
    data.report_bad("evaluate.py", bad)
    return items


def write_submission(args, rows, items, benchmark):
    """Write the captions of a benchmark's images in the form that its own code reads."""
    usable = [row for row in rows if row["image"] in items and (row.get("caption") or "").strip()]
    captions = {row["image"]: row["caption"] for row in usable}
    if len(captions) < len(usable):
        raise InputError(f"{args.captions}: has several captions of an image, and a submission "
                         "has one of each; leave out --submission, or keep one caption per image")
    files.write_json(args.submission, benchmark.submission(captions, items))


def judge(args, rows):
    """The figures of captions by the verdicts of the tool LLM on a checklist or on questions."""
    benchmark, path = (capeval, args.checklist) if args.checklist else (captionqa, args.captionqa)
    items = read_items(path, benchmark)
    rows = match(rows, args.captions, list(items), path)
    if args.submission:
        write_submission(args, rows, items, benchmark)
    operation = tool_llm.Operation(benchmark.NAME, benchmark.prompt, benchmark.read, benchmark.rule)
    verdicts = Verdicts(args.verdicts, tool_llm.tool_name(args), benchmark)
    captioned = [row for row in rows if row["image"] and row.get("caption") is not None]
    errors = []
    if any(unanswered(captioned, items, verdicts)):     # otherwise no model need be opened
        tool = tool_llm.open_tool(args, usable_device(args.device))
        errors = ask_judge(tool, operation, captioned, items, verdicts)
    figures = judged_figures(rows, items, verdicts, args.bootstrap, args.seed)
    if unreadable := figures["figures"]["all"]["unreadable"]:
        reason = f" ({errors[-1]})" if errors else ""
        print(f"evaluate.py: items without a verdict: {unreadable}{reason}; the same command asks "
              "for them again", file=sys.stderr)
    return {"benchmark": benchmark.NAME, "judge": verdicts.judge, **figures}


# ---------------------------------------------------------------- main
def scores_of(args):
    """The figures that the arguments ask for."""
    rows = read(args.captions, caption_fault)
    golden = any(map(is_golden, rows))
    if golden and not args.truth:
        flag = "--coco" if args.coco else "--checklist" if args.checklist else "--captionqa"
        raise InputError(f"{args.captions}: is a golden file; {flag} needs captions")
    if args.checklist or args.captionqa:
        return judge(args, rows)
    if args.coco:
        objects, categories = read_coco(args.coco)
        synonyms = read_synonyms(args.synonyms, categories)
        rows = match(rows, args.captions, list(objects), args.coco)
        return chair(rows, objects, synonyms, args.bootstrap, args.seed)
    truth = read(args.truth, truth_fault)
    names = [row["image"] for row in truth]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise InputError(f"{args.truth}: has {twice[0]!r} twice; keep one row per image")
    rows = match(rows, args.captions, names, args.truth)
    scores = score_golden if golden else score
    return scores(rows, truth, args.bootstrap, args.seed)


def number_text(value):
    if isinstance(value, int):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3f}"


def cells(figures, prefix=""):
    """Yield (label, text) of each figure, with its interval if it has one; dicts are flattened."""
    intervals = figures.get("intervals", {})
    for name, value in figures.items():
        if name == "intervals":
            continue
        if isinstance(value, dict):
            yield from cells(value, f"{prefix}{name} ")
            continue
        text = number_text(value)
        if name in intervals:
            text += f"  [{', '.join(map(number_text, intervals[name]))}]"
        yield prefix + name, text


def show(columns):
    """Print {title: figures} as a table."""
    table = [{"": title, **dict(cells(figures))} for title, figures in columns.items()]
    labels = dict.fromkeys(label for column in table for label in column)
    width = max(map(len, labels)) + 2
    for label in labels:
        line = "".join(f"{column.get(label, '-'):26}" for column in table)
        print(f"{label:{width}}" + line.rstrip())


def main(argv=None):
    args = parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):      # names of files and kinds may hold odd bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        figures = scores_of(args)
        if "judge" in figures:
            print("\n".join(table(figures)))
        elif "gate" in figures:
            show({name: figures[name] for name in ("sample", "combined", "golden")})
            print("gate: " + ", ".join(f"{name} {text}" for name, text in cells(figures["gate"])))
        else:
            show({args.captions: figures})
        if args.json:
            files.write_json(args.json, {**figures, "arguments": arguments.as_json(args)})
    except InputError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"evaluate.py: {error.filename or 'stdout'}: cannot be used ({error.strerror})",
              file=sys.stderr)
        return 1
    return 1 if "judge" in figures and figures["figures"]["all"]["unreadable"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
