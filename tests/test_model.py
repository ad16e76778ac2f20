"""model.py against the official numbers, an independent float64 reference, and itself: packed
branches, padding, checkpointing, positions.

Random tiny models have weights of a size that lets every part matter, the position table of the
resampler included."""

import json
import math
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import adapters
import generate
from model import LOGITS_AT_ONCE, Config, QwenVL, RMSNorm, Rotary, Slot, VisionConfig, layout
from plumbing.errors import InputError
from plumbing.positions import ntk_alpha, resize_table, sincos_table

FIXTURES = Path(__file__).parent / "fixtures"
IMG, END, PAD, VOCAB = 314, 315, 316, 320  # the ids of the tiny models; text is below IMG


# ---------------------------------------------------------------- helpers
def gap(a, b):
    """The largest absolute difference; a shape that differs is an error."""
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


def tiny(
    seed=0,
    hidden=128,
    heads=4,
    layers=2,
    seq_length=2048,
    ntk=True,
    logn=True,
    no_bias=True,
    width=48,
    vision_heads=3,
    vision_layers=1,
    image_size=56,
    n_queries=4,
):
    """A random model in eval mode, and its config as config.json would have it."""
    visual = dict(
        image_size=image_size,
        patch_size=14,
        width=width,
        layers=vision_layers,
        heads=vision_heads,
        mlp_ratio=4.9231,
        output_dim=hidden,
        image_start_id=IMG,
        n_queries=n_queries,
    )
    raw = dict(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        kv_channels=hidden // heads,
        intermediate_size=352,
        seq_length=seq_length,
        layer_norm_epsilon=1e-6,
        rotary_emb_base=10000,
        use_dynamic_ntk=ntk,
        use_logn_attn=logn,
        no_bias=no_bias,
    )
    model = QwenVL(Config(**raw, visual=VisionConfig(**visual)))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, w in model.state_dict().items():
            noise = torch.randn(w.shape, generator=rng)
            if w.dim() == 1:
                w.copy_(0.2 * noise + (0 if name.endswith("bias") else 1))
            elif name.endswith(("wte.weight", "pos_embed", "query", "positional_embedding")):
                w.copy_(noise)
            else:
                w.copy_(noise * 1.3 / math.sqrt(w[0].numel()))
    return model.eval(), {**raw, "visual": visual}


def text(n, seed=0):
    """n random text ids, as a list."""
    return torch.randint(
        0, IMG, (n,), generator=torch.Generator().manual_seed(1000 + seed)
    ).tolist()


def span(n_queries=4):
    return [IMG] + [PAD] * n_queries + [END]


def pictures(n, size=56, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(2000 + seed))


def pad_rows(rows, left=True, fill=0):
    """Lists of different length -> (B, L) and the mask (B, L) of what is real."""
    length = max(len(row) for row in rows)
    padded, mask = [], []
    for row in rows:
        extra = length - len(row)
        padded.append([fill] * extra + row if left else row + [fill] * extra)
        mask.append(
            [False] * extra + [True] * len(row) if left else [True] * len(row) + [False] * extra
        )
    return torch.tensor(padded), torch.tensor(mask)


def referred(model, raw, ids, images, mask=None, **kwargs):
    return reference.forward(model.state_dict(), raw, ids, images, mask, **kwargs)


def shifted_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def gradients(model, loss):
    """The gradient of every parameter by name; every parameter must get one."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return actual


def assert_same_gradients(actual, expected, tolerance=1e-5):
    """Gradients agree to `tolerance` of each one's largest number."""
    assert actual.keys() == expected.keys()
    for name, expected_grad in expected.items():
        assert expected_grad.abs().max() > 0, name
        assert gap(actual[name], expected_grad) < tolerance * max(
            1, expected_grad.abs().max().item()
        ), name


# ---------------------------------------------------------------- official numbers
@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The official tiny model -> (model, what the official code computed, the rest of its
    numbers)."""
    meta = json.loads((FIXTURES / "qwenvl_tiny.json").read_text())
    path = tmp_path_factory.mktemp("official") / "config.json"
    path.write_text(json.dumps(meta["model"]))
    stored = load_file(FIXTURES / "qwenvl_tiny.safetensors")
    model = QwenVL(Config.from_json(path))
    model.load_state_dict({name: w for name, w in stored.items() if not name.startswith("io.")})
    return model.eval(), {name[3:]: t for name, t in stored.items() if name.startswith("io.")}, meta


def test_reference_equals_official_numbers(official):
    model, io, meta = official
    args = (
        model.state_dict(),
        meta["model"],
        io["input_ids"],
        io["pixel_values"],
        io["attention_mask"],
    )
    actual = reference.forward(*args)
    for name in ("vit_out", "resampler_out", "image_embeds", "hidden_spliced", "logits"):
        assert gap(actual[name], io[name]) < 2e-5, name
    assert gap(reference.forward(*args, training=True)["logits"], io["logits_train"]) < 2e-5
    ids, step_logits = reference.greedy(*args, steps=16)
    assert ids.equal(io["greedy_ids"])
    assert gap(step_logits, io["greedy_step_logits"]) < 2e-5


def test_official_vision_tower(official):
    model, io, _ = official
    visual, seen = model.transformer.visual, {}
    hooks = [
        visual.transformer["resblocks"][-1].register_forward_hook(
            lambda *call: seen.update(vit_out=call[2])
        ),
        visual.attn_pool.register_forward_hook(lambda *call: seen.update(resampler_out=call[2])),
    ]
    with torch.no_grad():
        seen["image_embeds"] = visual(io["pixel_values"])
    for hook in hooks:
        hook.remove()
    for name in ("vit_out", "resampler_out", "image_embeds"):
        assert gap(seen[name], io[name]) < 5e-5, name


@torch.no_grad()
def test_official_hidden_states(official):
    model, io, _ = official
    seen = {}
    hooks = [
        model.transformer.h[0].register_forward_hook(
            lambda *call: seen.update(hidden_block0=call[2])
        ),
        model.transformer.ln_f.register_forward_hook(
            lambda *call: seen.update(hidden_final_norm=call[2])
        ),
    ]
    model.eval()(io["input_ids"], io["pixel_values"])
    for hook in hooks:
        hook.remove()
    seen["hidden_spliced"] = model.embed(io["input_ids"], io["pixel_values"])
    for name in ("hidden_spliced", "hidden_block0", "hidden_final_norm"):
        assert gap(seen[name], io[name]) < 5e-5, name


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_official_logits(official, training):
    model, io, _ = official
    expected_logits = io["logits_train" if training else "logits"]
    logits = model.train(training)(io["input_ids"], io["pixel_values"], io["attention_mask"].bool())
    assert gap(logits, expected_logits) < 1e-4


def test_official_loss_and_gradients(official):
    model, io, meta = official
    loss = shifted_loss(
        model.train()(io["input_ids"], io["pixel_values"], io["attention_mask"].bool()),
        io["labels"],
    )
    assert loss.item() == pytest.approx(meta["loss_train"], abs=1e-5)
    actual = gradients(model, loss)
    assert actual.keys() == meta["grad_norm"].keys()
    for name, expected_norm in meta["grad_norm"].items():
        assert actual[name].norm().item() == pytest.approx(expected_norm, rel=1e-4), name
    stored = [name for name in io if name.startswith("grad.")]
    assert len(stored) == 4
    for name in stored:
        assert gap(actual[name[5:]], io[name]) < 2e-5, name


def test_official_greedy(official):
    model, io, _ = official
    prompt = io["input_ids"], io["pixel_values"], io["attention_mask"].bool()
    assert generate.greedy(model.train(), *prompt, max_new_tokens=16).equal(io["greedy_ids"])
    assert model.training, "greedy must restore the mode"
    model.eval()
    with torch.no_grad():
        cache, logits = generate.prefill(model, *prompt, 1, 16)
        step_logits = [logits]
        for t in range(15):
            step_logits.append(generate.decode(model, cache, io["greedy_ids"][:, t]))
    assert gap(torch.stack(step_logits, 1), io["greedy_step_logits"]) < 1e-4


def test_resampler_position_table_is_a_buffer(official):
    """It is stored in the checkpoint, and nothing trains it, even when the resampler is
    unfrozen."""
    model, _, meta = official
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert [*buffers] == meta["no_grad_params"] == ["transformer.visual.attn_pool.pos_embed"]
    assert parameters.keys() == meta["grad_norm"].keys()
    assert all(p.requires_grad for p in parameters.values())


# ---------------------------------------------------------------- tables, names
def test_resize_table_equals_official():
    stored = load_file(FIXTURES / "posembed.safetensors")
    assert gap(resize_table(stored["pe"], 1024), stored["to_1024"]) < 1e-6
    assert gap(resize_table(stored["pe"], 64), stored["to_64"]) < 1e-6
    assert resize_table(stored["pe"], 256) is stored["pe"]
    small = resize_table(stored["pe"].bfloat16(), 1024)
    assert small.dtype == torch.bfloat16
    assert small.equal(resize_table(stored["pe"].bfloat16().float(), 1024).bfloat16())


def test_sincos_table_equals_official():
    stored = load_file(FIXTURES / "posembed.safetensors")
    assert gap(sincos_table(16, 16), stored["sincos_16x16x16"]) < 1e-6
    # at full width, the fixture keeps the 16 rows of the diagonal; fp32 angles differ in their last
    # digits
    assert gap(sincos_table(16, 4096)[::17], stored["sincos_4096_grid16_sub"]) < 5e-6


def test_full_size_names_and_shapes():
    expected_shapes = json.loads((FIXTURES / "state_dict_shapes.json").read_text())
    with torch.device("meta"):
        model = QwenVL(Config())
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == expected_shapes
    assert sum(t.numel() for t in model.state_dict().values()) == 9_656_935_168


def test_slots_add_no_names_until_filled():
    model, _ = tiny()
    before = set(model.state_dict())
    assert (
        sum(isinstance(m, Slot) for m in model.modules()) == 3 * (1 + 2) + 1
    )  # three a block in both towers, and the soft prompt
    new = adapters.attach(model, "probe")
    assert set(model.state_dict()) - before == set(new)
    assert before < set(model.state_dict())


@torch.no_grad()
def test_fresh_adapters_change_nothing_and_active_ones_act():
    """The slots are where adapters.py needs them, in the residual branches of every block."""
    model, _ = tiny()
    ids, images = torch.tensor([[*span(), *text(5)]]), pictures(1)
    plain = model(ids, images)
    new = adapters.attach(model, "probe")
    assert model(ids, images).equal(plain)
    for name in [n for n in new if n.endswith("up.bias")]:
        bias = model.get_parameter(name)
        bias += 0.5
        assert gap(model(ids, images), plain) > 1e-3, name
        bias.zero_()


# ---------------------------------------------------------------- against the reference
SHAPES = {
    "six queries of one image": dict(n_queries=1),
    "nine queries, 7 × 7 patches": dict(n_queries=9, image_size=98),
    "hidden 256, one layer": dict(hidden=256, heads=2, layers=1),
    "hidden 256, three layers": dict(
        hidden=256, heads=8, layers=3, vision_layers=2, width=32, vision_heads=4
    ),
    "224 px: the stored table as it is": dict(image_size=224),
    "448 px: the table enlarged": dict(image_size=448, width=12, layers=1),
    "width is output_dim: no kv_proj": dict(width=128, vision_heads=4, vision_layers=2),
    "biases everywhere": dict(no_bias=False),
}


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes_equal_reference(shape):
    """Two rows, one left-padded, with one and two images; both modes."""
    model, raw = tiny(seed=len(str(shape)), **shape)
    Q, size = raw["visual"]["n_queries"], raw["visual"]["image_size"]
    ids, mask = pad_rows(
        [[*text(2), *span(Q), *text(3)], [*span(Q), *text(1), *span(Q), *text(6, seed=1)]]
    )
    images = pictures(3, size)
    expected = referred(model, raw, ids, images, mask)
    assert gap(model.transformer.visual(images), expected["image_embeds"]) < 1e-4
    assert gap(model.embed(ids, images)[mask], expected["hidden_spliced"][mask]) < 1e-4
    assert gap(model(ids, images, mask)[mask], expected["logits"][mask]) < 1e-4
    assert gap(model.train()(ids, images, mask)[mask], expected["logits"][mask]) < 1e-4
    assert any(n.endswith("mlp.w1.bias") for n in model.state_dict()) is not raw["no_bias"]
    assert any("kv_proj" in n for n in model.state_dict()) is (
        raw["visual"]["width"] != raw["hidden_size"]
    )


@torch.no_grad()
def test_six_images_in_a_row_equal_reference():
    model, raw = tiny(seed=6)
    ids = torch.tensor([[*(span() * 6), *text(6)]])
    images = pictures(6)
    logits = model(ids, images)
    assert gap(logits, referred(model, raw, ids, images)["logits"]) < 1e-4
    assert gap(model(ids, images.flip(0)), logits) > 0.1, "the order of the images must matter"


CONTEXTS = [
    (32, 1),
    (33, 3),
    (64, 3),
    (65, 7),
    (90, 7),
]  # length of the row, NTK alpha; seq_length is 32


@torch.no_grad()
@pytest.mark.parametrize("ntk", [True, False], ids=["ntk", "no-ntk"])
@pytest.mark.parametrize("logn", [True, False], ids=["logn", "no-logn"])
@pytest.mark.parametrize("length, expected_alpha", CONTEXTS)
def test_long_contexts_equal_reference(length, expected_alpha, ntk, logn):
    """Two rows, one padded on either side, up to and beyond seq_length, in both modes."""
    model, raw = tiny(seed=length, seq_length=32, ntk=ntk, logn=logn)
    rows, images = (
        [[*text(4), *span(), *text(length - 10)], [*span(), *text(length - 15, seed=1)]],
        pictures(2),
    )
    for left in (True, False):
        ids, mask = pad_rows(rows, left)
        expected = referred(model, raw, ids, images, mask)
        assert expected["alpha"] == (expected_alpha if ntk else 1)
        expected_trained = referred(model, raw, ids, images, mask, training=True)["logits"]
        evaluated, trained = model.eval()(ids, images, mask), model.train()(ids, images, mask)
        assert gap(evaluated[mask], expected["logits"][mask]) < 1e-4
        assert gap(trained[mask], expected_trained[mask]) < 1e-4
        if length == 32 or not (ntk or logn):
            assert evaluated[mask].equal(trained[mask])
        else:
            assert gap(evaluated[mask], trained[mask]) > 1e-3


def test_ntk_alpha_at_full_size():
    expected = {1: 1, 1548: 1, 2048: 1, 2049: 3, 4096: 3, 4097: 7, 8192: 7, 8193: 15}
    assert {n: ntk_alpha(n, 2048) for n in expected} == expected


@torch.no_grad()
def test_train_mode_forgets_a_long_context():
    """The official code keeps training with the NTK base of the last long evaluation; this must
    not."""
    model, _ = tiny(seq_length=32)
    ids = torch.tensor([text(20)])
    before = model.train()(ids)
    model.eval()(torch.tensor([text(70)]))
    assert model(ids).equal(before)
    assert model.train()(ids).equal(before)


@pytest.mark.parametrize(
    "length, steps, switches",
    [
        (30, 12, {}),
        (40, 32, {}),
        (30, 12, {"ntk": False}),
        (30, 12, {"logn": False}),
        (30, 12, {"hidden": 256, "heads": 2, "no_bias": False}),
    ],
    ids=["into logn", "from alpha 3 past 64", "no-ntk", "no-logn", "hidden 256"],
)
def test_greedy_across_seq_length_equals_reference(length, steps, switches):
    """Decoding keeps the alpha of its prefill, counts absolute slots for logn, and pads count as
    slots."""
    model, raw = tiny(seed=length, seq_length=32, **switches)
    prompts = [[*text(3), *span(), *text(length - 9)], [*span(), *text(length - 12, seed=1)]]
    ids, mask = pad_rows(prompts)
    images = pictures(2)
    expected_ids, expected_logits = reference.greedy(
        model.state_dict(), raw, ids, images, mask, steps
    )
    assert generate.greedy(model, ids, images, mask, max_new_tokens=steps).equal(expected_ids)
    with torch.no_grad():
        cache, logits = generate.prefill(model, ids, images, mask, 1, steps)
        step_logits = [logits] + [
            generate.decode(model, cache, expected_ids[:, t]) for t in range(steps - 1)
        ]
    assert gap(torch.stack(step_logits, 1), expected_logits) < 1e-4


@torch.no_grad()
def test_sampled_image_token_opens_no_image():
    """In a cached decode step `<img>` is a token like another."""
    model, raw = tiny(seed=9)
    ids, images = torch.tensor([[*span(), *text(4)]]), pictures(1)
    cache, _ = generate.prefill(model, ids, images, None, 1, 4)
    logits = generate.decode(model, cache, torch.tensor([IMG]))
    longer = torch.cat([ids, torch.tensor([[IMG]])], 1)
    expected = referred(model, raw, longer, images, prompt_length=ids.shape[1])["logits"][:, -1]
    assert gap(logits, expected) < 1e-4


# ---------------------------------------------------------------- packed branches
def packed(prefix, branches):
    """One row: its ids and, per token, its branch."""
    labels = [0] * len(prefix) + [k for k, b in enumerate(branches, 1) for _ in b]
    return prefix + [t for b in branches for t in b], labels


def separate_logits(model, prefix, branches, images, pads=0):
    """What packing must equal, (len(packed), vocab): the prefix's logits from the shortest
    continuation, then those of each branch, every sequence in a separate call behind `pads` slots
    of left padding."""
    mask = torch.tensor([[False] * pads + [True] * 10_000])
    outs = []
    for b in branches:
        ids = torch.tensor([[0] * pads + prefix + b])
        outs.append(model(ids, images, mask[:, : ids.shape[1]] if pads else None)[0, pads:])
    shortest = min(range(len(branches)), key=lambda k: len(branches[k]))
    return torch.cat([outs[shortest][: len(prefix)], *(out[len(prefix) :] for out in outs)])


def two_rows():
    """Rows of different lengths, images and numbers of branches: [(prefix, branches)], the images
    of each."""
    rows = [
        ([*text(3), *span(), *text(4)], [text(5, 1), text(2, 2), text(7, 3)]),
        ([*span(), *text(1), *span(), *text(3, 4)], [text(3, 5), text(1, 6)]),
    ]
    return rows, [pictures(1, seed=1), pictures(2, seed=2)]


def pack_rows(rows, left, padding_branch=0):
    """The rows in one batch -> ids, mask, branch (B, L); the padding belongs to the prefix, or to
    another branch."""
    made = [packed(*row) for row in rows]
    ids, mask = pad_rows([ids for ids, _ in made], left)
    branch, _ = pad_rows([labels for _, labels in made], left, fill=padding_branch)
    return ids, mask, branch


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_packed_equals_separate(side, training):
    """Logits, and gradients of all parameters, of continuations that share their prefix in one
    sequence."""
    model, _ = tiny(seed=3)
    model.train(training)
    rows, images = two_rows()
    rows, images = (rows[:1], images[:1]) if side == "none" else (rows, images)
    ids, mask, branch = pack_rows(rows, side == "left")
    logits = model(ids, torch.cat(images), None if side == "none" else mask, branch)[mask]
    expected_logits = torch.cat([separate_logits(model, *row, im) for row, im in zip(rows, images)])
    assert gap(logits, expected_logits) < 1e-5
    weights = (
        torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
        / logits.numel() ** 0.5
    )
    actual = gradients(model, (logits * weights).sum())
    assert_same_gradients(actual, gradients(model, (expected_logits * weights).sum()))


@torch.no_grad()
def test_branches_do_not_see_each_other():
    model, _ = tiny(seed=4)
    (prefix, branches), images = two_rows()[0][0], pictures(1)
    ids, labels = (torch.tensor([t]) for t in packed(prefix, branches))
    before = model(ids, images, branch=labels)
    after = model(ids.where(labels != 2, (ids + 1) % IMG), images, branch=labels)
    assert after[labels != 2].equal(before[labels != 2])
    assert gap(after[labels == 2], before[labels == 2]) > 0.1


@torch.no_grad()
def test_order_of_branch_tokens_does_not_matter():
    """Branches may be interleaved token by token, and their numbers are only names."""
    model, _ = tiny(seed=5, seq_length=16)
    prefix, branches = (
        [*span(), *text(8)],
        [text(6, 1), text(12, 2), text(18, 3)],
    )  # 20, 26 and 32 long: alpha is 3 for all
    ids, labels = (torch.tensor(t) for t in packed(prefix, branches))
    images = pictures(1)
    expected = model(ids[None], images, branch=labels[None])[0]
    at = {k: (labels == k).nonzero()[:, 0].tolist() for k in (1, 2, 3)}
    order, turn = list(range(len(prefix))), 0
    while any(at.values()):
        turn = turn % 3 + 1
        order += [at[turn].pop(0)] if at[turn] else []
    order = torch.tensor(order)
    names = torch.tensor([0, 7, 2, 5])
    actual = model(ids[order][None], images, branch=names[labels[order]][None])[0]
    assert gap(actual, expected[order]) < 1e-5


@torch.no_grad()
def test_packed_length_is_no_context_length():
    """Eval mode: 12 branches make a row of 112 tokens, each sequence has at most 32; NTK and logn
    stay off."""
    model, _ = tiny(seed=6, seq_length=32)
    prefix, branches = [*span(), *text(10)], [text(8, k) for k in range(11)] + [text(16, 11)]
    ids, labels = packed(prefix, branches)
    assert len(ids) > 3 * 32
    images = pictures(1)
    actual = model(torch.tensor([ids]), images, branch=torch.tensor([labels]))[0]
    assert gap(actual, separate_logits(model, prefix, branches, images)) < 1e-5
    assert (
        gap(actual, model.train()(torch.tensor([ids]), images, branch=torch.tensor([labels]))[0])
        == 0
    )


LENGTHS = {"all in alpha 3": (20, 40), "its edges": (17, 48, 30), "all in alpha 7": (60, 70)}


@torch.no_grad()
@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_branches_beyond_seq_length_equal_separate_sequences(lengths, pads):
    """Each branch is computed with the alpha and the logn of its separate sequence; all need the
    same alpha."""
    model, raw = tiny(seed=7, seq_length=32)
    prefix, branches = [*span(), *text(10 - pads)], [text(n, k) for k, n in enumerate(lengths)]
    ids, labels = packed(prefix, branches)
    images = pictures(1)
    mask = torch.tensor([[False] * pads + [True] * len(ids)])
    actual = model(
        torch.tensor([[0] * pads + ids]),
        images,
        mask if pads else None,
        torch.tensor([[0] * pads + labels]),
    )[0, pads:]
    expected = separate_logits(model, prefix, branches, images, pads)
    assert gap(actual, expected) < 3e-5
    assert (
        gap(actual, model.train()(torch.tensor([ids]), images, branch=torch.tensor([labels]))[0])
        > 1e-2
    )
    alone = referred(
        model,
        raw,
        torch.tensor([[0] * pads + prefix + branches[-1]]),
        images,
        mask[:, : pads + len(prefix) + lengths[-1]],
    )["logits"][0, -lengths[-1] :]
    assert gap(actual[-lengths[-1] :], alone) < 1e-4


def rows_beyond_seq_length():
    """Rows with branches of 33 to 64 tokens, of different prefixes; seq_length is 32."""
    return [
        ([*span(), *text(20)], [text(7, 1), text(20, 2)]),
        ([*span(), *text(12)], [text(23, 3), text(30, 4)]),
        ([*span(), *text(28)], [text(8, 5), text(2, 6), text(25, 7)]),
    ]


@torch.no_grad()
@pytest.mark.parametrize(
    "left, padding_branch",
    [(True, 0), (False, 0), (False, 2)],
    ids=["left", "right", "right, in a branch"],
)
@pytest.mark.parametrize(
    "switches", [{}, {"ntk": False}, {"logn": False}], ids=["both", "no-ntk", "no-logn"]
)
def test_rows_beyond_seq_length_equal_separate_sequences(left, padding_branch, switches):
    """A batch of rows of different lengths beyond seq_length; and positions picked from it."""
    model, _ = tiny(seed=8, seq_length=32, **switches)
    rows, images = rows_beyond_seq_length(), pictures(3)
    ids, mask, branch = pack_rows(rows, left, padding_branch)
    actual = model(ids, images, mask, branch)
    for row, (prefix, branches) in enumerate(rows):
        pads = int((~mask[row]).sum()) if left else 0
        expected = separate_logits(model, prefix, branches, images[row : row + 1], pads)
        assert gap(actual[row][mask[row]], expected) < 1e-5
    ends = mask & (branch != branch.roll(-1, 1))
    picked = torch.stack([row.nonzero()[[0, -1], 0] for row in ends])  # two of each row's ends
    expected = torch.stack([actual[row, at] for row, at in enumerate(picked)])
    assert gap(model(ids, images, mask, branch, positions=picked), expected) < 1e-5


def test_gradients_beyond_seq_length():
    """Eval mode: the gradients of branches that need the same alpha are those of separate
    sequences."""
    model, _ = tiny(seed=10, seq_length=32)
    prefix, branches, images = (
        [*span(), *text(10)],
        [text(18, 1), text(30, 2), text(48, 3)],
        pictures(1),
    )
    ids, labels = packed(prefix, branches)
    logits = model(torch.tensor([ids]), images, branch=torch.tensor([labels]))[0]
    expected_logits = separate_logits(model, prefix, branches, images)
    weights = (
        torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
        / logits.numel() ** 0.5
    )
    actual = gradients(model, (logits * weights).sum())
    assert_same_gradients(actual, gradients(model, (expected_logits * weights).sum()))


MIXED = {
    "one on each side": (6, 30),
    "alpha 1, 3 and 7": (60, 6, 20, 90),
    "edge: 32 and 33": (16, 17),
    "edge: 64 and 65": (48, 49),
}


@torch.no_grad()
@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("lengths", MIXED.values(), ids=MIXED.keys())
def test_branches_that_need_different_rotary_bases_are_refused(lengths, pads):
    """Their prefix can be computed with one only. Without NTK, and in training, there is nothing to
    refuse."""
    model, _ = tiny(seed=7, seq_length=32)
    prefix, branches = [*span(), *text(10 - pads)], [text(n, k) for k, n in enumerate(lengths)]
    ids, labels = packed(prefix, branches)
    args = torch.tensor([[0] * pads + ids]), pictures(1)
    mask = torch.tensor([[False] * pads + [True] * len(ids)]) if pads else None
    branch = torch.tensor([[0] * pads + labels])
    shortest, longest = 16 + min(lengths), 16 + max(lengths)
    with pytest.raises(InputError, match=f"of {shortest} to {longest} tokens") as error:
        model(*args, mask, branch)
    assert "\n" not in str(error.value)
    assert model.train()(*args, mask, branch).isfinite().all()
    without, _ = tiny(seed=7, seq_length=32, ntk=False)
    assert without(*args, mask, branch).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_rows_that_need_different_rotary_bases_are_refused(left):
    """Each row alone is fine, but their batch has one table of angles."""
    model, _ = tiny(seed=8, seq_length=32)
    rows = [([*span(), *text(2)], [text(3, 1), text(4, 2)]), *rows_beyond_seq_length()[1:]]
    ids, mask, branch = pack_rows(rows, left)
    with pytest.raises(InputError, match="different rotary bases"):
        model(ids, pictures(3), mask, branch)
    for row, (prefix, branches) in enumerate(rows):
        ids, labels = packed(prefix, branches)
        alone = model(torch.tensor([ids]), pictures(3)[row : row + 1], None, torch.tensor([labels]))
        expected = separate_logits(model, prefix, branches, pictures(3)[row : row + 1])
        assert gap(alone[0], expected) < 1e-5


@torch.no_grad()
def test_one_branch_and_no_branch_are_the_plain_sequence():
    model, _ = tiny(seed=11, seq_length=32)
    ids, images = torch.tensor([[*span(), *text(40)]]), pictures(1)
    expected = model(ids, images)
    assert gap(model(ids, images, branch=torch.zeros_like(ids)), expected) < 1e-5
    assert gap(model(ids, images, branch=(torch.arange(46) >= 20).long()[None]), expected) < 1e-5


# ---------------------------------------------------------------- positions
@torch.no_grad()
def test_positions_pick_from_the_full_logits():
    model, _ = tiny(seed=12)
    ids, mask = pad_rows([[*span(), *text(6)], [*span(), *text(3, 1)]])
    images = pictures(2)
    full = model(ids, images, mask)
    assert full.shape == (2, 12, VOCAB)
    assert gap(model(ids, images, mask, positions=torch.tensor([11])), full[:, 11:]) < 1e-5
    assert (
        gap(model(ids, images, mask, positions=torch.tensor([10, 7, 11])), full[:, [10, 7, 11]])
        < 1e-5
    )
    own = torch.tensor([[6, 11], [10, 9]])
    expected = torch.stack([full[0, [6, 11]], full[1, [10, 9]]])
    assert gap(model(ids, images, mask, positions=own), expected) < 1e-5
    nothing = model(ids, images, mask, positions=torch.zeros(2, 0, dtype=torch.int64))
    assert nothing.shape == (2, 0, VOCAB)


def logp_example(model, K=100):
    """Two rows with K positions each, some of them padding -> arguments of forward, full log-probs
    (B, K)."""
    ids, mask = pad_rows([[*span(), *text(30)], [*span(), *text(22, 1)]], left=False)
    rng = torch.Generator().manual_seed(3)
    last = mask.sum(1).tolist()
    positions = torch.stack([torch.randint(0, n, (K,), generator=rng) for n in last])
    logp_of = torch.randint(0, VOCAB, (2, K), generator=rng)
    logp_of[0, 70:] = logp_of[1, 95:] = -100
    args = dict(ids=ids, images=pictures(2), mask=mask, positions=positions)
    full = model(**args).float().log_softmax(-1)
    expected = full.gather(2, logp_of.clamp(min=0)[..., None])[..., 0].masked_fill(logp_of < 0, 0)
    return {**args, "logp_of": logp_of}, expected


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_logp_of_is_the_log_softmax_of_the_logits_and_so_are_its_gradients(training):
    """More tokens than LOGITS_AT_ONCE, so that they come in chunks; padding is 0 and gives no
    gradient."""
    model, _ = tiny(seed=12)
    model.train(training)
    args, expected = logp_example(model)
    actual = model(**args)
    assert actual.shape == (2, 100) and actual.dtype == torch.float32
    assert int((args["logp_of"] >= 0).sum()) > 2 * LOGITS_AT_ONCE
    assert gap(actual, expected) < 1e-5 and not actual[args["logp_of"] < 0].any()
    weights = torch.randn(actual.shape, generator=torch.Generator().manual_seed(5)) / 10
    expected_grads = gradients(model, (expected * weights).sum())
    assert_same_gradients(gradients(model, (actual * weights).sum()), expected_grads)


def test_logp_of_computes_no_logits_for_padding_and_never_many_at_once():
    model, _ = tiny(seed=12)
    args, _ = logp_example(model)
    rows = []
    hook = model.lm_head.register_forward_hook(lambda head, x, logits: rows.append(len(logits)))
    with torch.no_grad():
        model(**args)
    hook.remove()
    assert sum(rows) == int((args["logp_of"] >= 0).sum()) == 165 and max(rows) == LOGITS_AT_ONCE


def test_logp_of_nothing_but_padding_is_zero_with_zero_gradients():
    """As on a rank whose rows are all broken: every trained parameter must still get a gradient."""
    model, _ = tiny(seed=12)
    args, _ = logp_example(model)
    args["logp_of"] = torch.full_like(args["logp_of"], -100)
    actual = model(**args)
    assert actual.shape == (2, 100) and not actual.any()
    assert not any(g.any() for g in gradients(model, actual.sum()).values())
    args |= {"positions": torch.zeros(2, 0, dtype=torch.int64), "logp_of": args["logp_of"][:, :0]}
    assert model(**args).shape == (2, 0)


@torch.no_grad()
def test_logp_of_without_positions_or_with_the_same_ones_for_all_rows():
    model, _ = tiny(seed=12)
    ids, images = torch.tensor([[*span(), *text(6)], [*span(), *text(6, 1)]]), pictures(2)
    logp_of = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)  # every next token
    full = model(ids, images).log_softmax(-1)
    expected = full[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    assert gap(model(ids, images, logp_of=logp_of)[:, :-1], expected) < 1e-5
    actual = model(ids, images, positions=torch.tensor([3, 8]), logp_of=ids[:, [4, 9]])
    assert gap(actual, expected[:, [3, 8]]) < 1e-5


# ---------------------------------------------------------------- checkpointing, padding, precision
@pytest.mark.parametrize("seq_length", [2048, 14], ids=["short", "beyond seq_length"])
def test_checkpointing_changes_no_gradient(seq_length):
    """Every block of both towers runs again in the backward pass, and loss and gradients stay the
    same."""
    model, _ = tiny(seed=13, seq_length=seq_length, vision_layers=2)
    rows, images = two_rows()
    ids, mask, branch = pack_rows(rows, left=True)
    blocks = [*model.transformer.h, *model.transformer.visual.transformer["resblocks"]]
    results = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        runs = []
        hooks = [
            block.register_forward_pre_hook(lambda block, _, runs=runs: runs.append(block))
            for block in blocks
        ]
        loss = shifted_loss(
            model(ids, torch.cat(images), mask, branch), ids.masked_fill(~mask, -100)
        )
        once = len(runs)
        results.append((loss.item(), gradients(model, loss)))
        assert len(runs) == (2 * once if checkpointing else once)
        assert set(runs) == set(blocks)
        for hook in hooks:
            hook.remove()
    (expected_loss, expected_grads), (loss, grads) = results
    assert loss == expected_loss
    assert_same_gradients(grads, expected_grads, tolerance=1e-6)


@pytest.mark.parametrize("branched", [False, True], ids=["plain", "branches"])
@pytest.mark.parametrize("seq_length", [2048, 16])
def test_padding_gives_no_nan(seq_length, branched):
    """Not even a row of nothing but padding, which changes nothing for the others; forward and
    backward."""
    model, _ = tiny(seed=14, seq_length=seq_length)
    ids, mask = pad_rows([[*span(), *text(14)], text(5, 1), []])
    branch = (
        (torch.arange(20) >= 16).long().expand(3, -1) + (torch.arange(20) >= 18)
        if branched
        else None
    )
    images = pictures(1)
    assert layout(ids, mask, branch)[1].any(-1).all(), (
        "a query that sees nothing is NaN in some attention kernels"
    )
    logits = model(ids, images, mask, branch)
    assert logits.isfinite().all()
    fewer = model(ids[:2], images, mask[:2], branch[:2] if branched else None)
    assert gap(logits[:2][mask[:2]], fewer[mask[:2]]) < 1e-5
    assert all(g.isfinite().all() for g in gradients(model, logits[mask].square().sum()).values())


@torch.no_grad()
def test_contents_of_padding_do_not_matter():
    model, _ = tiny(seed=15)
    rows = [[*span(), *text(9)], [*span(), *text(4, 1)]]
    images = pictures(2)
    for left in (True, False):
        ids, mask = pad_rows(rows, left)
        other, _ = pad_rows(rows, left, fill=77)
        assert model(other, images, mask)[mask].equal(model(ids, images, mask)[mask])
        plain = torch.cat(
            [model(torch.tensor([row]), images[k : k + 1])[0] for k, row in enumerate(rows)]
        )
        assert gap(model(ids, images, mask)[mask], plain) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("seq_length", [2048, 16], ids=["short", "beyond seq_length"])
def test_bf16_is_close(seq_length):
    model, raw = tiny(seed=16, seq_length=seq_length)
    ids, mask = pad_rows([[*span(), *text(20)], [*span(), *text(13, 1)]])
    images = pictures(2)
    model.bfloat16()
    logits = model(ids, images, mask)
    assert logits.dtype == torch.bfloat16
    expected = referred(model, raw, ids, images, mask)["logits"][
        mask
    ]  # of the same rounded weights
    error = (logits[mask].double() - expected).square().mean().sqrt() / expected.std()
    assert error < 0.03
    branch = (torch.arange(26) >= 20).long().expand(2, -1)
    logits = model(ids, images, mask, branch)
    assert logits.dtype == torch.bfloat16
    assert (logits[mask].double() - expected).square().mean().sqrt() / expected.std() < 0.03


def test_rms_norm_casts_before_it_scales():
    """In bf16 the order of rounding is the official one: statistics in fp32, cast, then the
    weight."""
    norm = RMSNorm(64, 1e-6).bfloat16()
    rng = torch.Generator().manual_seed(17)
    x, weight = (torch.randn(shape, generator=rng).bfloat16() for shape in ((50, 64), (64,)))
    norm.weight.data.copy_(weight)
    normed = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = normed.bfloat16() * weight
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x) == expected).float().mean() > 0.99  # sqrt and rsqrt may round apart, rarely
    assert ((normed * weight.float()).bfloat16() == expected).float().mean() < 0.9, (
        "the test must tell the two apart"
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_freezing_and_no_grad_change_no_bit(training):
    """Log-probs of a frozen reference are compared with those of what trains: they must start out
    equal."""
    model, _ = tiny(seed=18)
    model.train(training)
    ids, mask = pad_rows([[*span(), *text(9)], [*span(), *text(4, 1)]])
    expected = model(ids, pictures(2), mask)
    with torch.no_grad():
        assert model(ids, pictures(2), mask).equal(expected)
    model.requires_grad_(False)
    assert model(ids, pictures(2), mask).equal(expected)


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "ids, n_images, expected_message",
    [
        ([*span(), 5], 0, "1 image spans, but 0 images"),
        ([*span(), 5], 2, "1 image spans, but 2 images"),
        ([5, 6, 7], 1, "0 image spans, but 1 images"),
        ([IMG, PAD, PAD, PAD, PAD, 5, 6], 1, "<img>, 4 slots and </img>"),
        ([IMG, PAD, PAD, PAD, END, 5, 6], 1, "<img>, 4 slots and </img>"),
        ([5, IMG, PAD, PAD, PAD, PAD], 1, "<img>, 4 slots and </img>"),
        ([*span(), 5, IMG], 2, "<img>, 4 slots and </img>"),
    ],
    ids=["no images", "too many", "no span", "no end", "short span", "cut off", "second cut off"],
)
def test_wrong_image_spans_are_told(ids, n_images, expected_message):
    model, _ = tiny(vision_layers=1, layers=1)
    with pytest.raises(ValueError, match=expected_message) as error:
        model(torch.tensor([ids]), pictures(n_images) if n_images else None)
    assert "\n" not in str(error.value)


RELEASED = {  # as the released model's config.json has it
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": False,
    "use_logn_attn": True,
    "vocab_size": 151936,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
}


def test_released_config_is_the_default(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    config = Config.from_json(tmp_path / "config.json")
    assert config == Config()
    assert (config.visual.n_queries, int(config.visual.width * config.visual.mlp_ratio)) == (
        256,
        8192,
    )


def changed(visual=None, **keys):
    return json.dumps({**RELEASED, **keys, "visual": {**RELEASED["visual"], **(visual or {})}})


REFUSALS = {
    "Qwen2-VL": (
        json.dumps(
            {
                "architectures": ["Qwen2VLForConditionalGeneration"],
                "model_type": "qwen2_vl",
                "hidden_size": 1536,
                "vision_config": {"depth": 32},
            }
        ),
        "Qwen2VLForConditionalGeneration",
    ),
    "text-only qwen": (
        json.dumps({k: v for k, v in RELEASED.items() if k != "visual"}),
        "without a vision tower",
    ),
    "Int4": (changed(quantization_config={"bits": 4, "quant_method": "gptq"}), "Int4/GPTQ"),
    "not JSON": ("{'model_type': 'qwen'", "cannot be read"),
    "not UTF-8": (b"\xff\xfe{}", "cannot be read"),
    "a list": ("[1, 2]", "not a JSON object"),
    "missing file": (None, "cannot be read"),
    "n_queries no square": (changed({"n_queries": 255}), "n_queries must be a square"),
    "rotary_pct": (changed(rotary_pct=0.5), "rotary_pct is 0.5"),
    "tied": (changed(tie_word_embeddings=True), "tie_word_embeddings"),
    "unscaled": (changed(scale_attn_weights=False), "scale_attn_weights"),
    "heads": (changed(num_attention_heads=31), "kv_channels × num_attention_heads"),
    "output_dim": (changed({"output_dim": 2048}), "output_dim must equal hidden_size"),
    "output_dim 64": (
        changed({"output_dim": 64}, hidden_size=64, num_attention_heads=1, kv_channels=64),
        "128",
    ),
    "vision heads": (changed({"heads": 15}), "visual.width must be a multiple"),
    "patches": (changed({"image_size": 450}), "patch_size must divide"),
}


@pytest.mark.parametrize("content, expected_message", REFUSALS.values(), ids=REFUSALS.keys())
def test_unsuitable_configs_are_refused(tmp_path, content, expected_message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=expected_message) as error:
        Config.from_json(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("alpha", [1, 3, 7])
def test_angles_of_far_tokens_are_the_official_ones_bit_for_bit(alpha):
    """Full head width, 8000 tokens: fp32 angles formed in another order differ in the fourth digit
    there."""
    config, place = Config(), torch.arange(8000)[None]
    rotary = Rotary(place, alpha, config, training=False)
    base = 10000 * alpha ** (128 / 126)
    expected_inv_freq = 1.0 / (base ** (torch.arange(0, 128, 2).float() / 128))
    expected = torch.outer(torch.arange(8000).float(), expected_inv_freq)
    assert torch.equal(rotary.cos[0, 0], torch.cat([expected, expected], -1).cos())
    assert torch.equal(rotary.sin[0, 0], torch.cat([expected, expected], -1).sin())
    expected_logn = torch.tensor([math.log(i, 2048) if i > 2048 else 1 for i in range(1, 8001)])
    torch.testing.assert_close(rotary.logn[0, 0, :, 0], expected_logn, atol=1.2e-7, rtol=0)


def test_arguments_of_senseless_shape_are_told():
    model, _ = tiny()
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"must all be \(B, L\)"):
        model(ids, branch=torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match="L ≥ 1"):
        model(ids[:, :0])
    spans = torch.tensor([[IMG, *[PAD] * 4, END, 5]])
    for images in (
        torch.zeros(1, 3, 56, 42),
        torch.zeros(1, 3, 60, 60),
        torch.zeros(1, 3, 56, 56).byte(),
    ):
        with pytest.raises(ValueError, match="images must be"):
            model(spans, images)
