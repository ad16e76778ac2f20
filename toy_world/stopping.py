"""Which round to keep, from figures that need no truth.

A captioner's signs come from two golden folders, of its greedy captions and of its samples, whose
statements its own QA adapter has been asked about.
"""
import statistics

from toy_world.lab import both_f1

CAPTIONERS = ("SFT", "round 1", "round 2", "round 3")


# ---------------------------------------------------------------- signs
def signs_of(greedy, sampled):
    """The signs of a captioner from the rows of the two golden folders.

    "P(yes)": mean of the statements of greedy captions; "share kept": of the statements of all
    samples together; "agreement": the mean share of the samples that make a statement. And per
    image, so that precision and recall can be estimated: the "stated" statements of a greedy
    caption, the sum of their P(yes), "believed", and the same of a "sampled" caption; "kept", the
    statements of a golden caption.
    """
    stated, union = (statements_of(rows) for rows in (greedy, sampled))
    n_samples = max(len(row.get("samples", [])) for row in sampled)
    n_votes = sum(s["votes"] for s in union)
    captions = n_samples * len(sampled)
    return {"P(yes)": statistics.fmean(s["p_yes"] for s in stated),
            "share kept": statistics.fmean(s["kept"] for s in union),
            "agreement": n_votes / len(union) / n_samples,
            "stated": len(stated) / len(greedy),
            "believed": sum(s["p_yes"] for s in stated) / len(greedy),
            "sampled stated": n_votes / captions,
            "sampled believed": sum(s["votes"] * s["p_yes"] for s in union) / captions,
            "kept": sum(s["kept"] for s in union) / len(sampled)}


def statements_of(rows):
    return [statement for row in rows for statement in row.get("statements", [])]


def believed_f1(signs, facts):
    """F1, greedy + sampled, as the QA adapter sees it.

    With T true statements of S, and F facts, F1 = 2 T / (S + F). T: the sum of P(yes); F: `facts`,
    per image.
    """
    return sum(2 * signs[f"{way}believed"] / (signs[f"{way}stated"] + facts)
               for way in ("", "sampled "))


# ---------------------------------------------------------------- rules
def by_believed_f1(signs, losses):
    """F is taken for the mean number of statements of all rounds' golden captions."""
    facts = statistics.fmean(of["kept"] for of in signs.values())
    return {name: believed_f1(of, facts) for name, of in signs.items()}


def by_sign(key):
    def rule(signs, losses):
        return {name: of[key] for name, of in signs.items()}
    return rule


def by_loss(signs, losses):
    """The lowest loss on held-out golden captions; SFT has none."""
    return {name: -loss for name, loss in losses.items()}


def always(captioner):
    def rule(signs, losses):
        return {captioner: 0}
    return rule


# a rule: {captioner: its signs}, {captioner: its held-out loss} -> {captioner: the higher, the
# better}
RULES = {"believed F1": by_believed_f1, "held-out loss": by_loss,
         **{key: by_sign(key) for key in ("P(yes)", "share kept", "agreement")},
         **{f"always {name}": always(name) for name in CAPTIONERS[1:]}}


def choice(rule, signs, losses):
    """The captioner that a rule chooses, of equals the first."""
    values = RULES[rule](signs, losses)
    return max(values, key=values.get)


def regrets(figures, arm, rung):
    """{rule: F1, greedy + sampled, that its choice lacks to the best captioner} with one seed.

    figures: of the experiment, {arm: {metric: number}}.
    """
    names = {name: name if name == "SFT" else f"{name}, {arm}" for name in CAPTIONERS}
    f1 = {name: both_f1(figures[f"{key}, {rung}"]) for name, key in names.items()}
    signs = {name: figures[f"signs of {name}, {arm}, {rung}"] for name in CAPTIONERS}
    losses = {name: figures[f"{names[name]}, {rung}"]["held-out loss"] for name in CAPTIONERS[1:]}
    return {rule: max(f1.values()) - f1[choice(rule, signs, losses)] for rule in RULES}


def losses_of_rules(seeds, arm, rung):
    """{…: the mean regret over the seeds} for each rule."""
    each = [regrets(figures, arm, rung) for figures in seeds]
    return {f"F1, greedy + sampled, lost by {rule}":
            round(statistics.fmean(of_seed[rule] for of_seed in each), 4) for rule in RULES}
