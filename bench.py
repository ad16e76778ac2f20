"""Speed and memory of each part of the method, next to its rival and to the limits of the device.

    python bench.py                                 # a small random model; on a GPU the full one
    python bench.py --size full --json speed.json   # Qwen-VL's 9.7 billion parameters, random
    python bench.py --base Qwen/Qwen3-VL-4B-Instruct --only decode pairs
    python bench.py --against trl --threads 1 --json trl.json       # next to TRL
    python bench.py --against generate --threads 1                  # next to transformers

The bandwidth of a copy and the rate of a large matrix product are measured first. In each row the
contestants take turns, and a figure is the median of the rounds. "bare" are the row's own matrix
products and nothing else; the floor is what the limits of the device allow for the row: bytes of
weights ÷ bandwidth, operations of products with weights ÷ rate. Random weights are made on the
device, in the dtype of the run. Prompts have six views.

decode      the decode steps of a caption, compiled | by the eager loop
int8        the same with int8 weights | with weights in the dtype of the run
prefill     the language model on a prompt | with logits at every position
vit         the vision tower on six views | one view after the other
samples     8 captions of one image on one prefix | one after the other
questions   64 yes/no questions packed behind one prefix | one after the other
pairs       a DPO step's forward and backward, a chosen and a rejected caption packed behind one
            image prefix | as two rows
reference   the same step with cached reference log-probs | with the reference run again
captions    320 images, each tenth caption five times as long as the others: slots that are filled
            again | batches that wait for their longest caption; bare: the same number of tokens in
            equally long captions; by the toy base. With --only captions also two ranks of
            caption.py and one, and with --images what decoding photographs costs a device

--against measures next to other people's code, as plumbing/peers.py describes.
"""
import argparse
import functools
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from PIL import Image

import adapters
from base import open_base
from dpo import caption_logps, pack, pair_losses, pair_up
from generate import Sampling, decode, prefill, sample, stream, yes_probability
from model import Config, QwenVL, VisionConfig
from plumbing import arguments, data, files, int8, slots, speed, weights
from plumbing.errors import InputError
from plumbing.tokenizer import Tokenizer
from toy_world import busy, world

VIEWS, N_SAMPLES, BETA = 6, 8, 0.1
TARGETS = {
    "cpu": {"decode": "≥ 85 % of bare", "prefill": "≥ 80 % of bare", "samples": "≥ 6 times",
            "questions": "≥ 25 times", "pairs": "≥ 1.6 times"},
    "cuda": {"decode": "≥ 85 % of floor, ≥ 4 times", "int8": "≥ 1.5 times",
             "samples": "≥ 6 times", "questions": "≥ 25 times",
             "pairs": "≥ 1.6 times, ≤ 22.5 GiB in all, logits < 100 MB",
             "reference": "≥ 1.3 times"}}
OF_THE_TABLE = ("only", "size", "base", "dtype", "quantize", "images", "seconds")
OF_AGAINST = {"hidden": 512, "layers": 8, "image_tokens": [400, 1200]}


# ---------------------------------------------------------------- sizes
@dataclass
class Lengths:
    """What a row is made of."""
    caption: int = 300          # tokens of a caption that is trained on
    decoded: int = 300          # tokens of a caption that is decoded
    questions: int = 64
    images: int = 320           # of the row captions
    short: int = 40             # tokens of most of its captions
    question: str = "Is there a {}?"


# full has the numbers of Qwen-VL. small has a quarter of its widths, patches, queries and tokens,
# so that attention, keys and values have the same share, and an eighth of its layers. toy is for
# tests.
SIZES = {
    "full": (Config(), Lengths()),
    "small": (Config(vocab_size=4748, hidden_size=1024, num_hidden_layers=4,
                     num_attention_heads=8, intermediate_size=5504, seq_length=512,
                     visual=VisionConfig(image_size=224, width=416, layers=6, heads=4,
                                         output_dim=1024, n_queries=64)),
              Lengths(75, 75, question="{}?")),
    "toy": (Config(vocab_size=576, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                   kv_channels=32, intermediate_size=704, seq_length=256,
                   visual=VisionConfig(image_size=32, patch_size=8, width=96, layers=2, heads=3,
                                       mlp_ratio=4.0, output_dim=128, n_queries=4)),
            Lengths(12, 8, 8, 20, 8))}


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--only", nargs="+", choices=tuple(ROWS), metavar="ROW", help="these rows alone")
    add("--size", choices=tuple(SIZES), help="random weights (default: full on a GPU, else small)")
    add("--base", help="Hub name or folder of a base with real weights, in place of --size")
    add("--compile", action=argparse.BooleanOptionalAction, help="decode steps (default: on a GPU)")
    add("--images", type=Path, metavar="DIR", help="photographs for --only captions")
    add("--seconds", type=arguments.positive, help="a device takes for one of them (default: 0.25)")
    add("--rounds", type=arguments.count, default=3, help="timed runs of each side (default: 3)")
    add("--threads", type=arguments.count, default=torch.get_num_threads(), help="of PyTorch")
    arguments.add_device(p)
    add("--against", choices=("trl", "generate"), help="TRL's DPOTrainer, or transformers'")
    add("--hidden", type=arguments.count, help="width of its model, 128·n (default: 512)")
    add("--layers", type=arguments.count, help="its layers; the ViT has half as many (default: 8)")
    add("--image-tokens", type=arguments.count, nargs="+", metavar="N",
        help="of the image of --against (default: 400 1200)")
    add("--json", type=Path, metavar="FILE", help="write the figures to a file")
    args = p.parse_args(argv)
    foreign = OF_THE_TABLE if args.against else OF_AGAINST
    for name in foreign:
        if vars(args)[name] is not None:
            p.error(f"--{name.replace('_', '-')} {'does not go' if args.against else 'goes'} with "
                    "--against")
    if args.size and args.base:
        p.error("--size is of random weights, --base has its own; give one of them")
    if (args.images and args.only != ["captions"]) or (args.seconds and not args.images):
        p.error("--images goes with --only captions, and --seconds with --images")
    for name, default in {**OF_AGAINST, "seconds": 0.25}.items():
        vars(args)[name] = vars(args)[name] or default
    return args


# ---------------------------------------------------------------- the model
@dataclass
class Setup:
    """What the rows share: a model, the pictures of six views and what it makes of them."""
    args: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    lengths: Lengths
    model: QwenVL
    pictures: list
    images: object

    def clocked(self, run, *args):
        """A contestant: run(*args), all of whose seconds count."""
        return functools.partial(speed.seconds_of, self.device, functools.partial(run, *args))


def open_model(args, dtype, device, quantize):
    """The base, or a model of random weights. InputError where it does not fit the memory."""
    if args.base:
        return open_base(args.base, dtype, device, quantize=quantize)
    config, _ = SIZES[args.size]
    tokenizer = Tokenizer(busy.TOY)         # a vocabulary of any size may hold its few ids
    config.visual.image_start_id = tokenizer.image_start_id
    with torch.device("meta"):
        model = QwenVL(config, tokenizer)
    if quantize:
        int8.replace(model, [model.transformer.wte, model.lm_head])
    weights.check_fits(model, f"--size {args.size}", dtype, device)
    model.question_form = "{}"
    return speed.fill_randomly(model, dtype, device).eval()


def set_up(args):
    torch.set_num_threads(args.threads)
    device = weights.usable_device(args.device)
    dtype = arguments.DTYPES.get(args.dtype) or weights.usual_dtype(device)
    usual = "full" if device.type == "cuda" else "small"
    args.size = args.size or (None if args.base else usual)
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    model = open_model(args, dtype, device, args.quantize)
    side, rng = model.image_size, np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
                for _ in range(VIEWS)]
    return Setup(args, device, dtype, SIZES[args.size or usual][1], model, pictures,
                 model.look(pictures))


def text_ids(model, n, word="red"):
    """Ids of n tokens of text."""
    return (model.answer(f" {word} circle") * n)[:n]


# ---------------------------------------------------------------- rows of the language model
def caption_steps(model, images, n, steps, compiled):
    """Write n captions of `steps` tokens of one image -> the seconds of their decode steps."""
    clock, how = Counter(), Sampling(n, steps, min_tokens=steps, past_context=True)
    with mock.patch.object(slots, "loops", busy.ignored):
        [(_, captions)] = stream(model, [(0, "image", images)], 1, how, clock,
                                  compiled and model.packs)
    assert all(caption["tokens"] == steps for caption in captions)
    return clock["decode"]


@torch.no_grad()
def decode_calls(model, setup, n=1):
    """The linear layers that a decode step of n samples calls, see speed.linear_calls."""
    ids = torch.tensor([text_ids(model, 8)], device=setup.device)
    cache, logits = prefill(model, ids, None, None, n, 2)
    return speed.linear_calls(model, lambda: decode(model, cache, logits.argmax(-1)))


def decode_contest(setup, model, rival_is, rival, compiled=False):
    """A caption's decode steps against a rival's. Its first token comes from the prefill, so there
    is one step fewer."""
    n = setup.lengths.decoded
    calls = decode_calls(model, setup) * (n - 1)
    caption = functools.partial(caption_steps, model, setup.images, 1, n, setup.args.compile)
    rival = functools.partial(caption_steps, rival, setup.images, 1, n, compiled)
    return speed.Contest(rival_is, caption, rival, setup.clocked(speed.Bare(calls)),
                         bytes_read=speed.weight_bytes(calls))


def int8_row(setup):
    if setup.args.quantize:
        raise InputError("all rows have int8 weights; leave --quantize out")
    model = open_model(setup.args, setup.dtype, setup.device, "int8")
    return decode_contest(setup, model, str(setup.dtype).removeprefix("torch."), setup.model,
                          setup.args.compile)


def prefill_row(setup):
    """The prompt's length in tokens of text: the vision tower has a row of its own."""
    model = setup.model
    n = len(model.caption_prompt(setup.images))
    ids = torch.tensor([text_ids(model, n)], device=setup.device)
    ours = torch.no_grad()(functools.partial(prefill, model, ids, None, None, 1, 1))
    plain = torch.no_grad()(functools.partial(model, ids))
    return speed.Contest("logits everywhere", setup.clocked(ours), setup.clocked(plain),
                         setup.clocked(speed.Bare(speed.linear_calls(model, ours))),
                         operations=speed.operations_of(ours))


@torch.no_grad()
def see(model, looks):
    """The vision tower on each of what `look` gave."""
    for look in looks:
        if isinstance(model, QwenVL):
            model.transformer.visual(look.to(model.device))
        else:
            ids = torch.tensor([model.head(look)], device=model.device)
            model.hf.get_image_features(**model.inputs_of(ids, [look])[1])


def vit_row(setup):
    model = setup.model
    one_by_one = [model.look([picture]) for picture in setup.pictures]
    ours = functools.partial(see, model, [setup.images])
    return speed.Contest("one view at a time", setup.clocked(ours),
                         setup.clocked(see, model, one_by_one),
                         setup.clocked(speed.Bare(speed.linear_calls(model, ours))),
                         operations=speed.operations_of(ours))


# ---------------------------------------------------------------- rows of many continuations
def samples_row(setup):
    model, steps = setup.model, setup.lengths.decoded
    write = functools.partial(caption_steps, model, setup.images, steps=steps,
                              compiled=setup.args.compile)
    ids = torch.tensor([model.caption_prompt(setup.images)], device=setup.device)
    views = data.together([setup.images])
    first = torch.no_grad()(functools.partial(prefill, model, ids, views, None, 1, 1))
    then = decode_calls(model, setup, N_SAMPLES) * (steps - 1)
    return speed.Contest("one after the other", setup.clocked(write, N_SAMPLES),
                         setup.clocked(lambda: [write(1) for _ in range(N_SAMPLES)]),
                         setup.clocked(speed.Bare(speed.linear_calls(model, first) + then)),
                         speed.weight_bytes(then), speed.operations_of(first))


def questions_row(setup):
    nouns = [f"{color} {shape}" for color in world.COLORS for shape in world.SHAPES]
    texts = [setup.lengths.question.format(nouns[k % len(nouns)])
             for k in range(setup.lengths.questions)]
    ask = functools.partial(yes_probability, setup.model, setup.images)
    ours = functools.partial(ask, texts)
    return speed.Contest("one after the other", setup.clocked(ours),
                         setup.clocked(lambda: [ask([text]) for text in texts]),
                         setup.clocked(speed.Bare(speed.linear_calls(setup.model, ours))),
                         operations=speed.operations_of(ours))


# ---------------------------------------------------------------- rows of training
def rows_of_pair(model, images, captions, n_rows):
    """A chosen and a rejected caption (lists of ids) of an image, in one row or in two."""
    parts = [captions] if n_rows == 1 else [[caption] for caption in captions]
    prompt = model.caption_prompt(images)
    return [{**pack(prompt, together), "views": images} for together in parts]


def pair_loss(model, rows, captions, reference, beta=BETA):
    """dpo.py's loss of a pair in one row or two; reference: log-probs of both captions."""
    logps = caption_logps(model, rows, model.tokenizer.eos_id, model.device).view(1, 2)
    pair = {"drawn": [0], "lengths": [len(caption) for caption in captions],
            "ref_chosen": reference[0], "ref_rejected": reference[1:]}
    options = SimpleNamespace(loss="dpo", beta=beta, ce=1.0)
    losses, _ = pair_losses(options, pair_up(logps, [pair]), None)
    return losses.sum()


def reference_logps(model, rows):
    """Log-probs of the captions of rows by the bare base."""
    with torch.no_grad(), adapters.active(model, []):
        return caption_logps(model, rows, model.tokenizer.eos_id, model.device).flatten().tolist()


def ready_to_train(model):
    """Attach adapters if there are none yet, and set the model up as dpo.py does."""
    if "caption" not in model.attached:
        adapters.attach(model, "caption")
    model.train()
    model.checkpointing = True


def training_step(model, rows, captions, reference):
    """Forward and backward; reference None runs it again."""
    pair_loss(model, rows, captions, reference or reference_logps(model, rows)).backward()
    model.zero_grad(set_to_none=True)


def training_row(setup, rival_is, n_rows, cached):
    """A step on a packed pair, whose reference is known, against another one."""
    model, n = setup.model, setup.lengths.caption
    ready_to_train(model)
    captions = [text_ids(model, n), text_ids(model, n, "blue")]
    packed, rivals = (rows_of_pair(model, setup.images, captions, k) for k in (1, n_rows))
    known = reference_logps(model, packed)
    ours = functools.partial(training_step, model, packed, captions, known)
    sizes = []
    hook = model.output_layer.register_forward_hook(lambda layer, x, y: sizes.append(y.numel()))
    operations = speed.operations_of(ours)
    hook.remove()
    rival = setup.clocked(training_step, model, rivals, captions, known if cached else None)
    facts = {"loss": [pair_loss(model, rows, captions, known).item() for rows in (packed, rivals)],
             "logits_megabytes": max(sizes) * 4 / 1e6}
    return speed.Contest(rival_is, setup.clocked(ours), rival, operations=operations, facts=facts)


def captions_row(setup):
    lengths = setup.lengths
    ours, rival, bare = busy.ways(lengths.images, lengths.short, setup.device)
    return speed.Contest("batches that wait", *map(setup.clocked, (ours, rival, bare)))


ROWS = {"decode": lambda setup: decode_contest(setup, setup.model, "eager loop", setup.model),
        "int8": int8_row, "prefill": prefill_row, "vit": vit_row,
        "samples": samples_row, "questions": questions_row,
        "pairs": functools.partial(training_row, rival_is="two rows", n_rows=2, cached=True),
        "reference": functools.partial(training_row, rival_is="reference run again", n_rows=1,
                                       cached=False),
        "captions": captions_row}


# ---------------------------------------------------------------- the table
def table(args):
    """Measure and print the rows -> what --json writes."""
    setup = set_up(args)
    numbers = sum(p.numel() for p in setup.model.parameters())
    limits = speed.copy_bandwidth(setup.device), speed.matrix_rate(setup.device, setup.dtype)
    print(f"{args.base or args.size}: {numbers / 1e6:.0f} M parameters, {args.quantize or ''} "
          f"{setup.dtype}, {setup.device}, {args.threads} threads; a prompt of "
          f"{len(setup.model.caption_prompt(setup.images))} tokens")
    print(speed.heading(limits), flush=True)
    rows, targets = {}, TARGETS[setup.device.type]
    for name in ROWS:
        if name not in (args.only or ROWS):
            continue
        try:
            with weights.enough_memory(f"the row {name}; leave it out with --only"):
                rows[name] = speed.held(ROWS[name](setup), args.rounds, setup.device, limits)
            print(speed.line(name, rows[name], targets.get(name, "")), flush=True)
        except InputError as error:
            rows[name] = {"error": str(error)}
            print(f"bench.py: {name}: {error}", file=sys.stderr)
        weights.release_memory(setup.device)
    if args.only == ["captions"]:
        rows["ranks"] = busy.ranks()
        print("ranks: " + ", ".join(f"{n} in {s:.1f} s" for n, s in rows["ranks"].items()))
    if args.images:
        rows["photographs"] = busy.photographs(args.images, args.seconds)
        print("photographs: " + ", ".join(f"{n} processes keep the device busy {share:.1%} of the "
                                          "time" for n, share in rows["photographs"].items()))
    return {"versions": speed.versions(), "parameters": numbers, "seed": 0,
            "bandwidth": limits[0], "rate": limits[1], "rows": rows}


# ---------------------------------------------------------------- next to other people's code
def open_peer(job):
    model = open_base(job.folder, device=job.device)
    model.caption_text = job.request
    return model, model.look([job.picture])


def train_pair(n_rows, job, turns):
    """A contestant: training steps on a pair of captions, in one row or in two."""
    model, images = open_peer(job)
    ready_to_train(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    captions = [[*model.answer(text), model.tokenizer.eos_id] for text in job.captions]
    rows = rows_of_pair(model, images, captions, n_rows)
    turns.facts = {"trained": sum(p.numel() for p in trained),
                   "tokens": sum(len(row["ids"]) for row in rows)}
    while True:
        with turns:
            reference = reference_logps(model, rows)
        with turns:
            loss = pair_loss(model, rows, captions, reference)
            loss.backward()
            turns.facts["loss"] = loss.item()
        optimizer.step()
        optimizer.zero_grad()


def caption(job, turns):
    """A contestant: several captions of an image on one prefix."""
    model, images = open_peer(job)
    ends = torch.tensor([*model.tokenizer.ends], device=model.device)
    model.never = torch.cat([model.never, ends])        # no caption ends early
    turns.facts["tokens"] = len(model.caption_prompt(images))
    while True:
        with turns:
            captions = sample(model, [images], ["image"], job.n_samples, job.sample)[0]
        assert all(caption["tokens"] == job.sample for caption in captions)


def against(args):
    """Run and print the comparison of --against -> what --json writes."""
    from plumbing import peers  # here, since it imports transformers
    both = ("reference", "step")
    contestants = {"trl": {"packed": (functools.partial(train_pair, 1), both),
                           "two rows": (functools.partial(train_pair, 2), both)},
                   "generate": {"one prefix": (caption, ("captions",))}}
    return peers.compare(args, contestants[args.against], BETA, N_SAMPLES)


def main(argv=None):
    args = parse_args(argv)
    try:
        result = against(args) if args.against else table(args)
    except InputError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    if args.json:
        command = shlex.join(["python", "bench.py", *(sys.argv[1:] if argv is None else argv)])
        hardware = speed.hardware(torch.device(args.device), args.threads)
        files.write_json(args.json, {"command": command, "hardware": hardware, **result})
    return int(any("error" in row for row in result.get("rows", {}).values()))


if __name__ == "__main__":
    sys.exit(main())
