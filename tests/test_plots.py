"""toy_world/plots.py: a picture of each claim that has one, also where an arm lacks a figure."""

import json
import re

import pytest

from toy_world import plots
from toy_world.steps import CODE

pytest.importorskip("matplotlib", reason="a development dependency")
RESULTS = json.loads((CODE / "results/claims.json").read_text("utf-8"))


def test_every_claim_with_a_plot_gets_a_picture(tmp_path):
    assert plots.main(["--out", str(tmp_path), "--results", str(CODE / "results/claims.json")]) == 0
    expected = {f"{name}.png" for name in plots.PLOTS if name in RESULTS}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.iterdir())


def test_every_picture_is_shown_in_the_documentation():
    page = (CODE / "docs/claims.md").read_text("utf-8")
    shown = set(re.findall(r'src="\.\./assets/claims/(\w+)\.png"', page))
    measured = {name for name in plots.PLOTS if name in RESULTS}
    assert shown == measured == {path.stem for path in (CODE / "assets/claims").iterdir()}


def test_an_arm_without_a_figure_is_left_out(tmp_path):
    results = {name: RESULTS[name] for name in ("layouts", "temperature")}
    for figures in results["layouts"]["seeds"].values():
        for arm in figures.values():
            arm["sampled precision"] = None
    for figures in results["temperature"]["seeds"].values():
        figures["temperature 1"]["false share"] = None
    (tmp_path / "some.json").write_text(json.dumps(results))
    assert (
        plots.main(["--out", str(tmp_path / "plots"), "--results", str(tmp_path / "some.json")])
        == 0
    )
    assert len(list((tmp_path / "plots").iterdir())) == 2


def drawn(name, seeds):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots()
    plots.PLOTS[name]({"seeds": seeds}, axes)
    pyplot.close(figure)
    return axes


def test_the_curve_has_a_point_for_each_base_ordered_by_its_answers():
    seeds = {}
    for seed in "01":
        seeds[seed] = {}
        for rung, near_misses, f1 in (("9 steps", 0.99, 0.9), ("5 steps", 0.8, 0.5)):
            seeds[seed][f"QA adapter, {rung}"] = {"near misses": near_misses}
            seeds[seed][f"SFT, {rung}"] = {"greedy f1": f1}
            seeds[seed][f"round 2, DPO + CE, {rung}"] = {"greedy f1": f1 + 0.05 * int(seed)}
    del seeds["1"]["SFT, 5 steps"]  # a seed that has not got there yet
    axes = drawn("competence", seeds)
    lines = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
    assert lines["SFT"] == [[0.8, 0.5], [0.99, 0.9]]
    assert lines["DPO + CE, round 2"] == [[0.8, pytest.approx(0.525)], [0.99, pytest.approx(0.925)]]
    assert lines["CE, round 2"] == []


def test_the_dial_is_a_curve_from_recall_to_precision():
    point = {"precision": 0.9, "recall": 0.7}
    judged = {f"{way} {metric}": x for way in ("greedy", "sampled") for metric, x in point.items()}
    figures = {
        "SFT": judged,
        "golden at 0": {"precision": 0.5, "recall": 0.9},
        "golden at 0.9": point,
    }
    axes = drawn("threshold", {"0": figures | {"captioner at 0.9": judged}})
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["golden captions"] == [[0.9, 0.5], [0.7, 0.9]]
    assert lines["captioner, greedy"] == lines["SFT, sampled"] == [[0.7, 0.9]]
    assert [text.get_text() for text in axes.texts] == ["0", "0.9", "0.9", "0.9"]


@pytest.mark.parametrize("text", [None, "{"])
def test_results_that_cannot_be_read_are_one_line(tmp_path, capsys, text):
    path = tmp_path / "claims.json"
    if text is not None:
        path.write_text(text)
    assert plots.main(["--results", str(path), "--out", str(tmp_path / "plots")]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith(f"toy_world.plots: {path}: ")
        and error.count("\n") == 1
        and not (tmp_path / "plots").exists()
    )
