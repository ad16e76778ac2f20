"""The decode step of fixed shape: the tokens of the plain loop, in tensors that stay where they are,
without a question to the device; also as torch.compile makes it."""

import pytest
import torch
from families import make_usable
from torch.utils._python_dispatch import TorchDispatchMode

import adapters
import caption
import generate
from base import open_base
from chunking import LAYOUTS, crops
from generate import Sampling, stream
from plumbing import compiled, slots
from plumbing.errors import InputError
from toy_world import world

WAYS = {"greedy": Sampling(1, 40, 0.0), "sampled": Sampling(3, 40, 1.2, top_p=0.95, seed=1)}


@pytest.fixture(scope="module", params=["qwen_vl", "qwen3_vl"])
def toy(request):
    """A toy base and 9 named scenes, as its model looks at them."""
    model = open_base("assets/toy" if request.param == "qwen_vl" else "assets/toy-qwen3-vl")
    scenes = [world.draw(world.make_scene(k)) for k in range(9)]
    looks = [model.look(crops(scene, model.image_size, LAYOUTS["six"])) for scene in scenes]
    return model, [(k, f"{k}.png", look) for k, look in enumerate(looks)]


def uncompiled(monkeypatch):
    """The step of fixed shape without the compiler: every call is a plain one."""
    monkeypatch.setattr(generate, "compiled_step", lambda device: generate.next_tokens)


@pytest.mark.parametrize("look_every", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_of_fixed_shape_gives_the_plain_tokens(toy, way, look_every, monkeypatch):
    """Nine images in four slots: also where the host looks at the tokens late, and in no order."""
    uncompiled(monkeypatch)
    model, images = toy
    expected = dict(stream(model, images, 4, WAYS[way]))
    lengths = {result["tokens"] for results in expected.values() for result in results}
    assert len(lengths) > 1
    monkeypatch.setattr(slots, "LOOK_EVERY", {"cpu": look_every})
    assert dict(stream(model, images, 4, WAYS[way], compiled=True)) == expected
    assert dict(stream(model, images, 16, WAYS[way], compiled=True)) == expected


def equal_when_compiled(monkeypatch, backend, model, images, how):
    step = compiled.Compiled(generate.next_tokens, model.device)
    step.run = torch.compile(generate.next_tokens, fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(generate, "compiled_step", lambda device: step)
    expected = dict(stream(model, images, 4, how))
    return dict(stream(model, images, 4, how, compiled=True)) == expected and step.has_run


def test_the_step_is_one_graph(toy, monkeypatch):
    """torch traces it without a gap, and the graph gives the plain tokens."""
    assert equal_when_compiled(monkeypatch, "eager", *toy, WAYS["sampled"])


def test_torch_compile_gives_the_plain_tokens(tiny_model, monkeypatch, capsys):
    """Really compiled, with an adapter; the seconds are printed."""
    monkeypatch.setattr(tiny_model.tokenizer, "ends", set(range(0, 520, 10)))
    adapters.attach(tiny_model, "caption", where=("language",))
    noise = torch.randn(6, 2, 3, 28, 28, generator=torch.manual_seed(0))
    images = [(k, str(k), look) for k, look in enumerate(noise)]
    how = Sampling(2, 12, 1.5, seed=1)
    assert equal_when_compiled(monkeypatch, "inductor", tiny_model, images, how)
    assert "compiled next_tokens in" in capsys.readouterr().err


class Questions(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, and allocations in the second half."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
            torch.ops.aten.equal.default,
        ):
            self.asked.append(func)
        return func(*args, **(kwargs or {}))


def test_a_step_asks_the_device_nothing_and_moves_nothing(toy, monkeypatch):
    """No value of a tensor is read on the host, and all state stays at its address."""
    model, images = toy
    addresses, asked = [], []

    def watched(model, cache, rows, how, is_end):
        with Questions() as questions:
            generate.next_tokens(model, cache, rows, how, is_end)
        asked.extend(questions.asked)
        addresses.append([t.data_ptr() for t in (*cache.tensors(), *rows.values())])

    monkeypatch.setattr(generate, "compiled_step", lambda device: watched)
    how = Sampling(2, 30, 1.0, top_p=0.9, min_tokens=3)
    list(stream(model, images, 3, how, compiled=True))
    assert len(addresses) > 30 and asked == []
    assert all(step == addresses[0] for step in addresses)
    with Questions() as questions:
        bool(torch.ones(1).any())
    assert questions.asked  # the counter counts


def test_prompts_of_other_lengths_reuse_the_slots(tmp_path, monkeypatch):
    """One view of any size: prefixes of several lengths fit the same tensors, one after the other."""
    uncompiled(monkeypatch)
    model = open_base(make_usable("qwen2_5_vl", tmp_path))
    scene = world.draw(world.make_scene(0))
    sizes = [(56, 56), (56, 84), (84, 84), (56, 56), (112, 56)]
    images = [(k, str(k), model.look([scene.resize(size)])) for k, size in enumerate(sizes)]
    lengths = {len(model.caption_prompt(look)) for *_, look in images}
    assert len(lengths) > 2
    fixed, fix = [], slots.Slots.fix
    monkeypatch.setattr(slots.Slots, "fix", lambda self: fixed.append(fix(self)))
    how = Sampling(2, 10, 1.0)
    assert dict(stream(model, images, 2, how, compiled=True)) == dict(stream(model, images, 2, how))
    assert len(fixed) == 1


def test_long_captions_read_more_columns(tiny_model, monkeypatch):
    """Half of the columns at first; beyond them twice as many, and the same tokens."""
    uncompiled(monkeypatch)
    monkeypatch.setattr("plumbing.cache.COLUMNS", 8)
    monkeypatch.setattr(tiny_model.tokenizer, "ends", {1})
    widths, attend = set(), generate.next_tokens

    def watched(model, cache, *more):
        widths.add(cache.columns)
        attend(model, cache, *more)

    noise = torch.randn(2, 2, 3, 28, 28, generator=torch.manual_seed(0))
    images = [(k, str(k), look) for k, look in enumerate(noise)]
    expected = dict(stream(tiny_model, images, 2, Sampling(1, 20, 1.0)))
    monkeypatch.setattr(generate, "compiled_step", lambda device: watched)
    assert dict(stream(tiny_model, images, 2, Sampling(1, 20, 1.0), compiled=True)) == expected
    assert widths == {8, 16, 21}


def test_compile_is_for_many_images_on_a_gpu_or_when_asked(toy, tmp_path):
    model, _ = toy
    assert not generate.compiles(model, None, 10**6)
    assert generate.compiles(model, True, 1) and not generate.compiles(model, False, 10**6)
    hybrid = open_base(make_usable("qwen3_5", tmp_path))
    assert not hybrid.packs and not generate.compiles(hybrid, None, 10**6)
    with pytest.raises(InputError, match="--compile"):
        generate.compiles(hybrid, True, 1)


def test_caption_py_compiles_when_asked(tmp_path, monkeypatch, capsys):
    """The flag reaches the decode step, and changes no caption."""
    world.draw_scenes(tmp_path / "scenes", range(3))
    argv = [str(tmp_path / "scenes"), "--base", "assets/toy", "--adapters", "none", "--jsonl"]
    assert caption.main(argv) == 0
    plain = capsys.readouterr().out
    calls = []
    monkeypatch.setattr(
        generate, "compiled_step", lambda device: calls.append(device) or generate.next_tokens
    )
    assert caption.main([*argv, "--compile"]) == 0
    assert capsys.readouterr().out == plain and len(calls) == 1
