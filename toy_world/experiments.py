"""The experiments behind the claims. Each trains and judges with the real scripts, in the folder of
one seed: a function of a Lab, with {arm: {metric: number}} as its result."""
import json
import shutil
import statistics

import torch

import adapters
from base import open_base
from chunking import seen_by
from generate import sample
from plumbing import files
from plumbing.scoring import score
from toy_world import base, world
from toy_world.lab import (
    ARMS,
    BETAS,
    METRICS,
    SFT_FIRST,
    alone,
    best_alone,
    best_lr,
    best_sft_lr,
    selected,
    slug,
)
from toy_world.steps import toy_rows

FEW = {"images": "few", "n": 400}       # the scenes of experiments that train on no golden captions
ASKED = 300                             # scenes with direct questions, and those for `planted`
SHORT = 72              # tokens: 36 of the views, 6 of the prompt, 30 for a caption, which has 26
                        # on average if it is golden
WEAK = ("--steps", "1500")              # of toy.py pretrain; the shipped base has 6000
FIXED = (.5, .8, .9)                    # thresholds on P(yes) to compare with the calibrated one
THRESHOLDS = (.01, .1, .3, .5, .7, .9, .99)
TEMPERATURES = (0, .5, .75, 1, 1.25, 1.5)
LAYOUTS = {"1 view": "one", "5 views": "five", "6 views": "six",
           "6 views, 3/4 centre": "six-wide"}                       # --views of sft.py
GATES = {"gate, calibrated": (), "gate at .5": ("--threshold", ".5"),
         "no gate": ("--threshold", "0", "--no-resolve"),
         "resolving alone": ("--threshold", "0"),
         "gate alone, contradictions kept": ("--no-resolve",),
         "vote of 2": ("--threshold", "0", "--no-resolve", "--min-votes", "2"),
         "vote of 3": ("--threshold", "0", "--no-resolve", "--min-votes", "3"),
         "gate and vote of 2": ("--min-votes", "2")}                # flags of golden.py


# ---------------------------------------------------------------- what the base sees
def planted(lab):
    """How often the base states a mark on unmarked objects, at one low-resolution view, where
    nobody can see marks, and with six views."""
    report = base.measure(lab.load(), ASKED, lab.seed)
    figures = {name: {group: share for group, (share, _) in of["mark invented on"].items()}
               for name, of in report.items() if "mark invented on" in of}
    return {**figures, "true rate": dict(world.MARK_RATE)}


def layouts(lab):
    """SFT with other views."""
    figures = {}
    for arm, layout in LAYOUTS.items():
        if layout == "six":
            folder = lab.sft_model()
        else:
            folder = lab.sft_model(f"sft-views-{layout}", "--views", layout)
        figures[arm] = lab.judged(folder.name)
    return figures


# ---------------------------------------------------------------- golden samples
def generations(lab):
    """The union of N samples, what the gate keeps of it, and the gate's curve on the largest
    union."""
    figures, sft = {}, lab.sft_model()
    for n in (1, 2, 4, 8, 16):
        flags = ("--samples", n, "--min-statements", 1)
        folder, scores = lab.golden_of(sft, f"golden-n{n}", *flags, **FEW)
        figures[f"N = {n}, union"] = selected(scores["combined"])
        figures[f"N = {n}, gated"] = selected(scores["golden"])
    true = {image: true_texts(row) for image, row in few_truth(lab).items()}
    judgements = [(statement["p_yes"], statement["text"] in true[row["image"]])
                  for row in toy_rows(folder / "record.jsonl")
                  for statement in row.get("statements", [])]
    return figures | {f"gate at {t}": gated_at(t, judgements) for t in THRESHOLDS}


def gated_at(threshold, judgements):
    """Precision and recall of the statements with P(yes) >= threshold; judgements: [(P(yes),
    whether it is true)]."""
    kept = [is_true for p_yes, is_true in judgements if p_yes >= threshold]
    n_true = sum(is_true for _, is_true in judgements)
    return {"precision": sum(kept) / max(len(kept), 1), "recall": sum(kept) / n_true}


# for each kind of statement: kinds of questions, and kinds of a caption's statements
DIRECT = {"object": (("object", "center", "wrong color", "wrong shape", "wrong place"),
                     ("object", "center")),
          "mark": (("mark", "wrong mark"), ("mark",)),
          "background": (("background", "wrong background"), ("background",))}
DIRECT["all"] = tuple(sum(kinds, ()) for kinds in zip(*DIRECT.values()))


def direct(lab):
    """For each kind of statement: the share of direct questions with a right answer (half of them
    are near misses), and the share of true statements in captions at temperature 1."""
    sft, _, scores = lab.pool()
    model = lab.load(sft, lab.qa_of(sft))
    scenes = [world.make_scene(f"direct {lab.seed} {i}") for i in range(ASKED)]
    answers = base.question_report(model, scenes, base.looks_at(model, scenes), lab.seed)
    stated = {kind: (figures["precision"], figures["n"])
              for kind, figures in scores["sample"]["categories"].items()}
    return {kind: {"question": pooled_share([answers[part] for part in of_questions]),
                   "statement": pooled_share([stated[part] for part in of_statements])}
            for kind, (of_questions, of_statements) in DIRECT.items()}


def pooled_share(parts):
    """[(share, number of cases)] -> the share of all cases together."""
    return sum(share * n for share, n in parts) / sum(n for _, n in parts)


def gates(lab):
    """Golden captions of one pool of samples by several rules."""
    sft, figures = lab.sft_model(), {}
    for k, (arm, flags) in enumerate(GATES.items()):
        _, scores = lab.golden_of(sft, f"golden-rule-{k}", *flags, "--min-statements", 1, **FEW)
        figures[arm] = selected(scores["golden"])
        figures["single samples"] = selected(scores["sample"])
    return figures


def prior(lab):
    """Golden captions of one pool by the calibrated threshold, by that threshold corrected for the
    pool's share of true statements, and by fixed ones; on the base, and on one that errs."""
    figures = thresholds(lab, "")
    base, lab.base = lab.base, weak_base(lab)
    weak = thresholds(lab, "-weak")
    lab.base = base
    return figures | {f"{arm}, weak base": of for arm, of in weak.items()}


def weak_base(lab):
    """The toy base after a quarter of its training, the same for all seeds."""
    folder = lab.out.parent / "weak-base"
    lab.run(folder / "model.safetensors", "toy.py", "pretrain", *WEAK, "--out", folder,
            stage=False)
    return folder


def thresholds(lab, suffix):
    """{arm: figures of the golden captions, and the threshold}; "pool" describes the statements."""
    sft = lab.sft_model(f"sft{suffix}")
    calibrated = adapters.read_card(lab.qa_of(sft))["threshold"]
    folder, scores = lab.golden_of(sft, f"golden-prior{suffix}", "--min-statements", 1, **FEW)
    p_yes = [statement["p_yes"] for row in toy_rows(folder / "record.jsonl")
             for statement in row.get("statements", [])]
    share = share_of_true(p_yes)
    figures = {"pool": {"share of true": scores["gate"]["base_rate"], "estimated share": share},
               "calibrated": selected(scores["golden"]) | {"threshold": calibrated}}
    arms = {"corrected": corrected(calibrated, share), **{str(t): t for t in FIXED}}
    for arm, threshold in arms.items():
        name = f"golden-prior{suffix}-{arm}"
        _, scores = lab.golden_of(sft, name, "--min-statements", 1, "--threshold",
                                  f"{threshold:.4f}", **FEW)
        figures[arm] = selected(scores["golden"]) | {"threshold": threshold}
    return figures


def share_of_true(p_yes, steps=200):
    """The share of true statements, estimated from P(yes) of a model calibrated on halves.

    If true statements get the same P(yes) as questions whose answer is yes do, and false ones as
    those whose answer is no, a pool with a share s of true statements has the posterior odds

        odds(true) = odds(p) · s / (1 - s),   odds(p) = p / (1 - p)

    and s is the mean of these posteriors: the fixed point that EM finds (Saerens et al. 2002,
    https://doi.org/10.1162/089976602753284446).
    """
    odds = [p / (1 - p) for p in (min(max(p, 1e-6), 1 - 1e-6) for p in p_yes)]
    share = 0.5
    for _ in range(steps):
        prior_odds = share / (1 - share)
        share = statistics.fmean(o * prior_odds / (1 + o * prior_odds) for o in odds)
        share = min(max(share, 1e-6), 1 - 1e-6)
    return share


def corrected(threshold, share):
    """The threshold on P(yes) at which the posterior of share_of_true reaches `threshold`."""
    odds = threshold / (1 - threshold) * (1 - share) / share
    return odds / (1 + odds)


def temperature(lab):
    """False statements of single samples, planted ones apart, and their P(yes), by temperature."""
    sft, figures = lab.sft_model(), {}
    for heat in TEMPERATURES:
        flags = ("--temperature", heat, "--samples", 1 if heat == 0 else 4, "--min-statements", 1)
        folder, scores = lab.golden_of(sft, f"golden-heat-{heat}", *flags, **FEW)
        false, tempting = false_statements(toy_rows(folder / "record.jsonl"), few_truth(lab))
        figures[f"temperature {heat}"] = {
            "false share": 1 - scores["sample"]["precision"],
            "planted": scores["sample"]["planted"],
            "P(yes) of false": statistics.fmean(false) if false else None,
            "P(yes) of planted": statistics.fmean(tempting) if tempting else None}
    return figures


def false_statements(rows, truth):
    """P(yes) of the false statements in golden.py's records -> those not planted, those planted.

    truth: {image: truth row}.
    """
    false, tempting = [], []
    for row in rows:
        known = truth[row["image"]]
        true, planted = true_texts(known), {lure["text"] for lure in known["planted"]}
        for statement in row.get("statements", []):
            if statement["text"] in planted:
                tempting.append(statement["p_yes"])
            elif statement["text"] not in true:
                false.append(statement["p_yes"])
    return false, tempting


def few_truth(lab):
    """{image: truth row} of the few scenes."""
    return {row["image"]: row for row in toy_rows(lab.out / "truth/few.jsonl")}


def true_texts(row):
    """The true statements about the image of a truth row, those that are not facts included."""
    return {fact["text"] for fact in row["facts"]}.union(row["also_true"])


# ---------------------------------------------------------------- preference training
def training(lab):
    """One golden pool, learned from in several ways, each at its own learning rate."""
    sft, golden, scores = lab.pool()
    of_golden = {f"sampled {metric}": scores["golden"][metric] for metric in METRICS}
    figures = {"SFT": lab.judged("sft"), "golden": of_golden}
    for arm in ARMS:
        lr = best_lr(lab.out.parent, arm)
        lab.trained_arm(arm, sft, golden, lr)
        figures[arm] = {**lab.judged(slug(arm)), "lr": float(lr)}
    return figures


def lottery(lab):
    """Each preference loss alone at its best β and learning rate, and what steadies it."""
    sft, golden, _ = lab.pool()
    figures = {"SFT": lab.judged("sft")}
    for loss in BETAS:
        beta, lr = best_alone(lab.out.parent, loss)
        lab.trained(f"{loss}-alone", sft, golden, *alone(loss, beta, lr))
        figures[f"{loss} alone"] = {**lab.judged(f"{loss}-alone"),
                                    "beta": float(beta), "lr": float(lr)}
    for arm in ("DPO + CE", SFT_FIRST):
        lab.trained_arm(arm, sft, golden, best_lr(lab.out.parent, arm))
        figures[arm] = lab.judged(slug(arm))
    return figures


# ---------------------------------------------------------------- rounds
def three_rounds(lab, suffix="", *flags):
    """Three rounds, each with fresh images: {"SFT", "golden 1", "round 1", "golden 2", …}.

    suffix: of the folders, for another base. flags: of golden.py.
    """
    captioner = lab.sft_model(f"sft{suffix}")
    figures = {"SFT": lab.judged(captioner.name)}
    lr = best_lr(lab.out.parent, "DPO + CE")
    for k in (1, 2, 3):
        name = f"{k}{suffix}{''.join(flags)}"
        golden, trained = f"golden-round-{name}", f"round-{name}"
        if name == "1":                 # the same as that of other experiments
            golden, trained = "golden", slug("DPO + CE")
        golden, scores = lab.golden_of(captioner, golden, *flags, images=f"images-{k}")
        figures[f"golden {k}"] = {f"sampled {metric}": scores["golden"][metric]
                                  for metric in METRICS}
        figures[f"golden {k}"]["too long"] = share_too_long(golden)
        captioner = lab.trained(trained, captioner, golden, "--lr", lr)
        figures[f"round {k}"] = lab.judged(captioner.name)
    return figures


def share_too_long(golden):
    """The share of a golden folder's images whose golden caption exceeds the context."""
    rows = toy_rows(golden / "record.jsonl")
    return sum(row.get("left_out") == "golden longer than the context" for row in rows) / len(rows)


def rounds(lab):
    """Three rounds, with contradictions resolved and not."""
    resolved, unresolved = three_rounds(lab), three_rounds(lab, "", "--no-resolve")
    return {**{f"{name}, resolved": figures for name, figures in resolved.items()},
            **{f"{name}, not": figures for name, figures in unresolved.items()}}


def context(lab):
    """Three rounds in a context that is too short for a fifth of the golden captions, and in one
    with room for all."""
    full, lab.base = lab.base, short_base(lab)
    short = three_rounds(lab, "-short")
    lab.base = full
    return {**{f"{name}, short": figures for name, figures in short.items()},
            **{f"{name}, long": figures for name, figures in three_rounds(lab).items()}}


def short_base(lab):
    """A copy of the base with a context of SHORT tokens."""
    folder = lab.out / "short-base"
    if not (folder / "config.json").is_file():
        ignored = shutil.ignore_patterns("examples", "config.json")
        shutil.copytree(lab.base, folder, ignore=ignored, dirs_exist_ok=True)
        config = json.loads((lab.base / "config.json").read_text("utf-8"))
        files.write_json(folder / "config.json", {**config, "seq_length": SHORT})
    return folder


# ---------------------------------------------------------------- the order of statements
def in_order(caption):
    """A caption's statements, once each, in the order of golden captions."""
    return ", ".join(sorted(dict.fromkeys(world.statements(caption)), key=place_in_order))


def place_in_order(text):
    """The sort key of a statement: places in canonical order, an object before its mark."""
    places = ["background", *world.PLACES, "center"]
    words = text.split()
    return places.index(words[0]) if words[0] in places else len(places), -len(words)


def order(lab):
    """Does order explain the gain? SFT on ordered captions, and cross entropy on one sample per
    image of the model itself, put in order."""
    sft, golden, _ = lab.pool()
    train = lab.train_split()
    ordered = [{**row, "caption": in_order(row["caption"])}
               for row in toy_rows(train / "captions.jsonl")]
    world.write_rows(train / "ordered.jsonl", ordered, train)
    lab.sft_model("sft-ordered", "--data", train / "ordered.jsonl")
    own = []
    for row in toy_rows(golden / "record.jsonl"):
        first = row["samples"][0]
        if world.statements(first["caption"]):
            # --loss none learns nothing from "rejected"
            own.append({"image": row["image"], "chosen": in_order(first["caption"]),
                        "rejected": [first]})
    world.write_rows(lab.out / "own/golden.jsonl", own, lab.out / "data/images-1")
    lr = best_lr(lab.out.parent, "CE only")
    lab.trained_arm("CE only", sft, lab.out / "own", lr, "ce-own-ordered")
    lab.trained_arm("CE only", sft, golden, lr)
    return {"SFT": lab.judged("sft"), "SFT, ordered captions": lab.judged("sft-ordered"),
            "CE on own samples, ordered": lab.judged("ce-own-ordered"),
            "CE on golden": lab.judged(slug("CE only"))}


# ---------------------------------------------------------------- adapters
def forgetting(lab):
    """How well the base's own tasks are done after SFT of each kind, at its own learning rate.

    The tasks are dense captions and questions of six views, and the marks of close-ups, which SFT
    never shows. "adapters, off" switches the adapters off again.
    """
    figures = {"base": base.own_tasks(lab.load(), lab.seed)}
    for tune in ("adapters", "lora", "prompt", "full"):
        lr = best_sft_lr(lab.out.parent, tune)
        folder = lab.tuned(f"sft-{tune}", tune, lr)
        model = open_base(folder) if tune == "full" else lab.load(folder)
        figures[tune] = {**base.own_tasks(model, lab.seed), "lr": float(lr),
                         "caption f1": lab.judged(folder.name)["greedy f1"]}
        if tune == "adapters":
            with adapters.active(model, []):
                figures["adapters, off"] = base.own_tasks(model, lab.seed)
    return figures


def soft_prompt(lab):
    """SFT with adapters alone, and with adapters and a soft prompt."""
    lab.sft_model()
    lab.sft_model("sft-no-prompt", "--no-soft-prompt")
    return {"adapters and soft prompt": lab.judged("sft"),
            "adapters alone": lab.judged("sft-no-prompt")}


def narrowing(lab):
    """Captioning with the QA adapters of the ViT left on, and the distance between the embeddings
    of different images."""
    sft = lab.sft_model()
    images, truth_file = lab.held_out()
    truth = toy_rows(truth_file)
    figures = {}
    for arm, flags in (("LLM only", ()), ("LLM and ViT", ("--vision",))):
        model = lab.load(sft, lab.qa_of(sft, *flags))
        with adapters.active(model, ["caption"]):
            for slot, *_ in model.places("vision"):
                slot.stack = tuple(name for name in ("qa", "caption") if name in slot)
            rows, vectors = captions_and_embeddings(model, images, [row["image"] for row in truth])
        scores = score(rows, truth)
        figures[arm] = {"greedy f1": scores["f1"], "greedy precision": scores["precision"],
                        "cosine distance": mean_distance(vectors)}
    return figures


@torch.no_grad()
def captions_and_embeddings(model, folder, names):
    """Greedy captions of images, as rows, and the ViT's embeddings of them (N, D), of a QwenVL."""
    rows, vectors = [], []
    for name in names:
        pixels = seen_by(model, folder / name)
        vectors.append(model.transformer.visual(pixels).flatten())
        ((caption,),) = sample(model, [pixels], [name], temperature=0.0)
        rows.append({**caption, "image": name})
    return rows, torch.stack(vectors)


def mean_distance(vectors):
    """Mean cosine distance between different rows of (N, D)."""
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    different = ~torch.eye(len(vectors), dtype=torch.bool)
    return 1 - (vectors @ vectors.T)[different].mean().item()
