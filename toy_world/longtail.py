"""What tuning does to common and to rare facts: an experiment on a base of the hard world.

SFT learns from captions in which words are as frequent as in pre-training. The tests are on scenes
in which rare words are more frequent, see `tail` of hard.make_scene. Rare facts are those with a
rare word, rare questions those in which, or in whose answer, there is one.
"""
import functools

from base import open_base
from toy_world import base
from toy_world.lab import HELD_OUT, LRS, TUNE, Lab, both_f1, climb
from toy_world.steps import make_split

TUNES = ("adapters", "lora", "prompt", "full")      # --tune of sft.py
FREQUENCIES = ("common", "rare")
SCENES = 400                            # with dense captions and questions to a model


def own_tasks(lab, model):
    """How a model does the tasks of its base on six views: precision and recall of dense captions,
    and the share of right answers, for common and rare facts."""
    world = lab.world
    scenes = [world.make_scene(f"longtail {lab.seed} {i}", tail=world.TAIL) for i in range(SCENES)]
    report = base.seen(model, scenes, base.looks_at(model, scenes, world=world), lab.seed, world)
    shares = {"dense precision": report["precision"], "dense recall": report["recall"],
              "questions": report["yes/no"]}
    return {f"{name}, {frequency}": of.get(frequency, (None, 0))[0]     # None: no such statement
            for name, of in shares.items() for frequency in FREQUENCIES}


def own_captions(lab, folder):
    """Greedy short captions of a tuned model: precision and recall of common and rare facts."""
    world = lab.world
    drawn = functools.partial(world.draw_scenes, tail=world.TAIL)
    images, truth = make_split(lab.scenes, "held-out-tail", HELD_OUT, lab.seed, (), drawn)
    scores = lab.judge(f"{folder.name}-tail", images, truth, *lab.flags_of(folder), seed=lab.seed)
    return {f"caption {metric}, {frequency}": scores["greedy"][f"{frequency}_{metric}"]
            for metric in ("precision", "recall") for frequency in FREQUENCIES}


def best_lr(lab, tune):
    """The learning rate of a way of tuning: of those climbed, the one with the best F1 of captions
    of the world as it is, on the tuning seed."""
    tuning = Lab(lab.out.parent, TUNE, lab.base)
    return climb(LRS, lambda lr: both_f1(tuning.judged(
        tuning.tuned(f"sft-{tune}-lr{lr}", tune, lr).name)))


def longtail(lab):
    """The base, and what each way of tuning makes of it."""
    figures = {"base": own_tasks(lab, lab.load())}
    for tune in TUNES:
        lr = best_lr(lab, tune)
        folder = lab.tuned(f"sft-{tune}", tune, lr)
        model = open_base(folder) if tune == "full" else lab.load(folder)
        figures[tune] = {**own_tasks(lab, model), **own_captions(lab, folder), "lr": float(lr)}
    return figures


def lost(figures, tune, frequency):
    """The share of the base's recall of common or rare facts, in dense captions, that SFT lost; 0
    where it had none."""
    before, after = (figures[arm][f"dense recall, {frequency}"] for arm in ("base", tune))
    return 1 - after / before if before else 0.0


def is_forgotten(figures):
    """The rule: in dense captions LoRA and full tuning lose a larger share of the recall of rare
    facts than of common ones, by more than .05, and adapters lose less of the rare ones than
    either, by more than .05. (Written down before the runs.)"""
    of_adapters = lost(figures, "adapters", "rare")
    for tune in ("lora", "full"):
        of_rare, of_common = (lost(figures, tune, frequency) for frequency in ("rare", "common"))
        if of_rare <= max(of_common, of_adapters) + .05:
            return False
    return True
