"""The README's plots, from results/claims.json (needs matplotlib, which is a development dependency).

    python toy_plots.py --results results/claims.json --out assets/claims
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

BLUE, RED, GREY = "#2563ab", "#c8372d", "#888888"


def parse_args(argv):
    plain = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=plain)
    p.add_argument("--results", type=Path, default=Path("results/claims.json"), help="what toy.py claims wrote")
    p.add_argument("--out", type=Path, default=Path("assets/claims"), help="folder of the pictures")
    return p.parse_args(argv)


def values(found, arm, key):
    """A metric of an arm, of each seed that has it."""
    return [figures[arm][key] for figures in found["seeds"].values() if figures.get(arm, {}).get(key) is not None]


def line(axes, found, arms, xs, key, **style):
    """Mean over the seeds against x, with the seeds' range."""
    xs, columns = zip(*((x, column) for x, arm in zip(xs, arms) if (column := values(found, arm, key))))
    ends = [[statistics.fmean(c) - min(c) for c in columns], [max(c) - statistics.fmean(c) for c in columns]]
    axes.errorbar(xs, [statistics.fmean(c) for c in columns], yerr=ends, capsize=3, marker="o", **style)


def dots(axes, found, arms, series):
    """For each arm a row, with a dot for each seed; series: {label: (metric, colour, marker)}."""
    for label, (key, color, marker) in series.items():
        points = [(x, len(arms) - 1 - k) for k, arm in enumerate(arms) for x in values(found, arm, key)]
        axes.scatter([x for x, _ in points], [y for _, y in points], color=color, marker=marker, label=label, alpha=0.8)
    axes.set_yticks(range(len(arms)), arms[::-1])
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)


def planted(found, axes):
    arms = ["true rate", "one low-resolution view", "six views"]
    dots(axes, found, arms, {"warm objects": ("warm", RED, "o"), "cold objects": ("cold", BLUE, "s")})
    axes.set_xlabel("share of objects with a mark (true), of unmarked ones told to have one (base)")


def layouts(found, axes):
    dots(axes, found, list(next(iter(found["seeds"].values()))),
         {"detail recall": ("sampled detail_recall", RED, "o"), "recall": ("sampled recall", BLUE, "s"),
          "precision": ("sampled precision", GREY, "^")})
    axes.set_xlabel("after SFT, at temperature 1")


def generations(found, axes):
    numbers = (1, 2, 4, 8, 16)
    for what, style in (("union", "--"), ("gated", "-")):
        arms = [f"N = {n}, {what}" for n in numbers]
        line(axes, found, arms, numbers, "precision", color=BLUE, linestyle=style, label=f"precision, {what}")
        line(axes, found, arms, numbers, "recall", color=RED, linestyle=style, label=f"recall, {what}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("captions per image")
    axes.legend(fontsize=8)


def gates(found, axes):
    dots(axes, found, list(next(iter(found["seeds"].values()))),
         {"precision": ("precision", BLUE, "s"), "recall": ("recall", RED, "o"), "F1": ("f1", GREY, "^")})
    axes.set_xlabel("golden captions")


def arms_of(found, axes):
    dots(axes, found, [arm for arm in next(iter(found["seeds"].values())) if arm != "golden"],
         {"F1, greedy": ("greedy f1", BLUE, "s"), "F1, sampled": ("sampled f1", RED, "o"),
          "captions that repeat, greedy": ("greedy repeat", GREY, "x")})
    axes.set_xlabel("on held-out scenes")


def rounds(found, axes):
    for what, style in (("resolved", "-"), ("not", "--")):
        arms = [f"{name}, {what}" for name in ("SFT", "round 1", "round 2", "round 3")]
        for way, color in (("greedy", BLUE), ("sampled", RED)):
            line(axes, found, arms, range(4), f"{way} f1", color=color, linestyle=style,
                 label=f"{way}, contradictions {'resolved' if what == 'resolved' else 'kept'}")
    axes.set_xticks(range(4), ["SFT", "round 1", "round 2", "round 3"])
    axes.set_ylabel("F1")
    axes.legend(fontsize=8)


def temperature(found, axes):
    arms = [arm for arm in next(iter(found["seeds"].values()))]
    xs = [float(arm.split()[1]) for arm in arms]
    line(axes, found, arms, xs, "false share", color=RED, label="false statements")
    line(axes, found, arms, xs, "planted", color=GREY, label="things with a planted one")
    axes.set_xlabel("temperature")
    axes.legend(fontsize=8)


def forgetting(found, axes):
    dots(axes, found, ["base", "adapters, off", "adapters", "lora", "prompt", "full"],
         {"dense captions, F1": ("dense f1", BLUE, "s"), "questions": ("questions", GREY, "^"),
          "marks of close-ups": ("close-up marks", RED, "o")})
    axes.set_xlabel("the base's own tasks, after SFT")


PLOTS = {"planted": planted, "layouts": layouts, "generations": generations, "gates": gates, "training": arms_of,
         "lottery": arms_of, "rounds": rounds, "temperature": temperature, "forgetting": forgetting}


def main(argv=None):
    args = parse_args(argv)
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    try:
        results = json.loads(args.results.read_text("utf-8"))
    except (OSError, ValueError) as error:
        print(f"toy_plots.py: {args.results}: cannot be read ({error}); make it with `python toy.py claims`",
              file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    for name, plot in PLOTS.items():
        if name in results:
            figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
            plot(results[name], axes)
            axes.set_title(f"{results[name]['claim']}\n{results[name]['verdict']}, {len(results[name]['seeds'])} seeds",
                           fontsize=9)
            figure.savefig(args.out / f"{name}.png", dpi=110)
            pyplot.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
