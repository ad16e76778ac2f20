"""Stage 1, supervised fine-tuning: captions teach a frozen Qwen-VL the shorthand style, through adapters.

READS   captions (JSONL of {"image", "caption"}, an imagefolder, or images with .txt beside); a base
WRITES  out/sft: adapters.safetensors, adapters.json, log.jsonl, resume/

    python sft.py --data captions.jsonl                             # one process
    torchrun --nproc_per_node 6 sft.py --data captions.jsonl        # one per card

The same command again goes on from the last checkpoint. Differs from the source in, or decides where it is silent:
 1. adapters: bottleneck 1/8, ReLU, up from zero (adapters.py); the source does not give their shape
 2. the soft prompt stands where the caption prompt would, after the images
 3. the loss is the sum over target tokens of the whole step ÷ their number, over all ranks and micro-batches
 4. a caption that does not fit the context is cut after its last whole statement and ends there
"""
import argparse
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import adapters
from chunking import BOXES, views
from generate import room_left
from model import QwenVL
from plumbing import data, train, weights
from plumbing.errors import InputError
from plumbing.images import open_image
from plumbing.train import ShardedAdamW


def parse_args(argv):
    p = train.stage_parser(__doc__, "out/sft", "data/sft.jsonl", "captions", lr=2e-4, batch=32, epochs=3.0)
    p.add_argument("--base", default="Qwen/Qwen-VL", help="Hub name or folder of the base model")
    p.add_argument("--init", type=Path, help="adapter folder to start from instead of fresh adapters")
    p.add_argument("--tune", choices=("adapters", "lora", "prompt", "full"), default="adapters", help="what trains: "
                   "adapters or LoRA with a soft prompt, the soft prompt alone, or every weight of the base")
    p.add_argument("--reduction", type=int, default=8, help="width of the model ÷ width of an adapter's bottleneck")
    p.add_argument("--rank", type=int, default=16, help="of LoRA")
    p.add_argument("--soft-prompt", action=argparse.BooleanOptionalAction, default=True, help="train a soft prompt too")
    return train.checked(p, argv)


# ---------------------------------------------------------------- data
def encode(tokenizer, prompt, caption, seq_length):
    """Prompt ids and a caption -> ids up to the end token, and whether the caption was cut to fit the context.

    The caption's first token carries the leading space. What is too long ends after its last whole statement that fits.
    """
    room = seq_length - len(prompt) - 1
    statements, target = caption.split(", "), tokenizer.encode(" " + caption)
    was_cut = len(target) > room
    while len(target) > room and len(statements) > 1:
        statements.pop()
        target = tokenizer.encode(" " + ", ".join(statements))
    return prompt + target[:room] + [tokenizer.eos_id], was_cut


# ---------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    return train.run_stage("sft.py", args.device, lambda ranks: run_rank(args, ranks))


def run_rank(args, ranks):
    """The whole stage on one rank -> exit code."""
    # ---- data
    rows, bad = data.read_captions(args.data)
    rows, held = data.split(rows, args.holdout, args.seed)

    # ---- model and what is frozen
    torch.manual_seed(args.seed)
    model = QwenVL.from_pretrained(args.base, getattr(torch, args.dtype) if args.dtype else None, ranks.device)
    name = start(args, model)
    model.train()
    model.checkpointing = True
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    policy = DistributedDataParallel(model, gradient_as_bucket_view=True) if ranks.world > 1 else model

    # ---- the loss: sum over target tokens, which `fit` divides by their number in the whole step
    prompt = model.caption_prompt(len(BOXES))
    room_left(model, len(BOXES))            # refuses a context that is too short for it

    def make(row, epoch=0):
        ids, _ = encode(model.tokenizer, prompt, row["caption"], model.config.seq_length)
        return {"ids": ids, "n_prompt": len(prompt),
                "views": views(open_image(row["image"]), model.config.visual.image_size)}

    def loss_of(policy, examples):
        return -policy(**data.collate(examples, model, ranks.device)).sum() * bool(examples), {}

    broken = {}             # held-out rows that were told

    @torch.no_grad()
    def validate():
        total, tokens = 0.0, 0
        for row in held[ranks.rank::ranks.world]:
            try:
                example = make(row)
            except InputError as error:
                data.good_rows([error], broken)
                continue
            total, tokens = total + loss_of(model, [example])[0].item(), tokens + data.n_targets([example])
        total, tokens = ranks.sum(total, tokens)
        return {"held_out_loss": total / tokens} if tokens else {}

    # ---- optimizer, resume, loop
    optimizer = ShardedAdamW(trained, args.weight_decay, ranks)
    keys = ("init", "tune", "reduction", "rank", "soft_prompt", *train.RUN)
    run = {"base": model.fingerprint, "captions": len(rows), "rows": data.rows_hash(rows)}
    run |= {key: str(getattr(args, key)) for key in keys}
    if ranks.is_master:
        n_cut = sum(encode(model.tokenizer, prompt, row["caption"], model.config.seq_length)[1] for row in rows)
        data.tell_bad("sft.py", bad)
        train.announce(f"{len(rows)} captions, {len(bad)} bad ones left out, {len(held)} held out, {n_cut} cut to fit "
                        "the context", model, trained, ranks, args.micro_batch)
    code, counts = train.fit(args, ranks, policy, optimizer, rows, make, data.n_targets, loss_of, validate, run)

    # ---- save
    if code == 0 and ranks.is_master:
        if args.tune == "full":
            weights.write_base(model, args.out, weights.resolve(args.base) / "qwen.tiktoken")
        else:
            adapters.save(model, args.out, name, stage="sft", arguments=train.plain(args),
                          **adapters.lineage(args.init))
        print(f"wrote {args.out}; {counts['broken']} rows had a broken image", file=sys.stderr)
    return code


def start(args, model):
    """Fresh adapters and soft prompt as --tune says, or those of --init; all else frozen -> their name."""
    if args.init and args.tune == "full":
        raise InputError("--tune full trains the base alone; leave out --init")
    if args.init:
        name = adapters.load(model, args.init)["name"]
        for n in adapters.names_of(model, name):
            model.get_parameter(n).requires_grad_(True)
        return name
    if args.tune == "full":
        numbers = sum(p.numel() for p in model.parameters())
        need, free = 12 * numbers, weights.free_bytes(model.lm_head.weight.device)     # gradients and Adam's moments
        if model.lm_head.weight.dtype != torch.float32:
            raise InputError("--tune full trains the weights themselves, which needs --dtype float32")
        if free is not None and need > free:
            raise InputError(f"--tune full needs {need / 1e9:.1f} GB more for gradients and moments, "
                             f"{free / 1e9:.1f} GB are free; --tune adapters needs a fraction")
        model.requires_grad_(True)
        return None
    kind, size = ("lora", args.rank) if args.tune == "lora" else ("adapter", args.reduction)
    where = () if args.tune == "prompt" else ("vision", "language")
    adapters.attach(model, "caption", where, size, soft_prompt=args.soft_prompt or args.tune == "prompt", kind=kind)
    return "caption"


if __name__ == "__main__":
    sys.exit(main())
