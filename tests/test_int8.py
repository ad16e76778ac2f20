"""--quantize int8: the numbers against float64, both kinds of base, every stage from its command line."""

import gc
import json
import signal
from unittest import mock

import families
import pytest
import stages
import torch
from PIL import Image
from stages import read_rows, run, write_data, write_rows

import adapters
import caption
import dpo
import golden
import plumbing.data
import qa_adapter
import sft
import toy
from base import open_base
from chunking import square
from generate import sample, yes_probability
from model import Config, QwenVL
from plumbing import int8, weights
from plumbing.errors import InputError
from toy_world import world

# gemma3: embeddings of its own kind, tied to the output layer; lfm2_vl: tied only once they are loaded
KINDS = ("qwen_vl", "qwen3_vl", "gemma3", "lfm2_vl")


@pytest.fixture(scope="module")
def bases(tiny_base, tmp_path_factory):
    made = {"qwen_vl": tiny_base}

    def base(kind):
        if kind not in made:
            made[kind] = families.make_usable(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return base


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), 8)


def picture(model, seed=0):
    noise = torch.rand(model.image_size, model.image_size, 3, generator=torch.manual_seed(seed))
    return Image.fromarray((noise * 255).byte().numpy())


def shaken(model, **how):
    torch.manual_seed(0)
    adapters.attach(model, "caption", reduction=4, **how)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
    return model


# ---------------------------------------------------------------- the numbers
def test_a_weight_is_within_half_a_step_of_its_row():
    weight = torch.randn(50, 70, dtype=torch.float64, generator=torch.manual_seed(0))
    weight[3] *= 1e-3
    weight[7] = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values, scale = int8.quantised("w", weight, dtype)
        assert values.dtype == torch.int8 and int(values.abs().max()) <= 127
        error = (values.double() * scale.double()[:, None] - weight).abs()
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        assert bool((error <= 0.51 * step + (0.3 * step if dtype != torch.float32 else 1e-12)).all())
        assert bool((values[7] == 0).all()) and bool(scale.isfinite().all())


def in_int8(linear):
    """A linear layer as the only one of a block, quantised but for its numbers."""
    blocks = torch.nn.ModuleList([torch.nn.Sequential(linear)])
    int8.replace(blocks, [])
    return blocks[0][0]


def test_blocks_of_rows_change_nothing(monkeypatch):
    weight, x = torch.randn(37, 16), torch.randn(2, 5, 16)
    whole = int8.quantised("w", weight, torch.float32)
    product = int8.product(x, *whole)
    monkeypatch.setitem(int8.AT_ONCE, "cpu", 64)  # four rows
    monkeypatch.setattr(int8, "READ_AT_ONCE", 64)
    blocks = int8.quantised("w", weight, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(whole, blocks))
    assert torch.allclose(int8.product(x, *whole), product, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 2e-2), ("float16", 2e-3)])
@pytest.mark.parametrize("rows", [1, 4, 5, 33])
@pytest.mark.parametrize("at_once", [1 << 26, 1000])
def test_a_linear_layer_against_float64(dtype, tolerance, rows, at_once, monkeypatch):
    """Forward and the gradient of x; the weights get none."""
    monkeypatch.setitem(int8.AT_ONCE, "cpu", at_once)
    dtype = getattr(torch, dtype)
    torch.manual_seed(rows)
    plain = torch.nn.Linear(48, 96, dtype=dtype)
    weight, bias = plain.weight.detach(), plain.bias.detach().double()
    layer = in_int8(plain)
    assert isinstance(layer, int8.Int8Linear)
    layer.weight.data, layer.scale.data = int8.quantised("w", weight, dtype)
    exact = layer.weight.double() * layer.scale.double()[:, None]
    x = torch.randn(rows, 48, dtype=dtype, requires_grad=True)
    wanted = x.detach().double() @ exact.T + bias
    y = layer(x)
    assert y.dtype == dtype and (y.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    with torch.no_grad():
        y = layer(x[None])[0]
        assert (y.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    grad = torch.randn(rows, 96, dtype=dtype)
    layer(x).backward(grad)
    wanted = grad.double() @ exact
    assert (x.grad.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert not layer.weight.requires_grad and not layer.scale.requires_grad


def test_backward_keeps_int8_and_no_copy_of_the_weight():
    layer = in_int8(torch.nn.Linear(64, 64))
    layer.weight.data.zero_()
    layer.scale.data.zero_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 64, requires_grad=True))
    assert sum(t.numel() * t.element_size() for t in kept) < 64 * 64 * 2


def test_the_compiled_product_is_the_plain_one():
    weight, scale = int8.quantised("w", torch.randn(8, 16), torch.float32)
    x = torch.randn(1, 16)
    compiled = torch.compile(int8.product, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, weight, scale), int8.product(x, weight, scale), atol=1e-6)


# ---------------------------------------------------------------- both kinds of base
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_keeps_its_fingerprint_and_nearly_its_logits(kind, bases):
    plain, model = open_base(bases(kind)), open_base(bases(kind), quantize="int8")
    assert model.fingerprint == plain.fingerprint and model.quantize == "int8" and plain.quantize == ""
    assert model.dtype == plain.dtype == torch.float32 and model.device == plain.device
    assert model.cache_bytes == plain.cache_bytes
    found = int8.layers(model)
    assert len(found) >= 8 and not int8.layers(plain)
    owned = {p for p in model.parameters() if p.dtype == torch.int8}
    assert {layer.weight for layer in found.values()} == owned
    assert len({layer.scale for layer in found.values()}) == len(owned)  # tied ones share both
    logits = []
    for m in (plain, model):
        look = m.look([picture(m)])
        ids = torch.tensor([m.caption_prompt(look)])
        with torch.no_grad():
            logits.append(m(ids, look if torch.is_tensor(look) else [look]))
    error = (logits[0] - logits[1]).pow(2).mean().sqrt() / logits[0].std()
    assert 0 < error < 0.1
    low = open_base(bases(kind), torch.bfloat16, quantize="int8")
    assert low.dtype == torch.bfloat16 and low.fingerprint == plain.fingerprint
    assert all(layer.scale.dtype == torch.bfloat16 for layer in int8.layers(low).values())


@pytest.mark.parametrize("kind", KINDS)
def test_its_weights_are_those_of_the_base_quantised(kind, bases):
    plain, model = open_base(bases(kind)), open_base(bases(kind), quantize="int8")
    of_plain = dict(plain.named_modules())
    for name, layer in int8.layers(model).items():
        values, scale = int8.quantised(name, of_plain[name].weight.detach(), torch.float32)
        assert torch.equal(values, layer.weight) and torch.equal(scale, layer.scale), name
    quantised = {f"{name}.weight" for name in int8.layers(model)}
    for name, tensor in plain.state_dict().items():
        if name not in quantised:
            assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_captions_and_answers_do_not_depend_on_how_they_are_computed(kind, bases):
    """A batch of samples is samples alone, and packed questions are questions alone."""
    model = shaken(open_base(bases(kind), quantize="int8"), soft_prompt=True)
    looks = [model.look([picture(model, seed)]) for seed in (0, 1)]
    together = sample(model, looks, ["a", "b"], 2, max_new_tokens=8, seed=1)
    alone = [sample(model, [look], [name], 2, max_new_tokens=8, seed=1)[0]
             for look, name in zip(looks, "ab")]
    assert [[r["caption"] for r in rows] for rows in together] == [[r["caption"] for r in rows] for rows in alone]
    questions = ["Is there a cup?", "Is it red?", "Are there two dogs?"]
    packed = yes_probability(model, looks[0], questions)
    single = torch.cat([yes_probability(model, looks[0], [q]) for q in questions])
    assert (packed - single).abs().max() <= 2e-5


def gradients(model, checkpointing=False):
    """{name: gradient} of the loss of another scene's caption: its own leaves a toy base little to learn."""
    model.train()
    model.checkpointing = checkpointing
    scene = world.make_scene(3)
    look = model.look([square(world.draw(scene), model.image_size)])
    caption = model.answer(", ".join(fact["text"] for fact in world.facts(world.make_scene(4)))[:120])
    ids = torch.tensor([model.caption_prompt(look) + caption])
    logits = model(ids, look if torch.is_tensor(look) else [look])[0, -len(caption) - 1 : -1]
    torch.nn.functional.cross_entropy(logits, torch.tensor(caption)).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def whole(gradient):
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dequantised_weights(kind, bases):
    """To rounding, with recomputed blocks and without; and none but the adapters' and the soft prompt's."""
    exact, model = open_base(bases(kind)), open_base(bases(kind), quantize="int8")
    of_exact = dict(exact.named_modules())
    for name, layer in int8.layers(model).items():
        of_exact[name].weight.data = layer.weight.float() * layer.scale[:, None]
    shaken(exact, soft_prompt=True), shaken(model, soft_prompt=True)
    wanted, found, again = gradients(exact), gradients(model), gradients(model, checkpointing=True)
    assert wanted.keys() == found.keys() == again.keys() == set(adapters.names_of(model, "caption"))
    for name in wanted:
        scale = 1e-4 * (wanted[name].abs().max() + 1e-3)
        assert (wanted[name] - found[name]).abs().max() <= scale, name
        assert (wanted[name] - again[name]).abs().max() <= scale, name
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("base", ["assets/toy", "assets/toy-qwen3-vl"])
def test_gradients_of_adapters_are_nearly_those_of_the_base(base):
    plain, model = (open_base(stages.CODE / base, quantize=q) for q in (None, "int8"))
    for m in (plain, model):
        torch.manual_seed(0)
        adapters.attach(m, "caption", soft_prompt=True)
    wanted, found = whole(gradients(plain)), whole(gradients(model))
    assert torch.cosine_similarity(wanted, found, dim=0) > 0.999
    assert 0.95 < found.norm() / wanted.norm() < 1.05


# ---------------------------------------------------------------- memory
def live_bytes():
    tensors = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
    storages = [t.untyped_storage() for t in tensors if t.layout == torch.strided and t.device.type != "meta"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_never_there_in_both_forms(kind, bases, monkeypatch):
    """While it is read, what is alive is the int8 weights so far and a tensor or two."""
    peak, quantised = [0], int8.quantised

    def watched(*args):
        result = quantised(*args)
        peak[0] = max(peak[0], live_bytes() - before)
        return result

    gc.collect()
    before = live_bytes()
    monkeypatch.setattr(int8, "quantised", watched)
    model = open_base(bases(kind), quantize="int8")
    tensors = {*model.parameters(), *model.buffers()}
    stored = sum(t.numel() * t.element_size() for t in tensors)
    assert 0 < peak[0] <= stored + 2 * 4 * max(t.numel() for t in tensors) + 4096


def test_the_full_size_is_about_10_gb():
    with torch.device("meta"):
        model = QwenVL(Config())
    whole = int8.stored_bytes(model, torch.bfloat16)
    int8.replace(model, [model.transformer.wte, model.lm_head])
    quantised = int8.stored_bytes(model, torch.bfloat16)
    assert 19.2e9 < whole < 19.4e9 and quantised < 9.9e9
    print(f"{whole / 1e9:.2f} GB in bfloat16, {quantised / 1e9:.2f} GB in int8")


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_count_a_byte(kind, bases, monkeypatch):
    plain, model = (shaken(open_base(bases(kind), quantize=q)) for q in (None, "int8"))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    saved = plain.training_bytes(trained, 1, 1) - model.training_bytes(trained, 1, 1)
    numbers = {layer.weight: layer.weight.numel() for layer in int8.layers(model).values()}
    assert 0.5 * 3 * sum(numbers.values()) < saved < 3 * sum(numbers.values())
    needed = int8.stored_bytes(open_base(bases(kind), quantize="int8"), torch.float32)
    monkeypatch.setattr(weights, "free_bytes", lambda device: needed + 1)
    open_base(bases(kind), quantize="int8")
    with pytest.raises(InputError, match="--quantize int8"):
        open_base(bases(kind))
    monkeypatch.setattr(weights, "free_bytes", lambda device: needed - 1)
    with pytest.raises(InputError, match="as int8 and float32"):
        open_base(bases(kind), quantize="int8")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    from conftest import write_tiny_base
    from safetensors.torch import load_file, save_file

    file = write_tiny_base(tmp_path / "base") / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"][5, 3] = float("nan")
    save_file(state, file)
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        open_base(tmp_path / "base", quantize="int8")


# ---------------------------------------------------------------- stages
FEW = ("--batch", 4, "--micro-batch", 2, "--max-steps", 3, "--save-every", 2, "--lr", 2e-3,
       "--reduction", 4, "--workers", 0)
INT8 = ("--quantize", "int8")


@pytest.mark.parametrize("kind", KINDS[:2])
def test_every_stage_runs_and_remembers(kind, bases, data, tmp_path, capsys):
    base, out = bases(kind), tmp_path
    views = ("--views", "one")
    assert run(sft, "--base", base, "--data", data / "captions.jsonl", "--out", out / "sft", *FEW, *INT8, *views) == 0
    asked = ("--data", data / "questions.jsonl")
    assert run(qa_adapter, "--init", out / "sft", *asked, "--out", out / "qa", *FEW, *INT8) == 0
    assert run(qa_adapter, "--init", out / "sft", "--test", data / "questions.jsonl", "--out", out / "qa", *INT8) == 0
    cards = [json.loads((out / name / "adapters.json").read_text()) for name in ("sft", "qa")]
    assert all(card["quantize"] == "int8" for card in cards)
    assert cards[0]["fingerprint"] == open_base(base).fingerprint

    sampling = ("--samples", 2, "--max-new-tokens", 6, "--min-statements", 1, "--threshold", 0.0)
    made = ("--images", data, "--captioner", out / "sft", "--qa", out / "qa", "--out", out / "golden", *sampling)
    assert run(golden, *made, *INT8) == 0
    assert len(read_rows(out / "golden/record.jsonl")) == 8
    assert run(golden, *made) == 1 and "quantize" in capsys.readouterr().err

    rows = [{"image": str(data / f"{k:05d}.png"), "chosen": f"a red cup, {k} dogs",
             "rejected": [{"caption": "a blue cup", "finish": "eos"}]} for k in range(8)]
    write_rows(out / "golden.jsonl", rows)
    learn = ("--init", out / "sft", "--data", out / "golden.jsonl", "--watch", 1, *FEW)
    assert run(dpo, *learn, "--out", out / "dpo", *INT8) == 0
    reference = {path.name for path in (out / "dpo").glob("reference-*")}
    assert run(dpo, *learn, "--out", out / "dpo") == 1 and "quantize" in capsys.readouterr().err
    assert run(dpo, *learn, "--out", out / "plain") == 0
    assert not reference & {path.name for path in (out / "plain").glob("reference-*")}
    assert json.loads((out / "plain/adapters.json").read_text())["quantize"] is None

    told = ("--adapters", out / "dpo", "--max-new-tokens", 5, "--verify", out / "qa", "--threshold", 0.0)
    capsys.readouterr()
    assert run(caption, data / "00000.png", *told[:4], "--jsonl", *INT8) == 0
    shown = capsys.readouterr()
    assert "error" not in json.loads(shown.out) and "int8 float32" in shown.err
    caption_all = (data, *told[:4], "--out", out / "captions")
    run(caption, *caption_all, *INT8)  # an untrained model may leave some empty
    assert run(caption, *caption_all) == 1 and "quantize" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_stopped_run_resumes_bit_for_bit(kind, bases, data, tmp_path):
    argv = ("--base", bases(kind), "--data", data / "captions.jsonl", "--views", "one", *FEW, *INT8)
    assert run(sft, *argv, "--out", tmp_path / "whole") == 0
    strike = stages.at_micro_batch(6, stages.kill_me(signal.SIGTERM))
    with mock.patch.object(plumbing.data, "collate", strike):
        assert run(sft, *argv, "--out", tmp_path / "out") == 143
    assert run(sft, *argv, "--out", tmp_path / "out") == 0
    assert stages.same_run(tmp_path / "out", tmp_path / "whole")
    assert run(sft, *argv, "--base", bases(kind), "--out", tmp_path / "out", "--quantize", "int8") == 0


def test_two_ranks_learn_what_one_does(bases, data, tmp_path):
    argv = ("--base", bases("qwen_vl"), "--data", data / "captions.jsonl", "--views", "one", *FEW, *INT8)
    assert run(sft, *argv, "--out", tmp_path / "one") == 0
    codes = stages.run_ranks("sft", [*argv, "--out", tmp_path / "two"], tmp_path / "report", 2)
    assert codes == [0, 0], (tmp_path / "report").read_text()
    stages.assert_close_run(tmp_path / "two", tmp_path / "one", rtol=1e-3)


def test_a_run_from_before_the_flag_resumes(bases, data, tmp_path):
    argv = ("--base", bases("qwen_vl"), "--data", data / "captions.jsonl", "--out", tmp_path / "out", *FEW)
    assert run(sft, *argv) == 0
    (file,) = (tmp_path / "out/resume").glob("step-*/run.json")
    saved = json.loads(file.read_text())
    assert saved["run"].pop("quantize") == "None"
    file.write_text(json.dumps(saved))
    assert run(sft, *argv) == 0
    assert run(sft, *argv, *INT8) == 1


def test_full_tuning_is_refused(bases, data, tmp_path, capsys):
    code = run(sft, "--base", bases("qwen_vl"), "--data", data / "captions.jsonl", "--out", tmp_path / "out",
               "--tune", "full", *INT8)
    assert code == 2 and "--quantize" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tune", ["lora", "prompt"])
def test_other_ways_of_tuning(tune, bases, data, tmp_path):
    for kind in KINDS[:2]:
        argv = ("--base", bases(kind), "--data", data / "captions.jsonl", "--out", tmp_path / kind, "--tune", tune,
                "--rank", 2, "--views", "one", *FEW, *INT8)
        assert run(sft, *argv) == 0


# ---------------------------------------------------------------- what it changes
@pytest.mark.parametrize("base", ["assets/toy", "assets/toy-qwen3-vl"])
def test_toy_py_measures_what_it_changes(base, capsys):
    assert toy.main(["int8", "--base", str(stages.CODE / base), "--scenes", "8"]) == 0
    head, plain, whole, *_ = map(json.loads, capsys.readouterr().out.splitlines())
    assert head["tokens"] > 100 and plain["equal greedy tokens"] == 1 and plain["largest difference"] == 0
    assert whole["MB, the rest in bfloat16"] < 0.6 * plain["MB, the rest in bfloat16"]
    assert whole["equal greedy tokens"] > 0.97 and abs(whole["f1 change"]) <= 0.02
