"""Stage 4, preference training: DPO + cross entropy on golden captions train the captioner.

READS   out/golden/golden.jsonl ({"image", "chosen", "rejected": [{"caption", "finish"}]}), golden
        captions against the captioner's own samples; the captioner, out/sft
WRITES  out/dpo: adapters.safetensors, adapters.json, log.jsonl, reference-*.jsonl, resume/

    python dpo.py
    torchrun --nproc_per_node 6 dpo.py
    python dpo.py --init out/dpo --data out/golden-2/golden.jsonl --out out/dpo-2      # next round
    python dpo.py --init none       # golden captions by a bare base: fresh adapters, no SFT before

    loss = preference(chosen, rejected) + ce · -log p(chosen) / tokens(chosen)

is the mean over a row's pairs, then over the rows of a step, all ranks together. The reference is
the captioner of --init. The adapters of both towers train; the base and the soft prompt are frozen.
What the source, the blog post ATAC-Qwen-VL, leaves open:
 1. the reference is the captioner that the round starts from; its log-probs are computed once
 2. log-probs are summed over caption tokens, and over the end token if the model itself wrote it
 3. one rejected caption per row and epoch; raise it with --max-rejected
 4. the cross entropy has weight 1 and is divided by the number of the chosen caption's tokens, as
    in iterative RPO (https://arxiv.org/abs/2404.19733, eq. 1)
"""
import functools
import hashlib
import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import adapters
from base import open_base
from chunking import LAYOUTS, seen_by
from generate import sample
from plumbing import arguments, data, scoring, train
from plumbing.errors import InputError
from plumbing.parts import PADDING, moved
from plumbing.slots import room_left

LOSSES = ("dpo", "hinge", "ipo", "kto", "none")
FIGURES = ("preference_loss", "nll_loss", "rewards/chosen", "rewards/rejected", "rewards/margins",
           "rewards/accuracies", "logps/chosen", "logps/rejected", "logps/chosen_per_token",
           "logps/rejected_per_token")


def parse_args(argv):
    p = arguments.stage_parser(__doc__, "out/dpo", "out/golden/golden.jsonl", "golden rows",
                               lr=5e-5, batch=32, epochs=1.0)
    add = p.add_argument
    add("--init", type=arguments.folder_or_none, default=Path("out/sft"),
        help="the captioner's adapter folder, or none: fresh adapters")
    add("--base", help="Hub name or folder of the base; left out, that of --init, else of --data")
    add("--reduction", type=arguments.count, default=8, help="of fresh adapters, as in sft.py")
    add("--loss", choices=LOSSES, default="dpo", help="preference loss; none: CE alone")
    add("--beta", type=arguments.positive, default=0.1, help="of the preference loss, see there")
    add("--ce", type=arguments.not_negative, default=1.0, help="weight of cross entropy; 0: off")
    add("--max-rejected", type=arguments.count, default=1, help="rejected captions per row, epoch")
    add("--watch", type=arguments.count_or_none, default=8, help="held-out images to caption")
    add("--views", choices=tuple(LAYOUTS), help="views of an image; must be the captioner's")
    arguments.add_caption_prompt(p)
    args = p.parse_args(argv)
    arguments.check_caption_prompt(p, args, "--init")
    if args.loss == "none" and args.ce == 0:
        p.error("--loss none with --ce 0 leaves nothing to learn from")
    return args


# ---------------------------------------------------------------- golden rows
def encode_rows(model, rows, room):
    """Add each caption's target ids -> the rows whose chosen caption fits, and how many do not.

    room: tokens left in the context after the prompt. A chosen caption ends in the end token; a
    rejected one only if the model ended it and it fits. One that looped or was cut off keeps its
    text, so that training lowers the probability of the loop and not of the end token.
    """
    fitting, eos = [], model.tokenizer.eos_id
    for row in rows:
        chosen = [*model.answer(row["chosen"].strip()), eos]
        rejected = []
        for r in row["rejected"]:
            ids = model.answer(r["caption"]) + [eos] * (r["finish"] == "eos")
            rejected.append(ids[:room])
        if len(chosen) <= room:
            fitting.append({**row, "chosen_ids": chosen, "rejected_ids": rejected})
    return fitting, len(rows) - len(fitting)


def add_mismatched(rows):
    """For kto (see preference_loss): give each row the next row's chosen caption."""
    return [{**row, "mismatched_ids": following["chosen_ids"]}
            for row, following in zip(rows, [*rows[1:], *rows[:1]])]


# ---------------------------------------------------------------- packing: one prefix, captions
def pack(prompt, captions):
    """One image prefix and its captions (lists of target ids) as one sequence, a branch for each.

    The ViT and the 1548 tokens of six views are then computed once per row. A branch sees the
    prompt and itself (model.py: layout). The result has ids and branch, and for each target token
    the position that predicts it, its id, and the number of its caption. The first token of every
    caption is predicted by the prompt's last one, and last tokens predict nothing:

        prompt p q, captions a b and c d ->  ids p q a c      branch    0 0 1 2
        targets a b c d                      positions 1 2 1 3          owner 0 0 1 1
    """
    ids, branch, positions, targets, owner = list(prompt), [0] * len(prompt), [], [], []
    for k, caption in enumerate(captions):
        positions += [len(prompt) - 1, *range(len(ids), len(ids) + len(caption) - 1)]
        ids += caption[:-1]
        branch += [k + 1] * (len(caption) - 1)
        targets += caption
        owner += [k] * len(caption)
    return {"ids": ids, "branch": branch, "positions": positions, "targets": targets,
            "owner": owner}


def caption_logps(model, examples, eos_id, device):
    """Log-probabilities of packed captions, each summed over its tokens -> (B, C) in nats.

    C is the largest number of captions of an example; missing captions are 0.
    """
    ids = data.padded(examples, "ids", eos_id)                                       # (B, L)
    lengths = torch.tensor([len(example["ids"]) for example in examples])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    images = data.together([example["views"] for example in examples])
    logps = model(ids, images, mask, branch=data.padded(examples, "branch", 0),
                  positions=data.padded(examples, "positions", 0),
                  logp_of=data.padded(examples, "targets", PADDING))            # 0 at padding
    n_captions = 1 + max(max(example["owner"]) for example in examples)
    owner = moved(data.padded(examples, "owner", 0), device)
    return logps.new_zeros(len(examples), n_captions).scatter_add(1, owner, logps)


# ---------------------------------------------------------------- the reference
def all_captions(model, boxes, row):
    """A row with every caption whose reference log-prob training may need."""
    mismatched = [row["mismatched_ids"]] if "mismatched_ids" in row else []
    captions = [row["chosen_ids"], *row["rejected_ids"], *mismatched]
    images = seen_by(model, row["image"], boxes)
    return {**pack(model.caption_prompt(images), captions), "views": images}


def reference_name(model, boxes, rows, start_hash):
    """How the files of a reference's log-probs begin: a hash of all that they depend on."""
    keys = ("id", "image", "chosen_ids", "rejected_ids", "mismatched_ids")
    contents = [[str(row.get(key)) for key in keys] for row in rows]
    files = [[row["image"].stat().st_size, row["image"].stat().st_mtime_ns] for row in rows]
    depends = [model.fingerprint, start_hash, f"{model.dtype}{model.quantize}",
               model.seq_length, model.caption_text, boxes, contents, files]
    return f"reference-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]}"


def reference_logps(args, ranks, model, boxes, rows, start_hash):
    """Log-probs under the captioner that the round starts from, computed once and kept on disk.

    -> {row id: {"chosen": x, "rejected": [x, …]} with "mismatched" for kto, or {"error": reason}}.
    A stopped run resumes where it was. An error is kept as well, so that a resumed run replaces the
    same rows; delete the files to try again.
    """
    name = reference_name(model, boxes, rows, start_hash)
    args.out.mkdir(parents=True, exist_ok=True)
    known = {}
    for path in sorted(args.out.glob(f"{name}-*.jsonl")):
        for _, row in data.read_jsonl(path):
            if row:                                             # a torn line is computed again
                known[row.pop("id")] = row
    # shares first, then the filter: else a share would depend on when a rank reads the files
    missing = [row for row in rows[ranks.rank::ranks.world] if row["id"] not in known]
    # line-buffered: a row is on disk once computed; the newline ends a line torn by a crash
    with (args.out / f"{name}-{ranks.rank}.jsonl").open("a", encoding="utf-8", buffering=1) as file:
        file.write("\n")
        for row in tqdm(missing, desc="reference", unit="row", disable=not ranks.is_master):
            try:
                answer = score_row(model, all_captions(model, boxes, row), row, ranks.device)
            except InputError as error:                 # data.Examples will take the next row
                answer = {"error": str(error)}
            file.write(json.dumps({"id": row["id"], **answer}) + "\n")
            known[row["id"]] = answer
    return dict(ranks.gather(known.items()))


@torch.no_grad()
def score_row(model, example, row, device):
    """The log-probs of all captions of a row, by name."""
    logps = caption_logps(model, [example], model.tokenizer.eos_id, device)[0].tolist()
    answer = {"chosen": logps[0], "rejected": logps[1:1 + len(row["rejected_ids"])]}
    return {**answer, "mismatched": logps[-1]} if "mismatched_ids" in row else answer


# ---------------------------------------------------------------- examples
def make_example(args, model, boxes, reference, row, epoch):
    """A row -> its chosen and this epoch's rejected captions behind one prefix, and the reference.
    They are drawn by seed, row and epoch. InputError for an image that cannot be read."""
    ref = reference[row["id"]]
    if "error" in ref:
        raise InputError(ref["error"])
    rng = random.Random(f"rejected {args.seed} {row['id']} {epoch}")
    n_rejected = len(row["rejected_ids"])
    drawn = rng.sample(range(n_rejected), min(args.max_rejected, n_rejected))
    captions = [row["chosen_ids"], *(row["rejected_ids"][k] for k in drawn)]
    images = seen_by(model, row["image"], boxes)
    prompt = model.caption_prompt(images)
    example = {**pack(prompt, captions), "id": row["id"], "drawn": drawn, "views": images,
               "lengths": [len(caption) for caption in captions],
               "ref_chosen": ref["chosen"], "ref_rejected": [ref["rejected"][k] for k in drawn]}
    if args.loss == "kto":
        example["mismatched"] = pack(prompt, [row["mismatched_ids"]])
        example["ref_mismatched"] = ref["mismatched"]
    return example


class Pairs(NamedTuple):
    """Chosen against rejected captions, each field (P,): log-probs in nats, lengths in tokens.

    share is 1 ÷ the number of pairs in the row, so that a sum of share · x over pairs is the sum
    over rows of the mean of x over a row's pairs.
    """
    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    chosen_len: torch.Tensor
    rejected_len: torch.Tensor
    share: torch.Tensor


def pair_up(logps, examples):
    """logps (B, C) of packed examples, the chosen caption first -> Pairs."""
    row, column, constants = [], [], []
    for b, example in enumerate(examples):
        n = len(example["drawn"])
        for k in range(n):
            row.append(b)
            column.append(1 + k)
            constants.append((example["ref_chosen"], example["ref_rejected"][k],
                              example["lengths"][0], example["lengths"][1 + k], 1 / n))
    row, column, constants = (
        moved(torch.tensor(values), logps.device) for values in (row, column, constants))
    return Pairs(logps[row, 0], logps[row, column], *constants.unbind(1))


# ---------------------------------------------------------------- the losses
def preference_loss(kind, policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta,
                    chosen_len, rejected_len, kl=None):
    """The loss of each pair -> (B,).

    policy_*, ref_* (B,): log-probabilities of the captions, summed over their tokens, in nats.
    *_len (B,): how many tokens that were. kl (any shape), for kto: log-ratios of mismatched
    captions.

    With r_w = log π(chosen) − log ref(chosen), r_l the same of the rejected caption, |w| and |l|
    their lengths, σ the logistic function, β = beta:

      dpo    −log σ(β (r_w − r_l))            DPO, eq. 7: https://arxiv.org/abs/2305.18290
      hinge  max(0, 1 − β (r_w − r_l))        SLiC-HF: https://arxiv.org/abs/2305.10425
      ipo    (r_w/|w| − r_l/|l| − 1/(2β))²    IPO, eq. 17: https://arxiv.org/abs/2310.12036
      kto    ½ [1 − σ(β (r_w − z)) + 1 − σ(β (z − r_l))]      KTO: https://arxiv.org/abs/2402.01306
      none   0

    ipo is a variant. The paper's log-ratios are sums over tokens; these are means, as in TRL, so
    that long captions do not set the scale. The target margin, 1/(2β), is therefore per token, and
    useful β are larger: in the toy world 8, where dpo's is .1 (results/claims.json).

    kto: z estimates KL(π ‖ ref) on this kind of image, the level from which a caption counts as
    better or worse than before. The KL is a mean over captions drawn from π; sampling them at every
    step is too slow. Captions of other images stand in for them: fluent and in style, but not about
    this image, so that their mean log-ratio shows the overall drift of π and not how well it knows
    this caption. This estimate is biased, and clipped at 0 because a KL is not negative. No
    gradient flows through z.
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


@torch.no_grad()
def mismatched_ratio(model, ranks, examples):
    """For kto: log π − log ref of mismatched captions, the mean over all ranks' examples, or 0."""
    total, n = torch.zeros((), dtype=torch.float64, device=ranks.device), 0
    for example in examples:
        packed = {**example["mismatched"], "views": example["views"]}
        logp = caption_logps(model, [packed], model.tokenizer.eos_id, ranks.device)
        total += logp.sum().double() - example["ref_mismatched"]
        n += 1
    return (ranks.added(total) / max(ranks.sum(n), 1)).float()


def pair_losses(args, pairs, kl):
    """The loss of each pair (P,), and {name: (P,)} of figures that make a collapse visible."""
    preference = preference_loss(args.loss, pairs.chosen, pairs.rejected, pairs.ref_chosen,
                                 pairs.ref_rejected, args.beta, pairs.chosen_len,
                                 pairs.rejected_len, kl)
    nll = -pairs.chosen / pairs.chosen_len
    loss = preference + args.ce * nll
    reward_chosen = args.beta * (pairs.chosen - pairs.ref_chosen)
    reward_rejected = args.beta * (pairs.rejected - pairs.ref_rejected)
    values = (preference, nll, reward_chosen, reward_rejected, reward_chosen - reward_rejected,
              (reward_chosen > reward_rejected).float(), pairs.chosen, pairs.rejected, -nll,
              pairs.rejected / pairs.rejected_len)
    return loss, dict(zip(FIGURES, values))


# ---------------------------------------------------------------- held-out rows
def validate(args, ranks, model, boxes, run, held_out):
    """The loss and figures of held-out rows, and what captions of their images look like."""
    kl = None
    if args.loss == "kto":
        kl = mismatched_ratio(model, ranks, run.held_out(held_out))
    sums, n = dict.fromkeys(("loss", *FIGURES), 0.0), 0
    for example in run.held_out(held_out):
        n += 1
        with torch.no_grad():
            logps = caption_logps(model, [example], model.tokenizer.eos_id, ranks.device)
            pairs = pair_up(logps, [example])
            losses, figures = pair_losses(args, pairs, kl)
        for name, values in {"loss": losses, **figures}.items():
            sums[name] += pairs.share @ values
    n, *totals = ranks.sums([n, *sums.values()])
    means = {f"held_out_{name}": total / n for name, total in zip(sums, totals)} if n else {}
    images = sorted({row["image"] for row in held_out})[:args.watch]
    return {**means, **watch(ranks, model, images, boxes, args.seed)}


def watch(ranks, model, images, boxes, seed):
    """Caption some images -> mean length, share with an end token, share with repeats."""
    captions = []
    for image in images[ranks.rank::ranks.world]:
        try:
            seen = seen_by(model, image, boxes)
        except InputError:                              # reported with the held-out rows
            continue
        captions += sample(model, [seen], [image.name], 1, seed=seed)[0]
    captions = ranks.gather(captions)
    return {f"watch/{name}": value for name, value in scoring.habits(captions).items()}


# ---------------------------------------------------------------- main
def open_captioner(args, device):
    """The policy's start, which is the reference -> model, boxes of the views, its adapters' name.
    Without a folder it is the bare base that made the golden rows, with fresh adapters."""
    dtype = arguments.DTYPES.get(args.dtype)
    if args.init:
        model = open_base(args.base or adapters.read_card(args.init)["base"], dtype, device,
                          quantize=args.quantize)
        boxes = adapters.views_of(args.init, args.views)
        return model, boxes, adapters.load(model, args.init)["name"]
    base, views, prompt = data.made_by(args.data, args.base, args.views, args.caption_prompt)
    torch.manual_seed(args.seed)
    model = open_base(base, dtype, device, caption_prompt=prompt, quantize=args.quantize)
    adapters.attach(model, "caption", reduction=args.reduction)
    return model, adapters.views_of(None, views), "caption"


def adapters_to_train(args, model, name):
    """Make the captioner's adapters trainable, and nothing else -> {name: parameter}."""
    for n in adapters.names_of(model, name):
        model.get_parameter(n).requires_grad_("soft_prompts" not in n)
    model.train()
    model.checkpointing = True
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise InputError(f"{args.init}: has only a soft prompt, and adapters are what trains here; "
                         "give another --init")
    return trained


def main(argv=None):
    args = parse_args(argv)
    return train.run_stage("dpo.py", args.device, functools.partial(learn, args))


def learn(args, ranks):
    """The whole stage on one rank -> exit code."""
    # ---- the captioner
    model, boxes, captioner = open_captioner(args, ranks.device)

    # ---- data
    rows, bad = data.read_golden(args.data)
    room, eos = room_left(model, len(boxes)), model.tokenizer.eos_id
    rows, n_long = encode_rows(model, rows, room)
    if not rows:
        raise InputError(f"{args.data}: no chosen caption fits in the context of "
                         f"{model.seq_length} tokens")
    rows = add_mismatched(rows) if args.loss == "kto" else rows
    rows, held_out = data.split(rows, args.holdout, args.seed)

    # ---- what trains: the adapters; the soft prompt stays frozen
    trained = adapters_to_train(args, model, captioner)
    policy = train.distributed(model, ranks)
    optimizer = train.adamw(trained, args.weight_decay, ranks)
    if ranks.is_master:
        data.report_bad("dpo.py", bad)
        longest = len(model.caption_prompt(len(boxes))) + max(len(row["chosen_ids"]) + sum(
            sorted(map(len, row["rejected_ids"]))[-args.max_rejected:]) for row in rows)
        train.announce(f"captioner {args.init}; {len(rows)} golden rows, {len(bad)} bad and "
                       f"{n_long} too long ones left out, {len(held_out)} held out",
                       model, trained, ranks, args.micro_batch, longest, len(boxes))

    # ---- the reference's log-probs, before training and before run.steps() loads a checkpoint
    start = model.loaded.get(captioner, "the bare base")
    reference = reference_logps(args, ranks, model, boxes, [*rows, *held_out], start)
    make = functools.partial(make_example, args, model, boxes, reference)

    # ---- the loop
    fixed = {"base": model.fingerprint, "start": start, "rows": data.rows_hash(rows),
             **train.fixed(args, "loss", "beta", "ce", "max_rejected", "reduction",
                           golden=len(rows), prompt=model.caption_text)}
    run = train.Run(args, ranks, policy, optimizer, trained, rows, make, fixed)
    for step in run.steps():
        n_rows = ranks.sum(len(step.examples))
        kl = mismatched_ratio(model, ranks, step.examples) if args.loss == "kto" else None
        for examples in step.micro_batches():
            logps = caption_logps(policy, examples, eos, ranks.device)          # (B, C)
            pairs = pair_up(logps, examples)                                    # each (P,)
            losses, figures = pair_losses(args, pairs, kl)
            loss = pairs.share @ losses / n_rows
            (loss * ranks.world).backward()     # DDP averages over ranks; a sum is meant
            step.log(loss=loss, **{name: pairs.share @ x / n_rows for name, x in figures.items()})
        step.finish()                           # clip, learning rate, AdamW; a skip if not finite
        if step.saves:
            step.row |= validate(args, ranks, model, boxes, run, held_out)
    if run.exit_code:
        return run.exit_code

    # ---- save
    n_replaced = run.count_replaced()
    if ranks.is_master:
        adapters.save(model, args.out, captioner, stage="dpo", views=boxes,
                      arguments=arguments.as_json(args), **adapters.lineage(args.init))
        print(f"wrote {args.out}; {n_replaced} rows had a broken image", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
