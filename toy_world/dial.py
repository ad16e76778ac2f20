"""What `caption.py --verify` does to captions: precision and recall against its threshold.

Used by `python toy.py dial RUN [RUN ...]`, on runs of toy.py that differ in the seed. The captioner
is the one that the first golden captions came from, and so is the judge: after SFT, or the bare
base after `--no-data`.
"""
import json
from functools import partial

from generate import judge
from plumbing import files, scoring
from plumbing.errors import InputError
from toy_world.steps import BARE, Loop, rows_of_runs, toy_rows

THRESHOLDS = [k / 50 for k in range(51)]
SAMPLES = (1, 6)
METRICS = ("precision", "recall", "f1")


def dial(args):
    """Caption the held-out scenes of each run with their proof; print and write what it gives."""
    runs = [verified(run) for run in args.runs]
    truth, greedy, sampled = (rows_of_runs([run[name] for run in runs])
                              for name in ("truth", "greedy", "sampled"))
    figures = {"runs": list(map(str, args.runs)), "thresholds": THRESHOLDS,
               "chosen": [run["threshold"] for run in runs], "curves": {}, "gains": {},
               "single": {name: scores(rows, truth)
                          for name, rows in (("greedy", greedy), ("sampled", sampled))}}
    print_row("greedy", figures["single"]["greedy"])
    print_row("sampled", figures["single"]["sampled"])
    for n in SAMPLES:
        paths, chosen = [run[n] for run in runs], {run[n]: run["threshold"] for run in runs}
        rows = rows_of_runs(paths, lambda path, chosen=chosen: kept(path, chosen[path]))
        name = "verified" if n == 1 else f"union of {n}, verified"
        figures[name] = scores(rows, truth)
        print_row(name, figures[name])
        figures["curves"][name] = [
            scores(rows_of_runs(paths, partial(kept, threshold=t)), truth)
            for t in THRESHOLDS]
        figures["gains"][name] = gains = {
            metric: scoring.difference(sampled, rows, truth, metric) for metric in METRICS}
        print("  against a sampled caption: " + ", ".join(
            f"{metric} {change:+.3f} [{low:+.3f}, {high:+.3f}]"
            for metric, (change, low, high) in gains.items()))
    if args.json:
        files.write_json(args.json, figures)


def verified(run):
    """A run of toy.py, with its held-out scenes captioned with their proof -> its files."""
    if not (run / "results.json").is_file():
        raise InputError(f"{run}: no results.json in it; let the run finish first")
    arguments = json.loads((run / "arguments.json").read_text("utf-8"))
    seed, has_data = ("--seed", arguments["seed"]), (run / "sft").is_dir()
    name = "sft" if has_data else "base"
    how = ("--adapters", run / "sft", "--verify", run / "qa-1") if has_data else (
        "--base", arguments["base"], "--adapters", "none", *BARE, "--verify", "base")
    settings = json.loads((run / "golden-1/settings.json").read_text("utf-8"))
    threshold = settings["compose"]["threshold"]
    made = {"truth": run / "truth/held-out.jsonl", "threshold": threshold,
            "greedy": run / f"captions/{name}-greedy.jsonl",
            "sampled": run / f"captions/{name}-sampled.jsonl"}
    for n in SAMPLES:
        out = run / f"dial-{n}"
        Loop(run).run(out / "captions.jsonl", "caption.py", run / "data/held-out", *how, *seed,
                      "--threshold", threshold, "--union", n, "--temperature", 1, "--out", out,
                      stage=False, allowed=(0, 1))
        made[n] = out / "captions.jsonl"
    return made


def kept(path, threshold):
    """The captions that a threshold leaves of those with their proof; "" where nothing is left."""
    rows = []
    for row in toy_rows(path):
        judged = judge(row.get("statements", []), threshold, min_votes=1, resolve=True)
        text = ", ".join(statement["text"] for statement in judged if statement["kept"])
        rows.append({"image": row["image"], "caption": text, "finish": "eos"})
    return rows


def scores(rows, truth):
    figures = scoring.score(rows, truth)
    return {metric: figures[metric] for metric in METRICS}


def print_row(name, figures):
    cells = "   ".join(f"{metric} {figures[metric]:.3f}" for metric in METRICS)
    print(f"{name:22} {cells}")
