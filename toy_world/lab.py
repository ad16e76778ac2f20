"""Where the experiments run: the folder of one seed, and the tuning that gives each arm its own
learning rate and β."""
import functools

import adapters
from base import open_base
from toy_world import worlds
from toy_world.steps import CODE, Loop, make_split

TUNE = 100                              # the seed on which learning rates and β are chosen
LRS = ("6e-5", "1.2e-4", "2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2", "3.2e-2",
       "6.4e-2")
BETAS = {**dict.fromkeys(("dpo", "hinge", "kto"), (".004", ".02", ".1", ".5", "2.5")),
         "ipo": (".1", ".5", "2", "8", "32")}
SFT_FIRST = "SFT first, then DPO"       # the arm with SFT on the golden captions before dpo.py
# flags of dpo.py
ARMS = {"CE only": ("--loss", "none"), "DPO only": ("--ce", "0"), "DPO + CE/2": ("--ce", ".5"),
        "DPO + CE": (), "DPO + 2 CE": ("--ce", "2"), SFT_FIRST: ("--ce", "0")}
CAPTIONS, IMAGES, HELD_OUT = 2000, 3000, 300        # scenes per seed
SAMPLES = 6                             # captions per unlabelled scene
METRICS = ("precision", "recall", "f1", "detail_precision", "detail_recall", "planted", "eos",
           "repeat")


# ---------------------------------------------------------------- a seed's folder
class Lab(Loop):
    """One seed: its scenes, SFT model, QA adapter and golden pool, each made when first asked for.

    Whatever one experiment has trained, the next one finds.
    """

    def __init__(self, out, seed, base=CODE / "assets/toy", scenes=None):
        """base: its folder. scenes: the folder that the scenes of this seed are drawn to; labs that
        differ in the base can share one."""
        super().__init__(out / f"seed-{seed}", log=out / f"seed-{seed}.log")
        self.seed, self.flags, self.base = seed, ("--seed", seed), base
        self.scenes = scenes or self.out
        self.out.mkdir(parents=True, exist_ok=True)

    def split(self, name, n, *wants):
        return make_split(self.scenes, name, n, self.seed, wants, self.world.draw_scenes)

    @property
    def world(self):
        return worlds.WORLDS[worlds.name_of(self.base)]

    def train_split(self):
        return self.split("train", CAPTIONS, "captions", "questions")[0]

    def held_out(self):
        return self.split("held-out", HELD_OUT)

    def sft_model(self, name="sft", *more, makes="adapters.json"):
        self.sft(self.base, self.train_split(), self.out / name, *self.flags, *more, makes=makes)
        return self.out / name

    def tuned(self, name, tune, lr):
        """SFT of what `tune` names (--tune of sft.py) at a learning rate."""
        makes = "model.safetensors" if tune == "full" else "adapters.json"
        return self.sft_model(name, "--tune", tune, "--lr", lr, makes=makes)

    def qa_of(self, captioner, *more):
        qa = self.out / f"qa-of-{captioner.name}{''.join(more)}"
        self.qa(captioner, self.train_split(), qa, *self.flags, *more)
        return qa

    def golden_of(self, captioner, name, *more, images="images-1", n=IMAGES):
        """A golden folder of n scenes, and its scores."""
        folder, truth = self.split(images, n)
        self.golden(captioner, self.qa_of(captioner), folder, self.out / name,
                    "--samples", SAMPLES, *self.flags, *more)
        return self.out / name, self.judge_golden(name, self.out / name, truth)

    def pool(self):
        """The SFT model, its golden folder and the scores of that folder."""
        sft = self.sft_model()
        return sft, *self.golden_of(sft, "golden")

    def trained(self, name, captioner, golden, *more):
        """A captioner after dpo.py on a golden folder."""
        self.dpo(captioner, golden, self.out / name, *self.flags, "--watch", 0, *more)
        return self.out / name

    def trained_arm(self, arm, captioner, golden, lr, name=None):
        """A captioner after an arm of ARMS at a learning rate; `name` is its folder."""
        name = name or slug(arm)
        if arm == SFT_FIRST:
            start = self.out / f"{name}-sft"
            self.sft_on_golden(captioner, golden, start, *self.flags, "--lr", lr)
            captioner = start
        return self.trained(name, captioner, golden, *ARMS[arm], "--lr", lr)

    def judged(self, name):
        """Figures of a folder with adapters or whole weights on the held-out scenes.

        {"greedy f1": …, "sampled f1": …, …} for all METRICS.
        """
        images, truth = self.held_out()
        how = self.flags_of(self.out / name)
        scores = self.judge(name, images, truth, *how, seed=self.seed)
        return {f"{way} {metric}": value for way, figures in scores.items()
                for metric, value in selected(figures).items()}

    def flags_of(self, folder):
        """The flags of caption.py for a folder with adapters or whole weights."""
        if (folder / "model.safetensors").is_file():
            return "--base", folder, "--adapters", "none"
        return "--adapters", folder

    def load(self, *folders):
        """The base with the adapters of these folders."""
        model = open_base(self.base)
        for folder in folders:
            adapters.load(model, folder)
        return model


def selected(figures):
    """The METRICS of a score. Captions without statements, which have no F1, get an F1 of 0."""
    return {metric: figures[metric] for metric in METRICS} | {"f1": figures["f1"] or 0.0}


def both_f1(figures):
    return figures["greedy f1"] + figures["sampled f1"]


def slug(arm):
    """The folder name of an arm."""
    return "".join(c if c.isalnum() else "-" for c in arm.lower()).replace("--", "-")


# ---------------------------------------------------------------- tuning
def climb(values, f1):
    """The value with the highest f1(value) among ascending values, found by climbing.

    The middle three are tried first, then the neighbours of the best value until both are tried.
    """
    f1 = functools.cache(f1)
    best, tried = len(values) // 2, set()
    while True:
        around = {k for k in (best - 1, best, best + 1) if 0 <= k < len(values)}
        if around <= tried:
            return values[best]
        tried |= around
        best = max(sorted(tried), key=lambda k: f1(values[k]))


def arm_f1(out, arm, lr):
    """F1, greedy + sampled, of an arm on the tuning seed."""
    lab, name = Lab(out, TUNE), f"{slug(arm)}-lr{lr}"
    sft, golden, _ = lab.pool()
    lab.trained_arm(arm, sft, golden, lr, name)
    return both_f1(lab.judged(name))


def alone(loss, beta, lr):
    """The flags of dpo.py for a preference loss without cross entropy."""
    return "--loss", loss, "--beta", beta, "--ce", 0, "--lr", lr


def alone_f1(out, name, *flags):
    """F1, greedy + sampled, of a preference loss alone on the tuning seed."""
    lab = Lab(out, TUNE)
    sft, golden, _ = lab.pool()
    lab.trained(name, sft, golden, *flags)
    return both_f1(lab.judged(name))


def sft_f1(out, tune, lr):
    """F1, greedy + sampled, of SFT of what `tune` names on the tuning seed."""
    lab, name = Lab(out, TUNE), f"sft-{tune}-lr{lr}"
    lab.tuned(name, tune, lr)
    return both_f1(lab.judged(name))


def best_lr(out, arm):
    return climb(LRS, functools.partial(arm_f1, out, arm))


def best_sft_lr(out, tune):
    return climb(LRS, functools.partial(sft_f1, out, tune))


def best_alone(out, loss):
    """The best (β, learning rate) of a preference loss alone.

    β is chosen at the learning rate that suits DPO alone, then the learning rate at that β.
    """
    dpo_lr = best_lr(out, "DPO only")
    beta = climb(BETAS[loss], lambda beta: alone_f1(
        out, f"{loss}-beta{beta}", *alone(loss, beta, dpo_lr)))
    name = slug(f"{loss} at {beta}")
    lr = climb(LRS, lambda lr: alone_f1(out, f"{name}-lr{lr}", *alone(loss, beta, lr)))
    return beta, lr
