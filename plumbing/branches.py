"""Branches of one prefix in transformers' models: who sees whom in a packed row.

A packed row is [prefix | branch 1 | branch 2 | ...]. Each model has an attention mask of its own
(causal, sliding windows, images that see themselves both ways), written as a function of two
places in a row. Here that function gets logical places, those that a token would have if its branch
alone followed the prefix, and what it allows is narrowed to the token's own branch.
"""
import contextlib
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from plumbing.cache import columns_read, rows_of
from plumbing.positions import layout

NAME = "sdpa_in_branches"
PREFIX_STEP = 128       # tokens: a fixed cache has room for prefixes up to a multiple of it
current = []            # the Turn of the forward that is running, or None where it has no branches


class Layout(NamedTuple):
    """Of tokens, their logical place and their branch."""
    place: torch.Tensor         # (B, L) int
    branch: torch.Tensor        # (B, L) int: 0 the prefix, -1 nothing that may be seen


class Turn(NamedTuple):
    """What a forward with branches asks: the layouts of its tokens and of what they may see."""
    queries: Layout
    keys: Layout
    columns: object = None      # (I, n) where in the cache the keys of the new tokens go


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
    queries, keys, _ = current[-1]
    row = torch.arange(batch_size, device=keys.place.device)[:, None, None, None]
    allowed = mask_function(row, torch.zeros_like(row), queries.place[:, None, :, None],
                            keys.place[:, None, None, :])                     # (B, 1, q, k)
    of_query, of_key = queries.branch[:, None, :, None], keys.branch[:, None, None, :]
    return allowed & ((of_key == 0) | (of_key == of_query))


AttentionInterface.register(NAME, sdpa_attention_forward)
AttentionMaskInterface.register(NAME, mask_of)


def watch(decoder):
    """Let a language model of transformers ask `mask_of` for its masks."""
    decoder.config._attn_implementation = NAME


@contextlib.contextmanager
def within(turn):
    """Inside, masks follow the branches of a Turn; None is the model's own mask."""
    current.append(turn)
    try:
        yield
    finally:
        current.pop()


class FixedLayer(DynamicLayer):
    """Keys and values (I, H, start + n·(room + 1), head) of prefixes and of all that may follow.

    The n samples of an image have neighbouring columns at every moment, so that a step reads up to
    the latest moment alone.
    """

    def __init__(self, layer, more):
        super().__init__()
        self.keys, self.values = (pad(t, (0, 0, 0, more)) for t in (layer.keys, layer.values))
        self.is_initialized, self.length = True, 0      # columns that the running step reads

    def update(self, keys, values, *rest, **more):
        """Keep keys and values (I, H, n, head) in the columns of the turn -> all that it reads."""
        columns = current[-1].columns                                         # (I, n)
        row = torch.arange(len(columns), device=columns.device)[:, None]
        self.keys[row, :, columns] = keys.transpose(1, 2)
        self.values[row, :, columns] = values.transpose(1, 2)
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]

    def get_seq_length(self):
        """Columns before those of the new tokens, as transformers counts them for its masks."""
        return self.length - current[-1].columns.shape[1]


class Cache:
    """Keys and values of prefixes, and of `samples` continuations of each that share them.

    transformers' cache holds one row per prefix: the tokens that are appended in a step, one for
    each sample, are neighbours in it and branches to each other. A model that cannot hold branches
    apart has a row per sample instead, and a cache that grows. used, now (I,) and is_fixed as in
    plumbing/cache.py.
    """

    def __init__(self, config, packs, samples, room):
        # without a configuration nothing is dropped behind a sliding window; the mask sees to that
        self.past = DynamicCache() if packs else DynamicCache(config=config)
        self.packs, self.samples, self.room = packs, samples, room
        self.filled = self.is_fixed = False

    def start(self, layout, where):
        """Keep the layout of the prefixes (I, P), and the positions of all logical places."""
        I, self.start_of_tails = layout.place.shape
        self.length = torch.full((I, 1), self.start_of_tails, device=where.device)
        self.where = where.expand(*where.shape[:-2], I, where.shape[-1]).clone()
        self.used = torch.zeros(I, dtype=torch.long)
        self.now = torch.zeros(I, dtype=torch.long, device=where.device)
        self.filled, self.prefix = True, Layout(layout.place.clone(), layout.branch.clone())
        if self.packs:
            more = self.samples * (self.room + 1)
            self.past.layers = [FixedLayer(layer, more) for layer in self.past.layers]
        else:
            rows = torch.tensor(rows_of(range(I), self.samples), device=where.device)
            self.past.reorder_cache(rows // self.samples)

    def fix(self):
        """As in plumbing/cache.py. Prefixes of a few other lengths will fit as well."""
        old, more = self.start_of_tails, -self.start_of_tails % PREFIX_STEP
        for layer in self.past.layers:
            layer.keys, layer.values = (
                torch.cat([pad(t[:, :, :old], (0, 0, 0, more)), t[:, :, old:]], dim=2)
                for t in (layer.keys, layer.values))
        self.where = pad(self.where, (0, more))
        place, branch = self.prefix
        self.prefix = Layout(pad(place, (0, more)), pad(branch, (0, more), value=-1))
        self.start_of_tails, self.is_fixed = old + more, True

    def holds(self, length):
        """As in plumbing/cache.py."""
        return length <= self.start_of_tails

    def reach(self):
        """As in plumbing/cache.py."""
        self.columns = columns_read(self)

    def turn(self):
        """The Turn of the next token of every sample, (I, n)."""
        n, now, device = self.samples, self.now[:, None], self.now.device     # (I, 1)
        sample = torch.arange(n, device=device)
        moment = torch.arange(self.columns, device=device).repeat_interleave(n)
        new = Layout((self.length + now).expand(-1, n), (sample + 1).expand(len(now), -1))
        branch = (sample + 1).repeat(self.columns).expand(len(now), -1)       # (I, columns · n)
        tails = Layout(self.length + moment, branch.masked_fill(moment > now, -1))
        keys = Layout(*(torch.cat(pair, dim=1) for pair in zip(self.prefix, tails)))
        for layer in self.past.layers:
            layer.length = self.start_of_tails + self.columns * n
        return Turn(new, keys, self.start_of_tails + now * n + sample)

    def tensors(self):
        """All that a step reads and writes on the device."""
        return [self.now, self.length, self.where, *self.prefix,
                *(t for layer in self.past.layers for t in (layer.keys, layer.values))]

    def replace(self, slots, fresh):
        """As in plumbing/cache.py."""
        P = fresh.start_of_tails
        for layer, new in zip(self.past.layers, fresh.past.layers):
            layer.keys[slots, :, :P] = new.keys[:, :, :P]
            layer.values[slots, :, :P] = new.values[:, :, :P]
        self.prefix.branch[slots] = -1
        self.prefix.branch[slots, :P] = fresh.prefix.branch
        self.prefix.place[slots, :P] = fresh.prefix.place
        self.where[..., slots, :fresh.where.shape[-1]] = fresh.where
        self.length[slots], self.used[slots], self.now[slots] = P, 0, 0

    def take(self, images):
        """As in plumbing/cache.py."""
        for layer in self.past.layers:
            layer.keys, layer.values = layer.keys[images], layer.values[images]
        self.where = self.where[..., images, :]
        self.prefix = Layout(*(t[images] for t in self.prefix))
        self.length, self.used, self.now = (t[images] for t in (self.length, self.used, self.now))
