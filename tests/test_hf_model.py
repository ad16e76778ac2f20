"""Vision-language models of transformers as bases: each family, tiny and random, against itself."""

import families
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import adapters
import generate
from base import open_base
from plumbing.data import together
from plumbing.towers import blocks

REFUSED = ("paligemma",)
WORKING = [name for name in families.FAMILIES if name not in REFUSED]
HYBRIDS = ("qwen3_5", "lfm2_vl")
TEXT = "a red cup, two dogs"


@pytest.fixture(scope="module", params=WORKING)
def family(request, tmp_path_factory):
    """A family's name and its folder."""
    return request.param, families.make_usable(
        request.param, tmp_path_factory.mktemp(request.param)
    )


@pytest.fixture
def model(family):
    return open_base(family[1])


def pictures(n, side=60, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(n)
    ]


def floats(inputs):
    """A processor's tensors, those in bfloat16 as float32."""
    return {k: t.float() if t.is_floating_point() else t for k, t in inputs.items()}


def shaken(model, name="caption", seed=0, **how):
    """Adapters that are not the identity."""
    adapters.attach(model, name, reduction=4, **how)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
    return model


# ---------------------------------------------------------------- against transformers
def test_ids_are_the_processors_and_logits_the_plain_models(family, model):
    """Everything as the README of such a model does it, with nothing of ours."""
    processor = AutoProcessor.from_pretrained(family[1])
    plain = AutoModelForImageTextToText.from_pretrained(family[1], dtype=torch.float32).eval()
    seen = [p.resize((model.image_size,) * 2, Image.BICUBIC) for p in pictures(3)]
    content = [{"type": "image"}] * 3 + [{"type": "text", "text": model.caption_text}]
    content[:3] = [{"type": "image", "image": image} for image in seen]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        chat_template=processor.chat_template,
        processor_kwargs=model.prompts.options,
        enable_thinking=False,
    )
    look = model.look(pictures(3))
    ids = model.caption_prompt(look)
    assert ids == inputs["input_ids"][0].tolist()
    with torch.no_grad():
        wanted, ours = plain(**floats(inputs)).logits, model(torch.tensor([ids]), [look])
    assert torch.equal(ours, wanted)
    assert wanted.std() > 0.5  # so that equality says something


def test_the_single_view_keeps_its_own_size(family, model):
    """--views one: what the processor makes of the picture as it is."""
    look = model.look(pictures(1, 90))
    ids = model.caption_prompt(look)
    inputs = floats(model.prompts.inputs(pictures(1, 90), model.caption_text))
    assert ids == inputs["input_ids"][0].tolist()
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([ids]), [look]), model.hf(**inputs).logits)


def test_the_probe_finds_who_holds_branches_apart(family, model):
    assert model.packs == (family[0] not in HYBRIDS)


# ---------------------------------------------------------------- adapters
def test_fresh_adapters_change_nothing(model):
    look = model.look(pictures(2))
    model.requires_grad_(False)  # freezing changes the rounding of some
    ids = torch.tensor([model.head(look) + model.request(model.caption_text)])
    before = model(ids, [look])
    adapters.attach(model, "caption", soft_prompt=True)
    slots = torch.tensor([model.caption_prompt(look)])
    assert slots.shape == ids.shape and not torch.equal(slots, ids)
    assert torch.equal(model(slots, [look]), before) and torch.equal(model(ids, [look]), before)


def test_a_block_whose_slots_give_zero_is_the_identity(model):
    """So adapters stand where they change all that a block adds, and nothing else."""
    look, seen = model.look(pictures(2)), []
    for name, tower in model.towers.items():
        for attention, _, _ in blocks(tower)[: len(model.slots[name])]:
            block = next(m for m in tower.modules() if attention in m.children())
            block.register_forward_hook(
                lambda module, args, kwargs, output: seen.append(
                    ((*args, *kwargs.values())[0], output)
                ),
                with_kwargs=True,
            )
        for slot, *_ in model.places(name):
            slot["zero"], slot.stack = Zero(), ("zero",)
    model(torch.tensor([model.caption_prompt(look)]), [look])
    assert len(seen) >= sum(len(slots) for slots in model.slots.values())
    for before, after in seen:
        after = after[0] if isinstance(after, tuple) else after
        assert torch.equal(after.squeeze(), before.squeeze())


class Zero(torch.nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_adapters_of_both_towers_act_and_switch(model):
    look = model.look(pictures(2))
    ids = torch.tensor([model.caption_prompt(look)])
    before = model(ids, [look])
    shaken(model, "a", where=("vision",))
    shaken(model, "b", seed=1, where=("language",))
    outputs = []
    for names in ([], ["a"], ["b"], ["a", "b"]):
        with adapters.active(model, names):
            outputs.append(model(ids, [look]))
    assert torch.allclose(outputs[0], before, atol=1e-4)
    assert all((x - y).abs().max() > 1e-2 for i, x in enumerate(outputs) for y in outputs[:i])


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_a_folder_of_adapters_comes_back(family, model, kind, tmp_path):
    look = model.look(pictures(2))
    shaken(model, kind=kind, soft_prompt=True)
    ids = torch.tensor([model.caption_prompt(look)])
    wanted = model(ids, [look])
    adapters.save(model, tmp_path, "caption", stage="test")
    other = open_base(family[1])
    adapters.load(other, tmp_path)
    assert torch.equal(torch.tensor([other.caption_prompt(look)]), ids)
    assert torch.allclose(other(ids, [look]), wanted, atol=1e-5)


# ---------------------------------------------------------------- packed = separate
def rows_of(model, look, texts):
    prompt = model.caption_prompt(look)
    return prompt, [model.answer(text) for text in texts]


TEXTS = ("a red cup, two dogs", "a table", "grass, a man in a blue hat")


def separate(model, look, texts):
    prompt, targets = rows_of(model, look, texts)
    return [model(torch.tensor([prompt + ids]), [look])[0, len(prompt) :] for ids in targets]


def packed(model, look, texts):
    prompt, targets = rows_of(model, look, texts)
    ids, branch = list(prompt), [0] * len(prompt)
    for k, target in enumerate(targets, 1):
        ids, branch = ids + target, branch + [k] * len(target)
    logits = model(torch.tensor([ids]), [look], branch=torch.tensor([branch]))[0, len(prompt) :]
    return logits.split([len(target) for target in targets])


def test_packed_branches_are_separate_rows(model):
    look = model.look(pictures(2))
    shaken(model, soft_prompt=True)
    for one, other in zip(packed(model, look, TEXTS), separate(model, look, TEXTS)):
        assert (one - other).abs().max() <= 5e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_gradients_are_those_of_separate_rows(model, checkpointing):
    look = model.look(pictures(2))
    shaken(model, soft_prompt=True)
    model.train()
    model.checkpointing = checkpointing
    gradients = []
    for way in (packed, separate):
        loss = sum(part.log_softmax(-1)[:, 5].sum() for part in way(model, look, TEXTS))
        loss.backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(n in gradients[0] for n in adapters.names_of(model, "caption"))
    for name, gradient in gradients[0].items():
        scale = 1 + gradient.abs().max()
        assert (gradient - gradients[1][name]).abs().max() <= 2e-4 * scale, name


def test_rows_of_a_batch_do_not_see_each_other_or_their_padding(model):
    looks = [model.look(pictures(2, seed=seed)) for seed in (1, 2)]
    rows = [model.caption_prompt(look) + model.answer(text) for look, text in zip(looks, TEXTS)]
    alone = [model(torch.tensor([row]), [look]) for row, look in zip(rows, looks)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [model.tokenizer.eos_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    branch = torch.zeros_like(ids)
    for kind in (None, branch):
        batch = model(ids, together(looks), mask, branch=kind)
        for row, logits, wanted in zip(rows, batch, alone):
            assert (logits[: len(row)] - wanted[0]).abs().max() <= 5e-5


def test_log_probabilities_are_those_of_the_logits(model):
    look = model.look(pictures(2))
    prompt = model.caption_prompt(look)
    target = model.answer(TEXT)
    ids = torch.tensor([prompt + target])
    positions = torch.arange(len(prompt) - 1, ids.shape[1] - 1)[None]
    wanted = model(ids, [look])[0].log_softmax(-1)[positions[0], target]
    logp = model(ids, [look], positions=positions, logp_of=torch.tensor([target]))
    assert (logp[0] - wanted).abs().max() <= 2e-5


# ---------------------------------------------------------------- decoding
def test_greedy_is_generate(model):
    look = model.look(pictures(2))
    ids = torch.tensor([model.caption_prompt(look)])
    inputs = model.prompts.inputs(
        [p.resize((model.image_size,) * 2, Image.BICUBIC) for p in pictures(2)], model.caption_text
    )
    wanted = model.hf.generate(
        **floats(inputs),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=model.never,
    )[:, ids.shape[1] :]
    assert generate.greedy(model, ids, [look], max_new_tokens=12).tolist() == wanted.tolist()


def test_samples_on_a_shared_prefix_are_separate_samples(model):
    """Token by token: the logits of each of n samples are those of its own plain row."""
    looks = [model.look(pictures(2, seed=seed)) for seed in (3, 4)]
    prompts = [model.caption_prompt(look) for look in looks]
    n, room = 3, 6
    rng = np.random.default_rng(0)
    tokens = torch.tensor(
        rng.choice(model.answer("a red cup and two dogs on the grass"), (2 * n, room))
    )
    with generate.evaluating(model):
        cache, logits = generate.prefill(model, torch.tensor(prompts), looks, None, n, room)
        steps = [logits]
        for t in range(room - 1):
            steps.append(generate.decode(model, cache, tokens[:, t]))
        for row in range(2 * n):
            plain = torch.tensor([prompts[row // n] + tokens[row].tolist()])
            wanted = model(plain, [looks[row // n]])[0, len(prompts[0]) - 1 : -1]
            ours = torch.stack([step[row] for step in steps])
            allowed = ours.isfinite()
            assert (ours - wanted)[allowed].abs().max() <= 1e-4


def test_samples_do_not_depend_on_the_batch(model):
    looks = [model.look(pictures(2, seed=seed)) for seed in (5, 6)]
    both = generate.sample(model, looks, ["a", "b"], n=2, max_new_tokens=8, seed=1)
    alone = generate.sample(model, looks[1:], ["b"], n=2, max_new_tokens=8, seed=1)
    assert both[1] == alone[0] and both[0] != both[1]


def test_slots_change_no_caption(model, monkeypatch):
    """Images that take the places of others in a running batch, against one batch of all."""
    vocab = model.hf.get_output_embeddings().weight.shape[0]
    monkeypatch.setattr(model.tokenizer, "ends", set(range(0, vocab, 8)))
    some = [(k, f"{k}.png", model.look(pictures(1 + k % 4 // 3, seed=k))) for k in range(9)]
    how = generate.Sampling(2, 10, 1.5, seed=1)
    alone = {k: generate.sample(model, [v], [name], 2, 10, 1.5, seed=1)[0] for k, name, v in some}
    assert len({result["tokens"] for results in alone.values() for result in results}) > 3
    assert dict(generate.stream(model, some, 3, how)) == alone


def test_nothing_special_is_ever_sampled(model):
    look = model.look(pictures(1))
    head = model.hf.get_output_embeddings()
    with torch.no_grad():  # a model that would love to say what it must not
        head.weight[model.never] *= 30
    ids = torch.tensor([model.caption_prompt(look)] * 4)
    new = generate.greedy(model, ids[:1], [look], max_new_tokens=8)
    assert not set(new[0].tolist()) & set(model.never.tolist())
    assert model.tokenizer.placeholders and model.tokenizer.placeholders <= set(model.never.tolist())


def test_questions_packed_are_questions_alone(model):
    look = model.look(pictures(2))
    questions = ["Is there a dog?", "Is the cup red? I think so.", "Is it a table?"]
    together_ = generate.yes_probability(model, look, questions)
    alone = torch.cat([generate.yes_probability(model, look, [q]) for q in questions])
    assert (together_ - alone).abs().max() <= 1e-5
    assert together_.std() > 1e-3


# ---------------------------------------------------------------- text is text
def test_special_tokens_in_text_are_text(model):
    names = [str(token) for token in model.tokenizer.fast.added_tokens_decoder.values()]
    text = "a " + " b ".join(names) + " c"
    ids = model.tokenizer.encode(text)
    assert not set(ids) & model.tokenizer.reserved
    assert model.tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
    assert set(model.tokenizer.encode(text, special=True)) & model.tokenizer.reserved


def test_the_fingerprint_knows_the_weights_and_not_the_precision(family, model, tmp_path):
    half = open_base(family[1], dtype=torch.bfloat16)
    assert half.fingerprint == model.fingerprint and half.dtype == torch.bfloat16
    other = open_base(families.make(family[0], tmp_path / "other", seed=1))
    assert other.fingerprint != model.fingerprint


def test_without_weights_it_still_knows_its_prompts(family, model):
    empty = open_base(family[1], weights_too=False)
    look = model.look(pictures(2))
    assert empty.caption_prompt(look) == model.caption_prompt(look)
    assert empty.seq_length == model.seq_length and empty.answer(TEXT) == model.answer(TEXT)


def test_memory_is_estimated(model):
    adapters.attach(model, "caption")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    one, four = (model.training_bytes(trained, 1, rows) for rows in (1, 4))
    assert 0 < one < four and model.cache_bytes > 0


def test_vision_layers_that_nothing_reads_get_no_adapters(family, model):
    """LLaVA takes the features before its last vision layer; DDP would wait for gradients there."""
    adapters.attach(model, "caption", reduction=4)
    look = model.look(pictures(2))
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1
    model(torch.tensor([model.caption_prompt(look)]), [look]).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    n_blocks = len(blocks(model.towers["vision"]))
    assert len(model.slots["vision"]) == n_blocks - (family[0] == "llava")


def test_dropout_is_off_in_training(model):
    look = model.look(pictures(2))
    ids = torch.tensor([model.caption_prompt(look)])
    model.train()
    assert torch.equal(model(ids, [look]), model(ids, [look]))


def test_images_of_other_shapes_share_a_batch(family, model):
    """Single views keep their proportions; what a smaller one lacks is padded as its processor pads it."""
    if family[0] == "lfm2_vl":
        pytest.skip("its tiny configuration has fewer patches than such an image")
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8))
        for size in ((60, 80, 3), (80, 60, 3))
    ]
    looks = [model.look([image]) for image in images]
    rows = [model.caption_prompt(look) for look in looks]
    alone = [model(torch.tensor([row]), [look])[0] for row, look in zip(rows, looks)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [model.tokenizer.eos_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[k < len(row) for k in range(longest)] for row in rows])
    for row, logits, wanted in zip(rows, model(ids, together(looks), mask), alone):
        assert (logits[: len(row)] - wanted).abs().max() <= 1e-4
