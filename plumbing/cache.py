"""Keys and values of one image prefix and of many short continuations that share it.

The prefix is kept once per image, whatever the number of samples; each sample adds a short tail,
and a decode step attends to both. Images need not begin together: `replace` puts new prefixes in
the place of images whose samples have ended, and the tails of the others stay as they are.
"""
import weakref

import torch
import torch.nn.functional as F


def causal_attention(q, k, v, allowed):
    """q, k, v (B, H, L, D/H); allowed (B, 1, L, L) bool, None where causality is enough."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None)


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
        n, T = cache.samples, cache.longest
        tail_k[cache.rows, :, cache.now], tail_v[cache.rows, :, cache.now] = k[:, :, 0], v[:, :, 0]
        B, H, _, head = q.shape
        I, P = B // n, prefix_k.shape[2]
        q = q * head ** -0.5                    # before the product, which in float16 may overflow
        # the samples of an image are the queries of one product with its prefix
        to_prefix = q.view(I, n, H, head).transpose(1, 2) @ prefix_k.transpose(2, 3)  # (I, H, n, P)
        if cache.mask is not None:
            to_prefix = to_prefix.masked_fill(~cache.mask[:, None, None], float("-inf"))
        to_prefix = to_prefix.transpose(1, 2).reshape(B, H, 1, P)
        to_tail = q @ tail_k[:, :, :T].transpose(2, 3)                        # (I·n, H, 1, T)
        if cache.ahead is not None:
            to_tail = to_tail.masked_fill(cache.ahead, float("-inf"))
        scores = torch.cat([to_prefix, to_tail], dim=-1)
        share = scores.float().softmax(-1).type_as(v)                         # one softmax for both
        of_prefix = share[..., :P].view(I, n, H, P).transpose(1, 2) @ prefix_v
        of_prefix = of_prefix.transpose(1, 2).reshape(B, H, 1, head)
        of_tail = share[..., P:] @ tail_v[:, :, :T]                           # (I·n, H, 1, head)
        return of_prefix + of_tail


class Cache:
    """For `samples` continuations of each prefix, of up to `room` tokens, in n_layers layers.

    used (I,) int64, on the CPU: how many tokens the samples of each image have so far.
    """

    def __init__(self, n_layers, samples, room):
        self.samples, self.room = samples, room
        self.layers = [LayerCache(self) for _ in range(n_layers)]

    @property
    def filled(self):
        return self.layers[-1].prefix is not None

    def start(self, mask, alpha, I, length):
        """Keep what the prefill decides: padding (mask), NTK alpha, and the number of slots."""
        self.mask, self.alpha, self.length = mask, alpha, length
        self.used = torch.zeros(I, dtype=torch.long)

    def place(self, ids):
        """The logical positions (I·n, 1) of the next tokens; makes ready for a step."""
        now = self.used.repeat_interleave(self.samples)
        self.longest = int(now.max()) + 1
        self.ahead = None               # the columns that are not yet a row's own: (I·n, 1, 1, T)
        if int(now.min()) + 1 < self.longest:
            ahead = torch.arange(self.longest) > now[:, None]
            self.ahead = ahead[:, None, None].to(ids.device)
        self.now, self.rows = now.to(ids.device), torch.arange(len(ids), device=ids.device)
        return self.length + self.now[:, None]

    def replace(self, slots, fresh):
        """Put the prefixes of a fresh cache in the place of the images `slots`; both without
        padding, of the same length."""
        for layer, new in zip(self.layers, fresh.layers):
            for part, new_part in zip(layer.prefix, new.prefix):
                part[slots] = new_part
        self.used[slots] = 0

    def take(self, images):
        """Keep these images, in this order; one that is named twice is there twice."""
        rows = rows_of(images, self.samples)
        for layer in self.layers:
            layer.prefix = tuple(part[images] for part in layer.prefix)
            layer.tail = tuple(part[rows] for part in layer.tail)
        self.used = self.used[images]


def rows_of(images, samples):
    """The numbers of the rows of some images, a row for each sample."""
    return [image * samples + k for image in images for k in range(samples)]
