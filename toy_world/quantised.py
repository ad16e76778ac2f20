"""What int8 weights change: `python toy.py int8`, on unseen scenes of the toy world.

The base in its dtype captions the scenes, greedily. At every token of these captions its logits are
compared with those of the same base in int8. Both then caption freely, and answer questions.
"""
import json
import random
from pathlib import Path

import torch

from base import open_base
from generate import greedy, yes_probability
from plumbing import arguments, int8
from plumbing.data import together
from plumbing.parts import evaluating
from toy_world import world as easy
from toy_world import worlds
from toy_world.base import (
    REPORT_BATCH,
    all_dense_captions,
    caption_report,
    dense_prompt,
    looks_at,
)

KEPT = {"int8": (), "int8, but not the output layer": ("output",),
        "int8, but neither it nor the embeddings": ("output", "input")}


def add_flags(p):
    p.add_argument("--base", default="assets/toy", help="folder of the base")
    p.add_argument("--dtype", choices=tuple(arguments.DTYPES), default="float32",
                   help="of the weights that are not quantised, and of the base without int8")
    p.add_argument("--scenes", type=int, default=200, help="unseen scenes")
    p.add_argument("--seed", type=int, default=0, help="of the scenes")


def quantised(args):
    """Print what int8 changes, a JSON object a line: the base as it is, then with int8 weights."""
    dtype = arguments.DTYPES[args.dtype]
    world = worlds.WORLDS[worlds.name_of(Path(args.base))]
    plain = open_base(args.base, dtype)
    scenes = [world.make_scene(f"int8 {args.seed} {i}") for i in range(args.scenes)]
    images = looks_at(plain, scenes, "drawing", world)
    written = written_by(plain, images)
    print(json.dumps({"base": str(args.base), "scenes": args.scenes, "seed": args.seed,
                      "dtype": args.dtype, "tokens": sum(len(row) for *_, (row, _) in written)}))
    answers, before = figures(plain, plain, scenes, images, written, args.seed, world)
    print(json.dumps({"weights": args.dtype, **before}), flush=True)
    for name, kept in KEPT.items():
        model = open_base(args.base, dtype, quantize="int8")
        keep_ends(model, plain, kept)
        _, after = figures(model, plain, scenes, images, written, args.seed, world, answers)
        after["f1 change"] = round(after["f1"] - before["f1"], 4)
        print(json.dumps({"weights": name, **after}), flush=True)


def keep_ends(model, plain, kept):
    """Put back the output layer or the embeddings of the base that is not quantised."""
    for name, layer in dict(plain.named_modules()).items():
        is_kept = ("output" in kept and layer is plain.output_layer) or (
            "input" in kept and type(layer) is torch.nn.Embedding
            and layer.weight.shape == plain.output_layer.weight.shape)
        if is_kept:
            above, _, last = name.rpartition(".")
            setattr(model.get_submodule(above), last, layer)


def written_by(model, images):
    """The base's own greedy captions, in batches -> [(ids (B, L), images, (row, column))].

    row, column (n,): of every token that predicts one of the caption, up to the end token.
    """
    request, eos = model.request(dense_prompt(model)), model.tokenizer.eos_id
    batches = []
    for start in range(0, len(images), REPORT_BATCH):
        looks = images[start:start + REPORT_BATCH]
        prompts = torch.tensor([model.head(look) + request for look in looks])
        new = greedy(model, prompts, together(looks), max_new_tokens=100, eos_id=eos)
        ended = (new == eos).int().cumsum(dim=1) - (new == eos).int()       # before this token
        row, column = (ended == 0).nonzero(as_tuple=True)
        at = row, column + prompts.shape[1] - 1
        batches.append((torch.cat([prompts, new], dim=1), together(looks), at))
    return batches


def answered(model, scene, look, seed, world=easy):
    """Questions about a scene -> [(P(yes), whether yes is right)]."""
    questions = world.questions(scene, 16, random.Random(seed))
    p_yes = yes_probability(model, look, [easy.ask(text) for text, _, _ in questions]).tolist()
    return [(p, answer.startswith("Yes")) for p, (_, answer, _) in zip(p_yes, questions)]


def distance(model, plain, written):
    """How far the logits of a model are from those of the base that is not quantised."""
    square, spread, largest, equal, n = 0.0, 0.0, 0.0, 0, 0
    with evaluating(model), evaluating(plain):
        for ids, looks, (row, column) in written:
            own, wanted = (m(ids, looks)[row, column].double() for m in (model, plain))
            square += (own - wanted).pow(2).mean(dim=-1).sum().item()
            spread += wanted.var(dim=-1).sum().item()
            largest = max(largest, (own - wanted).abs().max().item())
            equal += (own.argmax(-1) == wanted.argmax(-1)).sum().item()
            n += len(row)
    return {"rms of logits' difference / their spread": round((square / spread) ** 0.5, 5),
            "largest difference": round(largest, 4), "equal greedy tokens": round(equal / n, 5)}


def figures(model, plain, scenes, images, written, seed, world=easy, reference=()):
    """The answers of a model; and its size, its distance from the base, and its quality.

    reference: the answers of the base that is not quantised.
    """
    report = caption_report(all_dense_captions(model, images),
                            [world.truth(scene, "") for scene in scenes], world)
    (precision, _), (recall, _) = report["precision"]["all"], report["recall"]["all"]
    answers = [pair for number, (scene, look) in enumerate(zip(scenes, images))
               for pair in answered(model, scene, look, f"questions {seed} {number}", world)]
    right = sum((p >= 0.5) == yes for p, yes in answers) / len(answers)
    moved = max((abs(p - q) for (p, _), (q, _) in zip(answers, reference)), default=0.0)
    megabytes = int8.stored_bytes(model, torch.bfloat16) / 1e6
    return answers, {
        "MB, the rest in bfloat16": round(megabytes, 2), **distance(model, plain, written),
        "yes/no": round(right, 4), "largest change of P(yes)": round(moved, 4),
        "precision": precision, "recall": recall,
        "f1": round(2 * precision * recall / max(precision + recall, 1e-9), 4)}
