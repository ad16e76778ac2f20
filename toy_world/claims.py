"""What the source claims, tested in the toy world with several seeds through the real scripts.

READS   assets/toy
WRITES  out/claims: a folder per seed; results/claims.json: every number, a verdict for each claim

    python toy.py claims                # every missing seed; hours on two cores, can be interrupted
    python toy.py claims --only gates   # one claim
    python toy.py claims --only competence      # the curve over a ladder of bases
    python toy.py claims --table        # the results so far

Each seed has scenes, captions and training of its own on the same base. Learning rates and β are
tuned on another seed, TUNE. A claim with parts, such as the bases of a ladder, is measured and
stored part by part. A verdict follows from the rule of the claim, which was written down
before the runs (exceptions are noted at the rule): the claim reproduces if everything that its rule
asks for holds, does not reproduce if nothing does, and is unclear otherwise. docs/claims.md
discusses the results.
"""
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from plumbing import files
from plumbing.errors import InputError
from toy_world import competence, experiments, stopping
from toy_world.lab import Lab, both_f1


def add_flags(p):
    p.add_argument("--out", type=Path, default=Path("out/claims"), help="folder of the runs")
    p.add_argument("--results", type=Path, default=Path("results/claims.json"),
                   help="file of all numbers")
    p.add_argument("--only", help=f"one of {', '.join(CLAIMS)}")
    p.add_argument("--table", action="store_true", help="run nothing, print the results so far")


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


# ---------------------------------------------------------------- the claims
class Claim(NamedTuple):
    claim: str
    measure: Callable                   # Lab, or Lab and part -> {arm: {metric: number}}
    rule: Callable                      # [figures of a seed] -> [whether a condition holds]
    seeds: tuple = (0, 1, 2)
    parts: tuple = ("",)                # each arm of a part ends in the part
    answers: Callable | None = None     # [figures of a seed] -> {part: {question: answer}}


FOUR = (0, 1, 2, 3)
CLAIMS = {
    "planted": Claim("low-resolution pre-training plants invisible details",
                     experiments.planted, planted_reproduces),
    "layouts": Claim("six views lift small-detail recall",
                     experiments.layouts, layouts_reproduces),
    "generations": Claim("more generations: more recall, less precision; the gate gives it back",
                         experiments.generations, generations_reproduces),
    "direct": Claim("a direct question is easier than a description",
                    experiments.direct, direct_reproduces),
    "gates": Claim("the gate is what makes golden samples good",
                   experiments.gates, gates_reproduces),
    "training": Claim("preference training is what teaches",
                      experiments.training, training_reproduces),
    "lottery": Claim("DPO alone is a lottery",
                     experiments.lottery, lottery_reproduces, FOUR),
    "other losses": Claim("hinge, IPO and KTO alone fail",
                          experiments.lottery, other_losses_reproduces, FOUR),
    "repeatable": Claim("DPO + CE repeats from seed to seed",
                        experiments.lottery, repeatable_reproduces, FOUR),
    "rounds": Claim("missing ends and repeats go away by round two, round three degrades",
                    experiments.rounds, rounds_reproduces),
    "context": Claim("round three degrades because captions leave the context",
                     experiments.context, context_reproduces),
    "temperature": Claim("most hallucinations come from sampling with temperature",
                         experiments.temperature, temperature_reproduces),
    "order": Claim("(ours) order, not content, explains the gain",
                   experiments.order, order_reproduces),
    "prior": Claim("(ours) a threshold corrected for the share of true statements is better",
                   experiments.prior, prior_reproduces),
    "forgetting": Claim("adapters do not forget; LoRA and full tuning do",
                        experiments.forgetting, forgetting_reproduces),
    "soft prompt": Claim("the soft prompt is a detail",
                         experiments.soft_prompt, soft_prompt_reproduces),
    "narrowing": Claim("QA training in the ViT would narrow it",
                       experiments.narrowing, narrowing_reproduces),
    "tuning": Claim("(ours, the seeds on which the gate was chosen) a stricter gate is better",
                    competence.tuning, tuning_reproduces, (100, 101, 102),
                    competence.TUNING_RUNGS, tuning_answers),
    "threshold": Claim("(ours) the threshold is a dial from recall to precision, for golden "
                       "captions and for the captioner that learns from them",
                       competence.threshold, threshold_reproduces),
    "competence": Claim("(ours) gate and DPO earn their place, however well the base answers",
                        competence.competence, competence_reproduces, parts=competence.RUNGS,
                        answers=competence_answers),
}


# ---------------------------------------------------------------- running and reporting
def verdict(seeds, rule):
    """"reproduces" if all conditions of the rule hold, "does not reproduce" if none does, else
    "unclear"."""
    conditions = rule(seeds)
    if all(conditions):
        return "reproduces"
    return "unclear" if any(conditions) else "does not reproduce"


def collect(args):
    """The results of all seeds that are done: {name: {"claim", "verdict", "seeds": {seed:
    figures}}}, from the results file and, with priority, from the folders of the runs."""
    results = {}
    stored = read_results(args.results)
    for name, claim in CLAIMS.items():
        seeds = dict(stored.get(name, {}).get("seeds", {}))
        for seed, part in itertools.product(claim.seeds, claim.parts):
            path = figures_path(args.out, seed, name, part)
            if path.is_file():
                figures = seeds.get(str(seed), {}) if part else {}
                seeds[str(seed)] = figures | json.loads(path.read_text("utf-8"))
        if seeds:
            outcome = "not all seeds are done"
            if all(is_done(seeds, *one) for one in itertools.product(claim.seeds, claim.parts)):
                outcome = verdict(list(seeds.values()), claim.rule)
            results[name] = {"claim": claim.claim, "verdict": outcome, "seeds": seeds}
            if claim.answers:
                results[name]["answers"] = claim.answers(list(seeds.values()))
    return results


def is_done(seeds, seed, part):
    """Whether the figures of the seeds hold those of a part with a seed."""
    return any(arm.endswith(part) for arm in seeds.get(str(seed), {}))


def read_results(path):
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error}); delete it, and the figures are "
                         "read from --out again") from None


def figures_path(out, seed, name, part=""):
    name = f"{name}, {part}" if part else name
    return out / f"seed-{seed}/figures/{name}.json"


def table(results):
    """Lines of Markdown: the verdict on each claim, and each arm's mean ± standard deviation over
    the seeds."""
    for entry in results.values():
        seeds = list(entry["seeds"].values())
        yield f"\n**{entry['claim']}**: {entry['verdict']} ({len(seeds)} seeds)\n"
        for part, answers in entry.get("answers", {}).items():
            yield from (f"- {part}: {question}: {answer}" for question, answer in answers.items())
        metrics = list(dict.fromkeys(metric for figures in seeds for arm in figures.values()
                                     for metric in arm))
        yield "| | " + " | ".join(metrics) + " |\n|---|" + "---|" * len(metrics)
        for arm in dict.fromkeys(itertools.chain(*seeds)):
            cells = [cell([figures.get(arm, {}).get(metric) for figures in seeds])
                     for metric in metrics]
            yield f"| {arm} | " + " | ".join(cells) + " |"


def cell(values):
    """Mean ± standard deviation of the values that are not None."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def main(args):
    """Measure every missing seed and write the results after each. A seed that fails is reported at
    the end; the others are measured."""
    if args.only and args.only not in CLAIMS:
        raise InputError(f"--only {args.only}: want one of {', '.join(CLAIMS)}")
    failures = []
    if not args.table:
        for name in [args.only] if args.only else CLAIMS:
            failures += measure_missing(args, name)
        files.write_json(args.results, collect(args))
    print("\n".join(table(collect(args))))
    if failures:
        raise InputError(f"{len(failures)} of the runs failed, the first: {failures[0]}")


def measure_missing(args, name):
    """Measure the parts and seeds of a claim that are not done -> one line for each that failed."""
    claim, failures = CLAIMS[name], []
    for part, seed in itertools.product(claim.parts, claim.seeds):
        if is_done(collect(args).get(name, {}).get("seeds", {}), seed, part):
            continue
        where = ", ".join(filter(None, (name, part, f"seed {seed}")))
        print(f"{where}: {claim.claim}", file=sys.stderr, flush=True)
        try:
            figures = claim.measure(Lab(args.out, seed), *filter(None, [part]))
        except InputError as error:
            failures.append(f"{where}: {error}")
            print(failures[-1], file=sys.stderr, flush=True)
            continue
        files.write_json(figures_path(args.out, seed, name, part), figures)
        files.write_json(args.results, collect(args))
    return failures
