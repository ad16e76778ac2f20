"""Stage 1, supervised fine-tuning: captions teach a frozen base the shorthand style.

Adapters in both towers and a soft prompt learn to write captions as the data has them.

READS   captions (JSONL of {"image", "caption"}, golden rows, an imagefolder, or images with .txt
        files of the same name); a base
WRITES  out/sft: adapters.safetensors, adapters.json, log.jsonl, resume/

    python sft.py --data captions.jsonl                             # one process
    torchrun --nproc_per_node 6 sft.py --data captions.jsonl        # one per card

The same command resumes from the last checkpoint. What the source, the blog post ATAC-Qwen-VL,
leaves open:
 1. adapters: bottleneck 1/8, ReLU, up from zero (adapters.py)
 2. the soft prompt takes the place of the caption prompt, after the images
 3. the loss is the sum of -log p over all target tokens of the step ÷ their number, over all ranks
    and micro-batches together: a mean of means would weigh short captions more
 4. a caption too long for the context is cut after its last whole statement that fits
"""
import argparse
import functools
import sys
from pathlib import Path

import torch

import adapters
from base import open_base
from chunking import LAYOUTS, seen_by
from plumbing import arguments, data, train, weights
from plumbing.errors import InputError
from plumbing.slots import room_left

DEFAULT_BASE = "Qwen/Qwen-VL"
TUNE = ("adapters", "lora", "prompt", "full")


def parse_args(argv):
    p = arguments.stage_parser(__doc__, "out/sft", "data/sft.jsonl", "captions", lr=2e-4, batch=32,
                               epochs=3.0)
    add = p.add_argument
    add("--base", help=f"Hub name or folder; left out, that of --init, else {DEFAULT_BASE}")
    add("--init", type=Path, help="adapter folder to start from instead of fresh adapters")
    add("--tune", choices=TUNE, default="adapters", help="what trains: adapters or LoRA with "
        "a soft prompt, the soft prompt alone, or every weight of the base")
    add("--reduction", type=int, default=8, help="width of the model ÷ width of a bottleneck")
    add("--rank", type=int, default=16, help="of LoRA")
    add("--soft-prompt", action=argparse.BooleanOptionalAction, default=True,
        help="train a soft prompt, too; with --init, the folder's, which is frozen otherwise")
    add("--views", choices=tuple(LAYOUTS), help="views of an image; left out, six, or those of "
        "--init")
    arguments.add_caption_prompt(p)
    args = p.parse_args(argv)
    arguments.check_caption_prompt(p, args, "--init")
    if args.tune == "full" and args.quantize:
        p.error("--tune full trains the weights that --quantize freezes; leave one of them out")
    return args


# ---------------------------------------------------------------- data
def encode(model, prompt, caption):
    """Prompt ids and a caption -> ids up to the end token, and whether the caption was cut to fit.

    What is too long ends after its last whole statement that fits.
    """
    room = model.seq_length - len(prompt) - 1
    statements, target = caption.split(", "), model.answer(caption)
    was_cut = len(target) > room
    while len(target) > room and len(statements) > 1:
        statements.pop()
        target = model.answer(", ".join(statements))
    return prompt + target[:room] + [model.tokenizer.eos_id], was_cut


def make_example(model, boxes, row, epoch=0):
    """A row -> {"ids", "n_prompt", "views"}, in a worker. InputError for a bad image."""
    images = seen_by(model, row["image"], boxes)
    prompt = model.caption_prompt(images)
    ids, _ = encode(model, prompt, row["caption"])
    return {"ids": ids, "n_prompt": len(prompt), "views": images}


# ---------------------------------------------------------------- what trains
def choose_trained(args, model):
    """Make trainable what --tune and --init say, freeze the rest -> the adapters' name or None."""
    if args.tune == "full":
        check_full_tuning(args, model)
        model.requires_grad_(True)
        return None
    if args.init:
        name = adapters.load(model, args.init)["name"]
        for n in adapters.names_of(model, name):
            model.get_parameter(n).requires_grad_(args.soft_prompt or "soft_prompts" not in n)
        return name
    kind, size = ("lora", args.rank) if args.tune == "lora" else ("adapter", args.reduction)
    where = () if args.tune == "prompt" else ("vision", "language")
    soft_prompt = args.soft_prompt or args.tune == "prompt"
    adapters.attach(model, "caption", where, size, soft_prompt=soft_prompt, kind=kind)
    return "caption"


def check_full_tuning(args, model):
    """InputError if full tuning cannot be done with these arguments, or in this memory."""
    if args.init:
        raise InputError("--tune full trains the base alone; leave out --init")
    if model.dtype != torch.float32:
        raise InputError("--tune full trains the weights themselves, which needs --dtype float32")
    need = 12 * sum(p.numel() for p in model.parameters())      # gradients and Adam's two moments
    free = weights.free_bytes(model.device)
    if free is not None and need > free:
        raise InputError(f"--tune full needs {need / 1e9:.1f} GB more for gradients and moments, "
                         f"{free / 1e9:.1f} GB are free; --tune adapters needs a fraction")


@torch.no_grad()
def held_out_loss(model, ranks, examples):
    """-log p per target token of this and all other ranks' held-out examples -> {name: value}."""
    nll, n = 0.0, 0
    for example in examples:
        logp = model(**data.collate([example], model.tokenizer.eos_id))
        nll -= logp.sum().item()
        n += data.count_targets([example])
    nll, n = ranks.sums([nll, n])
    return {"held_out_loss": nll / n} if n else {}


# ---------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    return train.run_stage("sft.py", args.device, functools.partial(learn, args))


def learn(args, ranks):
    """The whole stage on one rank -> exit code."""
    # ---- data
    rows, bad = data.read_captions(args.data)
    rows, held_out = data.split(rows, args.holdout, args.seed)

    # ---- model, and what trains
    boxes = adapters.views_of(args.init, args.views)
    base = args.base or (adapters.read_card(args.init)["base"] if args.init else DEFAULT_BASE)
    torch.manual_seed(args.seed)
    model = open_base(base, arguments.DTYPES.get(args.dtype), ranks.device,
                      caption_prompt=args.caption_prompt, quantize=args.quantize)
    name = choose_trained(args, model)
    model.train()
    model.checkpointing = True
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    policy = train.distributed(model, ranks, all_weights=args.tune == "full")
    optimizer = train.adamw(trained, args.weight_decay, ranks)

    # ---- examples
    room_left(model, len(boxes))                # refuses a context too short for the prompt
    prompt, eos = model.caption_prompt(len(boxes)), model.tokenizer.eos_id
    make = functools.partial(make_example, model, boxes)
    if ranks.is_master:
        ids, were_cut = zip(*(encode(model, prompt, row["caption"]) for row in rows))
        data.report_bad("sft.py", bad)
        train.announce(f"{len(rows)} captions, {len(bad)} bad ones left out, {len(held_out)} held "
                       f"out, {sum(were_cut)} cut to fit the context", model, trained, ranks,
                       args.micro_batch, max(map(len, ids)), len(boxes))

    # ---- the loop
    fixed = {"base": model.fingerprint, "captions": len(rows), "rows": data.rows_hash(rows),
             **train.fixed(args, "init", "tune", "reduction", "rank", "soft_prompt",
                           "caption_prompt", views=boxes)}
    run = train.Run(args, ranks, policy, optimizer, trained, rows, make, fixed)
    for step in run.steps():
        n_targets = ranks.sum(data.count_targets(step.examples))
        for examples in step.micro_batches():
            logp = policy(**data.collate(examples, eos))                        # (B, K)
            loss = -logp.sum() / n_targets
            (loss * ranks.world).backward()     # DDP averages over ranks; a sum is meant
            step.log(loss=loss)
        step.finish()                           # clip, learning rate, AdamW; a skip if not finite
        if step.saves:
            step.row |= held_out_loss(model, ranks, run.held_out(held_out))
    if run.exit_code:
        return run.exit_code

    # ---- save
    n_replaced = run.count_replaced()
    if ranks.is_master:
        if args.tune == "full":
            model.save(args.out)
        else:
            adapters.save(model, args.out, name, stage="sft", views=boxes,
                          arguments=arguments.as_json(args), **adapters.lineage(args.init))
        print(f"wrote {args.out}; {n_replaced} rows had a broken image", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
