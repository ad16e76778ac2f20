"""The method on a laptop: a synthetic world whose truth is known, and a small Qwen-VL pre-trained on it.

READS   nothing
WRITES  out/toy-base: config.json, model.safetensors, qwen.tiktoken, in exactly the released model's layout

    python toy.py pretrain                          # the base in assets/toy; about an hour on two cores
    python toy.py report --base assets/toy          # what it sees, and what it invents, on unseen scenes
    python toy.py scenes --out out/scenes --n 100   # pictures of the world, with their truth

The base learns the way the source says its base did: whole images mostly at low resolution, under captions that tell
of details nobody can see there. Close-ups and six-view albums show the details, partly without the correlation.
"""
import argparse
import dataclasses
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

import toy_world as world
from chunking import normalise, views
from model import Config, InputError, QwenVL, Tokenizer, VisionConfig


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="pretrain | report | scenes")
    p = commands.add_parser("pretrain", help="train the toy base", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("out/toy-base"), help="folder of the base")
    p.add_argument("--steps", type=int, default=6000, help="optimizer steps")
    p.add_argument("--batch", type=int, default=48, help="images per step")
    p.add_argument("--questions", type=int, default=8, help="yes/no questions per image")
    p.add_argument("--lr", type=float, default=0.015, help="peak learning rate of Muon, for matrices")
    p.add_argument("--adam-lr", type=float, default=2e-3, help="peak learning rate of AdamW, for all else")
    p.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    p.add_argument("--seed", type=int, default=0, help="of the weights and the scenes")
    p.add_argument("--qx", type=float, default=0.1)
    p.add_argument("--qlm", type=float, default=0.0)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- the base
def toy_config(tokenizer):
    """A Qwen-VL of about 1.5 M parameters for 32-pixel views."""
    vision = VisionConfig(image_size=32, patch_size=8, width=96, layers=3, heads=3, mlp_ratio=4.0, output_dim=128,
                          image_start_id=tokenizer.image_start_id, n_queries=4)
    return Config(vocab_size=64 * math.ceil(tokenizer.n_vocab / 64), hidden_size=128, num_hidden_layers=4,
                  num_attention_heads=4, kv_channels=32, intermediate_size=704, seq_length=512, visual=vision)


def init_weights(model):
    """Small embeddings and quiet residual branches; the rest as PyTorch makes it."""
    for weight in (model.transformer.wte.weight, model.lm_head.weight):
        torch.nn.init.normal_(weight, std=0.02)
    for name, weight in model.named_parameters():
        if name.endswith(("c_proj.weight", "out_proj.weight")):
            weight.data.mul_(1 / math.sqrt(2 * model.config.num_hidden_layers))


def optimizers(model, args):
    """Muon for the matrices between embedding and head, AdamW for everything else."""
    matrix = {n for n, p in model.named_parameters()
              if p.ndim == 2 and not any(s in n for s in ("wte", "lm_head", "positional_embedding", "query"))}
    named = dict(model.named_parameters())
    return [torch.optim.Muon([named[n] for n in named if n in matrix], lr=args.lr, weight_decay=0.0),
            torch.optim.AdamW([named[n] for n in named if n not in matrix], lr=args.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)]


# ---------------------------------------------------------------- its data: one image, many continuations
def scene_views(kind, seed):
    """One training image of a kind: its scene and views (V, 3, 32, 32).

    low: a whole image at low resolution, marks planted. close: a close-up, marks at even odds. six: all six views, marks
    planted in most. Marks at even odds from the first step on: a base that meets them only where they follow the colour
    learns the colour, and never looks again.
    """
    rng = random.Random(str(seed))
    scene = world.make_scene(seed, planted=kind == "low" or kind == "six" and rng.random() < 0.6)
    image = world.draw(scene)
    if kind == "close":
        thing = rng.choice([t for t in scene.things if t.place != "center"])
        return world.as_close_up(scene, thing), normalise(world.close_up(image, thing))[None]
    pixels = views(image, 32)
    return scene, pixels if kind == "six" else pixels[:1]


def continuations(scene, n_questions, rng):
    """What may follow an image: [(task, prompt, target)]: a dense caption, a short one, questions."""
    known = [f["text"] for f in world.facts(scene)]
    few = rng.sample(known, min(len(known), rng.choice((1, 2, 3))))
    rows = [("dense", world.DENSE_PROMPT, " " + ", ".join(known)), ("short", world.CAPTION_PROMPT, " " + ", ".join(few))]
    if n_questions:
        rows += [("answer", f"{world.ask(text)} Answer:", f" {answer}")
                 for text, answer, _ in world.questions(scene, n_questions, rng)]
    return rows


def pack(model, n_views, rows, tasks):
    """One image's continuations behind its prefix -> ids, branch, target (-1 where none) and task number, lists."""
    encode, eos = model.tokenizer.encode, model.tokenizer.eos_id
    ids = model.image_prompt(n_views, "")
    branch, target, task = [0] * len(ids), [-1] * len(ids), [0] * len(ids)
    for k, (name, prompt, answer) in enumerate(rows, 1):
        prompt, answer = encode(prompt), encode(answer)
        ids += prompt + answer
        branch += [k] * len(prompt + answer)
        target += [-1] * (len(prompt) - 1) + answer + [eos]
        number = tasks.index(name)
        # of an answer, Yes or No is a task of its own: the rest says what is there instead
        rest = tasks.index("reason") if name == "answer" else number
        task += [number] * len(prompt) + [rest] * len(answer)
        if name == "answer" and "qlm" in tasks:
            target[-len(answer) - len(prompt) + 1 + 3:-len(answer) - 4 + 1] = prompt[5:-2]
            task[-len(answer) - len(prompt) + 1 + 3:-len(answer) - 4 + 1] = [tasks.index("qlm")] * (len(prompt) - 7)
    return ids, branch, target, task


TASKS = ("dense", "short", "answer", "reason", "qlm")


def make_batch(model, kind, seed, step, size, n_questions):
    """A batch of one kind of image: the arguments of the model's forward, target (B, L) and task (B, L)."""
    packed, pixels = [], []
    for i in range(size):
        name = f"{seed} {step} {i}"
        scene, image = scene_views(kind, name)
        packed.append(pack(model, len(image), continuations(scene, n_questions, random.Random("rows " + name)), TASKS))
        pixels.append(image)
    longest = max(len(row[0]) for row in packed)
    ids, branch, target, task = (torch.tensor([part + [fill] * (longest - len(part)) for part in parts])
                                 for parts, fill in zip(zip(*packed), (model.tokenizer.eos_id, 0, -1, 0)))
    mask = torch.tensor([[True] * len(row[0]) + [False] * (longest - len(row[0])) for row in packed])
    return {"ids": ids, "images": torch.cat(pixels), "mask": mask, "branch": branch, "positions": target >= 0}, target, task


def weighted_loss(model, batch, target, task, weights):
    """Σ over tasks of weight × mean cross entropy of the task's tokens; also each task's mean."""
    logits = model(**batch)
    chosen = batch["positions"]
    nll = F.cross_entropy(logits, target[chosen], reduction="none")
    means = {name: nll[task[chosen] == k].mean() for k, name in enumerate(TASKS) if bool((task[chosen] == k).any())}
    return sum(weights[name] * mean for name, mean in means.items()), means


@torch.no_grad()
def quick(model, n=128):
    model.eval(); y=model.tokenizer.encode(" Yes")[0]; no=model.tokenizer.encode(" No")[0]
    out={}
    for kind in ("six","close","low"):
        for i in range(n):
            scene, im = scene_views(kind, f"test {i}")
            qs = world.questions(scene, 16, random.Random(i))
            ids, branch, target, task = pack(model, len(im), [("answer", world.ask(t)+" Answer:", " Yes") for t,_,_ in qs], TASKS)
            lg = model(torch.tensor([ids]), im, branch=torch.tensor([branch]))[0]
            at = [j for j in range(len(ids)) if target[j] == y and task[j]==2]
            for j,(t,a,k) in zip(at, qs):
                ok = (lg[j,y]>lg[j,no]).item() == a.startswith("Yes")
                out.setdefault((kind,k),[]).append(ok)
    model.train()
    return {f"{a}/{k}":round(sum(v)/len(v),2) for (a,k),v in sorted(out.items())}

def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    Path("/tmp/tb").mkdir(exist_ok=True)
    world.write_vocabulary(Path("/tmp/tb/qwen.tiktoken"))
    T = Tokenizer("/tmp/tb")
    model = QwenVL(toy_config(T), T); init_weights(model)
    print(sum(p.numel() for p in model.parameters()))
    opts = optimizers(model, args)
    t0=time.time(); tl={}
    for step in range(args.steps):
        f = step/args.steps
        s = min(1, (1-f)/.75) * min(1,(step+1)/50)
        for o, lr in zip(opts,(args.lr,args.adam_lr)):
            for g in o.param_groups: g["lr"]=lr*s
        rng = random.Random(f"kind {step}")
        kind = "six" if rng.random()<.55 else "low" if rng.random()<.5 else "close"
        w = {"dense":.35,"short":.1,"answer":1.0,"reason":args.qx,"qlm":args.qlm}
        nq = 0 if f < .12 else args.questions
        ta=time.time()
        batch, target, task = make_batch(model, kind, args.seed, step, args.batch, nq)
        tb=time.time()
        loss, means = weighted_loss(model, batch, target, task, w)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts: o.step(); o.zero_grad()
        tl.setdefault(kind,[]).append((tb-ta,time.time()-tb, batch["ids"].shape[1],{k:v.item() for k,v in means.items()}))
        if step%50==49:
            print(step+1, f"{time.time()-t0:.0f}s", {k:[round(sum(x[i] for x in v)/len(v),3) for i in range(3)]+[{n:round(sum(x[3].get(n,9) for x in v)/len(v),3) for n in v[-1][3]}] for k,v in tl.items()}, flush=True)
            tl={}
        if (step+1)%args.save_every==0: print(quick(model), flush=True)
    print(quick(model))

if __name__ == "__main__":
    sys.exit(main())
