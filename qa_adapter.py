"""Stage 2, the QA adapter: teaches the captioner's own model to answer yes/no questions about an image.

READS   questions (JSONL of {"image", "question", "answer"}, answers starting with yes or no); the captioner, out/sft
WRITES  out/qa: adapters.safetensors, adapters.json (with the calibrated threshold), log.jsonl, resume/

    python qa_adapter.py --data questions.jsonl
    torchrun --nproc_per_node 6 qa_adapter.py --data questions.jsonl
    python qa_adapter.py --init out/dpo --out out/qa-2 --data questions.jsonl       # for the next round

Only the new adapters train: in the language model alone, since a narrow question set would pull the image embeddings
towards itself, and below the captioning adapters, which stay active and frozen. Decided where the source is silent:
 1. "below" = nearer the base: sublayer -> QA adapter -> caption adapter -> residual
 2. the prompt is the base's own VQA form, `{question} Answer:`, without the soft prompt
 3. the threshold on P(yes) is the one with the best F1 on held-out questions
"""
import argparse
import re
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import adapters
from chunking import BOXES, views
from generate import yes_probability
from model import QwenVL
from plumbing import data, train
from plumbing.errors import InputError
from plumbing.images import open_image
from plumbing.train import ShardedAdamW


def parse_args(argv):
    p = train.stage_parser(__doc__, "out/qa", "data/qa.jsonl", "questions", lr=2e-4, batch=32, epochs=3.0)
    p.add_argument("--init", type=Path, default=Path("out/sft"), help="the captioner's adapter folder")
    p.add_argument("--base", help="Hub name or folder of the base, if not where the captioner's training found it")
    p.add_argument("--reduction", type=int, default=8, help="width of the model ÷ width of an adapter's bottleneck")
    p.add_argument("--vision", action=argparse.BooleanOptionalAction, default=False, help="train adapters in the ViT, "
                   "too; the source warns of it")
    p.set_defaults(holdout=0.1)
    return train.checked(p, argv)


# ---------------------------------------------------------------- data
def read_questions(path):
    """Rows [{"image", "question", "answer", "yes"}], answers as ` Yes …` or ` No …`, and bad ones [(where, reason)]."""
    rows, bad = [], []
    for where, row in data.read_jsonl(path):
        row = row or {}
        image, question, answer = (row.get(key) for key in ("image", "question", "answer"))
        if not all(isinstance(part, str) and part.strip() for part in (image, question, answer)):
            bad.append((where, "no JSON object with image, question and answer"))
            continue
        image, answer = Path(path).parent / image, " ".join(answer.split())
        said = re.match(r"(yes|no)\b", answer, re.IGNORECASE)
        if said is None:
            bad.append((where, f"the answer {answer[:30]!r} starts with neither yes nor no"))
        elif not data.is_there(image):
            bad.append((where, f"{image} is not there"))
        else:
            rows.append({"where": where, "image": image, "question": " ".join(question.split()),
                         "yes": said[1].lower() == "yes",
                         "answer": f" {said[1].capitalize()}{answer[said.end():]}"})
    return data.need_rows(path, rows, bad)


def fit_context(model, rows, bad):
    """The rows whose question fits in the context, and how many answers will be cut; the others are added to `bad`."""
    kept, n_cut = [], 0
    for row in rows:
        left = model.config.seq_length - 1 - len(model.image_prompt(len(BOXES), f"{row['question']} Answer:"))
        if left < 1:
            bad.append((row["where"], "the question does not fit in the context"))
        else:
            kept.append(row)
            n_cut += len(model.tokenizer.encode(row["answer"])) > left
    return kept, n_cut


# ---------------------------------------------------------------- the gate
def gate(p_yes, truth, threshold):
    """Accuracy, precision and recall of "yes" at a threshold; p_yes and truth are lists."""
    said = [p >= threshold for p in p_yes]
    right = sum(s and t for s, t in zip(said, truth))
    return {"accuracy": sum(s == t for s, t in zip(said, truth)) / len(truth),
            "precision": right / max(sum(said), 1), "recall": right / max(sum(truth), 1)}


def calibrate(p_yes, truth):
    """The threshold with the best F1 for "yes", halfway between two P(yes) that were seen; of equals, nearest to .5."""
    seen = sorted({0.0, 1.0, *p_yes})
    middles = [(a + b) / 2 for a, b in pairwise(seen)]

    def f1(threshold):
        found = gate(p_yes, truth, threshold)
        return 2 * found["precision"] * found["recall"] / max(found["precision"] + found["recall"], 1e-9)
    return max(middles, key=lambda t: (round(f1(t), 9), -abs(t - 0.5)))


# ---------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    return train.run_stage("qa_adapter.py", args.device, lambda ranks: run_rank(args, ranks))


def run_rank(args, ranks):
    """The whole stage on one rank -> exit code."""
    # ---- previous stage
    captioner = adapters.read_card(args.init)
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model = QwenVL.from_pretrained(args.base or captioner["base"], dtype, ranks.device)
    adapters.load(model, args.init)

    # ---- data
    rows, bad = read_questions(args.data)
    rows, n_cut = fit_context(model, rows, bad)
    data.need_rows(args.data, rows, bad)
    rows, held = data.split(rows, args.holdout, args.seed)

    # ---- model and what is frozen
    where = ("vision", "language") if args.vision else ("language",)
    adapters.attach(model, "qa", where, args.reduction, below=captioner["name"])
    model.train()
    model.checkpointing = True
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    policy = DistributedDataParallel(model, gradient_as_bucket_view=True) if ranks.world > 1 else model

    # ---- the loss: sum over the answers' tokens and end tokens, divided by their number in the whole step
    def make(row, epoch=0):
        tokenizer, size = model.tokenizer, model.config.visual.image_size
        prompt = model.image_prompt(len(BOXES), f"{row['question']} Answer:")
        answer = tokenizer.encode(row["answer"])[:model.config.seq_length - len(prompt) - 1]
        return {"ids": [*prompt, *answer, tokenizer.eos_id], "n_prompt": len(prompt),
                "views": views(open_image(row["image"]), size)}

    def loss_of(policy, examples):
        return -policy(**data.collate(examples, model, ranks.device)).sum() * bool(examples), {}

    broken = {}             # held-out images that were told

    def asked():
        """P(yes) and truth of every held-out question, image by image, from all ranks."""
        images = sorted({row["image"] for row in held})
        p_yes, truth = [], []
        for image in images[ranks.rank::ranks.world]:
            about = [row for row in held if row["image"] == image]
            try:
                pixels = views(open_image(image), model.config.visual.image_size)
            except InputError as error:
                data.good_rows([error], broken)
                continue
            p_yes += yes_probability(model, pixels, [row["question"] for row in about]).tolist()
            truth += [row["yes"] for row in about]
        return ranks.gather(p_yes), ranks.gather(truth)

    def validate():
        p_yes, truth = asked()
        return {f"held_out_{name}": value for name, value in gate(p_yes, truth, 0.5).items()} if truth else {}

    # ---- optimizer, resume, loop
    optimizer = ShardedAdamW(trained, args.weight_decay, ranks)
    run = {"base": model.fingerprint, "questions": len(rows), "rows": data.rows_hash(rows),
           "captioner": model.loaded[captioner["name"]]}
    run |= {key: str(getattr(args, key)) for key in ("reduction", "vision", *train.RUN)}
    if ranks.is_master:
        data.tell_bad("qa_adapter.py", bad)
        train.announce(f"captioner {args.init}; {len(rows)} questions, {len(bad)} bad ones left out, {len(held)} "
                        f"held out, {n_cut} cut to fit the context", model, trained, ranks, args.micro_batch)
    code, counts = train.fit(args, ranks, policy, optimizer, rows, make, data.n_targets, loss_of, validate, run)
    if code:
        return code

    # ---- the gate, and save
    p_yes, truth = asked()
    threshold = calibrate(p_yes, truth) if truth else 0.5
    levels = {"at .5": 0.5, "calibrated": threshold} if truth else {}
    figures = {name: gate(p_yes, truth, level) for name, level in levels.items()}
    if ranks.is_master:
        for name, found in figures.items():
            print(f"{len(truth)} held-out questions, {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
        print(f"threshold {threshold:.4f}")
        adapters.save(model, args.out, "qa", stage="qa", threshold=threshold, held_out=figures,
                      arguments=train.plain(args), **adapters.lineage(args.init))
        print(f"wrote {args.out}; {counts['broken']} rows had a broken image", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
