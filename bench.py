"""Speed, side by side with the plain way: each figure is a ratio of two medians taken in turn, A B A B, in one run.

    python bench.py                     # a random small model with the lengths of the real one, on the CPU
    python bench.py --only pairs --rounds 10

pairs       one training step on a chosen and a rejected caption, packed behind one image prefix | as two sequences
reference   one training step with cached reference log-probs | with the reference run again
samples     8 captions of one image on one prefix | one after the other
questions   64 yes/no questions packed behind one prefix | one after the other
"""
import argparse
import statistics
import sys
import time

import torch

from dpo import caption_logps, pack
from generate import decode, prefill
from model import Config, QwenVL, VisionConfig

QUERIES, VIEWS, PROMPT, CAPTION, QUESTION, START = 256, 6, 6, 300, 16, 600


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", choices=tuple(BENCHES), help="this comparison alone")
    p.add_argument("--rounds", type=int, default=5, help="timed runs of each side (default: 5)")
    p.add_argument("--hidden", type=int, default=256, help="width of the language model (default: 256)")
    p.add_argument("--layers", type=int, default=4, help="its layers; the ViT has half as many again (default: 4)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    return p.parse_args(argv)


def random_model(args):
    """Random weights, real lengths: 256 queries per view, but a ViT of 64 patches to keep the CPU's time bearable."""
    vision = VisionConfig(image_size=112, patch_size=14, width=args.hidden // 2, layers=args.layers * 3 // 2,
                          heads=args.hidden // 64, output_dim=args.hidden, image_start_id=START, n_queries=QUERIES)
    config = Config(vocab_size=START + 8, hidden_size=args.hidden, num_hidden_layers=args.layers, visual=vision,
                    num_attention_heads=args.hidden // 64, kv_channels=64, intermediate_size=args.hidden * 11 // 2)
    torch.manual_seed(0)
    return QwenVL(config).to(args.device)


def prefix_of(n_more):
    """Ids of six image spans and a prompt."""
    return ([START] + [START + 2] * QUERIES + [START + 1]) * VIEWS + list(range(n_more))


def compare(ours, plain, rounds, device):
    """Median seconds of two functions, run in turn."""
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


# ---------------------------------------------------------------- the comparisons: (ours, plain) each
def pairs(model, images, device):
    captions = [torch.randint(0, 500, (CAPTION,)).tolist() for _ in range(2)]
    packed = {**pack(prefix_of(PROMPT), captions), "views": images}
    separate = [{**pack(prefix_of(PROMPT), [caption]), "views": images} for caption in captions]

    def step(rows):
        model.train()
        total = sum(caption_logps(model, [row], START, device).sum() for row in rows)
        total.backward()
        model.zero_grad(set_to_none=True)
    return lambda: step([packed]), lambda: step(separate)


def reference(model, images, device):
    row = {**pack(prefix_of(PROMPT), [torch.randint(0, 500, (CAPTION,)).tolist() for _ in range(2)]), "views": images}

    def step(again):
        model.train()
        if again:
            with torch.no_grad():
                caption_logps(model, [row], START, device)
        caption_logps(model, [row], START, device).sum().backward()
        model.zero_grad(set_to_none=True)
    return lambda: step(False), lambda: step(True)


def samples(model, images, device, n=8, tokens=50):
    ids = torch.tensor([prefix_of(PROMPT)], device=device)

    def run(at_once, times):
        model.eval()
        with torch.no_grad():
            for _ in range(times):
                cache, logits = prefill(model, ids, images, None, at_once, tokens)
                for _ in range(tokens):
                    logits = decode(model, cache, logits.argmax(-1))
    return lambda: run(n, 1), lambda: run(1, n)


def questions(model, images, device, n=64):
    prefix, asked = prefix_of(0), [torch.randint(0, 500, (QUESTION,)).tolist() for _ in range(n)]

    def run(rows):
        model.eval()
        with torch.no_grad():
            for row in rows:
                ids = torch.tensor([prefix + [i for question in row for i in question]], device=device)
                lengths = torch.tensor([len(prefix)] + [QUESTION] * len(row), device=device)
                branch = torch.arange(len(lengths), device=device).repeat_interleave(lengths)[None]
                model(ids, images, branch=branch, positions=lengths.cumsum(0)[1:] - 1)
    return lambda: run([asked]), lambda: run([[question] for question in asked])


BENCHES = {"pairs": pairs, "reference": reference, "samples": samples, "questions": questions}


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    model = random_model(args)
    images = torch.randn(VIEWS, 3, 112, 112, device=args.device)
    numbers = sum(p.numel() for p in model.parameters())
    print(f"{numbers / 1e6:.1f} M parameters, prefix {len(prefix_of(PROMPT))} tokens, {args.device}, "
          f"{args.threads} threads")
    for name, make in BENCHES.items():
        if args.only in (None, name):
            ours, plain = compare(*make(model, images, args.device), args.rounds, args.device)
            print(f"{name:10} ours {ours:8.3f} s   plain {plain:8.3f} s   plain / ours {plain / ours:5.2f}",
                  flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
