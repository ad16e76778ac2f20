"""bench.py --against: other people's code computes the same thing, and each side is measured."""

import json
import math

import pytest

import bench

pytest.importorskip("torchvision")
SMALL = ["--rounds", "1", "--threads", "1", "--hidden", "128", "--layers", "2"]


def figures(tmp_path, against):
    out = tmp_path / "figures.json"
    argv = ["--against", against, *SMALL, "--image-tokens", "16", "--json", str(out)]
    assert bench.main(argv) == 0
    result = json.loads(out.read_text())
    assert result["command"].startswith(f"python bench.py --against {against}")
    assert result["hardware"]["threads"] == 1 and result["versions"]["torch"]
    rows = result["figures"]["16"]
    for row in rows.values():
        assert row["megabytes"] > 0 and all(s > 0 for s in row["seconds"].values())
    return rows


def test_trl_and_we_compute_the_same_loss(tmp_path, capsys):
    for package in bench.NEEDED["trl"]:
        pytest.importorskip(package)
    rows = figures(tmp_path, "trl")
    losses = [row["loss"] for row in rows.values()]
    assert len(losses) == 4 and losses == pytest.approx([losses[0]] * 4, abs=1e-4)
    assert losses[0] == pytest.approx(math.log(2) + math.log(4096), abs=0.5)
    sizes = [row["trained"] for row in rows.values()]
    assert sizes == pytest.approx([sizes[0]] * 4, rel=0.5)  # a rank is a whole number
    # packed shares the prefix; two rows repeat it, and one predicts nothing from its last token
    assert rows["two rows"]["tokens"] == rows["trl"]["tokens"] - 2
    assert rows["packed"]["tokens"] < rows["two rows"]["tokens"]
    assert set(rows["packed"]["seconds"]) == {"reference", "step"}
    assert set(rows["trl"]["seconds"]) == {"step"}
    assert "trl / packed" in capsys.readouterr().out


def test_generate_gets_the_same_prompt(tmp_path):
    rows = figures(tmp_path, "generate")
    assert rows["one prefix"]["tokens"] == rows["generate"]["tokens"] > 16 + bench.PEER_PROMPT


def test_a_missing_package_is_named_in_one_line(monkeypatch, capsys):
    spec = {"peft": None}
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: spec.get(name, name))
    assert bench.main(["--against", "trl"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install peft" in error


def test_json_is_of_against():
    with pytest.raises(SystemExit):
        bench.main(["--json", "out.json"])
