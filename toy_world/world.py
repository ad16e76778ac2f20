"""The toy world: small scenes whose every fact is known, so that each claim about captions can be
counted.

A scene is 64×64 pixels: a background, two to four objects in the quadrants, and sometimes a small
object in the centre, which all four quadrant crops cut. An object in a quadrant may carry a mark,
the "necklace" of the source's example. It is a fine hatch that vanishes when the image is halved,
so that one low-resolution view cannot show it, and it is frequent on warm colours and rare on cold
ones, so that a model trained on such views learns to invent it.

A fact is a short statement whose first word says what it is about: `background gray`,
`top-left red circle`, `top-left stripes`, `center blue ring`. A caption is facts joined by commas.

This is the easy world, with what it shares with the hard one, toy_world/hard.py.
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
from plumbing import files
from plumbing.rules import question_of as ask

SIDE = 64                               # pixels of a scene's side; a view has half of it
PLACES = {"top-left": (16, 16), "top-right": (48, 16),
          "bottom-left": (16, 48), "bottom-right": (48, 48)}
BACKGROUNDS = {"gray": (125, 125, 125), "black": (62, 62, 62),
               "white": (195, 195, 195), "brown": (135, 95, 65)}
COLORS = {"red": (190, 65, 65), "yellow": (190, 180, 65), "purple": (150, 65, 185),
          "blue": (65, 85, 190), "green": (65, 165, 75), "cyan": (65, 180, 185)}
WARM = ("red", "yellow", "purple")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
MARKS = ("stripes", "checks")
MARK_RATE = {"warm": 0.85, "cold": 0.15}    # share of the objects of a colour group with a mark
MARK_KIND_RATE = 0.85                   # of these, the warm ones with stripes, the cold with checks
MARK_SIDE = 8                           # pixels
FACT_RATE = 0.55                        # share of a scene's facts that its caption keeps
PART_RATE = 0.3                         # share of questions that ask for one attribute only
QUESTIONS = 3                           # per image of a question set

DENSE_PROMPT = "Generate the caption in English with grounding:"
# every word of the facts, questions and answers of this world
WORDS = (*BACKGROUNDS, *PLACES, *COLORS, *SHAPES, *MARKS, "center", "close-up", "background",
         "plain", "empty")
# Texts whose first words a caption may begin with, for the Qwen3-VL's tokenizer, which tells a word
# from the same word after a space. The shipped one has only "background" without a space.
STARTS = ("background close-up top bottom center",)
RARE_WORDS = frozenset()                # those that are seen too seldom to be learned


# ---------------------------------------------------------------- scenes and their facts
@dataclass
class Thing:
    """An object: its place, colour, shape and mark (None or one of MARKS), and how it is drawn."""
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
    seed: int                           # of the noise


def make_scene(seed, planted=True):
    """The scene of a seed, which may be any value.

    planted: marks follow the colour. Without it an object has a mark with probability 1/2, of
    either kind with probability 1/2, whatever its colour.
    """
    rng = random.Random(str(seed))
    places = rng.sample(list(PLACES), rng.choice((2, 3, 3, 4)))
    things = []
    for place in sorted(places, key=list(PLACES).index):
        x, y = (c + rng.uniform(-2.5, 2.5) for c in PLACES[place])
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        thing = Thing(place, color, shape, None, x, y, rng.uniform(7.5, 9.5))
        usual, unusual = MARKS if thing.group == "warm" else MARKS[::-1]
        if rng.random() < (MARK_RATE[thing.group] if planted else 0.5):
            is_usual = rng.random() < (MARK_KIND_RATE if planted else 0.5)
            thing.mark = usual if is_usual else unusual
        things.append(thing)
    if rng.random() < 0.6:
        x, y = (SIDE / 2 + rng.uniform(-1, 1) for _ in range(2))
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        things.append(Thing("center", color, shape, None, x, y, rng.uniform(4, 5.5)))
    return Scene(rng.choice(list(BACKGROUNDS)), things, rng.getrandbits(32))


def make_fact(text, about, kind, detail=False):
    return {"text": text, "about": about, "kind": kind, "detail": detail}


def facts(scene):
    """All facts of a scene in canonical order: [{"text", "about", "kind", "detail"}].

    Marks and the object in the centre are details.
    """
    rows = [make_fact(f"background {scene.background}", "background", "background")]
    for thing in scene.things:
        is_small = thing.place == "center"
        kind = "center" if is_small else "object"
        rows.append(make_fact(thing.text, thing.place, kind, detail=is_small))
        if thing.mark:
            rows.append(make_fact(f"{thing.place} {thing.mark}", thing.place, "mark", detail=True))
    return rows


def truth(scene, name):
    """The truth row of an image.

    {"image": name,
     "facts": as `facts` gives them,
     "also_true": true statements that are not facts (a place is empty, an object in a quadrant is
         plain), which answers to questions contain,
     "planted": [{"text", "about", "group"}], the false statements to which the planted correlation
         tempts: for every unmarked object in a quadrant both marks, with its colour group}
    """
    unmarked = [thing for thing in scene.things if thing.place != "center" and not thing.mark]
    taken = {thing.place for thing in scene.things}
    empty = [f"{place} empty" for place in (*PLACES, "center") if place not in taken]
    planted = [{"text": f"{thing.place} {mark}", "about": thing.place, "group": thing.group}
               for thing in unmarked for mark in MARKS]
    return {"image": name, "facts": facts(scene),
            "also_true": empty + [f"{thing.place} plain" for thing in unmarked],
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
# projects a row of pixels onto the part of it that halving keeps
VISIBLE = np.linalg.pinv(HALVING) @ HALVING         # (SIDE, SIDE)


STRIPES = np.where(np.arange(MARK_SIDE) % 2, -1.0, 1.0)
CHECKS = STRIPES * STRIPES[:, None]


def draw_mark(kind, x, y):
    """A mark of amplitude 1 around (x, y), which a halved image does not show: (SIDE, SIDE)."""
    left, top = mark_corner(x, y)
    return draw_hatch(STRIPES if kind == "stripes" else CHECKS, left, top)


def mark_corner(x, y):
    """The pixel at the top left of a mark around (x, y): left, top. Both are even."""
    return tuple(2 * round((c - MARK_SIDE / 2) / 2) for c in (x, y))


def draw_hatch(pattern, left, top):
    """A hatch (MARK_SIDE, MARK_SIDE) at a pixel, less its part that a halved image shows.

    A hatch of one-pixel stripes nearly vanishes when it is halved, but its edges leave a trace
    that a probe can find. Subtracting the projection leaves nothing but rounding to grey levels.
    """
    hatch = np.zeros((SIDE, SIDE))
    hatch[top:top + MARK_SIDE, left:left + MARK_SIDE] = pattern
    return hatch - VISIBLE @ hatch @ VISIBLE.T


OVERSAMPLING = 3                        # points per pixel and axis, for smooth edges
GRID = (np.arange(SIDE * OVERSAMPLING) + 0.5) / OVERSAMPLING


def is_inside(shape, dx, dy, r):
    """Which points at (dx, dy) from its centre a shape of radius r contains, as booleans."""
    if shape == "circle":
        return dx ** 2 + dy ** 2 < r ** 2
    if shape == "ring":
        return (dx ** 2 + dy ** 2 < r ** 2) & (dx ** 2 + dy ** 2 > (0.55 * r) ** 2)
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) < 0.88 * r
    if shape == "diamond":
        return abs(dx) + abs(dy) < 1.15 * r
    if shape == "cross":
        return (np.minimum(abs(dx), abs(dy)) < 0.3 * r) & (np.maximum(abs(dx), abs(dy)) < r)
    return (dy < 0.8 * r) & (dy > 2 * abs(dx) - r)          # triangle


def coverage(thing):
    """The share of each pixel that an object covers, 0 to 1: (SIDE, SIDE)."""
    dx, dy = GRID[None] - thing.x, GRID[:, None] - thing.y
    points = is_inside(thing.shape, dx, dy, thing.radius)
    return points.reshape(SIDE, OVERSAMPLING, SIDE, OVERSAMPLING).mean(axis=(1, 3))


def draw(scene):
    """The picture of a scene, an RGB image."""
    rng = np.random.default_rng(scene.seed)
    background = np.array(BACKGROUNDS[scene.background]) + rng.normal(0, 6, 3)
    pixels = background + np.zeros((SIDE, SIDE, 3))
    marks = np.zeros((SIDE, SIDE))
    for thing in scene.things:
        color = (np.array(COLORS[thing.color]) + rng.normal(0, 9, 3)).clip(60, 195)
        share = coverage(thing)[:, :, None]
        pixels = pixels * (1 - share) + color * share
        if thing.mark:
            marks += rng.uniform(35, 50) * draw_mark(thing.mark, thing.x, thing.y)
    pixels += rng.normal(0, 4, pixels.shape)
    return Image.fromarray((pixels + marks[:, :, None]).round().clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------- data sets
def draw_scenes(folder, seeds):
    """Scenes as files and rows; see draw_all."""
    return draw_all(folder, seeds, make_scene, draw, truth, questions)


def draw_all(folder, seeds, make_scene, draw, truth, questions):
    """Scenes as PNG files (JPEG would destroy the marks) and their rows.

    The functions are those of a world. Returns {"truth": [...], "captions": [...],
    "questions": [...]}. There are QUESTIONS different questions per image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"truth": [], "captions": [], "questions": []}
    for number, seed in enumerate(seeds):
        scene, name, rng = make_scene(seed), f"{number:05d}.png", random.Random(f"rows {seed}")
        draw(scene).save(folder / name)
        known = truth(scene, name)
        rows["truth"].append(known)
        rows["captions"].append({"image": name, "caption": short_caption(known["facts"], rng)})
        rows["questions"] += [{"image": name, "question": ask(text), "answer": answer}
                              for text, answer, _ in distinct(questions, scene, QUESTIONS, rng)]
    return rows


def short_caption(facts, rng):
    """A caption as incomplete as those written by people, in random order.

    Each fact is kept with probability FACT_RATE, and at least two are.
    """
    texts = [fact["text"] for fact in facts]
    kept = [text for text in texts if rng.random() < FACT_RATE]
    if len(kept) < 2:
        kept = rng.sample(texts, 2)
    return ", ".join(rng.sample(kept, len(kept)))


def distinct(questions, scene, n, rng):
    """n questions as `questions` draws them, no statement twice."""
    drawn = {}
    while len(drawn) < n:
        (question,) = questions(scene, 1, rng)
        drawn.setdefault(question[0], question)
    return list(drawn.values())


def write_rows(path, rows, folder):
    """Rows as JSONL at `path`; the images, which are in `folder`, are named relative to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        image = os.path.relpath(folder / row["image"], path.parent)
        lines.append(json.dumps({**row, "image": image}) + "\n")
    with files.whole(path) as temporary:
        temporary.write_text("".join(lines), "utf-8")


# ---------------------------------------------------------------- close-ups
def close_up(image, thing):
    """The quadrant of a picture in which an object lies, at full resolution."""
    x, y = PLACES[thing.place]
    return image.crop((x - 16, y - 16, x + 16, y + 16))


def as_close_up(scene, thing):
    """The scene that a close-up shows: the background and one object at the place "close-up"."""
    alone = Thing("close-up", thing.color, thing.shape, thing.mark, 0, 0, 0)
    return Scene(scene.background, [alone], scene.seed)


# ---------------------------------------------------------------- questions
def questions(scene, n, rng):
    """n yes/no questions, about half of them true: [(statement, answer, kind)].

    A false statement is a near miss: the object with another colour or shape or at another place,
    a mark that is not there or of the other kind, another background. Its answer says what is there
    instead. kind is the fact's kind, or `wrong color`, `wrong shape`, … for a near miss. Some ask
    for one attribute only (`top-left red`, kind `part`), from which a model learns to compare.
    """
    return half_true(scene, n, rng, facts, PART_RATE, false_question)


def half_true(scene, n, rng, facts, part_rate, false_question):
    """The `questions` of a world with these facts, share of questions about a part, and near
    misses."""
    return [true_question(scene, rng, facts, part_rate) if rng.random() < 0.5
            else false_question(scene, rng) for _ in range(n)]


def true_question(scene, rng, facts, part_rate):
    """A true statement about the scene: (statement, answer, kind)."""
    if rng.random() < part_rate:
        thing = rng.choice(scene.things)
        part = rng.choice((thing.color, thing.shape))
        return f"{thing.place} {part}", f"Yes, {thing.text}", "part"
    background, *others = facts(scene)
    fact = rng.choice(others * 4 + [background])
    return fact["text"], f"Yes, {fact['text']}", fact["kind"]


def false_question(scene, rng):
    """A near miss: (statement, answer that says what is there instead, kind)."""
    thing = rng.choice(scene.things)
    other_color = rng.choice([color for color in COLORS if color != thing.color])
    other_shape = rng.choice([shape for shape in SHAPES if shape != thing.shape])
    if rng.random() < PART_RATE:
        part = rng.choice((other_color, other_shape))
        return f"{thing.place} {part}", f"No, {thing.text}", "wrong part"
    weights = {"wrong shape": 8, "wrong color": 4, "wrong place": 3, "wrong mark": 4,
               "wrong background": 1}
    kind = rng.choices(list(weights), list(weights.values()))[0]
    taken = {t.place: t.text for t in scene.things}
    free = [place for place in (*PLACES, "center")
            if taken.get(place) != f"{place} {thing.color} {thing.shape}"]
    markable = [t for t in scene.things if t.place != "center"]
    if kind == "wrong place" and free and thing.place != "close-up":
        place = rng.choice(free)
        answer = f"No, {taken.get(place, place + ' empty')}"
        return f"{place} {thing.color} {thing.shape}", answer, kind
    if kind == "wrong mark" and markable:
        thing = rng.choice(markable)
        mark = rng.choice([mark for mark in MARKS if mark != thing.mark])
        return f"{thing.place} {mark}", f"No, {thing.place} {thing.mark or 'plain'}", kind
    if kind == "wrong background":
        other = rng.choice([name for name in BACKGROUNDS if name != scene.background])
        return f"background {other}", f"No, background {scene.background}", kind
    if kind == "wrong color":
        return f"{thing.place} {other_color} {thing.shape}", f"No, {thing.text}", kind
    # where a scene has no such near miss, too
    return f"{thing.place} {thing.color} {other_shape}", f"No, {thing.text}", "wrong shape"


# ---------------------------------------------------------------- vocabulary
def write_vocabulary(path, names=WORDS):
    """A qwen.tiktoken for a world: all bytes, then each word of its texts as one token.

    names: the words of its facts, questions and answers.
    """
    texts = [CAPTION_PROMPT, DENSE_PROMPT, ask("it"), " Answer: Yes No yes no",
             "Yes", "No", "yes", "no", f" {' '.join(names)}"]
    words = [word for text in texts for word in re.findall(r"[^A-Za-z]?[A-Za-z]+", text)]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [word.encode() for word in dict.fromkeys(words)]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    path.write_text("".join(lines))
