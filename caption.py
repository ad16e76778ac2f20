"""Captions of images: the product.

READS   images; a base (Hub name or folder); an adapter folder, if there is one
WRITES  captions to stdout, as text or JSON lines; what was used and what went wrong to stderr

    python caption.py img.jpg                           # Qwen/Qwen-VL, newest adapters under out/
    python caption.py --base assets/toy assets/toy/examples/*.png
    python caption.py photos/ --n 4 --temperature 1 --jsonl > captions.jsonl
"""
import argparse
import functools
import json
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import adapters
from base import open_base
from chunking import LAYOUTS, seen_by
from generate import MOST_AT_ONCE, images_at_once, room_left, sample
from plumbing import arguments, data
from plumbing.errors import InputError
from plumbing.images import find_images
from plumbing.texts import without_loop

DEFAULT_BASE = "Qwen/Qwen-VL"


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = p.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, or folders to search for images")
    add("--base", help=f"Hub name or folder (default: the adapters' base, else {DEFAULT_BASE})")
    add("--adapters", help="folder of a training stage, or none (default: the folder that "
        "out/best.txt names, else the newest out/dpo*, else out/sft, else none)")
    add("--views", choices=tuple(LAYOUTS), help="views of an image; must be those that the "
        "adapters were trained with (default: those, else six)")
    add("--jsonl", action="store_true", help="print JSON objects: image, caption, finish, tokens; "
        "or error")
    add("--n", type=arguments.count, default=1, help="captions per image (default: 1)")
    add("--temperature", type=arguments.not_negative, default=0.0, help="of sampling (default: 0, "
        "the likeliest token)")
    add("--top-p", type=arguments.share, default=1.0, help="sample from the likeliest tokens that "
        "hold this share of the probability (default: 1, all)")
    add("--seed", type=int, default=0, help="of sampling (default: 0)")
    add("--max-new-tokens", type=arguments.count, help="longest caption, in tokens (default: what "
        "the context leaves)")
    add("--past-context", action="store_true", help="let --max-new-tokens go beyond the context")
    add("--batch", type=arguments.count, help="images at once (default: what memory allows, at "
        f"most {MOST_AT_ONCE})")
    add("--workers", type=arguments.count_or_none, default=arguments.DECODERS,
        help="processes that decode images ahead of the device (default: 2 with a GPU, else 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--dtype", choices=tuple(arguments.DTYPES),
        help="of the weights (default: bfloat16 on a GPU, float32 on the CPU)")
    arguments.add_caption_prompt(p)
    args = p.parse_args(argv)
    if not all(args.images):
        p.error("an image's name is empty")
    if args.n > 1 and args.temperature == 0:
        p.error("--n above 1 needs --temperature above 0: at 0 all captions of an image are equal")
    if args.past_context and args.max_new_tokens is None:
        p.error("--past-context needs --max-new-tokens")
    return args


# ---------------------------------------------------------------- what to caption, and with what
def default_adapters(out=Path("out")):
    """The folder that out/best.txt names, else the newest out/dpo*, else out/sft, else None."""
    if (out / "best.txt").is_file():
        best = Path((out / "best.txt").read_text(encoding="utf-8", errors="replace").strip())
        for folder in (best, out / best):
            if (folder / "adapters.json").is_file():
                return folder
        raise InputError(f"{out / 'best.txt'} names {str(best)!r}, which is not an adapter folder; "
                         "correct it, or give --adapters")
    rounds = [p for p in out.glob("dpo*") if (p / "adapters.json").is_file()]
    if rounds:
        return max(rounds, key=lambda p: (p / "adapters.json").stat().st_mtime)
    return out / "sft" if (out / "sft/adapters.json").is_file() else None


def load_model(args):
    """The base with its adapters, as the arguments say -> model, boxes of the views.

    What is used goes to stderr.
    """
    folder = None if args.adapters == "none" else args.adapters or default_adapters()
    card = adapters.read_card(folder) if folder else {"base": DEFAULT_BASE}
    base = args.base or card["base"]
    model = open_base(base, arguments.DTYPES.get(args.dtype), args.device,
                      caption_prompt=args.caption_prompt)
    if folder and not args.adapters and card["fingerprint"] != model.fingerprint:
        folder = None               # the default folder, but of another base than the one asked for
    boxes = adapters.views_of(folder, args.views)
    if folder and args.caption_prompt:
        raise InputError(f"--caption-prompt: the adapters in {folder} remember theirs; leave it "
                         "out, or give --adapters none")
    if folder:
        adapters.load(model, folder)
    used = f"adapters {folder}" if folder else "no adapters, its own caption prompt"
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"base {base}, {used}, {dtype} on {args.device}", file=sys.stderr)
    return model, boxes


# ---------------------------------------------------------------- captions
def look(model, boxes, image):
    """(path, name) of an image -> what the model sees of it; in a worker process."""
    path, _ = image
    return seen_by(model, path, boxes)


def caption_batch(model, args, batch):
    """Caption pairs ((path, name), what `look` gave, or InputError) -> for each, its results.

    Results are captions {"caption", "finish", "tokens"}, or one {"error"}.
    """
    good = [(name, views) for (_, name), views in batch if not isinstance(views, InputError)]
    names, seen = zip(*good) if good else ((), ())
    captions = iter(sample(model, seen, names, args.n, args.max_new_tokens, args.temperature,
                           args.top_p, args.seed, args.past_context))
    return [[{"error": str(views)}] if isinstance(views, InputError) else next(captions)
            for _, views in batch]


def show(args, path, result, several):
    """One caption to stdout, an error to stderr; both on one line, and above the progress bar."""
    if "error" in result:
        tqdm.write(f"caption.py: {result['error']}", file=sys.stderr)
    if args.jsonl:
        line = json.dumps({"image": str(path), **result}, ensure_ascii=False)
        tqdm.write(line, file=sys.stdout)
    elif "error" not in result:
        name = str(path) if str(path).isprintable() else repr(str(path))
        text = one_line(result)
        tqdm.write(f"{name}: {text}" if several else text, file=sys.stdout)
    sys.stdout.flush()


def one_line(result):
    """A caption as a person reads it: a loop once, no line breaks, nothing unprintable."""
    text = result["caption"]
    if result["finish"] == "repeat":
        text = without_loop(text)
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return text.rstrip(" ,")


def caption_all(model, args, images, boxes, at_once):
    """Caption [(path, name)], decoded ahead of the device, and show the results -> failures."""
    make = functools.partial(look, model, boxes)
    bad = 0
    quiet = True if len(images) <= at_once else None        # None: a bar where stderr is a terminal
    with tqdm(total=len(images), unit="image", disable=quiet) as bar:
        for batch in data.ahead(images, make, args.workers, at_once):
            for ((path, _), _), results in zip(batch, caption_batch(model, args, batch)):
                for result in results:
                    show(args, path, result, len(images) > 1)
                bad += "error" in results[0]
            bar.update(len(batch))
    return bad


# ---------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):      # a file name need not be text
        sys.stdout.reconfigure(encoding="utf-8" if args.jsonl else None, errors="backslashreplace")
    try:
        images = find_images(args.images)
        model, boxes = load_model(args)
        room = room_left(model, len(boxes), args.max_new_tokens, args.past_context)
        at_once = args.batch or images_at_once(model, len(boxes), args.n, room)
        return 1 if caption_all(model, args, images, boxes, at_once) else 0
    except InputError as error:
        print(f"caption.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:             # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
