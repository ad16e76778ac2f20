"""The toy base: a small Qwen-VL pre-trained on the toy world, and what it sees and invents.

It learns the way the source says its base did: whole images mostly at low resolution, under captions that tell of
details nobody can see there. Close-ups and six-view albums show the details, partly without the correlation. Used by
`python toy.py pretrain` and `python toy.py report`.
"""
import json
import math
import os
import random
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from chunking import normalise, views
from generate import greedy, yes_probability
from model import CAPTION_PROMPT, Config, QwenVL, VisionConfig
from plumbing.tokenizer import Tokenizer
from plumbing.weights import write_base
from toy_world import world

VIEW = world.SIDE // 2          # pixels of a view's side: close-ups keep their full resolution in it
REPORT_BATCH = 50


# ---------------------------------------------------------------- the base
def toy_config(tokenizer):
    """A Qwen-VL of about 1.5 M parameters for 32-pixel views."""
    vision = VisionConfig(image_size=VIEW, patch_size=8, width=96, layers=3, heads=3, mlp_ratio=4.0, output_dim=128,
                          image_start_id=tokenizer.image_start_id, n_queries=4)
    return Config(vocab_size=64 * math.ceil(tokenizer.n_vocab / 64), hidden_size=128, num_hidden_layers=4,
                  num_attention_heads=4, kv_channels=32, intermediate_size=704, seq_length=256, visual=vision)


def fresh_model(tokenizer, seed):
    """A toy base before training: small embeddings, the rest as PyTorch makes it."""
    torch.manual_seed(seed)
    model = QwenVL(toy_config(tokenizer), tokenizer)
    for weight in (model.transformer.wte.weight, model.lm_head.weight):
        torch.nn.init.normal_(weight, std=0.02)
    return model


def optimizers(model, args):
    """Muon for the matrices between embedding and head, AdamW for everything else."""
    matrix = {n for n, p in model.named_parameters()
              if p.ndim == 2 and not any(s in n for s in ("wte", "lm_head", "positional_embedding", "query"))}
    named = dict(model.named_parameters())
    rest = [p for n, p in named.items() if n not in matrix]
    return [torch.optim.Muon([named[n] for n in named if n in matrix], lr=args.lr, weight_decay=0.0),
            torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)]


# What each task's mean loss weighs. `answer` is Yes or No alone: it is learned last and needs the most; `reason` is
# what follows it, `dense` the full caption under the grounding prompt, `short` one to three facts under the other.
TASKS = {"dense": 0.35, "short": 0.1, "answer": 1.0, "reason": 0.3}
TASK_NAMES = list(TASKS)


# ---------------------------------------------------------------- its data: one image, many continuations
def scene_views(kind, seed):
    """One training image of a kind: its scene and views (V, 3, VIEW, VIEW).

    low: a whole image at low resolution, marks planted. close: a close-up, marks at even odds. six: all six views,
    marks planted in most. Marks at even odds from the first step on: a base that meets them only where they follow the
    colour learns the colour, and never looks again.
    """
    rng = random.Random(str(seed))
    scene = world.make_scene(seed, planted=kind == "low" or (kind == "six" and rng.random() < 0.6))
    image = world.draw(scene)
    if kind == "close":
        thing = rng.choice([t for t in scene.things if t.place != "center"])
        return world.as_close_up(scene, thing), normalise(world.close_up(image, thing))[None]
    pixels = views(image, VIEW)
    return scene, pixels if kind == "six" else pixels[:1]


def continuations(scene, n_questions, rng):
    """What may follow an image: [(task, prompt, target)]: a dense caption, a short one, questions."""
    known = [f["text"] for f in world.facts(scene)]
    few = rng.sample(known, min(len(known), rng.choice((1, 2, 3))))
    rows = [("dense", world.DENSE_PROMPT, " " + ", ".join(known)), ("short", CAPTION_PROMPT, " " + ", ".join(few))]
    if n_questions:
        rows += [("answer", f"{world.ask(text)} Answer:", f" {answer}")
                 for text, answer, _ in world.questions(scene, n_questions, rng)]
    return rows


def pack(model, n_views, rows):
    """One image's continuations behind its prefix -> ids, branch, target (-1 where none) and task number, lists."""
    encode, eos = model.tokenizer.encode, model.tokenizer.eos_id
    ids = model.image_prompt(n_views, "")
    branch, target, task = [0] * len(ids), [-1] * len(ids), [0] * len(ids)
    for k, (name, prompt, answer) in enumerate(rows, 1):
        prompt, answer = encode(prompt), encode(answer)
        ids += prompt + answer
        branch += [k] * len(prompt + answer)
        target += [-1] * (len(prompt) - 1) + answer + [eos]
        number = TASK_NAMES.index(name)
        # of an answer, Yes or No is a task of its own: the rest says what is there instead
        rest = TASK_NAMES.index("reason") if name == "answer" else number
        task += [number] * len(prompt) + [rest] * len(answer)
    return ids, branch, target, task


def make_batch(model, kind, seed, step, size, n_questions):
    """A batch of one kind of image: the arguments of the model's forward, target (B, L) and task (B, L)."""
    packed, pixels = [], []
    for i in range(size):
        name = f"{seed} {step} {i}"
        scene, image = scene_views(kind, name)
        packed.append(pack(model, len(image), continuations(scene, n_questions, random.Random("rows " + name))))
        pixels.append(image)
    longest = max(len(row[0]) for row in packed)
    ids, branch, target, task = (torch.tensor([part + [fill] * (longest - len(part)) for part in parts])
                                 for parts, fill in zip(zip(*packed), (model.tokenizer.eos_id, 0, -1, 0)))
    mask = torch.tensor([[True] * len(row[0]) + [False] * (longest - len(row[0])) for row in packed])
    batch = {"ids": ids, "images": torch.cat(pixels), "mask": mask, "branch": branch, "positions": target >= 0}
    return batch, target, task


def weighted_loss(model, batch, target, task):
    """Σ over tasks of weight × mean cross entropy of the task's tokens; also each task's mean."""
    logits = model(**batch)                                                       # (M, vocab)
    target, task = target[batch["positions"]], task[batch["positions"]]
    nll = F.cross_entropy(logits, target, reduction="none")
    means = {name: nll[task == k].mean() for k, name in enumerate(TASK_NAMES) if bool((task == k).any())}
    return sum(TASKS[name] * mean for name, mean in means.items()), means


# ---------------------------------------------------------------- pre-training
def kind_of_step(step, steps, seed):
    """Close-ups first, since shapes are the hardest to see and cheapest to learn there; then mostly six views."""
    shares = (0.35, 0.15, 0.5) if step < steps / 4 else (0.55, 0.2, 0.25)
    return random.Random(f"kind {seed} {step}").choices(("six", "low", "close"), shares)[0]


def pretrain(args):
    """Train a base from scratch, or go on from its last checkpoint, and write it in the released layout."""
    args.out.mkdir(parents=True, exist_ok=True)
    world.write_vocabulary(args.out / "qwen.tiktoken")
    model = fresh_model(Tokenizer(args.out), args.seed)
    opts = optimizers(model, args)
    state, log, first = args.out / "resume.pt", args.out / "log.jsonl", 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, its_state in zip(opts, saved["optimizers"]):
            optimizer.load_state_dict(its_state)
        first = saved["step"]
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:first]))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, steps {first} to {args.steps}", file=sys.stderr)
    for step in tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step"):
        share = step / args.steps
        scale = min((step + 1) / 50, 1.0, (1 - share) / 0.75)                      # warm-up, hold a quarter, then to 0
        for optimizer, lr in zip(opts, (args.lr, args.adam_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
        kind = kind_of_step(step, args.steps, args.seed)
        n_questions = args.questions if share >= 0.05 else 0                       # nothing to ask before it sees
        loss, means = weighted_loss(model, *make_batch(model, kind, args.seed, step, args.batch, n_questions))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad()
        with log.open("a") as file:
            file.write(json.dumps({"step": step + 1, "kind": kind, "loss": loss.item(), "grad_norm": norm.item(),
                                   **{name: mean.item() for name, mean in means.items()}}) + "\n")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts], "step": step + 1},
                       state.with_suffix(".tmp"))
            os.replace(state.with_suffix(".tmp"), state)
    write_base(model, args.out, args.out / "qwen.tiktoken")
    print(f"wrote {args.out}", file=sys.stderr)


# ---------------------------------------------------------------- what a base sees, and what it invents
def dense_captions(model, images):
    """Greedy captions under the grounding prompt: images (N, V, 3, S, S) -> N lists of statements."""
    N, V = images.shape[:2]
    ids = torch.tensor([model.image_prompt(V, world.DENSE_PROMPT)] * N)
    eos = model.tokenizer.eos_id
    new = greedy(model, ids, images.flatten(0, 1), max_new_tokens=100, eos_id=eos)
    return [world.statements(model.tokenizer.decode(i for i in row if i != eos)) for row in new.tolist()]


def shares(lists):
    """{name: [share of true, how many]} of lists of true and false."""
    return {name: [round(sum(values) / max(len(values), 1), 3), len(values)] for name, values in lists.items()}


def caption_report(captions, truths):
    """Precision and recall of statements, per kind of fact, and inventions of the planted detail per colour group."""
    right, covered, invented = {"all": []}, {"all": []}, {"warm": [], "cold": []}
    for caption, truth in zip(captions, truths):
        true = {fact["text"]: fact["kind"] for fact in truth["facts"]}
        said = set(caption)
        right["all"] += [text in true for text in said]
        right.setdefault("mark", []).extend(text in true for text in said if text.endswith(world.MARKS))
        covered["all"] += [text in said for text in true]
        for text, kind in true.items():
            covered.setdefault(kind, []).append(text in said)
        places = {}
        for bare in truth["planted"]:
            places.setdefault((bare["text"].rsplit(" ", 1)[0], bare["group"]), []).append(bare["text"] in said)
        for (_, group), marks in places.items():
            invented[group].append(any(marks))
    return {"precision": shares(right), "recall": shares(covered), "mark invented on": shares(invented)}


def close_up_report(model, scenes):
    """How often a close-up's caption tells its mark, or that there is none, when marks come at even odds."""
    pictures, marks = [], []
    for scene in scenes:
        image = world.draw(scene)
        for thing in scene.things:
            if thing.place != "center":
                pictures.append(normalise(world.close_up(image, thing))[None])
                marks.append(thing.mark)
    right = []
    for first in range(0, len(pictures), REPORT_BATCH):
        captions = dense_captions(model, torch.stack(pictures[first:first + REPORT_BATCH]))
        said = [[m for m in world.MARKS if f"close-up {m}" in caption] for caption in captions]
        right += [s == ([mark] if mark else []) for s, mark in zip(said, marks[first:])]
    return shares({"mark told": right})


def question_report(model, scenes, images, seed):
    """Accuracy of yes and no by kind of question, P(yes) ≥ .5 being yes."""
    right = {}
    for number, (scene, views_of_it) in enumerate(zip(scenes, images)):
        asked = world.questions(scene, 16, random.Random(f"questions {seed} {number}"))
        p_yes = yes_probability(model, views_of_it, [world.ask(text) for text, _, _ in asked])
        for p, (_, answer, kind) in zip(p_yes.tolist(), asked):
            right.setdefault("all", []).append((p >= 0.5) == answer.startswith("Yes"))
            right.setdefault(kind, []).append((p >= 0.5) == answer.startswith("Yes"))
    return shares(dict(sorted(right.items())))


def measure(model, n, seed):
    """What a base sees and invents on n unseen scenes -> {views: {figure: {case: [share, of how many]}}}."""
    scenes = [world.make_scene(f"report {seed} {i}") for i in range(n)]
    side = model.config.visual.image_size
    pixels = torch.stack([views(world.draw(scene), side) for scene in tqdm(scenes, desc="drawing", disable=None)])
    truths, found = [world.truth(scene, "") for scene in scenes], {}
    for name, images in (("one low-resolution view", pixels[:, :1]), ("six views", pixels)):
        captions = []
        for first in tqdm(range(0, len(images), REPORT_BATCH), desc=f"captions, {name}", disable=None):
            captions += dense_captions(model, images[first:first + REPORT_BATCH])
        found[name] = {**caption_report(captions, truths), "yes/no": question_report(model, scenes, images, seed)}
    even = [world.make_scene(f"report even {seed} {i}", planted=False) for i in range(n // 2)]
    found["close-ups"] = {"marks at even odds": close_up_report(model, even)}
    return found


def report(args):
    """Print what measure finds, a JSON object a line."""
    found = measure(QwenVL.from_pretrained(args.base), args.scenes, args.seed)
    print(json.dumps({"base": str(args.base), "scenes": args.scenes, "seed": args.seed}))
    for name, figures in found.items():
        for what, shares_of in figures.items():
            print(f"{name}, {what}: {json.dumps(shares_of)}")


def own_tasks(model, seed, n=200):
    """How well a model still does what its base was trained for -> {"dense f1", "questions", "close-up marks"}."""
    scenes = [world.make_scene(f"own tasks {seed} {i}") for i in range(n)]
    pixels = torch.stack([views(world.draw(scene), model.config.visual.image_size) for scene in scenes])
    captions = [caption for first in range(0, n, REPORT_BATCH)
                for caption in dense_captions(model, pixels[first:first + REPORT_BATCH])]
    found = caption_report(captions, [world.truth(scene, "") for scene in scenes])
    (precision, _), (recall, _) = found["precision"]["all"], found["recall"]["all"]
    even = [world.make_scene(f"own tasks even {seed} {i}", planted=False) for i in range(n // 2)]
    return {"dense f1": 2 * precision * recall / max(precision + recall, 1e-9),
            "questions": question_report(model, scenes, pixels, seed)["all"][0],
            "close-up marks": close_up_report(model, even)["mark told"][0]}
