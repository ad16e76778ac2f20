"""Keys and values of one image prefix and of many short continuations that share it.

The prefix is kept once per image, whatever the number of samples; each sample adds a short tail,
and a decode step attends to both. All tensors keep their place and their shape from the first step
to the last, so that one captured step can serve every token. Images need not begin together:
`replace` puts new prefixes in the place of images whose samples have ended, and the tails of the
others stay as they are.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

COLUMNS = 512           # of the tails, that a fixed cache reads; for longer captions twice as many


def causal_attention(q, k, v, allowed):
    """q, k, v (B, H, L, D/H); allowed (B, 1, L, L) bool, None where causality is enough."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None)


class Turn(NamedTuple):
    """What all layers need to know of a decode step."""
    samples: int            # of each image
    columns: int            # of the tails, that are read
    now: torch.Tensor       # (I·n,) the column of the new token
    rows: torch.Tensor      # (I·n,) 0, 1, …
    padding: object         # (I, 1, P, 1) bool, True where a prefix has padding; or None
    ahead: object           # (I·n, 1, 1, T) bool, True behind the new token; or None


class LayerCache:
    """Keys and values of one layer.

    prefix, one per image, shared by its n samples: keys (I, H, P, head) and values (I, H, head, P),
    so that in both products of a step the large matrix comes first, as it lies in memory. The other
    way round is a third as fast on a CPU. tail: both (I·n, H, room + 1, head).
    """

    def __init__(self, samples, room):
        self.samples, self.room = samples, room
        self.prefix = self.tail = None

    def attend(self, q, k, v, allowed):
        """Causal attention of the prefix in the first call, later of one new token per sample, for
        which `allowed` is a Turn."""
        if self.prefix is None:
            self.start(k, v)
            return causal_attention(q, k, v, allowed)
        return self.step(q, k, v, allowed)

    def start(self, k, v):
        # copies: k and v are views of q, k and v together, which matmul would copy at every step
        self.prefix = k.contiguous(), v.transpose(2, 3).contiguous()
        I, H, _, head = k.shape
        shape = (I * self.samples, H, self.room + 1, head)
        self.tail = k.new_zeros(shape), v.new_zeros(shape)

    def step(self, q, k, v, turn):
        """q, k, v (I·n, H, 1, head) of the new tokens -> what they read from prefix and tail."""
        (prefix_k, prefix_v), (tail_k, tail_v) = self.prefix, self.tail
        n, T = turn.samples, turn.columns
        tail_k[turn.rows, :, turn.now], tail_v[turn.rows, :, turn.now] = k[:, :, 0], v[:, :, 0]
        B, H, _, head = q.shape
        I, P = B // n, prefix_k.shape[2]
        q = q * head ** -0.5                    # before the product, which in float16 may overflow
        # the samples of an image are the queries of one product with its prefix
        to_prefix = prefix_k @ q.view(I, n, H, head).permute(0, 2, 3, 1)      # (I, H, P, n)
        if turn.padding is not None:
            to_prefix = to_prefix.masked_fill(turn.padding, float("-inf"))
        to_prefix = to_prefix.permute(0, 3, 1, 2).reshape(B, H, 1, P)
        to_tail = q @ tail_k[:, :, :T].transpose(2, 3)                        # (I·n, H, 1, T)
        if turn.ahead is not None:
            to_tail = to_tail.masked_fill(turn.ahead, float("-inf"))
        scores = torch.cat([to_prefix, to_tail], dim=-1)
        share = scores.float().softmax(-1).type_as(v)                         # one softmax for both
        of_prefix = prefix_v @ share[..., :P].view(I, n, H, P).permute(0, 2, 3, 1)
        of_prefix = of_prefix.permute(0, 3, 1, 2).reshape(B, H, 1, head)      # from (I, H, head, n)
        of_tail = share[..., P:] @ tail_v[:, :, :T]                           # (I·n, H, 1, head)
        return of_prefix + of_tail


class Cache:
    """For `samples` continuations of each prefix, of up to `room` tokens, in n_layers layers.

    used (I,) int64: how many tokens the samples of each image have so far; on the CPU, so that no
    question about it waits for the device. now (I,): the same on the device, where samples that
    have ended may continue: beyond `room` their tokens overwrite each other in one column.
    is_fixed: a step reads the same columns at every token, those that are not yet written masked.
    """

    def __init__(self, n_layers, samples, room):
        self.samples, self.room, self.is_fixed = samples, room, False
        self.layers = [LayerCache(samples, room) for _ in range(n_layers)]

    @property
    def filled(self):
        return self.layers[-1].prefix is not None

    def start(self, mask, alpha, ids):
        """Keep what the prefill of ids (I, P) decides: padding (mask), and NTK alpha."""
        self.padding = None if mask is None else ~mask[:, None, :, None]
        self.alpha, self.length = alpha, ids.shape[1]
        self.used = torch.zeros(len(ids), dtype=torch.long)
        self.now = torch.zeros(len(ids), dtype=torch.long, device=ids.device)

    def fix(self):
        """Give all steps one shape."""
        self.is_fixed = True

    def holds(self, length):
        """Whether `replace` may bring in prefixes of this length."""
        return length == self.length

    def reach(self):
        """Before a step, on the host: how many columns it reads, and whether some are not all
        rows'."""
        self.columns = columns_read(self)
        self.is_uneven = int(self.used.min()) + 1 < self.columns

    def turn(self):
        """The logical positions (I·n, 1) of the next tokens, and their Turn."""
        now = self.now.repeat_interleave(self.samples)
        rows, ahead = torch.arange(len(now), device=now.device), None
        if self.is_fixed or self.is_uneven:
            ahead = torch.arange(self.columns, device=now.device) > now[:, None]
            ahead = ahead[:, None, None]
        turn = Turn(self.samples, self.columns, now, rows, self.padding, ahead)
        return self.length + now[:, None], turn

    def tensors(self):
        """All that a step reads and writes on the device."""
        return [self.now, *(t for layer in self.layers for t in (*layer.prefix, *layer.tail))]

    def replace(self, slots, fresh):
        """Put the prefixes of a fresh cache in the place of the images `slots`; both without
        padding, of the same length."""
        for layer, new in zip(self.layers, fresh.layers):
            for part, new_part in zip(layer.prefix, new.prefix):
                part[slots] = new_part
        self.used[slots] = 0
        self.now[slots] = 0

    def take(self, images):
        """Keep these images, in this order; one that is named twice is there twice."""
        rows = rows_of(images, self.samples)
        for layer in self.layers:
            layer.prefix = tuple(part[images] for part in layer.prefix)
            layer.tail = tuple(part[rows] for part in layer.tail)
        self.used, self.now = self.used[images], self.now[images]


def columns_read(cache):
    """How many columns of its tails a cache reads in the next step: those that are written, or if
    it is fixed, a step of COLUMNS, as few shapes are as good as one."""
    written = int(cache.used.max()) + 1
    if not cache.is_fixed:
        return written
    columns = COLUMNS
    while columns < written:
        columns *= 2
    return min(columns, cache.room + 1)


def rows_of(images, samples):
    """The numbers of the rows of some images, a row for each sample."""
    return [image * samples + k for image in images for k in range(samples)]
