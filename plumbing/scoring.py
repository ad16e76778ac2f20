"""How captions are counted against known truth: used by evaluate.py, which reads the files.

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
"""
import math
from collections import Counter

import numpy as np

from plumbing.errors import InputError


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

    The golden ones are those of all images that did not fail, also where the caption is nothing (what was left of it
    was too little) or nothing to learn from; "left_out" counts the rows that golden.jsonl does without.
    """
    kept = [row for row in rows if row.get("chosen") is not None and "left_out" not in row]
    captions = {
        "sample": [{**sample, "image": row["image"]} for row in rows for sample in row.get("samples") or []],
        "combined": [{"image": row["image"], "caption": row["combined"]} for row in rows
                     if row.get("combined") is not None],
        "golden": [{"image": row["image"], "caption": row.get("chosen") or "", "finish": "eos"} for row in rows
                   if row.get("chosen") is not None or "left_out" in row]}
    found = {name: score(said, truth, bootstrap, seed) for name, said in captions.items()}
    found["golden"]["left_out"] = len(rows) - len(kept)
    return {**found, "gate": gate(rows, truth)}
