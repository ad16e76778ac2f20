"""Stage 2, the QA adapter: teaches the captioner's own model to answer yes/no questions.

READS   questions (JSONL of {"image", "question", "answer"}, answers starting with yes or no); the
        captioner, out/sft
WRITES  out/qa: adapters.safetensors, adapters.json (with the calibrated threshold), log.jsonl,
        resume/

    python qa_adapter.py --data questions.jsonl
    torchrun --nproc_per_node 6 qa_adapter.py --data questions.jsonl
    python qa_adapter.py --init out/dpo --out out/qa-2 --data questions.jsonl   # for the next round

Only the new adapters train: in the language model alone, since a narrow set of questions would pull
the image embeddings towards itself, and below the captioning adapters, which stay active and
frozen. What the source, the blog post ATAC-Qwen-VL, leaves open:
 1. "below" = nearer the base: sublayer -> QA adapter -> caption adapter -> residual
 2. the prompt is the base's own VQA form, `{question} Answer:`, without the soft prompt
 3. the threshold on P(yes) is the one with the best F1 on held-out questions (see calibrate)
"""
import argparse
import functools
import re
import sys
from itertools import pairwise
from pathlib import Path

import torch

import adapters
from chunking import LAYOUTS, views
from generate import yes_probability
from model import QwenVL
from plumbing import arguments, data, train
from plumbing.errors import InputError
from plumbing.images import open_image


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
    p.set_defaults(holdout=0.1)
    return p.parse_args(argv)


# ---------------------------------------------------------------- data
def read_questions(path):
    """Rows [{"where", "image", "question", "answer", "yes"}], and the bad ones [(where, reason)].

    Answers become ` Yes …` or ` No …`, so that the first token answers the question.
    """
    rows, bad = [], []
    for where, row in data.read_jsonl(path):
        row = row or {}
        image, question, answer = (row.get(key) for key in ("image", "question", "answer"))
        if not all(isinstance(text, str) and text.strip() for text in (image, question, answer)):
            bad.append((where, "not a JSON object with image, question and answer"))
            continue
        image, answer = Path(path).parent / image, " ".join(answer.split())
        verdict = re.match(r"(yes|no)\b", answer, re.IGNORECASE)
        if verdict is None:
            bad.append((where, f"the answer {answer[:30]!r} starts with neither yes nor no"))
        elif not data.is_there(image):
            bad.append((where, f"{image} is not there"))
        else:
            answer = f" {verdict[1].capitalize()}{answer[verdict.end():]}"
            rows.append({"where": where, "image": image, "question": " ".join(question.split()),
                         "answer": answer, "yes": verdict[1].lower() == "yes"})
    return data.need_rows(path, rows, bad)


def fit_context(model, n_views, rows, bad):
    """The rows whose question fits in the context, and how many answers will be cut.

    The other rows are added to `bad`.
    """
    kept, n_cut = [], 0
    for row in rows:
        prompt = model.image_prompt(n_views, f"{row['question']} Answer:")
        room = model.config.seq_length - 1 - len(prompt)
        if room < 1:
            bad.append((row["where"], "the question does not fit in the context"))
        else:
            kept.append(row)
            n_cut += len(model.tokenizer.encode(row["answer"])) > room
    return kept, n_cut


def make_example(tokenizer, prefix, config, boxes, row, epoch=0):
    """A row -> {"ids", "n_prompt", "views"}; in a worker process. InputError for a bad image."""
    prompt = prefix + tokenizer.encode(f"{row['question']} Answer:")
    answer = tokenizer.encode(row["answer"])[:config.seq_length - len(prompt) - 1]
    pixels = views(open_image(row["image"]), config.visual.image_size, boxes)
    return {"ids": [*prompt, *answer, tokenizer.eos_id], "n_prompt": len(prompt), "views": pixels}


# ---------------------------------------------------------------- the gate
def gate(p_yes, truth, threshold):
    """Accuracy, precision and recall of "yes" at a threshold; p_yes and truth are lists."""
    verdicts = [p >= threshold for p in p_yes]
    right = sum(verdict and true for verdict, true in zip(verdicts, truth))
    return {"accuracy": sum(verdict == true for verdict, true in zip(verdicts, truth)) / len(truth),
            "precision": right / max(sum(verdicts), 1), "recall": right / max(sum(truth), 1)}


def calibrate(p_yes, truth):
    """The threshold t on P(yes) with the best F1 for "yes"; of equals, the one nearest to .5.

        F1(t) = 2 TP / (TP + FP + TP + FN) = 2 TP(t) / (kept(t) + yes)

    TP(t): questions with P(yes) ≥ t whose answer is yes; kept(t): all with P(yes) ≥ t; yes: all
    whose answer is yes. Candidates lie halfway between neighbouring P(yes). Sorted by P(yes), both
    counts are running sums: n log n.

    Half of the questions are true, but most of the statements that the gate judges. With the share
    s of true statements, which can be estimated from their P(yes), the odds of the threshold could
    be divided by s / (1 - s). That would be right if a statement got P(yes) as a question of its
    class does. Measured in the toy world (docs/claims.md, "prior"), it gains nothing on a base that
    sees everything, and goes the wrong way on one that errs: the false statements of a model are
    those that it tends to believe, and a higher threshold is better. So there is no correction;
    golden.py has --threshold.
    """
    ranked = sorted(zip(p_yes, truth), reverse=True)
    edges = sorted({0.0, 1.0, *p_yes}, reverse=True)
    candidates, right, kept = [], 0, 0
    for above, below in pairwise(edges):
        while kept < len(ranked) and ranked[kept][0] >= above:
            right += ranked[kept][1]
            kept += 1
        f1 = 2 * right / max(kept + sum(truth), 1)
        threshold = (above + below) / 2
        candidates.append((round(f1, 9), -abs(threshold - 0.5), -threshold))
    return -max(candidates)[2]


def ask_held_out(model, ranks, boxes, rows, run):
    """P(yes) and truth of every held-out question, image by image, from all ranks."""
    images = sorted({row["image"] for row in rows})
    p_yes, truth = [], []
    for image in images[ranks.rank::ranks.world]:
        about = [row for row in rows if row["image"] == image]
        try:
            pixels = views(open_image(image), model.config.visual.image_size, boxes)
        except InputError as error:
            run.report("left out", str(error))
            continue
        p_yes += yes_probability(model, pixels, [row["question"] for row in about]).tolist()
        truth += [row["yes"] for row in about]
    return ranks.gather(p_yes), ranks.gather(truth)


# ---------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    return train.run_stage("qa_adapter.py", args.device, functools.partial(learn, args))


def learn(args, ranks):
    """The whole stage on one rank -> exit code."""
    # ---- the captioner
    captioner = adapters.read_card(args.init)
    boxes = adapters.views_of(args.init, args.views)
    torch.manual_seed(args.seed)
    model = QwenVL.from_pretrained(args.base or captioner["base"], arguments.DTYPES.get(args.dtype),
                                   ranks.device)
    adapters.load(model, args.init)

    # ---- data
    rows, bad = read_questions(args.data)
    rows, n_cut = fit_context(model, len(boxes), rows, bad)
    data.need_rows(args.data, rows, bad)
    rows, held_out = data.split(rows, args.holdout, args.seed)
    prefix, eos = model.image_prompt(len(boxes), ""), model.tokenizer.eos_id
    make = functools.partial(make_example, model.tokenizer, prefix, model.config, boxes)

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
                       model, trained, ranks, args.micro_batch)

    # ---- the loop
    fixed = {"base": model.fingerprint, "questions": len(rows), "rows": data.rows_hash(rows),
             "captioner": model.loaded[captioner["name"]],
             **train.fixed(args, "reduction", "vision")}
    run = train.Run(args, ranks, policy, optimizer, trained, rows, make, fixed)
    for step in run.steps():
        n_targets = ranks.sum(data.count_targets(step.examples))
        for examples in step.micro_batches():
            logp = policy(**data.collate(examples, eos, ranks.device))          # (B, K)
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
