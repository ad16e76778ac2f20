"""The toy world: small scenes whose every fact is known, so that each claim about captions can be counted.

A scene is 64×64 pixels: a background, two to four objects in the quadrants, sometimes a small one in the centre that
all four quadrant crops cut. Objects may carry a mark, the "necklace" of the source's example: a fine hatch that
vanishes when the image is halved, so that one low-resolution view cannot show it, and that goes with warm colours, so
that a model trained on such views learns to invent it.

A fact is a short statement whose first word says what it is about: `background gray`, `top-left red circle`,
`top-left stripes`, `center blue ring`. A caption is facts joined by commas.
"""
import base64
import json
import os
import random
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from model import CAPTION_PROMPT
from plumbing.rules import question_of as ask
from plumbing.train import write_whole

SIDE = 64                                                   # of a scene; a view is half of it
PLACES = {"top-left": (16, 16), "top-right": (48, 16), "bottom-left": (16, 48), "bottom-right": (48, 48)}
BACKGROUNDS = {"gray": (125, 125, 125), "black": (62, 62, 62), "white": (195, 195, 195), "brown": (135, 95, 65)}
COLORS = {"red": (190, 65, 65), "yellow": (190, 180, 65), "purple": (150, 65, 185),
          "blue": (65, 85, 190), "green": (65, 165, 75), "cyan": (65, 180, 185)}
WARM = ("red", "yellow", "purple")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
MARKS = ("stripes", "checks")
MARK_RATE = {"warm": 0.85, "cold": 0.15}                    # how often an object of that colour group is marked
MARK_KIND_RATE = 0.85                                       # warm ones with stripes, cold ones with checks, this often
MARK_SIDE = 8
KEPT = 0.55                                                 # of a scene's facts in a caption
PART_RATE = 0.3                                             # of questions that ask for one attribute only

DENSE_PROMPT = "Generate the caption in English with grounding:"


# ---------------------------------------------------------------- scenes and their facts
@dataclass
class Thing:
    """An object: where, its colour and shape, its mark (None, or one of MARKS), and how it is drawn."""
    place: str
    color: str
    shape: str
    mark: str | None
    x: float
    y: float
    radius: float

    @property
    def group(self):
        return "warm" if self.color in WARM else "cold"

    @property
    def text(self):
        return f"{self.place} {self.color} {self.shape}"


@dataclass
class Scene:
    background: str
    things: list
    seed: int                                               # of the noise


def make_scene(seed, planted=True):
    """The scene of a seed, which may be anything. planted=False: marks come at even odds, whatever the colour."""
    rng = random.Random(str(seed))
    things = []
    for place in sorted(rng.sample(list(PLACES), rng.choice((2, 3, 3, 4))), key=list(PLACES).index):
        x, y = (c + rng.uniform(-2.5, 2.5) for c in PLACES[place])
        thing = Thing(place, rng.choice(list(COLORS)), rng.choice(SHAPES), None, x, y, rng.uniform(7.5, 9.5))
        usual = MARKS[thing.group == "cold"]
        if rng.random() < (MARK_RATE[thing.group] if planted else 0.5):
            thing.mark = usual if rng.random() < (MARK_KIND_RATE if planted else 0.5) else MARKS[usual == MARKS[0]]
        things.append(thing)
    if rng.random() < 0.6:
        x, y = (SIDE / 2 + rng.uniform(-1, 1) for _ in range(2))
        things.append(Thing("center", rng.choice(list(COLORS)), rng.choice(SHAPES), None, x, y, rng.uniform(4, 5.5)))
    return Scene(rng.choice(list(BACKGROUNDS)), things, rng.getrandbits(32))


def facts(scene):
    """All true statements, in canonical order: [{"text", "about", "kind", "detail"}]. Marks and centre are details."""
    found = [{"text": f"background {scene.background}", "about": "background", "kind": "background", "detail": False}]
    for thing in scene.things:
        small = thing.place == "center"
        kind = "center" if small else "object"
        found.append({"text": thing.text, "about": thing.place, "kind": kind, "detail": small})
        if thing.mark:
            found.append({"text": f"{thing.place} {thing.mark}", "about": thing.place, "kind": "mark", "detail": True})
    return found


def truth(scene, name):
    """The truth row of an image: its facts, what else is true of it, and the false statements to which the planted
    correlation tempts.

    {"image", "facts": see `facts`, "also_true": that a place is empty, or an object in a quadrant plain, which answers
    to questions say, "planted": [{"text", "about", "group"}]}: of every unmarked object, both marks, and the object's
    colour group.
    """
    bare = [thing for thing in scene.things if thing.place != "center" and not thing.mark]
    taken = {thing.place for thing in scene.things}
    empty = [f"{place} empty" for place in (*PLACES, "center") if place not in taken]
    planted = [{"text": f"{t.place} {mark}", "about": t.place, "group": t.group} for t in bare for mark in MARKS]
    return {"image": name, "facts": facts(scene), "also_true": empty + [f"{t.place} plain" for t in bare],
            "planted": planted}


def statements(caption):
    """A caption's statements, in order."""
    return [part.strip() for part in caption.split(",") if part.strip()]


# ---------------------------------------------------------------- drawing
def halving():
    """Pillow's bicubic filter from SIDE to SIDE/2 pixels as a matrix (SIDE/2, SIDE)."""
    unit = Image.fromarray(np.eye(SIDE, dtype=np.float32))
    return np.asarray(unit.resize((SIDE // 2, SIDE), Image.BICUBIC), dtype=np.float64).T


HALVING = halving()
VISIBLE = np.linalg.pinv(HALVING) @ HALVING                 # (SIDE, SIDE): projects onto what halving keeps


def draw_mark(kind, x, y):
    """A hatch of amplitude 1 around (x, y), (SIDE, SIDE), less all that a halved image would keep of it.

    A plain hatch of one-pixel stripes nearly vanishes when halved, but its edges leave a trace that a probe can find;
    subtracting the projection leaves exactly nothing (up to rounding to grey levels).
    """
    hatch = np.zeros((SIDE, SIDE))
    left, top = (2 * round((c - MARK_SIDE / 2) / 2) for c in (x, y))        # on the even grid
    stripes = np.where(np.arange(MARK_SIDE) % 2, -1.0, 1.0)
    hatch[top:top + MARK_SIDE, left:left + MARK_SIDE] = stripes if kind == "stripes" else stripes * stripes[:, None]
    return hatch - VISIBLE @ hatch @ VISIBLE.T


OVER = 3                                                    # samples per pixel and axis, for smooth edges
GRID = (np.arange(SIDE * OVER) + 0.5) / OVER


def cover(thing):
    """How much of each pixel an object covers, (SIDE, SIDE), 0 … 1."""
    dx, dy = GRID[None] - thing.x, GRID[:, None] - thing.y
    r = thing.radius
    if thing.shape == "circle":
        inside = dx ** 2 + dy ** 2 < r ** 2
    elif thing.shape == "ring":
        inside = (dx ** 2 + dy ** 2 < r ** 2) & (dx ** 2 + dy ** 2 > (0.55 * r) ** 2)
    elif thing.shape == "square":
        inside = np.maximum(abs(dx), abs(dy)) < 0.88 * r
    elif thing.shape == "diamond":
        inside = abs(dx) + abs(dy) < 1.15 * r
    elif thing.shape == "cross":
        inside = (np.minimum(abs(dx), abs(dy)) < 0.3 * r) & (np.maximum(abs(dx), abs(dy)) < r)
    else:
        inside = (dy < 0.8 * r) & (dy > 2 * abs(dx) - r)
    return inside.reshape(SIDE, OVER, SIDE, OVER).mean(axis=(1, 3))


def draw(scene):
    """The picture of a scene, an RGB image."""
    rng = np.random.default_rng(scene.seed)
    pixels = np.array(BACKGROUNDS[scene.background]) + rng.normal(0, 6, 3) + np.zeros((SIDE, SIDE, 3))
    marks = np.zeros((SIDE, SIDE))
    for thing in scene.things:
        color = (np.array(COLORS[thing.color]) + rng.normal(0, 9, 3)).clip(60, 195)
        share = cover(thing)[:, :, None]
        pixels = pixels * (1 - share) + color * share
        if thing.mark:
            marks += rng.uniform(35, 50) * draw_mark(thing.mark, thing.x, thing.y)
    pixels += rng.normal(0, 4, pixels.shape)
    return Image.fromarray((pixels + marks[:, :, None]).round().clip(0, 255).astype(np.uint8))


def draw_scenes(folder, seeds):
    """Scenes as PNG files (JPEG would destroy the marks) -> their rows, {"truth", "captions", "questions"}.

    Captions are as incomplete as real ones, and in no order: each fact stands in one with probability KEPT, at least
    two do. There are three questions an image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"truth": [], "captions": [], "questions": []}
    for number, seed in enumerate(seeds):
        scene, name, rng = make_scene(seed), f"{number:05d}.png", random.Random(f"rows {seed}")
        draw(scene).save(folder / name)
        known = [fact["text"] for fact in facts(scene)]
        kept = [text for text in known if rng.random() < KEPT]
        kept = kept if len(kept) > 1 else rng.sample(known, 2)
        rows["truth"].append(truth(scene, name))
        rows["captions"].append({"image": name, "caption": ", ".join(rng.sample(kept, len(kept)))})
        rows["questions"] += [{"image": name, "question": ask(text), "answer": answer}
                              for text, answer, _ in questions(scene, 3, rng)]
    return rows


def write_rows(path, rows, folder):
    """Rows as JSONL at `path`, their images, which lie in `folder`, named from there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = ({**row, "image": os.path.relpath(folder / row["image"], path.parent)} for row in rows)
    write_whole(path, lambda temporary: temporary.write_text("".join(json.dumps(row) + "\n" for row in named), "utf-8"))


# ---------------------------------------------------------------- close-ups
def close_up(image, thing):
    """The quadrant of a picture in which an object lies, at full resolution: a picture of one thing."""
    x, y = PLACES[thing.place]
    return image.crop((x - 16, y - 16, x + 16, y + 16))


def as_close_up(scene, thing):
    """The scene that a close-up shows: its background and the one thing, which then is "close-up"."""
    return Scene(scene.background, [Thing("close-up", thing.color, thing.shape, thing.mark, 0, 0, 0)], scene.seed)


# ---------------------------------------------------------------- questions
def questions(scene, n, rng):
    """n yes/no questions, about half true: [(statement, answer, kind)]; answers say what is there instead.

    Near misses: the object with another colour or shape, at another place; a mark that is not there or of the other
    kind; another background. Kinds: the fact's kind, or `wrong color`, `wrong shape`, … for the false ones. Some ask
    for one attribute only (`top-left red`, kind `part`), which is how a model learns to compare at all.
    """
    return [true_question(scene, rng) if rng.random() < 0.5 else false_question(scene, rng) for _ in range(n)]


def true_question(scene, rng):
    """A true statement about the scene: (statement, answer, kind)."""
    if rng.random() < PART_RATE:
        thing = rng.choice(scene.things)
        return f"{thing.place} {rng.choice((thing.color, thing.shape))}", f"Yes, {thing.text}", "part"
    known = facts(scene)
    fact = rng.choice(known[1:] * 4 + known[:1])
    return fact["text"], f"Yes, {fact['text']}", fact["kind"]


def false_question(scene, rng):
    """A near miss: (statement, answer that says what is there instead, kind)."""
    thing = rng.choice(scene.things)
    other_color = rng.choice([c for c in COLORS if c != thing.color])
    other_shape = rng.choice([s for s in SHAPES if s != thing.shape])
    if rng.random() < PART_RATE:
        return f"{thing.place} {rng.choice((other_color, other_shape))}", f"No, {thing.text}", "wrong part"
    kinds = {"wrong shape": 8, "wrong color": 4, "wrong place": 3, "wrong mark": 4, "wrong background": 1}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    taken = {t.place: t.text for t in scene.things}
    places = [p for p in (*PLACES, "center") if taken.get(p) != f"{p} {thing.color} {thing.shape}"]
    markable = [t for t in scene.things if t.place != "center"]
    if kind == "wrong place" and places and thing.place != "close-up":
        place = rng.choice(places)
        return f"{place} {thing.color} {thing.shape}", f"No, {taken.get(place, place + ' empty')}", kind
    if kind == "wrong mark" and markable:
        thing = rng.choice(markable)
        mark = rng.choice([m for m in MARKS if m != thing.mark])
        return f"{thing.place} {mark}", f"No, {thing.place} {thing.mark or 'plain'}", kind
    if kind == "wrong background":
        other = rng.choice([b for b in BACKGROUNDS if b != scene.background])
        return f"background {other}", f"No, background {scene.background}", kind
    if kind == "wrong color":
        return f"{thing.place} {other_color} {thing.shape}", f"No, {thing.text}", kind
    return f"{thing.place} {thing.color} {other_shape}", f"No, {thing.text}", "wrong shape"


# ---------------------------------------------------------------- vocabulary
def write_vocabulary(path):
    """A qwen.tiktoken for this world: all bytes, then each word of its texts as one token."""
    names = " ".join([*BACKGROUNDS, *PLACES, *COLORS, *SHAPES, *MARKS])
    texts = [CAPTION_PROMPT, DENSE_PROMPT, ask("it"), " Answer: Yes No yes no", "Yes", "No", "yes", "no",
             f" {names} center close-up background plain empty"]
    words = [word for text in texts for word in re.findall(r"[^A-Za-z]?[A-Za-z]+", text)]
    tokens = [bytes([b]) for b in range(256)] + [w.encode() for w in dict.fromkeys(words)]
    path.write_text("".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens)))
