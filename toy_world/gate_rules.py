"""Rules for what a golden caption keeps, compared on stored pools of statements, without new runs.

A pool is a list of images, {"facts": their number, "statements": [...]}. A statement has "p_yes",
"votes", "group" (of those that exclude each other, or None), "true", and "fact", whether it is one
of the facts, as true statements are that need not be made.
"""
import json
import math
import statistics
from collections import Counter

from generate import best_of_groups, has_its_share
from plumbing import files, scoring
from toy_world.experiments import corrected, share_of_true

STRICT = .8                             # a fixed threshold
KNOWN = ("p_yes", "votes", "group")     # what a rule may look at
ENDS = {False: "", True: ", group share"}       # of the names of rules; see generate.has_its_share
GATED = ("F1", "F.5", str(STRICT), "aim", "corrected", "odds + votes", "posterior")
NAMES = ("union", "vote of 1", "vote of 2", "vote of 3",
         *(rule + end for end in ENDS.values() for rule in GATED))


# ---------------------------------------------------------------- pools
def write_pool(path, rows, truth):
    """The statements of golden rows, with the truth about them, as JSONL."""
    images = scoring.read_truth(truth)
    lines = []
    for row in rows:
        known = images[row["image"]]
        statements = []
        for statement in row.get("statements", []):
            text = scoring.normal(statement["text"])
            statements.append({**{key: statement[key] for key in KNOWN},
                               "true": known.is_true(text), "fact": text in known.facts})
        lines.append(json.dumps({"facts": len(known.facts), "statements": statements}) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as temporary:
        temporary.write_text("".join(lines), "utf-8")


def read_pool(path):
    return list(map(json.loads, path.read_text("utf-8").splitlines()))


def statements_of(pool):
    return [statement for image in pool for statement in image["statements"]]


def scores(pool, kept):
    """Precision, recall and F1 of the kept statements, 0 where none is kept; kept: for each image a
    list of booleans."""
    n = Counter(facts=sum(image["facts"] for image in pool))
    for image, is_kept in zip(pool, kept):
        for statement, keep in zip(image["statements"], is_kept):
            if keep:
                stated = statement["fact"]
                n.update(statements=1, true=statement["true"], stated=stated,
                         extra=statement["true"] and not stated)
    figures = files.without_nan({name: float(value) for name, value in scoring.metrics(n).items()})
    return {name: figures[name] or 0.0 for name in ("precision", "recall", "f1")}


# ---------------------------------------------------------------- of a group at most one
def kept_above(pool, values, least, share=False):
    """What a rule keeps of a pool: the best of each group among those with a value of at least
    `least`. values: one number for each statement of the pool. share: see has_its_share."""
    values, kept = iter(values), []
    for image in pool:
        statements = image["statements"]
        own = [next(values) for _ in statements]
        passing = [value >= least for value in own]
        if share:
            passing = [a and b for a, b in zip(passing, has_its_share(statements))]
        kept.append(best_of_groups(statements, own, passing))
    return kept


# ---------------------------------------------------------------- thresholds that fit a pool
def log_odds(p):
    p = min(max(p, 1e-4), 1 - 1e-4)     # golden.py rounds to four places
    return math.log(p / (1 - p))


def aim(pool):
    """The mean P(yes) of the statements that at least half of the samples make, which is what the
    captioner's greedy captions consist of: their precision, as far as the model itself knows it."""
    samples = max(statement["votes"] for statement in statements_of(pool))
    usual = [s["p_yes"] for s in statements_of(pool) if s["votes"] >= samples / 2]
    return statistics.fmean(usual)


def threshold_that_reaches(pool, precision, share):
    """The lowest threshold on P(yes) at which the mean P(yes) of what is kept is `precision`."""
    p_yes = [s["p_yes"] for s in statements_of(pool)]
    for least in (k / 100 for k in range(100)):
        kept = kept_above(pool, p_yes, least, share)
        values = [s["p_yes"] for image, is_kept in zip(pool, kept)
                  for s, keep in zip(image["statements"], is_kept) if keep]
        if not values or statistics.fmean(values) >= precision:
            break
    return least


def posteriors(pool, steps=100):
    """P(true | P(yes), votes) of each statement, from the pool alone.

    P(yes), calibrated on questions of which half are true, is evidence with the odds p / (1 - p);
    the number of votes v is evidence with the odds P(v | true) / P(v | false). If both are
    independent given the truth,

        odds(true) = s / (1 - s) · p / (1 - p) · P(v | true) / P(v | false)

    where s, the share of true statements, and both distributions of votes are the fixed point of
    EM, which starts from P(yes) alone: Dawid & Skene 1979, https://doi.org/10.2307/2346806, with
    the first of two observers known.
    """
    statements = statements_of(pool)
    evidence = [log_odds(s["p_yes"]) for s in statements]
    votes = [s["votes"] for s in statements]
    levels = range(1, max(votes) + 1)
    true = [1 / (1 + math.exp(-e)) for e in evidence]
    for _ in range(steps):
        of_true, of_false = Counter(), Counter()
        for v, t in zip(votes, true):
            of_true[v] += t
            of_false[v] += 1 - t
        # one case more of each, so that no level is impossible
        n_true, n_false = sum(of_true.values()) + len(levels), sum(of_false.values()) + len(levels)
        prior = math.log(n_true / n_false)
        by_votes = {v: math.log((of_true[v] + 1) / n_true) - math.log((of_false[v] + 1) / n_false)
                    for v in levels}
        true = [1 / (1 + math.exp(-(prior + e + by_votes[v]))) for e, v in zip(evidence, votes)]
    return true


# ---------------------------------------------------------------- the rules
def by_all_rules(pool, calibrated):
    """Yield (rule, figures of the golden captions that it makes of a pool).

    calibrated: {"F1", "F.5": the threshold that has the best one on the QA adapter's questions}.
    """
    statements = statements_of(pool)
    p_yes, votes = ([s[key] for s in statements] for key in ("p_yes", "votes"))
    yield "union", scores(pool, [[True] * len(image["statements"]) for image in pool])
    for n in (1, 2, 3):
        yield f"vote of {n}", scores(pool, kept_above(pool, votes, n))
    odds = [log_odds(s["p_yes"]) for s in statements]
    combined = [o + v - 2 for o, v in zip(odds, votes)]
    likely = posteriors(pool)
    for share, end in ENDS.items():
        thresholds = {
            **calibrated, str(STRICT): STRICT,
            "aim": threshold_that_reaches(pool, aim(pool), share),
            "corrected": corrected(calibrated["F1"], share_of_true(p_yes))}
        for rule, least in thresholds.items():
            figures = scores(pool, kept_above(pool, p_yes, least, share))
            yield f"{rule}{end}", {**figures, "threshold": least}
        yield f"odds + votes{end}", scores(pool, kept_above(pool, combined, 0, share))
        yield f"posterior{end}", scores(pool, kept_above(pool, likely, .5, share))


def separation(pool, threshold):
    """How well P(yes) and votes separate a model's own statements: the share of true ones, of them
    the share that reaches the threshold, of false ones the share that does not, and AUROC."""
    statements = statements_of(pool)
    true = [s["true"] for s in statements]
    accepted = [s["p_yes"] >= threshold for s in statements]
    n_true, n_false = sum(true), len(true) - sum(true)
    return files.without_nan({
        "share of true": n_true / len(true),
        "true accepted": sum(a and t for a, t in zip(accepted, true)) / max(n_true, 1),
        "false refused": sum(not a and not t for a, t in zip(accepted, true)) / max(n_false, 1),
        "auroc": scoring.auroc([s["p_yes"] for s in statements], true),
        "votes auroc": scoring.auroc([s["votes"] for s in statements], true)})
