"""Where things are: position tables of the vision tower, places of tokens in packed rows."""
import math

import numpy as np
import torch
import torch.nn.functional as F

from plumbing.errors import InputError


# ---------------------------------------------------------------- patches of an image
def resize_table(table, n):
    """A square table of position vectors (P, D) -> (n, D): bicubic, in fp32 as the official code.

    n must be a square as well. A table that has n rows already is returned as it is.
    """
    old, new = math.isqrt(table.shape[0]), math.isqrt(n)
    if old == new:
        return table
    grid = table.float().view(1, old, old, -1).permute(0, 3, 1, 2)            # (1, D, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)             # (n, D)


def sincos_table(side, width):
    """Fixed 2-D positions (side², width): the first half for the column, the second for the row.

    Each half is [sin(p·ω_i) | cos(p·ω_i)] with p the column or row and ω_i = 10000^(-4i / width),
    i < width/4, as in MAE's code (https://arxiv.org/abs/2111.06377).
    """
    omega = 1 / 10000 ** (np.arange(width // 4, dtype=np.float32) / np.float32(width / 4))
    angles = np.arange(side, dtype=np.float32)[:, None] * omega               # (side, width/4)
    half = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)           # (side, width/2)
    column, row = np.tile(half, (side, 1)), np.repeat(half, side, axis=0)     # (side², width/2)
    return torch.from_numpy(np.concatenate([column, row], axis=1))


# ---------------------------------------------------------------- tokens of packed rows
def layout(ids, mask, branch):
    """The logical position of each token, place (B or 1, L), and what it may attend to.

    A token sees what is before it of the prefix and of its own branch. Its position counts these,
    padding included, and not the other branches. allowed (B, 1, L, L) bool, None for plain causal.
    """
    L, device = ids.shape[1], ids.device
    if mask is None and branch is None:
        return torch.arange(L, device=device)[None], None
    allowed = torch.ones(L, L, dtype=torch.bool, device=device).tril()[None]
    if branch is not None:
        of_prefix = branch[:, None, :] == 0
        of_own_branch = branch[:, None, :] == branch[:, :, None]
        allowed = allowed & (of_prefix | of_own_branch)                       # (B, L, L)
    place = allowed.sum(-1) - 1                                               # (B or 1, L)
    if mask is not None:
        allowed = allowed & mask[:, None, :]
    itself = torch.eye(L, dtype=torch.bool, device=device)        # no empty row, hence no NaN
    return place, (allowed | itself)[:, None]


# ---------------------------------------------------------------- tokens beyond the context
def ntk_alpha(length, seq_length):
    """Dynamic NTK: how much the rotary base grows for `length` tokens, 1 within seq_length.

    2^(⌈log2(length / seq_length)⌉ + 1) - 1 beyond: 3 up to twice seq_length, then 7, 15, as in
    Qwen's code (described in https://arxiv.org/abs/2309.16609).
    """
    return max(2 ** math.ceil(math.log(length / seq_length, 2) + 1) - 1, 1)


def batch_alpha(place, mask, branch, seq_length):
    """The NTK alpha of a batch: by its slots, padding counted, or by its packed sequences.

    InputError where packed sequences need different ones: their prefix is computed with one only.
    """
    if branch is None or int(place.max()) < seq_length:
        return ntk_alpha(int(place.max()) + 1, seq_length)
    ends = place + 1 if mask is None else (place + 1) * mask
    lengths = ends.new_zeros(len(branch), int(branch.max()) + 1)
    lengths = lengths.scatter_reduce(1, branch.long(), ends, "amax")          # (B, branches)
    lengths[:, 0] *= lengths[:, 1:].sum(-1) == 0          # a prefix is part of its continuations
    lengths = lengths[lengths > 0]
    shortest, longest = int(lengths.min()), int(lengths.max())
    if ntk_alpha(shortest, seq_length) != ntk_alpha(longest, seq_length):
        raise InputError(f"packed sequences of {shortest} to {longest} tokens need different rotary"
                         f" bases (context {seq_length}); shorten the longest, or pack it apart")
    return ntk_alpha(longest, seq_length)
