"""Frozen weights in int8: a byte and a share of a scale per number, made while a base is loaded.

Symmetric, with a scale for each output channel, so that no data is needed for calibration:

    scale = max |row| / 127        weight = int8 · scale        (https://arxiv.org/abs/2004.09602)

Linear layers of the blocks, the embedding table and the output layer are quantised; convolutions,
norms, biases and all that adapters.py attaches keep their dtype. Activations are never quantised:
torch._int_mm would be faster for long prefixes, but a few channels of large activations
(https://arxiv.org/abs/2208.07339) would need a calibration or a second product.
"""
import re

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.errors import InputError

CHOICES = ("int8",)             # of --quantize
LARGEST = 127                   # -128 is not used, so that the range is symmetric
# Weights that are dequantised together: on a GPU all of a layer but the output layer, 128 MiB in
# bfloat16; on a CPU as many as its cache holds.
AT_ONCE = {"cuda": 1 << 26, "meta": 1 << 26, "cpu": 1 << 20}
READ_AT_ONCE = 1 << 20          # weights that are quantised together: 4 MiB in float32
FEW_ROWS = 4                    # up to here torch's packed product on CPUs is the faster one
IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")


# ---------------------------------------------------------------- numbers
def quantised(name, weight, dtype, device=None):
    """A weight (N, K) -> int8 (N, K) and a scale (N,) in dtype. A block of rows at a time is in
    fp32. InputError, with the tensor's name, for numbers that are not finite.

    The scale is rounded to dtype before the division: its rounding then adds no error of its own.
    """
    device = weight.device if device is None else device
    values = torch.empty(weight.shape, dtype=torch.int8, device=device)
    scale = torch.empty(len(weight), dtype=dtype, device=device)
    for rows in row_blocks(weight, READ_AT_ONCE):
        part = weight[rows].to(device, torch.float32)
        step = (part.abs().amax(dim=1) / LARGEST).to(dtype)
        scale[rows] = step.masked_fill(step == 0, 1)                        # a row of zeros
        part = part / scale[rows, None].float()     # a new tensor: it may be the weight itself
        values[rows] = part.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    if not bool(scale.isfinite().all()):
        raise InputError(f"{name}: holds numbers that are not finite, or too large for "
                         f"{str(dtype).removeprefix('torch.')}; fetch the weights again")
    return values, scale


def row_blocks(weight, at_once):
    """Slices of the rows of a weight, with so many numbers each, or one row."""
    step = max(1, at_once // weight.shape[1])
    return [slice(at, at + step) for at in range(0, len(weight), step)]


def at_once(device):
    """AT_ONCE of a device. A compiled graph has a node for each block: there, few."""
    return AT_ONCE["cuda" if torch.compiler.is_compiling() else device.type]


def product(x, weight, scale):
    """x (..., K) times weight (N, K) int8 with scale (N,) -> (..., N)."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() <= FEW_ROWS * x.shape[-1]:
        y = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight, scale)
        return y.view(*x.shape[:-1], len(weight))
    blocks = row_blocks(weight, at_once(x.device))
    parts = [part_of_product(x, weight[rows], scale[rows]) for rows in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def part_of_product(x, weight, scale):
    """`product` with all rows at once. The conversion of the weight is what torch.compile fuses
    with a matrix-vector product (https://pytorch.org/blog/accelerating-generative-ai-2)."""
    if x.dtype == torch.float16:                # sums of x · int8 would leave its range
        return F.linear(x, weight.to(x.dtype) * scale[:, None])
    return F.linear(x, weight.to(x.dtype)) * scale


class Product(torch.autograd.Function):
    """`product` through which gradients reach x alone. What it keeps for backward is the int8
    weight: autograd by itself would keep the dequantised one."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return product(x, weight, scale)

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        grad = grad * scale                                                   # (..., N)
        blocks = row_blocks(weight, at_once(grad.device))
        parts = [grad[..., rows] @ weight[rows].to(grad.dtype) for rows in blocks]
        return sum(parts[1:], parts[0]), None, None


# ---------------------------------------------------------------- layers
def frozen(like, dtype, *shape):
    """A parameter that never trains, uninitialised. It is no buffer: those DDP broadcasts again
    and again."""
    return nn.Parameter(like.new_empty(shape, dtype=dtype), requires_grad=False)


class Int8Linear(nn.Linear):
    """A linear layer with an int8 weight; its bias is that of the layer that it replaces."""

    def __init__(self, linear, weight, scale):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.scale, self.bias = weight, scale, linear.bias

    def forward(self, x):
        # some code casts x to the dtype of `weight`: an error is better than a wrong result
        assert x.is_floating_point(), f"activations are {x.dtype}"
        if torch.is_grad_enabled() and x.requires_grad:
            y = Product.apply(x, self.weight, self.scale)
        else:
            y = product(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Embedding):
    """An embedding table with a scale for each row, so that an output layer may share it."""

    def __init__(self, embedding, weight, scale):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.weight, self.scale = embedding.padding_idx, weight, scale

    def forward(self, ids):
        return self.weight[ids].to(self.scale.dtype) * self.scale[ids][..., None]


KINDS = {nn.Linear: Int8Linear, nn.Embedding: Int8Embedding}


def replace(model, ends):
    """Put empty int8 layers in the place of those of a model, of its blocks and its two `ends`,
    embeddings and output layer. No subclass is replaced, whose forward may be its own; nor is a
    layer whose weight another kind of layer shares."""
    owners = {}
    for name, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            chosen = type(module) in KINDS and (
                IN_A_BLOCK.search(name) or any(module is end for end in ends))
            owners.setdefault(weight, []).append((name, module, chosen))
    for weight, sharing in owners.items():
        if not all(chosen for *_, chosen in sharing) or sharing[0][1].weight is not weight:
            continue                                            # one that stays, or a bias
        values = frozen(weight, torch.int8, *weight.shape)
        scale = frozen(weight, weight.dtype, len(weight))
        for name, module, _ in sharing:
            above, _, last = name.rpartition(".")
            setattr(model.get_submodule(above), last, KINDS[type(module)](module, values, scale))


def layers(model):
    """{name: layer} of the int8 layers of a model."""
    return {name: module for name, module in model.named_modules() if is_int8(module)}


def is_int8(module):
    return isinstance(module, tuple(KINDS.values()))


def dtype_of(layer):
    """The dtype that a layer computes in."""
    return layer.scale.dtype if isinstance(layer, Int8Linear) else layer.weight.dtype


# ---------------------------------------------------------------- bytes
def stored_bytes(model, dtype):
    """Bytes of a model's tensors once they are loaded in dtype; tied ones count once."""
    return sum(t.numel() * (1 if t.dtype == torch.int8 else dtype.itemsize)
               for t in (*model.parameters(), *model.buffers()))


def working_bytes(modules, device, dtype):
    """Bytes of the largest weight in modules, or part of one, while it is dequantised to dtype."""
    numbers = [min(layer.weight.numel(), at_once(device))
               for module in modules for layer in module.modules() if is_int8(layer)]
    return max(numbers, default=0) * dtype.itemsize
