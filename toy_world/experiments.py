"""The experiments behind the claims: each trains and judges with the real scripts, in the folder of one seed.

An experiment is a function, lab -> {arm: {metric: number}}. What was trained for one is found again by the next.
"""
import functools
import json
import shutil
import statistics
from pathlib import Path

import torch

import adapters
import evaluate
from chunking import views
from generate import sample
from model import QwenVL
from plumbing.images import open_image
from plumbing.train import write_whole
from toy_world import base, world
from toy_world.steps import CODE, Loop, make_split, toy_rows

TUNE = 100                              # the seed on which learning rates and β are chosen
LRS = ("6e-5", "1.2e-4", "2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2", "3.2e-2", "6.4e-2")
BETAS = {**dict.fromkeys(("dpo", "hinge", "kto"), (".004", ".02", ".1", ".5", "2.5")),
         "ipo": (".1", ".5", "2", "8", "32")}
ARMS = {"CE only": ("--loss", "none"), "DPO only": ("--ce", "0"), "DPO + CE/2": ("--ce", ".5"), "DPO + CE": (),
        "DPO + 2 CE": ("--ce", "2"), "SFT first, then DPO": ("--ce", "0", "--sft-first")}
CAPTIONS, IMAGES, HELD_OUT = 2000, 3000, 300        # scenes per seed
SAMPLES = 6
KEPT = ("precision", "recall", "f1", "detail_precision", "detail_recall", "planted", "eos", "repeat")


# ---------------------------------------------------------------- a seed's folder
class Lab(Loop):
    """One seed: its scenes, its SFT model, QA adapter and golden pool, made when first asked for."""

    def __init__(self, out, seed):
        super().__init__(out / f"seed-{seed}", log=out / f"seed-{seed}.log")
        self.seed, self.flags, self.base, self.boxes = seed, ("--seed", seed), CODE / "assets/toy", None
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self, makes, script, *arguments, **how):
        """As a Loop runs it; where other views are asked for, from a copy of the script that edits chunking.BOXES."""
        if self.boxes:
            launcher = self.out.resolve() / f"views-{slug(self.boxes)}" / script
            launcher.parent.mkdir(exist_ok=True)
            launcher.write_text(f"import sys\nsys.path.insert(0, {str(CODE)!r})\nimport chunking\n"
                                f"chunking.BOXES = eval({self.boxes!r}, vars(chunking))\n"
                                f"import {Path(script).stem} as script\nsys.exit(script.main())\n")
            script = launcher
        super().run(makes, script, *arguments, **how)

    def split(self, name, n, *wants):
        return make_split(self.out, name, n, self.seed, wants)

    def train(self):
        return self.split("train", CAPTIONS, "captions", "questions")[0]

    def sft_model(self, name="sft", *more, makes="adapters.json"):
        self.sft(self.base, self.train(), self.out / name, *self.flags, *more, makes=makes)
        return self.out / name

    def tuned(self, name, tune, lr):
        """SFT in another way than with adapters, or at another learning rate."""
        return self.sft_model(name, "--tune", tune, "--lr", lr,
                              makes="model.safetensors" if tune == "full" else "adapters.json")

    def qa_of(self, captioner, *more):
        qa = self.out / f"qa-of-{captioner.name}{''.join(more)}"
        self.qa(captioner, self.train(), qa, *self.flags, *more)
        return qa

    def golden_of(self, captioner, name, *more, images="images-1", n=IMAGES):
        """A golden folder, and its scores."""
        folder, truth = self.split(images, n)
        self.golden(captioner, self.qa_of(captioner), folder, self.out / name, "--samples", SAMPLES, *self.flags, *more)
        return self.out / name, self.judge_golden(name, self.out / name, truth)

    def pool(self):
        """The SFT model, its golden folder, and that one's scores."""
        sft = self.sft_model()
        return sft, *self.golden_of(sft, "golden")

    def trained(self, name, captioner, golden, *more):
        self.dpo(captioner, golden, self.out / name, *self.flags, "--watch", 0, *more)
        return self.out / name

    def judged(self, name):
        """{"greedy f1": …, "sampled f1": …, …} of a captioner's folder, adapters or whole weights, on the held-out
        scenes."""
        images, truth = self.split("held-out", HELD_OUT)
        folder = self.out / name
        whole = (folder / "model.safetensors").is_file()
        found = self.judge(name, images, truth, *(("--base", folder, "--adapters", "none") if whole else
                                                  ("--adapters", folder)), seed=self.seed)
        return {f"{way} {key}": value for way, figures in found.items() for key, value in short(figures).items()}


def short(figures):
    """The figures that are kept of a score; captions that say nothing, which have no F1, get 0."""
    return {key: figures[key] for key in KEPT} | {"f1": figures["f1"] or 0.0}


def both_f1(figures):
    return figures["greedy f1"] + figures["sampled f1"]


# ---------------------------------------------------------------- the claims, each (lab) -> {arm: {metric: number}}
def planted(lab):
    """What the base says of the mark at one low resolution, where nobody can see it, and with six views."""
    measured = base.measure(load(lab), 300, lab.seed)
    found = {name: {group: share for group, (share, _) in figures["mark invented on"].items()}
             for name, figures in measured.items() if "mark invented on" in figures}
    return {**found, "true rate": dict(world.MARK_RATE)}


LAYOUTS = {"1 view": "BOXES[:1]", "5 views": "BOXES[:5]", "6 views": "BOXES",
           "6 views, 3/4 centre": "(*BOXES[:5], (.125, .125, .875, .875))"}


def layouts(lab):
    """SFT with other views."""
    found = {}
    for k, (name, boxes) in enumerate(LAYOUTS.items()):
        lab.boxes = boxes if name != "6 views" else None
        folder = "sft" if name == "6 views" else f"sft-views-{k}"
        lab.sft_model(folder)
        found[name] = lab.judged(folder)
    lab.boxes = None
    return found


def generations(lab):
    """The union of N samples, and what the gate leaves of it; the gate's curve on the largest union."""
    found, sft = {}, lab.sft_model()
    for n in (1, 2, 4, 8, 16):
        folder, scores = lab.golden_of(sft, f"golden-n{n}", "--samples", n, "--min-statements", 1, images="few", n=400)
        found[f"N = {n}, union"], found[f"N = {n}, gated"] = short(scores["combined"]), short(scores["golden"])
    truth = {row["image"]: all_true(row) for row in toy_rows(lab.out / "truth/few.jsonl")}
    told = [(statement["p_yes"], statement["text"] in truth[row["image"]])
            for row in toy_rows(folder / "record.jsonl") for statement in row.get("statements", [])]
    for threshold in (.01, .1, .3, .5, .7, .9, .99):
        kept = [true for p, true in told if p >= threshold]
        found[f"gate at {threshold}"] = {"precision": sum(kept) / max(len(kept), 1),
                                         "recall": sum(kept) / sum(true for _, true in told)}
    return found


def direct(lab):
    """Of each kind: how often the QA model answers a direct question rightly (half are near misses), and how often a
    statement is true that the captioner makes of itself, at temperature 1."""
    sft, _, scores = lab.pool()
    model = load(lab, sft, lab.qa_of(sft))
    scenes = [world.make_scene(f"direct {lab.seed} {i}") for i in range(HELD_OUT)]
    side = model.config.visual.image_size
    asked = base.question_report(model, scenes, [views(world.draw(scene), side) for scene in scenes], lab.seed)
    told = {kind: (figures["precision"], figures["n"]) for kind, figures in scores["sample"]["categories"].items()}

    def share(of):          # [(share, of how many)] taken together
        return sum(right * n for right, n in of) / sum(n for _, n in of)
    kinds = {"object": (("object", "center", "wrong color", "wrong shape", "wrong place"), ("object", "center")),
             "mark": (("mark", "wrong mark"), ("mark",)),
             "background": (("background", "wrong background"), ("background",))}
    kinds["all"] = tuple(sum(parts, ()) for parts in zip(*kinds.values()))
    return {kind: {"question": share([asked[part] for part in questions]),
                   "statement": share([told[part] for part in statements])}
            for kind, (questions, statements) in kinds.items()}


GATES = {"gate, calibrated": (), "gate at .5": ("--threshold", ".5"),
         "no gate": ("--threshold", "0", "--no-resolve"), "resolving alone": ("--threshold", "0"),
         "gate alone, contradictions kept": ("--no-resolve",),
         "vote of 2": ("--threshold", "0", "--no-resolve", "--min-votes", "2"),
         "vote of 3": ("--threshold", "0", "--no-resolve", "--min-votes", "3"),
         "gate and vote of 2": ("--min-votes", "2")}


def gates(lab):
    """Golden captions of one pool of samples by several rules."""
    sft, found = lab.sft_model(), {}
    for k, (name, flags) in enumerate(GATES.items()):
        _, scores = lab.golden_of(sft, f"golden-rule-{k}", *flags, "--min-statements", 1, images="few", n=400)
        found[name] = short(scores["golden"])
        found["single samples"] = short(scores["sample"])
    return found


def climb(values, f1):
    """The one of the ascending values with the best f1(value): the middle three are tried first, then what is next to
    the best, until both its neighbours are tried."""
    f1 = functools.cache(f1)
    best, tried = len(values) // 2, set()
    while not tried >= (around := {k for k in (best - 1, best, best + 1) if 0 <= k < len(values)}):
        tried |= around
        best = max(sorted(tried), key=lambda k: f1(values[k]))
    return values[best]


def tuning_f1(out, name, *flags):
    """F1, greedy + sampled, of preference training on the tuning seed's pool."""
    lab = Lab(out, TUNE)
    sft, golden, _ = lab.pool()
    lab.trained(name, sft, golden, *flags)
    return both_f1(lab.judged(name))


def best_lr(out, arm, *flags):
    """The learning rate with the best F1 on the tuning seed, of an arm, by default with its flags of ARMS."""
    flags = flags or ARMS[arm]
    return climb(LRS, lambda lr: tuning_f1(out, f"{slug(arm)}-lr{lr}", *flags, "--lr", lr))


def best_beta(out, loss):
    """The flags of a preference loss alone with the best F1 on the tuning seed: β at the learning rate that suits DPO
    alone, then the learning rate at that β."""
    def flags(beta):
        return "--loss", loss, "--beta", beta, "--ce", 0
    lr = best_lr(out, "DPO only")
    beta = climb(BETAS[loss], lambda beta: tuning_f1(out, f"{loss}-beta{beta}", *flags(beta), "--lr", lr))
    return *flags(beta), "--lr", best_lr(out, f"{loss} at {beta}", *flags(beta))


def training(lab):
    """One golden pool, learned from in several ways, each at its own learning rate."""
    sft, golden, scores = lab.pool()
    found = {"SFT": lab.judged("sft"), "golden": {f"sampled {key}": scores["golden"][key] for key in KEPT}}
    for arm, flags in ARMS.items():
        lr = best_lr(lab.out.parent, arm)
        lab.trained(slug(arm), sft, golden, *flags, "--lr", lr)
        found[arm] = {**lab.judged(slug(arm)), "lr": float(lr)}
    return found


def lottery(lab):
    """Each preference loss alone at its best β, and what steadies it."""
    sft, golden, _ = lab.pool()
    found = {"SFT": lab.judged("sft")}
    for loss in BETAS:
        flags = best_beta(lab.out.parent, loss)
        lab.trained(f"{loss}-alone", sft, golden, *flags)
        found[f"{loss} alone"] = {**lab.judged(f"{loss}-alone"), "beta": float(flags[3]), "lr": float(flags[-1])}
    for arm in ("DPO + CE", "SFT first, then DPO"):
        lab.trained(slug(arm), sft, golden, *ARMS[arm], "--lr", best_lr(lab.out.parent, arm))
        found[arm] = lab.judged(slug(arm))
    return found


def three_rounds(lab, base_name="", *flags):
    """Three rounds, each with fresh images -> {"SFT", "round 1" …}."""
    captioner, found = lab.sft_model(f"sft{base_name}"), {}
    found["SFT"] = lab.judged(captioner.name)
    for k in (1, 2, 3):
        name = f"{k}{base_name}{''.join(flags)}"
        golden, trained = ("golden", slug("DPO + CE")) if name == "1" else (f"golden-round-{name}", f"round-{name}")
        golden, scores = lab.golden_of(captioner, golden, *flags, images=f"images-{k}")
        rows = toy_rows(golden / "record.jsonl")
        too_long = sum(row.get("left_out") == "golden longer than the context" for row in rows)
        found[f"golden {k}"] = {**{f"sampled {key}": scores["golden"][key] for key in KEPT},
                                "too long": too_long / len(rows)}
        captioner = lab.trained(trained, captioner, golden, "--lr", best_lr(lab.out.parent, "DPO + CE"))
        found[f"round {k}"] = lab.judged(captioner.name)
    return found


def rounds(lab):
    """Three rounds, with contradictions resolved and not."""
    return {**{f"{name}, resolved": found for name, found in three_rounds(lab).items()},
            **{f"{name}, not": found for name, found in three_rounds(lab, "", "--no-resolve").items()}}


def context(lab):
    """Three rounds in a context into which a fifth of the golden captions do not fit, and in one with room."""
    base = lab.out / "short-base"
    if not (base / "config.json").is_file():
        shutil.copytree(lab.base, base, ignore=shutil.ignore_patterns("examples"), dirs_exist_ok=True)
        config = json.loads((base / "config.json").read_text("utf-8"))
        write_whole(base / "config.json", lambda path: path.write_text(json.dumps({**config, "seq_length": SHORT})))
    long, lab.base = lab.base, base
    found = {f"{name}, short": figures for name, figures in three_rounds(lab, "-short").items()}
    lab.base = long
    return {**found, **{f"{name}, long": figures for name, figures in three_rounds(lab).items()}}


SHORT = 72              # tokens: 36 of the views, 6 of the prompt, and 30 for a caption; golden ones have 26 on average
HEATS = (0, .5, .75, 1, 1.25, 1.5)


def temperature(lab):
    """False statements of single samples, planted and other, and their P(yes), against the temperature."""
    sft, found = lab.sft_model(), {}
    for heat in HEATS:
        flags = ("--temperature", heat, "--samples", 1 if heat == 0 else 4, "--min-statements", 1)
        folder, scores = lab.golden_of(sft, f"golden-heat-{heat}", *flags, images="few", n=400)
        truth = {row["image"]: row for row in toy_rows(lab.out / "truth/few.jsonl")}
        false, lures = [], []
        for row in toy_rows(folder / "record.jsonl"):
            known = truth[row["image"]]
            true, planted = all_true(known), {lure["text"] for lure in known["planted"]}
            for statement in row["statements"]:
                if statement["text"] not in true:
                    (lures if statement["text"] in planted else false).append(statement["p_yes"])
        found[f"temperature {heat}"] = {
            "false share": 1 - scores["sample"]["precision"], "planted": scores["sample"]["planted"],
            "P(yes) of false": statistics.fmean(false) if false else None,
            "P(yes) of planted": statistics.fmean(lures) if lures else None}
    return found


def in_order(caption):
    """A caption's statements, once each, in the order in which golden captions have them."""
    places = ["background", *world.PLACES, "center"]

    def place(text):
        about = text.split()[0]
        return places.index(about) if about in places else len(places), -len(text.split())
    return ", ".join(sorted(dict.fromkeys(world.statements(caption)), key=place))


def order(lab):
    """Does order explain the gain? SFT on ordered captions; CE on the model's own single samples, put in order."""
    (sft, golden, _), train = lab.pool(), lab.train()
    ordered = [{**row, "caption": in_order(row["caption"])} for row in toy_rows(train / "captions.jsonl")]
    world.write_rows(train / "ordered.jsonl", ordered, train)
    lab.sft_model("sft-ordered", "--data", train / "ordered.jsonl")
    samples = [(row["image"], row["samples"][0]) for row in toy_rows(golden / "record.jsonl")]      # of each image one
    own = [{"image": image, "chosen": in_order(sample["caption"]), "rejected": [sample]} for image, sample in samples
           if world.statements(sample["caption"])]
    world.write_rows(lab.out / "own/golden.jsonl", own, lab.out / "data/images-1")
    lr = (*ARMS["CE only"], "--lr", best_lr(lab.out.parent, "CE only"))         # nothing is learned from "rejected"
    lab.trained("ce-own-ordered", sft, lab.out / "own", *lr)
    lab.trained(slug("CE only"), sft, golden, *lr)
    return {"SFT": lab.judged("sft"), "SFT, ordered captions": lab.judged("sft-ordered"),
            "CE on own samples, ordered": lab.judged("ce-own-ordered"), "CE on golden": lab.judged(slug("CE only"))}


def best_sft_lr(out, tune):
    """The learning rate of SFT in a way with the best F1, greedy + sampled, on the tuning seed."""
    lab = Lab(out, TUNE)

    def f1(lr):
        lab.tuned(f"sft-{tune}-lr{lr}", tune, lr)
        return both_f1(lab.judged(f"sft-{tune}-lr{lr}"))
    return climb(LRS, f1)


def forgetting(lab):
    """What is left of the base's own tasks after SFT in each way, each at its own learning rate: dense captions and
    questions of six views, and, out of the training's distribution, the marks of close-ups. "off" switches the adapters
    off again."""
    found = {"base": base.own_tasks(load(lab), lab.seed)}
    for tune in ("adapters", "lora", "prompt", "full"):
        lr = best_sft_lr(lab.out.parent, tune)
        folder = lab.tuned(f"sft-{tune}", tune, lr)
        model = QwenVL.from_pretrained(folder) if tune == "full" else load(lab, folder)
        found[tune] = {**base.own_tasks(model, lab.seed), "lr": float(lr),
                       "caption f1": lab.judged(folder.name)["greedy f1"]}
        if tune == "adapters":
            with adapters.active(model, []):
                found["adapters, off"] = base.own_tasks(model, lab.seed)
    return found


def soft_prompt(lab):
    """SFT with adapters alone, and with adapters and a soft prompt."""
    lab.sft_model()
    lab.sft_model("sft-no-prompt", "--no-soft-prompt")
    return {"adapters and soft prompt": lab.judged("sft"), "adapters alone": lab.judged("sft-no-prompt")}


def narrowing(lab):
    """Captioning with the QA adapters of the ViT left on, and how far the embeddings of different images are apart."""
    sft = lab.sft_model()
    images, truth_file = lab.split("held-out", HELD_OUT)
    truth = toy_rows(truth_file)
    found = {}
    for name, flags in (("LLM only", ()), ("LLM and ViT", ("--vision",))):
        model = load(lab, sft, lab.qa_of(sft, *flags))
        with adapters.active(model, ["caption"]):
            for slot, _ in adapters.slots(model, ("vision",)):
                slot.stack = tuple(kind for kind in ("qa", "caption") if kind in slot)
            rows, vectors = [], []
            for row in truth:
                pixels = views(open_image(images / row["image"]), model.config.visual.image_size)
                with torch.no_grad():
                    vectors.append(model.transformer.visual(pixels).flatten())
                caption = sample(model, pixels[None], [row["image"]], temperature=0.0)[0][0]
                rows.append({**caption, "image": row["image"]})
        vectors = torch.nn.functional.normalize(torch.stack(vectors), dim=-1)
        apart = 1 - (vectors @ vectors.T)[~torch.eye(len(vectors), dtype=torch.bool)].mean().item()
        figures = evaluate.score(rows, truth)
        found[name] = {"greedy f1": figures["f1"], "greedy precision": figures["precision"], "cosine distance": apart}
    return found


# ---------------------------------------------------------------- small helpers
def all_true(row):
    """The true statements about the image of a truth row: its facts, and what need not be told."""
    return {fact["text"] for fact in row["facts"]}.union(row["also_true"])


def load(lab, *folders):
    model = QwenVL.from_pretrained(lab.base)
    for folder in folders:
        adapters.load(model, folder)
    return model


def slug(arm):
    return "".join(c if c.isalnum() else "-" for c in arm.lower()).replace("--", "-")
