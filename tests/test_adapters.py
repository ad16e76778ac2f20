"""Adapters and the soft prompt: nothing when fresh, switched, stacked, saved, and refused where they do not belong."""
import json

import pytest
import torch

import adapters
from model import CAPTION_PROMPT, InputError, QwenVL


def run(model, ids=None, seed=0):
    ids = torch.tensor([ids or model.caption_prompt(2)])
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids, pixels)


def shake(model, name, by=0.05):
    """Move every parameter of one adapter away from where it started."""
    generator = torch.Generator().manual_seed(len(name))
    for n in adapters.names_of(model, name):
        p = model.get_parameter(n)
        p.data += by * torch.randn(p.shape, generator=generator)


def test_fresh_adapters_and_soft_prompt_change_nothing_bit_for_bit(tiny_model):
    expected, text = run(tiny_model), tiny_model.image_prompt(2, CAPTION_PROMPT)
    adapters.attach(tiny_model, "caption", reduction=4, soft_prompt=True)
    assert tiny_model.caption_prompt(2) != text and len(tiny_model.caption_prompt(2)) == len(text)
    assert torch.equal(run(tiny_model), expected)
    shake(tiny_model, "caption")
    assert not torch.allclose(run(tiny_model), expected, atol=1e-3)


@pytest.mark.parametrize("where, expected_slots", [(("vision", "language"), 6), (("language",), 4), (("vision",), 2)])
def test_attach_trains_exactly_the_new_parameters(tiny_model, where, expected_slots):
    before = {n: p for n, p in tiny_model.named_parameters()}
    trains = adapters.attach(tiny_model, "caption", where)
    assert len(trains) == 4 * expected_slots and not before.keys() & set(trains)
    assert [n for n, p in sorted(tiny_model.named_parameters()) if p.requires_grad] == trains
    second = adapters.attach(tiny_model, "qa", ("language",), below="caption")
    assert not set(trains) & set(second)
    assert sorted(n for n, p in tiny_model.named_parameters() if p.requires_grad) == second


def test_the_adapter_is_its_formula(tiny_model):
    adapters.attach(tiny_model, "caption", ("language",), reduction=8)
    shake(tiny_model, "caption")
    adapter = tiny_model.transformer.h[0].attn_slot["caption"]
    x = torch.randn(3, 5, 128)
    assert adapter.down.weight.shape == (16, 128)
    hidden = (x.double() @ adapter.down.weight.double().T + adapter.down.bias.double()).clamp(min=0)
    expected = x.double() + hidden @ adapter.up.weight.double().T + adapter.up.bias.double()
    torch.testing.assert_close(adapter(x).double(), expected, atol=1e-5, rtol=1e-5)
    assert adapter(x.bfloat16()).dtype == torch.bfloat16 and adapter.up.weight.dtype == torch.float32


def test_only_adapters_move_in_training_and_the_soft_prompt_learns(tiny_model):
    before = {n: p.detach().clone() for n, p in tiny_model.named_parameters()}
    trains = adapters.attach(tiny_model, "caption", soft_prompt=True)
    start = {n: tiny_model.get_parameter(n).detach().clone() for n in trains}
    optimizer = torch.optim.AdamW([tiny_model.get_parameter(n) for n in trains], lr=1e-2)
    tiny_model.checkpointing = True
    tiny_model.train()
    for _ in range(3):
        ids = torch.tensor([[*tiny_model.caption_prompt(1), 300]])
        tiny_model(ids, torch.randn(1, 3, 28, 28))[0, -2].log_softmax(-1)[300].neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(tiny_model.get_parameter(n), tensor) for n, tensor in before.items())
    assert all(not torch.equal(tiny_model.get_parameter(n), tensor) for n, tensor in start.items())


def test_adapters_are_switched_stacked_in_order_and_restored(tiny_model):
    base = run(tiny_model)
    adapters.attach(tiny_model, "caption", soft_prompt=True)
    shake(tiny_model, "caption")
    captioner = run(tiny_model)
    adapters.attach(tiny_model, "qa", ("language",), below="caption")
    assert torch.equal(run(tiny_model), captioner)
    shake(tiny_model, "qa")
    both = run(tiny_model)
    assert tiny_model.transformer.h[0].mlp_slot.stack == ("qa", "caption")
    with adapters.active(tiny_model, ["caption"]):
        assert torch.equal(run(tiny_model), captioner)
    with adapters.active(tiny_model, []):
        assert torch.equal(run(tiny_model), base)
        assert tiny_model.caption_prompt(1) == tiny_model.image_prompt(1, CAPTION_PROMPT)
    with adapters.active(tiny_model, ["caption", "qa"]):
        assert not torch.equal(run(tiny_model), both)
    assert torch.equal(run(tiny_model), both)
    with pytest.raises(ValueError, match="nobody"), adapters.active(tiny_model, ["nobody"]):
        pass
    with pytest.raises(RuntimeError), adapters.active(tiny_model, []):
        raise RuntimeError
    assert torch.equal(run(tiny_model), both)


def test_a_name_is_taken_once(tiny_model):
    adapters.attach(tiny_model, "caption")
    with pytest.raises(InputError, match="attached already"):
        adapters.attach(tiny_model, "caption")
    with pytest.raises(ValueError, match="identifier"):
        adapters.attach(tiny_model, "a.b")


def test_what_cannot_be_attached_is_refused(tiny_model):
    with pytest.raises(ValueError, match="no adapters named typo"):
        adapters.attach(tiny_model, "qa", below="typo")
    for name in ("train", "keys", "stack"):
        with pytest.raises(ValueError, match="identifier"):
            adapters.attach(tiny_model, name)
    for reduction in (0, 33, 200):
        with pytest.raises(InputError, match="--reduction"):
            adapters.attach(tiny_model, "caption", reduction=reduction)


def test_a_reduction_that_divides_no_width_is_saved_and_loaded(tiny_base, tiny_model, tmp_path):
    adapters.attach(tiny_model, "caption", reduction=7)
    shake(tiny_model, "caption")
    adapters.save(tiny_model, tmp_path / "sft", "caption")
    again = QwenVL.from_pretrained(tiny_base)
    assert adapters.load(again, tmp_path / "sft")["reduction"] == 7
    assert torch.equal(run(again), run(tiny_model))


def test_soft_prompt_slots_come_whole_or_not_at_all(tiny_model):
    adapters.attach(tiny_model, "caption", soft_prompt=True)
    with pytest.raises(ValueError, match="soft-prompt"):
        run(tiny_model, tiny_model.caption_prompt(2)[:-1])


# ---------------------------------------------------------------- folders
@pytest.fixture
def trained(tiny_base):
    """A captioner that differs from its base, as after training."""
    model = QwenVL.from_pretrained(tiny_base)
    adapters.attach(model, "caption", reduction=4, soft_prompt=True)
    shake(model, "caption")
    return model


@pytest.fixture
def expected(trained):
    return run(trained)


@pytest.fixture
def folder(trained, tmp_path):
    adapters.save(trained, tmp_path / "sft", "caption", stage="sft")
    return tmp_path / "sft"


def test_saved_adapters_load_as_they_were(folder, expected, tiny_model):
    card = adapters.load(tiny_model, folder)
    assert torch.equal(run(tiny_model), expected)
    assert not any(p.requires_grad for p in tiny_model.parameters())
    assert [card[k] for k in ("stage", "reduction", "where", "soft_prompt")] == ["sft", 4, ["vision", "language"], True]
    assert len(adapters.folder_hash(folder)) == 64


def test_adapters_for_another_base_are_refused(folder, tmp_path):
    from conftest import write_tiny_base
    other = QwenVL.from_pretrained(write_tiny_base(tmp_path / "other", seed=1))
    with pytest.raises(InputError, match="another base"):
        adapters.load(other, folder)


@pytest.mark.parametrize("damage, expected", [
    (lambda w: w.pop(sorted(w)[0]), "is missing"),
    (lambda w: w.update(extra=torch.zeros(1)), "extra is left over"),
    (lambda w: w.update({sorted(w)[0]: torch.zeros(3)}), r"has shape \(3,\)"),
])
def test_adapters_that_do_not_fit_are_refused_by_name(folder, tiny_model, damage, expected):
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / "adapters.safetensors")
    damage(weights)
    save_file(weights, folder / "adapters.safetensors")
    with pytest.raises(InputError, match=expected):
        adapters.load(tiny_model, folder)


def test_what_is_no_adapter_folder(folder, tiny_model, tmp_path):
    good = json.loads((folder / "adapters.json").read_text())
    for text, expected in (("{}", "not the description"), ("no", "cannot be read"), ("[]", "not the description"),
                           (json.dumps({**good, "reduction": "x"}), "not the description"),
                           (json.dumps({**good, "where": None}), "not the description")):
        (folder / "adapters.json").write_text(text)
        with pytest.raises(InputError, match=expected):
            adapters.load(tiny_model, folder)
    with pytest.raises(InputError, match=r"no adapters\.json"):
        adapters.load(tiny_model, tmp_path)
    card = {"base": "x", "fingerprint": tiny_model.fingerprint, "name": "caption", "where": ["language"]}
    (folder / "adapters.json").write_text(json.dumps({**card, "reduction": 4, "soft_prompt": False}))
    (folder / "adapters.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        adapters.load(tiny_model, folder)
