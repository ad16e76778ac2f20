"""Captions against known truth: what they tell rightly, what they leave out, what they invent.

READS   captions (JSONL of {"image", "caption", "finish", "tokens"} or {"image", "error"}, several rows an image if need
        be) or a golden file; the truth about the images, or COCO's annotations and a file of synonyms
WRITES  a table to stdout; with --json, all figures to a file

    python evaluate.py captions.jsonl truth.jsonl
    python evaluate.py golden.jsonl truth.jsonl --json out/golden.json      # samples, combined, golden, and the gate
    python evaluate.py captions.jsonl --coco instances.json --synonyms synonyms.txt

A row of truth: {"image", "facts": [{"text", "about", "kind", "detail"}], "planted": [{"text", "about", "group"}],
"also_true": [text]}. A full caption tells all facts; `about` is what a text speaks of and begins with, `kind` sorts
facts, `detail` marks small ones. `planted` are false statements to which a known correlation of the training data
tempts; `also_true` need not be told. Only image and facts, and of these the text, must be there.

A caption's statements are its parts between commas. A share is a sum over images ÷ a sum over images; "-" is 0 ÷ 0.
 - precision: true statements ÷ statements, each counted once a caption. recall: (facts told + Q) ÷ (facts + Q), Q being
   the true statements beyond the facts (DCScore, of DeCapBench). f1: their harmonic mean
 - detail_precision: of the statements that claim a detail (text is a detail, or planted, on any image; or all facts of
   its `about` are details), the true ones. detail_recall: details told ÷ details
 - planted: of the things (`about`; where it lacks, the text but its last word) with planted statements, those of which
   one is told. eos: captions that ended by themselves. repeat: those that looped, or say a statement twice
 - length: tokens where rows tell them, else statements, repeats included. Intervals: 95 %, bootstrap over images
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

import numpy as np

import common
import dataset
from loading import InputError


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


# ---------------------------------------------------------------- statements, and what is known of them
def normal(text):
    """A text as it is compared: one space between words, whatever the case, no full stop at its end."""
    return " ".join(text.casefold().split()).rstrip(". ")


def statements(caption):
    """A caption's statements, in order, with repeats."""
    return [text for part in caption.split(",") if (text := normal(part))]


def understand(truth):
    """Truth rows -> {image: what is known of it, a dict}, all texts normal.

    facts {text: (kind, detail)}, also {text}, things {about: (group, planted texts)}; and, the same for all images,
    classify(text) -> (kind, whether it claims a detail) for statements that are no fact of the image.
    """
    images, kinds, details = {}, {}, set()
    abouts, forms = {}, {}      # about -> whether all of its facts are details; (about, number of words) -> kind

    def classify(text):
        words = text.split(" ")
        starts = (" ".join(words[:k]) for k in range(len(words) - 1, 0, -1))
        about = next((start for start in starts if start in abouts), None)          # the longest
        kind = kinds.get(text) or forms.get((about, len(words)), "other")
        return kind, text in details or abouts.get(about, False)
    for row in truth:
        facts, things, also = {}, {}, set(map(normal, row.get("also_true") or []))
        images[row["image"]] = {"facts": facts, "also": also, "things": things, "classify": classify}
        for fact in row["facts"]:
            text, kind, detail = normal(fact["text"]), fact.get("kind") or "other", bool(fact.get("detail"))
            facts[text] = kind, detail
            kinds.setdefault(text, kind)
            if detail:
                details.add(text)
            if fact.get("about"):
                about, words = normal(fact["about"]), len(text.split(" "))
                abouts[about] = abouts.get(about, True) and detail
                forms[about, words] = kind if forms.get((about, words), kind) == kind else "other"
        for lure in row.get("planted") or []:
            text = normal(lure["text"])
            about = normal(lure.get("about") or text.rsplit(" ", 1)[0])
            things.setdefault(about, (lure.get("group"), set()))[1].add(text)
            details.add(text)
    return images


# ---------------------------------------------------------------- counting
def is_number(value):
    return isinstance(value, (int, float)) and abs(value) < 1e15


def count_caption(row, known):
    """What the metrics of one caption are made of, as a Counter; parts of a kind or group stand under (name, kind)."""
    said = statements(row["caption"])
    unique = set(said)
    n = Counter(captions=1, statements=len(said), repeat=len(unique) < len(said) or row.get("finish") == "repeat")
    if isinstance(row.get("finish"), str):
        n.update(finished=1, eos=row["finish"] == "eos")
    if is_number(row.get("tokens")):
        n.update(in_tokens=1, tokens=row["tokens"])
    for text in unique:
        kind, claims_detail = known["classify"](text)
        fact = known["facts"].get(text)
        true = fact is not None or text in known["also"]
        kind = fact[0] if fact else kind            # on another image a text may be of another kind
        n.update({"said": 1, "true": true, "also": true and not fact, ("said", kind): 1, ("true", kind): true})
        n.update(detail_said=claims_detail, detail_true=claims_detail and true)
    for text, (kind, detail) in known["facts"].items():
        told = text in unique
        n.update({"facts": 1, "told": told, ("facts", kind): 1, ("told", kind): told})
        n.update(details=detail, details_told=detail and told)
    for group, lures in known["things"].values():
        invented = not unique.isdisjoint(lures)
        n.update({"things": 1, "invented": invented, ("things", group): 1, ("invented", group): invented})
    return n


def tally(captions, images, count):
    """Caption rows -> {image: sum of count(row, what is known of the image)}, and how many rows there are of a sort."""
    told, counts = [row for row in captions if row.get("caption") is not None], {}
    good = [row for row in told if row["image"] in images]
    for row in good:
        counts.setdefault(row["image"], Counter()).update(count(row, images[row["image"]]))
    return counts, {"captions": len(good), "images": len(counts), "errors": len(captions) - len(told),
                    "unknown": len(told) - len(good), "missing": len(images) - len(counts)}


# ---------------------------------------------------------------- metrics, and how sure they are
def ratio(over, under):
    """over ÷ under, numbers or arrays; nan for 0 ÷ 0."""
    with np.errstate(invalid="ignore"):
        return np.divide(over, under)


def metrics(n):
    """Counts, summed over images (numbers, or arrays over resamples) -> {name: metric}."""
    precision = ratio(n["true"], n["said"])
    recall = ratio(n["told"] + n["also"], n["facts"] + n["also"])
    both = precision + recall
    in_statements = ratio(n["statements"], n["captions"])
    return {"precision": precision, "recall": recall, "f1": np.where(both == 0, 0, ratio(2 * precision * recall, both)),
            "detail_precision": ratio(n["detail_true"], n["detail_said"]),
            "detail_recall": ratio(n["details_told"], n["details"]),
            "planted": ratio(n["invented"], n["things"]), "eos": ratio(n["eos"], n["finished"]),
            "repeat": ratio(n["repeat"], n["captions"]), "statements": in_statements,
            "length": ratio(n["tokens"], n["in_tokens"]) if "in_tokens" in n else in_statements}


def interval(values):
    """The middle 95 % of a metric's resamples, as [low, high]; those without a value are left out."""
    values = np.atleast_1d(values)
    values = values[~np.isnan(values)]
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else [math.nan, math.nan]


def pooled(counts, formulas, bootstrap, seed):
    """{image: Counter} -> their sum, and formulas(sum) as {name: float}, with "intervals" {name: [low, high]}.

    A resample draws as many images as there are, with replacement; all captions of an image go together.
    """
    keys = list(dict.fromkeys(key for n in counts.values() for key in n))
    matrix = np.array([[n[key] for key in keys] for n in counts.values()], dtype=float).reshape(len(counts), len(keys))

    def named(sums):            # (…, K) -> a Counter, in which 0 is what nobody counted
        return Counter(dict(zip(keys, sums.T)))
    total = named(matrix.sum(0))
    found = {name: float(value) for name, value in formulas(total).items()}
    if bootstrap:
        n_images, rng = len(matrix), np.random.default_rng(seed)
        draws = (rng.integers(max(n_images, 1), size=n_images) for _ in range(bootstrap))
        resamples = formulas(named(np.stack([np.bincount(draw, minlength=n_images) @ matrix for draw in draws])))
        found["intervals"] = {name: interval(values) for name, values in resamples.items()}
    return total, found


def score(captions, truth, bootstrap=0, seed=0):
    """All figures of caption rows against truth rows, matched by "image"; the top of this file says what they are.

    Metrics {name: float, nan for 0 ÷ 0}; how many captions and images count, rows with errors, captions of unknown
    images, images without captions ("missing"); "categories" {kind: {precision, recall, n statements}};
    "planted_groups" {group: share}; with `bootstrap` resamples, "intervals" {name: [low, high]}.
    """
    counts, rows = tally(captions, understand(truth), count_caption)
    n, found = pooled(counts, metrics, bootstrap, seed)
    parts = [key for key in n if isinstance(key, tuple)]
    kinds = sorted({kind for name, kind in parts if name in ("said", "facts")})
    groups = sorted({group for name, group in parts if name == "things" and group is not None})
    categories = {kind: {"precision": float(ratio(n["true", kind], n["said", kind])),
                         "recall": float(ratio(n["told", kind], n["facts", kind])), "n": int(n["said", kind])}
                  for kind in kinds}
    shares = {group: float(ratio(n["invented", group], n["things", group])) for group in groups}
    return {**found, **rows, "categories": categories, "planted_groups": shares}


def difference(captions_a, captions_b, truth, name, bootstrap=1000, seed=0):
    """b − a of a metric over the images of which both have captions, and its 95 % interval: (difference, low, high).

    A resample draws the same images for both.
    """
    a, b = (tally(captions, understand(truth), count_caption)[0] for captions in (captions_a, captions_b))
    both = {image: Counter({(side, key): value for side, counts in (("a", a), ("b", b))
                            for key, value in counts[image].items()}) for image in a if image in b}
    if not both:
        raise InputError("no image has captions on both sides")
    if name == "length" and len({side for n in both.values() for side, key in n if key == "in_tokens"}) == 1:
        raise InputError("only one side tells its length in tokens; compare statements")

    def gain(n):
        of_a, of_b = (metrics(Counter({key: n[s, key] for s, key in n if s == side})) for side in "ab")
        return {name: of_b[name] - of_a[name]}
    found = pooled(both, gain, bootstrap, seed)[1]
    return found[name], *found.get("intervals", {name: (math.nan, math.nan)})[name]


# ---------------------------------------------------------------- golden files
def auroc(values, true):
    """How often a true one has a larger value than a false one, ties counting half; nan where either lacks."""
    values, true = np.asarray(values, dtype=float), np.asarray(true, dtype=bool)
    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    rank = (times.cumsum() - (times - 1) / 2)[place]                    # equal values share their mean rank
    n, m = int(true.sum()), int((~true).sum())
    return float(ratio(rank[true].sum() - n * (n + 1) / 2, n * m))


def gate(rows, truth):
    """How well the gate of golden rows told true statements from false ones, over those that have a P(yes)."""
    images = understand(truth)
    asked = [(told, images[row["image"]]) for row in rows if row["image"] in images
             for told in row.get("statements") or [] if is_number(told.get("p_yes"))]
    true = np.array([normal(told["text"]) in {*known["facts"], *known["also"]} for told, known in asked], dtype=bool)
    kept = np.array([bool(told.get("kept")) for told, _ in asked], dtype=bool)
    p_yes, votes = (np.array([told[key] if is_number(told.get(key)) else math.nan for told, _ in asked])
                    for key in ("p_yes", "votes"))
    voted, right = ~np.isnan(votes), (true & kept).sum()
    return {"n": len(asked), "base_rate": float(ratio(true.sum(), len(true))),
            "precision": float(ratio(right, kept.sum())), "recall": float(ratio(right, true.sum())),
            "auroc": auroc(p_yes, true), "votes_auroc": auroc(votes[voted], true[voted])}


def score_golden(rows, truth, bootstrap=0, seed=0):
    """Golden rows -> {"sample", "combined", "golden": their scores, "gate": see there}.

    Rows without a golden caption (left out, or failed) count as the golden ones' "left_out" only.
    """
    kept = [row for row in rows if row.get("chosen") is not None and "left_out" not in row]
    captions = {
        "sample": [{**sample, "image": row["image"]} for row in rows for sample in row.get("samples") or []],
        "combined": [{"image": row["image"], "caption": row["combined"]} for row in rows
                     if row.get("combined") is not None],
        "golden": [{"image": row["image"], "caption": row["chosen"], "finish": "eos"} for row in kept]}
    found = {name: score(said, truth, bootstrap, seed) for name, said in captions.items()}
    found["golden"]["left_out"] = len(rows) - len(kept)
    return {**found, "gate": gate(rows, truth)}


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
    for where, row in dataset.read_jsonl(path):
        row = row or {}
        for ours, imagefolder in (("image", "file_name"), ("caption", "text")):
            if imagefolder in row:
                row.setdefault(ours, row[imagefolder])
        reason = fault(row) if isinstance(row.get("image"), str) else "no JSON object with an image"
        if reason:
            bad.append((where, reason))
        else:
            rows.append(row)
    rows, bad = dataset.need_rows(path, rows, bad)
    dataset.tell_bad("evaluate.py", bad)
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
            text = json.dumps({**found, "arguments": vars(args)})
            text = json.dumps(json.loads(text, parse_constant=lambda nan: None), indent=1)          # JSON has no NaN
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            common.write_whole(args.json, lambda path: path.write_text(text + "\n"))
    except InputError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"evaluate.py: {error.filename or 'stdout'}: cannot be used ({error.strerror})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
