"""Stage 2, the QA adapter: teaches the captioner's own model to answer yes/no questions.

READS   questions (JSONL of {"image", "question", "answer"}, answers starting with yes or no); the
        captioner, out/sft
WRITES  out/qa: adapters.safetensors, adapters.json (with the calibrated threshold), log.jsonl,
        resume/

    python qa_adapter.py --data questions.jsonl
    torchrun --nproc_per_node 6 qa_adapter.py --data questions.jsonl
    python qa_adapter.py --init out/dpo --out out/qa-2 --data questions.jsonl   # for the next round
    python qa_adapter.py --test others.jsonl        # how often the gate is right on other questions

Only the new adapters train: in the language model alone, since a narrow set of questions would pull
the image embeddings towards itself, and below the captioning adapters, which stay active and
frozen. What the source, the blog post ATAC-Qwen-VL, leaves open:
 1. "below" = nearer the base: sublayer -> QA adapter -> caption adapter -> residual
 2. the prompt is the base's own form, Qwen-VL's `{question} Answer:`, without the soft prompt
 3. the threshold on P(yes) is the one with the best F.5 on held-out questions, in which precision
    counts twice as much as recall (see generate.calibrate)
"""
import argparse
import functools
import sys
from pathlib import Path

import torch

import adapters
from base import open_base
from chunking import LAYOUTS, seen_by
from generate import answers, ask_together, calibrate, gate
from plumbing import arguments, data, train


def parse_args(argv):
    p = arguments.stage_parser(__doc__, "out/qa", "data/qa.jsonl", "questions", lr=2e-4, batch=32,
                               epochs=3.0)
    add = p.add_argument
    add("--init", type=Path, default=Path("out/sft"), help="the captioner's adapter folder")
    add("--base", help="Hub name or folder of the base; left out, that of the captioner")
    add("--reduction", type=int, default=8, help="width of the model ÷ width of a bottleneck")
    add("--vision", action=argparse.BooleanOptionalAction, default=False,
        help="train adapters in the ViT, too; the source warns against it")
    add("--views", choices=tuple(LAYOUTS), help="views of an image; must be the captioner's")
    add("--test", type=Path, help="train nothing: ask these questions of the adapter in --out, and "
        "print how often it is right at its threshold")
    p.set_defaults(holdout=0.1)
    return p.parse_args(argv)


# ---------------------------------------------------------------- data
def fit_context(model, n_views, rows, bad):
    """The rows whose question fits in the context, how many answers will be cut, and the tokens of
    the longest row. The other rows are added to `bad`.
    """
    kept, n_cut, longest = [], 0, 0
    for row in rows:
        prompt = model.head(n_views) + model.question(row["question"])
        room = model.seq_length - 1 - len(prompt)
        if room < 1:
            bad.append((row["where"], "the question does not fit in the context"))
        else:
            n_answer = len(model.answer(row["answer"]))
            kept.append(row)
            n_cut += n_answer > room
            longest = max(longest, len(prompt) + min(n_answer, room) + 1)
    return kept, n_cut, longest


def make_example(model, boxes, row, epoch=0):
    """A row -> {"ids", "n_prompt", "views"}; in a worker process. InputError for a bad image."""
    images = seen_by(model, row["image"], boxes)
    prompt = model.head(images) + model.question(row["question"])
    answer = model.answer(row["answer"])[:model.seq_length - len(prompt) - 1]
    return {"ids": [*prompt, *answer, model.tokenizer.eos_id], "n_prompt": len(prompt),
            "views": images}


# ---------------------------------------------------------------- the gate
def ask_held_out(model, ranks, boxes, rows, run):
    """P(yes) and truth of every held-out question, image by image, from all ranks."""
    images = sorted({row["image"] for row in rows})
    own = set(images[ranks.rank::ranks.world])
    report = functools.partial(run.report, "left out")
    p_yes, truth = answers(model, boxes, [row for row in rows if row["image"] in own], report)
    return ranks.gather(p_yes), ranks.gather(truth)


# ---------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    return train.run_stage("qa_adapter.py", args.device,
                           functools.partial(test if args.test else learn, args))


def test(args, ranks):
    """Ask questions of a QA adapter that is done, and print what its gate makes of them."""
    card, boxes = adapters.read_card(args.out), adapters.views_of(args.init, args.views)
    rows, bad = data.read_questions(args.test)
    model = open_base(args.base or card["base"], arguments.DTYPES.get(args.dtype), ranks.device,
                      quantize=args.quantize)
    adapters.load(model, args.init)
    adapters.load(model, args.out)
    rows, *_ = fit_context(model, len(boxes), rows, bad)
    data.need_rows(args.test, rows, bad)
    p_yes, truth, unread = ask_together(model, boxes, rows, ranks)
    if ranks.is_master:
        data.report_bad("qa_adapter.py", bad + unread)
        for name, level in (("at .5", 0.5), ("calibrated", card.get("threshold", 0.5))):
            figures = gate(p_yes, truth, level) if truth else {}
            listed = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
            print(f"{len(truth)} questions of {args.test}, {name}: {listed}")
    return 0


def learn(args, ranks):
    """The whole stage on one rank -> exit code."""
    # ---- the captioner
    captioner = adapters.read_card(args.init)
    boxes = adapters.views_of(args.init, args.views)
    torch.manual_seed(args.seed)
    model = open_base(args.base or captioner["base"], arguments.DTYPES.get(args.dtype),
                      ranks.device, quantize=args.quantize)
    adapters.load(model, args.init)

    # ---- data
    rows, bad = data.read_questions(args.data)
    rows, n_cut, longest = fit_context(model, len(boxes), rows, bad)
    data.need_rows(args.data, rows, bad)
    rows, held_out = data.split(rows, args.holdout, args.seed)
    make, eos = functools.partial(make_example, model, boxes), model.tokenizer.eos_id

    # ---- what trains: the new adapters alone
    where = ("vision", "language") if args.vision else ("language",)
    adapters.attach(model, "qa", where, args.reduction, below=captioner["name"])
    model.train()
    model.checkpointing = True
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    policy = train.distributed(model, ranks)
    optimizer = train.adamw(trained, args.weight_decay, ranks)
    if ranks.is_master:
        data.report_bad("qa_adapter.py", bad)
        train.announce(f"captioner {args.init}; {len(rows)} questions, {len(bad)} bad ones left "
                       f"out, {len(held_out)} held out, {n_cut} cut to fit the context",
                       model, trained, ranks, args.micro_batch, longest, len(boxes))

    # ---- the loop
    fixed = {"base": model.fingerprint, "questions": len(rows), "rows": data.rows_hash(rows),
             "captioner": model.loaded[captioner["name"]],
             **train.fixed(args, "reduction", "vision")}
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
            step.row |= validate(*ask_held_out(model, ranks, boxes, held_out, run))
    return run.exit_code or save(args, ranks, model, boxes, held_out, run)


def validate(p_yes, truth):
    """What the log keeps of the held-out questions, at a threshold of .5."""
    if not truth:
        return {}
    return {f"held_out_{name}": value for name, value in gate(p_yes, truth, 0.5).items()}


def save(args, ranks, model, boxes, held_out, run):
    """Calibrate the gate on the held-out questions, and write the folder -> exit code 0."""
    p_yes, truth = ask_held_out(model, ranks, boxes, held_out, run)
    threshold = calibrate(p_yes, truth) if truth else 0.5
    levels = {"at .5": 0.5, "calibrated": threshold} if truth else {}
    figures = {name: gate(p_yes, truth, level) for name, level in levels.items()}
    n_replaced = run.count_replaced()
    if ranks.is_master:
        for name, values in figures.items():
            listed = ", ".join(f"{key} {value:.3f}" for key, value in values.items())
            print(f"{len(truth)} held-out questions, {name}: {listed}")
        print(f"threshold {threshold:.4f}")
        adapters.save(model, args.out, "qa", stage="qa", views=boxes, threshold=threshold,
                      held_out=figures, arguments=arguments.as_json(args),
                      **adapters.lineage(args.init))
        print(f"wrote {args.out}; {n_replaced} rows had a broken image", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
