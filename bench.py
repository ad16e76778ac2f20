"""Speed, next to the plain way: each figure is a ratio of two medians, measured in turn in one run.

    python bench.py                     # a random small model with real lengths, on the CPU
    python bench.py --only pairs --rounds 10

pairs       a training step on a chosen and a rejected caption, packed behind one image prefix
            | as two sequences
reference   a training step with cached reference log-probs | with the reference run again
samples     8 captions of one image on one prefix | one after the other
questions   64 yes/no questions packed behind one prefix | one after the other
"""
import argparse
import functools
import statistics
import sys
import time

import torch

from dpo import caption_logps, pack
from generate import decode, prefill
from model import Config, QwenVL, VisionConfig
from plumbing import arguments

# Lengths of the real model, in tokens; START is the id of <img> in the small vocabulary.
QUERIES, VIEWS, PROMPT, CAPTION, QUESTION, START = 256, 6, 6, 300, 16, 600
N_SAMPLES, SAMPLE, N_QUESTIONS = 8, 50, 64


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--only", choices=tuple(BENCHES), help="this comparison alone")
    add("--rounds", type=arguments.count, default=5, help="timed runs of each side (default: 5)")
    add("--hidden", type=arguments.count, default=256, help="width of the language model, a "
        "multiple of 128 (default: 256)")
    add("--layers", type=arguments.count, default=4, help="its layers; the ViT has half as many "
        "again (default: 4)")
    add("--threads", type=arguments.count, default=torch.get_num_threads(), help="of PyTorch")
    add("--device", default="cpu", help="cpu or cuda")
    return p.parse_args(argv)


def random_model(args):
    """Random weights and real lengths, but a ViT of 64 patches to keep the CPU's time bearable."""
    hidden = args.hidden
    vision = VisionConfig(image_size=112, patch_size=14, width=hidden // 2,
                          layers=args.layers * 3 // 2, heads=hidden // 64, output_dim=hidden,
                          image_start_id=START, n_queries=QUERIES)
    config = Config(vocab_size=START + 8, hidden_size=hidden, num_hidden_layers=args.layers,
                    num_attention_heads=hidden // 64, kv_channels=64,
                    intermediate_size=hidden * 11 // 2, visual=vision)
    torch.manual_seed(0)
    return QwenVL(config).to(args.device)


def prefix_of(n_more):
    """Ids of six image spans and a prompt of n_more tokens."""
    span = [START] + [START + 2] * QUERIES + [START + 1]
    return span * VIEWS + list(range(n_more))


def random_ids(n):
    return torch.randint(0, 500, (n,)).tolist()


def compare(ours, plain, rounds, device):
    """Median seconds of two functions, run in turn; the first run of each does not count."""
    times = ([], [])
    for number in range(rounds + 1):
        for side, run in zip(times, (ours, plain)):
            began = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                side.append(time.perf_counter() - began)
    return [statistics.median(side) for side in times]


# ---------------------------------------------------------------- what is timed
def training_step(model, rows, device, reference_again=False):
    """Forward and backward of packed rows, each a forward of its own."""
    model.train()
    if reference_again:
        with torch.no_grad():
            for row in rows:
                caption_logps(model, [row], START, device)
    sum(caption_logps(model, [row], START, device).sum() for row in rows).backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def decode_samples(model, images, ids, at_once, times):
    """`at_once` samples of SAMPLE tokens on one prefix, so many times."""
    model.eval()
    for _ in range(times):
        cache, logits = prefill(model, ids, images, None, at_once, SAMPLE)
        for _ in range(SAMPLE):
            logits = decode(model, cache, logits.argmax(-1))


@torch.no_grad()
def ask(model, images, rows, device):
    """Rows of questions, those of a row packed behind one prefix."""
    model.eval()
    prefix = prefix_of(0)
    for row in rows:
        ids = torch.tensor([prefix + [i for question in row for i in question]], device=device)
        lengths = torch.tensor([len(prefix)] + [QUESTION] * len(row), device=device)
        branch = torch.arange(len(lengths), device=device).repeat_interleave(lengths)[None]
        model(ids, images, branch=branch, positions=lengths.cumsum(0)[1:] - 1)


# ---------------------------------------------------------------- the comparisons: (ours, plain)
def pairs(model, images, device):
    captions = [random_ids(CAPTION) for _ in range(2)]
    packed = {**pack(prefix_of(PROMPT), captions), "views": images}
    separate = [{**pack(prefix_of(PROMPT), [caption]), "views": images} for caption in captions]
    step = functools.partial(training_step, model, device=device)
    return functools.partial(step, [packed]), functools.partial(step, separate)


def reference(model, images, device):
    captions = [random_ids(CAPTION) for _ in range(2)]
    row = {**pack(prefix_of(PROMPT), captions), "views": images}
    step = functools.partial(training_step, model, [row], device)
    return step, functools.partial(step, reference_again=True)


def samples(model, images, device):
    ids = torch.tensor([prefix_of(PROMPT)], device=device)
    run = functools.partial(decode_samples, model, images, ids)
    return functools.partial(run, N_SAMPLES, 1), functools.partial(run, 1, N_SAMPLES)


def questions(model, images, device):
    asked = [random_ids(QUESTION) for _ in range(N_QUESTIONS)]
    run = functools.partial(ask, model, images, device=device)
    return functools.partial(run, [asked]), functools.partial(run, [[one] for one in asked])


BENCHES = {"pairs": pairs, "reference": reference, "samples": samples, "questions": questions}


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    model = random_model(args)
    images = torch.randn(VIEWS, 3, 112, 112, device=args.device)
    numbers = sum(p.numel() for p in model.parameters())
    print(f"{numbers / 1e6:.1f} M parameters, prefix {len(prefix_of(PROMPT))} tokens, "
          f"{args.device}, {args.threads} threads")
    for name, make in BENCHES.items():
        if args.only in (None, name):
            sides = make(model, images, args.device)
            ours, plain = compare(*sides, args.rounds, args.device)
            print(f"{name:10} ours {ours:8.3f} s   plain {plain:8.3f} s   plain / ours "
                  f"{plain / ours:5.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
