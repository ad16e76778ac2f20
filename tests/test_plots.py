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
    assert shown == set(plots.PLOTS) == {path.stem for path in (CODE / "assets/claims").iterdir()}


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
