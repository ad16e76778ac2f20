"""Captions against known truth: what they tell rightly, what they leave out, what they invent.

READS   captions (JSONL of {"image", "caption", "finish", "tokens"} or {"image", "error"}, several rows an image if need
        be) or a golden file; the truth about the images, or COCO's annotations and a file of synonyms
WRITES  a table to stdout; with --json, all figures to a file

    python evaluate.py captions.jsonl truth.jsonl
    python evaluate.py golden.jsonl truth.jsonl --json out/golden.json      # samples, combined, golden, and the gate
    python evaluate.py captions.jsonl --coco instances.json --synonyms synonyms.txt

What a row of truth is, and how each figure is counted, stands in scoring.py. Of COCO's objects:
 - chair_i, chair_s: what is not there of the categories named, and captions that name such; coverage: annotated
   categories that are named. A category counts once a caption, and annotations alone are the truth: published figures
   count mentions, and know more objects from reference captions. "baby bird" is no baby if the synonyms say so
"""
import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

from plumbing import data, train
from plumbing.errors import InputError
from plumbing.scoring import normal, pooled, ratio, score, score_golden, tally


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("captions", help="JSONL of captions, or a golden file")
    p.add_argument("truth", nargs="?", help="JSONL of the truth about the images")
    p.add_argument("--coco", help="COCO instances JSON, in place of a truth file")
    p.add_argument("--synonyms", help="with --coco: a category per line, `name: word, word` or `name, word, word`")
    p.add_argument("--json", metavar="OUT", help="file to write all figures to")
    p.add_argument("--bootstrap", type=int, default=1000, help="resamples for the intervals (default: 1000; 0: none)")
    p.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    args = p.parse_args(argv)
    if bool(args.truth) == bool(args.coco) or bool(args.coco) != bool(args.synonyms):
        p.error("give a truth file, or --coco with --synonyms")
    if args.bootstrap < 0 or args.seed < 0:
        p.error("--bootstrap and --seed must not be negative")
    return args


# ---------------------------------------------------------------- CHAIR
def pieces(text):
    """Words in lower case, and signs, which keep words from being one phrase; a hyphen does not."""
    return re.findall(r"\w+|[^\w\s-]", text.casefold())


def mentioned(caption, phrases, longest):
    """The categories that a caption names; the longest phrase counts: a "hot dog" is no dog. longest: words of any."""
    words, found, i = pieces(caption), set(), 0
    while i < len(words):
        starts = (" ".join(words[i:i + n]) for n in range(longest, 0, -1))
        phrase = next((start for start in starts if start in phrases), None)
        if phrase:
            found.add(phrases[phrase])
        i += len(phrase.split(" ")) if phrase else 1
    return found


def chair(captions, objects, synonyms, bootstrap=0, seed=0):
    """CHAIR-i, CHAIR-s and coverage of caption rows; objects {image: set of categories}, synonyms {phrase: category}.

    A phrase also stands for its simple plurals (-s, -es, -ies), unless they are phrases themselves.
    """
    phrases = {" ".join(pieces(phrase)): name for phrase, name in synonyms.items()}
    phrases = {form: name for phrase, name in phrases.items()
               for form in (f"{phrase}s", f"{phrase}es", re.sub("y$", "ies", phrase))} | phrases
    longest = max((len(phrase.split(" ")) for phrase in phrases), default=1)

    def count(row, there):
        said = mentioned(row["caption"], phrases, longest)
        return Counter(captions=1, said=len(said), invented=len(said - there), inventing=not said <= there,
                       told=len(said & there), there=len(there))

    def formulas(n):
        return {"chair_i": ratio(n["invented"], n["said"]), "chair_s": ratio(n["inventing"], n["captions"]),
                "coverage": ratio(n["told"], n["there"])}
    counts, rows = tally(captions, objects, count)
    return {**pooled(counts, formulas, bootstrap, seed)[1], **rows}


def read_coco(path):
    """A COCO instances file -> {file name: set of categories}, and the set of all categories."""
    stored = Path(path).read_bytes()
    try:
        stored = json.loads(stored)
        names = {category["id"]: normal(category["name"]) for category in stored["categories"]}
        objects = {image["id"]: set() for image in stored["images"]}
        for annotation in stored["annotations"]:
            if annotation["image_id"] in objects:
                objects[annotation["image_id"]].add(names[annotation["category_id"]])
        objects = {str(image["file_name"]): objects[image["id"]] for image in stored["images"]}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: is not COCO's JSON of images, annotations and categories ({error!r:.80})") from None
    return objects, set(names.values())


def read_synonyms(path, categories):
    """A file of synonyms -> {phrase: category}, with the categories themselves; the last line with a phrase counts."""
    synonyms = {name: name for name in categories}
    for number, line in enumerate(Path(path).read_text("utf-8", "replace").splitlines(), 1):
        name, *words = map(normal, line.replace(":", ",", 1).split(","))
        if line.strip() and name not in categories:
            raise InputError(f"{path}:{number}: {name!r} is none of the categories; a line is `category: word, word`")
        synonyms |= {word: name for word in words if word}
    return synonyms


# ---------------------------------------------------------------- files
def is_golden(row):
    return any(key in row for key in ("samples", "chosen", "left_out"))


def is_list(items, *keys):
    """Whether something is a list of objects with a text under the first of the keys, and text or nothing elsewhere."""
    return isinstance(items, list) and all(
        isinstance(item, dict) and isinstance(item.get(keys[0]), str)
        and all(isinstance(item.get(key), str | None) for key in keys) for item in items)


def result_fault(row):
    """What is wrong with a row of captions or of a golden file, or None."""
    if is_golden(row):
        whole = is_list(row.get("samples") or [], "caption") and is_list(row.get("statements") or [], "text")
        whole = whole and all(isinstance(row.get(key), str | None) for key in ("combined", "chosen"))
        return None if whole else "samples, combined, chosen or statements are not those of a golden file"
    return None if isinstance(row.get("caption"), str) or "error" in row else "neither caption nor error"


def truth_fault(row):
    """What is wrong with a row of truth, or None."""
    facts, planted, also = (row.get(key) or [] for key in ("facts", "planted", "also_true"))
    if not is_list(facts, "text", "about", "kind") or not facts:
        return 'no facts, a list of {"text", "about", "kind", "detail"}'
    if not is_list(planted, "text", "about", "group") or not isinstance(also, list):
        return 'planted is no list of {"text", "about", "group"}, or also_true is none of texts'
    texts = [*(item["text"] for item in facts + planted), *also]
    return next((f"{text!r} is not a statement: a text without a comma" for text in texts
                 if not isinstance(text, str) or "," in text), None)


def read(path, fault):
    """The rows of a JSONL file in which fault(row) finds nothing; the others are told on stderr."""
    rows, bad = [], []
    for where, row in data.read_jsonl(path):
        row = row or {}
        for ours, imagefolder in (("image", "file_name"), ("caption", "text")):
            if imagefolder in row:
                row.setdefault(ours, row[imagefolder])
        reason = fault(row) if isinstance(row.get("image"), str) else "no JSON object with an image"
        if reason:
            bad.append((where, reason))
        else:
            rows.append(row)
    rows, bad = data.need_rows(path, rows, bad)
    data.tell_bad("evaluate.py", bad)
    return rows


def match(rows, path, names, truth):
    """Rows of the file `path`, their images called as the file `truth` calls them (names), or None where it does not.

    Names are relative to their file or, those of rows, to the current folder. Where no path is the same, a file name
    that each side has once is.
    """
    def place(name, beside=""):
        path = os.path.join(os.path.dirname(beside), name)
        try:
            return os.path.realpath(path)
        except ValueError:          # no file has such a name
            return path
    known, images = {place(name, truth): name for name in names}, sorted({row["image"] for row in rows})
    found = {image: known[at] for image in images for at in (place(image), place(image, path)) if at in known}
    by_path = len(found)
    ours, theirs = (Counter(map(os.path.basename, side)) for side in (images, names))
    bases = {os.path.basename(name): name for name in names}
    for image in images:
        base = os.path.basename(image)
        if image not in found and ours[base] == theirs[base] == 1:
            found[image] = bases[base]
    if not found:
        raise InputError(f"{path}: none of its {len(images)} images is in {truth}; compared were paths, such as "
                         f"{place(images[0], path)!r} with {min(known, default=None)!r}, and file names that each side "
                         "has once")
    if by_path < len(images):
        print(f"evaluate.py: {path}: of {len(images)} images, {truth} has {by_path} by their path, another "
              f"{len(found) - by_path} by file name alone; {len(images) - len(found)} are unknown", file=sys.stderr)
    return [{**row, "image": found.get(row["image"])} for row in rows]


# ---------------------------------------------------------------- main
def judge(args):
    """The figures that the arguments ask for: of captions, of a golden file, or against COCO's annotations."""
    rows = read(args.captions, result_fault)
    golden = any(map(is_golden, rows))
    if args.coco:
        if golden:
            raise InputError(f"{args.captions}: is a golden file; --coco wants captions")
        objects, categories = read_coco(args.coco)
        synonyms = read_synonyms(args.synonyms, categories)
        rows = match(rows, args.captions, list(objects), args.coco)
        return chair(rows, objects, synonyms, args.bootstrap, args.seed)
    truth = read(args.truth, truth_fault)
    names = [row["image"] for row in truth]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise InputError(f"{args.truth}: has {twice[0]!r} twice; keep one row of an image")
    rows = match(rows, args.captions, names, args.truth)
    return (score_golden if golden else score)(rows, truth, args.bootstrap, args.seed)


def cells(figures, before=""):
    """Figures, some in dicts of their own -> (label, text) of each, with its interval if it has one."""
    def number(value):
        return str(value) if isinstance(value, int) else "-" if math.isnan(value) else f"{value:.3f}"
    for name, value in figures.items():
        if isinstance(value, dict) and name != "intervals":
            yield from cells(value, f"{before}{name} ")
        elif name != "intervals":
            ends = figures.get("intervals", {}).get(name)
            yield before + name, number(value) + (f"  [{', '.join(map(number, ends))}]" if ends else "")


def show(columns):
    """Print {title: figures} as a table."""
    table = [{"": title, **dict(cells(figures))} for title, figures in columns.items()]
    labels = dict.fromkeys(label for column in table for label in column)
    width = max(map(len, labels)) + 2
    for label in labels:
        print(f"{label:{width}}" + "".join(f"{column.get(label, '-'):26}" for column in table).rstrip())


def main(argv=None):
    args = parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):      # the name of a file or kind need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        found = judge(args)
        if "gate" in found:
            show({name: found[name] for name in ("sample", "combined", "golden")})
            print("gate: " + ", ".join(f"{name} {text}" for name, text in cells(found["gate"])))
        else:
            show({args.captions: found})
        if args.json:
            text = json.dumps(train.without_nan({**found, "arguments": vars(args)}), indent=1)
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            train.write_whole(args.json, lambda path: path.write_text(text + "\n"))
    except InputError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"evaluate.py: {error.filename or 'stdout'}: cannot be used ({error.strerror})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
