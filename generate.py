"""Decoding: one image prefix, many samples of it or many questions about it.

The prefix (six views are 1548 tokens) is computed and kept once per image. Each sample adds a short tail of its own to
the key/value cache, and a decode step attends to both; questions are packed behind it in one forward. The random
numbers of a sample depend on (seed, image name, sample index) alone, so neither the batch nor the number of cards
changes them.
"""
import contextlib
import hashlib

import numpy as np
import torch

from model import causal_attention
from plumbing.errors import InputError
from plumbing.weights import free_bytes

COPIES = 3              # a statement said this often in a row is a loop
LOOP_TOKENS = 24        # so is a run this long of any shorter pattern, such as one word that does not end
STATEMENT_ENDS = ",.;:!?\n，。；、"
MOST_AT_ONCE = 16       # images in a batch, where memory allows more
MAX_PACKED = 8192       # tokens of one packed row of questions; its mask is the square of this in bytes


# ---------------------------------------------------------------- cache
class LayerCache:
    """Keys and values of a layer: prefix (I, H, P, head), shared by an image's samples; tail (I·n, H, room, head)."""

    def __init__(self, cache):
        self.cache = cache
        self.prefix = self.tail = None

    def attend(self, q, k, v, allowed):
        """Attention of the prefix to itself on the first call, of one new token per sample to prefix and tail later."""
        cache = self.cache
        if self.prefix is None:
            # copies: k and v are views of all of q, k and v, and matmul would copy them at every step
            self.prefix = k.contiguous(), v.contiguous()
            shape = (len(k) * cache.samples, k.shape[1], cache.room, k.shape[3])
            self.tail = k.new_zeros(shape), v.new_zeros(shape)
            return causal_attention(q, k, v, allowed)
        n, t = cache.samples, cache.used
        (prefix_k, prefix_v), (tail_k, tail_v) = self.prefix, self.tail
        tail_k[:, :, t], tail_v[:, :, t] = k[:, :, 0], v[:, :, 0]
        B, H, _, D = q.shape
        I, P = B // n, prefix_k.shape[2]
        q = q * D ** -0.5                       # before the product, which in float16 might overflow
        # the samples of an image are the queries of one product with its prefix
        to_prefix = q.view(I, n, H, D).transpose(1, 2) @ prefix_k.transpose(2, 3)              # (I, H, n, P)
        if cache.mask is not None:
            to_prefix = to_prefix.masked_fill(~cache.mask[:, None, None], float("-inf"))
        to_tail = q @ tail_k[:, :, :t + 1].transpose(2, 3)                                     # (I·n, H, 1, t+1)
        scores = torch.cat([to_prefix.transpose(1, 2).reshape(B, H, 1, P), to_tail], dim=-1)
        share = scores.float().softmax(-1).type_as(v)                                          # one softmax over both
        of_prefix = share[..., :P].view(I, n, H, P).transpose(1, 2) @ prefix_v                 # (I, H, n, head)
        return of_prefix.transpose(1, 2).reshape(B, H, 1, D) + share[..., P:] @ tail_v[:, :, :t + 1]


class Cache:
    """The cache of a model for `samples` continuations of each prefix, `room` tokens long at most."""

    def __init__(self, model, samples, room):
        self.samples, self.room, self.used = samples, room, 0
        self.layers = [LayerCache(self) for _ in model.transformer.h]

    @property
    def filled(self):
        return self.layers[-1].prefix is not None

    def start(self, mask, alpha, length):
        """What the prefill fixes: which slots are padding, the NTK alpha, kept while decoding, and how many slots."""
        self.mask, self.alpha, self.length = mask, alpha, length

    def place(self, ids):
        """Logical position of the next token, the same for all samples."""
        return torch.full((1, ids.shape[1]), self.length + self.used, device=ids.device)


def prefill(model, ids, images, mask, samples, room):
    """Run the prefixes -> a filled cache, and the logits (I·samples, vocab) of the first new token."""
    cache = Cache(model, samples, room)
    last = torch.tensor([ids.shape[1] - 1], device=ids.device)
    logits = model(ids, images, mask, positions=last, cache=cache)[:, 0]
    return cache, logits.repeat_interleave(samples, dim=0)


def decode(model, cache, tokens):
    """Append one token (B,) to each sample -> the logits (B, vocab) of the next."""
    logits = model(tokens[:, None], cache=cache)[:, 0]
    cache.used += 1
    return logits


@contextlib.contextmanager
def evaluating(model):
    """Eval mode without gradients inside, the mode from before after."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


# ---------------------------------------------------------------- greedy
def greedy(model, ids, images, mask=None, max_new_tokens=16, eos_id=None):
    """The most likely token, again and again -> new ids only (B, at most max_new_tokens).

    ids, images, mask as in the model's forward; padding stands on the left. A row that reached eos_id is filled with
    it; eos_id None never stops early.
    """
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError("padding must stand on the left: every row's last token is continued")
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
    """`count` numbers in [0, 1) that belong to one sample of one image, on every machine and in every batch."""
    key = hashlib.sha256(f"{seed}\0{name}\0{index}".encode("utf-8", "surrogatepass")).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).random(count)


def choose(logits, u, temperature, top_p):
    """Draw a token per row: logits (B, vocab), u (B,) in [0, 1) -> ids (B,).

    u picks a place on the cumulated probabilities in the order of the vocabulary: a rounding error in the logits then
    changes the token only where u falls next to a border. Temperature 0 is the most likely token. top_p keeps the
    smallest set of tokens that holds this much of the probability.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = p.sort(dim=-1, descending=True, stable=True)
        dropped = ordered.cumsum(-1) - ordered >= top_p         # the token that crosses top_p stays
        p = p.masked_fill(torch.zeros_like(dropped).scatter(-1, index, dropped), 0.0)
    reach = p.cumsum(-1)
    at = torch.searchsorted(reach, u[:, None] * reach[:, -1:], right=True)
    return at.clamp(max=p.shape[-1] - 1)[:, 0]


def room_left(model, n_views, max_new_tokens=None, past_context=False):
    """How many tokens a caption may have: max_new_tokens, but not beyond the trained context unless past_context."""
    prefix = len(model.caption_prompt(n_views))
    left = model.config.seq_length - prefix
    if past_context and max_new_tokens is not None:
        return max_new_tokens
    if left < 1:
        raise InputError(f"the prompt is {prefix} tokens ({n_views} views), the context {model.config.seq_length}")
    return left if max_new_tokens is None else min(max_new_tokens, left)


def images_at_once(model, n_views, samples, room):
    """How many images fit in half of the memory that is free, with the caches of their samples of `room` tokens."""
    config, weight = model.config, model.lm_head.weight
    tokens = len(model.caption_prompt(n_views)) + samples * room
    each = 2 * config.num_hidden_layers * config.hidden_size * weight.dtype.itemsize * tokens
    free = free_bytes(weight.device)
    return MOST_AT_ONCE if free is None else max(1, min(MOST_AT_ONCE, int(free / 2 / each)))


def sample(model, views, names, n=1, max_new_tokens=None, temperature=1.0, top_p=1.0, seed=0, past_context=False):
    """n captions for each image -> a list per image of n results {"caption", "finish", "tokens"}.

    views (I, V, 3, S, S); names (I): what the images are called, for their random numbers. caption is the raw text as
    the model wrote it, leading space and any loop included; finish says why it ended: "eos" (the end token), "length",
    or "repeat" (a statement said over and over); tokens counts the caption's, without the end token.
    """
    I, V = views.shape[:2]
    if len(names) != I or n < 1 or temperature < 0 or not 0 < top_p <= 1 or (max_new_tokens or 1) < 1:
        raise ValueError(f"want {I} names, n ≥ 1, temperature ≥ 0, 0 < top_p ≤ 1 and max_new_tokens ≥ 1")
    device = next(model.parameters()).device
    room = room_left(model, V, max_new_tokens, past_context)
    ids = torch.tensor([model.caption_prompt(V)] * I, device=device)
    u = torch.tensor(np.array([uniforms(seed, name, k, room) for name in names for k in range(n)]), device=device)
    eos = model.tokenizer.eos_id

    def text_of(ids):       # without special tokens: as text they would read as others
        return model.tokenizer.decode(i for i in ids if i < eos)

    said, finish = [[] for _ in range(I * n)], [None] * (I * n)
    with evaluating(model):
        cache, logits = prefill(model, ids, views.flatten(0, 1), None, n, room)
        if not bool(logits.isfinite().all()):
            raise InputError("the model's logits are not finite; in float16, try bfloat16 or float32")
        for t in range(room):
            chosen = choose(logits, u[:, t], temperature, top_p)
            for row, token in enumerate(chosen.tolist()):
                if finish[row]:
                    continue                    # decoded on with the batch, not kept
                if token == eos:
                    finish[row] = "eos"
                else:
                    said[row].append(token)
                    finish[row] = "repeat" if loops(said[row], text_of) else None
            if all(finish) or t + 1 == room:
                break
            logits = decode(model, cache, chosen)
    results = [{"caption": text_of(tokens), "finish": end or "length", "tokens": len(tokens)}
               for tokens, end in zip(said, finish)]
    return [results[i * n:(i + 1) * n] for i in range(I)]


# ---------------------------------------------------------------- questions
def yes_and_no(tokenizer):
    """Ids (two lists) of the spellings of yes and no that are single tokens. InputError where a side has none."""
    sides = []
    for words in ((" Yes", "Yes", " yes", "yes"), (" No", "No", " no", "no")):
        sides.append([])
        for word in words:
            with contextlib.suppress(InputError):       # a small vocabulary may lack its very letters
                ids = tokenizer.encode(word)
                sides[-1] += ids if len(ids) == 1 else []
        if not sides[-1]:
            raise InputError(f"the vocabulary has none of {', '.join(map(repr, words))} as a single token")
    return sides


def yes_probability(model, views, questions):
    """P(yes) of each question about one image, asked alone -> (M,) float32.

    views (V, 3, S, S); questions (M) as text, put as `{question} Answer:`. All are packed behind one image prefix, none
    sees another, in one forward, or a few where they are more than MAX_PACKED tokens. P(yes) is the softmax mass of the
    yes tokens against the no tokens at the first answer position.
    """
    device = next(model.parameters()).device
    yes, no = yes_and_no(model.tokenizer)
    prefix = model.image_prompt(len(views), "")
    rows, rooms = [[]], [0]
    for question in questions:
        ids = model.tokenizer.encode(f"{question} Answer:")
        if rows[-1] and len(prefix) + rooms[-1] + len(ids) > MAX_PACKED:
            rows, rooms = [*rows, []], [*rooms, 0]
        rows[-1].append(ids)
        rooms[-1] += len(ids)
    found = []
    with evaluating(model):
        for row in filter(None, rows):
            ids = torch.tensor([prefix + [i for question in row for i in question]], device=device)
            lengths = torch.tensor([len(prefix)] + [len(question) for question in row], device=device)
            branch = torch.arange(len(lengths), device=device).repeat_interleave(lengths)[None]
            logits = model(ids, views, branch=branch, positions=lengths.cumsum(0)[1:] - 1)[0].float()    # (M, vocab)
            found.append(torch.sigmoid(logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)))
    return torch.cat(found) if found else torch.zeros(0, device=device)


# ---------------------------------------------------------------- loops
def loops(ids, text_of):
    """Whether a list of token ids ends in a loop: one or several whole statements COPIES times in a row, or a shorter
    pattern over LOOP_TOKENS tokens. Three dots or a long number are neither."""
    for p in range(1, len(ids) // COPIES + 1):
        if ids[-1] != ids[-1 - p] or ids[-p:] * COPIES != ids[-COPIES * p:]:
            continue
        text = text_of(ids[-p:])
        if any(c in STATEMENT_ENDS for c in text) and any(c.isalpha() for c in text):
            return True
        if len(ids) >= LOOP_TOKENS and ids[-LOOP_TOKENS:-p] == ids[p - LOOP_TOKENS:]:
            return True
    return False


def without_loop(caption):
    """The text of a caption that finished by "repeat", with its loop said once: for showing, never for training."""
    best = 0, len(caption)                      # how long the loop is, and where its second saying begins
    for p in range(1, len(caption) // COPIES + 1):
        if caption[-p:] * COPIES == caption[-COPIES * p:]:
            start = len(caption) - COPIES * p
            while start > 0 and caption[start - 1] == caption[start - 1 + p]:
                start -= 1
            best = max(best, (len(caption) - start, start + p), key=lambda found: found[0])
    return caption[:best[1]]
