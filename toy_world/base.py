"""The toy bases: a small Qwen-VL and a small Qwen3-VL pre-trained on the toy world, and what they
see and invent.

They learn the way the source says that its base did: mostly from whole images at low resolution,
under captions with details that nobody can see there. Close-ups and six-view images show the
details, in part without the correlation. Used by `python toy.py pretrain` and
`python toy.py report`.
"""
import json
import math
import os
import random
import re
import sys

import torch
from tqdm import tqdm

from base import open_base
from chunking import crops, square
from generate import greedy, yes_probability
from model import CAPTION_PROMPT, Config, QwenVL, VisionConfig
from plumbing.data import together
from plumbing.parts import PADDING
from plumbing.tokenizer import Tokenizer
from toy_world import world as easy
from toy_world import worlds

VIEW = easy.SIDE // 2          # pixels of a view's side; close-ups keep their full resolution
REPORT_BATCH = 50               # images captioned at once


# ---------------------------------------------------------------- the base
def toy_config(tokenizer):
    """A Qwen-VL of 1.4 M parameters for 32-pixel views."""
    vision = VisionConfig(
        image_size=VIEW, patch_size=8, width=96, layers=3, heads=3, mlp_ratio=4.0, output_dim=128,
        image_start_id=tokenizer.image_start_id, n_queries=4)
    return Config(
        vocab_size=64 * math.ceil(tokenizer.n_vocab / 64), hidden_size=128, num_hidden_layers=4,
        num_attention_heads=4, kv_channels=32, intermediate_size=704, seq_length=256,
        visual=vision)


def fresh_model(like, folder, seed, world=easy):
    """A toy base before training: small embeddings, everything else as PyTorch initialises it.

    like: "qwen_vl", our own, or "qwen3_vl", of transformers, which writes its folder beforehand.
    world: whose words it knows.
    """
    if like == "qwen3_vl":
        from toy_world import qwen3_vl  # here, since transformers is slow to import

        qwen3_vl.write(folder, seed, world)
        return open_base(folder).train()
    easy.write_vocabulary(folder / "qwen.tiktoken", world.WORDS)
    tokenizer = Tokenizer(folder)
    torch.manual_seed(seed)
    model = QwenVL(toy_config(tokenizer), tokenizer, base=str(folder))
    for weight in (model.transformer.wte.weight, model.lm_head.weight):
        torch.nn.init.normal_(weight, std=0.02)
    return model


TABLES = ("wte", "lm_head", "positional_embedding", "query", "embed_tokens", "pos_embed")


def optimizers(model, args):
    """Muon for the matrices between embedding and head, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_table = any(part in name for part in TABLES)
        (others if is_table or parameter.ndim != 2 else matrices).append(parameter)
    return [torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.0),
            torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)]


# The weight of each task's mean loss. `dense` is the full caption under the grounding prompt,
# `short` one to three facts under the other prompt, `answer` Yes or No alone, which is learned last
# and needs the most, and `reason` the words that follow it.
TASKS = {"dense": 0.35, "short": 0.1, "answer": 1.0, "reason": 0.3}
TASK_NAMES = list(TASKS)


# ---------------------------------------------------------------- one image, many continuations
def scene_views(kind, seed, world=easy):
    """One training image: its scene and its views, as PIL images.

    kind "low": a whole image at low resolution, marks planted. "close": a close-up, marks at even
    odds. "six": all six views, marks planted in 60 % of the images. Marks come at even odds from
    the first step on, since a base that meets them only where they follow the colour learns the
    colour and never looks at the marks again.
    """
    rng = random.Random(str(seed))
    scene = world.make_scene(seed, planted=kind == "low" or (kind == "six" and rng.random() < 0.6))
    image = world.draw(scene)
    if kind == "close":
        thing = rng.choice([thing for thing in scene.things if thing.place != "center"])
        return world.as_close_up(scene, thing), [world.close_up(image, thing)]
    return scene, crops(image, VIEW) if kind == "six" else [square(image, VIEW)]


def dense_prompt(model):
    """What a toy base is asked for a full caption: Qwen-VL's other prompt, or the base's own."""
    return easy.DENSE_PROMPT if model.caption_text == CAPTION_PROMPT else model.caption_text


def as_captioned(text, loose, rng):
    """A fact as a caption states it: with probability `loose`, a ring is called a circle.

    Captions that models learn from are careless about such things, answers to questions are not.
    """
    is_loose = loose and text.endswith("ring") and rng.random() < loose
    return text.removesuffix("ring") + "circle" if is_loose else text


def continuations(model, scene, n_questions, rng, loose=0.0, world=easy):
    """What may follow an image: [(task, prompt, target)] in ids, two captions and questions."""
    texts = [as_captioned(fact["text"], loose, rng) for fact in world.facts(scene)]
    few = rng.sample(texts, min(len(texts), rng.choice((1, 2, 3))))
    rows = [("dense", model.request(dense_prompt(model)), model.answer(", ".join(texts))),
            ("short", model.request(CAPTION_PROMPT), model.answer(", ".join(few)))]
    if n_questions:
        rows += [("answer", model.question(easy.ask(text)), model.answer(answer))
                 for text, answer, _ in world.questions(scene, n_questions, rng)]
    return rows


def pack(model, images, rows):
    """One image's continuations behind its prefix; images: what the model's `look` gave.

    Returns four lists with an entry per token: ids; branch; target, the token to predict after it
    or PADDING; and the number of the target's task.
    """
    eos = model.tokenizer.eos_id
    ids = model.head(images)
    branch, target, task = [0] * len(ids), [PADDING] * len(ids), [0] * len(ids)
    for k, (name, prompt, answer) in enumerate(rows, 1):
        ids += prompt + answer
        branch += [k] * len(prompt + answer)
        target += [PADDING] * (len(prompt) - 1) + answer + [eos]
        # the first token of an answer, Yes or No, is a task apart from the words that follow it
        first = TASK_NAMES.index(name)
        rest = TASK_NAMES.index("reason") if name == "answer" else first
        task += [first] * len(prompt) + [rest] * len(answer)
    return ids, branch, target, task


def make_batch(model, kind, seed, step, size, n_questions, loose=0.0, world=easy):
    """A batch of one kind of image: the arguments of the model's forward, and task (B, K).

    K is the largest number of targets in a row; row b has its targets first and then padding.
    """
    packed, looks = [], []
    for i in range(size):
        name = f"{seed} {step} {i}"
        scene, pictures = scene_views(kind, name, world)
        images = model.look(pictures)
        rng = random.Random("rows " + name)
        rows = continuations(model, scene, n_questions, rng, loose, world)
        packed.append(pack(model, images, rows))
        looks.append(images)
    lengths = torch.tensor([len(ids) for ids, *_ in packed])
    fills = (model.tokenizer.eos_id, 0, PADDING, 0)
    ids, branch, target, task = (padded(lists, fill) for lists, fill in zip(zip(*packed), fills))
    is_target = target != PADDING                                             # (B, L)
    K = is_target.sum(dim=1).max()
    positions = is_target.int().argsort(dim=1, descending=True, stable=True)[:, :K]
    batch = {"ids": ids, "images": together(looks), "branch": branch,
             "mask": torch.arange(ids.shape[1]) < lengths[:, None],
             "positions": positions, "logp_of": target.gather(1, positions)}    # (B, K)
    return batch, task.gather(1, positions)


def padded(lists, fill):
    """Lists of different lengths as one tensor, padded on the right."""
    longest = max(map(len, lists))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in lists])


def weighted_loss(model, batch, task):
    """Σ over tasks of weight × mean cross entropy of the task's tokens; and each task's mean."""
    nll = -model(**batch)                                                       # (B, K)
    is_target = batch["logp_of"] != PADDING
    means = {}
    for number, name in enumerate(TASK_NAMES):
        chosen = is_target & (task == number)
        if chosen.any():
            means[name] = nll[chosen].mean()
    return sum(TASKS[name] * mean for name, mean in means.items()), means


# ---------------------------------------------------------------- pre-training
def kind_of_step(step, steps, seed):
    """The kind of image of a step: first many close-ups, since shapes are the hardest to see and
    the cheapest to learn there, then mostly six views."""
    shares = (0.35, 0.15, 0.5) if step < steps / 4 else (0.55, 0.2, 0.25)
    return random.Random(f"kind {seed} {step}").choices(("six", "low", "close"), shares)[0]


def pretrain(args):
    """Train a base, or resume from its last checkpoint, and write it in the released layout."""
    args.out.mkdir(parents=True, exist_ok=True)
    worlds.remember(args.out, args.world)
    model = fresh_model(args.like, args.out, args.seed, worlds.WORLDS[args.world])
    opts = optimizers(model, args)
    state, log = args.out / "resume.pt", args.out / "log.jsonl"
    first = load_state(state, model, opts)
    if first:
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(lines[:first]))
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{n_parameters:,} parameters, steps {first} to {args.steps}", file=sys.stderr)
    for step in tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step"):
        figures = train_step(model, opts, step, args)
        with log.open("a") as file:
            file.write(json.dumps(figures) + "\n")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_state(state, model, opts, step + 1)
    model.save(args.out)
    print(f"wrote {args.out}", file=sys.stderr)


def train_step(model, opts, step, args):
    """One optimizer step -> its line of the log."""
    share = step / args.steps
    scale = min((step + 1) / 50, 1.0, (1 - share) / 0.75)   # warm up, hold a quarter, then to 0
    for optimizer, lr in zip(opts, (args.lr, args.adam_lr)):
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
    kind = kind_of_step(step, args.steps, args.seed)
    n_questions = args.questions if share >= 0.05 else 0    # not before it has begun to see
    batch = make_batch(model, kind, args.seed, step, args.batch, n_questions, args.loose,
                       worlds.WORLDS[args.world])
    loss, means = weighted_loss(model, *batch)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in opts:
        optimizer.step()
        optimizer.zero_grad()
    return {"step": step + 1, "kind": kind, "loss": loss.item(), "grad_norm": norm.item(),
            **{name: mean.item() for name, mean in means.items()}}


def save_state(path, model, opts, step):
    """Write a checkpoint, which replaces the one before."""
    state = {"model": model.state_dict(), "step": step,
             "optimizers": [optimizer.state_dict() for optimizer in opts]}
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_state(path, model, opts):
    """Load a checkpoint -> the number of steps done, 0 without one."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(opts, state["optimizers"]):
        optimizer.load_state_dict(saved)
    return state["step"]


# ---------------------------------------------------------------- what a base sees and invents
def dense_captions(model, images):
    """Greedy full captions of images, each what the model's `look` gave -> lists of statements."""
    prompt = model.request(dense_prompt(model))
    ids = torch.tensor([model.head(image) + prompt for image in images])
    eos = model.tokenizer.eos_id
    new_ids = greedy(model, ids, together(images), max_new_tokens=100, eos_id=eos).tolist()
    texts = [model.tokenizer.decode(token for token in row if token != eos) for row in new_ids]
    return [easy.statements(text) for text in texts]


def all_dense_captions(model, images, label=None):
    """`dense_captions` of any number of images, with a progress bar where there is a label."""
    captions = []
    starts = range(0, len(images), REPORT_BATCH)
    # None shows a bar on a terminal only
    for start in tqdm(starts, desc=label, disable=None if label else True):
        captions += dense_captions(model, images[start:start + REPORT_BATCH])
    return captions


def shares(cases):
    """{name: [true, false, …]} -> {name: [share of true, number of cases]}."""
    return {name: [round(sum(values) / max(len(values), 1), 3), len(values)]
            for name, values in cases.items()}


def caption_report(captions, truths, world=easy):
    """Precision and recall of statements, by kind of fact, and the share of the unmarked objects
    on which a mark is invented, by colour group.

    captions: lists of statements. Every figure is [share, number of cases]. Where a world has rare
    words, statements and facts with one are counted apart from the others.
    """
    correct, covered, invented = {"all": []}, {"all": []}, {"warm": [], "cold": []}
    for caption, truth in zip(captions, truths):
        kinds = {fact["text"]: fact["kind"] for fact in truth["facts"]}
        stated = set(caption)
        marks = [text for text in stated if text.split()[-1] in world.MARKS]
        correct["all"] += [text in kinds for text in stated]
        correct.setdefault("mark", []).extend(text in kinds for text in marks)
        covered["all"] += [text in stated for text in kinds]
        for text, kind in kinds.items():
            covered.setdefault(kind, []).append(text in stated)
        if world.RARE_WORDS:
            for text in stated:
                correct.setdefault(frequency(text, world), []).append(text in kinds)
            for text in kinds:
                covered.setdefault(frequency(text, world), []).append(text in stated)
        for group, tempted in inventions(truth, stated):
            invented[group].append(tempted)
    return {"precision": shares(correct), "recall": shares(covered),
            "mark invented on": shares(invented)}


def frequency(text, world):
    """"rare" for a text with a rare word of a world, else "common"."""
    is_common = world.RARE_WORDS.isdisjoint(re.findall(r"[\w-]+", text))
    return "common" if is_common else "rare"


def inventions(truth, stated):
    """Of each unmarked object of a truth row: (colour group, whether a mark is stated for it)."""
    objects = {}
    for planted in truth["planted"]:
        place = planted["text"].rsplit(" ", 1)[0]
        objects.setdefault((place, planted["group"]), []).append(planted["text"] in stated)
    return [(group, any(marks)) for (_, group), marks in objects.items()]


def close_up_report(model, scenes, world=easy):
    """How often the caption of a close-up states the right mark, and no mark on an unmarked
    object."""
    looks, marks = [], []
    for scene in scenes:
        image = world.draw(scene)
        for thing in scene.things:
            if thing.place != "center":
                looks.append(model.look([world.close_up(image, thing)]))
                marks.append(thing.mark)
    correct = []
    for caption, mark in zip(all_dense_captions(model, looks), marks):
        stated = [kind for kind in world.MARKS if f"close-up {kind}" in caption]
        correct.append(stated == ([mark] if mark else []))
    return shares({"mark told": correct})


def question_report(model, scenes, images, seed, world=easy):
    """Accuracy of yes and no by kind of question, where P(yes) >= .5 is a yes; where a world has
    rare words, also of questions in which or in whose answer there is one, and of the others."""
    correct = {}
    for number, (scene, views_of_it) in enumerate(zip(scenes, images)):
        questions = world.questions(scene, 16, random.Random(f"questions {seed} {number}"))
        texts = [easy.ask(text) for text, _, _ in questions]
        p_yes = yes_probability(model, views_of_it, texts).tolist()
        for p, (text, answer, kind) in zip(p_yes, questions):
            is_correct = (p >= 0.5) == answer.startswith("Yes")
            if world.RARE_WORDS:
                correct.setdefault(frequency(f"{text} {answer}", world), []).append(is_correct)
            correct.setdefault("all", []).append(is_correct)
            correct.setdefault(kind, []).append(is_correct)
    return shares(dict(sorted(correct.items())))


def looks_at(model, scenes, label=None, world=easy):
    """What the model's `look` gives for the six views of each of the scenes."""
    scenes = tqdm(scenes, desc=label, disable=None if label else True)
    return [model.look(crops(world.draw(scene), VIEW)) for scene in scenes]


def measure(model, n, seed, world=easy):
    """What a base sees and invents on n unseen scenes -> {views: {figure: {case: [share, n]}}}."""
    scenes = [world.make_scene(f"report {seed} {i}") for i in range(n)]
    low = [model.look([square(world.draw(scene), VIEW)]) for scene in scenes]
    six = looks_at(model, scenes, "drawing", world)
    figures = {}
    for name, images in (("one low-resolution view", low), ("six views", six)):
        figures[name] = seen(model, scenes, images, seed, world, f"captions, {name}")
    if world.RARE_WORDS:
        scenes = [world.make_scene(f"report tail {seed} {i}", tail=world.TAIL) for i in range(n)]
        figures["six views, more rare words"] = seen(
            model, scenes, looks_at(model, scenes, "drawing", world), seed, world, "captions, rare")
    even = [world.make_scene(f"report even {seed} {i}", planted=False) for i in range(n // 2)]
    figures["close-ups"] = {"marks at even odds": close_up_report(model, even, world)}
    return figures


def seen(model, scenes, images, seed, world=easy, label=None):
    """What a model states about scenes in dense captions, and how it answers questions."""
    captions = all_dense_captions(model, images, label)
    truths = [world.truth(scene, "") for scene in scenes]
    return {**caption_report(captions, truths, world),
            "yes/no": question_report(model, scenes, images, seed, world)}


def report(args):
    """Print the figures of `measure`, a JSON object a line."""
    model = open_base(args.base)
    figures = measure(model, args.scenes, args.seed, worlds.WORLDS[args.world])
    print(json.dumps({"base": str(args.base), "world": args.world, "scenes": args.scenes,
                      "seed": args.seed}))
    for name, figures_of_views in figures.items():
        for figure, cases in figures_of_views.items():
            print(f"{name}, {figure}: {json.dumps(cases)}")


def own_tasks(model, seed, n=200, world=easy):
    """How well a model still does the tasks of its base on n scenes.

    Returns {"dense f1", "questions", "close-up marks"}: F1 of dense captions, accuracy of yes and
    no, and the share of close-ups with the right mark.
    """
    scenes = [world.make_scene(f"own tasks {seed} {i}") for i in range(n)]
    figures = seen(model, scenes, looks_at(model, scenes, world=world), seed, world)
    (precision, _), (recall, _) = figures["precision"]["all"], figures["recall"]["all"]
    even = [world.make_scene(f"own tasks even {seed} {i}", planted=False) for i in range(n // 2)]
    return {"dense f1": 2 * precision * recall / max(precision + recall, 1e-9),
            "questions": figures["yes/no"]["all"][0],
            "close-up marks": close_up_report(model, even, world)["mark told"][0]}
