"""The method on a laptop: the whole loop through the real scripts, in a world whose truth is known.

READS   assets/toy, a small Qwen-VL that was pre-trained on this world
WRITES  out/toy: data, a folder per stage, commands.jsonl, results.json, sheet.png;
        out/best.txt: the folder of the best captioner

    python toy.py                               # SFT and three rounds
    python toy.py --rounds 2 --processes 2      # two rounds, each stage under torchrun
    python toy.py --base assets/toy-qwen3-vl    # on a Qwen3-VL of transformers, which errs more
    python toy.py --base assets/toy-qwen3-vl --no-data      # from images alone
    python toy.py pool out/toy out/toy-1        # table and gains of runs with several seeds
    python toy.py dial out/toy out/toy-1        # what caption.py --verify gives, by its threshold
    python toy.py claims --only rounds          # test what the source claims, with several seeds
    python toy.py pretrain --steps 2000         # train the base in assets/toy, which errs
    python toy.py pretrain                      # train one that hardly ever does
    python toy.py pretrain --world hard --out out/hard      # one of a harder world, for --base
    python toy.py int8 --base assets/toy        # what --quantize int8 changes, on unseen scenes
    python toy.py report --base assets/toy      # what that base sees and invents on unseen scenes
    python toy.py scenes --out out/scenes       # pictures of the world and their truth

Every stage is a command, printed as one would type it. The same command again resumes where it was
interrupted. The truth about the held-out images is in a folder of its own, which only evaluate.py
is given.
"""
import argparse
import json
import os
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from plumbing import files, scoring
from plumbing.errors import InputError
from plumbing.images import open_image
from toy_world import base, claims, dial, quantised, world, worlds
from toy_world.steps import (
    BARE,
    BARE_DPO,
    BARE_GOLDEN,
    CODE,
    LATER,
    Loop,
    make_split,
    rows_of_runs,
    toy_rows,
)


def parse_args(argv):
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=defaults)
    parser.add_argument("--out", type=Path, default=Path("out/toy"), help="folder of the run")
    parser.add_argument("--base", type=Path, default=Path(os.path.relpath(CODE / "assets/toy")),
                        help="folder of the toy base")
    add_world(parser)
    parser.add_argument("--no-data", action="store_true", help="start from the bare base, which "
                        "asks itself, without captions and questions to learn from")
    parser.add_argument("--rounds", type=int, default=3,
                        help="rounds of QA adapter, golden samples and DPO")
    parser.add_argument("--captions", type=int, default=3000,
                        help="scenes with a caption and questions, for SFT and the QA adapter")
    parser.add_argument("--images", type=int, default=3000, help="unlabelled scenes per round")
    parser.add_argument("--held-out", type=int, default=500, help="scenes for evaluation")
    parser.add_argument("--samples", type=int, default=6, help="captions per unlabelled scene")
    parser.add_argument("--threshold", type=float, help="lowest P(yes) of a statement that is kept "
                        "(default: as the QA adapter is calibrated; .85 with --no-data)")
    parser.add_argument("--processes", type=int, default=1,
                        help="processes per stage, under torchrun if more than 1")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of all stages")
    names = "pool | dial | claims | pretrain | report | int8 | scenes"
    commands = parser.add_subparsers(dest="command", metavar=names)
    add_commands(commands, defaults)
    args = parser.parse_args(argv)
    if args.command and argv[0] != args.command:
        parser.error(f"{argv[0]}: flags of {args.command} must come after it")
    for name in ("rounds", "captions", "images", "held_out", "samples", "processes", "steps",
                 "batch", "questions", "save_every", "scenes", "n"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def add_world(parser, of_folder="that of the base's folder, or else easy"):
    parser.add_argument("--world", choices=tuple(worlds.WORLDS),
                        help="hard has more of everything, and a long tail; left out, "
                             + of_folder)


def add_commands(commands, defaults):
    """The flags of each command."""
    p = commands.add_parser("claims", help="test what the source claims", formatter_class=defaults)
    claims.add_flags(p)
    p = commands.add_parser("pool", help="table and gains of several runs together",
                            formatter_class=defaults)
    p.add_argument("runs", type=Path, nargs="+", help="folders of runs that differ in the seed")
    p.add_argument("--json", type=Path, help="file for the figures")
    p = commands.add_parser("dial", help="verified captions against their threshold",
                            formatter_class=defaults)
    p.add_argument("runs", type=Path, nargs="+", help="folders of runs that differ in the seed")
    p.add_argument("--json", type=Path, help="file for the figures")
    p = commands.add_parser("pretrain", help="train the toy base", formatter_class=defaults)
    p.add_argument("--out", type=Path, default=Path("out/toy-base"), help="folder of the base")
    add_world(p, "that of a folder to resume in, or else easy")
    p.add_argument("--like", choices=("qwen_vl", "qwen3_vl"), default="qwen_vl",
                   help="architecture: that of model.py, or transformers' Qwen3-VL")
    p.add_argument("--steps", type=int, default=6000, help="optimizer steps")
    p.add_argument("--batch", type=int, default=32, help="images per step")
    p.add_argument("--questions", type=int, default=8, help="yes/no questions per image")
    p.add_argument("--loose", type=float, default=0.0,
                   help="share of rings that captions, not answers, call circles")
    p.add_argument("--lr", type=float, default=0.0025, help="peak learning rate of Muon (matrices)")
    p.add_argument("--adam-lr", type=float, default=1e-3,
                   help="peak learning rate of AdamW (everything else)")
    p.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    p.add_argument("--seed", type=int, default=0, help="of the weights and the scenes")
    p = commands.add_parser("report", help="what a base sees and invents", formatter_class=defaults)
    p.add_argument("--base", default="assets/toy", help="folder of the base")
    add_world(p)
    p.add_argument("--scenes", type=int, default=500, help="unseen scenes")
    p.add_argument("--seed", type=int, default=0, help="of the scenes")
    p = commands.add_parser("int8", help="what int8 weights change", formatter_class=defaults)
    quantised.add_flags(p)
    p = commands.add_parser("scenes", help="draw scenes, with truth, captions and questions",
                            formatter_class=defaults)
    p.add_argument("--out", type=Path, default=Path("out/scenes"), help="folder of the pictures")
    add_world(p, "easy")
    p.add_argument("--n", type=int, default=100, help="scenes")
    p.add_argument("--seed", type=int, default=0, help="of the scenes")


# ---------------------------------------------------------------- the loop
def check_same(out, args, *names):
    """Keep the named arguments in out/arguments.json; InputError where the folder holds a run with
    others.

    commands.jsonl does not see them all: no command names the number of scenes. And this check
    refuses a folder before anything in it changes.
    """
    path = out / "arguments.json"
    arguments = {name: str(getattr(args, name)) for name in names}
    if "base" in arguments:
        arguments["base"] = os.path.realpath(args.base)
    kept = json.loads(path.read_text("utf-8")) if path.is_file() else arguments
    kept = {"world": "easy"} | kept         # runs from before --world
    for name in names:
        if kept.get(name, arguments[name]) != arguments[name]:
            raise InputError(f"{out}: holds a run with another --{name.replace('_', '-')} "
                             f"({kept.get(name)}, now {arguments[name]}); delete it or give "
                             "another --out")
    files.write_json(path, arguments)


def loop(args):
    """SFT and rounds of QA adapter, golden samples and preference training; with --no-data the
    rounds alone. Each captioner is evaluated."""
    out, seed = args.out, ("--seed", args.seed)
    args.world = worlds.name_of(args.base, args.world)
    draw_scenes = worlds.WORLDS[args.world].draw_scenes
    check_same(out, args, "base", "world", "no_data", "captions", "images", "held_out", "samples",
               "threshold", "seed")
    kept_from = ("--threshold", args.threshold) if args.threshold is not None else (
        BARE_GOLDEN if args.no_data else ())
    run = Loop(out, args.processes)
    with_captions = f"{args.captions} with captions, " if not args.no_data else ""
    run.progress(f"drawing scenes: {with_captions}{args.images} without for each of {args.rounds} "
                 f"rounds, {args.held_out} for evaluation")
    held_out, truth = make_split(out, "held-out", args.held_out, args.seed, (), draw_scenes)
    asked = BARE if args.no_data else ()
    results = {"base": run.judge("base", held_out, truth, "--base", args.base,
                                 "--adapters", "none", *asked, seed=args.seed)}
    captioner, train = None, None
    if not args.no_data:
        train, _ = make_split(out, "train", args.captions, args.seed, ("captions", "questions"),
                              draw_scenes)
        captioner = out / "sft"
        run.sft(args.base, train, captioner, *seed)
        results["sft"] = run.judge("sft", held_out, truth, "--adapters", captioner, seed=args.seed)
    for k in range(1, args.rounds + 1):
        images, golden_truth = make_split(out, f"images-{k}", args.images, args.seed, (),
                                          draw_scenes)
        golden, trained = (out / f"{name}-{k}" for name in ("golden", "dpo"))
        qa = None if args.no_data else out / f"qa-{k}"
        if qa:
            run.qa(captioner, train, qa, *seed)
        bare = () if captioner else ("--base", args.base)
        run.golden(captioner or "none", qa or "none", images, golden, *bare,
                   *(() if captioner else BARE), *kept_from,
                   "--samples", args.samples, *seed)
        results[f"golden{k}"] = run.judge_golden(f"golden-{k}", golden, golden_truth)
        run.dpo(captioner or "none", golden, trained, *(() if qa else BARE_DPO), *bare,
                *(LATER if k > 1 else ()), *seed)
        captioner = trained
        results[f"round{k}"] = run.judge(f"round-{k}", held_out, truth, "--adapters", captioner,
                                         seed=args.seed)
    run.progress("judged")
    finish(args, results, held_out, truth)


def finish(args, results, held_out, truth):
    """Write results.json, sheet.png and the name of the best captioner; print the table and the
    gain of each round."""
    out = args.out
    for name, figures in results.items():
        if name.startswith("golden"):
            results[name] = {"sampled": figures["golden"], "single": figures["sample"],
                             "union": figures["combined"], "gate": figures["gate"]}
    files.write_json(out / "results.json", results)
    print("\n" + "\n".join(table(results)) + "\n")
    start = "base" if args.no_data else "sft"
    files.write_json(out / "gains.json", all_gains([out], start, args.rounds))
    folders = {} if args.no_data else {"sft": out / "sft"}
    folders |= {f"round{k}": out / f"dpo-{k}" for k in range(1, args.rounds + 1)}
    best = folders[max(folders, key=lambda name: both_f1(results[name]))]
    best_file = out.parent / "best.txt"
    with files.whole(best_file) as temporary:
        temporary.write_text(f"{os.path.relpath(best, out.parent)}\n", "utf-8")
    k = max(range(1, args.rounds + 1), key=lambda k: both_f1(results[f"round{k}"]))
    sheet(out, held_out, truth, start, f"round-{k}")
    print(f"best: {best}, which {best_file} names for caption.py. Captions before and after: "
          f"{out}/sheet.png. Statements confirmed and refused: {out}/golden-1/index.html")


def both_f1(figures):
    """Greedy + sampled F1; captions without statements, which have no F1, count 0."""
    return (figures["greedy"]["f1"] or 0) + (figures["sampled"]["f1"] or 0)


# ---------------------------------------------------------------- results, for the reader
RARE_COLUMNS = {"rare_precision": "rare P", "rare_recall": "rare R"}     # of the hard world
COLUMNS = {"precision": "P", "recall": "R", "f1": "F1", "detail_precision": "detail P",
           "detail_recall": "detail R", "planted": "planted", "eos": "ends", "repeat": "repeats",
           "statements": "statements"}


def table(results):
    """Lines of the table: a row per captioner and way of decoding, three per golden file, and a
    line per gate."""
    has_rare = any("rare_recall" in figures for ways in results.values()
                   for figures in ways.values())
    columns = COLUMNS | RARE_COLUMNS if has_rare else COLUMNS
    rows = [["", "", *columns.values()]]
    for name, ways in results.items():
        for way, figures in ways.items():
            if way == "gate":
                continue
            label = "golden" if name.startswith("golden") and way == "sampled" else way
            rows.append([name, label, *(cell(figures.get(key), key) for key in columns)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, way, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[2:])]
        yield "  ".join([name.ljust(widths[0]), way.ljust(widths[1]), *padded])
    for name, ways in results.items():
        if "gate" in ways:
            gate = ways["gate"]
            precision, recall, true = (cell(gate[key], key)
                                       for key in ("precision", "recall", "base_rate"))
            yield (f"{name}: the gate has a precision of {precision} and a recall of {recall}; "
                   f"{true} of its statements are true")


def cell(value, key):
    if value is None:
        return "-"
    return f"{value:.1f}" if key == "statements" else f"{value:.3f}"


def read_captions(out, name, way):
    return toy_rows(out / f"captions/{name}-{way}.jsonl")


def gains(runs, before, after):
    """The change of precision, recall and F1 between two captioners, with 95 % intervals.

    {"greedy" | "sampled": {metric: [change, low, high]}}, over the scenes of all runs.
    """
    changes = {}
    for way in ("greedy", "sampled"):
        files = [[run / f"captions/{name}-{way}.jsonl" for run in runs] for name in (before, after)]
        files.append([run / "truth/held-out.jsonl" for run in runs])
        captions, new_captions, truth = map(rows_of_runs, files)
        changes[way] = {metric: scoring.difference(captions, new_captions, truth, metric)
                        for metric in ("precision", "recall", "f1")}
    return changes


def all_gains(runs, start, rounds):
    """`gains` of each round on the captioner before, printed as well: {"round1": …, …}."""
    before, changes = start, {}
    for k in range(1, rounds + 1):
        after = f"round-{k}"
        changes[f"round{k}"] = gains(runs, before, after)
        print(f"round {k} against {before.replace('-', ' ')}: {in_words(changes[f'round{k}'])}")
        before = after
    return changes


def pool(args):
    """Print the mean table of several runs and the gains over all their scenes, and write both."""
    for run in args.runs:
        if not (run / "results.json").is_file():
            raise InputError(f"{run}: no results.json in it; let the run finish first")
    each = {str(run): json.loads((run / "results.json").read_text("utf-8")) for run in args.runs}
    results = mean_of(list(each.values()))
    print("\n" + "\n".join(table(results)) + "\n")
    rounds = sum(name.startswith("round") for name in results)
    changes = all_gains(args.runs, "sft" if "sft" in results else "base", rounds)
    if args.json:
        files.write_json(args.json, {"mean": results, "gains": changes, "each": each})


def mean_of(values):
    """The mean of equal trees of numbers, of those that are there."""
    if isinstance(values[0], dict):
        return {key: mean_of([value.get(key) for value in values if value]) for key in values[0]}
    numbers = [value for value in values if isinstance(value, int | float)]
    return sum(numbers) / len(numbers) if numbers else None


def in_words(changes):
    """What `gains` found, on one line."""
    return ", ".join(f"{way} {COLUMNS[metric]} {change:+.3f} [{low:+.3f}, {high:+.3f}]"
                     for way, metrics in changes.items()
                     for metric, (change, low, high) in metrics.items())


PICTURE, TEXT_WIDTH, LINE, MARGIN = 192, 744, 20, 8         # pixels of the sheet
WRAP = 105                                                  # characters


def sheet(out, images, truth, before, after, n=8):
    """sheet.png: the first n held-out scenes with a sampled caption of two captioners. Wrong
    statements are red, missing facts grey."""
    rows = sorted(toy_rows(truth), key=lambda row: row["image"])[:n]
    captions = {label: {row["image"]: world.statements(row["caption"])
                        for row in read_captions(out, label, "sampled")}
                for label in (before, after)}
    height = PICTURE + 2 * MARGIN
    width = PICTURE + TEXT_WIDTH + 3 * MARGIN
    canvas = Image.new("RGB", (width, n * height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for k, row in enumerate(rows):
        y = k * height + MARGIN
        picture = open_image(images / row["image"]).resize((PICTURE, PICTURE), Image.NEAREST)
        canvas.paste(picture, (MARGIN, y))
        for label in (before, after):
            stated = captions[label].get(row["image"], [])
            for line, color in caption_lines(label, stated, row):
                pen.text((PICTURE + 3 * MARGIN, y), line, fill=color, font=font)
                y += LINE
            y += LINE // 2
    with files.whole(out / "sheet.png") as temporary:
        canvas.save(temporary, "PNG")


def caption_lines(label, stated, row):
    """A caption's statements against a truth row, as lines and their colours."""
    facts = [fact["text"] for fact in row["facts"]]
    true = [text for text in stated if text in facts or text in row["also_true"]]
    wrong = [f"wrong: {text}" for text in stated if text not in true]
    missing = [text for text in facts if text not in stated]
    parts = [(f"{label}:", "#888888"), (", ".join(true), "black"), (", ".join(wrong), "#c02020")]
    if missing:
        parts.append((f"missing: {', '.join(missing)}", "#999999"))
    return [(line, color) for text, color in parts for line in textwrap.wrap(text, WRAP)]


# ---------------------------------------------------------------- main
def pretrain(args):
    """Train the toy base, or resume its training."""
    args.world = worlds.name_of(args.out, args.world)
    check_same(args.out, args, "world", "like", "steps", "batch", "questions", "loose", "lr",
               "adam_lr", "seed")
    base.pretrain(args)


def report(args):
    """Print what a base sees and invents."""
    args.world = worlds.name_of(Path(args.base), args.world)
    base.report(args)


def scenes(args):
    """Draw scenes, and write their truth, captions and questions to the same folder."""
    draw_scenes = worlds.WORLDS[args.world or "easy"].draw_scenes
    rows_of = draw_scenes(args.out, [f"scenes {args.seed} {i}" for i in range(args.n)])
    for kind, rows in rows_of.items():
        world.write_rows(args.out / f"{kind}.jsonl", rows, args.out)


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    commands = {None: loop, "pool": pool, "claims": claims.main, "pretrain": pretrain,
                "report": report, "scenes": scenes, "dial": dial.dial,
                "int8": quantised.quantised}
    try:
        commands[args.command](args)
    except InputError as error:
        print(f"toy.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
