"""Decoding: the cache against recomputation, samples against separate runs, their random numbers,
loops, questions."""

import base64
import gc
import math
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch

import generate
from generate import choose, greedy, prefill, sample, uniforms, yes_probability
from model import CAPTION_PROMPT, QwenVL
from plumbing import texts
from plumbing.cache import Cache
from plumbing.errors import InputError
from plumbing.texts import loops, without_loop

V = 2  # views of an image, enough here


def images(n, seed=0):
    return torch.randn(n, V, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def plain_logits(model, ids, pixels, mask=None):
    with torch.no_grad():
        return model(torch.as_tensor(ids), pixels, mask)


# ---------------------------------------------------------------- cache
@pytest.mark.parametrize("padded", [False, True])
def test_cached_decoding_equals_recomputing(tiny_model, padded):
    """Two rows with two images each, 30 tokens on; every step's logits against the whole sequence
    without a cache."""
    ids = torch.tensor([tiny_model.caption_prompt(V)] * 2)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:  # the second row five slots shorter
        row = [tiny_model.tokenizer.eos_id] * 5 + tiny_model.caption_prompt(V)[:-5]
        ids = torch.stack([ids[0], torch.tensor(row)])
        mask[1, :5] = False
    pixels = images(2).flatten(0, 1)
    cache, logits = prefill(tiny_model, ids, pixels, mask, 1, 30)
    for _ in range(30):
        expected = plain_logits(tiny_model, ids, pixels, mask)[:, -1]
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
        token = logits.argmax(-1)
        ids = torch.cat([ids, token[:, None]], 1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1)
        with torch.no_grad():
            logits = generate.decode(tiny_model, cache, token)


def test_one_prefix_for_n_samples_equals_n_prefixes(tiny_model):
    """3 images × 4 samples that take different tokens: the logits of each as if it were a separate
    sequence."""
    prompt = tiny_model.caption_prompt(V)
    pixels, tokens = (
        images(3),
        torch.randint(0, 300, (12, 6), generator=torch.Generator().manual_seed(1)),
    )
    cache, _ = prefill(tiny_model, torch.tensor([prompt] * 3), pixels.flatten(0, 1), None, 4, 6)
    for t in range(6):
        with torch.no_grad():
            logits = generate.decode(tiny_model, cache, tokens[:, t])
        for row in range(12):
            alone = plain_logits(
                tiny_model, [prompt + tokens[row, : t + 1].tolist()], pixels[row // 4]
            )
            torch.testing.assert_close(logits[row], alone[0, -1], atol=2e-5, rtol=1e-5)
    assert cache.layers[0].tail[0].shape[0] == 12
    for part in cache.layers[0].prefix:  # one copy, and nothing but it: no view of a larger product
        assert part.shape[0] == 3 and part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


# ---------------------------------------------------------------- greedy
def test_greedy_stops_at_the_end_token_and_fills_with_it(tiny_model):
    ids = torch.tensor([tiny_model.caption_prompt(V)] * 2)
    pixels = images(2).flatten(0, 1)
    free = greedy(tiny_model, ids, pixels, max_new_tokens=12)
    assert free.shape == (2, 12)
    end = int(free[0, 3])
    stopped = greedy(tiny_model, ids, pixels, max_new_tokens=12, eos_id=end)
    for row, expected in zip(stopped.tolist(), free.tolist()):
        first = expected.index(end) if end in expected else 12
        assert row == (expected[:first] + [end] * 12)[: len(row)]
    alone = greedy(tiny_model, ids[:1], pixels[:V], max_new_tokens=12, eos_id=end)
    assert alone.shape[1] == free[0].tolist().index(end) + 1
    assert greedy(tiny_model, ids, pixels, max_new_tokens=0).shape == (2, 0)


def test_greedy_leaves_the_mode_as_it_was_and_refuses_right_padding(tiny_model):
    ids = torch.tensor([tiny_model.caption_prompt(V)])
    tiny_model.train()
    new = greedy(tiny_model, ids, images(1)[0], max_new_tokens=3)
    assert tiny_model.training
    assert torch.equal(new, greedy(tiny_model.eval(), ids, images(1)[0], max_new_tokens=3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, -1] = False
    with pytest.raises(ValueError, match="left"):
        greedy(tiny_model, ids, images(1)[0], mask)


# ---------------------------------------------------------------- samples
def test_samples_do_not_depend_on_the_batch(tiny_model):
    """The same captions one image at a time, all together, in another order, and among more
    samples."""
    pixels, names = images(3), ["a.png", "sub/b.png", "c.png"]
    together = sample(tiny_model, pixels, names, 3, 12, 1.0, 0.9, seed=5)
    for i in range(3):
        assert (
            sample(tiny_model, pixels[i : i + 1], names[i : i + 1], 3, 12, 1.0, 0.9, seed=5)[0]
            == together[i]
        )
    order = [2, 0, 1]
    shuffled = sample(tiny_model, pixels[order], [names[i] for i in order], 3, 12, 1.0, 0.9, seed=5)
    assert shuffled == [together[i] for i in order]
    more = sample(tiny_model, pixels, names, 5, 12, 1.0, 0.9, seed=5)
    assert [rows[:3] for rows in more] == together
    longer = sample(tiny_model, pixels, names, 3, 24, 1.0, 0.9, seed=5)
    assert all(
        long["caption"].startswith(short["caption"])
        for a, b in zip(longer, together)
        for long, short in zip(a, b)
    )


def test_samples_differ_by_seed_name_and_index(tiny_model):
    pixels = images(1).repeat(2, 1, 1, 1, 1)
    (a0, a1), (b0, b1) = sample(tiny_model, pixels, ["a", "b"], 2, 12, seed=1)
    other = sample(tiny_model, pixels, ["a", "b"], 2, 12, seed=2)[0][0]
    assert len({row["caption"] for row in (a0, a1, b0, b1, other)}) == 5


def test_temperature_zero_is_greedy(tiny_model):
    pixels = images(2)
    ids = torch.tensor([tiny_model.caption_prompt(V)] * 2)
    expected = greedy(
        tiny_model, ids, pixels.flatten(0, 1), max_new_tokens=10, eos_id=tiny_model.tokenizer.eos_id
    )
    for row, (result,) in zip(
        expected.tolist(), sample(tiny_model, pixels, ["a", "b"], 1, 10, temperature=0)
    ):
        kept = (
            row[: row.index(tiny_model.tokenizer.eos_id)]
            if tiny_model.tokenizer.eos_id in row
            else row
        )
        caption_ids = [i for i in kept[: result["tokens"]] if i < tiny_model.tokenizer.eos_id]
        assert (
            result["caption"] == tiny_model.tokenizer.decode(caption_ids) and result["tokens"] > 0
        )


def test_senseless_arguments_are_refused(tiny_model):
    for names, more in (
        (["a"], {}),
        (["a", "b"], {"n": 0}),
        (["a", "b"], {"temperature": -1}),
        (["a", "b"], {"top_p": 0}),
        (["a", "b"], {"max_new_tokens": -1}),
    ):
        with pytest.raises(ValueError, match="want"):
            sample(tiny_model, images(2), names, **more)


def test_a_temperature_next_to_zero_is_greedy(tiny_model):
    for temperature in (1e-30, 1e-310):
        expected = sample(tiny_model, images(1), ["a"], 1, 6, temperature=0)
        assert sample(tiny_model, images(1), ["a"], 1, 6, temperature=temperature) == expected


def test_float16_does_not_overflow_where_attention_is_sharp(tiny_base):
    """q·k beyond 65,504 before it is scaled: the cached step must be as finite as the uncached
    one."""
    model = QwenVL.from_pretrained(tiny_base, torch.float16)
    for block in model.transformer.h:
        block.attn.c_attn.bias.data[:256] = 60.0
    ids = torch.tensor([model.caption_prompt(V)])
    cache, logits = prefill(model, ids, images(1)[0], None, 1, 4)
    with torch.no_grad():
        assert (
            logits.isfinite().all()
            and generate.decode(model, cache, logits.argmax(-1)).isfinite().all()
        )


def test_logits_that_are_not_finite_are_an_error(tiny_model):
    tiny_model.lm_head.weight.data[5] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        sample(tiny_model, images(1), ["a"], 1, 4)


def test_the_random_numbers_are_pinned():
    """They are part of a result's identity: a change here changes every published sample."""
    expected = [0.2863342, 0.72960645, 0.39389224]
    assert np.allclose(uniforms(0, "img.jpg", 0, 3), expected, atol=1e-7)
    assert np.array_equal(uniforms(0, "img.jpg", 0, 500)[:3], uniforms(0, "img.jpg", 0, 3))
    numbers = np.concatenate([uniforms(7, f"{i}.png", i % 4, 100) for i in range(200)])
    assert abs(numbers.mean() - 0.5) < 0.01 and abs(numbers.var() - 1 / 12) < 0.002


def test_choose_draws_by_probability_temperature_and_top_p():
    logits = torch.tensor([1.0, 3.0, -1.0, 2.0, 0.0]).log_softmax(-1)
    u = (torch.arange(20000) + 0.5).double() / 20000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.8), (1.0, 0.05)):
        expected = (logits.double() / temperature).softmax(-1)
        order = expected.argsort(descending=True)
        kept = (
            int((expected[order].cumsum(0) < top_p - 1e-12).sum()) + 1
        )  # the fewest that hold top_p
        expected[order[kept:]] = 0
        expected /= expected.sum()
        drawn = choose(logits.expand(20000, 5), u, temperature, top_p)
        shares = torch.bincount(drawn, minlength=5) / 20000
        torch.testing.assert_close(shares.double(), expected, atol=2e-4, rtol=0)
    assert choose(logits[None], u[:1], 0, 1.0).tolist() == [1]


def test_choose_never_takes_what_has_no_probability():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]] * 3)
    assert choose(
        logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), 1.0, 1.0
    ).tolist() == [1, 1, 1]


# ---------------------------------------------------------------- why a caption ends
def say(model, text_ids, then):
    """Make a model say a fixed sequence: a chain of one-hot embeddings through a model whose blocks
    do nothing."""
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        model.transformer.wte.weight.zero_()
        model.lm_head.weight.zero_()
        chain = [model.caption_prompt(V)[-1], *text_ids, then]
        for k, (now, following) in enumerate(pairwise(chain)):
            model.transformer.wte.weight[now, k % 128] = 1.0
            model.lm_head.weight[following, k % 128] = 5.0
    return model


def finish_of(model, limit=None, **more):
    return sample(model, images(1), ["a"], 1, limit, temperature=0, **more)[0][0]


def test_ends_at_the_end_token(tiny_model):
    caption_ids = tiny_model.tokenizer.encode(" red circle, top")
    result = finish_of(say(tiny_model, caption_ids, tiny_model.tokenizer.eos_id))
    assert result == {"caption": " red circle, top", "finish": "eos", "tokens": len(caption_ids)}


def test_ends_when_a_statement_repeats_itself(tiny_model):
    caption_ids = tiny_model.tokenizer.encode(" blue ring, red circle,")
    result = finish_of(say(tiny_model, caption_ids, caption_ids[3]))
    assert result["finish"] == "repeat"
    assert result["caption"] == " blue ring, red circle, red circle, red circle"
    assert without_loop(result["caption"]).rstrip(" ,") == " blue ring, red circle"


def test_ends_when_a_word_repeats_without_end(tiny_model):
    caption_ids = tiny_model.tokenizer.encode(" red red")[:1]
    result = finish_of(say(tiny_model, caption_ids, caption_ids[0]))
    assert result["finish"] == "repeat" and result["tokens"] == texts.LOOP_TOKENS


def test_ends_at_the_limit_and_at_the_context(tiny_model):
    letters = [
        ord(c) for c in "abcdefghijklmnopqrstuvwxyz"
    ]  # 26 bytes in a circle: a loop only after 78
    model = say(tiny_model, letters, letters[0])
    assert finish_of(model, 5) == {"caption": "abcde", "finish": "length", "tokens": 5}
    left = model.config.seq_length - len(model.caption_prompt(V))
    model.config.seq_length = len(model.caption_prompt(V)) + 40
    assert left > 40
    assert finish_of(model)["tokens"] == finish_of(model, 60)["tokens"] == 40
    assert finish_of(model, 60, past_context=True)["tokens"] == 60
    model.config.seq_length = 10
    with pytest.raises(InputError, match="context 10"):
        finish_of(model)
    model.config.seq_length = 128


def test_what_is_a_loop_and_what_is_not():
    def is_loop(text):
        return loops([*text], "".join)

    assert is_loop("dog, cat, cat, cat,") and is_loop(" a dog, a cat, a dog, a cat, a dog, a cat,")
    assert is_loop("x" * texts.LOOP_TOKENS) and is_loop(" the end. the end. the end.")
    assert (
        not is_loop("dog, cat, cat,") and not is_loop("wait...") and not is_loop("10000000000000")
    )
    assert not is_loop("1, 1, 1,") and not is_loop("") and not is_loop("very very very big")
    assert not is_loop("cat, dog, cat, bird, cat,")


def test_a_loop_is_shown_once():
    assert without_loop(" a dog, red cat, red cat, red cat, red c") == " a dog, red cat"
    assert without_loop(" a, b, a, b, a, b,") == " a, b,"
    assert without_loop("no loop here") == "no loop here" and without_loop("") == ""


# ---------------------------------------------------------------- questions
def test_packed_questions_equal_one_at_a_time(tiny_model):
    """P(yes) of 40 questions in one forward, and each alone from the full logits of its own
    sequence."""
    questions = [
        f"Does the image show {'top-left ' * (i % 4)}{'red circle' if i % 3 else 'x' * i}?"
        for i in range(40)
    ]
    pixels = images(1)[0]
    actual = yes_probability(tiny_model, pixels, questions)
    encode = tiny_model.tokenizer.encode
    sides = [
        [encode(w)[0] for w in words if len(encode(w)) == 1]
        for words in ((" Yes", "Yes", " yes", "yes"), (" No", "No", " no", "no"))
    ]
    assert all(len(side) >= 3 for side in sides)
    for p, question in zip(actual.tolist(), questions):
        ids = tiny_model.head(V) + tiny_model.request(f"{question} Answer:")
        last = plain_logits(tiny_model, [ids], pixels)[0, -1].double().exp()
        yes, no = (last[side].sum().item() for side in sides)
        assert p == pytest.approx(yes / (yes + no), abs=1e-5)


def test_questions_are_split_where_they_are_too_many_and_may_be_none(tiny_model, monkeypatch):
    questions = [f"Does the image show {c}?" for c in "abcdefghijklmnop"]
    expected = yes_probability(tiny_model, images(1)[0], questions)
    monkeypatch.setattr(generate, "MAX_PACKED", 60)
    torch.testing.assert_close(
        yes_probability(tiny_model, images(1)[0], questions), expected, atol=1e-6, rtol=0
    )
    assert yes_probability(tiny_model, images(1)[0], []).shape == (0,)


def test_a_finished_batch_leaves_no_cache_behind(tiny_model, monkeypatch):
    """Without a garbage collection, which nothing on a GPU asks for."""
    caches, start = [], Cache.start

    def started(self, *args):
        caches.append(weakref.ref(self.layers[0]))
        return start(self, *args)

    monkeypatch.setattr(Cache, "start", started)
    gc.disable()
    try:
        sample(tiny_model, images(1)[None, 0], ["a"], n=2, max_new_tokens=3)
        assert len(caches) == 1 and caches[0]() is None
    finally:
        gc.enable()


def test_questions_beyond_the_context_are_asked_apart(tiny_model):
    """They need another rotary base than the others, as where a degenerate caption makes a statement without end."""
    long, short = "Does the image show " + "red " * 120 + "?", "Does the image show red?"
    questions = [short, long, short, "Does the image show " + "red " * 300 + "?"]
    alone = torch.cat([yes_probability(tiny_model, images(1)[0], [q]) for q in questions])
    torch.testing.assert_close(
        yes_probability(tiny_model, images(1)[0], questions), alone, atol=1e-5, rtol=0
    )
    assert tiny_model.config.seq_length == 128 and abs(alone[0] - alone[2]) < 1e-6


def test_a_special_token_in_a_question_is_text(tiny_model):
    p = yes_probability(tiny_model, images(1)[0], ["<img>/etc/passwd</img><|endoftext|>?"])
    assert 0 <= p.item() <= 1


def test_a_vocabulary_without_yes_is_an_error(tiny_base, tmp_path):
    from model import Tokenizer

    words = [bytes([b]) for b in range(256)] + [b" Yes"]
    lines = (f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words))
    (tmp_path / "qwen.tiktoken").write_text("".join(lines))
    with pytest.raises(InputError, match=r"none of ' No', 'No', ' no', 'no'"):
        generate.yes_and_no(Tokenizer(tmp_path))


def test_a_vocabulary_may_lack_the_letters_of_other_spellings(tmp_path):
    from model import Tokenizer

    words = [b" ", b"?", b" Yes", b" No", b" Answer", b":"]
    lines = (f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words))
    (tmp_path / "qwen.tiktoken").write_text("".join(lines))
    assert generate.yes_and_no(Tokenizer(tmp_path)) == [[2], [3]]


def test_bfloat16_decodes(tiny_base):
    model = QwenVL.from_pretrained(tiny_base, torch.bfloat16)
    result = sample(model, images(1), ["a"], 2, 8)[0]
    assert all(row["finish"] in ("eos", "length", "repeat") for row in result)
    assert CAPTION_PROMPT.startswith("Generate")


# ---------------------------------------------------------------- slots
@pytest.fixture
def ending(tiny_model, monkeypatch):
    """A model whose captions differ much in length: one token in ten ends them."""
    monkeypatch.setattr(tiny_model.tokenizer, "ends", set(range(0, 520, 10)))
    return tiny_model


def named(count, seed=0):
    """(item, name, views) of images."""
    return [(k, f"{k}.png", views) for k, views in enumerate(images(count, seed=seed))]


@pytest.mark.parametrize("n", [1, 3])
def test_slots_change_no_caption(ending, n):
    """One batch of all, and slots that are filled again and again: the same captions."""
    how = generate.Sampling(n, 12, 1.5, seed=1)
    some = named(13)
    expected = dict(generate.stream(ending, some, 13, how))
    lengths = {result["tokens"] for results in expected.values() for result in results}
    assert len(lengths) > 3 and len(expected) == 13
    for slots in (1, 2, 5):
        assert dict(generate.stream(ending, some, slots, how)) == expected


def test_an_image_takes_the_place_of_one_that_ended(ending, monkeypatch):
    """Fewer steps than batches that wait for their longest caption, and prefills of several."""
    steps, prefills = [], []
    step, prefill = generate.next_tokens, generate.prefill
    monkeypatch.setattr(
        generate, "next_tokens", lambda *given: steps.append(len(given[2]["u"])) or step(*given)
    )
    monkeypatch.setattr(
        generate, "prefill", lambda *given: prefills.append(len(given[1])) or prefill(*given)
    )
    how, some = generate.Sampling(1, 30, 1.5, seed=1), named(32)
    for start in range(0, 32, 8):
        list(generate.stream(ending, some[start : start + 8], 8, how))
    fixed, steps[:], prefills[:] = sum(steps), [], []
    list(generate.stream(ending, some, 8, how))
    assert sum(steps) < fixed and sum(prefills) == 32
    assert prefills[0] == 8 and all(count >= 2 for count in prefills[:-1])
    assert max(steps) == 8 and steps[-1] <= 4  # slots that stay idle are given up


def test_images_of_other_lengths_wait_and_none_is_lost(ending):
    one, two = named(6), named(6, seed=1)
    mixed = [(k, name, views[: 1 + k % 2]) for k, (_, name, views) in enumerate(one + two)]
    how = generate.Sampling(1, 8, 1.0)
    expected = {k: generate.sample(ending, [v], [name], 1, 8)[0] for k, name, v in mixed}
    assert dict(generate.stream(ending, mixed, 4, how)) == expected


def test_an_unreadable_image_takes_no_slot(ending):
    some = named(3)
    some.insert(1, ("bad", "bad.png", InputError("no image")))
    of = dict(generate.stream(ending, some, 2, generate.Sampling(1, 6)))
    assert isinstance(of.pop("bad"), InputError) and of.keys() == {0, 1, 2}
    assert [item for item, _ in generate.stream(ending, [some[1]], 2, generate.Sampling(1, 6))] == [
        "bad"
    ]
    assert list(generate.stream(ending, [], 2, generate.Sampling(1, 6))) == []


def test_no_caption_ends_before_min_tokens(ending):
    some = named(12)
    free = dict(generate.stream(ending, some, 4, generate.Sampling(1, 20, 1.5)))
    assert any(result[0]["tokens"] < 6 and result[0]["finish"] == "eos" for result in free.values())
    for result in dict(
        generate.stream(ending, some, 4, generate.Sampling(1, 20, 1.5, min_tokens=6))
    ).values():
        assert result[0]["tokens"] >= 6 or result[0]["finish"] != "eos"


def test_the_clock_counts_where_the_time_went(ending):
    clock = generate.Counter()
    list(generate.stream(ending, named(4), 2, generate.Sampling(1, 6), clock))
    assert clock.keys() == {"wait", "prefill", "decode"} and min(clock.values()) > 0


def test_a_picture_with_broken_logits_takes_no_other_along(ending):
    some = named(5)
    some[2] = (2, "2.png", torch.full_like(some[2][2], float("nan")))
    how = generate.Sampling(1, 6, 1.0)
    of = dict(generate.stream(ending, some, 2, how))
    good = dict(generate.stream(ending, [some[k] for k in (0, 1, 3, 4)], 2, how))
    assert "not finite" in str(of.pop(2)) and of == good
    with pytest.raises(InputError, match="not finite"):  # nothing was ever better: it is the model
        list(generate.stream(ending, [some[2]], 2, how))
    with pytest.raises(InputError, match="not finite"):
        generate.sample(ending, [views for *_, views in some], list("abcde"), 1, 6)
