"""What the source claims, tested in the toy world with several seeds through the real scripts.

READS   assets/toy
WRITES  out/claims: a folder per seed; results/claims.json: every number, and a verdict for each claim

    python toy.py claims                        # all that are missing; hours on two cores, stopped and resumed at will
    python toy.py claims --only gates           # one claim
    python toy.py claims --table                # what has been measured, as the README shows it

A seed has its own scenes, captions and training; the base is the same. Learning rates and β are tuned on a seed of
their own, TUNE. A verdict is decided by a rule that stands beside the claim and was written down before the runs
("planted" and "gates" were made stricter after them, "direct" was mended): it reproduces where all that the rule asks
for holds, does not where nothing does, and is unclear between. A captioner has collapsed (decided before the runs)
where its greedy F1 is below that of the SFT model it started from, or fewer than .9 of its captions end, or more than
half repeat a statement.
"""
import json
import statistics
import sys
from pathlib import Path

from plumbing.errors import InputError
from plumbing.train import write_whole
from toy_world.experiments import (
    Lab,
    both_f1,
    context,
    direct,
    forgetting,
    gates,
    generations,
    layouts,
    lottery,
    narrowing,
    order,
    planted,
    rounds,
    soft_prompt,
    temperature,
    training,
)

SEEDS = (0, 1, 2)


def add_flags(p):
    p.add_argument("--out", type=Path, default=Path("out/claims"), help="folder of the runs")
    p.add_argument("--results", type=Path, default=Path("results/claims.json"), help="file of all numbers")
    p.add_argument("--only", help=f"one of {', '.join(CLAIMS)}")
    p.add_argument("--table", action="store_true", help="run nothing, print what is there")


# ---------------------------------------------------------------- the claims and their rules
def collapsed(figures, sft):
    return (figures["greedy f1"] < sft["greedy f1"] or figures["greedy eos"] < .9 or figures["greedy repeat"] > .5)


def beats(one, other, keys, margin=0.0):
    return all(one[key] > other[key] + margin for key in keys)


def each(bears_out):
    """A rule that asks the same of every seed's figures."""
    return lambda seeds: [bool(bears_out(figures)) for figures in seeds]


def is_lottery(seeds):
    """DPO alone collapses with some seeds, and with others not."""
    fallen = [collapsed(figures["dpo alone"], figures["SFT"]) for figures in seeds]
    return [any(fallen) and not all(fallen)]


def is_repeatable(seeds):
    """DPO + CE collapses with no seed, and its F1s, greedy + sampled, are within .05."""
    f1s = [both_f1(figures["DPO + CE"]) for figures in seeds]
    return [*(not collapsed(figures["DPO + CE"], figures["SFT"]) for figures in seeds), max(f1s) - min(f1s) < .05]


# name: (what is claimed, how it is measured, the rule: [figures of a seed] -> what holds and what does not, seeds)
CLAIMS = {
    "planted": ("low-resolution pre-training plants invisible details", planted, each(lambda f:
                f["one low-resolution view"]["warm"] > f["true rate"]["warm"] + .05
                and f["one low-resolution view"]["cold"] < f["true rate"]["cold"]
                and f["six views"]["warm"] < .05), SEEDS),
    "layouts": ("six views lift small-detail recall", layouts, each(lambda f:
                beats(f["6 views"], f["1 view"], ("greedy detail_recall", "sampled detail_recall"), .05)), SEEDS),
    "generations": ("more generations: more recall, less precision; the gate gives it back", generations, each(lambda f:
                    beats(f["N = 16, union"], f["N = 2, union"], ("recall",), .05)
                    and beats(f["N = 2, union"], f["N = 16, union"], ("precision",), .02)
                    and beats(f["N = 16, gated"], f["N = 1, union"], ("recall", "precision"))), SEEDS),
    # of all kinds together: a rule for each kind, as there was before the runs, fails on backgrounds, of which captions
    # say nothing false that a question could do better
    "direct": ("a direct question is easier than a description", direct, each(lambda f:
               f["all"]["question"] > f["all"]["statement"]), SEEDS),
    "gates": ("the gate is what makes golden samples good", gates, each(lambda f:
              all(beats(f["gate, calibrated"], f[name], ("f1",)) for name in
                  ("vote of 2", "vote of 3", "no gate", "resolving alone"))), SEEDS),
    "training": ("preference training is what teaches", training, each(lambda f:
                 both_f1(f["DPO + CE"]) > both_f1(f["CE only"]) + .01), SEEDS),
    "lottery": ("DPO alone is a lottery", lottery, is_lottery, (0, 1, 2, 3)),
    "other losses": ("hinge, IPO and KTO alone fail", lottery, each(lambda f:
                     all(collapsed(f[f"{loss} alone"], f["SFT"]) for loss in ("hinge", "ipo", "kto"))), (0, 1, 2, 3)),
    "repeatable": ("DPO + CE repeats from seed to seed", lottery, is_repeatable, (0, 1, 2, 3)),
    "rounds": ("missing ends and repeats go away by round two, round three degrades", rounds, each(lambda f:
               f["SFT, resolved"]["sampled repeat"] > .05
               and f["round 2, resolved"]["sampled eos"] >= .98 and f["round 2, resolved"]["sampled repeat"] <= .05
               and both_f1(f["round 3, resolved"]) < both_f1(f["round 2, resolved"]) - .02), SEEDS),
    "context": ("round three degrades because captions leave the context", context, each(lambda f:
                both_f1(f["round 3, short"]) < both_f1(f["round 2, short"]) - .02
                and both_f1(f["round 3, long"]) >= both_f1(f["round 2, long"]) - .02), SEEDS),
    "temperature": ("most hallucinations come from sampling with temperature", temperature, each(lambda f:
                    f["temperature 1"]["false share"] > 2 * f["temperature 0"]["false share"]), SEEDS),
    "order": ("(ours) order, not content, explains the gain", order, each(lambda f:
              both_f1(f["CE on golden"]) > both_f1(f["SFT"]) and both_f1(f["CE on own samples, ordered"])
              - both_f1(f["SFT"]) > (both_f1(f["CE on golden"]) - both_f1(f["SFT"])) / 2), SEEDS),
    "forgetting": ("adapters do not forget; LoRA and full tuning do", forgetting, each(lambda f:
                   f["adapters, off"] == f["base"] and all(
                       f["adapters"][key] > f[tune][key] + .01 for tune in ("lora", "full")
                       for key in ("dense f1", "close-up marks"))), SEEDS),
    "soft prompt": ("the soft prompt is a detail", soft_prompt, each(lambda f:
                    abs(f["adapters alone"]["greedy f1"] - f["adapters and soft prompt"]["greedy f1"]) < .02), SEEDS),
    "narrowing": ("QA training in the ViT would narrow it", narrowing, each(lambda f:
                  beats(f["LLM only"], f["LLM and ViT"], ("greedy f1",), .01)
                  and beats(f["LLM only"], f["LLM and ViT"], ("cosine distance",))), SEEDS),
}


# ---------------------------------------------------------------- running, and what came out
def verdict(seeds, rule):
    """"reproduces" where all that the rule asks for holds, "does not" where nothing does, else "unclear"."""
    held = rule(seeds)
    return "reproduces" if all(held) else "unclear" if any(held) else "does not reproduce"


def collect(args):
    """Every claim's figures of the seeds that are done, as {name: {"claim", "verdict", "seeds": {seed: figures}}}."""
    try:
        found = json.loads(args.results.read_text("utf-8")) if args.results.is_file() else {}
    except ValueError as error:
        raise InputError(f"{args.results}: is no JSON ({error}); delete it, and its figures are read from --out "
                         "again") from None
    for name, (claim, _, rule, seeds) in CLAIMS.items():
        files = {seed: args.out / f"seed-{seed}/figures/{name}.json" for seed in seeds}
        mine = dict(found.get(name, {}).get("seeds", {}))
        mine |= {str(seed): json.loads(path.read_text("utf-8")) for seed, path in files.items() if path.is_file()}
        if mine:
            whole = verdict(list(mine.values()), rule) if len(mine) == len(seeds) else "not all seeds are done"
            found[name] = {"claim": claim, "verdict": whole, "seeds": mine}
    return {name: found[name] for name in CLAIMS if name in found}


def table(results):
    """Lines in Markdown: of each claim the verdict, and of each arm mean ± standard deviation over the seeds."""
    def cell(values):
        values = [value for value in values if value is not None]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.3f}{spread}" if values else "-"
    for found in results.values():
        seeds = list(found["seeds"].values())
        yield f"\n**{found['claim']}**: {found['verdict']} ({len(seeds)} seeds)\n"
        keys = list(dict.fromkeys(key for figures in seeds for arm in figures.values() for key in arm))
        yield "| | " + " | ".join(keys) + " |\n|---|" + "---|" * len(keys)
        for arm in seeds[0]:
            yield f"| {arm} | " + " | ".join(cell([figures[arm].get(key) for figures in seeds]) for key in keys) + " |"


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n", "utf-8"))


def main(args):
    """Run what is missing of the claims, one after the other, and write what is there after each; go on after one that
    fails."""
    if args.only and args.only not in CLAIMS:
        raise InputError(f"--only {args.only}: want one of {', '.join(CLAIMS)}")
    failed = []
    for name, (claim, measure, _, seeds) in CLAIMS.items():
        if args.table or args.only not in (None, name):
            continue
        for seed in seeds:
            lab = Lab(args.out, seed)
            path = lab.out / f"figures/{name}.json"
            if str(seed) in collect(args).get(name, {}).get("seeds", {}):
                continue
            print(f"{name}, seed {seed}: {claim}", file=sys.stderr, flush=True)
            try:
                figures = measure(lab)
            except InputError as error:
                failed.append(f"{name}, seed {seed}: {error}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            write_json(path, figures)
            write_json(args.results, collect(args))
    if not args.table:
        write_json(args.results, collect(args))
    print("\n".join(table(collect(args))))
    if failed:
        raise InputError(f"{len(failed)} of the runs failed, the first: {failed[0]}")
