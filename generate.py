"""Decoding: one image prefix, many samples of it or many questions about it.

The prefix (six views are 1548 tokens) is computed and kept once per image. Each sample adds a short
tail to the key/value cache, and a decode step attends to both; questions are packed behind the
prefix in one forward. The random numbers of a sample depend on (seed, image name, sample index)
alone, so neither the batch nor the number of cards changes them.
"""
import contextlib
import functools
import hashlib
import weakref

import numpy as np
import torch

from model import causal_attention
from plumbing.errors import InputError
from plumbing.positions import ntk_alpha
from plumbing.weights import free_bytes

COPIES = 3              # a statement this many times in a row is a loop
LOOP_TOKENS = 24        # so is a run this long of a shorter pattern, such as one endless word
STATEMENT_ENDS = ",.;:!?\n，。；、"
MOST_AT_ONCE = 16       # images in a batch, even where memory allows more
MAX_PACKED = 8192       # tokens of one packed row of questions; its mask takes the square in bytes


# ---------------------------------------------------------------- cache
class LayerCache:
    """Keys and values of one layer.

    prefix (I, H, P, head), one per image, shared by its n samples; tail (I·n, H, room, head).
    """

    def __init__(self, cache):
        # weak: in a reference cycle, keys and values of finished batches would fill the device
        # until Python happens to collect garbage
        self.cache = weakref.proxy(cache)
        self.prefix = self.tail = None

    def attend(self, q, k, v, allowed):
        """Causal attention of the prefix in the first call, later of one new token per sample."""
        if self.prefix is None:
            self.start(k, v)
            return causal_attention(q, k, v, allowed)
        return self.step(q, k, v)

    def start(self, k, v):
        # copies: k and v are views of q, k and v together, which matmul would copy at every step
        self.prefix = k.contiguous(), v.contiguous()
        I, H, _, head = k.shape
        shape = (I * self.cache.samples, H, self.cache.room, head)
        self.tail = k.new_zeros(shape), v.new_zeros(shape)

    def step(self, q, k, v):
        """q, k, v (I·n, H, 1, head) of the new tokens -> what they read from prefix and tail."""
        cache, (prefix_k, prefix_v), (tail_k, tail_v) = self.cache, self.prefix, self.tail
        n, t = cache.samples, cache.used
        tail_k[:, :, t], tail_v[:, :, t] = k[:, :, 0], v[:, :, 0]
        B, H, _, head = q.shape
        I, P = B // n, prefix_k.shape[2]
        q = q * head ** -0.5                    # before the product, which in float16 may overflow
        # the samples of an image are the queries of one product with its prefix
        to_prefix = q.view(I, n, H, head).transpose(1, 2) @ prefix_k.transpose(2, 3)  # (I, H, n, P)
        if cache.mask is not None:
            to_prefix = to_prefix.masked_fill(~cache.mask[:, None, None], float("-inf"))
        to_prefix = to_prefix.transpose(1, 2).reshape(B, H, 1, P)
        to_tail = q @ tail_k[:, :, :t + 1].transpose(2, 3)                    # (I·n, H, 1, t+1)
        scores = torch.cat([to_prefix, to_tail], dim=-1)
        share = scores.float().softmax(-1).type_as(v)                         # one softmax for both
        of_prefix = share[..., :P].view(I, n, H, P).transpose(1, 2) @ prefix_v
        of_prefix = of_prefix.transpose(1, 2).reshape(B, H, 1, head)
        of_tail = share[..., P:] @ tail_v[:, :, :t + 1]                       # (I·n, H, 1, head)
        return of_prefix + of_tail


class Cache:
    """The cache of a model for `samples` continuations of each prefix, of up to `room` tokens."""

    def __init__(self, model, samples, room):
        self.samples, self.room, self.used = samples, room, 0
        self.layers = [LayerCache(self) for _ in model.transformer.h]

    @property
    def filled(self):
        return self.layers[-1].prefix is not None

    def start(self, mask, alpha, length):
        """Keep what the prefill decides: padding (mask), NTK alpha, and the number of slots."""
        self.mask, self.alpha, self.length = mask, alpha, length

    def place(self, ids):
        """The logical position of the next token, the same for all samples."""
        return torch.full((1, ids.shape[1]), self.length + self.used, device=ids.device)


def prefill(model, ids, images, mask, samples, room):
    """Run the prefixes -> a filled cache, and the logits (I·samples, vocab) of the first token."""
    cache = Cache(model, samples, room)
    last = torch.tensor([ids.shape[1] - 1], device=ids.device)
    logits = model(ids, images, mask, positions=last, cache=cache)[:, 0]      # (I, vocab)
    return cache, logits.repeat_interleave(samples, dim=0)


def decode(model, cache, tokens):
    """Append one token (B,) to each sample -> the logits (B, vocab) of the next."""
    logits = model(tokens[:, None], cache=cache)[:, 0]
    cache.used += 1
    return logits


@contextlib.contextmanager
def evaluating(model):
    """Eval mode without gradients inside; the previous mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


# ---------------------------------------------------------------- greedy
def greedy(model, ids, images, mask=None, max_new_tokens=16, eos_id=None):
    """Append the most likely token again and again -> new ids only (B, at most max_new_tokens).

    ids, images, mask as in the model's forward, with padding on the left. Once a row has reached
    eos_id it is filled with it; eos_id None never stops early.
    """
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError("padding must be on the left: every row's last token is continued")
    new = ids.new_zeros(len(ids), 0)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    with evaluating(model):
        while new.shape[1] < max_new_tokens and not bool(done.all()):
            if new.shape[1] == 0:
                cache, logits = prefill(model, ids, images, mask, 1, max_new_tokens)
            else:
                logits = decode(model, cache, new[:, -1])
            token = logits.argmax(-1)
            if eos_id is not None:
                token = token.masked_fill(done, eos_id)
                done = done | (token == eos_id)
            new = torch.cat([new, token[:, None]], dim=1)
    return new


# ---------------------------------------------------------------- samples
def uniforms(seed, name, index, count):
    """`count` numbers in [0, 1) of one sample of one image, the same on every machine."""
    key = hashlib.sha256(f"{seed}\0{name}\0{index}".encode("utf-8", "surrogatepass")).digest()
    philox = np.random.Philox(key=int.from_bytes(key[:16], "little"))
    return np.random.Generator(philox).random(count)


def choose(logits, u, temperature, top_p):
    """Draw a token per row: logits (B, vocab), u (B,) in [0, 1) -> ids (B,).

    top_p < 1 is nucleus sampling (https://arxiv.org/abs/1904.09751, eq. 2 and 3): of the tokens in
    order of probability, keep the fewest that together hold at least top_p. Temperature 0 takes the
    most likely token. u is looked up in the cumulative probabilities in vocabulary order, so that a
    rounding error in the logits changes the token only where u falls next to a border.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # (B, vocab)
    if top_p < 1:
        ordered, index = p.sort(dim=-1, descending=True, stable=True)
        held_before = ordered.cumsum(-1) - ordered
        dropped = held_before >= top_p          # the token that crosses top_p stays
        p = p.masked_fill(torch.zeros_like(dropped).scatter(-1, index, dropped), 0.0)
    reach = p.cumsum(-1)
    at = torch.searchsorted(reach, u[:, None] * reach[:, -1:], right=True)
    return at.clamp(max=p.shape[-1] - 1)[:, 0]


def room_left(model, n_views, max_new_tokens=None, past_context=False):
    """How many tokens a caption may have: max_new_tokens, and unless past_context no more than the
    trained context has left. InputError where the prompt alone fills the context."""
    prefix = len(model.caption_prompt(n_views))
    left = model.config.seq_length - prefix
    if past_context and max_new_tokens is not None:
        return max_new_tokens
    if left < 1:
        raise InputError(f"the prompt is {prefix} tokens ({n_views} views), the context "
                         f"{model.config.seq_length}")
    return left if max_new_tokens is None else min(max_new_tokens, left)


def images_at_once(model, n_views, samples, room):
    """How many images, with `samples` tails of `room` tokens each, fit in half the free memory."""
    config, weight = model.config, model.lm_head.weight
    free = free_bytes(weight.device)
    if free is None:
        return MOST_AT_ONCE
    tokens = len(model.caption_prompt(n_views)) + samples * room
    per_token = 2 * config.num_hidden_layers * config.hidden_size * weight.dtype.itemsize
    return max(1, min(MOST_AT_ONCE, int(free / 2 / (per_token * tokens))))


def plain_text(tokenizer, ids):
    """The text of a caption's ids, without special tokens: as text they would mislead a reader."""
    return tokenizer.decode(i for i in ids if i < tokenizer.eos_id)


def sample(model, views, names, n=1, max_new_tokens=None, temperature=1.0, top_p=1.0, seed=0,
           past_context=False):
    """n captions for each image -> a list per image of n results {"caption", "finish", "tokens"}.

    views (I, V, 3, S, S); names (I): what the images are called, for their random numbers. caption
    is the raw text as the model wrote it, leading space and any loop included; finish says why it
    ended: "eos" (the end token), "length", or "repeat" (the same statement again and again); tokens
    counts the caption's tokens without the end token.
    """
    I, V = views.shape[:2]
    if (len(names) != I or n < 1 or temperature < 0 or not 0 < top_p <= 1
            or (max_new_tokens or 1) < 1):
        raise ValueError(f"want {I} names, n ≥ 1, temperature ≥ 0, 0 < top_p ≤ 1 and "
                         "max_new_tokens ≥ 1")
    device, tokenizer = model.lm_head.weight.device, model.tokenizer
    room = room_left(model, V, max_new_tokens, past_context)
    ids = torch.tensor([model.caption_prompt(V)] * I, device=device)
    numbers = [uniforms(seed, name, k, room) for name in names for k in range(n)]
    u = torch.tensor(np.array(numbers), device=device)                        # (I·n, room)
    captions, finish = [[] for _ in range(I * n)], [None] * (I * n)
    with evaluating(model):
        cache, logits = prefill(model, ids, views.flatten(0, 1), None, n, room)
        if not bool(logits.isfinite().all()):
            raise InputError("the model's logits are not finite; in float16, try bfloat16 or "
                             "float32")
        for t in range(room):
            tokens = choose(logits, u[:, t], temperature, top_p)              # (I·n,)
            for row, token in enumerate(tokens.tolist()):
                if finish[row] is None:         # a row that ended is still decoded, and not kept
                    finish[row] = append(captions[row], token, tokenizer)
            if all(finish) or t + 1 == room:
                break
            logits = decode(model, cache, tokens)
    results = [{"caption": plain_text(tokenizer, caption), "finish": reason or "length",
                "tokens": len(caption)} for caption, reason in zip(captions, finish)]
    return [results[i * n:(i + 1) * n] for i in range(I)]


def append(caption, token, tokenizer):
    """Append a token to a caption (list of ids) -> why the caption ends here, or None."""
    if token == tokenizer.eos_id:
        return "eos"
    caption.append(token)
    return "repeat" if loops(caption, functools.partial(plain_text, tokenizer)) else None


# ---------------------------------------------------------------- questions
def yes_and_no(tokenizer):
    """Ids (two lists) of the spellings of yes and of no that are single tokens.

    InputError where a vocabulary has no such token for one of them.
    """
    sides = []
    for words in ((" Yes", "Yes", " yes", "yes"), (" No", "No", " no", "no")):
        side = []
        for word in words:
            with contextlib.suppress(InputError):       # a small vocabulary may lack the letters
                ids = tokenizer.encode(word)
                side += ids if len(ids) == 1 else []
        if not side:
            raise InputError(f"the vocabulary has none of {', '.join(map(repr, words))} as a "
                             "single token")
        sides.append(side)
    return sides


def packed_rows(questions, n_prefix, seq_length):
    """Lists of ids, in order -> lists of neighbours that can be packed behind one prefix.

    Each has at most MAX_PACKED tokens (but at least one question), and the questions in it need the
    same NTK base: those that reach beyond the context, which is rare, are packed apart.
    """
    rows, used, alpha = [], 0, None
    for ids in questions:
        needed = ntk_alpha(n_prefix + len(ids), seq_length)
        if not rows or n_prefix + used + len(ids) > MAX_PACKED or needed != alpha:
            rows.append([])
            used, alpha = 0, needed
        rows[-1].append(ids)
        used += len(ids)
    return rows


def yes_probability(model, views, questions):
    """P(yes) of each question about one image, each asked alone -> (M,) float32.

    views (V, 3, S, S); questions (M) as text, asked as `{question} Answer:`. All are packed behind
    one image prefix and cannot see each other, in one forward, or in several (see packed_rows).
    P(yes) is the softmax mass of the yes tokens against the no tokens at the first answer position.
    """
    device = model.lm_head.weight.device
    yes, no = yes_and_no(model.tokenizer)
    prefix = model.image_prompt(len(views), "")
    encoded = [model.tokenizer.encode(f"{question} Answer:") for question in questions]
    parts = [torch.zeros(0, device=device)]
    with evaluating(model):
        for row in packed_rows(encoded, len(prefix), model.config.seq_length):
            ids = prefix + [token for question in row for token in question]
            ids = torch.tensor([ids], device=device)                              # (1, L)
            lengths = torch.tensor([len(prefix), *map(len, row)], device=device)
            branch = torch.arange(len(lengths), device=device).repeat_interleave(lengths)[None]
            last = lengths.cumsum(0)[1:] - 1                                      # (M,)
            logits = model(ids, views, branch=branch, positions=last)[0].float()  # (M, vocab)
            log_odds = logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)
            parts.append(torch.sigmoid(log_odds))
    return torch.cat(parts)


# ---------------------------------------------------------------- loops
def loops(ids, text_of):
    """Whether a list of token ids, whose text is text_of(ids), ends in a loop.

    A loop is one or several whole statements COPIES times in a row, or a shorter pattern over
    LOOP_TOKENS tokens. Three dots or a long number are neither.
    """
    for period in range(1, len(ids) // COPIES + 1):
        if ids[-1] != ids[-1 - period]:
            continue                    # implied by the next comparison, and much faster
        pattern = ids[-period:]
        if pattern * COPIES != ids[-COPIES * period:]:
            continue
        text = text_of(pattern)
        is_statement = any(c in STATEMENT_ENDS for c in text) and any(c.isalpha() for c in text)
        long_run = ids[-LOOP_TOKENS:-period] == ids[period - LOOP_TOKENS:]
        if is_statement or (len(ids) >= LOOP_TOKENS and long_run):
            return True
    return False


def without_loop(caption):
    """A caption that finished by "repeat" with its loop written once: for showing, not training."""
    longest, cut = 0, len(caption)      # of the loops that it may end in; where the second copy is
    for period in range(1, len(caption) // COPIES + 1):
        if caption[-period:] * COPIES != caption[-COPIES * period:]:
            continue
        start = len(caption) - COPIES * period
        while start > 0 and caption[start - 1] == caption[start - 1 + period]:
            start -= 1
        if len(caption) - start > longest:
            longest, cut = len(caption) - start, start + period
    return caption[:cut]
