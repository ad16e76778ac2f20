"""Flags: numbers that are checked where they are parsed, and those that every training stage
has."""
import argparse
import math
import os
from pathlib import Path

import torch

from plumbing import int8
from plumbing.compiled import WORTH_COMPILING

# Processes that decode images ahead of a GPU; without one they would compete with the model.
DECODERS = 2 if torch.cuda.is_available() else 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---------------------------------------------------------------- types
def checked(kind, text, allowed, rule):
    """text as a number of a kind; argparse's one-line error if it is not one or not allowed."""
    try:
        number = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; {rule}") from None
    if not math.isfinite(number) or not allowed(number):
        raise argparse.ArgumentTypeError(f"{text}: {rule}")
    return number


def positive(text):
    return checked(float, text, lambda number: number > 0, "must be above 0")


def not_negative(text):
    return checked(float, text, lambda number: number >= 0, "must not be negative")


def count(text):
    return checked(int, text, lambda number: number >= 1, "must be a whole number from 1 up")


def count_or_none(text):
    return checked(int, text, lambda number: number >= 0, "must be a whole number from 0 up")


def share(text):
    return checked(float, text, lambda number: 0 < number <= 1, "must be above 0 and at most 1")


def probability(text):
    return checked(float, text, lambda number: 0 <= number <= 1, "must be from 0 to 1")


def holdout(text):
    return checked(float, text, lambda number: 0 <= number < 1, "must be at least 0 and below 1")


def two_names(text):
    """"a,b" as ["a", "b"]."""
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: want two different names, such as "
                                         "file_name,text")
    return names


def own_device():
    """The GPU of this rank, or the only one that is asked for; the CPU without any."""
    if not torch.cuda.is_available():
        return "cpu"
    rank = os.environ.get("LOCAL_RANK")
    return "cuda" if rank is None else f"cuda:{int(rank) % torch.cuda.device_count()}"


def folder_or_none(text):
    """A path, or None for the word none."""
    return None if text == "none" else Path(text)


# ---------------------------------------------------------------- parsers
def parser(doc):
    """A parser that describes a script by the first line of its docstring and shows defaults."""
    return argparse.ArgumentParser(description=doc.split("\n")[0],
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def add_device(p):
    """Where the model runs, and in which precision."""
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda or cuda:N")
    p.add_argument("--dtype", choices=tuple(DTYPES), help="of the base's weights; left out, "
                   "bfloat16 on a GPU and float32 on the CPU")
    add_quantize(p)


def add_quantize(p):
    """Whether the frozen weights of the base are kept in a byte each."""
    p.add_argument("--quantize", choices=int8.CHOICES, help="keep the base's frozen weights in "
                   "int8: half the memory of bfloat16; left out, in --dtype")


def add_compile(p):
    """Whether decode steps are compiled."""
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                   help=f"one compiled step of fixed shape for all tokens, which takes a minute to "
                   f"start (default: on a GPU, for {WORTH_COMPILING} images and more)")


def add_caption_prompt(p):
    """What the base is asked for a caption."""
    p.add_argument("--caption-prompt", metavar="TEXT", help="what the base is asked for a caption; "
                   "left out, its own prompt")


def check_caption_prompt(p, args, flag):
    """argparse's one-line error where a prompt is given beside adapters, named by a flag."""
    if args.caption_prompt and getattr(args, flag.strip("-")):
        p.error(f"--caption-prompt: the adapters of {flag} remember theirs; leave it out")


def stage_parser(doc, out, rows_at, rows, lr, batch, epochs):
    """The flags that every training stage has, with this stage's defaults."""
    p = parser(doc)
    add = p.add_argument
    add("--data", type=Path, default=Path(rows_at), help=f"{rows} to learn from")
    add("--out", type=Path, default=Path(out), help="adapter folder to write, or to resume")
    add("--epochs", type=positive, default=epochs, help=f"passes over the {rows}")
    add("--max-steps", type=count, help="steps; overrides --epochs")
    add("--batch", type=count, default=batch, help=f"{rows} per step, over all ranks")
    add("--micro-batch", type=count, default=1, help=f"{rows} at once on a rank")
    add("--lr", type=positive, default=lr, help="peak learning rate")
    add("--warmup", type=count_or_none, default=20, help="steps until the peak")
    add("--weight-decay", type=not_negative, default=0.01, help="of matrices; biases have none")
    add("--grad-clip", type=positive, default=1.0, help="largest gradient norm")
    add("--seed", type=int, default=0, help="of fresh adapters, held-out rows and row order")
    add("--save-every", type=count, default=100, help="steps between checkpoints")
    add("--holdout", type=holdout, default=0.02, help="share of images held out for validation")
    add("--workers", type=count_or_none, default=2, help="processes per rank that decode images")
    add_device(p)
    return p


def as_json(args):
    """The arguments of a run as JSON values."""
    kept = (int, float, bool, type(None))
    return {key: value if isinstance(value, kept) else str(value)
            for key, value in vars(args).items()}
