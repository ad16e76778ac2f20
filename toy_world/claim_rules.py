"""The rules by which a claim of claims.py is said to hold, each written down before its runs, or
with a note where it was not.

A rule takes the figures of all seeds, each {arm: {metric: number}}, and returns a list of
conditions, true or false. To add a claim, write an experiment, a rule, and a line in claims.CLAIMS.
"""
import functools
import statistics

from toy_world import competence, stopping
from toy_world.lab import both_f1


# ---------------------------------------------------------------- parts of rules
def for_each_seed(holds):
    """Make a rule of a condition on one seed's figures: it asks the same of every seed.

    A rule takes the figures of all seeds, each {arm: {metric: number}}, and returns a list of
    conditions, true or false.
    """
    @functools.wraps(holds)
    def rule(seeds):
        return [bool(holds(figures)) for figures in seeds]
    return rule


def collapsed(figures, sft):
    """Whether a captioner has collapsed: its greedy F1 is below that of the SFT model it started
    from, or fewer than .9 of its captions end, or more than half repeat a statement. (Defined
    before the runs.)"""
    return (figures["greedy f1"] < sft["greedy f1"] or figures["greedy eos"] < .9
            or figures["greedy repeat"] > .5)


def beats(one, other, metrics, margin=0.0):
    """Whether one arm is above another by more than the margin in each metric."""
    return all(one[metric] > other[metric] + margin for metric in metrics)


# ---------------------------------------------------------------- the rules
@for_each_seed
def planted_reproduces(figures):
    """One low-resolution view gives marks to more of the unmarked warm objects than are marked in
    truth, by more than .05, and to fewer of the cold ones; six views to less than .05 of the warm
    ones. (Made stricter after the runs.)"""
    one_view, true_rate = figures["one low-resolution view"], figures["true rate"]
    return (one_view["warm"] > true_rate["warm"] + .05 and one_view["cold"] < true_rate["cold"]
            and figures["six views"]["warm"] < .05)


@for_each_seed
def layouts_reproduces(figures):
    """Six views beat one by more than .05 in detail recall, greedy and sampled."""
    metrics = ("greedy detail_recall", "sampled detail_recall")
    return beats(figures["6 views"], figures["1 view"], metrics, .05)


@for_each_seed
def generations_reproduces(figures):
    """From 2 to 16 samples the union gains more than .05 recall and loses more than .02 precision;
    gated, the union of 16 beats a single sample in both."""
    union_1, union_2, union_16 = (figures[f"N = {n}, union"] for n in (1, 2, 16))
    return (beats(union_16, union_2, ("recall",), .05)
            and beats(union_2, union_16, ("precision",), .02)
            and beats(figures["N = 16, gated"], union_1, ("recall", "precision")))


@for_each_seed
def direct_reproduces(figures):
    """Direct questions are answered right more often than statements of captions are true, all
    kinds together. (Changed after the runs: the first rule asked it of each kind, but a
    background, of which captions state hardly anything false, leaves nothing to gain.)"""
    return figures["all"]["question"] > figures["all"]["statement"]


@for_each_seed
def gates_reproduces(figures):
    """The calibrated gate has a higher F1 than either vote, than no gate, and than resolving
    contradictions alone. (Made stricter after the runs.)"""
    others = ("vote of 2", "vote of 3", "no gate", "resolving alone")
    return all(beats(figures["gate, calibrated"], figures[arm], ("f1",)) for arm in others)


@for_each_seed
def training_reproduces(figures):
    """DPO + CE beats CE alone by more than .01 in F1, greedy + sampled."""
    return both_f1(figures["DPO + CE"]) > both_f1(figures["CE only"]) + .01


def lottery_reproduces(seeds):
    """DPO alone collapses with some seeds but not with all."""
    collapses = [collapsed(figures["dpo alone"], figures["SFT"]) for figures in seeds]
    return [any(collapses) and not all(collapses)]


@for_each_seed
def other_losses_reproduces(figures):
    """Hinge, IPO and KTO alone all collapse."""
    return all(collapsed(figures[f"{loss} alone"], figures["SFT"])
               for loss in ("hinge", "ipo", "kto"))


def repeatable_reproduces(seeds):
    """DPO + CE collapses with no seed, and its F1s, greedy + sampled, differ by less than .05."""
    f1s = [both_f1(figures["DPO + CE"]) for figures in seeds]
    survives = [not collapsed(figures["DPO + CE"], figures["SFT"]) for figures in seeds]
    return [*survives, max(f1s) - min(f1s) < .05]


@for_each_seed
def rounds_reproduces(figures):
    """More than .05 of the SFT model's samples repeat a statement; after round two at most .05 do
    and at least .98 end; round three loses more than .02 in F1, greedy + sampled."""
    sft, second, third = (figures[f"{name}, resolved"] for name in ("SFT", "round 2", "round 3"))
    return (sft["sampled repeat"] > .05 and second["sampled repeat"] <= .05
            and second["sampled eos"] >= .98 and both_f1(third) < both_f1(second) - .02)


@for_each_seed
def context_reproduces(figures):
    """Round three loses more than .02 in F1, greedy + sampled, in the short context, and does not
    in the long one."""
    f1 = {name: both_f1(of) for name, of in figures.items() if name.startswith("round")}
    return (f1["round 3, short"] < f1["round 2, short"] - .02
            and f1["round 3, long"] >= f1["round 2, long"] - .02)


@for_each_seed
def temperature_reproduces(figures):
    """At temperature 1 the share of false statements is more than twice that at 0."""
    return figures["temperature 1"]["false share"] > 2 * figures["temperature 0"]["false share"]


@for_each_seed
def order_reproduces(figures):
    """CE on golden captions gains F1, greedy + sampled, and CE on ordered samples of the model
    itself gains more than half as much."""
    sft = both_f1(figures["SFT"])
    gain = both_f1(figures["CE on golden"]) - sft
    gain_of_order = both_f1(figures["CE on own samples, ordered"]) - sft
    return gain > 0 and gain_of_order > gain / 2


def prior_reproduces(seeds):
    """On both bases, golden captions have a higher F1 at the corrected threshold than at the
    calibrated one. (Written down after a first look at one seed of the shipped base.)"""
    return [figures[f"corrected{base}"]["f1"] > figures[f"calibrated{base}"]["f1"]
            for figures in seeds for base in ("", ", weak base")]


@for_each_seed
def forgetting_reproduces(figures):
    """Adapters that are switched off leave the base as it was, and adapters that are on beat LoRA
    and full tuning by more than .01 in dense captions and in the marks of close-ups."""
    metrics = ("dense f1", "close-up marks")
    return figures["adapters, off"] == figures["base"] and all(
        beats(figures["adapters"], figures[tune], metrics, .01) for tune in ("lora", "full"))


@for_each_seed
def soft_prompt_reproduces(figures):
    """With and without a soft prompt, greedy F1 differs by less than .02."""
    without, with_prompt = figures["adapters alone"], figures["adapters and soft prompt"]
    return abs(without["greedy f1"] - with_prompt["greedy f1"]) < .02


@for_each_seed
def narrowing_reproduces(figures):
    """QA adapters in the ViT lose more than .01 in greedy F1, and images move closer together."""
    without, with_vit = figures["LLM only"], figures["LLM and ViT"]
    return (beats(without, with_vit, ("greedy f1",), .01)
            and beats(without, with_vit, ("cosine distance",)))


# ---------------------------------------------------------------- the competence curve
def above(seeds, one, other, f1=both_f1):
    """Whether one arm is above another: "yes" if its F1 is higher with every seed, and by more than
    .01 on average; "no" if the same is true of the other arm; else "unclear".

    The two arms of a seed share its scenes and its SFT model, so that they are compared seed by
    seed. f1: by default greedy + sampled. (Written down before the runs.)
    """
    gains = [f1(figures[one]) - f1(figures[other]) for figures in seeds]
    if min(gains) > 0 and statistics.fmean(gains) > .01:
        return "yes"
    return "no" if max(gains) < 0 and statistics.fmean(gains) < -.01 else "unclear"


def competence_answers(seeds):
    """{rung: {question: answer}} for the rungs that all seeds have.

    Captioners are compared after round two, after which toy.py stops. (Written down before the
    runs.)
    """
    answers = {}
    for rung in competence.RUNGS:
        if not all(f"SFT, {rung}" in figures for figures in seeds):
            continue
        pairs = {"round 1 beats SFT": ("round 1, DPO + CE", "SFT"),
                 "the gate beats the vote": ("round 2, CE", "round 2, CE on votes"),
                 "DPO adds to CE": ("round 2, DPO + CE", "round 2, CE"),
                 "round 2 adds to round 1": ("round 2, DPO + CE", "round 1, DPO + CE"),
                 "round 3 adds to round 2": ("round 3, DPO + CE", "round 2, DPO + CE")}
        answers[rung] = {question: above(seeds, *(f"{arm}, {rung}" for arm in arms))
                         for question, arms in pairs.items()}
        for question, rule in (("the gate beats a vote of 2 in golden captions", "vote of 2"),
                               ("it beats the best F1 on triplets, without the group's share",
                                "F1")):
            arms = (f"golden 1 by {name}, DPO + CE, {rung}" for name in (competence.GATE, rule))
            answers[rung][question] = above(seeds, *arms, f1=lambda figures: figures["f1"])
        answers[rung] |= stopping.losses_of_rules(seeds, "DPO + CE", rung)
    return answers


def tuning_answers(seeds):
    """What the rules that stop without truth lose on the rungs that all seeds have."""
    return {rung: stopping.losses_of_rules(seeds, "DPO + CE", rung)
            for rung in competence.TUNING_RUNGS
            if all(f"SFT, {rung}" in figures for figures in seeds)}


def competence_reproduces(seeds):
    """On every rung the gate beats the vote, and DPO adds to CE. (Written down before the runs.)"""
    return [answers[question] == "yes" for answers in competence_answers(seeds).values()
            for question in ("the gate beats the vote", "DPO adds to CE")]


@for_each_seed
def tuning_reproduces(figures):
    """The chosen gate gives golden captions of round one a higher F1 than the threshold with the
    best F1 on triplets, on every rung."""
    return all(beats(figures[f"golden 1 by {competence.GATE}, DPO + CE, {rung}"],
                     figures[f"golden 1 by F1, DPO + CE, {rung}"], ("f1",))
               for rung in competence.TUNING_RUNGS)


@for_each_seed
def threshold_reproduces(figures):
    """From the lowest to the highest threshold, precision rises and recall falls, both by more than
    .01: of golden captions, and of the greedy captions of the captioners trained on them. (Written
    down before the runs.)"""
    low, high = min(competence.DIAL), max(competence.DIAL)
    return all(beats(figures[f"{of} at {one}"], figures[f"{of} at {other}"], (metric,), .01)
               for of, way in (("golden", ""), ("captioner", "greedy "))
               for one, other, metric in ((high, low, f"{way}precision"),
                                          (low, high, f"{way}recall")))
