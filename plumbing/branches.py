"""Branches of one prefix in transformers' models: who sees whom in a packed row.

A packed row is [prefix | branch 1 | branch 2 | ...]. Each model has an attention mask of its own
(causal, sliding windows, images that see themselves both ways), written as a function of two
places in a row. Here that function gets logical places, those that a token would have if its branch
alone followed the prefix, and what it allows is narrowed to the token's own branch.
"""
import contextlib
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from plumbing.positions import layout

NAME = "sdpa_in_branches"
current = []            # the layout of the forward that is running, if it has branches


@dataclass
class Layout:
    """Of every token of a row, and of the cache before it: its logical place and its branch."""
    place: torch.Tensor         # (B, L) int
    branch: torch.Tensor        # (B, L) int: 0 the prefix, -1 padding

    def extended(self, more):
        """This layout and behind it another."""
        return Layout(torch.cat([self.place, more.place], dim=1),
                      torch.cat([self.branch, more.branch], dim=1))


def logical(ids, mask, branch):
    """The layout of rows (B, L), padded on the right."""
    place, _ = layout(ids, None, branch)
    branch = torch.zeros_like(ids) if branch is None else branch
    if mask is not None:
        if bool((mask[:, :-1] < mask[:, 1:]).any()):
            raise ValueError("rows must be padded on the right")
        branch = branch.masked_fill(~mask.bool(), -1)
    return Layout(place.expand_as(ids), branch)


def take(where, place):
    """The positions (..., B, L) of logical places (B, L), from those of all places (..., B, n)."""
    shape = (*where.shape[:-2], *place.shape)
    return where.expand(*shape[:-1], where.shape[-1]).gather(-1, place.expand(shape))


def mask_of(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, **rest):
    """transformers' mask interface: (B, 1, queries, keys) bool, True where a query sees a key."""
    if not current or current[-1] is None:
        return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length,
                         q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function,
                         **rest)
    place, branch = current[-1].place, current[-1].branch
    queries, keys = (slice(start, start + n)
                     for start, n in ((q_offset, q_length), (kv_offset, kv_length)))
    row = torch.arange(batch_size, device=place.device)[:, None, None, None]
    allowed = mask_function(row, torch.zeros_like(row), place[:, None, queries, None],
                            place[:, None, None, keys])                       # (B, 1, q, k)
    of_query, of_key = branch[:, None, queries, None], branch[:, None, None, keys]
    return allowed & ((of_key == 0) | (of_key == of_query))


AttentionInterface.register(NAME, sdpa_attention_forward)
AttentionMaskInterface.register(NAME, mask_of)


def watch(decoder):
    """Let a language model of transformers ask `mask_of` for its masks."""
    decoder.config._attn_implementation = NAME


@contextlib.contextmanager
def within(layout):
    """Inside, masks follow the branches of a layout; None is the model's own mask."""
    current.append(layout)
    try:
        yield
    finally:
        current.pop()


class Cache:
    """Keys and values of prefixes, and of `samples` continuations of each that share them.

    transformers' cache holds one row per prefix: the tokens that are appended in a step, one for
    each sample, are neighbours in it and branches to each other. A model that cannot hold branches
    apart has a row per sample instead. used (I,) as in plumbing/cache.py.
    """

    def __init__(self, past, samples, room):
        self.past, self.samples, self.room, self.filled = past, samples, room, False

    def start(self, layout, where):
        self.layout, self.filled = layout, True
        self.where = where.expand(*where.shape[:-2], len(layout.place), where.shape[-1]).clone()
        self.length = layout.place.shape[1]
        self.used = torch.zeros(len(layout.place), dtype=torch.long)

    def next(self, device):
        """The layout of the next token of every sample, (I, samples)."""
        place = (self.length + self.used[:, None]).expand(-1, self.samples).to(device)
        branch = torch.arange(1, self.samples + 1, device=device).expand_as(place)
        return Layout(place, branch)

    def replace(self, slots, fresh):
        """As in plumbing/cache.py. What follows the old prefixes stays, and nothing sees it."""
        P = self.length
        for layer, new in zip(self.past.layers, fresh.past.layers):
            layer.keys[slots, :, :P], layer.values[slots, :, :P] = new.keys, new.values
        self.where[..., slots, :] = fresh.where
        self.layout.branch[slots, P:] = -1
        self.used[slots] = 0
        live = self.samples * int(self.used.max())      # the last columns; those before are dead
        self.keep(lambda t: torch.cat([t[:, :, :P], t[:, :, t.shape[2] - live:]], dim=2))

    def take(self, images):
        """As in plumbing/cache.py."""
        self.keep(lambda t: t[images])
        self.where, self.used = self.where[..., images, :], self.used[images]

    def keep(self, part):
        """Replace everything of the shape (I, ·, columns, …) by a part of it."""
        for layer in self.past.layers:
            layer.keys, layer.values = part(layer.keys), part(layer.values)
        place, branch = (part(t[:, None])[:, 0] for t in (self.layout.place, self.layout.branch))
        self.layout = Layout(place, branch)
