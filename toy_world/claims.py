"""What the source claims, tested in the toy world with several seeds through the real scripts.

READS   assets/toy
WRITES  out/claims: a folder per seed; results/claims.json: every number, a verdict for each claim

    python toy.py claims                # every missing seed; hours on two cores, can be interrupted
    python toy.py claims --only gates   # one claim
    python toy.py claims --only competence      # the curve over a ladder of bases
    python toy.py claims --table        # the results so far
    python toy.py claims --base out/hard        # claims about the hard world, on a base of it

Each seed has scenes, captions and training of its own on the same base. Learning rates and β are
tuned on another seed, TUNE. A claim with parts, such as the bases of a ladder, is measured and
stored part by part. A verdict follows from the rule of the claim, which was written down
before the runs (exceptions are noted at the rule): the claim reproduces if everything that its rule
asks for holds, does not reproduce if nothing does, and is unclear otherwise. docs/claims.md
discusses the results.
"""
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from plumbing import files
from plumbing.errors import InputError
from toy_world import claim_rules, competence, experiments, longtail, worlds
from toy_world.lab import Lab


def add_flags(p):
    p.add_argument("--base", type=Path, help="folder of a base of the hard world to test claims on")
    p.add_argument("--out", type=Path, help="folder of the runs (default: out/claims[-BASE])")
    p.add_argument("--results", type=Path, help="numbers (default: results/claims[-BASE].json)")
    p.add_argument("--only", help=f"one of {', '.join(CLAIMS)}")
    p.add_argument("--table", action="store_true", help="run nothing, print the results so far")


# ---------------------------------------------------------------- the claims
class Claim(NamedTuple):
    claim: str
    measure: Callable                   # Lab, or Lab and part -> {arm: {metric: number}}
    rule: Callable                      # [figures of a seed] -> [whether a condition holds]
    seeds: tuple = (0, 1, 2)
    parts: tuple = ("",)                # each arm of a part ends in the part
    answers: Callable | None = None     # [figures of a seed] -> {part: {question: answer}}
    world: str = "easy"                 # which it is about


FOUR = (0, 1, 2, 3)
CLAIMS = {
    "planted": Claim("low-resolution pre-training plants invisible details",
                     experiments.planted, claim_rules.planted_reproduces),
    "layouts": Claim("six views lift small-detail recall",
                     experiments.layouts, claim_rules.layouts_reproduces),
    "generations": Claim("more generations: more recall, less precision; the gate gives it back",
                         experiments.generations, claim_rules.generations_reproduces),
    "direct": Claim("a direct question is easier than a description",
                    experiments.direct, claim_rules.direct_reproduces),
    "gates": Claim("the gate is what makes golden samples good",
                   experiments.gates, claim_rules.gates_reproduces),
    "training": Claim("preference training is what teaches",
                      experiments.training, claim_rules.training_reproduces),
    "lottery": Claim("DPO alone is a lottery",
                     experiments.lottery, claim_rules.lottery_reproduces, FOUR),
    "other losses": Claim("hinge, IPO and KTO alone fail",
                          experiments.lottery, claim_rules.other_losses_reproduces, FOUR),
    "repeatable": Claim("DPO + CE repeats from seed to seed",
                        experiments.lottery, claim_rules.repeatable_reproduces, FOUR),
    "rounds": Claim("missing ends and repeats go away by round two, round three degrades",
                    experiments.rounds, claim_rules.rounds_reproduces),
    "context": Claim("round three degrades because captions leave the context",
                     experiments.context, claim_rules.context_reproduces),
    "temperature": Claim("most hallucinations come from sampling with temperature",
                         experiments.temperature, claim_rules.temperature_reproduces),
    "order": Claim("(ours) order, not content, explains the gain",
                   experiments.order, claim_rules.order_reproduces),
    "prior": Claim("(ours) a threshold corrected for the share of true statements is better",
                   experiments.prior, claim_rules.prior_reproduces),
    "forgetting": Claim("adapters do not forget; LoRA and full tuning do",
                        experiments.forgetting, claim_rules.forgetting_reproduces),
    "soft prompt": Claim("the soft prompt is a detail",
                         experiments.soft_prompt, claim_rules.soft_prompt_reproduces),
    "narrowing": Claim("QA training in the ViT would narrow it",
                       experiments.narrowing, claim_rules.narrowing_reproduces),
    "tuning": Claim("(ours, the seeds on which the gate was chosen) a stricter gate is better",
                    competence.tuning, claim_rules.tuning_reproduces, (100, 101, 102),
                    competence.TUNING_RUNGS, claim_rules.tuning_answers),
    "threshold": Claim("(ours) the threshold is a dial from recall to precision, for golden "
                       "captions and for the captioner that learns from them",
                       competence.threshold, claim_rules.threshold_reproduces),
    "competence": Claim("(ours) gate and DPO earn their place, however well the base answers",
                        competence.competence, claim_rules.competence_reproduces,
                        parts=competence.RUNGS,
                        answers=claim_rules.competence_answers),
    "longtail": Claim("LoRA and full tuning forget what is rare; adapters do not",
                      longtail.longtail, claim_rules.for_each_seed(longtail.is_forgotten),
                      world="hard"),
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
    failures, suffix = [], f"-{args.base.name}" if args.base else ""
    args.out = args.out or Path(f"out/claims{suffix}")
    args.results = args.results or Path(f"results/claims{suffix}.json")
    if not args.table:
        for name in chosen(args):
            failures += measure_missing(args, name)
        files.write_json(args.results, collect(args))
    print("\n".join(table(collect(args))))
    if failures:
        raise InputError(f"{len(failures)} of the runs failed, the first: {failures[0]}")


def chosen(args):
    """The names of the claims to measure: one, or all about the world of the base."""
    world = worlds.name_of(args.base) if args.base else "easy"
    names = [name for name, claim in CLAIMS.items()
             if claim.world == world and args.only in (None, name)]
    if not names or (args.base and world == "easy"):
        what = f"--only {args.only}" if args.only else f"--base {args.base}"
        raise InputError(f"{what}: want one of {', '.join(CLAIMS)}; --base, a folder of the hard "
                         "world, goes with claims about that world, and only with these")
    return names


def measure_missing(args, name):
    """Measure the parts and seeds of a claim that are not done -> one line for each that failed."""
    claim, failures = CLAIMS[name], []
    for part, seed in itertools.product(claim.parts, claim.seeds):
        if is_done(collect(args).get(name, {}).get("seeds", {}), seed, part):
            continue
        where = ", ".join(filter(None, (name, part, f"seed {seed}")))
        print(f"{where}: {claim.claim}", file=sys.stderr, flush=True)
        try:
            lab = Lab(args.out, seed, *filter(None, [args.base]))
            figures = claim.measure(lab, *filter(None, [part]))
        except InputError as error:
            failures.append(f"{where}: {error}")
            print(failures[-1], file=sys.stderr, flush=True)
            continue
        files.write_json(figures_path(args.out, seed, name, part), figures)
        files.write_json(args.results, collect(args))
    return failures
