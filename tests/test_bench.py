"""bench.py: the rows of its table are measured against the right limits, and in --against other
people's code computes the same thing."""

import json
import math

import pytest
import torch

import bench
from model import QwenVL
from plumbing import int8, speed, weights
from toy_world import busy

CPU = torch.device("cpu")
CONFIG, LENGTHS = bench.SIZES["toy"]
STEPS = LENGTHS.decoded - 1


# ---------------------------------------------------------------- the table
@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """What the toy size writes as JSON, and what it prints."""
    out = tmp_path_factory.mktemp("bench") / "table.json"
    capture = pytest.MonkeyPatch()
    lines = []
    capture.setattr(speed, "SIDE", {"cpu": 256})
    capture.setattr("builtins.print", lambda *args, **_: lines.extend(str(args[0]).split("\n")))
    try:
        assert (
            bench.main(
                [
                    "--size",
                    "toy",
                    "--no-compile",
                    "--rounds",
                    "1",
                    "--threads",
                    "1",
                    "--json",
                    str(out),
                ]
            )
            == 0
        )
    finally:
        capture.undo()
    return json.loads(out.read_text()), lines


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return QwenVL(CONFIG)


def language_weights(model):
    layers = [m for m in model.transformer.h.modules() if isinstance(m, torch.nn.Linear)]
    return [layer.weight for layer in [*layers, model.lm_head]]


def test_every_row_is_measured_and_the_table_shows_what_the_json_holds(table):
    result, lines = table
    assert list(result["rows"]) == list(bench.ROWS)
    assert result["bandwidth"] > 1e8 and result["rate"] > 1e9 and result["versions"]["torch"]
    assert result["hardware"]["threads"] == 1 and result["command"].startswith("python bench.py")
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines if "|" in line}
    for name, row in result["rows"].items():
        assert min(row["seconds"], row["rival_seconds"], row["megabytes"] + 1) > 0
        assert row["times"] == pytest.approx(row["rival_seconds"] / row["seconds"])
        assert ("bare_seconds" in row) == (name not in ("pairs", "reference"))
        assert ("floor_seconds" in row) == (name != "captions")
        assert float(cells[name][1]) == pytest.approx(row["seconds"], abs=6e-4)
        assert float(cells[name][3]) == pytest.approx(row["times"], abs=6e-3)
        for share, seconds in (("of_bare", "bare_seconds"), ("of_floor", "floor_seconds")):
            assert row.get(share, 0) * row["seconds"] == pytest.approx(row.get(seconds, 0))


def test_a_decode_step_has_to_read_the_weights_of_the_language_model(table, model):
    numbers = sum(weight.numel() for weight in language_weights(model))
    rows, scales = table[0]["rows"], sum(len(weight) for weight in language_weights(model))
    assert rows["decode"]["bytes_read"] == STEPS * numbers * 4
    assert rows["int8"]["bytes_read"] == STEPS * (numbers + 4 * scales)
    floor = rows["decode"]["bytes_read"] / table[0]["bandwidth"]
    assert rows["decode"]["floor_seconds"] == pytest.approx(floor)


def test_operations_are_those_of_products_with_weights(table, model):
    *blocks, head = [weight.numel() for weight in language_weights(model)]
    n, rows = 42, table[0]["rows"]  # tokens of the toy's prompt
    prefill = 2 * (sum(blocks) * n + head)
    assert rows["prefill"]["operations"] == prefill
    # the prompt, once, and with it the views
    assert rows["samples"]["operations"] == prefill + rows["vit"]["operations"]
    assert rows["pairs"]["operations"] == rows["reference"]["operations"]
    # forward, forward again, gradients of activations, though of none below the first adapter;
    # and what adapters add
    packed = 2 * (sum(blocks) * (n + 2 * LENGTHS.caption - 2) + head * 2 * LENGTHS.caption)
    assert 0.9 < rows["pairs"]["operations"] / (3 * (packed + rows["vit"]["operations"])) < 1.25


def test_both_sides_of_a_pair_have_the_same_loss(table):
    row = table[0]["rows"]["pairs"]
    assert row["loss"][0] == pytest.approx(row["loss"][1], abs=1e-5)
    assert row["logits_megabytes"] == 2 * LENGTHS.caption * CONFIG.vocab_size * 4 / 1e6


def test_slots_that_are_filled_again_take_fewer_steps():
    model, steps = bench.open_base(busy.TOY), {}
    for kind, at_once in ((busy.Even, 20), (busy.Uneven, 20), (busy.Waiting, busy.SLOTS)):
        steps[kind] = 0

        class Counted(kind):
            def step(self, kind=kind):
                steps[kind] += 1
                return super().step()

        busy.caption_all(model, 20, 4, Counted, at_once)
    assert steps[busy.Even] < steps[busy.Uneven] < steps[busy.Waiting]


# ---------------------------------------------------------------- how it is measured
def test_contestants_take_turns_and_the_warm_up_does_not_count():
    turns, kept = [], []
    seconds = {"ours": iter([9, 1, 5, 2]), "rival": iter([9, 4, 4, 4])}

    def run(name):
        turns.append(name)
        kept[:] = [torch.ones(2**24)] if name == "ours" else []
        return next(seconds[name])

    figures = speed.in_turn({name: lambda name=name: run(name) for name in seconds}, 3, CPU)
    assert turns == ["ours", "rival"] * 4
    assert figures["ours"]["rounds"] == [1, 5, 2] and figures["ours"]["seconds"] == 2
    assert figures["ours"]["bytes"] >= 2**26 > figures["rival"]["bytes"] + 2**25


def test_limits_count_reading_and_writing_and_two_operations_a_product(monkeypatch):
    monkeypatch.setattr(speed, "COPIED", {"cpu": 1000})
    monkeypatch.setattr(speed, "SIDE", {"cpu": 10})
    monkeypatch.setattr(speed, "seconds_of", lambda device, run: 0.5)
    assert speed.copy_bandwidth(CPU) == 2 * 1000 / 0.5
    assert speed.matrix_rate(CPU, torch.float32) == 2 * 10**3 / 0.5


@pytest.mark.parametrize("quantize", [False, True])
def test_bare_products_are_those_that_a_run_makes(quantize):
    block = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4, bias=False))
    layers = torch.nn.ModuleList([block])
    if quantize:
        int8.replace(layers, [])
        speed.fill_randomly(layers, torch.float32, CPU)
    calls = speed.linear_calls(layers, lambda: layers[0](torch.zeros(2, 3, 8)))
    assert [(layer.out_features, rows) for layer, rows in calls] == [(16, 6), (4, 6)]
    numbers = 8 * 16 + 16 * 4
    assert speed.weight_bytes(calls) == (numbers + 4 * (16 + 4) if quantize else 4 * numbers)
    assert speed.operations_of(speed.Bare(calls * 3)) == 3 * 2 * 6 * numbers


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_random_weights_are_made_in_their_dtype(quantize, monkeypatch):
    args = bench.parse_args(["--size", "toy"])
    model = bench.open_model(args, torch.bfloat16, CPU, quantize)
    kinds = {t.dtype for t in (*model.parameters(), *model.buffers())}
    assert kinds == ({torch.bfloat16, torch.int8} if quantize else {torch.bfloat16})
    layer = model.transformer.h[0].mlp.w1
    weight = layer.weight.float() * (layer.scale.float()[:, None] if quantize else 1)
    assert weight.std().item() == pytest.approx(speed.WEIGHT, rel=0.05)
    assert bool((model.transformer.ln_f.weight == 1).all())


def test_a_size_that_does_not_fit_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(weights, "free_bytes", lambda device: 10**9)
    assert bench.main(["--size", "full", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "38.6 GB" in error and "1.0 GB are free" in error


def test_a_row_that_fails_is_named_and_the_others_are_measured(monkeypatch, capsys):
    monkeypatch.setattr(speed, "SIDE", {"cpu": 256})
    argv = ["--size", "toy", "--rounds", "1", "--quantize", "int8", "--only", "int8", "prefill"]
    assert bench.main(argv) == 1
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and "int8:" in error and "| prefill" in out


@pytest.mark.parametrize(
    "argv",
    [
        "--hidden 64",
        "--against trl --only pairs",
        "--size toy --base assets/toy",
        "--images x",
        "--only x",
    ],
)
def test_flags_that_would_do_nothing_are_refused(argv):
    with pytest.raises(SystemExit):
        bench.parse_args(argv.split())


# ---------------------------------------------------------------- next to other people's code
SMALL = ["--rounds", "1", "--threads", "1", "--hidden", "128", "--layers", "2", "--device", "cpu"]


def figures(tmp_path, against):
    pytest.importorskip("torchvision")
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
    for package in ("trl", "peft", "accelerate", "datasets"):
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
    assert rows["one prefix"]["tokens"] == rows["generate"]["tokens"] > 16 + 20  # the request


def test_a_missing_package_is_named_in_one_line(monkeypatch, capsys):
    peers = pytest.importorskip("plumbing.peers")
    spec = {"peft": None}
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: spec.get(name, name))
    assert bench.main(["--against", "trl"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install peft" in error
