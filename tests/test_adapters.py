"""Adapters and the soft prompt: nothing when fresh, switched, stacked, saved, and refused where
they do not belong."""

import json
import platform
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import adapters
from chunking import LAYOUTS
from model import CAPTION_PROMPT, QwenVL, Rotary
from plumbing.errors import InputError


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
    expected, text = run(tiny_model), tiny_model.head(2) + tiny_model.request(CAPTION_PROMPT)
    adapters.attach(tiny_model, "caption", reduction=4, soft_prompt=True)
    assert tiny_model.caption_prompt(2) != text and len(tiny_model.caption_prompt(2)) == len(text)
    assert torch.equal(run(tiny_model), expected)
    shake(tiny_model, "caption")
    assert not torch.allclose(run(tiny_model), expected, atol=1e-3)


@pytest.mark.parametrize(
    "where, expected_slots", [(("vision", "language"), 6), (("language",), 4), (("vision",), 2)]
)
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
    assert (
        adapter(x.bfloat16()).dtype == torch.bfloat16 and adapter.up.weight.dtype == torch.float32
    )


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
        assert tiny_model.caption_prompt(1) == tiny_model.head(1) + tiny_model.request(CAPTION_PROMPT)
    with adapters.active(tiny_model, ["caption", "qa"]):
        assert not torch.equal(run(tiny_model), both)
    assert torch.equal(run(tiny_model), both)
    with pytest.raises(ValueError, match="nobody"), adapters.active(tiny_model, ["nobody"]):
        pass
    with pytest.raises(RuntimeError), adapters.active(tiny_model, []):
        raise RuntimeError
    assert torch.equal(run(tiny_model), both)


def test_three_adapters_stack_in_the_order_that_below_asks_for(tiny_model):
    adapters.attach(tiny_model, "one")
    adapters.attach(tiny_model, "two")
    adapters.attach(tiny_model, "zero", ("language",), below="one")
    adapters.attach(tiny_model, "second", below="two")
    expected = {"language": ("zero", "one", "second", "two"), "vision": ("one", "second", "two")}
    for tower, stack in expected.items():
        assert {slot.stack for slot, *_ in tiny_model.places(tower)} == {stack}
    for name in ("zero", "one", "second", "two"):
        shake(tiny_model, name)
    block, x = tiny_model.transformer.h[1], torch.randn(1, 5, 128)
    rotary = Rotary(torch.arange(5)[None], 1, tiny_model.config, training=False)
    y = block.attn(block.ln_1(x), rotary, None)
    for name in expected["language"]:
        y = block.attn_slot[name](y)
    h = x + y
    y = block.mlp(block.ln_2(h))
    for name in expected["language"]:
        y = block.mlp_slot[name](y)
    assert torch.equal(block(x, rotary, None), h + y)


def test_attaching_freezes_what_was_there_and_switching_does_not_thaw_it(tiny_model):
    adapters.attach(tiny_model, "caption", soft_prompt=True)
    shake(tiny_model, "caption")
    before = {n: p.detach().clone() for n, p in tiny_model.named_parameters()}
    trains = adapters.attach(tiny_model, "qa", ("language",), below="caption")
    with adapters.active(tiny_model, ["caption"]):
        captioner = run(tiny_model)
    optimizer = torch.optim.AdamW([p for p in tiny_model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        ids = torch.tensor([tiny_model.head(1) + tiny_model.request("it Answer: Yes")])
        tiny_model(ids, torch.randn(1, 3, 28, 28))[0, -2].log_softmax(-1)[
            ids[0, -1]
        ].neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = sorted(
        n
        for n, p in tiny_model.named_parameters()
        if n not in before or not torch.equal(p, before[n])
    )
    assert (
        moved == trains
        and all("slot.qa." in n for n in moved)
        and not any("visual" in n for n in moved)
    )
    with adapters.active(tiny_model, ["caption"]):
        assert torch.equal(run(tiny_model), captioner)  # exactly the captioner it was
    assert not torch.equal(run(tiny_model), captioner)


def test_trained_tensors_are_fp32_and_used_in_the_compute_dtype(tiny_base):
    model = QwenVL.from_pretrained(tiny_base, torch.bfloat16)
    expected = run(model)
    trains = adapters.attach(model, "caption", soft_prompt=True)
    assert {model.get_parameter(n).dtype for n in trains} == {torch.float32}
    assert expected.dtype == torch.bfloat16 and torch.equal(run(model), expected)
    shake(model, "caption")
    assert run(model).dtype == torch.bfloat16 and not torch.equal(run(model), expected)
    run_with_grad = model(torch.tensor([model.caption_prompt(1)]), torch.randn(1, 3, 28, 28))
    run_with_grad.float().logsumexp(-1).sum().backward()
    assert {model.get_parameter(n).grad.dtype for n in trains} == {torch.float32}


def test_the_soft_prompt_starts_as_the_prompts_embeddings_and_takes_their_places_in_order(
    tiny_model,
):
    ids = torch.tensor(tiny_model.tokenizer.encode(CAPTION_PROMPT))
    adapters.attach(tiny_model, "caption", where=(), soft_prompt=True)
    vectors = tiny_model.soft_prompts["caption"].vectors
    assert torch.equal(vectors, tiny_model.transformer.wte.weight[ids]) and vectors.requires_grad
    here = torch.tensor([[False, *[True] * len(ids), False], [False] * (len(ids) + 2)])
    x = torch.randn(2, len(ids) + 2, 128)
    actual = tiny_model.soft_prompts["caption"](x, here)
    assert torch.equal(actual[0, 1:-1], vectors) and torch.equal(actual[~here], x[~here])
    vectors.data[3] += 1
    with adapters.active(tiny_model, []):
        assert tiny_model.caption_prompt(1) == tiny_model.head(1) + tiny_model.request(CAPTION_PROMPT)
    assert tiny_model.caption_prompt(1)[-len(ids) :] == [tiny_model.tokenizer.soft_prompt_id] * len(
        ids
    )


def test_sizes_that_make_no_bottleneck_are_refused(tiny_model):
    for reduction in (0, -8, 33):  # the vision tower is 32 wide
        with pytest.raises(InputError, match=f"{reduction}"):
            adapters.attach(tiny_model, "caption", reduction=reduction)
    assert not any("caption" in n for n, _ in tiny_model.named_parameters())
    adapters.attach(tiny_model, "caption", reduction=32)


def test_a_name_is_taken_once(tiny_model):
    adapters.attach(tiny_model, "caption")
    with pytest.raises(InputError, match="attached already"):
        adapters.attach(tiny_model, "caption")
    with pytest.raises(InputError, match="attached already"):
        adapters.attach(tiny_model, "caption", kind="lora")
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


# ---------------------------------------------------------------- LoRA
def test_lora_is_its_formula_beside_a_frozen_layer(tiny_model):
    trains = adapters.attach(tiny_model, "caption", kind="lora", reduction=4)
    shake(tiny_model, "caption")
    attn, x = tiny_model.transformer.h[0].attn, torch.randn(3, 5, 128)
    lora = attn.lora_slot["caption"]
    assert (
        lora.down.weight.shape == (4, 128)
        and lora.up.weight.shape == (3 * 128, 4)
        and lora.down.bias is None
    )
    update = 2 * (x.double() @ lora.down.weight.double().T) @ lora.up.weight.double().T
    torch.testing.assert_close(lora(x).double(), update, atol=1e-5, rtol=1e-5)
    rotary = Rotary(torch.arange(5)[None], 1, tiny_model.config, training=False)
    actual = attn(x, rotary, None)
    hook = attn.c_attn.register_forward_hook(lambda *call: (call[2].double() + update).float())
    with adapters.active(tiny_model, []):
        torch.testing.assert_close(attn(x, rotary, None), actual, atol=1e-5, rtol=1e-5)
    hook.remove()
    assert lora(x.bfloat16()).dtype == torch.bfloat16 and lora.up.weight.dtype == torch.float32
    assert len(trains) == 2 * 3  # down and up, at three blocks of two towers


def test_fresh_lora_changes_nothing_and_acts_on_the_q_k_v_projections_alone(tiny_base, tiny_model):
    expected = run(tiny_model)
    trains = adapters.attach(tiny_model, "caption", kind="lora", reduction=4)
    assert torch.equal(run(tiny_model), expected)
    blocks = [f"transformer.h.{k}.attn" for k in range(2)] + [
        "transformer.visual.transformer.resblocks.0.attn"
    ]
    assert trains == sorted(
        f"{b}.lora_slot.caption.{part}.weight" for b in blocks for part in ("down", "up")
    )
    shake(tiny_model, "caption")
    merged = QwenVL.from_pretrained(tiny_base)
    for b, layer in zip(blocks, ("c_attn", "c_attn", "in_proj")):
        lora = tiny_model.get_submodule(f"{b}.lora_slot")["caption"]
        merged.get_parameter(f"{b}.{layer}.weight").data += 2 * lora.up.weight @ lora.down.weight
    assert not torch.allclose(run(tiny_model), expected, atol=1e-2)
    torch.testing.assert_close(run(tiny_model), run(merged), atol=2e-4, rtol=1e-4)


def test_lora_is_switched_saved_and_loaded_as_adapters_are(tiny_base, tiny_model, tmp_path):
    expected_base = run(tiny_model)
    adapters.attach(tiny_model, "caption", kind="lora", reduction=4, soft_prompt=True)
    shake(tiny_model, "caption")
    expected = run(tiny_model)
    with adapters.active(tiny_model, []):
        assert torch.equal(run(tiny_model), expected_base)
    assert torch.equal(run(tiny_model), expected)
    adapters.save(tiny_model, tmp_path / "lora", "caption", stage="sft")
    other = QwenVL.from_pretrained(tiny_base)
    card = adapters.load(other, tmp_path / "lora")
    assert torch.equal(run(other), expected) and (card["kind"], card["reduction"]) == ("lora", 4)
    assert "| vision, language | rank 4 | yes |" in (tmp_path / "lora" / "README.md").read_text()


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
    assert [card[k] for k in ("stage", "reduction", "where", "soft_prompt")] == [
        "sft",
        4,
        ["vision", "language"],
        True,
    ]
    assert len(adapters.folder_hash(folder)) == 64


def test_adapters_for_another_base_are_refused(folder, tmp_path):
    from conftest import write_tiny_base

    other = QwenVL.from_pretrained(write_tiny_base(tmp_path / "other", seed=1))
    with pytest.raises(InputError, match="another base"):
        adapters.load(other, folder)


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda w: w.pop(sorted(w)[0]), "is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra is left over"),
        (lambda w: w.update({sorted(w)[0]: torch.zeros(3)}), r"has shape \(3,\)"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_name(folder, tiny_model, damage, expected):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapters.safetensors")
    damage(weights)
    save_file(weights, folder / "adapters.safetensors")
    with pytest.raises(InputError, match=expected):
        adapters.load(tiny_model, folder)


def test_what_is_no_adapter_folder(folder, tiny_model, tmp_path):
    good = json.loads((folder / "adapters.json").read_text())
    for text, expected in (
        ("{}", "not the description"),
        ("no", "cannot be read"),
        ("[]", "not the description"),
        (json.dumps({**good, "reduction": "x"}), "not the description"),
        (json.dumps({**good, "where": None}), "not the description"),
    ):
        (folder / "adapters.json").write_text(text)
        with pytest.raises(InputError, match=expected):
            adapters.load(tiny_model, folder)
    with pytest.raises(InputError, match=r"no adapters\.json"):
        adapters.load(tiny_model, tmp_path)
    card = {
        "base": "x",
        "fingerprint": tiny_model.fingerprint,
        "name": "caption",
        "where": ["language"],
    }
    (folder / "adapters.json").write_text(
        json.dumps({**card, "reduction": 4, "soft_prompt": False})
    )
    (folder / "adapters.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        adapters.load(tiny_model, folder)


@pytest.mark.parametrize(
    "change",
    [
        {"where": ["nowhere"]},
        {"name": "a.b"},
        {"name": "keys"},
        {"reduction": 0},
        {"kind": "hypernet"},
        {"where": [["vision"]]},
    ],
)
def test_a_description_of_what_nobody_can_attach_is_refused(folder, tiny_model, change):
    path = folder / "adapters.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError):
        adapters.load(tiny_model, folder)


def test_adapters_json_says_what_it_is_for_and_where_it_came_from(
    folder, trained, tiny_base, tmp_path
):
    card = json.loads((folder / "adapters.json").read_text())
    expected = {
        "base": str(tiny_base),
        "fingerprint": trained.fingerprint,
        "name": "caption",
        "kind": "adapter",
        "where": ["vision", "language"],
        "reduction": 4,
        "soft_prompt": True,
        "below": None,
        "stage": "sft",
    }
    assert {key: card[key] for key in expected} == expected
    assert card["versions"] == {"torch": torch.__version__, "python": platform.python_version()}
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapters.json",
        "adapters.safetensors",
    ]
    assert sorted(load_file(folder / "adapters.safetensors")) == adapters.names_of(
        trained, "caption"
    )
    more = {
        "parent": str(folder),
        "parent_hash": adapters.folder_hash(folder),
        "threshold": 0.4,
        "arguments": {"lr": 1e-3},
    }
    adapters.save(trained, tmp_path / "next", "caption", stage="dpo", **more)
    assert {key: adapters.read_card(tmp_path / "next")[key] for key in more} == more


def test_the_model_card_names_base_stage_parent_and_sizes(trained, tiny_base, tmp_path):
    adapters.save(
        trained, tmp_path / "dpo", "caption", stage="dpo", parent="out/sft", parent_hash="0"
    )
    text = (tmp_path / "dpo" / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    head = yaml.safe_load(head)
    assert head == {"library_name": "pytorch", "tags": ["image-captioning", "adapter"]}
    count = sum(trained.get_parameter(n).numel() for n in adapters.names_of(trained, "caption"))
    for expected in (
        "# dpo\n",
        str(tiny_base),
        "stage `dpo` from `out/sft`",
        f"width ÷ 4 | yes | {count:,} |",
        f"python caption.py img.jpg --adapters {tmp_path / 'dpo'}",
        "adapters.json",
        "log.jsonl",
    ):
        assert expected in body
    adapters.save(trained, tmp_path / "sft", "caption", stage="sft", parent=None)
    assert "stage `sft`." in (tmp_path / "sft" / "README.md").read_text() and "{" not in text


def test_the_model_card_names_a_base_of_the_hub_and_never_a_folder(trained, tmp_path, monkeypatch):
    """base_model must be a repository on the Hub: a path there is refused, and means nothing to
    others."""
    trained.base = "Qwen/Qwen-VL"
    adapters.save(trained, tmp_path / "sft", "caption", stage="sft")
    head, body = (tmp_path / "sft" / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1:]
    assert yaml.safe_load(head)["base_model"] == "Qwen/Qwen-VL"
    assert "[Qwen/Qwen-VL](https://huggingface.co/Qwen/Qwen-VL)" in body
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets" / "toy").mkdir(parents=True)
    for folder in ("assets/toy", str(tmp_path / "assets" / "toy"), "~/toy"):
        trained.base = folder
        adapters.save(trained, tmp_path / "sft", "caption", stage="sft")
        text = (tmp_path / "sft" / "README.md").read_text(encoding="utf-8")
        assert "base_model" not in text and f"`{folder}`" in text


# ---------------------------------------------------------------- views
def test_the_views_of_a_folder_come_back_and_old_folders_have_six(trained, folder, tmp_path):
    for name, boxes in LAYOUTS.items():
        adapters.save(trained, tmp_path / name, "caption", stage="sft", views=boxes)
        assert adapters.views_of(tmp_path / name) == boxes
        assert adapters.views_of(tmp_path / name, name) == boxes
        assert adapters.views_of(None, name) == boxes
    assert "views" not in json.loads((folder / "adapters.json").read_text())
    assert adapters.views_of(folder) == adapters.views_of(None) == LAYOUTS["six"]
    with pytest.raises(InputError, match=r"--views five: .*the views six-wide; leave") as caught:
        adapters.views_of(tmp_path / "six-wide", "five")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="--views one"):
        adapters.views_of(folder, "one")


def test_views_of_an_edited_layout_are_kept(trained, tmp_path):
    boxes = ((0.0, 0.0, 1.0, 1.0), (0.1, 0.2, 0.3, 0.4))
    adapters.save(trained, tmp_path / "sft", "caption", stage="sft", views=boxes)
    assert adapters.views_of(tmp_path / "sft") == boxes
    with pytest.raises(InputError, match=r"0\.3, 0\.4"):
        adapters.views_of(tmp_path / "sft", "six")


@pytest.mark.parametrize(
    "boxes",
    [
        "six",
        [],
        None,
        6,
        [[0, 0, 1]],
        [[0, 0, 1, 1], "box"],
        [[0, 0, 1, 2]],
        [[0.5, 0, 0.5, 1]],
        [[0, 1, 1, 0]],
        [[0, 0, 1, None]],
        [[0, 0, float("nan"), 1]],
        [[0, 0, True, "1"]],
    ],
)
def test_views_that_are_no_boxes_are_refused(folder, boxes):
    path = folder / "adapters.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "views": boxes}))
    with pytest.raises(InputError, match="not a list of boxes") as caught:
        adapters.views_of(folder)
    assert "\n" not in str(caught.value)


def test_a_soft_prompt_alone_is_saved_and_loaded(tiny_base, tiny_model, tmp_path):
    expected_base, slots = run(tiny_model), len(tiny_model.tokenizer.encode(CAPTION_PROMPT))
    trains = adapters.attach(tiny_model, "caption", where=(), soft_prompt=True)
    assert trains == ["soft_prompts.caption.vectors"] and torch.equal(
        run(tiny_model), expected_base
    )
    shake(tiny_model, "caption", by=0.5)
    expected = run(tiny_model)
    adapters.save(tiny_model, tmp_path / "prompt", "caption", stage="sft")
    assert list(load_file(tmp_path / "prompt" / "adapters.safetensors")) == trains
    other = QwenVL.from_pretrained(tiny_base)
    card = adapters.load(other, tmp_path / "prompt")
    assert (
        card["where"] == []
        and card["soft_prompt"]
        and other.caption_prompt(1).count(other.tokenizer.soft_prompt_id) == slots
    )
    assert torch.equal(run(other), expected) and not torch.equal(expected, expected_base)
    assert (
        f"| none | width ÷ 8 | yes | {slots * 128:,} |"
        in (tmp_path / "prompt" / "README.md").read_text()
    )


def test_only_attached_adapters_are_saved(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="nobody"):
        adapters.save(tiny_model, tmp_path / "out", "nobody")
    assert not (tmp_path / "out" / "adapters.json").exists()


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_full_disk_while_saving_leaves_the_folder_as_it_was(
    tiny_base, trained, folder, expected, monkeypatch, fails_at
):
    """Saving other adapters over a folder, with the disk full at the tensors, the model card or the
    description."""
    new = QwenVL.from_pretrained(tiny_base)
    adapters.attach(new, "caption", ("language",), reduction=8)
    written = []

    def full(write):
        def writing(*args, **how):
            written.append(args)
            path = next(a for a in args if isinstance(a, str | Path) and Path(a).parent == folder)
            if len(written) > fails_at:
                Path(path).write_bytes(b"{")
                raise OSError(28, "No space left on device")
            return write(*args, **how)

        return writing

    with monkeypatch.context() as patch:
        patch.setattr(adapters, "save_file", full(adapters.save_file))
        patch.setattr(Path, "write_text", full(Path.write_text))
        with pytest.raises(OSError, match="No space"):
            adapters.save(new, folder, "caption", stage="sft")
    assert len(written) == fails_at + 1
    model = QwenVL.from_pretrained(tiny_base)
    card = adapters.load(model, folder)
    assert card["reduction"] == 4 and torch.equal(run(model), expected)
    adapters.save(new, folder, "caption", stage="sft")  # and once there is room again
    assert adapters.load(QwenVL.from_pretrained(tiny_base), folder)["reduction"] == 8


# ---------------------------------------------------------------- QA adapters, below their
# captioner
def save_qa(base, captioner, folder):
    """A trained QA adapter for the captioner in a folder -> the model that has both."""
    model = QwenVL.from_pretrained(base)
    name = adapters.load(model, captioner)["name"]
    adapters.attach(model, "qa", ("language",), reduction=16, below=name)
    shake(model, "qa")
    adapters.save(
        model,
        folder,
        "qa",
        stage="qa",
        threshold=0.625,
        parent=str(captioner),
        parent_hash=adapters.folder_hash(captioner),
    )
    return model


def test_a_qa_adapter_comes_back_below_its_captioner(
    tiny_base, folder, expected, tiny_model, tmp_path
):
    both = run(save_qa(tiny_base, folder, tmp_path / "qa"))
    adapters.load(tiny_model, folder)
    card = adapters.load(tiny_model, tmp_path / "qa")
    expected_card = {
        "name": "qa",
        "where": ["language"],
        "reduction": 16,
        "soft_prompt": False,
        "below": "caption",
        "stage": "qa",
        "threshold": 0.625,
        "parent": str(folder),
        "parent_hash": adapters.folder_hash(folder),
    }
    assert {key: card[key] for key in expected_card} == expected_card
    assert {slot.stack for slot, *_ in tiny_model.places("language")} == {
        ("qa", "caption")
    }
    assert {slot.stack for slot, *_ in tiny_model.places("vision")} == {("caption",)}
    assert tiny_model.soft_prompts.stack == ("caption",)
    assert torch.equal(run(tiny_model), both) and not torch.equal(both, expected)
    with adapters.active(tiny_model, ["caption"]):
        assert torch.equal(run(tiny_model), expected)
    with adapters.active(tiny_model, ["qa", "caption"]):
        assert torch.equal(run(tiny_model), both)
    assert not any(p.requires_grad for p in tiny_model.parameters())


def test_a_qa_adapter_is_refused_without_its_captioner_or_with_another(
    tiny_base, trained, folder, tiny_model, tmp_path
):
    save_qa(tiny_base, folder, tmp_path / "qa")
    with pytest.raises(InputError, match="not the one loaded"):
        adapters.load(tiny_model, tmp_path / "qa")
    shake(trained, "caption")
    adapters.save(trained, tmp_path / "later", "caption", stage="dpo")
    adapters.load(tiny_model, tmp_path / "later")
    with pytest.raises(InputError, match=f"below the captioner {folder}"):
        adapters.load(tiny_model, tmp_path / "qa")
    assert adapters.names_of(tiny_model, "qa") == []


@pytest.mark.parametrize(
    "how",
    [{"kind": "lora"}, {"where": (), "soft_prompt": True}, {"where": ("vision",)}],
    ids=["lora", "prompt alone", "vision alone"],
)
def test_a_qa_adapter_knows_its_captioner_whatever_that_is_made_of(
    tiny_base, tiny_model, tmp_path, how
):
    captioner = QwenVL.from_pretrained(tiny_base)
    for number in range(2):
        if number == 0:
            adapters.attach(captioner, "caption", **{"reduction": 4, **how})
        shake(captioner, "caption", by=0.3)
        adapters.save(captioner, tmp_path / f"sft{number}", "caption", stage="sft")
    both = run(save_qa(tiny_base, tmp_path / "sft0", tmp_path / "qa"))
    assert adapters.read_card(tmp_path / "qa")["below"] == "caption"
    adapters.load(tiny_model, tmp_path / "sft0")
    adapters.load(tiny_model, tmp_path / "qa")
    assert torch.equal(run(tiny_model), both)
    other = QwenVL.from_pretrained(tiny_base)
    adapters.load(other, tmp_path / "sft1")
    with pytest.raises(InputError, match="not the one loaded"):
        adapters.load(other, tmp_path / "qa")
