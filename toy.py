"""The method on a laptop: the whole loop through the real scripts, in a synthetic world whose truth is known.

READS   assets/toy, a small Qwen-VL that was pre-trained on this world
WRITES  out/toy: data, a folder per stage, commands.jsonl, results.json, sheet.png; out/best.txt: the best captioner

    python toy.py                               # SFT, then two rounds; ten to fifteen minutes on two cores
    python toy.py --rounds 3 --processes 2      # three rounds, each stage under torchrun
    python toy.py claims --only rounds          # test what the source claims, several seeds each (toy_claims.py)
    python toy.py pretrain                      # the base in assets/toy; about an hour on two cores
    python toy.py report --base assets/toy      # what that base sees, and what it invents, on unseen scenes
    python toy.py scenes --out out/scenes       # pictures of the world, with their truth

Every stage is a command, printed as one would type it. Stopped and started again, it goes on where it was. The truth of
the held-out images lies in a folder of its own, which evaluate.py alone is given.
"""
import argparse
import json
import os
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from plumbing import scoring
from plumbing.errors import InputError
from plumbing.images import open_image
from plumbing.train import write_whole
from toy_world import base, claims, world
from toy_world.steps import CODE, LATER, Loop, make_split, toy_rows


def parse_args(argv):
    plain = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=plain)
    parser.add_argument("--out", type=Path, default=Path("out/toy"), help="folder to write, and to go on from")
    parser.add_argument("--base", type=Path, default=Path(os.path.relpath(CODE / "assets/toy")), help="the toy base")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of QA adapter, golden samples and DPO")
    parser.add_argument("--captions", type=int, default=3000, help="scenes with a caption, for SFT, and questions")
    parser.add_argument("--images", type=int, default=8000, help="unlabelled scenes per round")
    parser.add_argument("--held-out", type=int, default=500, help="scenes to judge captions by")
    parser.add_argument("--samples", type=int, default=6, help="captions per unlabelled scene")
    parser.add_argument("--processes", type=int, default=1, help="processes per stage, under torchrun if several")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of all stages")
    commands = parser.add_subparsers(dest="command", metavar="claims | pretrain | report | scenes")
    p = commands.add_parser("claims", help="test what the source claims", formatter_class=plain)
    claims.add_flags(p)
    p = commands.add_parser("pretrain", help="train the toy base", formatter_class=plain)
    p.add_argument("--out", type=Path, default=Path("out/toy-base"), help="folder of the base")
    p.add_argument("--steps", type=int, default=6000, help="optimizer steps")
    p.add_argument("--batch", type=int, default=32, help="images per step")
    p.add_argument("--questions", type=int, default=8, help="yes/no questions per image")
    p.add_argument("--lr", type=float, default=0.0025, help="peak learning rate of Muon, for matrices")
    p.add_argument("--adam-lr", type=float, default=1e-3, help="peak learning rate of AdamW, for all else")
    p.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    p.add_argument("--seed", type=int, default=0, help="of the weights and the scenes")
    p = commands.add_parser("report", help="what a base sees and invents", formatter_class=plain)
    p.add_argument("--base", default="assets/toy", help="folder of the base")
    p.add_argument("--scenes", type=int, default=500, help="unseen scenes")
    p.add_argument("--seed", type=int, default=0, help="of the scenes")
    p = commands.add_parser("scenes", help="draw scenes, with truth, captions, questions", formatter_class=plain)
    p.add_argument("--out", type=Path, default=Path("out/scenes"), help="folder of the pictures and truth.jsonl")
    p.add_argument("--n", type=int, default=100, help="scenes")
    p.add_argument("--seed", type=int, default=0, help="of the scenes")
    args = parser.parse_args(argv)
    if args.command and argv[0] != args.command:
        parser.error(f"{argv[0]}: flags of {args.command} stand after it")
    for name in ("rounds", "captions", "images", "held_out", "samples", "processes", "steps", "batch", "questions",
                 "save_every", "scenes", "n"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


# ---------------------------------------------------------------- the loop
def check_same(out, args, *kept):
    """InputError where a folder holds a run in which the arguments named in `kept` were others; else remember these."""
    mine, path = {key: str(getattr(args, key)) for key in kept}, out / "arguments.json"
    if "base" in mine:
        mine["base"] = os.path.realpath(args.base)
    old = json.loads(path.read_text("utf-8")) if path.is_file() else mine
    for key in kept:
        if old.get(key) != mine[key]:
            raise InputError(f"{out}: holds a run with another --{key.replace('_', '-')} ({old.get(key)}, now "
                             f"{mine[key]}); delete it or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(mine), "utf-8"))


def loop(args):
    """SFT, then rounds of QA adapter, golden samples and preference training; each captioner judged; the table."""
    out = args.out
    check_same(out, args, "base", "captions", "images", "held_out", "samples", "seed")
    run, seed = Loop(out, args.processes), ("--seed", args.seed)
    run.tell(f"drawing scenes: {args.captions} with captions, {args.images} without for each of {args.rounds} rounds, "
             f"{args.held_out} to judge by")
    train, _ = make_split(out, "train", args.captions, args.seed, ("captions", "questions"))
    held_out, truth = make_split(out, "held-out", args.held_out, args.seed, ())
    results = {"base": run.judge("base", held_out, truth, "--base", args.base, "--adapters", "none", seed=args.seed)}
    captioner = out / "sft"
    run.sft(args.base, train, captioner, *seed)
    results["sft"] = run.judge("sft", held_out, truth, "--adapters", captioner, seed=args.seed)
    for k in range(1, args.rounds + 1):
        images, golden_truth = make_split(out, f"images-{k}", args.images, args.seed, ())
        qa, golden, trained = (out / f"{name}-{k}" for name in ("qa", "golden", "dpo"))
        run.qa(captioner, train, qa, *seed)
        run.golden(captioner, qa, images, golden, "--samples", args.samples, *seed)
        results[f"golden{k}"] = run.judge_golden(f"golden-{k}", golden, golden_truth)
        run.dpo(captioner, golden, trained, *(LATER if k > 1 else ()), *seed)
        captioner = trained
        results[f"round{k}"] = run.judge(f"round-{k}", held_out, truth, "--adapters", captioner, seed=args.seed)
    run.tell("judged")
    finish(args, results, held_out, truth)


def finish(args, results, held_out, truth):
    """results.json, the table, what the rounds gained, the picture sheet, and the best captioner's name."""
    out = args.out
    for name in [name for name in results if name.startswith("golden")]:
        found = results[name]
        results[name] = {"sampled": found["golden"], "single": found["sample"], "union": found["combined"],
                         "gate": found["gate"]}
    write_whole(out / "results.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n", "utf-8"))
    print("\n" + "\n".join(table(results)) + "\n")
    for k in range(1, args.rounds + 1):
        before = "sft" if k == 1 else f"round-{k - 1}"
        print(f"round {k} against {before.replace('-', ' ')}: " + gains(out, before, f"round-{k}", truth))
    folders = {"sft": out / "sft", **{f"round{k}": out / f"dpo-{k}" for k in range(1, args.rounds + 1)}}
    # captions that say nothing have no F1
    best = max(folders, key=lambda name: sum(results[name][way]["f1"] or 0 for way in ("greedy", "sampled")))
    named = out.parent / "best.txt"
    write_whole(named, lambda path: path.write_text(f"{os.path.relpath(folders[best], out.parent)}\n", "utf-8"))
    sheet(out, held_out, truth, "sft", f"round-{args.rounds}")
    print(f"best: {folders[best]}, named in {named} for caption.py. Before and after: {out}/sheet.png. What was "
          f"confirmed and what refused: {out}/golden-1/index.html")


COLUMNS = {"precision": "P", "recall": "R", "f1": "F1", "detail_precision": "detail P", "detail_recall": "detail R",
           "planted": "planted", "eos": "ends", "repeat": "repeats", "statements": "statements"}


def table(results):
    """Lines of the table: a row for each captioner and way of decoding, and for each round's golden samples."""
    def text(value, key):
        return "-" if value is None else f"{value:.1f}" if key == "statements" else f"{value:.3f}"
    rows = [["", "", *COLUMNS.values()]]
    for name, ways in results.items():
        for way, figures in ways.items():
            if way != "gate":
                shown = {"sampled": "golden"}.get(way, way) if name.startswith("golden") else way
                rows.append([name, shown, *(text(figures[key], key) for key in COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    yield from ("  ".join(cell.ljust(width) if k < 2 else cell.rjust(width)
                          for k, (cell, width) in enumerate(zip(row, widths))) for row in rows)
    for name, ways in results.items():
        if "gate" in ways:
            yield (f"{name}: of what the gate kept {ways['gate']['precision']:.3f} was true, of what is true it kept "
                   f"{ways['gate']['recall']:.3f}; before it {ways['gate']['base_rate']:.3f} was true")


def read_captions(out, name, way):
    return toy_rows(out / f"captions/{name}-{way}.jsonl")


def gains(out, before, after, truth):
    """How precision, recall and F1 changed from one captioner to another, with 95 % intervals."""
    rows, parts = toy_rows(truth), []
    for way in ("greedy", "sampled"):
        for name in ("precision", "recall", "f1"):
            change, low, high = scoring.difference(read_captions(out, before, way), read_captions(out, after, way),
                                                    rows, name)
            parts.append(f"{way} {COLUMNS[name]} {change:+.3f} [{low:+.3f}, {high:+.3f}]")
    return ", ".join(parts)


def sheet(out, images, truth, before, after, n=8):
    """sheet.png: the first held-out scenes with captions sampled before and after; wrong statements red, facts that are
    not told grey."""
    known = {row["image"]: row for row in toy_rows(truth)}
    said = [{row["image"]: world.statements(row["caption"]) for row in read_captions(out, name, "sampled")}
            for name in (before, after)]
    side, width, line = 192, 960, 20
    font = ImageFont.load_default(15)
    canvas = Image.new("RGB", (width, n * (side + 16)), "white")
    pen = ImageDraw.Draw(canvas)
    for k, name in enumerate(sorted(known)[:n]):
        facts, also = [fact["text"] for fact in known[name]["facts"]], known[name]["also_true"]
        y = top = k * (side + 16) + 8
        canvas.paste(open_image(images / name).resize((side, side), Image.NEAREST), (8, top))
        for label, captions in zip((before, after), said):
            told = captions.get(name, [])
            right, wrong = ([s for s in told if (s in facts or s in also) == side] for side in (True, False))
            missing = [fact for fact in facts if fact not in told]
            for text, color in ((f"{label}:", "#888888"), (", ".join(right), "black"),
                                (", ".join(f"wrong: {s}" for s in wrong), "#c02020"),
                                (f"not told: {', '.join(missing)}" if missing else "", "#999999")):
                for part in textwrap.wrap(text, 105):
                    pen.text((side + 24, y), part, fill=color, font=font)
                    y += line
            y += line // 2
    write_whole(out / "sheet.png", lambda path: canvas.save(path, "PNG"))


# ---------------------------------------------------------------- main
def pretrain(args):
    """Train the toy base, or go on with it."""
    check_same(args.out, args, "steps", "batch", "questions", "lr", "adam_lr", "seed")
    base.pretrain(args)


def scenes(args):
    """Draw scenes, and write what is known of them beside."""
    for kind, rows in world.draw_scenes(args.out, [f"scenes {args.seed} {i}" for i in range(args.n)]).items():
        world.write_rows(args.out / f"{kind}.jsonl", rows, args.out)


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    commands = {None: loop, "claims": claims.main, "pretrain": pretrain, "report": base.report,
                "scenes": scenes}
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
