"""How captions are scored against known truth. evaluate.py reads the files and prints the figures.

A row of truth: {"image", "facts": [{"text", "about", "kind", "detail", "rare"}],
"planted": [{"text", "about", "group"}], "also_true": [text]}. A complete caption states all facts.
`about` is a fact's subject, with which its text begins, `kind` is its category, `detail` marks
small ones, and `rare` those of which training data hold few. `planted` are false statements to
which a known correlation in the training data tempts a model. `also_true` are true statements that
need not be made. Only "image", "facts" and their "text" are required.

A caption's statements are its parts between commas, each counted once per caption. With sums over
all captions of all images, S: statements, T: true ones, F: facts, R: facts that are stated, and
E: true statements that are no facts ("also_true"), as in DCScore of DeCapBench
(https://arxiv.org/abs/2503.07906):

    precision         T / S
    recall            (R + E) / (F + E)
    f1                2 precision recall / (precision + recall)
    detail_precision  the true share of statements that claim a detail: those whose text is a detail
                      or planted on some image, or all facts of whose subject are details
    detail_recall     the stated share of facts that are details
    rare_precision    where some facts are rare, the true share of statements that claim a rare one:
                      those whose text is rare, or in which there is a word that on all images
                      only rare facts have
    rare_recall       and the stated share of facts that are rare; common_precision and
                      common_recall are those of all others
    planted           of the subjects with planted statements ("about", or else the text without its
                      last word) the share about which one of these was made
    eos               of the captions with a "finish" the share that ended with the end token
    repeat            the share of captions that looped, or make a statement twice
    statements        statements per caption, repeated ones included
    length            tokens per caption where rows have "tokens", else as "statements"

0 / 0 is NaN. Intervals are 95 % bootstrap percentile intervals, with images as the unit that is
drawn (B. Efron, 1979, https://doi.org/10.1214/aos/1176344552).
"""
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from plumbing.errors import InputError


# ---------------------------------------------------------------- statements, and what is known
def normal(text):
    """A text in the form in which texts are compared: lower case, single spaces, no final stop."""
    return " ".join(text.casefold().split()).rstrip(". ")


def statements(caption):
    """A caption's statements, in order, with repetitions."""
    return [text for part in caption.split(",") if (text := normal(part))]


@dataclass
class Vocabulary:
    """What the truth about all images says of a statement that may be false on this one."""
    kinds: dict = field(default_factory=dict)       # text of a fact -> its kind
    details: set = field(default_factory=set)       # texts that claim a detail
    abouts: dict = field(default_factory=dict)      # about -> whether all its facts are details
    forms: dict = field(default_factory=dict)       # (about, number of words) -> kind
    rare: set = field(default_factory=set)          # texts of rare facts, and their words
    common: set = field(default_factory=set)        # words of the other facts

    def add_fact(self, text, about, kind, detail, rare):
        self.kinds.setdefault(text, kind)
        words = text.split(" ")
        if rare:
            self.rare.update([text, *words])
        else:
            self.common.update(words)
        if detail:
            self.details.add(text)
        if about:
            form = about, len(text.split(" "))
            self.abouts[about] = self.abouts.get(about, True) and detail
            self.forms[form] = kind if self.forms.get(form, kind) == kind else "other"

    def is_rare(self, text):
        """Whether a statement claims a rare fact."""
        words = text.split(" ")
        return text in self.rare or any(
            word in self.rare and word not in self.common for word in words)

    def classify(self, text):
        """(kind, whether it claims a detail) of a statement that is not a fact of its image."""
        words = text.split(" ")
        beginnings = (" ".join(words[:k]) for k in range(len(words) - 1, 0, -1))
        about = next((text for text in beginnings if text in self.abouts), None)    # the longest
        kind = self.kinds.get(text) or self.forms.get((about, len(words)), "other")
        return kind, text in self.details or self.abouts.get(about, False)


@dataclass
class Known:
    """The truth about one image, all texts normal."""
    facts: dict             # text -> (kind, whether it is a detail)
    also: set               # other true texts
    rare: set               # texts of rare facts
    things: dict            # about -> (group, set of planted texts)
    vocabulary: Vocabulary  # shared by all images

    def is_true(self, text):
        return text in self.facts or text in self.also


def read_truth(truth):
    """Truth rows -> {image: Known}."""
    vocabulary = Vocabulary()
    return {row["image"]: known_of(row, vocabulary) for row in truth}


def known_of(row, vocabulary):
    """A truth row -> Known; its texts are added to the vocabulary."""
    facts, rare, things = {}, set(), {}
    for fact in row["facts"]:
        text, about = normal(fact["text"]), normal(fact.get("about") or "")
        kind, detail = fact.get("kind") or "other", bool(fact.get("detail"))
        facts[text] = kind, detail
        if fact.get("rare"):
            rare.add(text)
        vocabulary.add_fact(text, about, kind, detail, bool(fact.get("rare")))
    for planted in row.get("planted") or []:
        text = normal(planted["text"])
        about = normal(planted.get("about") or text.rsplit(" ", 1)[0])
        things.setdefault(about, (planted.get("group"), set()))[1].add(text)
        vocabulary.details.add(text)
    also = {normal(text) for text in row.get("also_true") or []}
    return Known(facts, also, rare, things, vocabulary)


# ---------------------------------------------------------------- counting
def is_number(value):
    return isinstance(value, (int, float)) and abs(value) < 1e15


def count_caption(row, known):
    """The counts behind the metrics of one caption row, given the Known of its image.

    A Counter; counts of one kind or group have the key (name, kind).
    """
    stated = statements(row["caption"])
    unique = set(stated)
    repeats = len(unique) < len(stated) or row.get("finish") == "repeat"
    n = Counter(captions=1, with_repeats=len(stated), repeat=repeats)
    if isinstance(row.get("finish"), str):
        n.update(finished=1, eos=row["finish"] == "eos")
    if is_number(row.get("tokens")):
        n.update(with_tokens=1, tokens=row["tokens"])
    for text in unique:
        n.update(count_statement(text, known))
    for text, (kind, detail) in known.facts.items():
        is_stated = text in unique
        n.update({"facts": 1, "stated": is_stated, ("facts", kind): 1, ("stated", kind): is_stated})
        n.update(details=detail, details_stated=detail and is_stated)
    for text in known.rare:
        n.update(rares=1, rares_stated=text in unique)
    for group, planted in known.things.values():
        invented = not unique.isdisjoint(planted)
        n.update({"things": 1, "invented": invented,
                  ("things", group): 1, ("invented", group): invented})
    return n


def count_statement(text, known):
    """The counts of one statement about an image."""
    kind, claims_detail = known.vocabulary.classify(text)
    is_fact, is_true = text in known.facts, known.is_true(text)
    if is_fact:
        kind = known.facts[text][0]         # on another image the text may be of another kind
    counts = {"statements": 1, "true": is_true, "extra": is_true and not is_fact,
              ("statements", kind): 1, ("true", kind): is_true,
              "detail_statements": claims_detail, "detail_true": claims_detail and is_true}
    if known.vocabulary.is_rare(text):
        counts |= {"rare_statements": 1, "rare_true": is_true}
    return counts


def tally(captions, images, count):
    """Sum the counts of caption rows over each image; images {image: what count needs of it}.

    Returns {image: sum of count(row, images[image])}, and the numbers of rows and images: those
    that count, error rows, captions of unknown images, and images without captions.
    """
    captioned = [row for row in captions if row.get("caption") is not None]
    matched = [row for row in captioned if row["image"] in images]
    counts = {}
    for row in matched:
        counts.setdefault(row["image"], Counter()).update(count(row, images[row["image"]]))
    return counts, {"captions": len(matched), "images": len(counts),
                    "errors": len(captions) - len(captioned),
                    "unknown": len(captioned) - len(matched),
                    "missing": len(images) - len(counts)}


# ---------------------------------------------------------------- metrics and their intervals
def ratio(over, under):
    """over / under of numbers or arrays; NaN for 0 / 0."""
    with np.errstate(invalid="ignore"):
        return np.divide(over, under)


def metrics(n):
    """The metrics from a Counter of sums, which are numbers, or arrays over resamples."""
    precision = ratio(n["true"], n["statements"])
    recall = ratio(n["stated"] + n["extra"], n["facts"] + n["extra"])
    both = precision + recall
    per_caption = ratio(n["with_repeats"], n["captions"])
    has_tokens = "with_tokens" in n
    rare = rare_metrics(n) if "rares" in n else {}
    return {"precision": precision, "recall": recall,
            "f1": np.where(both == 0, 0, ratio(2 * precision * recall, both)),
            "detail_precision": ratio(n["detail_true"], n["detail_statements"]),
            "detail_recall": ratio(n["details_stated"], n["details"]), **rare,
            "planted": ratio(n["invented"], n["things"]), "eos": ratio(n["eos"], n["finished"]),
            "repeat": ratio(n["repeat"], n["captions"]), "statements": per_caption,
            "length": ratio(n["tokens"], n["with_tokens"]) if has_tokens else per_caption}


def rare_metrics(n):
    """Precision and recall of rare facts and of all others, as `metrics`."""
    return {"rare_precision": ratio(n["rare_true"], n["rare_statements"]),
            "rare_recall": ratio(n["rares_stated"], n["rares"]),
            "common_precision": ratio(n["true"] - n["rare_true"],
                                      n["statements"] - n["rare_statements"]),
            "common_recall": ratio(n["stated"] - n["rares_stated"], n["facts"] - n["rares"])}


def interval(values):
    """The middle 95 % of a metric's values on resamples, [low, high], NaN left out."""
    values = np.atleast_1d(values)
    values = values[~np.isnan(values)]
    if not len(values):
        return [math.nan, math.nan]
    return np.percentile(values, [2.5, 97.5]).tolist()


def pooled(counts, formulas, bootstrap, seed):
    """Counts of images {image: Counter} -> (their sum, figures of formulas(sum)).

    The figures are {name: float}; with `bootstrap` resamples also "intervals" {name: [low, high]}.
    A resample draws as many images as there are, with replacement, each with all of its captions.
    """
    keys = list(dict.fromkeys(key for n in counts.values() for key in n))
    matrix = np.array([[n[key] for key in keys] for n in counts.values()], dtype=float)
    matrix = matrix.reshape(len(counts), len(keys))                             # (images, keys)
    total = counter(keys, matrix.sum(0))
    figures = {name: float(value) for name, value in formulas(total).items()}
    if bootstrap:
        n_images, rng = len(matrix), np.random.default_rng(seed)
        draws = (rng.integers(max(n_images, 1), size=n_images) for _ in range(bootstrap))
        sums = [np.bincount(draw, minlength=n_images) @ matrix for draw in draws]
        resamples = formulas(counter(keys, np.stack(sums)))
        figures["intervals"] = {name: interval(values) for name, values in resamples.items()}
    return total, figures


def counter(keys, sums):
    """A Counter, in which a missing key is 0, of sums (K,) or, over resamples, (R, K)."""
    return Counter(dict(zip(keys, sums.T)))


def score(captions, truth, bootstrap=0, seed=0):
    """All figures of caption rows against truth rows, matched by "image".

    Returns the metrics that the top of this file defines; the numbers of captions, images, error
    rows ("errors"), captions of unknown images and images without captions ("missing");
    "categories" {kind: {precision, recall, n}}, n being the number of statements;
    "planted_groups" {group: share}; and, with `bootstrap` resamples, "intervals"
    {name: [low, high]}. Shares are between 0 and 1, or NaN.
    """
    counts, numbers = tally(captions, read_truth(truth), count_caption)
    n, figures = pooled(counts, metrics, bootstrap, seed)
    parts = [key for key in n if isinstance(key, tuple)]
    kinds = sorted({kind for name, kind in parts if name in ("statements", "facts")})
    groups = sorted({group for name, group in parts if name == "things" and group is not None})
    categories = {kind: {"precision": float(ratio(n["true", kind], n["statements", kind])),
                         "recall": float(ratio(n["stated", kind], n["facts", kind])),
                         "n": int(n["statements", kind])} for kind in kinds}
    shares = {group: float(ratio(n["invented", group], n["things", group])) for group in groups}
    return {**figures, **numbers, "categories": categories, "planted_groups": shares}


def difference(captions_a, captions_b, truth, name, bootstrap=1000, seed=0):
    """b - a of the metric `name`, and its 95 % interval -> (difference, low, high).

    Counts the images of which both sides have captions; a resample draws the same images for both
    (a paired bootstrap). Raises InputError if there are no such images, or if lengths are in tokens
    on one side only.
    """
    known = read_truth(truth)
    a, b = (tally(captions, known, count_caption)[0] for captions in (captions_a, captions_b))
    both = {image: paired(a[image], b[image]) for image in a if image in b}
    if not both:
        raise InputError("no image has captions on both sides")
    with_tokens = {side for n in both.values() for side, key in n if key == "with_tokens"}
    if name == "length" and len(with_tokens) == 1:
        raise InputError('only one side has its length in tokens; compare "statements"')
    _, figures = pooled(both, partial(gain, name), bootstrap, seed)
    low, high = figures.get("intervals", {}).get(name, (math.nan, math.nan))
    return figures[name], low, high


def paired(a, b):
    """The counts of two sides in one Counter, with the keys ("a", key) and ("b", key)."""
    return Counter({(side, key): value for side, n in (("a", a), ("b", b))
                    for key, value in n.items()})


def gain(name, n):
    """b - a of a metric, from paired counts."""
    of_a, of_b = (metrics(Counter({key: n[s, key] for s, key in n if s == side})) for side in "ab")
    return {name: of_b[name] - of_a[name]}


# ---------------------------------------------------------------- golden files
def auroc(values, true):
    """The area under the ROC curve of (n,) values that should separate true from false.

    It is the probability that a random true one has a larger value than a random false one, ties
    counting half: 1 is perfect, 0.5 chance; NaN if either kind is missing. Computed from ranks
    (Mann-Whitney): with R the sum of the ranks of the n true ones, the lowest rank being 1, and m
    the number of false ones, (R - n (n + 1) / 2) / (n m).
    """
    values, true = np.asarray(values, dtype=float), np.asarray(true, dtype=bool)
    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (times.cumsum() - (times - 1) / 2)[place]           # equal values share their mean rank
    n, m = int(true.sum()), int((~true).sum())
    return float(ratio(ranks[true].sum() - n * (n + 1) / 2, n * m))


def gate(rows, truth):
    """How well the gate of golden rows separated true statements from false ones.

    Over all statements with a P(yes), "n" of them: "base_rate", the true share; "precision", the
    true share of those kept; "recall", the kept share of the true ones; "auroc" of P(yes), and
    "votes_auroc" of the votes, the number of samples that make the statement.
    """
    images = read_truth(truth)
    asked = [(statement, images[row["image"]]) for row in rows if row["image"] in images
             for statement in row.get("statements") or [] if is_number(statement.get("p_yes"))]
    true = np.array([known.is_true(normal(s["text"])) for s, known in asked], dtype=bool)
    kept = np.array([bool(s.get("kept")) for s, _ in asked], dtype=bool)
    p_yes = np.array([s["p_yes"] for s, _ in asked])
    votes = np.array([s["votes"] if is_number(s.get("votes")) else math.nan for s, _ in asked])
    voted = ~np.isnan(votes)
    n_right = (true & kept).sum()
    return {"n": len(asked), "base_rate": float(ratio(true.sum(), len(true))),
            "precision": float(ratio(n_right, kept.sum())),
            "recall": float(ratio(n_right, true.sum())),
            "auroc": auroc(p_yes, true), "votes_auroc": auroc(votes[voted], true[voted])}


def score_golden(rows, truth, bootstrap=0, seed=0):
    """Golden rows -> {"sample", "combined", "golden": their scores, "gate": as gate() returns it}.

    The golden captions are those of all images that did not fail. One of which too little was kept
    counts as empty, and one that cannot be learned from counts as it is; "left_out" is the number
    of rows that are not in golden.jsonl.
    """
    samples, combined, golden = [], [], []
    for row in rows:
        image, chosen = row["image"], row.get("chosen")
        samples += [{**sample, "image": image} for sample in row.get("samples") or []]
        if row.get("combined") is not None:
            combined.append({"image": image, "caption": row["combined"]})
        if chosen is not None or "left_out" in row:
            golden.append({"image": image, "caption": chosen or "", "finish": "eos"})
    scores = {name: score(captions, truth, bootstrap, seed) for name, captions in
              (("sample", samples), ("combined", combined), ("golden", golden))}
    in_golden = sum(row.get("chosen") is not None and "left_out" not in row for row in rows)
    scores["golden"]["left_out"] = len(rows) - in_golden
    return {**scores, "gate": gate(rows, truth)}


def habits(captions):
    """Mean length of caption rows, share with an end token, and share that repeats a statement."""
    if not captions:
        return {}
    n = len(captions)
    statements = [[s for s in map(str.strip, row["caption"].split(",")) if s] for row in captions]
    return {"length": sum(row["tokens"] for row in captions) / n,
            "eos": sum(row["finish"] == "eos" for row in captions) / n,
            "repeat": sum(len(set(parts)) < len(parts) for parts in statements) / n}
