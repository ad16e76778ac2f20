"""Stage 4, preference training: DPO + cross entropy on golden samples, the loop's step that changes the captioner.

READS   out/golden/golden.jsonl ({"image", "chosen", "rejected": [{"caption", "finish"}]}); the captioner, out/sft
WRITES  out/dpo: adapters.safetensors, adapters.json, log.jsonl, reference-*.jsonl, resume/

    python dpo.py
    torchrun --nproc_per_node 6 dpo.py
    python dpo.py --init out/dpo --data out/golden-2/golden.jsonl --out out/dpo-2          # the next round

The adapters of both towers train, the soft prompt stays frozen. The chosen caption and its rejected ones are packed
behind one image prefix, so that the ViT and the prefix run once per row. Decided where the source is silent:
 1. the reference is the round's start (with --sft-first: the adapters after it); its log-probs are computed once
 2. log-probs are summed over caption tokens, and over the end token where a caption really ended
 3. one rejected caption per row and epoch; --max-rejected packs more
 4. the cross entropy weighs 1 and is divided by the chosen caption's own tokens
"""
import argparse
import contextlib
import copy
import hashlib
import json
import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import adapters
from chunking import BOXES, views
from generate import sample
from model import QwenVL
from plumbing import data, train
from plumbing.errors import InputError
from plumbing.images import open_image
from plumbing.train import ShardedAdamW


def parse_args(argv):
    p = train.stage_parser(__doc__, "out/dpo", "out/golden/golden.jsonl", "golden rows", lr=5e-5, batch=32, epochs=1.0)
    p.add_argument("--init", type=Path, default=Path("out/sft"), help="adapter folder of the captioner to start from")
    p.add_argument("--base", help="Hub name or folder of the base, if not where the captioner's training found it")
    p.add_argument("--loss", choices=("dpo", "hinge", "ipo", "kto", "none"), default="dpo", help="preference loss; "
                   "none leaves the cross entropy alone")
    p.add_argument("--beta", type=float, default=0.1, help="its strength; ipo and kto have scales of their own")
    p.add_argument("--ce", type=float, default=1.0, help="weight of the cross entropy on the chosen caption, 0 = off")
    p.add_argument("--max-rejected", type=int, default=1, help="rejected captions per row and epoch")
    p.add_argument("--sft-first", action=argparse.BooleanOptionalAction, default=False, help="first a short SFT on the "
                   "chosen captions, then used as start and reference")
    p.add_argument("--sft-epochs", type=float, default=1.0, help="length of that SFT")
    p.add_argument("--watch", type=int, default=8, help="held-out images captioned at every checkpoint")
    args = train.checked(p, argv)
    if args.loss == "none" and args.ce == 0:
        p.error("--loss none with --ce 0 leaves nothing to learn from")
    if not (0 < args.beta < math.inf and 0 <= args.ce < math.inf and 0 < args.sft_epochs < math.inf
            and args.max_rejected >= 1 and args.watch >= 0):
        p.error("--beta, --max-rejected and --sft-epochs must be above 0; --ce and --watch not negative")
    return args


# ---------------------------------------------------------------- golden rows
def read_golden(path):
    """Rows [{"id", "image", "chosen", "rejected"}] and the bad ones [(where, reason)]; id is the place in the file."""
    rows, bad = [], []
    for where, row in data.read_jsonl(path):
        row = row or {}
        image, chosen, rejected = (row.get(key) for key in ("image", "chosen", "rejected"))
        whole = isinstance(rejected, list) and rejected and all(
            isinstance(r, dict) and isinstance(r.get("caption"), str) and r["caption"].strip() for r in rejected)
        if not isinstance(image, str) or not isinstance(chosen, str) or not chosen.strip() or not whole:
            bad.append((where, "no JSON object with image, chosen, and rejected captions"))
        elif not data.is_there(Path(path).parent / image):
            bad.append((where, f"{image} is not there"))
        else:
            rows.append({"id": where.rsplit(":", 1)[1], "where": where, "image": Path(path).parent / image,
                         "chosen": chosen,
                         "rejected": [{"caption": r["caption"], "finish": r.get("finish")} for r in rejected]})
    return data.need_rows(path, rows, bad)


def encode_rows(tokenizer, rows, room):
    """Add to each row the target ids of its captions -> the rows whose chosen caption fits, and how many do not.

    A chosen caption ends in the end token; a rejected one only where it really ended and fits. The next row's chosen
    caption is the mismatched one of a row.
    """
    fitting = []
    for row in rows:
        chosen = [*tokenizer.encode(" " + row["chosen"].strip()), tokenizer.eos_id]
        row = {**row, "chosen_ids": chosen, "rejected_ids": []}
        for r in row["rejected"]:
            text = r["caption"] if r["caption"].startswith(" ") else " " + r["caption"]
            ids = tokenizer.encode(text) + [tokenizer.eos_id] * (r["finish"] == "eos")
            row["rejected_ids"].append(ids[:room])
        if len(row["chosen_ids"]) <= room:
            fitting.append(row)
    for row, following in zip(fitting, [*fitting[1:], *fitting[:1]]):
        row["mismatched_ids"] = following["chosen_ids"]
    return fitting, len(rows) - len(fitting)


def pack(prompt, captions):
    """One image prefix and its captions (lists of target ids) as one sequence with a branch each.

    Returns ids and branch, and of every target token in order: the position it follows, itself, its caption's number.
    The first token of every caption follows the prompt's last one.
    """
    ids, branch, positions, targets, owner = list(prompt), [0] * len(prompt), [], [], []
    for k, caption in enumerate(captions):
        positions += [len(prompt) - 1, *range(len(ids), len(ids) + len(caption) - 1)]
        ids += caption[:-1]
        branch += [k + 1] * (len(caption) - 1)
        targets += caption
        owner += [k] * len(caption)
    return {"ids": ids, "branch": branch, "positions": positions, "targets": targets, "owner": owner}


def caption_logps(model, examples, eos_id, device):
    """Summed log-probabilities of each example's captions -> (B, C), C the largest number of captions."""
    def padded(key, fill):
        longest = max(len(example[key]) for example in examples)
        rows = [example[key] + [fill] * (longest - len(example[key])) for example in examples]
        return torch.tensor(rows, device=device)
    ids, n_captions = padded("ids", eos_id), max(max(example["owner"]) for example in examples) + 1
    length = torch.tensor([len(example["ids"]) for example in examples], device=device)[:, None]
    logps = model(ids, torch.cat([example["views"] for example in examples]).to(device),
                  mask=torch.arange(ids.shape[1], device=device)[None] < length, branch=padded("branch", 0),
                  positions=padded("positions", 0), targets=padded("targets", eos_id))
    sums = logps.new_zeros(len(examples), n_captions + 1)                   # the last column takes the padding
    return sums.scatter_add(1, padded("owner", n_captions), logps)[:, :-1]


def make_blank(model, prompt):
    """An example that stands where every image of a micro-batch was broken; it weighs nothing."""
    side, eos = model.config.visual.image_size, [model.tokenizer.eos_id]
    return {**pack(prompt, [eos, eos, eos]), "views": torch.zeros(len(BOXES), 3, side, side), "id": None, "drawn": [0],
            "lengths": [1, 1, 1]}


# ---------------------------------------------------------------- reference
def reference_logps(args, ranks, model, rows, make_all, start_hash):
    """Log-probs under the starting adapters -> {row id: [chosen, mismatched, rejected …]}, computed once and kept.

    The file's name is a hash of all that they depend on; a stopped run goes on where it was.
    """
    what = [model.fingerprint, start_hash, str(model.lm_head.weight.dtype), model.config.seq_length, BOXES,
            [[str(row[k]) for k in ("id", "image", "chosen_ids", "mismatched_ids", "rejected_ids")]
             + [row["image"].stat().st_size, row["image"].stat().st_mtime_ns] for row in rows]]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    args.out.mkdir(parents=True, exist_ok=True)
    known = {}
    for path in sorted(args.out.glob(f"reference-{key}-*.jsonl")):
        for _, row in data.read_jsonl(path):
            if row and "logps" in row:                          # a torn last line is computed again
                known[row["id"]] = row["logps"]
    # a rank's rows do not depend on what others have written by the time that it looks
    missing = [row for row in rows[ranks.rank::ranks.world] if row["id"] not in known]
    own = args.out / f"reference-{key}-{ranks.rank}.jsonl"
    with own.open("a", encoding="utf-8", buffering=1) as file, torch.no_grad():       # a line is on disk once computed
        file.write("\n")                                        # after a torn line, a fresh one
        for row in tqdm(missing, desc="reference", unit="row", disable=not ranks.is_master):
            with contextlib.suppress(InputError):               # a broken image is told where it is trained on
                logps = caption_logps(model, [make_all(row)], model.tokenizer.eos_id, ranks.device)[0].tolist()
                file.write(json.dumps({"id": row["id"], "logps": logps}) + "\n")
                known[row["id"]] = logps
    return dict(ranks.gather(known.items()))


# ---------------------------------------------------------------- the losses
def preference_loss(kind, policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, chosen_len, rejected_len,
                    kl=None):
    """The loss of each pair -> (B,).

    policy_*, ref_* (B,): log-probabilities of the captions, summed over their tokens, in nats; *_len (B,): how many
    tokens that were. kl (any shape), for kto: policy − reference log-ratios of mismatched captions.
      dpo    −log σ(β·D)                      D = log-ratio of the chosen − log-ratio of the rejected (DPO, eq. 7)
      hinge  max(0, 1 − β·D)                  (SLiC)
      ipo    (D̄ − 1/(2β))²                    each log-ratio divided by its own length (IPO, eq. 17)
      kto    ½ (1 − σ(β(r_w − z)) + 1 − σ(β(z − r_l))), z = max(0, mean kl), without gradient
      none   0
    """
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    if kind == "dpo":
        return -F.logsigmoid(beta * (chosen - rejected))
    if kind == "hinge":
        return F.relu(1 - beta * (chosen - rejected))
    if kind == "ipo":
        return (chosen / chosen_len - rejected / rejected_len - 1 / (2 * beta)) ** 2
    if kind == "kto":
        z = kl.detach().mean().clamp(min=0)
        return 1 - (torch.sigmoid(beta * (chosen - z)) + torch.sigmoid(beta * (z - rejected))) / 2
    if kind == "none":
        return torch.zeros_like(chosen)
    raise ValueError(f"no such loss: {kind}")


# ---------------------------------------------------------------- the loss of a row, and what makes a collapse visible
FIGURES = ("preference_loss", "nll_loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
           "logps/chosen", "logps/rejected", "logps/chosen_per_token", "logps/rejected_per_token")


def row_loss(args, example, logps, ref, kl):
    """Mean preference loss over a row's pairs + --ce × NLL of the chosen caption per token -> loss, {figure: tensor}.

    logps (C,): the policy's, in the order of example["lengths"]; ref: the reference's [chosen, mismatched, rejected …].
    """
    n, device = len(example["drawn"]), logps.device
    chosen, rejected = logps[0].expand(n), logps[len(example["lengths"]) - n:len(example["lengths"])]
    lengths = torch.tensor(example["lengths"], device=device)
    chosen_len, rejected_len = lengths[0].expand(n), lengths[-n:]
    ref_chosen = torch.full_like(rejected, ref[0])
    ref_rejected = torch.tensor([ref[2 + k] for k in example["drawn"]], device=device)
    preference = preference_loss(args.loss, chosen, rejected, ref_chosen, ref_rejected, args.beta, chosen_len,
                                 rejected_len, kl).mean()
    nll = -logps[0] / chosen_len[0]
    reward_chosen, reward_rejected = args.beta * (chosen - ref_chosen), args.beta * (rejected - ref_rejected)
    figures = (preference, nll, reward_chosen.mean(), reward_rejected.mean(), (reward_chosen - reward_rejected).mean(),
               (reward_chosen > reward_rejected).float().mean(), chosen[0], rejected.mean(), -nll,
               (rejected / rejected_len).mean())
    return preference + args.ce * nll, dict(zip(FIGURES, figures))


@torch.no_grad()
def mismatched_ratios(ranks, model, examples, reference):
    """For kto: policy − reference log-ratios of the mismatched captions of a whole step, of all ranks."""
    own = []
    for example in examples:
        packed = {**example["mismatched"], "views": example["views"]}
        logps = caption_logps(model, [packed], model.tokenizer.eos_id, ranks.device)
        own.append(logps.item() - reference[example["id"]][1])
    return torch.tensor(ranks.gather(own) or [0.0], device=ranks.device)


def watch(ranks, model, images, look, seed):
    """Caption a few held-out images -> mean length, share with an end token, share that repeats a statement."""
    said = []
    for image in images[ranks.rank::ranks.world]:
        with contextlib.suppress(InputError):
            said += sample(model, look(image)[None], [image.name], 1, seed=seed)[0]
    said = ranks.gather(said)
    statements = [[part.strip() for part in row["caption"].split(",") if part.strip()] for row in said]
    return {"watch/length": sum(row["tokens"] for row in said) / len(said),
            "watch/eos": sum(row["finish"] == "eos" for row in said) / len(said),
            "watch/repeat": sum(len(set(parts)) < len(parts) for parts in statements) / len(said)} if said else {}


# ---------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    return train.run_stage("dpo.py", args.device, lambda ranks: run_rank(args, ranks))


def run_rank(args, ranks):
    """The whole stage on one rank -> exit code."""
    # ---- previous stage
    card = adapters.read_card(args.init)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model = QwenVL.from_pretrained(args.base or card["base"], dtype, ranks.device)
    name = adapters.load(model, args.init)["name"]
    start_hash = model.loaded[name]

    # ---- data
    rows, bad = read_golden(args.data)
    prompt, eos = model.caption_prompt(len(BOXES)), model.tokenizer.eos_id
    rows, too_long = encode_rows(model.tokenizer, rows, model.config.seq_length - len(prompt))
    if not rows:
        raise InputError(f"{args.data}: no chosen caption fits in the context of {model.config.seq_length} tokens")
    rows, held = data.split(rows, args.holdout, args.seed)

    def look(row):
        return views(open_image(row["image"]), model.config.visual.image_size)

    def make(row, epoch):
        """Chosen and this epoch's rejected captions behind one prefix."""
        rng = random.Random(f"rejected {args.seed} {row['id']} {epoch}")
        drawn = rng.sample(range(len(row["rejected_ids"])), min(args.max_rejected, len(row["rejected_ids"])))
        captions, pixels = [row["chosen_ids"], *(row["rejected_ids"][k] for k in drawn)], look(row)
        if row["id"] not in reference:
            raise InputError(f"{row['image']}: could not be read when the reference was computed")
        return {**pack(prompt, captions), "views": pixels, "id": row["id"], "drawn": drawn,
                "lengths": [len(caption) for caption in captions], "mismatched": pack(prompt, [row["mismatched_ids"]])}

    def make_all(row):
        return {**pack(prompt, [row["chosen_ids"], row["mismatched_ids"], *row["rejected_ids"]]), "views": look(row)}

    # ---- model and what is frozen
    for n in adapters.names_of(model, name):
        model.get_parameter(n).requires_grad_("soft_prompts" not in n)
    model.train()
    model.checkpointing = True
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise InputError(f"{args.init}: has a soft prompt alone, and only adapters train here; give another --init")
    policy = DistributedDataParallel(model, gradient_as_bucket_view=True) if ranks.world > 1 else model
    if ranks.is_master:
        data.tell_bad("dpo.py", bad)
        train.announce(f"captioner {args.init}; {len(rows)} golden rows, {len(bad)} bad and {too_long} too long ones "
                        f"left out, {len(held)} held out", model, trained, ranks, args.micro_batch)
    keys = ("loss", "beta", "ce", "max_rejected", "sft_first", "sft_epochs", *train.RUN)
    run = {"base": model.fingerprint, "start": start_hash, "golden": len(rows), "rows": data.rows_hash(rows)}
    run |= {key: str(getattr(args, key)) for key in keys}

    # ---- a short SFT first, if asked for
    if args.sft_first:
        code, start_hash = sft_first(args, ranks, policy, model, name, trained, rows, look, prompt, run)
        if code:
            return code

    # ---- the loss: mean over a row's pairs, then over the step's rows
    reference = reference_logps(args, ranks, model, [*rows, *held], make_all, start_hash)

    kl = torch.zeros(1, device=ranks.device)

    def prepare(examples):
        nonlocal kl
        kl = mismatched_ratios(ranks, model, examples, reference) if args.loss == "kto" else kl

    def loss_of(policy, examples):
        good = examples or [make_blank(model, prompt)]  # the other ranks wait for this one's gradients
        logps = caption_logps(policy, good, eos, ranks.device)
        refs = [reference.get(example["id"], [0.0] * 3) for example in good]
        total, figures = logps.new_zeros(()), dict.fromkeys(FIGURES, 0.0)
        for example, own, ref in zip(good, logps, refs):
            loss, found = row_loss(args, example, own, ref, kl)
            total = total + loss
            figures = {name: figures[name] + found[name].item() * bool(examples) for name in FIGURES}
        return total * bool(examples), figures

    @torch.no_grad()
    def validate():
        sums, examples = dict.fromkeys(("loss", *FIGURES), 0.0), []
        for row in held[ranks.rank::ranks.world]:
            with contextlib.suppress(InputError):
                examples.append(make(row, 0))
        prepare(examples)
        for example in examples:
            loss, figures = loss_of(model, [example])
            sums = {name: value + {"loss": loss.item(), **figures}[name] for name, value in sums.items()}
        n, *totals = ranks.sum(len(examples), *sums.values())
        found = {f"held_out_{name}": total / n for name, total in zip(sums, totals)} if n else {}
        images = sorted({row["image"] for row in held})[:args.watch]
        return {**found, **watch(ranks, model, images, lambda image: look({"image": image}), args.seed)}

    # ---- optimizer, resume, loop
    optimizer = ShardedAdamW(trained, args.weight_decay, ranks)
    code, counts = train.fit(args, ranks, policy, optimizer, rows, make, len, loss_of, validate, run, prepare)

    # ---- save
    if code == 0 and ranks.is_master:
        adapters.save(model, args.out, name, stage="dpo", arguments=train.plain(args), **adapters.lineage(args.init))
        print(f"wrote {args.out}; {counts['broken']} rows had a broken image", file=sys.stderr)
    return code


def sft_first(args, ranks, policy, model, name, trained, rows, look, prompt, run):
    """Cross entropy on the chosen captions alone, in out/sft-first -> exit code and the hash of its adapters."""
    mine = copy.copy(args)
    mine.out, mine.epochs, mine.max_steps = args.out / "sft-first", args.sft_epochs, None

    def make(row, epoch=0):
        return {"ids": prompt + row["chosen_ids"], "n_prompt": len(prompt), "views": look(row)}

    def loss_of(policy, examples):
        return -policy(**data.collate(examples, model, ranks.device)).sum() * bool(examples), {}

    optimizer = ShardedAdamW(trained, args.weight_decay, ranks)
    code, _ = train.fit(mine, ranks, policy, optimizer, rows, make, data.n_targets, loss_of, dict, run)
    if code == 0 and ranks.is_master:
        adapters.save(model, mine.out, name, stage="sft", arguments=train.plain(mine), **adapters.lineage(args.init))
    ranks.barrier()
    return code, adapters.folder_hash(mine.out) if code == 0 else None


if __name__ == "__main__":
    sys.exit(main())
