"""toy_world/claims.py, lab.py and experiments.py: rules and verdicts, the results that are kept, tuning, and every
experiment at a tiny size."""

import functools
import itertools
import json
import math
import random
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import stages
import torch
from safetensors.torch import load_file
from test_toy import FEW, Here, running

import adapters
import chunking
import plumbing.weights
import toy
from plumbing import files
from plumbing.errors import InputError
from toy_world import base as toy_base
from toy_world import claim_rules, world
from toy_world import claims as toy_claims
from toy_world import competence as toy_competence
from toy_world import experiments as toy_experiments
from toy_world import gate_rules as toy_gate_rules
from toy_world import lab as toy_lab
from toy_world import steps as toy_steps
from toy_world.claim_rules import beats, collapsed, for_each_seed
from toy_world.claims import CLAIMS, Claim, collect, table, verdict
from toy_world.experiments import LAYOUTS, TEMPERATURES
from toy_world.lab import ARMS, BETAS, METRICS, SFT_FIRST, Lab
from toy_world.steps import CODE

JUDGED = {f"{way} {key}" for way in ("greedy", "sampled") for key in METRICS}


# ---------------------------------------------------------------- verdicts and rules
@pytest.mark.parametrize(
    "values, expected",
    [([3, 4, 5], "reproduces"), ([3, 1, 5], "unclear"), ([0, 1, 2], "does not reproduce")],
)
def test_a_claim_reproduces_where_its_rule_holds_for_every_seed(values, expected):
    assert (
        verdict(
            [{"arm": {"x": value}} for value in values], for_each_seed(lambda f: f["arm"]["x"] > 2)
        )
        == expected
    )


@pytest.mark.parametrize(
    "f1, eos, repeat, expected",
    [
        (0.8, 1.0, 0.0, False),
        (0.7, 0.9, 0.5, False),
        (0.69, 1.0, 0.0, True),
        (0.8, 0.89, 0.0, True),
        (0.8, 1.0, 0.51, True),
    ],
)
def test_a_captioner_has_collapsed_below_its_start_or_without_ends_or_with_repeats(
    f1, eos, repeat, expected
):
    sft = {"greedy f1": 0.7, "greedy eos": 0.5, "greedy repeat": 1.0}
    assert collapsed({"greedy f1": f1, "greedy eos": eos, "greedy repeat": repeat}, sft) is expected


def test_to_beat_is_to_be_above_by_the_margin_in_every_key():
    one, other = {"a": 0.6, "b": 0.5}, {"a": 0.5, "b": 0.4}
    assert (
        beats(one, other, "ab", 0.05)
        and not beats(one, other, "ab", 0.11)
        and not beats(other, other, "a")
    )
    assert not beats(one, {"a": 0.5, "b": 0.5}, "ab")


def judged(greedy_f1, sampled_f1=None, eos=1.0, repeat=0.0, **more):
    sampled_f1 = greedy_f1 if sampled_f1 is None else sampled_f1
    return {
        "greedy f1": greedy_f1,
        "sampled f1": sampled_f1,
        "greedy eos": eos,
        "greedy repeat": repeat,
        "sampled eos": eos,
        "sampled repeat": repeat,
        **more,
    }


def competence_figures(rung="1500 steps", **changes):
    """Figures of one rung in which everything earns its place."""
    f1s = {
        "SFT": 0.6,
        **{f"round {k}, DPO + CE": 0.9 + 0.02 * k for k in (1, 2, 3)},
        "round 2, CE": 0.8,
        "round 2, CE on votes": 0.7,
        **changes,
    }
    figures = {f"{arm}, {rung}": judged(f1) for arm, f1 in f1s.items()}
    for rule, f1 in (("vote of 2", 0.7), ("F1", 0.8), (toy_competence.GATE, 0.9)):
        figures[f"golden 1 by {rule}, DPO + CE, {rung}"] = {"f1": f1}
    signs = {"P(yes)": 0.9, "share kept": 0.8, "agreement": 0.7, "kept": 6}
    signs |= {f"{way}{key}": 5 for way in ("", "sampled ") for key in ("stated", "believed")}
    for k in (1, 2, 3):
        figures[f"round {k}, DPO + CE, {rung}"]["held-out loss"] = 0.1 * k
        figures[f"signs of round {k}, DPO + CE, {rung}"] = signs
    figures[f"signs of SFT, DPO + CE, {rung}"] = signs | {"believed": 3}
    return figures


# name: (figures that satisfy the rule, changes (arm, metric, value), each of which alone breaks it)
FITTING = {
    "planted": (
        {
            "one low-resolution view": {"warm": 0.95, "cold": 0.02},
            "true rate": {"warm": 0.85, "cold": 0.15},
            "six views": {"warm": 0.0},
        },
        [
            ("one low-resolution view", "warm", 0.89),
            ("true rate", "warm", 0.91),
            ("one low-resolution view", "cold", 0.95),
            ("six views", "warm", 0.9),
        ],
    ),
    "layouts": (
        {
            "6 views": {"greedy detail_recall": 0.6, "sampled detail_recall": 0.5},
            "1 view": {"greedy detail_recall": 0.5, "sampled detail_recall": 0.4},
        },
        [("6 views", "greedy detail_recall", 0.54), ("1 view", "sampled detail_recall", 0.46)],
    ),
    "generations": (
        {
            "N = 1, union": {"recall": 0.5, "precision": 0.85},
            "N = 2, union": {"recall": 0.7, "precision": 0.8},
            "N = 16, union": {"recall": 0.9, "precision": 0.6},
            "N = 16, gated": {"recall": 0.8, "precision": 0.9},
        },
        [
            ("N = 16, union", "recall", 0.74),
            ("N = 16, union", "precision", 0.79),
            ("N = 16, gated", "recall", 0.49),
            ("N = 16, gated", "precision", 0.84),
        ],
    ),
    "direct": (
        {"all": {"question": 0.9, "statement": 0.8}},
        [("all", "question", 0.8), ("all", "statement", 0.95)],
    ),
    "gates": (
        {
            "gate, calibrated": {"f1": 0.8},
            **{
                name: {"f1": 0.7}
                for name in ("vote of 2", "vote of 3", "no gate", "resolving alone")
            },
        },
        [
            ("gate, calibrated", "f1", 0.7),
            ("vote of 3", "f1", 0.9),
            ("vote of 2", "f1", 0.8),
            ("no gate", "f1", 0.81),
            ("resolving alone", "f1", 0.8),
        ],
    ),
    "training": (
        {"DPO + CE": judged(0.8, 0.7), "CE only": judged(0.8, 0.68)},
        [("DPO + CE", "greedy f1", 0.78), ("CE only", "sampled f1", 0.695)],
    ),
    "other losses": (
        {
            "SFT": judged(0.7),
            "hinge alone": judged(0.6),
            "ipo alone": judged(0.8, repeat=0.6),
            "kto alone": judged(0.8, eos=0.8),
        },
        [
            ("hinge alone", "greedy f1", 0.7),
            ("ipo alone", "greedy repeat", 0.4),
            ("kto alone", "greedy eos", 0.95),
        ],
    ),
    "repeatable": (
        {"SFT": judged(0.7), "DPO + CE": judged(0.8)},
        [("DPO + CE", "greedy f1", 0.69)],
    ),
    "rounds": (
        {
            "SFT, resolved": judged(0.6, repeat=0.1),
            "round 2, resolved": judged(0.8, eos=0.98, repeat=0.05),
            "round 3, resolved": judged(0.7),
        },
        [
            ("round 2, resolved", "sampled eos", 0.97),
            ("round 2, resolved", "sampled repeat", 0.06),
            ("round 3, resolved", "greedy f1", 0.9),
            ("SFT, resolved", "sampled repeat", 0.04),
        ],
    ),
    "context": (
        {
            "round 2, short": judged(0.8),
            "round 3, short": judged(0.7),
            "round 2, long": judged(0.8),
            "round 3, long": judged(0.795),
        },
        [("round 3, short", "greedy f1", 0.89), ("round 3, long", "greedy f1", 0.7)],
    ),
    "temperature": (
        {"temperature 0": {"false share": 0.1}, "temperature 1": {"false share": 0.3}},
        [("temperature 1", "false share", 0.2)],
    ),
    "prior": (
        {
            arm + base: {"f1": f1}
            for base in ("", ", weak base")
            for arm, f1 in (("calibrated", 0.8), ("corrected", 0.9))
        },
        [("corrected", "f1", 0.7), ("corrected, weak base", "f1", 0.7)],
    ),
    "order": (
        {
            "SFT": judged(0.6),
            "CE on own samples, ordered": judged(0.71),
            "CE on golden": judged(0.8),
        },
        [
            ("CE on own samples, ordered", "greedy f1", 0.68),
            ("CE on golden", "sampled f1", 0.91),
            ("SFT", "greedy f1", 1.01),
        ],
    ),
    "forgetting": (
        {
            "base": {"dense f1": 0.9, "close-up marks": 0.9},
            "adapters, off": {"dense f1": 0.9, "close-up marks": 0.9},
            "adapters": {"dense f1": 0.9, "close-up marks": 0.9},
            **{name: {"dense f1": 0.8, "close-up marks": 0.8} for name in ("lora", "full")},
        },
        [
            ("adapters, off", "dense f1", 0.8999),
            ("full", "dense f1", 0.9),
            ("lora", "close-up marks", 0.895),
        ],
    ),
    "tuning": (
        {
            f"golden 1 by {rule}, DPO + CE, {rung}": {"f1": f1}
            for rung in toy_competence.TUNING_RUNGS
            for rule, f1 in (("F1", 0.8), (toy_competence.GATE, 0.81))
        },
        [
            (f"golden 1 by {toy_competence.GATE}, DPO + CE, {rung}", "f1", 0.8)
            for rung in toy_competence.TUNING_RUNGS
        ],
    ),
    "competence": (
        competence_figures(),
        [
            ("round 2, CE on votes, 1500 steps", "greedy f1", 0.91),
            ("round 2, CE, 1500 steps", "sampled f1", 1.09),
            ("round 2, DPO + CE, 1500 steps", "greedy f1", 0.66),
        ],
    ),
    "threshold": (
        {
            "golden at 0.2": {"precision": 0.8, "recall": 0.9},
            "golden at 0.99": {"precision": 0.9, "recall": 0.8},
            "captioner at 0.2": judged(0.8, **{"greedy precision": 0.8, "greedy recall": 0.9}),
            "captioner at 0.99": judged(0.8, **{"greedy precision": 0.9, "greedy recall": 0.8}),
        },
        [
            ("golden at 0.2", "precision", 0.9),
            ("golden at 0.99", "recall", 0.895),
            ("captioner at 0.99", "greedy precision", 0.81),
            ("captioner at 0.2", "greedy recall", 0.8),
        ],
    ),
    "soft prompt": (
        {"adapters alone": judged(0.7), "adapters and soft prompt": judged(0.715)},
        [("adapters alone", "greedy f1", 0.69), ("adapters alone", "greedy f1", 0.74)],
    ),
    "narrowing": (
        {
            "LLM only": {"greedy f1": 0.7, "cosine distance": 0.4},
            "LLM and ViT": {"greedy f1": 0.6, "cosine distance": 0.3},
        },
        [("LLM only", "greedy f1", 0.605), ("LLM and ViT", "cosine distance", 0.4)],
    ),
}


# test_hard_world.py has the claims about the hard world
@pytest.mark.parametrize(
    "name", [name for name in CLAIMS if name != "lottery" and CLAIMS[name].world == "easy"]
)
def test_the_rule_of_a_claim_holds_for_fitting_figures_and_fails_for_others(name):
    rule, (figures, changes) = CLAIMS[name].rule, FITTING[name]
    assert all(rule([figures]))
    for arm, key, value in changes:
        assert not all(rule([{**figures, arm: {**figures[arm], key: value}}])), (arm, key, value)


@pytest.mark.parametrize(
    "f1s, expected", [((0.9, 0.6, 0.9), True), ((0.9, 0.9, 0.9), False), ((0.6, 0.5, 0.6), False)]
)
def test_a_lottery_is_what_collapses_with_some_seeds(f1s, expected):
    seeds = [{"SFT": judged(0.7), "dpo alone": judged(f1)} for f1 in f1s]
    assert CLAIMS["lottery"].rule(seeds) == [expected]


@pytest.mark.parametrize(
    "f1s, expected",
    [
        ((0.9, 0.92), "reproduces"),
        ((0.9, 0.93), "unclear"),
        ((0.6, 0.6), "unclear"),
        ((0.6, 0.5), "does not reproduce"),
    ],
)
def test_a_repeatable_loss_collapses_with_no_seed_and_gives_the_same_f1(f1s, expected):
    seeds = [{"SFT": judged(0.7), "DPO + CE": judged(f1)} for f1 in f1s]
    assert verdict(seeds, CLAIMS["repeatable"].rule) == expected


@pytest.mark.parametrize(
    "f1s, expected",
    [
        ((0.61, 0.61, 0.61), "yes"),  # above .6 by .02, greedy and sampled together
        ((0.604, 0.604, 0.604), "unclear"),
        ((0.7, 0.7, 0.59), "unclear"),
        ((0.59, 0.5, 0.5), "no"),
        ((0.599, 0.599, 0.599), "unclear"),
    ],
)
def test_an_arm_is_above_another_if_it_is_with_every_seed_and_by_a_margin(f1s, expected):
    seeds = [{"one": judged(f1), "other": judged(0.6)} for f1 in f1s]
    assert claim_rules.above(seeds, "one", "other") == expected


def test_a_rung_is_answered_for_once_all_seeds_have_it():
    whole = competence_figures() | competence_figures("2000 steps", **{"round 3, DPO + CE": 0.9})
    answers = claim_rules.competence_answers([whole, whole])
    assert list(answers) == ["1500 steps", "2000 steps"]
    words = [answer for answer in answers["1500 steps"].values() if isinstance(answer, str)]
    assert len(words) > 5 and set(words) == {"yes"}
    lost = answers["1500 steps"]["F1, greedy + sampled, lost by always round 1"]
    assert lost == pytest.approx(2 * (0.96 - 0.92))
    assert [question for question, answer in answers["2000 steps"].items() if answer == "no"] == [
        "round 3 adds to round 2"
    ]
    assert list(claim_rules.competence_answers([whole, competence_figures()])) == ["1500 steps"]


# ---------------------------------------------------------------- results
@pytest.fixture
def args(tmp_path):
    return SimpleNamespace(
        out=tmp_path / "claims", results=tmp_path / "results/claims.json", only=None, table=False
    )


def claim(measure=None, seeds=(0, 1), text="x is more than 2"):
    return Claim(text, measure, for_each_seed(lambda f: f["arm"]["x"] > 2), seeds)


def put(args, name, seed, x):
    files.write_json(args.out / f"seed-{seed}/figures/{name}.json", {"arm": {"x": x}})


def test_results_of_runs_and_of_the_results_file_are_collected(args, monkeypatch):
    monkeypatch.setattr(
        toy_claims,
        "CLAIMS",
        {name: claim() for name in ("here", "kept", "both", "half", "nowhere")},
    )
    files.write_json(
        args.results,
        {
            "kept": {
                "claim": "old words",
                "verdict": "old",
                "seeds": {"0": {"arm": {"x": 3}}, "1": {"arm": {"x": 1}}},
            },
            "both": {"claim": "", "verdict": "", "seeds": {"0": {"arm": {"x": 0}}}},
            "gone": {"claim": "", "verdict": "", "seeds": {"0": {"arm": {"x": 9}}}},
        },
    )
    for name, seed, x in (
        ("here", 0, 5),
        ("here", 1, 6),
        ("here", 2, 0),
        ("both", 0, 1),
        ("both", 1, 2),
        ("half", 1, 7),
    ):
        put(args, name, seed, x)  # the claims have no seed 2
    results = collect(args)
    assert list(results) == ["here", "kept", "both", "half"]
    x = {
        name: {seed: figures["arm"]["x"] for seed, figures in entry["seeds"].items()}
        for name, entry in results.items()
    }
    assert x == {
        "here": {"0": 5, "1": 6},
        "kept": {"0": 3, "1": 1},
        "both": {"0": 1, "1": 2},
        "half": {"1": 7},
    }
    assert {name: entry["verdict"] for name, entry in results.items()} == {
        "here": "reproduces",
        "kept": "unclear",
        "both": "does not reproduce",
        "half": "not all seeds are done",
    }
    assert results["kept"]["claim"] == "x is more than 2"


def test_the_table_has_mean_and_deviation_of_every_arm_and_metric():
    seeds = {
        "0": {"one": {"f1": 0.5, "eos": None}, "two": {"f1": 0.25}},
        "1": {"one": {"f1": 0.6, "eos": 0.9}, "two": {"f1": 0.25}},
        "2": {"one": {"f1": 0.7, "eos": 0.8}, "two": {"f1": 0.25}},
    }
    lines = "\n".join(
        table(
            {
                "x": {"claim": "ones are more", "verdict": "unclear", "seeds": seeds},
                "y": {"claim": "a", "verdict": "b", "seeds": {"0": {"one": {"f1": 0.5}}}},
            }
        )
    ).splitlines()
    assert lines == [
        "",
        "**ones are more**: unclear (3 seeds)",
        "",
        "| | f1 | eos |",
        "|---|---|---|",
        "| one | 0.600 ± 0.100 | 0.850 ± 0.071 |",
        "| two | 0.250 ± 0.000 | - |",
        "",
        "**a**: b (1 seeds)",
        "",
        "| | f1 |",
        "|---|---|",
        "| one | 0.500 |",
    ]
    assert statistics.stdev([0.9, 0.8]) == pytest.approx(0.0707, abs=1e-4)


def test_an_unknown_claim_is_refused_in_one_line(tmp_path, capsys):
    assert (
        toy.main(
            [
                "claims",
                "--only",
                "loft",
                "--out",
                str(tmp_path / "out"),
                "--results",
                str(tmp_path / "r.json"),
            ]
        )
        == 1
    )
    error = capsys.readouterr().err
    assert (
        error.startswith("toy.py: --only loft: ")
        and error.count("\n") == 1
        and all(name in error for name in CLAIMS)
    )
    assert not list(tmp_path.iterdir())


def run_claims(args, *more):
    return toy.main(["claims", "--out", str(args.out), "--results", str(args.results), *more])


@pytest.fixture
def measured(monkeypatch):
    """Two claims with quick experiments; begun: (claim, seed) of each that began; fail: those that shall fail."""
    begun, fail = [], set()

    def measure(name, lab):
        begun.append((name, lab.seed))
        if (name, lab.seed) in fail:
            raise InputError("sft.py exited with 1")
        return {"arm": {"x": 3 - lab.seed}}

    monkeypatch.setattr(
        toy_claims,
        "CLAIMS",
        {name: claim(functools.partial(measure, name)) for name in ("one", "two")},
    )
    return SimpleNamespace(begun=begun, fail=fail)


def test_every_seed_of_every_claim_is_measured_once(args, measured, capsys):
    assert run_claims(args) == 0
    assert measured.begun == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    stored = json.loads(args.results.read_text())
    assert stored == collect(args) and stored["two"]["seeds"] == {
        "0": {"arm": {"x": 3}},
        "1": {"arm": {"x": 2}},
    }
    assert "**x is more than 2**: unclear (2 seeds)" in capsys.readouterr().out
    assert run_claims(args) == 0 and len(measured.begun) == 4


def test_a_failure_loses_no_seed_that_is_done(args, measured, capsys):
    measured.fail.add(("two", 0))
    assert run_claims(args) == 1
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "toy.py: 1 of the runs failed, the first: two, seed 0: sft.py exited with 1"
    )
    assert measured.begun == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    results = json.loads(args.results.read_text())
    assert set(results["one"]["seeds"]) == {"0", "1"} and set(results["two"]["seeds"]) == {"1"}
    measured.fail.clear()
    assert run_claims(args) == 0 and measured.begun[4:] == [("two", 0)]


def test_each_part_of_a_claim_is_measured_and_stored_by_itself(args, monkeypatch, capsys):
    begun = []

    def measure(lab, part):
        begun.append((part, lab.seed))
        if begun == [("low", 0), ("low", 1)]:
            raise InputError("sft.py exited with 1")
        return {f"arm, {part}": {"x": lab.seed}}

    monkeypatch.setattr(
        toy_claims,
        "CLAIMS",
        {
            "curve": Claim(
                "it climbs",
                measure,
                lambda seeds: [True],
                (0, 1),
                ("low", "high"),
                lambda seeds: {"low": {"so": f"{len(seeds)} seeds"}},
            )
        },
    )
    assert run_claims(args) == 1
    assert begun == [("low", 0), ("low", 1), ("high", 0), ("high", 1)]
    stored = json.loads(args.results.read_text())["curve"]
    assert stored["verdict"] == "not all seeds are done"
    assert {seed: list(of) for seed, of in stored["seeds"].items()} == {
        "0": ["arm, low", "arm, high"],
        "1": ["arm, high"],
    }
    for path in args.out.glob("seed-0/figures/*"):
        path.unlink()  # the results file is enough
    assert run_claims(args) == 0 and begun[4:] == [("low", 1)]
    stored = json.loads(args.results.read_text())["curve"]
    assert stored["verdict"] == "reproduces" and stored["answers"] == {"low": {"so": "2 seeds"}}
    assert "- low: so: 2 seeds" in capsys.readouterr().out


def test_results_that_are_not_json_are_one_line(args, measured, capsys):
    args.results.parent.mkdir()
    args.results.write_text("{")
    assert run_claims(args) == 1 and not measured.begun
    assert capsys.readouterr().err.startswith(f"toy.py: {args.results}: is not valid JSON")


def test_results_are_written_after_each_seed(args, measured):
    measured.fail.add(("one", 1))
    assert run_claims(args) == 1
    stored = json.loads(args.results.read_text())
    assert stored["one"]["verdict"] == "not all seeds are done" and set(stored["one"]["seeds"]) == {
        "0"
    }


def test_seeds_in_the_results_file_are_not_measured_again(args, measured):
    files.write_json(
        args.results, {"one": {"claim": "", "verdict": "", "seeds": {"1": {"arm": {"x": 7}}}}}
    )
    assert run_claims(args) == 0
    assert measured.begun == [("one", 0), ("two", 0), ("two", 1)]
    stored = json.loads(args.results.read_text())["one"]
    assert (
        stored["seeds"] == {"0": {"arm": {"x": 3}}, "1": {"arm": {"x": 7}}}
        and stored["verdict"] == "reproduces"
    )


def test_only_measures_one_claim_and_table_measures_nothing(args, measured, capsys):
    assert run_claims(args, "--only", "two") == 0 and measured.begun == [("two", 0), ("two", 1)]
    capsys.readouterr()
    before = args.results.read_bytes()
    assert (
        run_claims(args, "--table") == 0
        and len(measured.begun) == 2
        and args.results.read_bytes() == before
    )
    assert capsys.readouterr().out.count("**x is more than 2**") == 1


# ---------------------------------------------------------------- the learning rate and β that suit an arm
def test_the_best_learning_rate_and_beta_are_chosen_on_the_tuning_seed(tmp_path, monkeypatch):
    scores = {
        "dpo-only-lr5e-4": (0.5, 0.4),
        "dpo-only-lr1e-3": (0.6, 0.1),
        "dpo-only-lr2e-3": (0.3, 0.5),
        "ce-only-lr5e-4": (0.1, 0.1),
        "ce-only-lr1e-3": (0.2, 0.2),
        "ce-only-lr2e-3": (0.3, 0.2),
        "ipo-beta.1": (0.0, 0.1),
        "ipo-beta.5": (0.3, 0.3),
        "ipo-beta2": (0.2, 0.3),
        "ipo-beta8": (0.2, 0.2),
    }
    trained, seeds = {}, set()

    def train(lab, name, captioner, golden, *flags):
        trained[name] = flags
        seeds.add(lab.seed)

    monkeypatch.setattr(toy_lab, "LRS", ("5e-4", "1e-3", "2e-3"))
    monkeypatch.setattr(Lab, "sft_model", lambda lab: "sft")
    monkeypatch.setattr(Lab, "golden_of", lambda lab, captioner, name: ("golden", {}))
    monkeypatch.setattr(Lab, "trained", train)
    monkeypatch.setattr(Lab, "judged", lambda lab, name: judged(*scores[name]))
    assert toy_lab.best_lr(tmp_path, "CE only") == "2e-3"
    assert toy_lab.best_lr(tmp_path, "DPO only") == "5e-4"
    scores.update(
        {f"ipo-at-5-lr{lr}": (f1, 0) for lr, f1 in (("5e-4", 0.1), ("1e-3", 0.3), ("2e-3", 0.2))}
    )
    assert toy_lab.alone("ipo", *toy_lab.best_alone(tmp_path, "ipo")) == (
        "--loss",
        "ipo",
        "--beta",
        ".5",
        "--ce",
        0,
        "--lr",
        "1e-3",
    )
    assert seeds == {toy_lab.TUNE} and not seeds & {
        seed for name, claim in CLAIMS.items() if name != "tuning" for seed in claim.seeds
    }
    assert trained["ce-only-lr1e-3"] == ("--loss", "none", "--lr", "1e-3")
    assert trained["ipo-beta2"] == ("--loss", "ipo", "--beta", "2", "--ce", 0, "--lr", "5e-4")


@pytest.mark.parametrize(
    "best, tried", [(5, {4, 5, 6}), (4, {3, 4, 5, 6}), (10, {*range(4, 11)}), (0, {*range(7)})]
)
def test_a_learning_rate_is_searched_for_until_its_neighbours_are_worse(best, tried):
    asked, rates = [], toy_lab.LRS

    def f1(rate):
        asked.append(rates.index(rate))
        return -abs(rates.index(rate) - best)

    assert toy_lab.climb(rates, f1) == rates[best]
    assert len(asked) == len(tried) and set(asked) == tried


def test_captions_without_statements_have_an_f1_of_0_and_count_as_collapsed(tmp_path, monkeypatch):
    """A preference loss alone may drive a captioner to silence, whose precision and F1 are not numbers."""
    silent = {**dict.fromkeys(METRICS, None), "recall": 0.0, "eos": 1.0, "repeat": 0.0}
    lab = Lab(tmp_path, 0)
    monkeypatch.setattr(lab, "split", lambda *_: ("images", "truth"))
    monkeypatch.setattr(
        lab, "judge", lambda *_, **how: {"greedy": silent, "sampled": {**silent, "f1": 0.5}}
    )
    figures = lab.judged("x")
    assert set(figures) == JUDGED and figures["greedy precision"] is None
    assert toy_lab.both_f1(figures) == 0.5 and collapsed(figures, judged(0.3))


def test_the_arms_have_folders_of_their_own():
    names = (
        [toy_lab.slug(arm) for arm in ARMS]
        + [f"{loss}-alone" for loss in BETAS]
        + ["sft", "golden"]
    )
    assert len(set(names)) == len(names) and all(
        set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names
    )


# ---------------------------------------------------------------- the experiments, at a tiny size
RUNG = "2000 steps"  # the one that is there


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Lab(out, seed) of a few scenes, a step of training a stage, and one learning rate and β -> out, and the commands."""
    split, own_tasks, measured = Lab.split, toy_base.own_tasks, toy_base.measure
    with pytest.MonkeyPatch.context() as patch, running(Here()) as here:
        for name, flags in {
            **FEW,
            "SFT": ("--max-steps", "1", "--lr", "2e-3"),
            "QA": ("--max-steps", "1", "--lr", "1e-3"),
            "DPO": ("--max-steps", "1", "--lr", "2e-3"),
        }.items():
            patch.setattr(toy_steps, name, flags)
        for module, name, value in (
            (toy_lab, "CAPTIONS", 6),
            (toy_lab, "IMAGES", 6),
            (toy_lab, "HELD_OUT", 40),
            (toy_lab, "SAMPLES", 3),
            (toy_lab, "LRS", ("1e-3",)),
            (toy_lab, "BETAS", {loss: betas[:1] for loss, betas in BETAS.items()}),
            (toy_competence, "LRS", ("1e-3",)),
            (toy_competence, "SAMPLES", 3),
            (toy_experiments, "ASKED", 40),
            (toy_experiments, "WEAK", ("--steps", "1", "--batch", "2")),
        ):
            patch.setattr(module, name, value)
        for name in ("RUNGS", "TUNING_RUNGS"):
            patch.setattr(toy_competence, name, (RUNG,))
        patch.setattr(toy_competence, "TUNED_ON", RUNG)
        patch.setattr(toy_competence, "ASKED", 6)
        patch.setattr(
            Lab, "split", lambda lab, name, n, *wants: split(lab, name, min(n, 6), *wants)
        )
        patch.setattr(toy_base, "own_tasks", functools.partial(own_tasks, n=4))
        patch.setattr(
            toy_base,
            "measure",
            lambda model, n, seed, *world: measured(model, min(n, 6), seed, *world),
        )
        patch.setattr(plumbing.weights, "gc", SimpleNamespace(collect=int))
        out = tmp_path_factory.mktemp("claims")
        (out / "ladder").mkdir()
        (out / "ladder/steps-2000").symlink_to(CODE / "assets/toy")
        yield SimpleNamespace(out=out, here=here)


def arguments_of(folder):
    return json.loads((folder / "adapters.json").read_text())["arguments"]


def three(*names):
    return {
        f"{name}, {kind}"
        for name in ("SFT", *(f"{stage} {k}" for stage in ("golden", "round") for k in (1, 2, 3)))
        for kind in names
    }


COMPLETE = set(METRICS)
GATED = ("DPO + CE", "CE")
OF_AN_ARM = {
    *(f"golden {k} by {rule}" for k in (1, 2, 3) for rule in toy_gate_rules.NAMES),
    *(f"{name} {k}" for name in ("round", "statements") for k in (1, 2, 3)),
}
SIGNS = {f"signs of {name}, DPO + CE" for name in ("SFT", "round 1", "round 2", "round 3")}


def on_the_rung(*arms):
    return {f"{arm}, {RUNG}" for arm in arms}


EXPECTED = {  # name: (its arms, keys that all of them have)
    "planted": ({"one low-resolution view", "six views", "true rate"}, {"warm", "cold"}),
    "layouts": (set(LAYOUTS), JUDGED),
    "generations": (
        {f"N = {n}, {kind}" for n in (1, 2, 4, 8, 16) for kind in ("union", "gated")}
        | {f"gate at {t}" for t in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)},
        {"precision", "recall"},
    ),
    "direct": ({"object", "mark", "background", "all"}, {"question", "statement"}),
    "gates": ({*toy_experiments.GATES, "single samples"}, COMPLETE),
    "training": ({"SFT", "golden", *ARMS}, {"sampled f1", "sampled precision"}),
    **dict.fromkeys(
        ("lottery", "other losses", "repeatable"),
        ({"SFT", *(f"{loss} alone" for loss in BETAS), "DPO + CE", SFT_FIRST}, JUDGED),
    ),
    "rounds": (three("resolved", "not"), {"sampled f1"}),
    "context": (three("short", "long"), {"sampled f1"}),
    "temperature": (
        {f"temperature {heat}" for heat in TEMPERATURES},
        {"false share", "planted", "P(yes) of false", "P(yes) of planted"},
    ),
    "prior": (
        {
            arm + base
            for base in ("", ", weak base")
            for arm in ("pool", "calibrated", "corrected", "0.5", "0.8", "0.9")
        },
        set(),
    ),
    "order": (
        {"SFT", "SFT, ordered captions", "CE on own samples, ordered", "CE on golden"},
        JUDGED,
    ),
    "forgetting": (
        {"base", "adapters", "adapters, off", "lora", "prompt", "full"},
        {"dense f1", "questions", "close-up marks"},
    ),
    "tuning": (
        on_the_rung("SFT", *SIGNS, *(f"{name}, DPO + CE" for name in OF_AN_ARM)),
        set(),
    ),
    "competence": (
        on_the_rung(
            "base",
            "QA adapter",
            "SFT",
            *SIGNS,
            *(f"{name}, {arm}" for arm in GATED for name in OF_AN_ARM),
            *(f"round {k}, CE on votes" for k in (1, 2, 3)),
        ),
        set(),
    ),
    "threshold": (
        {
            "SFT",
            *(f"golden at {least}" for least in toy_competence.CURVE),
            *(f"captioner at {least}" for least in toy_competence.DIAL),
        },
        set(),
    ),
    "soft prompt": ({"adapters and soft prompt", "adapters alone"}, JUDGED),
    "narrowing": (
        {"LLM only", "LLM and ViT"},
        {"greedy f1", "greedy precision", "cosine distance"},
    ),
}


@pytest.fixture
def measure(bench):
    """measure(name) -> the checked figures of an experiment, and the commands that it ran."""

    def run(name):
        n = len(bench.here.commands)
        part = [RUNG] if CLAIMS[name].parts != ("",) else []
        figures = json.loads(json.dumps(CLAIMS[name].measure(Lab(bench.out, 0), *part)))
        arms, keys = EXPECTED[name]
        assert set(figures) == arms and all(keys <= set(arm) for arm in figures.values())
        assert all(
            value is None or math.isfinite(value)
            for arm in figures.values()
            for value in arm.values()
        )
        conditions = CLAIMS[name].rule([figures])
        assert conditions and set(conditions) <= {True, False}
        entry = {
            "claim": "",
            "verdict": verdict([figures], CLAIMS[name].rule),
            "seeds": {"0": figures},
        }
        assert len("\n".join(table({name: entry})).splitlines()) == 5 + len(arms)
        return figures, bench.here.commands[n:]

    return run


@pytest.mark.parametrize("name", [name for name in CLAIMS if CLAIMS[name].world == "easy"])
def test_an_experiment_gives_the_figures_of_its_rule_and_is_not_run_twice(measure, name):
    figures, _ = measure(name)
    assert measure(name) == (figures, [])


# ---------------------------------------------------------------- the arms of the experiments
@pytest.fixture
def lab(bench):
    return Lab(bench.out, 0)


def test_every_arm_of_training_has_the_flags_of_its_name(measure, lab):
    figures, _ = measure("training")
    expected = {
        "CE only": ("none", 1, "sft"),
        "DPO only": ("dpo", 0, "sft"),
        "DPO + CE/2": ("dpo", 0.5, "sft"),
        "DPO + CE": ("dpo", 1, "sft"),
        "DPO + 2 CE": ("dpo", 2, "sft"),
        "SFT first, then DPO": ("dpo", 0, "sft-first-then-dpo-sft"),
    }
    assert set(expected) == set(ARMS)
    golden = str(lab.out / "golden/golden.jsonl")
    for arm, (loss, ce, start) in expected.items():
        arguments = arguments_of(lab.out / toy_lab.slug(arm))
        assert (arguments["loss"], arguments["ce"]) == (loss, ce)
        assert arguments["lr"] == figures[arm]["lr"] == 1e-3
        assert arguments["init"] == str(lab.out / start) and arguments["data"] == golden


def test_sft_first_is_sft_on_the_golden_captions_with_the_prompt_frozen(measure, lab):
    measure("training")
    start, end = lab.out / "sft", lab.out / "sft-first-then-dpo-sft"
    arguments, dpo = arguments_of(end), arguments_of(lab.out / "sft-first-then-dpo")
    assert arguments["init"] == str(start) and arguments["soft_prompt"] is False
    assert arguments["data"] == dpo["data"] == str(lab.out / "golden/golden.jsonl")
    for name in ("lr", "batch", "micro_batch", "seed", "max_steps"):
        assert arguments[name] == dpo[name], name
    before, after = (load_file(folder / "adapters.safetensors") for folder in (start, end))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    prompts = {name for name in before if "soft_prompt" in name}
    assert before.keys() == after.keys() and changed and prompts and not prompts & changed


def test_every_loss_of_the_lottery_is_alone(measure, lab):
    figures, _ = measure("lottery")
    for loss, (beta,) in toy_lab.BETAS.items():
        arguments = arguments_of(lab.out / f"{loss}-alone")
        assert (arguments["loss"], arguments["ce"], arguments["beta"]) == (loss, 0, float(beta))
        assert (
            figures[f"{loss} alone"]["beta"] == float(beta)
            and figures[f"{loss} alone"]["lr"] == arguments["lr"] == 1e-3
        )


def test_tuning_is_done_on_a_seed_of_its_own_and_once(measure, bench):
    measure("training")
    outs = [
        Path(argv[argv.index("--out") + 1])
        for script, argv in bench.here.commands
        if script == "dpo.py"
    ]
    tuned = {out.name for out in outs if out.parent.name == f"seed-{toy_lab.TUNE}"}
    assert tuned >= {f"{toy_lab.slug(arm)}-lr1e-3" for arm in ARMS} and len(set(outs)) == len(outs)
    scenes = [
        (bench.out / f"seed-{seed}/truth/held-out.jsonl").read_text() for seed in (0, toy_lab.TUNE)
    ]
    assert scenes[0] != scenes[1]


def test_a_union_of_more_samples_misses_less(measure, lab):
    figures, _ = measure("generations")
    recalls = [figures[f"N = {n}, union"]["recall"] for n in (1, 2, 4, 8, 16)]
    assert (
        recalls == sorted(recalls) and recalls[0] < recalls[-1]
    )  # the first samples are the same ones
    for n in (1, 16):
        assert {
            len(row["samples"]) for row in stages.read_rows(lab.out / f"golden-n{n}/record.jsonl")
        } == {n}


def test_the_gate_s_curve_is_counted_over_the_statements_of_the_largest_union(bench, monkeypatch):
    """Of each image a fact and another true statement, at P(yes) .95 and .2, an invention at .6; one image failed."""
    lab = Lab(bench.out, 6)
    lab.split("few", 6)
    truth, asked = (
        [row for row in toy_steps.toy_rows(lab.out / "truth/few.jsonl") if row["also_true"]],
        [],
    )
    records = [
        {
            "image": row["image"],
            "statements": [
                {"text": text, "p_yes": p}
                for text, p in (
                    (row["facts"][0]["text"], 0.95),
                    (row["also_true"][0], 0.2),
                    ("top-left cow", 0.6),
                )
            ],
        }
        for row in truth[1:]
    ]

    def golden_of(captioner, name, *flags, **how):
        folder = lab.out / name
        folder.mkdir()
        broken = {"image": truth[0]["image"], "error": "broken"}
        stages.write_rows(folder / "record.jsonl", [*records, broken] if "16" in name else [])
        asked.append(dict(zip(flags[::2], flags[1::2]))["--samples"])
        return folder, {
            "combined": dict.fromkeys(METRICS, len(asked)),
            "golden": dict.fromkeys(METRICS, 0.5),
        }

    monkeypatch.setattr(lab, "sft_model", lambda: None)
    monkeypatch.setattr(lab, "golden_of", golden_of)
    figures = toy_experiments.generations(lab)
    assert (
        asked == [1, 2, 4, 8, 16]
        and figures["N = 8, union"]["recall"] == 4
        and figures["N = 8, gated"]["recall"] == 0.5
    )
    expected = {
        0.01: (2 / 3, 1),
        0.1: (2 / 3, 1),
        0.3: (0.5, 0.5),
        0.5: (0.5, 0.5),
        0.7: (1, 0.5),
        0.9: (1, 0.5),
        0.99: (0, 0),
    }
    assert {t: tuple(figures[f"gate at {t}"].values()) for t in expected} == {
        t: pytest.approx(pair) for t, pair in expected.items()
    }


def test_every_gate_judges_the_same_samples_by_its_own_rule(measure, lab):
    figures, _ = measure("gates")
    rows = [
        stages.read_rows(lab.out / f"golden-rule-{k}/record.jsonl")
        for k in range(len(toy_experiments.GATES))
    ]
    assert all(
        [row["samples"] for row in some] == [row["samples"] for row in rows[0]] for some in rows
    )
    kept = {
        name: [{s["text"] for s in row["statements"] if s["kept"]} for row in some]
        for name, some in zip(toy_experiments.GATES, rows)
    }
    stated = [row["statements"] for row in rows[0]]
    threshold = adapters.read_card(lab.out / "qa-of-sft")["threshold"]
    assert kept["no gate"] == [{s["text"] for s in of} for of in stated]
    assert kept["vote of 2"] == [{s["text"] for s in of if s["votes"] >= 2} for of in stated]
    assert (
        kept["vote of 3"]
        == [{s["text"] for s in of if s["votes"] >= 3} for of in stated]
        != kept["vote of 2"]
    )
    assert kept["gate alone, contradictions kept"] == [
        {s["text"] for s in of if s["p_yes"] >= threshold} for of in stated
    ]
    for one, other in (
        ("gate, calibrated", "gate alone, contradictions kept"),
        ("resolving alone", "no gate"),
        ("gate and vote of 2", "vote of 2"),
    ):
        assert all(some <= more for some, more in zip(kept[one], kept[other]))
    settings = json.loads((lab.out / "golden-rule-1/settings.json").read_text())["compose"]
    assert settings["threshold"] == 0.5 and settings["resolve"] is True
    assert figures["single samples"]["recall"] < figures["no gate"]["recall"]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.94])
def test_the_share_of_true_statements_is_found_from_p_yes(share):
    """P(yes) calibrated on halves: for p, odds of true against false are p / (1 - p)."""
    rng = random.Random(0)
    p_yes = []
    for _ in range(20_000):
        x = rng.gauss(1 if rng.random() < share else -1, 1)  # log p / (1 - p) is then 2 x
        p_yes.append(1 / (1 + math.exp(-2 * x)))
    assert toy_experiments.share_of_true(p_yes) == pytest.approx(share, abs=0.02)
    assert 0 < toy_experiments.share_of_true([0.0, 0.0]) < 0.01
    assert 0.99 < toy_experiments.share_of_true([1.0, 1.0]) < 1


def test_a_corrected_threshold_is_where_the_posterior_is_that_of_the_threshold():
    assert toy_experiments.corrected(0.4, 0.5) == pytest.approx(0.4)
    assert toy_experiments.corrected(0.5, 0.9) == pytest.approx(0.1)
    assert toy_experiments.corrected(0.5, 0.2) == pytest.approx(0.8)


def test_golden_captions_by_another_threshold_are_of_the_same_samples(measure, lab):
    figures, _ = measure("prior")
    used = {}
    for folder in lab.out.glob("golden-prior*"):
        settings = json.loads((folder / "settings.json").read_text())
        used[folder.name.removeprefix("golden-prior")] = settings["compose"]["threshold"]
    for suffix, base in (("", ""), ("-weak", ", weak base")):
        assert used[suffix] == figures[f"calibrated{base}"]["threshold"]
        assert used[f"{suffix}-0.8"] == 0.8 and used[f"{suffix}-0.5"] == 0.5
        corrected = figures[f"corrected{base}"]["threshold"]
        assert used[f"{suffix}-corrected"] == pytest.approx(corrected, abs=1e-4)
    for suffix in ("", "-weak"):
        names = [f"golden-prior{suffix}", f"golden-prior{suffix}-0.9"]
        rows = [stages.read_rows(lab.out / name / "record.jsonl") for name in names]
        assert [row["samples"] for row in rows[0]] == [row["samples"] for row in rows[1]]
        kept = [s for row in rows[1] for s in row["statements"] if s["kept"]]
        assert all(s["p_yes"] >= 0.9 for s in kept)
    assert figures["pool"] != figures["pool, weak base"]
    weak = adapters.read_card(lab.out / "sft-weak")["base"]
    assert Path(weak).name == "weak-base" and adapters.read_card(lab.out / "sft")["base"] != weak


def test_at_temperature_0_there_is_one_sample(measure, lab):
    measure("temperature")
    for heat in TEMPERATURES:
        settings = json.loads((lab.out / f"golden-heat-{heat}/settings.json").read_text())["sample"]
        assert (settings["temperature"], settings["n"]) == (heat, 1 if heat == 0 else 4)


def test_the_gate_is_asked_about_false_statements_and_about_planted_ones_apart(bench, monkeypatch):
    lab = Lab(bench.out, 5)
    lab.split("few", 6)
    truth = toy_steps.toy_rows(lab.out / "truth/few.jsonl")
    lure = next(row for row in truth if row["planted"])
    records = [
        {
            "image": row["image"],
            "statements": [
                {"text": row["facts"][0]["text"], "p_yes": 0.9},
                {"text": "top-left cow", "p_yes": 0.2},
                *({"text": text, "p_yes": 0.8} for text in row["also_true"]),
            ],
        }
        for row in truth
    ]
    planted = {"text": lure["planted"][0]["text"], "p_yes": 0.6}
    records[truth.index(lure)]["statements"].append(planted)
    stages.write_rows(lab.out / "record.jsonl", records)
    monkeypatch.setattr(toy_experiments, "TEMPERATURES", (1,))
    monkeypatch.setattr(lab, "sft_model", lambda: None)
    monkeypatch.setattr(
        lab,
        "golden_of",
        lambda *_, **how: (lab.out, {"sample": {"precision": 0.7, "planted": 0.1}}),
    )
    assert toy_experiments.temperature(lab) == {
        "temperature 1": {
            "false share": pytest.approx(0.3),
            "planted": 0.1,
            "P(yes) of false": pytest.approx(0.2),
            "P(yes) of planted": 0.6,
        }
    }


def test_direct_questions_are_counted_over_true_ones_and_near_misses(measure, bench, monkeypatch):
    measure("soft prompt")  # an SFT model is there
    lab = Lab(bench.out, 0)
    asked = {
        "object": [0.9, 6],
        "center": [0.9, 4],
        "wrong color": [0.5, 20],
        "wrong shape": [0.0, 5],
        "wrong place": [1.0, 5],
        "mark": [0.5, 2],
        "wrong mark": [1.0, 6],
        "background": [1.0, 3],
        "wrong background": [0.75, 4],
        "part": [0.0, 99],
    }
    kinds = {
        "object": (0.8, 30),
        "mark": (0.7, 10),
        "background": (0.6, 5),
        "center": (0.5, 10),
        "other": (0.0, 7),
    }
    monkeypatch.setattr(toy_experiments, "ASKED", 1)
    monkeypatch.setattr(toy_base, "question_report", lambda *_: asked)
    monkeypatch.setattr(
        lab,
        "golden_of",
        lambda *_: (
            None,
            {
                "sample": {
                    "categories": {
                        kind: {"precision": share, "n": n} for kind, (share, n) in kinds.items()
                    }
                }
            },
        ),
    )
    shares = {kind: tuple(pair.values()) for kind, pair in toy_experiments.direct(lab).items()}
    assert shares == {
        "object": pytest.approx(((9 + 10 + 0 + 5) / 40, (24 + 5) / 40)),
        "mark": pytest.approx((7 / 8, 0.7)),
        "background": pytest.approx((6 / 7, 0.6)),
        "all": pytest.approx(((24 + 7 + 6) / (40 + 8 + 7), (24 + 7 + 3 + 5) / 55)),
    }


def test_ordered_captions_have_the_same_statements_in_canonical_order(measure, lab):
    measure("order")
    train, places = lab.out / "data/train", ["background", *world.PLACES, "center"]
    pairs = list(
        zip(
            *(stages.read_rows(train / f"{name}.jsonl") for name in ("captions", "ordered")),
            strict=True,
        )
    )
    for row, ordered in pairs:
        texts = [text.split() for text in world.statements(ordered["caption"])]
        assert row["image"] == ordered["image"] and sorted(map(" ".join, texts)) == sorted(
            world.statements(row["caption"])
        )
        order = [
            (places.index(words[0]), -len(words)) for words in texts
        ]  # an object, then its mark
        assert order == sorted(order)
    assert any(row != ordered for row, ordered in pairs)
    assert arguments_of(lab.out / "sft-ordered")["data"] == str(train / "ordered.jsonl")
    own, golden = (
        toy_steps.toy_rows(lab.out / name) for name in ("own/golden.jsonl", "golden/record.jsonl")
    )
    samples = {row["image"]: row["samples"][0]["caption"] for row in golden}
    assert len(own) == sum(bool(world.statements(caption)) for caption in samples.values())
    for row in own:
        assert set(world.statements(row["chosen"])) == set(world.statements(samples[row["image"]]))
    assert own and arguments_of(lab.out / "ce-own-ordered")["loss"] == "none"


def test_captions_are_put_in_order_whatever_they_say():
    caption = "top-left stripes, red ring, center blue ring, top-left red circle, top-left stripes, background gray"
    assert toy_experiments.in_order(caption) == (
        "background gray, top-left red circle, top-left stripes, center blue ring, red ring"
    )


def test_a_short_context_is_the_same_base_with_less_room(measure, lab):
    measure("context")
    short, long = (adapters.read_card(lab.out / name) for name in ("sft-short", "sft"))
    assert (
        short["fingerprint"] == long["fingerprint"]
        and Path(short["base"]) == lab.out / "short-base"
    )
    config, usual = (
        json.loads((Path(card["base"]) / "config.json").read_text()) for card in (short, long)
    )
    assert {**usual, "seq_length": toy_experiments.SHORT} == config
    for k, long in enumerate(("dpo--ce", "round-2", "round-3"), 1):
        assert (
            Path(adapters.read_card(lab.out / f"round-{k}-short")["base"]) == lab.out / "short-base"
        )
        assert Path(adapters.read_card(lab.out / long)["base"]) == CODE / "assets/toy"
    toy_experiments.context(lab)
    assert lab.base == CODE / "assets/toy"  # as before


def test_each_of_three_rounds_starts_where_the_one_before_ended(measure, lab):
    measure("rounds")
    first, golden = (
        {"": "dpo--ce", "--no-resolve": "round-1--no-resolve"},
        {"": "golden", "--no-resolve": "golden-round-1--no-resolve"},
    )
    for end, resolves in (("", True), ("--no-resolve", False)):
        captioners = ["sft", first[end], f"round-2{end}", f"round-3{end}"]
        for k, (start, name) in enumerate(itertools.pairwise(captioners), 1):
            arguments, pool = (
                arguments_of(lab.out / name),
                golden[end] if k == 1 else f"golden-round-{k}{end}",
            )
            assert arguments["init"] == str(lab.out / start)
            assert arguments["data"] == str(lab.out / pool / "golden.jsonl")
            settings = json.loads((lab.out / pool / "settings.json").read_text())["compose"]
            assert settings["resolve"] is resolves and settings["images"] == f"../data/images-{k}"
            assert settings["captioner"] == adapters.folder_hash(lab.out / start)


def test_other_views_reach_the_model_and_only_there(bench, monkeypatch):
    """Views in a forward of the vision tower, by layout: of 4 images in a step, 1 held out, 6 captioned."""
    lab, counts = Lab(bench.out, 4), []
    sft_model = lab.sft_model

    def counted_sft_model(*arguments):
        counts.append(set())
        return sft_model(*arguments)

    def count(module, inputs):
        if isinstance(module, torch.nn.Conv2d):
            counts[-1].add(len(inputs[0]))

    monkeypatch.setattr(lab, "sft_model", counted_sft_model)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        figures = toy_experiments.layouts(lab)
    finally:
        hook.remove()
    assert list(figures) == list(LAYOUTS)
    assert counts == [{4 * n, n, 6 * n} for n in (1, 5, 6, 6)]
    trained = [
        load_file(lab.out / name / "adapters.safetensors") for name in ("sft", "sft-views-six-wide")
    ]  # six views both
    assert not all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    boxes = [adapters.views_of(lab.out / name) for name in ("sft-views-one", "sft-views-five")]
    assert boxes == [chunking.LAYOUTS["one"], chunking.LAYOUTS["five"]]
    assert adapters.views_of(lab.out / "sft") == chunking.BOXES
    commands = [argv for script, argv in bench.here.commands if script != "sft.py"]
    assert not any("--views" in argv for argv in commands)


def test_full_tuning_lora_and_a_prompt_alone_are_judged_as_they_are(measure, lab):
    figures, _ = measure("forgetting")
    assert figures["adapters, off"] == figures["base"] and "caption f1" not in figures["base"]
    assert all("caption f1" in figures[tune] for tune in ("adapters", "lora", "prompt", "full"))
    cards = {
        tune: adapters.read_card(lab.out / f"sft-{tune}") for tune in ("adapters", "lora", "prompt")
    }
    assert {
        tune: (card["kind"], card["where"], card["soft_prompt"]) for tune, card in cards.items()
    } == {
        "adapters": ("adapter", ["vision", "language"], True),
        "lora": ("lora", ["vision", "language"], True),
        "prompt": ("adapter", [], True),
    }
    assert all(
        card["arguments"]["lr"] == figures[tune]["lr"] == 1e-3 for tune, card in cards.items()
    )
    assert (lab.out.parent / f"seed-{toy_lab.TUNE}/sft-lora-lr1e-3/adapters.json").is_file()
    stored = load_file(lab.out / "sft-full/model.safetensors")
    base = load_file(CODE / "assets/toy/model.safetensors")
    assert stored.keys() == base.keys() and not all(
        torch.equal(stored[name], base[name]) for name in base
    )


def test_adapters_that_are_switched_off_leave_the_base_alone(measure, lab, monkeypatch):
    measure("forgetting")
    seen = []
    monkeypatch.setattr(
        toy_base,
        "own_tasks",
        lambda model, seed: (
            seen.append({name for slot in adapters.all_slots(model) for name in slot.stack}),
            {},
        )[1],
    )
    toy_experiments.forgetting(lab)
    assert seen == [
        set(),
        {"caption"},
        set(),
        {"caption"},
        {"caption"},
        set(),
    ]  # base, adapters on and off, lora, prompt, full


def test_a_full_tuning_cut_short_while_it_is_written_is_done_again(measure, lab):
    """config.json is written first and the weights last, so that the weights alone mark a whole folder."""
    figures, _ = measure("forgetting")
    (lab.out / "sft-full/model.safetensors").unlink()
    assert (lab.out / "sft-full/config.json").is_file()
    again, commands = measure("forgetting")
    assert again == figures and [script for script, _ in commands] == ["sft.py"]


def test_no_soft_prompt_is_saved_without_one(measure, lab):
    measure("soft prompt")
    assert [
        adapters.read_card(lab.out / name)["soft_prompt"] for name in ("sft", "sft-no-prompt")
    ] == [True, False]


def test_qa_adapters_of_the_vit_stay_on_for_captioning_if_there_are_any(measure, lab):
    figures, _ = measure("narrowing")
    assert [
        adapters.read_card(lab.out / f"qa-of-sft{more}")["where"] for more in ("", "--vision")
    ] == [["language"], ["vision", "language"]]
    alone = lab.judged("sft")  # QA adapters of the language model alone are off
    assert figures["LLM only"]["greedy f1"] == pytest.approx(alone["greedy f1"])
    assert figures["LLM only"]["greedy precision"] == pytest.approx(alone["greedy precision"])
    assert figures["LLM only"]["cosine distance"] != figures["LLM and ViT"]["cosine distance"]
    assert 0 < figures["LLM only"]["cosine distance"] < 2


def test_the_inventions_of_the_base_are_those_of_the_report(measure, capsys):
    figures, _ = measure("planted")
    assert figures["true rate"] == {"warm": 0.85, "cold": 0.15}
    capsys.readouterr()
    assert toy.main(["report", "--base", str(CODE / "assets/toy"), "--scenes", "6"]) == 0
    printed = capsys.readouterr().out.splitlines()
    for name in ("one low-resolution view", "six views"):
        (line,) = [line for line in printed if line.startswith(f"{name}, mark invented on: ")]
        assert figures[name] == {
            group: share for group, (share, _) in json.loads(line.split(": ", 1)[1]).items()
        }


def test_the_output_of_the_scripts_goes_to_a_log_per_seed(measure, lab, bench):
    measure("soft prompt")
    log = (bench.out / "seed-0.log").read_text()
    assert f"wrote {lab.out}/sft-no-prompt" in log and "parameters train" in log
