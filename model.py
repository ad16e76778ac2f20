"""Qwen-VL (the 2023 base model, 9.6 B parameters) in plain PyTorch.

An image goes through a ViT and a one-layer resampler that turns it into Q vectors; they take the places between
`<img>` and `</img>` in a text, and a decoder-only language model reads on from there. Names of modules are those of
the released checkpoint, so its state dict fits as it is.

    model = QwenVL.from_pretrained("Qwen/Qwen-VL")          # or a folder in the same layout, e.g. assets/toy
    logits = model(ids, images)                             # (B, L, vocab)

One image, many continuations: with `branch`, one sequence holds a prefix (branch 0) and several continuations of it
(branch 1, 2, ...) that do not see each other, so that a long image prefix is computed once for all of them.

Letters for shapes, here and in all other files: B batch, N images, V views of an image, S image side in pixels,
P patches, Q queries of the resampler, L tokens, D width, H heads, R bottleneck of an adapter.
"""
import math
from dataclasses import dataclass, field, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from plumbing import weights
from plumbing.errors import InputError
from plumbing.tokenizer import Tokenizer

CAPTION_PROMPT = "Generate the caption in English:"     # Qwen-VL's own pre-training prompt for captions without boxes

LOGITS_AT_ONCE = 64     # rows of 151,936 logits that a loss keeps at a time: 39 MB in fp32, twice while softmax runs


# ---------------------------------------------------------------- configuration
@dataclass
class VisionConfig:
    """The `visual` part of config.json; the defaults are Qwen-VL's."""
    image_size: int = 448
    patch_size: int = 14
    width: int = 1664
    layers: int = 48
    heads: int = 16
    mlp_ratio: float = 4.9231
    output_dim: int = 4096
    image_start_id: int = 151857
    n_queries: int = 256                  # not in the released config.json


@dataclass
class Config:
    """config.json, as far as the network depends on it; the defaults are Qwen-VL's."""
    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128                # width of a head
    intermediate_size: int = 22016        # the MLP is half as wide: w1 and w2 share it
    seq_length: int = 2048                # the trained context; beyond it NTK and logn act
    layer_norm_epsilon: float = 1e-6
    rotary_emb_base: float = 10000.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True                  # of all linear layers but c_attn
    visual: VisionConfig = field(default_factory=VisionConfig)

    def __post_init__(self):
        v = self.visual
        for part, where in ((self, ""), (v, "visual.")):
            for f in fields(part):
                value, wanted = getattr(part, f.name), {float: (int, float)}.get(f.type, f.type)
                fits = isinstance(value, wanted) and isinstance(value, bool) == (f.type is bool)
                if not fits or (f.type in (int, float) and not 0 < value < math.inf):
                    raise InputError(f"config.json: {where}{f.name} is {value!r}, want a {f.type.__name__} above 0")
        for holds, rule in (
                (self.kv_channels > 2 and self.kv_channels % 2 == 0, "kv_channels must be even and above 2"),
                (self.kv_channels * self.num_attention_heads == self.hidden_size,
                 "kv_channels × num_attention_heads must equal hidden_size"),
                (v.output_dim == self.hidden_size, "visual.output_dim must equal hidden_size"),
                (v.output_dim % 128 == 0, "visual.output_dim must be a multiple of 128"),
                (v.width % v.heads == 0, "visual.width must be a multiple of visual.heads"),
                (math.isqrt(v.n_queries) ** 2 == v.n_queries, "visual.n_queries must be a square"),
                (v.image_size % v.patch_size == 0, "visual.patch_size must divide visual.image_size")):
            if not holds:
                raise InputError(f"config.json: {rule}")

    @classmethod
    def from_json(cls, path):
        """Read a checkpoint's config.json. InputError for another architecture, or one this code does not compute."""
        raw = weights.read_config(path)

        def known(part, kind):
            return {k: v for k, v in part.items() if k in kind.__dataclass_fields__}
        return cls(**{**known(raw, cls), "visual": VisionConfig(**known(raw["visual"], VisionConfig))})


# ---------------------------------------------------------------- room for adapters
class Slot(nn.ModuleDict):
    """Where adapters.py puts its adapters, by name; `stack` names those that are switched on, in order.

    Empty, it is the identity and adds nothing to the state dict.
    """

    def __init__(self):
        super().__init__()
        self.stack = ()

    def forward(self, x):
        for name in self.stack:
            x = self[name](x)
        return x

    def beside(self, x, y):
        """y, what a linear layer made of x, plus what each module makes of x: the place of LoRA."""
        for name in self.stack:
            y = y + self[name](x)
        return y


# ---------------------------------------------------------------- vision tower
def resize_table(table, n):
    """A square table of position vectors (P, D), bicubically resized to n rows; computed in fp32, as the original."""
    old, new = math.isqrt(table.shape[0]), math.isqrt(n)
    if old == new:
        return table
    grid = table.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


def sincos_table(side, width):
    """Fixed 2-D sine-cosine positions (side², width): the first half for the column, the second for the row (MAE)."""
    omega = 1 / 10000 ** (np.arange(width // 4, dtype=np.float32) / np.float32(width / 4))
    angles = np.arange(side, dtype=np.float32)[:, None] * omega                    # (side, width/4)
    half = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    column, row = np.tile(half, (side, 1)), np.repeat(half, side, axis=0)
    return torch.from_numpy(np.concatenate([column, row], axis=1))


def drawn(*shape, std):
    """A parameter for training from scratch (trunc_normal_, as normal_ on the meta device costs seconds of imports)."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=std))


class VisionAttention(nn.Module):
    """Full attention; q, k and v lie side by side within each head, not in three blocks."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.lora_slot = Slot()

    def forward(self, x):
        N, P, D = x.shape
        q, k, v = self.lora_slot.beside(x, self.in_proj(x)).view(N, P, self.heads, -1).transpose(1, 2).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)                                # (N, H, P, D/H)
        return self.out_proj(y.transpose(1, 2).reshape(N, P, D))


class VisionMLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class VisionBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.width, eps=1e-6)
        self.attn = VisionAttention(c.width, c.heads)
        self.ln_2 = nn.LayerNorm(c.width, eps=1e-6)
        self.mlp = VisionMLP(c.width, int(c.width * c.mlp_ratio))
        self.attn_slot, self.mlp_slot = Slot(), Slot()

    def forward(self, x):
        x = x + self.attn_slot(self.attn(self.ln_1(x)))
        return x + self.mlp_slot(self.mlp(self.ln_2(x)))


class CrossAttention(nn.Module):
    """Queries (Q, D) that all images share, keys and values (N, P, D) -> (N, Q, D); q, k, v weights in three blocks.

    Tensors are named as in nn.MultiheadAttention. That class itself rounds differently once its weights are frozen.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query, key, value):
        N, _, D = key.shape
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, weight, bias).view(-1, x.shape[-2], self.heads, D // self.heads).transpose(1, 2)
                   for x, weight, bias in zip((query, key, value), weights, biases))
        y = F.scaled_dot_product_attention(q.expand(N, -1, -1, -1), k, v)          # (N, H, Q, D/H)
        return self.out_proj(y.transpose(1, 2).reshape(N, -1, D))


class Resampler(nn.Module):
    """One cross-attention from Q learned queries to the P patches: (N, P, width) -> (N, Q, D)."""

    def __init__(self, c):
        super().__init__()
        D = c.output_dim
        self.query = drawn(c.n_queries, D, std=0.02)
        self.register_buffer("pos_embed", sincos_table(math.isqrt(c.n_queries), D))
        self.kv_proj = nn.Linear(c.width, D, bias=False) if c.width != D else nn.Identity()
        self.attn = CrossAttention(D, D // 128)
        self.ln_q = nn.LayerNorm(D, eps=1e-6)
        self.ln_kv = nn.LayerNorm(D, eps=1e-6)

    def forward(self, x):
        x = self.ln_kv(self.kv_proj(x))
        # keys know where they are, values do not
        return self.attn(self.ln_q(self.query) + self.pos_embed, x + resize_table(self.pos_embed, x.shape[1]), x)


class VisionTransformer(nn.Module):
    """Images (N, 3, S, S), normalised -> (N, Q, D) vectors for the language model."""

    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv2d(3, c.width, c.patch_size, stride=c.patch_size, bias=False)
        # the table belongs to 224 px (16 × 16 patches) in every configuration, and is resized on the way
        self.positional_embedding = drawn(256, c.width, std=c.width ** -0.5)
        self.ln_pre = nn.LayerNorm(c.width, eps=1e-6)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(VisionBlock(c) for _ in range(c.layers))})
        self.attn_pool = Resampler(c)
        self.ln_post = nn.LayerNorm(c.output_dim, eps=1e-6)
        self.proj = drawn(c.output_dim, c.output_dim, std=c.output_dim ** -0.5)

    def forward(self, images, checkpointing=False):
        x = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)   # (N, P, width)
        x = self.ln_pre(x + resize_table(self.positional_embedding, x.shape[1]))
        for block in self.transformer["resblocks"]:
            x = call(block, x, checkpointing=checkpointing)
        return self.ln_post(self.attn_pool(x)) @ self.proj                              # (N, Q, D)


def call(block, *args, checkpointing):
    """Run a block; with checkpointing its activations are not kept but computed again in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


# ---------------------------------------------------------------- language model
class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight                # cast first, then scale: the original's order


def ntk_alpha(length, seq_length):
    """By how much the rotary base grows for a sequence of `length` tokens: 1 within seq_length, then 3, 7, ..."""
    return max(2 ** math.ceil(math.log(length / seq_length, 2) + 1) - 1, 1)


@dataclass
class Rotary:
    """What turns queries and keys by their place: cos and sin (B or 1, 1, L, head); logn scales late queries."""
    cos: torch.Tensor
    sin: torch.Tensor
    logn: torch.Tensor | None

    @classmethod
    def at(cls, place, alpha, config, training):
        """place (B or 1, L) int: logical position of each token; alpha: see ntk_alpha; logn beyond seq_length."""
        head = config.kv_channels
        base = config.rotary_emb_base * alpha ** (head / (head - 2))
        # exactly these operations: fp32 angles of far tokens show every other way of rounding in the fourth digit
        inv_freq = 1.0 / base ** (torch.arange(0, head, 2, device=place.device, dtype=torch.float32) / head)
        angles = place[:, None, :, None].float() * inv_freq                           # (B, 1, L, head/2)
        angles = torch.cat([angles, angles], dim=-1)                                  # half-split, not interleaved
        logn = None
        if config.use_logn_attn and not training:
            n = (place[:, None, :, None] + 1).double()
            logn = (n.log() / math.log(config.seq_length)).clamp(min=1.0).float()
        return cls(angles.cos(), angles.sin(), logn)

    def turn(self, t):
        """t (B, H, L, head), turned in fp32, returned in its own dtype."""
        a, b = t.float().chunk(2, dim=-1)
        return (t.float() * self.cos + torch.cat([-b, a], dim=-1) * self.sin).type_as(t)

    def queries(self, q):
        q = self.turn(q)
        return q if self.logn is None else q * self.logn.type_as(q)


class Attention(nn.Module):
    """Causal self-attention; q, k and v lie in three blocks of c_attn's output, heads within each."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.num_attention_heads
        self.c_attn = nn.Linear(c.hidden_size, 3 * c.hidden_size)                     # has a bias whatever no_bias says
        self.c_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=not c.no_bias)
        self.lora_slot = Slot()

    def forward(self, x, rotary, allowed, cache):
        B, L, D = x.shape
        qkv = self.lora_slot.beside(x, self.c_attn(x))
        q, k, v = (t.view(B, L, self.heads, -1).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        q, k = rotary.queries(q), rotary.turn(k)                                      # (B, H, L, head)
        attend = causal_attention if cache is None else cache.attend
        return self.c_proj(attend(q, k, v, allowed).transpose(1, 2).reshape(B, L, D))


def causal_attention(q, k, v, allowed):
    """q, k, v (B, H, L, head); allowed (B, 1, L, L) bool, or None for plain causal attention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        inner = c.intermediate_size // 2
        self.w1 = nn.Linear(c.hidden_size, inner, bias=not c.no_bias)
        self.w2 = nn.Linear(c.hidden_size, inner, bias=not c.no_bias)
        self.c_proj = nn.Linear(inner, c.hidden_size, bias=not c.no_bias)

    def forward(self, x):
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1 = RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.attn = Attention(c)
        self.ln_2 = RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.mlp = MLP(c)
        self.attn_slot, self.mlp_slot = Slot(), Slot()

    def forward(self, x, rotary, allowed, cache=None):
        x = x + self.attn_slot(self.attn(self.ln_1(x), rotary, allowed, cache))
        return x + self.mlp_slot(self.mlp(self.ln_2(x)))


def layout(L, mask, branch):
    """Who sees whom, and where each token stands.

    mask (B, L) bool or None, False = padding; branch (B, L) int or None, 0 = prefix.
    Returns place (B or 1, L): how many earlier slots of its own sequence (prefix + own branch, padding counted) a token
    has; and allowed (B, 1, L, L) bool, or None where plain causal attention does.
    """
    device = mask.device if mask is not None else branch.device if branch is not None else None
    if mask is None and branch is None:
        return torch.arange(L)[None], None
    allowed = torch.ones(L, L, dtype=torch.bool, device=device).tril()[None]
    if branch is not None:
        allowed = allowed & ((branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0))
    place = allowed.sum(-1) - 1
    if mask is not None:
        allowed = allowed & mask[:, None, :]
    allowed = allowed | torch.eye(L, dtype=torch.bool, device=device)                 # no empty row, hence no NaN
    return place, allowed[:, None]


def ntk_alphas(place, mask, branch, seq_length):
    """The NTK alpha of every token of packed rows, (B, L): that of the sequence it would stand in without packing.

    A prefix goes with the row's shortest branch; where its branches need different alphas, the prefix's own logits
    mean that branch only.
    """
    alphas = torch.ones(branch.shape, device=branch.device)
    real = torch.ones_like(branch, dtype=torch.bool) if mask is None else mask
    for row, its_branch in enumerate(branch):                                         # (L,)
        lengths = {b: int(place[row, real[row] & (its_branch == b)].max()) + 1
                   for b in its_branch[real[row]].unique().tolist()}
        lengths[0] = min((n for b, n in lengths.items() if b), default=lengths.get(0, 1))
        for b, length in lengths.items():
            alphas[row, its_branch == b] = ntk_alpha(length, seq_length)
    return alphas


class Transformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.wte = nn.Embedding(c.vocab_size, c.hidden_size, _weight=drawn(c.vocab_size, c.hidden_size, std=0.02))
        self.h = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.ln_f = RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.visual = VisionTransformer(c.visual)


class QwenVL(nn.Module):
    """The whole model. `.config`, `.tokenizer` (None when built without a checkpoint) and `.base` (name or folder)."""

    def __init__(self, config, tokenizer=None, base=None):
        super().__init__()
        self.config, self.tokenizer, self.base = config, tokenizer, base
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpointing = False       # True: every block of both towers recomputes its activations when training
        self.fingerprint = None          # of the checkpoint's tensors, so that adapters know their base
        self.loaded = {}                 # name of adapters -> hash of the folder they were loaded from
        self.soft_prompts = Slot()       # by the name of their adapters; the one switched on replaces the prompt's text

    @classmethod
    def from_pretrained(cls, name_or_dir, dtype=None, device="cpu"):
        """A Hub name, or a folder with config.json, safetensors or .bin weights and qwen.tiktoken -> the model.

        In eval mode. dtype None is bfloat16 on a GPU and float32 on the CPU. InputError, in one line, for anything that
        is missing, left over, misshaped, of another architecture, or too large for the device.
        """
        device = weights.usable_device(device)
        dtype = dtype or weights.usual_dtype(device)
        folder = weights.resolve(name_or_dir, weights=False)
        config = Config.from_json(folder / "config.json")
        tokenizer = Tokenizer(folder)
        if tokenizer.image_start_id != config.visual.image_start_id or tokenizer.n_vocab > config.vocab_size:
            raise InputError(f"{folder}: qwen.tiktoken puts <img> at {tokenizer.image_start_id} of {tokenizer.n_vocab} "
                             f"ids, config.json at {config.visual.image_start_id} of {config.vocab_size}; "
                             "they belong to different models")
        with torch.device("meta"):
            model = cls(config, tokenizer, str(name_or_dir))
        weights.check_fits(model, name_or_dir, dtype, device)       # before the weights are fetched, let alone read
        model.fingerprint = weights.fill(model, weights.resolve(name_or_dir), dtype, device)
        return model.eval()

    def image_prompt(self, n_images, text):
        """Token ids (list) of `n_images` image spans followed by a text, in which special tokens are plain text."""
        t, Q = self.tokenizer, self.config.visual.n_queries
        return ([t.image_start_id] + [t.image_pad_id] * Q + [t.image_end_id]) * n_images + t.encode(text)

    def caption_prompt(self, n_images):
        """Token ids (list) of `n_images` image spans and the caption prompt: the slots of the soft prompt where one is
        switched on, else the prompt's text."""
        for name in self.soft_prompts.stack:
            slots = [self.tokenizer.soft_prompt_id] * len(self.soft_prompts[name].vectors)
            return self.image_prompt(n_images, "") + slots
        return self.image_prompt(n_images, CAPTION_PROMPT)

    def embed(self, ids, images):
        """Word vectors (B, L, D) in which the slots of the k-th image span hold the k-th image's vectors, and those of
        the soft prompt, where one is switched on, its vectors."""
        x = self.transformer.wte(ids)
        for name in self.soft_prompts.stack:
            x = self.soft_prompts[name](x, ids == self.tokenizer.soft_prompt_id)
        start, Q, L = self.config.visual.image_start_id, self.config.visual.n_queries, ids.shape[1]
        row, column = (ids == start).nonzero(as_tuple=True)                           # in order of row, then position
        n_images = 0 if images is None else len(images)
        if len(row) != n_images:
            raise ValueError(f"ids hold {len(row)} image spans, but {n_images} images were given")
        if n_images == 0:
            return x
        S, patch = images.shape[-1], self.config.visual.patch_size
        if images.shape[1:] != (3, S, S) or S % patch or not images.is_floating_point():
            raise ValueError(f"images must be (N, 3, S, S) normalised, S a multiple of {patch}; got "
                             f"{tuple(images.shape)} {images.dtype}")
        if int(column.max()) + Q + 1 >= L or bool((ids[row, column + Q + 1] != start + 1).any()):
            raise ValueError(f"an image span must be <img>, {Q} slots and </img>")
        vectors = self.transformer.visual(images.to(x.device), self.checkpointing)    # (N, Q, D)
        slots = column[:, None] + 1 + torch.arange(Q, device=ids.device)
        return x.index_put((row[:, None], slots), vectors.to(x.dtype))

    def forward(self, ids, images=None, mask=None, branch=None, positions=None, cache=None, targets=None):
        """Logits (B, L, vocab), or at `positions` only; with `targets` log-probabilities instead.

        ids (B, L) int64, image spans as `image_prompt` makes them; images (N, 3, S, S) in the order of the spans;
        mask (B, L) bool, False = padding; branch (B, L) int, 0 = prefix and k = k-th continuation of it;
        positions: bool (B, L) -> (M, vocab), or int (K,) or (B, K) -> (B, K, vocab); cache: a generate.Cache;
        targets, one for each position -> float32 of their shape: the log-probability of each after its position.
        Dynamic NTK and logn act in eval mode only, by each sequence's logical length, as in the original code.
        """
        config, alphas = self.config, None
        mask, branch = (t if t is None else t.to(ids.device) for t in (mask, branch))
        if ids.ndim != 2 or ids.shape[1] == 0 or any(t is not None and t.shape != ids.shape for t in (mask, branch)):
            raise ValueError(f"ids, mask and branch must all be (B, L) with L ≥ 1; ids are {tuple(ids.shape)}")
        if cache is not None and cache.filled:                                        # one new token per sequence
            assert ids.shape[1] == 1 and images is None, "a filled cache takes one new token per sequence"
            x, place, allowed, alpha = self.transformer.wte(ids), cache.place(ids), None, cache.alpha
        else:
            x = self.embed(ids, images)
            mask = None if mask is None or bool(mask.all()) else mask.bool()
            place, allowed = layout(ids.shape[1], mask, branch)
            alpha = 1
            if config.use_dynamic_ntk and not self.training:
                if branch is None:
                    alpha = ntk_alpha(ids.shape[1], config.seq_length)                # slots, padding counted
                elif int(place.max()) >= config.seq_length:
                    alphas = ntk_alphas(place, mask, branch, config.seq_length)
            if cache is not None:
                cache.start(mask, alpha, ids.shape[1])
        place = place.to(ids.device)
        if alphas is None:
            x = self.blocks(x, place, allowed, alpha, cache)
        else:       # packed rows with branches on both sides of seq_length: a pass per alpha, each token from its own
            passes = {a: self.blocks(x, place, allowed, a, None) for a in alphas.unique().tolist()}
            x = sum(torch.where((alphas == a)[..., None], y, torch.zeros_like(y)) for a, y in passes.items())
        if positions is not None:
            x = x[positions] if positions.dtype == torch.bool else x[
                torch.arange(len(x), device=x.device)[:, None], positions.expand(len(x), -1)]
        if targets is None:
            return self.lm_head(x)
        return self.target_logps(x.flatten(0, -2), targets.flatten()).view(targets.shape)

    def target_logps(self, x, targets):
        """log p of targets (M,) after hidden states (M, D); logits exist for LOGITS_AT_ONCE rows at a time only."""
        parts = [call(self.logps_of_chunk, *part, checkpointing=True)
                 for part in zip(x.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE))]
        return torch.cat(parts)

    def logps_of_chunk(self, x, targets):
        return -F.cross_entropy(self.lm_head(x).float(), targets, reduction="none")

    def blocks(self, x, place, allowed, alpha, cache):
        """The language model between embedding and head: (B, L, D) -> (B, L, D)."""
        rotary = Rotary.at(place, alpha, self.config, self.training)
        for i, block in enumerate(self.transformer.h):
            layer = None if cache is None else cache.layers[i]
            x = call(block, x, rotary, allowed, layer, checkpointing=self.checkpointing)
        return self.transformer.ln_f(x)

    def training_bytes(self, trained, world, rows):
        """Bytes that a card will need to train on `rows` sequences of the full context with six views each.

        trained {name: parameter}, its moments sharded over `world` ranks. Weights, gradients and moments; one kept
        activation per block (the others are computed again), and the widest block while it is.
        """
        config, vision = self.config, self.config.visual
        size = self.lm_head.weight.element_size()
        weights = sum(t.numel() * t.element_size() for t in self.state_dict().values())
        learning = sum(p.numel() for p in trained.values()) * (4 + 8 / world)
        patches = rows * 6 * (vision.image_size // vision.patch_size) ** 2
        tokens = rows * config.seq_length
        kept = patches * vision.width * vision.layers + tokens * config.hidden_size * config.num_hidden_layers
        widest = max(patches * vision.width * (4 + 2 * vision.mlp_ratio) * 2,
                     tokens * (8 * config.hidden_size + 3 * config.intermediate_size)) * size
        logits = 3 * LOGITS_AT_ONCE * config.vocab_size * 4
        return int(weights + learning + kept * size + widest + logits)
