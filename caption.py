"""Captions of images: the product.

READS   images; a base (Hub name or folder); an adapter folder, if there is one
WRITES  captions to stdout, as text or JSON lines; what was used and what went wrong to stderr

    python caption.py img.jpg                               # Qwen/Qwen-VL, with the newest adapters under out/
    python caption.py --base assets/toy assets/toy/examples/*.png
    python caption.py photos/ --n 4 --temperature 1 --jsonl > captions.jsonl
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import adapters
from chunking import BOXES, views
from generate import MOST_AT_ONCE, images_at_once, room_left, sample, without_loop
from model import QwenVL
from plumbing.errors import InputError
from plumbing.images import find_images, open_image

DEFAULT_BASE = "Qwen/Qwen-VL"


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders to search for images")
    p.add_argument("--base", help=f"Hub name or folder of the base (default: the adapters' own, else {DEFAULT_BASE})")
    p.add_argument("--adapters", help="folder of a training stage, or none (default: the folder that out/best.txt "
                   "names, else the newest out/dpo*, else out/sft, else none)")
    p.add_argument("--jsonl", action="store_true", help="print JSON objects: image, caption, finish, tokens; or error")
    p.add_argument("--n", type=int, default=1, help="captions per image (default: 1)")
    p.add_argument("--temperature", type=float, default=0.0, help="of sampling (default: 0, the likeliest token)")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that hold this share of "
                   "the probability (default: 1, all)")
    p.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    p.add_argument("--max-new-tokens", type=int, help="longest caption, in tokens (default: what the context leaves)")
    p.add_argument("--past-context", action="store_true", help="let --max-new-tokens go beyond the trained context")
    p.add_argument("--batch", type=int, help=f"images at once (default: what memory allows, at most {MOST_AT_ONCE})")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                   help="of the weights (default: bfloat16 on a GPU, float32 on the CPU)")
    args = p.parse_args(argv)
    if not all(args.images):
        p.error("an image's name is empty")
    if args.n > 1 and args.temperature == 0:
        p.error("--n above 1 needs --temperature above 0: at 0 all captions of an image are the same")
    for wrong, rule in (
            (args.n < 1, "--n must be at least 1"),
            (not 0 <= args.temperature < math.inf, "--temperature must be a number from 0 up"),
            (not 0 < args.top_p <= 1, "--top-p must be above 0 and at most 1"),
            (args.max_new_tokens is not None and args.max_new_tokens < 1, "--max-new-tokens must be at least 1"),
            (args.past_context and args.max_new_tokens is None, "--past-context needs --max-new-tokens"),
            (args.batch is not None and args.batch < 1, "--batch must be at least 1")):
        if wrong:
            p.error(rule)
    return args


# ---------------------------------------------------------------- what to caption, and with what
def default_adapters(out=Path("out")):
    """The folder that out/best.txt names, else the newest out/dpo*, else out/sft, else None."""
    if (out / "best.txt").is_file():
        best = Path((out / "best.txt").read_text(encoding="utf-8", errors="replace").strip())
        for folder in (best, out / best):
            if (folder / "adapters.json").is_file():
                return folder
        raise InputError(f"{out / 'best.txt'} names {str(best)!r}, which is no adapter folder; mend it, or give "
                         "--adapters")
    trained = [p for p in (*out.glob("dpo*"), out / "sft") if (p / "adapters.json").is_file()]
    rounds = [p for p in trained if p.name != "sft"]
    return max(rounds, key=lambda p: (p / "adapters.json").stat().st_mtime, default=trained[0] if trained else None)


def load_model(args):
    """The base with its adapters, as the arguments say; what is used goes to stderr."""
    folder = None if args.adapters == "none" else args.adapters or default_adapters()
    card = adapters.read_card(folder) if folder else {"base": DEFAULT_BASE}
    base = args.base or card["base"]
    model = QwenVL.from_pretrained(base, getattr(torch, args.dtype) if args.dtype else None, args.device)
    if folder and not args.adapters and card["fingerprint"] != model.fingerprint:
        folder = None                           # found, not asked for, and of another base than the one asked for
    if folder:
        adapters.load(model, folder)
    print(f"base {base}, {f'adapters {folder}' if folder else 'no adapters, its own caption prompt'}, "
          f"{str(model.lm_head.weight.dtype).removeprefix('torch.')} on {args.device}", file=sys.stderr)
    return model


# ---------------------------------------------------------------- captions
def show(args, path, result, several):
    """One caption to stdout, an error to stderr; both on one line, and above the progress bar."""
    if "error" in result:
        tqdm.write(f"caption.py: {result['error']}", file=sys.stderr)
    if args.jsonl:
        tqdm.write(json.dumps({"image": str(path), **result}, ensure_ascii=False), file=sys.stdout)
    elif "error" not in result:
        text = without_loop(result["caption"]) if result["finish"] == "repeat" else result["caption"]
        text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split())).rstrip(" ,")
        name = str(path) if str(path).isprintable() else repr(str(path))
        tqdm.write(f"{name}: {text}" if several else text, file=sys.stdout)
    sys.stdout.flush()


def caption_batch(model, args, batch, size):
    """Caption [(path, name)] -> for each the list of its results: captions, or one {"error"}."""
    outcome, good = [None] * len(batch), []
    for i, (path, name) in enumerate(batch):
        try:
            good.append((i, name, views(open_image(path), size)))
        except InputError as error:
            outcome[i] = [{"error": str(error)}]
    if good:
        at, names, pixels = zip(*good)
        results = sample(model, torch.stack(pixels), names, args.n, args.max_new_tokens, args.temperature, args.top_p,
                         args.seed, args.past_context)
        for i, rows in zip(at, results):
            outcome[i] = rows
    return outcome


def main(argv=None):
    args = parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):      # a file name need not be text
        sys.stdout.reconfigure(encoding="utf-8" if args.jsonl else None, errors="backslashreplace")
    try:
        images = find_images(args.images)
        model = load_model(args)
        size = model.config.visual.image_size
        room = room_left(model, len(BOXES), args.max_new_tokens, args.past_context)
        at_once = args.batch or images_at_once(model, len(BOXES), args.n, room)
    except InputError as error:
        print(f"caption.py: {error}", file=sys.stderr)
        return 1
    bad = 0
    with tqdm(total=len(images), unit="image", disable=None if len(images) > at_once else True) as bar:
        for first in range(0, len(images), at_once):
            batch = images[first:first + at_once]
            try:
                outcome = caption_batch(model, args, batch, size)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "memory" not in str(error):
                    raise
                print(f"caption.py: {args.device} is out of memory with {len(batch)} images × {args.n} captions; "
                      "try a smaller --batch, --n or --max-new-tokens", file=sys.stderr)
                return 1
            for (path, _), results in zip(batch, outcome):
                for result in results:
                    show(args, path, result, len(images) > 1)
                bad += "error" in results[0]
            bar.update(len(batch))
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:             # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
