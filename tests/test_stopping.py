"""toy_world/stopping.py: which round to keep, from figures that need no truth."""

import pytest

from toy_world import stopping
from toy_world.stopping import CAPTIONERS


def row(*statements, samples=1):
    keys = ("p_yes", "votes", "kept")
    return {
        "samples": [{}] * samples,
        "statements": [dict(zip(keys, statement)) for statement in statements],
    }


def test_signs_are_means_over_statements_and_sums_per_image():
    greedy = [row((0.9, 1, True), (0.5, 1, False)), row()]
    sampled = [row((0.8, 2, True), (0.4, 1, False), samples=2), row((1.0, 2, True), samples=2)]
    assert stopping.signs_of(greedy, sampled) == {
        "P(yes)": pytest.approx(0.7),
        "share kept": pytest.approx(2 / 3),
        "agreement": pytest.approx(5 / 3 / 2),
        "stated": 1.0,
        "believed": pytest.approx(0.7),
        "sampled stated": pytest.approx(5 / 4),
        "sampled believed": pytest.approx((1.6 + 0.4 + 2) / 4),
        "kept": 1.0,
    }


def test_believed_f1_is_f1_where_p_yes_is_the_truth():
    """Five statements of which four are true, six facts: 2 · 4 / (5 + 6)."""
    signs = {"stated": 5, "believed": 4, "sampled stated": 3, "sampled believed": 3}
    assert stopping.believed_f1(signs, 6) == pytest.approx(8 / 11 + 6 / 9)


def captioner(believed, stated, kept=6, **more):
    signs = {"believed": believed, "stated": stated, "kept": kept, "P(yes)": believed / stated}
    return signs | {"sampled believed": believed, "sampled stated": stated} | more


def signs():
    return {
        "SFT": captioner(3.3, 3.4, agreement=0.3, **{"share kept": 0.6}),
        "round 1": captioner(5, 5.6, agreement=0.5, **{"share kept": 0.7}),
        "round 2": captioner(5.4, 5.8, agreement=0.6, **{"share kept": 0.8}),
        "round 3": captioner(5.3, 5.9, agreement=0.7, **{"share kept": 0.75}),
    }


LOSSES = {"round 1": 0.4, "round 2": 0.3, "round 3": 0.2}


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("believed F1", "round 2"),
        ("P(yes)", "SFT"),
        ("share kept", "round 2"),
        ("agreement", "round 3"),
        ("held-out loss", "round 3"),
        ("always round 1", "round 1"),
    ],
)
def test_a_rule_chooses_by_its_own_figure(rule, expected):
    assert stopping.choice(rule, signs(), LOSSES) == expected


def test_a_regret_is_what_a_choice_lacks_to_the_best():
    f1s = dict(zip(CAPTIONERS, (0.6, 0.8, 0.9, 0.85)))
    figures = {}
    for name, f1 in f1s.items():
        key = name if name == "SFT" else f"{name}, CE"
        figures[f"{key}, 9 steps"] = {
            "greedy f1": f1,
            "sampled f1": f1,
            "held-out loss": LOSSES.get(name),
        }
        figures[f"signs of {name}, CE, 9 steps"] = signs()[name]
    regrets = stopping.regrets(figures, "CE", "9 steps")
    assert set(regrets) == set(stopping.RULES)
    assert regrets["believed F1"] == 0 and regrets["P(yes)"] == pytest.approx(0.6)
    assert regrets["agreement"] == pytest.approx(0.1) == regrets["always round 3"]
