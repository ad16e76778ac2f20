"""How much memory a training step needs: said beforehand, and measured without a GPU.

    training_bytes(model, trained, world, vision, language, logits)     # from shapes alone
    with Live() as live: …                          # measured: live.peak, of whatever runs here
    with simulated(model): …                        # a model without numbers, however large
    training_peak(model, world, micro_batch)        # measured, of a step of one of `world` ranks

In a simulation weights have shapes and no numbers, and so has all that is computed from them; what
depends on ids, images and masks alone is computed as ever. Operations are those of the CPU. What a
GPU adds to its tensors is not counted: CUDA's context, cuBLAS's workspace, gaps of the allocator.
"""
import contextlib
import weakref
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plumbing import int8


# ---------------------------------------------------------------- from shapes alone
@dataclass
class Tower:
    """Shapes of a tower in training; its methods are bytes.

    tokens: of all rows of a micro-batch, with their images. width, blocks: of its blocks. inner:
    width of the MLP, gated: which is a product of two. qkv: numbers per token of queries, keys and
    values, and of those again that were turned or repeated. rms: norms are RMSNorms, in fp32.
    adapted: numbers of all adapters of a block. dequantised: bytes of the largest int8 weight while
    it is in use. given: bytes of images, which forward holds. at_once: blocks recomputed together.
    """
    tokens: int
    width: int
    blocks: int
    inner: int
    gated: bool
    qkv: int
    rms: bool
    itemsize: int
    adapted: float = 0
    dequantised: int = 0
    given: int = 0
    at_once: int = 1

    def kept(self):
        """From forward to backward: the input of every whole group of blocks. A last one that is
        smaller is gone when memory is the shortest."""
        return self.tokens * self.width * max(1, self.blocks // self.at_once) * self.itemsize

    def recomputed(self):
        """In backward, while a group of blocks is recomputed and the last MLP differentiated.

        A block has q, k, v, what attention reads, the sum with x (for RMSNorm both x in fp32), and
        of the MLP what product and activation need; the next block has its x. Adapters have their
        inputs, bottlenecks, and weights in the dtype of x; the last one has been differentiated.
        Gradients of x and of the MLP's inside come on top, or of less, and an int8 weight.
        """
        D, s, n = self.width, self.itemsize, min(self.at_once, self.blocks)
        norms = 2 * 4 * D if self.rms and s < 4 else s * D
        block = s * (self.qkv + D + (3 if self.gated else 1) * self.inner) + norms
        saved = n * block + (n - 1) * s * D
        if self.adapted:
            saved += (2 * n - 1) * s * (D + self.adapted / (4 * D))
        casts = (n - 0.5) * s * self.adapted if s < 4 else 0
        one = self.tokens * s * self.inner
        gradients = max((3 if self.gated else 2) * one, one + self.dequantised)
        return self.tokens * (saved + s * D) + casts + gradients

    def run(self):
        """In forward, where nothing of it trains: the MLP's inside, x before and after, images."""
        inside = (3 if self.gated else 2) * self.inner + 5 * self.width
        return self.tokens * self.itemsize * inside + self.dequantised + self.given


def training_bytes(model, trained, world, vision, language, between, logits):
    """Bytes that one of `world` cards needs to train {name: parameter}, AdamW's step included.

    Always there are weights, and two moments of each trained number, sharded over the ranks; with
    several ranks also all gradients (see plumbing/train.py). vision and language: a Tower each.
    between: bytes of what forward keeps besides. logits: numbers of a chunk of logits, which are in
    fp32 with their softmax and its gradient.
    """
    stored = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    gradients = sum(4 * p.numel() for p in trained.values())
    of_vision = sum(4 * p.numel() for p in trained.values() if p in parameters_of(model, "vision"))
    of_language = gradients - of_vision
    if world > 1:
        stored, of_vision, of_language = stored + gradients, 0, 0
    head = 3 * 4 * logits + int8.working_bytes([model.output_layer], model.device, model.dtype)
    see, kept = vision.run(), 0
    if parameters_of(model, "vision").intersection(trained.values()):
        see, kept = vision.recomputed(), vision.kept()
    read = kept + between
    moments = (read + language.kept() + max(language.recomputed(), head),   # backward begins
               read + language.recomputed() + of_language,                  # at the first block
               kept + see + of_language,
               see + of_language + of_vision)
    return int(stored + 2 * gradients / world + max(moments))


def parameters_of(model, tower):
    """The parameters of adapters and LoRA in a tower."""
    places = model.places(tower) + model.places(tower, "lora")
    return {p for slot, *_ in places for p in slot.parameters()}


def tower(model, name, tokens, module, **shapes):
    """A Tower of a model, `module` being its blocks; what adapters and int8 add is counted."""
    adapted = sum(p.numel() for p in parameters_of(model, name)) / shapes["blocks"]
    dequantised = int8.working_bytes([module], model.device, model.dtype)
    return Tower(tokens, itemsize=model.dtype.itemsize, adapted=adapted, dequantised=dequantised,
                 **shapes)


def of_qwen_vl(model, trained, world, rows, length, views, at_once, logits):
    """`training_bytes` of model.QwenVL, for `rows` rows of `length` tokens with `views` images.

    at_once: blocks of the ViT that are recomputed together; logits: rows of a chunk of them.
    """
    c, v, D, images = model.config, model.config.visual, model.config.hidden_size, rows * views
    vision = tower(
        model, "vision", images * (v.image_size // v.patch_size) ** 2,
        model.transformer.visual.transformer, width=v.width, blocks=v.layers,
        inner=int(v.width * v.mlp_ratio), gated=False, qkv=3 * v.width, rms=False,
        given=images * 3 * v.image_size ** 2 * 4, at_once=at_once)
    language = tower(
        model, "language", rows * length, model.transformer.h, width=D, blocks=c.num_hidden_layers,
        inner=c.intermediate_size // 2, gated=True, qkv=5 * D, rms=True)
    size = model.dtype.itemsize
    masks_and_images = rows * length ** 2 * (1 + size) + images * v.n_queries * D * size
    return training_bytes(model, trained, world, vision, language, masks_and_images,
                          logits * c.vocab_size)


# ---------------------------------------------------------------- measured
class Live(TorchDispatchMode):
    """Inside, counts bytes of tensors that operations return: alive `now`, and at their `peak`.

    Views share the storage that they look at. What an operation allocates and frees by itself is
    not seen.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = weakref.WeakSet()

    def add(self, tensor):
        """Count a tensor, also one from before."""
        storage = tensor.untyped_storage()
        if storage not in self.storages:
            self.storages.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage.nbytes()).atexit = False

    def free(self, n_bytes):
        self.now -= n_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


class Shapes(TorchDispatchMode):
    """Inside, operations on a tensor without numbers give one without; the others are computed."""

    def __init__(self):
        super().__init__()
        # here, since it is slow to import
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
        self.kind, self.fake = FakeTensor, FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(isinstance(leaf, self.kind) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put):
            args = (args[0], numbers(args[1]), *args[2:])
        with self.fake:
            return func(*args, **kwargs)

    def like(self, tensor):
        """A tensor without numbers, of the same shape, dtype and kind."""
        with self.fake:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake


def numbers(indices):
    """Indices of a tensor with numbers in the place of masks, whose True a shape does not give."""
    parts = [index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool
             else [index] for index in indices]
    return [index for part in parts for index in part]


@contextlib.contextmanager
def simulated(model):
    """Inside, a model on any device, also "meta", has weights without numbers, as if on a CPU."""
    shapes, before, fakes = Shapes(), [], {}
    for tensors in (t for m in model.modules() for t in (m._parameters, m._buffers)):
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor not in fakes:                                 # tied weights stay tied
                fakes[tensor] = shapes.like(tensor)
            before.append((tensors, name, tensor))
            tensors[name] = fakes[tensor]
    try:
        with shapes:
            yield
    finally:
        for tensors, name, tensor in before:
            tensors[name] = tensor


def training_peak(model, world, micro_batch):
    """Bytes alive at most in a step of one of `world` ranks: micro_batch(), which is forward, loss
    and backward, and AdamW, with moments of a share of the parameters that train.

    Several ranks have all gradients before it (see plumbing/train.py). Gradients are None after it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    share = sorted(trained, key=torch.Tensor.numel, reverse=True)[::world]
    with Live() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.AdamW(share, lr=0.0)
        optimizer.step()                                            # makes the moments
        if world == 1:
            optimizer.zero_grad(set_to_none=True)
        live.peak = live.now
        micro_batch()
        optimizer.step()
    for p in trained:
        p.grad = None
    return live.peak
