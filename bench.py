"""Speed, next to the plain way: each figure is a ratio of two medians, measured in turn in one run.

    python bench.py                     # a random small model with real lengths, on the CPU
    python bench.py --only pairs --rounds 10
    python bench.py --against trl --threads 1 --json trl.json       # next to TRL
    python bench.py --against generate --threads 1                  # next to transformers

pairs       a training step on a chosen and a rejected caption, packed behind one image prefix
            | as two sequences
reference   a training step with cached reference log-probs | with the reference run again
samples     8 captions of one image on one prefix | one after the other
questions   64 yes/no questions packed behind one prefix | one after the other
captions    320 images, each tenth caption five times as long as the others: slots that are filled
            again | batches that wait for their longest caption. Then, with --images, what decoding
            these photographs ahead of a device costs it: two processes | in line, where the device
            is a sleep of --seconds an image; and two ranks of caption.py | one, on toy scenes

--against measures next to other people's code, on a random Qwen2.5-VL and one image of 400 tokens,
then of 1,200. Each contestant has a process of its own, and they take turns. Images are prepared
beforehand. Memory is the peak above the loaded model.

trl         forward and backward of a pair, with gradient checkpointing: captions of 60 tokens
            packed | as two rows | by TRL's DPOTrainer with loss_type ["sigmoid", "sft"]. It trains
            LoRA of the size of our adapters: all-linear, as in TRL's example for vision models, or
            only where our adapters stand. It runs the reference in every step, since it caches
            none for images. Here that is done once for each caption, and timed apart.
generate    8 captions of 64 tokens on one prefix | by model.generate(num_return_sequences=8)
"""
import argparse
import functools
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from PIL import Image

import adapters
import generate
from base import open_base
from chunking import seen_by
from dpo import caption_logps, pack, pair_losses, pair_up
from generate import Sampling, decode, prefill, sample, stream
from model import Config, QwenVL, VisionConfig
from plumbing import arguments, data, weights
from plumbing.errors import InputError
from plumbing.images import find_images
from toy_world import world

# Lengths of the real model, in tokens; START is the id of <img> in the small vocabulary.
QUERIES, VIEWS, PROMPT, CAPTION, QUESTION, START = 256, 6, 6, 300, 16, 600
N_SAMPLES, SAMPLE, N_QUESTIONS = 8, 50, 64
# Of captions: tokens of a usual one, slots, and scenes for two ranks.
TOY, SHORT, SLOTS, RANK_SCENES = "assets/toy", 40, 16, 2000
# The same of --against. A caption of 60 has its end token among them.
PEER_PROMPT, PEER_CAPTION, PEER_SAMPLE, BETA = 20, 60, 64, 0.1
NEEDED = {"trl": ("torchvision", "trl", "peft", "accelerate", "datasets"),
          "generate": ("torchvision",)}


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--only", choices=tuple(BENCHES), help="this comparison alone")
    add("--images", type=Path, metavar="DIR", help="photographs for captions")
    add("--seconds", type=arguments.positive, default=0.25, help="of a device for an image of "
        "--images (default: 0.25)")
    add("--rounds", type=arguments.count, default=5, help="timed runs of each side (default: 5)")
    add("--hidden", type=arguments.count, help="width of the language model, a multiple of 128 "
        "(default: 256, or 512 with --against)")
    add("--layers", type=arguments.count, help="its layers; the ViT has half as many again, with "
        "--against half as many (default: 4, or 8 with --against)")
    add("--threads", type=arguments.count, default=torch.get_num_threads(), help="of PyTorch")
    add("--device", default="cpu", help="cpu or cuda")
    add("--against", choices=tuple(NEEDED), help="TRL's DPOTrainer, or transformers' generate")
    add("--image-tokens", type=arguments.count, nargs="+", default=[400, 1200], metavar="N",
        help="of the image of --against (default: 400 1200)")
    add("--json", type=Path, metavar="FILE", help="write the figures of --against to a file")
    args = p.parse_args(argv)
    if args.json and not args.against:
        p.error("--json goes with --against")
    args.hidden = args.hidden or (512 if args.against else 256)
    args.layers = args.layers or (8 if args.against else 4)
    return args


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


# ---------------------------------------------------------------- many captions
class Uneven(generate.Batch):
    """A batch of images, by number, whose captions end where they are meant to."""

    def draw(self):
        """The cost of drawing tokens, and then others: an end, or one that makes no loop."""
        super().draw()
        wanted = [SHORT * (5 if member and member.item % 10 == 0 else 1) for member in self.members]
        eos = self.model.tokenizer.eos_id
        return torch.tensor([eos if t >= end else t for t, end in zip(self.cache.used, wanted)],
                            device=self.model.device)


class Waiting(Uneven):
    """A batch that decodes finished captions along until the longest has ended."""

    def take(self, slots):
        """No slot is given up."""


def captions(model, images, device):
    """320 images in slots, and in batches of as many images as there are slots."""
    model = open_base(TOY, device=device)
    views = model.look([Image.new("RGB", (model.image_size,) * 2)] * VIEWS)
    named = [(k, str(k), views) for k in range(320)]
    how = Sampling(1, 5 * SHORT + 1, temperature=0.0)
    batches = [named[start:start + SLOTS] for start in range(0, len(named), SLOTS)]

    def run(kind, parts):
        with mock.patch.object(generate, "Batch", kind):
            for part in parts:
                for _ in stream(model, part, SLOTS, how):
                    pass

    return functools.partial(run, Uneven, [named]), functools.partial(run, Waiting, batches)


def photographs(args):
    """How busy a device that takes --seconds an image is kept, decoding ahead and in line."""
    images = [path for path, _ in find_images([args.images])]
    model = open_base(TOY)
    for workers in (2, 0):
        see = functools.partial(seen_by, model)
        began, busy = time.perf_counter(), 0.0
        for batch in data.ahead(images, see, workers, 4):
            time.sleep(args.seconds * len(batch))
            busy += args.seconds * len(batch)
        share = busy / (time.perf_counter() - began)
        print(f"photographs  {workers} processes: {len(images)} images, the device is busy "
              f"{share:.1%} of the time", flush=True)


def ranks(args):
    """Seconds of caption.py on toy scenes, by one process and by two, with the time to start."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        world.draw_scenes(folder / "scenes", range(RANK_SCENES))
        for n in (1, 2):
            command = [sys.executable, "caption.py", str(folder / "scenes"), "--base", TOY,
                       "--adapters", "none", "--out", str(folder / f"out-{n}")]
            began = time.perf_counter()
            running = [subprocess.Popen(command, cwd=Path(__file__).parent, env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(n), "OMP_NUM_THREADS": "1"},
                stderr=subprocess.DEVNULL) for rank in range(n)]
            if any(process.wait() for process in running):
                raise InputError("caption.py failed")
            seconds[n] = time.perf_counter() - began
    print(f"ranks        one {seconds[1]:.1f} s   two {seconds[2]:.1f} s   one / two "
          f"{seconds[1] / seconds[2]:.2f}", flush=True)


BENCHES = {"pairs": pairs, "reference": reference, "samples": samples, "questions": questions,
           "captions": captions}


def next_to_plain(args):
    """Run and print the comparisons of BENCHES."""
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
    if args.only == "captions":
        ranks(args)
        if args.images:
            photographs(args)
    return 0


# ---------------------------------------------------------------- next to other people's code
def open_peer(job):
    model = open_base(job.folder, device=job.device)
    model.caption_text = job.request
    return model, model.look([job.picture])


def train_pair(n_rows, job, turns):
    """A contestant: training steps on a pair of captions, in one row or in two."""
    model, images = open_peer(job)
    trained = [model.get_parameter(name) for name in adapters.attach(model, "caption")]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    model.train()
    model.checkpointing = True
    prompt, eos = model.caption_prompt(images), model.tokenizer.eos_id
    captions = [[*model.answer(text), eos] for text in job.captions]
    packs = [captions] if n_rows == 1 else [[caption] for caption in captions]
    rows = [{**pack(prompt, together), "views": images} for together in packs]
    turns.facts = {"trained": sum(p.numel() for p in trained),
                   "tokens": sum(len(row["ids"]) for row in rows)}
    options = SimpleNamespace(loss="dpo", beta=job.beta, ce=1.0)
    while True:
        with turns, torch.no_grad(), adapters.active(model, []):
            reference = caption_logps(model, rows, eos, job.device).flatten().tolist()
        pair = {"drawn": [0], "lengths": [len(caption) for caption in captions],
                "ref_chosen": reference[0], "ref_rejected": reference[1:]}
        with turns:
            logps = caption_logps(model, rows, eos, job.device).view(1, 2)
            losses, _ = pair_losses(options, pair_up(logps, [pair]), None)
            losses.sum().backward()
            turns.facts["loss"] = losses.item()
        optimizer.step()
        optimizer.zero_grad()


def caption(job, turns):
    """A contestant: several captions of an image on one prefix."""
    model, images = open_peer(job)
    model.never = sorted({*model.never, *model.tokenizer.ends})     # no caption ends early
    turns.facts["tokens"] = len(model.caption_prompt(images))
    while True:
        with turns:
            captions = sample(model, [images], ["image"], job.n_samples, job.sample)[0]
        assert all(caption["tokens"] == job.sample for caption in captions)


def summary(parts):
    """{part: reports} -> a contestant's median seconds, peak memory and other facts."""
    *_, last_part = parts.values()
    seconds = {part: statistics.median(report["seconds"] for report in reports[1:])
               for part, reports in parts.items()}
    facts = {"loss": last_part[0]["loss"]} if "loss" in last_part[0] else {}    # the warm-up's
    return {**last_part[-1], **facts, "seconds": seconds}


def ratios(ours, other):
    """How many times as long, all parts and the last one alone, and how much memory."""
    *_, (part, ours_last) = ours["seconds"].items()
    return {"all seconds": sum(other["seconds"].values()) / sum(ours["seconds"].values()),
            f"{part} seconds": other["seconds"][part] / ours_last,
            "megabytes": other["megabytes"] / ours["megabytes"]}


def show(n_tokens, figures):
    """Print the figures of one size of image, the first contestant's first."""
    print(f"image of {n_tokens} tokens")
    ours = next(iter(figures.values()))
    for name, row in figures.items():
        parts = "   ".join(f"{part} {s:7.3f} s" for part, s in row["seconds"].items())
        facts = [f"{row['tokens']} tokens"]
        facts += [f"{row['trained'] / 1e6:.2f} M trained, first loss {row['loss']:.4f}"
                  ] if "loss" in row else []
        print(f"  {name:15} {parts:>36}   + {row['megabytes']:5.0f} MB   {', '.join(facts)}")
    for name, row in list(figures.items())[1:]:
        times = "   ".join(f"{key} {x:5.2f}" for key, x in ratios(ours, row).items())
        print(f"  {name} / {next(iter(figures))}: {times}", flush=True)


def hardware(args):
    """What the figures were measured on."""
    if args.device != "cpu":
        return {"gpu": torch.cuda.get_device_name(), "threads": args.threads}
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "threads": args.threads}


def against(args, argv):
    """Run, print and write the comparison of --against. InputError where a package is missing."""
    needed = NEEDED[args.against]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise InputError(f"--against {args.against} needs {', '.join(missing)}; pip install "
                         f"{' '.join(missing)}")
    from plumbing import peers  # here, since it imports transformers

    both = ("reference", "step")
    contestants = {
        "trl": {"packed": (functools.partial(train_pair, 1), both),
                "two rows": (functools.partial(train_pair, 2), both),
                "trl": (functools.partial(peers.train_trl, peers.ALL_LINEAR), ("step",)),
                "trl, our places": (functools.partial(peers.train_trl, peers.AS_ADAPTERS),
                                    ("step",))},
        "generate": {"one prefix": (caption, ("captions",)),
                     "generate": (peers.generate, ("captions",))}}[args.against]
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        numbers, words = peers.write_base(folder, args.hidden, args.layers)
        print(f"Qwen2.5-VL of {numbers / 1e6:.1f} M parameters, {args.device}, {args.threads} "
              "threads", flush=True)
        texts = [words[i::3] for i in range(3)]
        job = SimpleNamespace(
            folder=folder, device=args.device, threads=args.threads, rounds=args.rounds, beta=BETA,
            dtype=weights.usual_dtype(torch.device(args.device)), n_samples=N_SAMPLES,
            sample=PEER_SAMPLE, request=" ".join(texts[0][:PEER_PROMPT]),
            captions=["".join(f" {word}" for word in text[:PEER_CAPTION - 1])
                      for text in texts[1:]])
        for job.n_tokens in args.image_tokens:
            job.picture = peers.picture(job.n_tokens)
            reports = peers.race(contestants, job)
            figures[job.n_tokens] = {name: summary(parts) for name, parts in reports.items()}
            show(job.n_tokens, figures[job.n_tokens])
    if args.json:
        command = ["python", "bench.py", *(sys.argv[1:] if argv is None else argv)]
        versions = {name: version(name) for name in ("torch", "transformers", *needed)}
        result = {"command": shlex.join(command), "hardware": hardware(args), "figures": figures,
                  "versions": {"python": platform.python_version(), **versions}}
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


def main(argv=None):
    args = parse_args(argv)
    try:
        return against(args, argv) if args.against else next_to_plain(args)
    except InputError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
