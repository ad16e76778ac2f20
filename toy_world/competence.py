"""The competence curve: given how well a base answers yes/no questions, what does the loop give,
which of its parts earn their place, and how strict should the gate be?

An experiment as in experiments.py, on a ladder of bases that differ in the length of their training
alone, from one that errs often to the shipped one, which hardly ever does.
"""
import json
import shutil
from typing import NamedTuple

import adapters
import generate
from plumbing import data, files, shards
from toy_world import base, gate_rules, stopping, world
from toy_world.experiments import pooled_share
from toy_world.lab import HELD_OUT, LRS, SAMPLES, TUNE, Lab, both_f1, climb, slug
from toy_world.steps import CODE, LATER, toy_rows

SHIPPED = 2000                          # --steps of toy.py pretrain, of assets/toy
RUNGS = ("1000 steps", "1250 steps", "1500 steps", f"{SHIPPED} steps", "6000 steps")
TUNING_RUNGS = ("1500 steps", "2000 steps")     # on which the gate is chosen, with other seeds
TUNED_ON = "1500 steps"                 # the rung on which learning rates are chosen, seed TUNE
IMAGES = 1500                           # unlabelled scenes per round
CURVE = (0, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95, .98, .99)     # thresholds on P(yes)
DIAL = (.2, .5, .8, .95, .99)           # thresholds of golden captions that a captioner learns from
QA_HOLDOUT = .1                         # of qa_adapter.py
ASKED = 300                             # scenes with questions to a base and to a QA adapter
VOTES = 2                               # samples that make a statement, of SAMPLES, in a vote
GATE = "F.5, group share"               # of gate_rules.py: what golden.py does by default


class Arm(NamedTuple):
    gated: bool                         # golden captions by a QA adapter; otherwise by votes
    first: tuple                        # flags of dpo.py in round one
    later: tuple                        # and in the rounds after it


CE = ("--loss", "none")
ARMS = {"DPO + CE": Arm(True, (), LATER), "CE": Arm(True, CE, CE),
        "CE on votes": Arm(False, CE, CE)}


# ---------------------------------------------------------------- the ladder
def rung_of(lab, part):
    """The Lab of a seed on a rung of the ladder, whose base is trained if it is missing."""
    out, steps = lab.out.parent, int(part.split()[0])
    folder = CODE / "assets/toy"
    if steps != SHIPPED:
        folder = out / f"ladder/steps-{steps}"
        lab.run(folder / "model.safetensors", "toy.py", "pretrain", "--steps", steps,
                "--out", folder, stage=False)
    return Lab(out / f"competence/steps-{steps}", lab.seed, folder,
               scenes=out / f"competence/scenes/seed-{lab.seed}")


def base_figures(rung):
    """What `toy.py report` says of the base with six views."""
    report = base.measure(rung.load(), ASKED, rung.seed)["six views"]
    return {"precision": report["precision"]["all"][0], "recall": report["recall"]["all"][0],
            **answers(report["yes/no"])}


def answers(report):
    """The shares of a question_report: right answers to all questions, and to near misses."""
    near_misses = [of_kind for kind, of_kind in report.items() if kind.startswith("wrong ")]
    return {"questions": report["all"][0], "near misses": pooled_share(near_misses)}


def qa_figures(rung, captioner):
    """How often the QA adapter of a captioner is right: on its held-out triplets at the calibrated
    threshold, on questions and near misses as the base is asked them."""
    qa = rung.qa_of(captioner)
    scenes = [world.make_scene(f"report {rung.seed} {i}") for i in range(ASKED)]
    model = rung.load(captioner, qa)
    report = base.question_report(model, scenes, base.looks_at(model, scenes), rung.seed)
    card = json.loads((qa / "adapters.json").read_text("utf-8"))
    triplets = card["held_out"]["calibrated"].items()
    return {**answers(report), **{f"triplets' {name}": share for name, share in triplets},
            "threshold": card["threshold"]}


# ---------------------------------------------------------------- rounds
def name_of(stage, k, arm):
    """The folder of a stage; the golden captions of round one are the same for both gated arms."""
    if stage == "golden" and k == 1 and ARMS[arm].gated:
        return "golden-1"
    return f"{stage}-{k}-{slug(arm)}"


def golden_of_round(rung, captioner, k, arm):
    """Golden captions of a round -> their folder."""
    name, images = name_of("golden", k, arm), f"images-{k}"
    if ARMS[arm].gated:
        return rung.golden_of(captioner, name, images=images, n=IMAGES)[0]
    if k == 1:                          # the samples of the gated arms, which have the same start
        made_by = rung.golden_of(captioner, "golden-1", images=images, n=IMAGES)[0]
        rows = toy_rows(made_by / "record.jsonl")
    else:
        made_by = rung.out / f"{name}-samples"
        folder, _ = rung.split(images, IMAGES)
        rung.run(made_by / "whole.txt", "golden.py", "--images", folder, "--captioner", captioner,
                 "--passes", "sample,combine", "--samples", SAMPLES, "--out", made_by,
                 *rung.flags, stdout=made_by / "whole.txt")
        places, _ = shards.finished(made_by, "combine")
        rows = list(shards.rows_at(places[image] for image in sorted(places)))
    golden = rung.out / name
    world.write_rows(golden / "golden.jsonl", voted(rows), rung.scenes / "data" / images)
    return golden


def voted(rows):
    """Golden rows of the statements that at least VOTES samples make; of a group, the one with the
    most votes."""
    golden = []
    for row in rows:
        statements = row["statements"]
        votes = [statement["votes"] for statement in statements]
        kept = gate_rules.best_of_groups(statements, votes, [n >= VOTES for n in votes])
        texts = [statement["text"] for statement, is_kept in zip(statements, kept) if is_kept]
        if len(texts) >= 2:             # --min-statements of golden.py
            # --loss none learns nothing from "rejected"
            golden.append({"image": row["image"], "chosen": ", ".join(texts),
                           "rejected": row["samples"][:1]})
    return golden


def train_round(rung, captioner, golden, k, arm):
    """dpo.py of an arm in round k -> the folder of the new captioner."""
    flags = ARMS[arm].first if k == 1 else ARMS[arm].later
    lr = best_lr(rung.out.parents[2], arm)
    return rung.trained(name_of("round", k, arm), captioner, golden, *flags, "--lr", lr)


def rounds(rung, arm):
    """The captioners of an arm after each round: {"round 1": figures, …}."""
    captioner, figures = rung.sft_model(), {}
    for k in (1, 2, 3):
        golden = golden_of_round(rung, captioner, k, arm)
        captioner = train_round(rung, captioner, golden, k, arm)
        figures[f"round {k}, {arm}"] = {**rung.judged(captioner.name),
                                        "held-out loss": held_out_loss(captioner)}
    return figures


def held_out_loss(captioner):
    """Cross entropy per token of held-out golden captions at the end of a round."""
    logged = [row["held_out_nll_loss"] for row in toy_log(captioner) if "held_out_nll_loss" in row]
    return logged[-1] if logged else None


def toy_log(folder):
    return map(json.loads, (folder / "log.jsonl").read_text("utf-8").splitlines())


# ---------------------------------------------------------------- learning rates
def best_lr(out, arm):
    """The learning rate of an arm: of those climbed, the one with the best F1 after round one, on
    TUNED_ON and the tuning seed. The votes' arm takes that of CE."""
    arm = arm.removesuffix(" on votes")
    rung = rung_of(Lab(out, TUNE), TUNED_ON)

    def f1(lr):
        name = f"tuned-{slug(arm)}-lr{lr}"
        sft = rung.sft_model()
        golden = golden_of_round(rung, sft, 1, arm)
        rung.trained(name, sft, golden, *ARMS[arm].first, "--lr", lr)
        return both_f1(rung.judged(name))

    return climb(LRS, f1)


# ---------------------------------------------------------------- the gate on its own statements
def pool_of(rung, golden, k):
    """The statements of a golden folder and the truth about them; they are kept next to the runs,
    so that rules can be compared without them."""
    path = rung.out / f"pools/{golden.name}.jsonl"
    if not path.is_file():
        truth = rung.scenes / f"truth/images-{k}.jsonl"
        gate_rules.write_pool(path, toy_rows(golden / "record.jsonl"), toy_rows(truth))
    return gate_rules.read_pool(path)


def gates(rung, arm):
    """{"statements K": how well the gate knows true ones, "golden K by RULE": figures} of the pools
    of a gated arm."""
    captioner, figures = rung.sft_model(), {}
    for k in (1, 2, 3):
        golden = golden_of_round(rung, captioner, k, arm)
        pool, thresholds = pool_of(rung, golden, k), thresholds_of(rung, captioner)
        figures[f"statements {k}, {arm}"] = gate_rules.separation(pool, thresholds["F.5"])
        for rule, kept in gate_rules.by_all_rules(pool, thresholds):
            figures[f"golden {k} by {rule}, {arm}"] = kept
        captioner = rung.out / name_of("round", k, arm)
    return figures


def thresholds_of(rung, captioner):
    """{"F1", "F.5": the threshold that has the best one} on the held-out questions of a QA adapter,
    which qa_adapter.py calibrated with F.5. They are kept, as the pools are."""
    path = rung.out / f"pools/thresholds-of-{captioner.name}.json"
    if not path.is_file():
        qa = rung.qa_of(captioner)
        rows, _ = data.read_questions(rung.train_split() / "questions.jsonl")
        _, held_out = data.split(rows, QA_HOLDOUT, rung.seed)
        p_yes, truth = generate.answers(rung.load(captioner, qa), adapters.views_of(captioner),
                                        held_out, print)
        files.write_json(path, {name: generate.calibrate(p_yes, truth, beta)
                                for name, beta in (("F1", 1), ("F.5", .5))})
    return json.loads(path.read_text("utf-8"))


# ---------------------------------------------------------------- signs of a good round
def signs(rung, arm):
    """What can be known without truth of each captioner of an arm: {"signs of SFT": …, …}; see
    stopping.py."""
    captioner, figures = rung.sft_model(), {}
    for k in (1, 2, 3, 4):
        greedy, _ = rung.golden_of(captioner, f"greedy-of-{captioner.name}", "--temperature", 0,
                                   "--samples", 1, "--min-statements", 1, images="held-out",
                                   n=HELD_OUT)
        if k <= 3:
            sampled = golden_of_round(rung, captioner, k, arm)
        else:                           # nothing is trained on these
            sampled, _ = rung.golden_of(captioner, f"samples-of-{captioner.name}",
                                        images="held-out", n=HELD_OUT)
        name = "SFT" if k == 1 else f"round {k - 1}"
        figures[f"signs of {name}, {arm}"] = stopping.signs_of(
            *(toy_rows(folder / "record.jsonl") for folder in (greedy, sampled)))
        captioner = rung.out / name_of("round", k, arm)
    return figures


# ---------------------------------------------------------------- the experiment
def competence(lab, part):
    """Everything about one rung of the ladder with one seed; arms end in ", RUNG"."""
    rung = rung_of(lab, part)
    sft = rung.sft_model()
    figures = {"base": base_figures(rung), "QA adapter": qa_figures(rung, sft),
               "SFT": rung.judged(sft.name)}
    for arm, how in ARMS.items():
        figures |= rounds(rung, arm)
        if how.gated:
            figures |= gates(rung, arm)
    figures |= signs(rung, "DPO + CE")
    return {f"{name}, {part}": of for name, of in figures.items()}


def tuning(lab, part):
    """The arm DPO + CE alone: what rules of the gate and of stopping are chosen by."""
    rung, arm = rung_of(lab, part), "DPO + CE"
    figures = {"SFT": rung.judged(rung.sft_model().name),
               **rounds(rung, arm), **gates(rung, arm), **signs(rung, arm)}
    return {f"{name}, {part}": of for name, of in figures.items()}


def threshold(lab):
    """Golden captions of one pool by their threshold, and captioners trained on some of them, on
    the rung TUNED_ON."""
    rung = rung_of(lab, TUNED_ON)
    sft = rung.sft_model()
    golden = golden_of_round(rung, sft, 1, "DPO + CE")
    pool = pool_of(rung, golden, 1)
    p_yes = [statement["p_yes"] for statement in gate_rules.statements_of(pool)]
    figures = {"SFT": rung.judged(sft.name)}
    for least in CURVE:
        kept = gate_rules.kept_above(pool, p_yes, least, share=True)
        figures[f"golden at {least}"] = gate_rules.scores(pool, kept)
    lr = best_lr(lab.out.parent, "DPO + CE")
    for least in DIAL:
        stricter = recomposed(rung, sft, golden, least)
        trained = rung.trained(f"round-1-at-{least}", sft, stricter, "--lr", lr)
        figures[f"captioner at {least}"] = rung.judged(trained.name)
    return figures


def recomposed(rung, captioner, golden, least):
    """A golden folder with the same statements at another threshold -> its folder."""
    folder, _ = rung.split("images-1", IMAGES)
    out = rung.out / f"{golden.name}-at-{least}"
    if not (out / "settings.json").is_file():
        made_last = shutil.ignore_patterns("compose-*", "golden.jsonl", "record.jsonl", "*.html")
        shutil.copytree(golden, out, ignore=made_last, dirs_exist_ok=True)
    rung.golden(captioner, rung.qa_of(captioner), folder, out, "--samples", SAMPLES, *rung.flags,
                "--threshold", least)
    return out
