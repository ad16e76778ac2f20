"""toy_world/gate_rules.py: what rules of the gate keep of stored pools, and what they look at."""

import math
import random

import pytest

from plumbing import scoring
from toy_world import gate_rules


def statement(p_yes, votes=1, group=None, true=True, fact=True):
    return {"p_yes": p_yes, "votes": votes, "group": group, "true": true, "fact": fact and true}


def image(*statements, facts=4):
    return {"facts": facts, "statements": list(statements)}


def values(pool):
    return [s["p_yes"] for s in gate_rules.statements_of(pool)]


TRUTH = [
    {
        "image": "a.png",
        "facts": [{"text": "top-left red ring"}, {"text": "background gray"}],
        "also_true": ["background"],
    }
]


def test_a_pool_keeps_what_rules_need_and_the_truth(tmp_path):
    texts = ["top-left red ring", "top-left blue ring", "Background"]
    rows = [
        {
            "image": "a.png",
            "statements": [
                {"text": text, "p_yes": 0.5, "votes": k, "group": "g", "kept": True}
                for k, text in enumerate(texts, 1)
            ],
        }
    ]
    gate_rules.write_pool(tmp_path / "pools/x.jsonl", rows, TRUTH)
    (pool,) = gate_rules.read_pool(tmp_path / "pools/x.jsonl")
    assert pool["facts"] == 2
    assert [(s["votes"], s["true"], s["fact"]) for s in pool["statements"]] == [
        (1, True, True),
        (2, False, False),
        (3, True, False),
    ]
    figures = gate_rules.scores([pool], [[True] * 3])
    caption = [{"image": "a.png", "caption": ", ".join(texts)}]
    expected = scoring.score(caption, TRUTH)
    assert figures == {name: pytest.approx(expected[name]) for name in figures}
    assert 0 < figures["recall"] < 1 and 0 < figures["precision"] < 1


def test_of_a_group_the_best_passing_statement_is_kept():
    statements = [statement(0.6, group="a"), statement(0.9, group="a"), statement(0.7)]
    best = gate_rules.best_of_groups
    assert best(statements, [1, 2, 0], [True] * 3) == [False, True, True]
    assert best(statements, [2, 2, 0], [True] * 3) == [True, False, True]
    assert best(statements, [1, 2, 0], [True, False, False]) == [True, False, False]


def test_a_winner_without_half_of_its_group_is_not_kept():
    pool = [
        image(*(statement(p, group="shape") for p in (0.63, 0.62, 0.59)), statement(0.6)),
        image(statement(0.9, group="shape"), statement(0.8, group="shape")),
        image(statement(0.4, group="shape"), statement(0.3, group="shape")),
    ]
    kept = gate_rules.kept_above(pool, values(pool), 0.5, share=True)
    assert kept == [[False, False, False, True], [True, False], [False, False]]
    assert gate_rules.kept_above(pool, values(pool), 0.5)[0] == [True, False, False, True]


def test_the_aim_is_what_the_model_believes_of_what_its_samples_agree_on():
    pool = [image(statement(0.9, votes=6), statement(0.8, votes=3), statement(0.1, votes=2))]
    assert gate_rules.aim(pool) == pytest.approx(0.85)
    least = gate_rules.threshold_that_reaches(pool, 0.85, share=False)
    assert least == pytest.approx(0.11)
    assert gate_rules.threshold_that_reaches(pool, 0.1, share=False) == 0
    assert gate_rules.threshold_that_reaches(pool, 0.999, share=False) > 0.9


def drawn(n=4000, share=0.7, seed=0):
    """Statements whose P(yes) is right for halves, and whose votes are independent of it."""
    rng, statements = random.Random(seed), []
    for _ in range(n):
        true = rng.random() < share
        x = rng.gauss(1 if true else -1, 1)  # log p / (1 - p) is then 2 x
        votes = sum(rng.random() < (0.6 if true else 0.2) for _ in range(5)) + 1
        statements.append(statement(1 / (1 + math.exp(-2 * x)), votes, true=true))
    return [image(*statements)]


def test_posteriors_of_p_yes_and_votes_are_those_of_bayes():
    pool = drawn()
    found = gate_rules.posteriors(pool)
    errors, errors_without_votes = [], []
    for s, p in zip(gate_rules.statements_of(pool), found):
        hits = s["votes"] - 1
        odds = 0.7 / 0.3 * s["p_yes"] / (1 - s["p_yes"])
        errors_without_votes.append(abs(p - odds / (1 + odds)))
        odds *= (0.6**hits * 0.4 ** (5 - hits)) / (0.2**hits * 0.8 ** (5 - hits))
        errors.append(abs(p - odds / (1 + odds)))
    assert sum(errors) / len(errors) < 0.01
    assert sum(errors_without_votes) / len(errors) > 0.03
    figures = dict(gate_rules.by_all_rules(pool, {"F1": 0.5, "F.5": 0.6}))
    assert figures["posterior"]["f1"] > figures["F1"]["f1"] > figures["union"]["f1"]
    assert figures["posterior"]["f1"] > figures["vote of 2"]["f1"]


def test_every_rule_gives_figures_also_of_a_pool_where_all_is_true():
    pool = [image(statement(1.0, votes=6), statement(0.9999, votes=1), facts=2)]
    for rule, figures in gate_rules.by_all_rules(pool, {"F1": 0.5, "F.5": 0.6}):
        assert math.isfinite(figures["f1"]) or figures["recall"] == 0, rule


def test_separation_is_of_true_and_false_ones_apart():
    pool = [
        image(
            statement(0.9), statement(0.3), statement(0.6, true=False), statement(0.1, true=False)
        )
    ]
    figures = gate_rules.separation(pool, 0.5)
    assert (figures["share of true"], figures["true accepted"], figures["false refused"]) == (
        0.5,
        0.5,
        0.5,
    )
    assert figures["auroc"] == pytest.approx(0.75) and figures["votes auroc"] == 0.5
