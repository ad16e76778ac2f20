"""The hard toy world: more of everything, and a long tail. It has the interface of world.py.

Each quadrant may hold an object, and with it a smaller companion: beside it, partly hidden behind
it, or in front of it and hiding a part of it. There are twelve shapes, ten colours, five marks and
six backgrounds, drawn by rank: common ones as Zipf's law has it, and each rarer one a fifth as
often as the one before. One object may be larger than all others. Captions also count: all objects,
and the shapes of which there are several. A scene has at most MOST_FACTS facts.

    background gray, top-left red circle, top-left stripes, top-left blue star behind,
    center green ring, circles two, largest top-left, objects five

A word is rare if fewer than RARE of its kind are so, and so is a fact with a rare word.
"""
import functools
import math
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from toy_world import world as easy
from toy_world.shapes import paint
from toy_world.world import CHECKS, PLACES, SIDE, STRIPES, WARM, make_fact

TAIL_STEP = 0.2                         # of the frequency, from a rare word to the next
RARE = 0.015                            # a word is rare below this share of its kind
TAIL = 0.3                              # `tail` of make_scene where rare facts are tested
MOST_FACTS = 12
MARK_RATE = easy.MARK_RATE              # share of the objects of a colour group with a mark
COMPANION_RATE, CENTER_RATE, LARGEST_RATE = 0.45, 0.5, 0.3
PART_RATE = 0.15                        # share of questions that ask for one attribute only

BACKGROUNDS = easy.BACKGROUNDS | {"slate": (85, 100, 125), "sand": (185, 165, 130)}
COLORS = {"red": (190, 65, 65), "blue": (65, 85, 190), "yellow": (190, 180, 65),
          "green": (65, 165, 75), "purple": (150, 65, 185), "cyan": (65, 180, 185),
          "orange": (190, 120, 60), "pink": (195, 125, 170), "lime": (135, 195, 60),
          "maroon": (110, 60, 75)}
WARMS = (*WARM, "orange", "pink", "maroon")
# shape -> what several are called
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses",
          "ring": "rings", "diamond": "diamonds", "bar": "bars", "frame": "frames",
          "moon": "moons", "hourglass": "hourglasses", "star": "stars", "heart": "hearts"}
LEFT = np.arange(easy.MARK_SIDE) < easy.MARK_SIDE / 2
LINES = np.broadcast_to(STRIPES[:, None], CHECKS.shape)
# hatches (MARK_SIDE, MARK_SIDE) of amplitude 1
MARKS = {"stripes": np.broadcast_to(STRIPES, CHECKS.shape), "checks": CHECKS, "lines": LINES,
         "weave": np.where(LEFT, STRIPES, LINES), "net": (STRIPES + LINES) / math.sqrt(2)}
RELATIONS = ("behind", "beside", "front")
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WORDS = (*BACKGROUNDS, *PLACES, *COLORS, *SHAPES, *SHAPES.values(), *MARKS, *RELATIONS, *NUMBERS,
         "objects", "largest", "center", "close-up", "background", "plain", "empty", "alone")
STARTS = ("background", "close-up", "top", "bottom", "center", *SHAPES.values(), "objects",
          "largest")


# ---------------------------------------------------------------- frequencies
def frequencies(names, n_common):
    """{name: its share}, from the most frequent to the rarest.

    The shares of the first n_common go as 1 / rank (Zipf), those of the others each as TAIL_STEP
    times the one before.
    """
    weights = []
    for rank in range(1, len(names) + 1):
        weights.append(1 / rank if rank <= n_common else weights[-1] * TAIL_STEP)
    return {name: weight / sum(weights) for name, weight in zip(names, weights)}


SHAPE_RATES = frequencies(SHAPES, 8)
COLOR_RATES = frequencies(COLORS, 7)
MARK_KIND_RATES = frequencies(MARKS, 3)
BACKGROUND_RATES = frequencies(BACKGROUNDS, 4)
RARE_WORDS = {name for rates in (SHAPE_RATES, COLOR_RATES, MARK_KIND_RATES, BACKGROUND_RATES)
              for name, rate in rates.items() if rate < RARE}
RARE_WORDS |= {SHAPES[name] for name in RARE_WORDS & SHAPES.keys()}


def is_rare(text):
    return not RARE_WORDS.isdisjoint(text.split())


def pick(rates, tail, rng, but=()):
    """A name drawn by its rate, none of `but`; with probability `tail` each is equally likely."""
    names = [name for name in rates if name not in but]
    weights = [(1 - tail) * rates[name] + tail / len(rates) for name in names]
    return rng.choices(names, weights)[0]


# ---------------------------------------------------------------- scenes and their facts
@dataclass
class Thing:
    """An object, and its companion if it has one, as easy.Thing.

    relation: of a companion, to its object: one of RELATIONS.
    """
    place: str
    color: str
    shape: str
    mark: str | None
    x: float
    y: float
    radius: float
    relation: str | None = None
    companion: "Thing | None" = None

    @property
    def group(self):
        return "warm" if self.color in WARMS else "cold"

    @property
    def text(self):
        text = f"{self.place} {self.color} {self.shape}"
        return f"{text} {self.relation}" if self.relation else text


@dataclass
class Scene:
    background: str
    things: list                        # the objects, without companions
    seed: int                           # of the noise
    tail: float
    largest: str | None = None          # the place of the object that is larger than all others

    @property
    def is_close_up(self):
        return self.things[0].place == "close-up"


def make_scene(seed, planted=True, tail=0.0):
    """The scene of a seed, which may be any value.

    planted: marks follow the colour; without it an object has a mark with probability 1/2.
    tail: the share of drawings in which rare words are as likely as common ones, so that a test on
    a few hundred scenes holds enough rare facts.
    """
    rng = random.Random(f"hard {seed}")
    places = rng.sample(list(PLACES), rng.choice((2, 3, 3, 4)))
    things = [make_thing(place, rng, planted, tail) for place in PLACES if place in places]
    scene = Scene(pick(BACKGROUND_RATES, tail, rng), things, rng.getrandbits(32), tail)
    if rng.random() < LARGEST_RATE:
        thing = rng.choice(things)
        thing.radius, thing.companion, scene.largest = rng.uniform(11, 12), None, thing.place
    if rng.random() < CENTER_RATE:
        x, y = (SIDE / 2 + rng.uniform(-1, 1) for _ in range(2))
        color, shape = pick(COLOR_RATES, tail, rng), pick(SHAPE_RATES, tail, rng)
        things.append(Thing("center", color, shape, None, x, y, rng.uniform(4.5, 5.5)))
    while len(facts(scene)) > MOST_FACTS:
        remove_one(things)
    return scene


def make_thing(place, rng, planted, tail):
    """An object in a quadrant, with or without a mark and a companion."""
    x, y = (c + rng.uniform(-2, 2) for c in PLACES[place])
    color, shape = pick(COLOR_RATES, tail, rng), pick(SHAPE_RATES, tail, rng)
    thing = Thing(place, color, shape, None, x, y, rng.uniform(7.5, 9.5))
    if rng.random() < (MARK_RATE[thing.group] if planted else 0.5):
        thing.mark = pick(MARK_KIND_RATES, tail, rng)
    if rng.random() < COMPANION_RATE:
        add_companion(thing, rng, tail)
    return thing


def add_companion(thing, rng, tail):
    """Give an object a companion, and move it aside so that both fit in the quadrant."""
    thing.radius = rng.uniform(6.5, 7.5)
    radius, relation = rng.uniform(4, 4.8), rng.choice(RELATIONS)
    distance = {"behind": thing.radius + 0.25 * radius, "front": 0.4 * thing.radius,
                "beside": thing.radius + radius + 1}[relation]
    # not towards the middle of the scene, where the object in the centre would cover it
    x, y = PLACES[thing.place]
    angle = math.atan2(y - SIDE / 2, x - SIDE / 2) + rng.uniform(-0.75, 0.75) * math.pi
    dx, dy = distance * math.cos(angle), distance * math.sin(angle)
    jitter = [rng.uniform(-1, 1) for _ in range(2)]
    thing.x, thing.y = x - 0.35 * dx + jitter[0], y - 0.35 * dy + jitter[1]
    color = pick(COLOR_RATES, tail, rng, but=(thing.color,))
    shape = pick(SHAPE_RATES, tail, rng)
    thing.companion = Thing(thing.place, color, shape, None, thing.x + dx, thing.y + dy, radius,
                            relation)


def remove_one(things):
    """Take away the last companion of the objects, or else the last mark."""
    with_companion = [thing for thing in things if thing.companion]
    if with_companion:
        with_companion[-1].companion = None
    else:
        [thing for thing in things if thing.mark][-1].mark = None


def objects(scene):
    """All objects, companions included, those that hide others after them."""
    row = []
    for thing in scene.things:
        behind = bool(thing.companion) and thing.companion.relation == "behind"
        pair = [thing, thing.companion] if thing.companion else [thing]
        row += pair[::-1] if behind else pair
    return row


def shape_counts(scene):
    return Counter(thing.shape for thing in objects(scene))


def facts(scene):
    """All facts of a scene, in the order of golden captions, as easy.facts.

    Marks, companions and the object in the centre are details. {"rare": whether a word is rare}.
    """
    rows = [make_fact(f"background {scene.background}", "background", "background")]
    for thing in scene.things:
        is_small = thing.place == "center"
        rows.append(make_fact(thing.text, thing.place, "center" if is_small else "object",
                              detail=is_small))
        if thing.mark:
            rows.append(make_fact(f"{thing.place} {thing.mark}", thing.place, "mark", detail=True))
        if thing.companion:
            rows.append(make_fact(thing.companion.text, thing.place, "companion", detail=True))
    if not scene.is_close_up:
        rows += sorted(whole_facts(scene), key=lambda fact: fact["text"])
    return [{**row, "rare": is_rare(row["text"])} for row in rows]


def whole_facts(scene):
    """The facts about the scene as a whole: counts, and the largest object."""
    counts = shape_counts(scene)
    yield make_fact(f"objects {NUMBERS[counts.total()]}", "objects", "count")
    for shape, n in counts.items():
        if n > 1:
            yield make_fact(f"{SHAPES[shape]} {NUMBERS[n]}", SHAPES[shape], "count")
    if scene.largest:
        yield make_fact(f"largest {scene.largest}", "largest", "largest")


def truth(scene, name):
    """The truth row of an image, as easy.truth; also true is what an object lacks, and how many of
    a shape there are where that is one or none."""
    markable = [thing for thing in scene.things if thing.place != "center"]
    taken, counts = {thing.place for thing in scene.things}, shape_counts(scene)
    also_true = [f"{place} empty" for place in (*PLACES, "center") if place not in taken]
    also_true += [f"{thing.place} plain" for thing in markable if not thing.mark]
    also_true += [f"{thing.place} alone" for thing in markable if not thing.companion]
    also_true += [f"{plural} {NUMBERS[counts[shape]]}" for shape, plural in SHAPES.items()
                  if counts[shape] < 2]
    planted = [{"text": f"{thing.place} {mark}", "about": thing.place, "group": thing.group}
               for thing in markable if not thing.mark for mark in MARKS]
    return {"image": name, "facts": facts(scene), "also_true": also_true, "planted": planted}


# ---------------------------------------------------------------- drawing
@functools.cache
def hatch(mark, left, top):
    return easy.draw_hatch(MARKS[mark], left, top)


def draw(scene):
    """The picture of a scene, an RGB image."""
    rng = np.random.default_rng(scene.seed)
    background = np.array(BACKGROUNDS[scene.background]) + rng.normal(0, 6, 3)
    pixels = background + np.zeros((SIDE, SIDE, 3))
    for thing in objects(scene):
        paint(pixels, thing, (np.array(COLORS[thing.color]) + rng.normal(0, 9, 3)).clip(60, 195))
    pixels += rng.normal(0, 4, pixels.shape)
    for thing in scene.things:
        if thing.mark:
            strength = rng.uniform(35, 50)
            mark = hatch(thing.mark, *easy.mark_corner(thing.x, thing.y))
            pixels += (strength * mark)[:, :, None]
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def draw_scenes(folder, seeds, tail=0.0):
    """Scenes as files and rows; see easy.draw_all. tail: see make_scene."""
    make = functools.partial(make_scene, tail=tail)
    return easy.draw_all(folder, seeds, make, draw, truth, questions)


# ---------------------------------------------------------------- close-ups
close_up = easy.close_up


def as_close_up(scene, thing):
    """The scene that a close-up shows: the background, one object and its companion."""
    def near(t):
        return Thing("close-up", t.color, t.shape, t.mark, 0, 0, 0, t.relation)

    alone = near(thing)
    alone.companion = near(thing.companion) if thing.companion else None
    return Scene(scene.background, [alone], scene.seed, scene.tail)


# ---------------------------------------------------------------- questions
def questions(scene, n, rng):
    """n yes/no questions, as easy.questions, of which about half are true.

    False words are drawn as often as true ones of their kind, so that a rare word in a question
    does not give the answer away.
    """
    return easy.half_true(scene, n, rng, facts, PART_RATE, false_question)


def false_question(scene, rng):
    """A near miss: (statement, answer that says what is there instead, kind)."""
    while True:
        miss, kind, _ = rng.choices(MISSES, [weight for _, _, weight in MISSES])[0]
        if question := miss(scene, rng):
            statement, instead = question
            return statement, f"No, {instead}", kind


def other(rates, word, scene, rng):
    return pick(rates, scene.tail, rng, but=(word,))


def wrong_part(scene, rng):
    thing = rng.choice(scene.things)
    rates, word = rng.choice(((COLOR_RATES, thing.color), (SHAPE_RATES, thing.shape)))
    return f"{thing.place} {other(rates, word, scene, rng)}", thing.text


def wrong_shape(scene, rng):
    thing = rng.choice(scene.things)
    shape = other(SHAPE_RATES, thing.shape, scene, rng)
    return f"{thing.place} {thing.color} {shape}", thing.text


def wrong_color(scene, rng):
    thing = rng.choice(scene.things)
    color = other(COLOR_RATES, thing.color, scene, rng)
    return f"{thing.place} {color} {thing.shape}", thing.text


def wrong_place(scene, rng):
    thing = rng.choice(scene.things)
    taken = {t.place: t.text for t in scene.things}
    claims = {place: f"{place} {thing.color} {thing.shape}" for place in (*PLACES, "center")}
    free = [place for place, claim in claims.items() if taken.get(place) != claim]
    if scene.is_close_up or not free:
        return None
    place = rng.choice(free)
    return claims[place], taken.get(place, f"{place} empty")


def wrong_mark(scene, rng):
    markable = [thing for thing in scene.things if thing.place != "center"]
    thing = rng.choice(markable)
    mark = other(MARK_KIND_RATES, thing.mark, scene, rng)
    return f"{thing.place} {mark}", f"{thing.place} {thing.mark or 'plain'}"


def wrong_companion(scene, rng):
    """One word of a companion changed, or a companion that is not there."""
    thing = rng.choice([thing for thing in scene.things if thing.place != "center"])
    small = thing.companion
    if not small:
        color = other(COLOR_RATES, thing.color, scene, rng)
        words = [thing.place, color, pick(SHAPE_RATES, scene.tail, rng), rng.choice(RELATIONS)]
        return " ".join(words), f"{thing.place} alone"
    words = [small.place, small.color, small.shape, small.relation]
    part = rng.choice((1, 2, 3))
    if part == 3:
        words[3] = rng.choice([relation for relation in RELATIONS if relation != small.relation])
    else:
        words[part] = other((COLOR_RATES, SHAPE_RATES)[part - 1], words[part], scene, rng)
    return " ".join(words), small.text


def wrong_count(scene, rng):
    """One more or less of all objects or of a shape; at least two, as in facts."""
    if scene.is_close_up:
        return None
    counts = shape_counts(scene)
    name, n = "objects", counts.total()
    if rng.random() < 0.5:
        shape = rng.choice((rng.choice(list(counts)), pick(SHAPE_RATES, scene.tail, rng)))
        name, n = SHAPES[shape], counts[shape]
    claimed = max(2, n + rng.choice((-1, 1)))
    claimed = 3 if claimed == n else claimed
    return f"{name} {NUMBERS[claimed]}", f"{name} {NUMBERS[n]}"


def wrong_largest(scene, rng):
    if not scene.largest:
        return None
    place = rng.choice([t.place for t in scene.things if t.place != scene.largest])
    return f"largest {place}", f"largest {scene.largest}"


def wrong_background(scene, rng):
    name = other(BACKGROUND_RATES, scene.background, scene, rng)
    return f"background {name}", f"background {scene.background}"


# what makes a near miss, its kind, and its weight
MISSES = ((wrong_shape, "wrong shape", 6), (wrong_color, "wrong color", 3),
          (wrong_place, "wrong place", 2), (wrong_mark, "wrong mark", 3),
          (wrong_companion, "wrong companion", 4), (wrong_count, "wrong count", 5),
          (wrong_largest, "wrong largest", 1), (wrong_background, "wrong background", 1),
          (wrong_part, "wrong part", 4))
