"""The plots of docs/claims.md, from results/claims.json, and of --verify. Needs matplotlib, a
development dependency.

    python -m toy_world.plots --results results/claims.json --out assets/claims
    python -m toy_world.plots --dial results/dial-*.json --out assets
"""
import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

from toy_world.competence import GATE

BLUE, RED, GREY = "#2563ab", "#c8372d", "#888888"


def parse_args(argv):
    p = argparse.ArgumentParser(description="The plots of docs/claims.md.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--results", type=Path, default=Path("results/claims.json"),
                   help="file that `python toy.py claims` wrote")
    p.add_argument("--dial", type=Path, nargs="+", help="files that `python toy.py dial` wrote; "
                   "their plot alone")
    p.add_argument("--out", type=Path, default=Path("assets/claims"), help="folder of the pictures")
    return p.parse_args(argv)


# ---------------------------------------------------------------- parts of plots
def values(result, arm, metric):
    """A metric of an arm, of each seed that has it."""
    of_seeds = [figures.get(arm, {}).get(metric) for figures in result["seeds"].values()]
    return [value for value in of_seeds if value is not None]


def all_arms(result):
    return list(next(iter(result["seeds"].values())))


def line(axes, result, arms, xs, metric, **style):
    """The mean over the seeds against x, with bars from the lowest seed to the highest. Arms
    without the metric are left out."""
    points = [(x, column) for x, arm in zip(xs, arms) if (column := values(result, arm, metric))]
    means = [statistics.fmean(column) for _, column in points]
    below = [mean - min(column) for mean, (_, column) in zip(means, points)]
    above = [max(column) - mean for mean, (_, column) in zip(means, points)]
    axes.errorbar([x for x, _ in points], means, yerr=[below, above], capsize=3, marker="o",
                  **style)


def dots(result, axes, series, xlabel, arms=None):
    """A row for each arm, by default all, with a dot for each seed; series: {label: (metric,
    colour, marker)}."""
    arms = arms or all_arms(result)
    for label, (metric, color, marker) in series.items():
        xs, ys = [], []
        for y, arm in enumerate(reversed(arms)):
            column = values(result, arm, metric)
            xs += column
            ys += [y] * len(column)
        axes.scatter(xs, ys, color=color, marker=marker, label=label, alpha=0.8)
    axes.set_yticks(range(len(arms)), arms[::-1])
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_xlabel(xlabel)


# ---------------------------------------------------------------- the plots
def generations(result, axes):
    numbers = (1, 2, 4, 8, 16)
    for kind, style in (("union", "--"), ("gated", "-")):
        arms = [f"N = {n}, {kind}" for n in numbers]
        for metric, color in (("precision", BLUE), ("recall", RED)):
            line(axes, result, arms, numbers, metric, color=color, linestyle=style,
                 label=f"{metric}, {kind}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("captions per image")
    axes.legend(fontsize=8)


def trained(result, axes):
    series = {"F1, greedy": ("greedy f1", BLUE, "s"), "F1, sampled": ("sampled f1", RED, "o"),
              "captions that repeat, greedy": ("greedy repeat", GREY, "x")}
    arms = [arm for arm in all_arms(result) if arm != "golden"]
    dots(result, axes, series, "on held-out scenes", arms)


def rounds(result, axes):
    names = ["SFT", "round 1", "round 2", "round 3"]
    for kind, label, style in (("resolved", "resolved", "-"), ("not", "kept", "--")):
        arms = [f"{name}, {kind}" for name in names]
        for way, color in (("greedy", BLUE), ("sampled", RED)):
            line(axes, result, arms, range(4), f"{way} f1", color=color, linestyle=style,
                 label=f"{way}, contradictions {label}")
    axes.set_xticks(range(4), names)
    axes.set_ylabel("F1")
    axes.legend(fontsize=8)


def temperature(result, axes):
    arms = all_arms(result)
    temperatures = [float(arm.split()[1]) for arm in arms]
    line(axes, result, arms, temperatures, "false share", color=RED,
         label="share of statements that are false")
    line(axes, result, arms, temperatures, "planted", color=GREY,
         label="share of unmarked objects with a planted statement")
    axes.set_xlabel("temperature")
    axes.legend(fontsize=8)


def competence(result, axes):
    """F1 against the share of near misses that the QA adapter refuses, a point for each rung."""
    arms = dict.fromkeys(arm for figures in result["seeds"].values() for arm in figures)
    rungs = [arm.removeprefix("SFT, ") for arm in arms if arm.startswith("SFT, ")]
    near_misses = [statistics.fmean(values(result, f"QA adapter, {rung}", "near misses"))
                   for rung in rungs]
    xs, rungs = zip(*sorted(zip(near_misses, rungs)))
    golden, trained = "golden 1 by {}, DPO + CE", "round {}, {}"
    series = (("SFT", "SFT", "greedy f1", GREY, "-"),
              ("union of six", golden.format("union"), "f1", GREY, ":"),
              ("vote of two of six", golden.format("vote of 2"), "f1", RED, ":"),
              ("gate", golden.format(GATE), "f1", BLUE, ":"),
              ("CE on votes, round 2", trained.format(2, "CE on votes"), "greedy f1", RED, "-"),
              ("CE, round 2", trained.format(2, "CE"), "greedy f1", BLUE, "--"),
              ("DPO + CE, round 1", trained.format(1, "DPO + CE"), "greedy f1", BLUE, "-."),
              ("DPO + CE, round 2", trained.format(2, "DPO + CE"), "greedy f1", BLUE, "-"))
    for label, arm, metric, color, style in series:
        line(axes, result, [f"{arm}, {rung}" for rung in rungs], xs, metric, color=color,
             linestyle=style, label=label)
    axes.set_xlabel("share of near misses that the QA adapter refuses")
    axes.set_ylabel("F1 (captioners: greedy)")
    axes.legend(fontsize=7)


def threshold(result, axes):
    """From recall to precision along the threshold."""
    arms = [arm for arm in all_arms(result) if " at " in arm]
    for of, way, color in (("golden", "", GREY), ("captioner", "greedy ", BLUE),
                           ("captioner", "sampled ", RED)):
        points = [(arm.split()[-1],
                   *(statistics.fmean(values(result, arm, f"{way}{metric}"))
                     for metric in ("recall", "precision")))
                  for arm in arms if arm.startswith(of)]
        axes.plot([x for _, x, _ in points], [y for *_, y in points], "o-", color=color,
                  label="golden captions" if of == "golden" else f"captioner, {way}".rstrip())
        for least, x, y in points:
            axes.annotate(least, (x, y), fontsize=6, textcoords="offset points", xytext=(3, 3))
    for way, color in (("greedy", BLUE), ("sampled", RED)):
        x, y = (statistics.fmean(values(result, "SFT", f"{way} {metric}"))
                for metric in ("recall", "precision"))
        axes.plot(x, y, "x", color=color, label=f"SFT, {way}")
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


PLOTS = {
    "layouts": partial(dots, xlabel="after SFT, at temperature 1", series={
        "detail recall": ("sampled detail_recall", RED, "o"),
        "recall": ("sampled recall", BLUE, "s"),
        "precision": ("sampled precision", GREY, "^")}),
    "generations": generations,
    "gates": partial(dots, xlabel="golden captions", series={
        "precision": ("precision", BLUE, "s"), "recall": ("recall", RED, "o"),
        "F1": ("f1", GREY, "^")}),
    "training": trained,
    "lottery": trained,
    "rounds": rounds,
    "temperature": temperature,
    "threshold": threshold,
    "competence": competence,
    "forgetting": partial(dots, xlabel="the base's own tasks, after SFT", series={
        "dense captions, F1": ("dense f1", BLUE, "s"), "questions": ("questions", GREY, "^"),
        "marks of close-ups": ("close-up marks", RED, "o")},
        arms=["base", "adapters, off", "adapters", "lora", "prompt", "full"]),
}


def plot_dial(paths, pyplot, out):
    """dial.png: for each file, from precision to recall along the threshold."""
    figure, rows = pyplot.subplots(1, len(paths), figsize=(4.4 * len(paths), 3.8), squeeze=False,
                                   layout="constrained")
    for path, axes in zip(paths, rows[0]):
        result = json.loads(path.read_text("utf-8"))
        for (name, curve), color in zip(result["curves"].items(), (RED, BLUE)):
            points = [point for point in curve if point["precision"] is not None]
            axes.plot([p["recall"] for p in points], [p["precision"] for p in points], color=color,
                      label=name)
            chosen = result[name]
            axes.plot(chosen["recall"], chosen["precision"], "o", color=color)
        for way, marker in (("greedy", "s"), ("sampled", "x")):
            single = result["single"][way]
            axes.plot(single["recall"], single["precision"], marker, color=GREY,
                      label=f"one {way} caption")
        axes.set_xlabel("recall")
        axes.set_title(path.stem.removeprefix("dial-"), fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    rows[0][0].set_ylabel("precision")
    figure.savefig(out / "dial.png", dpi=110)


def main(argv=None):
    args = parse_args(argv)
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    if args.dial:
        args.out.mkdir(parents=True, exist_ok=True)
        plot_dial(args.dial, pyplot, args.out)
        return 0
    try:
        results = json.loads(args.results.read_text("utf-8"))
    except (OSError, ValueError) as error:
        print(f"toy_world.plots: {args.results}: cannot be read ({error}); "
              "`python toy.py claims` writes it", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    for name, plot in PLOTS.items():
        if name in results:
            result = results[name]
            figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
            plot(result, axes)
            title = f"{result['claim']}\n{result['verdict']}, {len(result['seeds'])} seeds"
            axes.set_title(title, fontsize=9)
            figure.savefig(args.out / f"{name}.png", dpi=110)
            pyplot.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
