"""Qwen-VL (9.6 B parameters, 2023, https://arxiv.org/abs/2308.12966) in plain PyTorch.

A ViT turns an image into patches, and a one-layer resampler turns the patches into Q vectors. These
replace the embeddings between `<img>` and `</img>` in a text, which a decoder-only language model
reads. Modules are named as in the released checkpoint, so that its state dict fits as it is.

    model = QwenVL.from_pretrained("Qwen/Qwen-VL")      # or a folder in its layout: assets/toy
    logits = model(ids, images)                         # (B, L, vocab)

One image, many continuations: with `branch`, one sequence holds a prefix (0) and continuations of
it (1, 2, ...) that do not see each other: see `layout`. Six views are 1548 tokens and a caption is
a few dozen, so ViT and prefix run once for all the captions of an image.

Letters for shapes, here and in all other files: B batch, N images, V views of an image, S image
side in pixels, P patches, Q queries of the resampler, L tokens, K positions picked from them, D
width, H heads, R bottleneck of an adapter.
"""
import math
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from chunking import normalise, square
from plumbing import int8, memory, weights
from plumbing.cache import Cache, causal_attention
from plumbing.parts import LOGITS_AT_ONCE, Adaptable, Slot, call, log_probabilities, moved
from plumbing.positions import batch_alpha, layout, resize_table, sincos_table
from plumbing.tokenizer import Tokenizer

CAPTION_PROMPT = "Generate the caption in English:"     # Qwen-VL's own, for captions without boxes
BLOCKS_AT_ONCE = 3      # of the ViT, recomputed together: 48 / 3 inputs and 3 blocks are the least


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
    """What the network takes from config.json; the defaults are Qwen-VL's."""
    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128                # width of a head
    intermediate_size: int = 22016        # twice the MLP's width: w1 and w2 share it
    seq_length: int = 2048                # the trained context; beyond it NTK and logn act
    layer_norm_epsilon: float = 1e-6
    rotary_emb_base: float = 10000.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True                  # of all linear layers but c_attn
    visual: VisionConfig = field(default_factory=VisionConfig)

    def __post_init__(self):
        weights.check_rules(self)

    @classmethod
    def from_json(cls, path):
        """Read a checkpoint's config.json. InputError where this code cannot run that model."""
        return weights.checked_config(cls, weights.read_config(path))


# ---------------------------------------------------------------- both towers
class Block(nn.Module):
    """A pre-norm residual block. Adapters change what attention and MLP add to x, not x itself."""

    def __init__(self, ln_1, attn, ln_2, mlp):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = ln_1, attn, ln_2, mlp
        self.attn_slot, self.mlp_slot = Slot(), Slot()

    def forward(self, x, *context):
        y = self.attn(self.ln_1(x), *context)
        for adapter in self.attn_slot.active():
            y = adapter(y)
        x = x + y
        y = self.mlp(self.ln_2(x))
        for adapter in self.mlp_slot.active():
            y = adapter(y)
        return x + y


def random_parameter(*shape, std):
    """For training from scratch (normal_ would cost seconds of imports on the meta device)."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=std))


# ---------------------------------------------------------------- vision tower
class VisionAttention(nn.Module):
    """Full attention. In in_proj's output q, k and v are adjacent within each head."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.lora_slot = Slot()

    def forward(self, x):
        N, P, D = x.shape
        qkv = self.in_proj(x)                                                 # (N, P, 3 D)
        for lora in self.lora_slot.active():
            qkv = qkv + lora(x)
        qkv = qkv.view(N, P, self.heads, -1).transpose(1, 2)                  # (N, H, P, 3 D/H)
        y = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))             # (N, H, P, D/H)
        return self.out_proj(y.transpose(1, 2).reshape(N, P, D))


def vision_block(c):
    inner = int(c.width * c.mlp_ratio)
    ln_1, ln_2 = (nn.LayerNorm(c.width, eps=1e-6) for _ in range(2))
    attn = VisionAttention(c.width, c.heads)
    mlp = nn.Sequential(OrderedDict(
        c_fc=nn.Linear(c.width, inner), gelu=nn.GELU(), c_proj=nn.Linear(inner, c.width)))
    return Block(ln_1, attn, ln_2, mlp)


class CrossAttention(nn.Module):
    """Queries (Q, D) shared by all images, keys and values (N, P, D) -> (N, Q, D).

    nn.MultiheadAttention's tensors, not its code, which rounds differently once frozen."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query, key, value):
        N, _, D = key.shape
        parts = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (F.linear(*part) for part in parts)
        q = q.view(1, -1, self.heads, D // self.heads).transpose(1, 2)        # (1, H, Q, D/H)
        k, v = (t.view(N, -1, self.heads, D // self.heads).transpose(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q.expand(N, -1, -1, -1), k, v)     # (N, H, Q, D/H)
        return self.out_proj(y.transpose(1, 2).reshape(N, -1, D))


class Resampler(nn.Module):
    """One cross-attention from Q learned queries to the P patches: (N, P, width) -> (N, Q, D)."""

    def __init__(self, c):
        super().__init__()
        D = c.output_dim
        self.query = random_parameter(c.n_queries, D, std=0.02)
        self.register_buffer("pos_embed", sincos_table(math.isqrt(c.n_queries), D))
        self.kv_proj = nn.Linear(c.width, D, bias=False) if c.width != D else nn.Identity()
        self.attn = CrossAttention(D, D // 128)
        self.ln_q = nn.LayerNorm(D, eps=1e-6)
        self.ln_kv = nn.LayerNorm(D, eps=1e-6)

    def forward(self, x):
        value = self.ln_kv(self.kv_proj(x))                                   # (N, P, D)
        key = value + resize_table(self.pos_embed, x.shape[1])                # values get no place
        return self.attn(self.ln_q(self.query) + self.pos_embed, key, value)  # (N, Q, D)


class VisionTransformer(nn.Module):
    """Images (N, 3, S, S), normalised -> (N, Q, D) vectors for the language model."""

    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv2d(3, c.width, c.patch_size, stride=c.patch_size, bias=False)
        # the table is for 224 px (16 × 16 patches) in every configuration, and resized in forward
        self.positional_embedding = random_parameter(256, c.width, std=c.width ** -0.5)
        self.ln_pre = nn.LayerNorm(c.width, eps=1e-6)
        blocks = nn.ModuleList(vision_block(c) for _ in range(c.layers))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.attn_pool = Resampler(c)
        self.ln_post = nn.LayerNorm(c.output_dim, eps=1e-6)
        self.proj = random_parameter(c.output_dim, c.output_dim, std=c.output_dim ** -0.5)

    def forward(self, images, checkpointing=False):
        x = self.conv1(images.to(self.conv1.weight.dtype))                # (N, width, S/14, S/14)
        x = x.flatten(2).transpose(1, 2)                                      # (N, P, width)
        x = self.ln_pre(x + resize_table(self.positional_embedding, x.shape[1]))
        blocks = list(self.transformer["resblocks"])
        for k in range(0, len(blocks), BLOCKS_AT_ONCE):
            some = nn.Sequential(*blocks[k:k + BLOCKS_AT_ONCE])
            x = call(some, x, checkpointing=checkpointing)                    # (N, P, width)
        x = call(self.attn_pool, x, checkpointing=checkpointing)              # (N, Q, D)
        return self.ln_post(x) @ self.proj


# ---------------------------------------------------------------- language model
class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        # in fp32, cast, then scaled: the official order
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class Rotary:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864, eq. 34) and logn scaling.

    The angle of pair i of a head of width d at logical position m is m · b^(-2i/d). NTK-aware
    interpolation makes the base b rotary_emb_base · alpha^(d/(d-2)), alpha as in batch_alpha. From
    seq_length on, logn multiplies queries by log(m+1) / log(seq_length), so that attention over
    more keys stays as sharp. Both are in Qwen's report, https://arxiv.org/abs/2309.16609.
    """

    def __init__(self, place, alpha, config, training):
        """place (B or 1, L) int: the logical position of each token."""
        d = config.kv_channels
        base = config.rotary_emb_base * alpha ** (d / (d - 2))
        # exactly these operations: any other rounding shows in the fp32 angles of far tokens
        exponents = torch.arange(0, d, 2, device=place.device, dtype=torch.float32) / d
        inv_freq = 1.0 / base ** exponents                                    # (d/2,)
        angles = place[:, None, :, None].float() * inv_freq                   # (B or 1, 1, L, d/2)
        angles = torch.cat([angles, angles], dim=-1)      # pairs (i, i + d/2), not (2i, 2i + 1)
        self.cos, self.sin, self.logn = angles.cos(), angles.sin(), None
        if config.use_logn_attn and not training:
            n = (place[:, None, :, None] + 1).double()
            self.logn = (n.log() / math.log(config.seq_length)).clamp(min=1.0).float()

    def turn(self, t):
        """t (B, H, L, d), rotated in fp32, returned in its own dtype."""
        a, b = t.float().chunk(2, dim=-1)
        return (t.float() * self.cos + torch.cat([-b, a], dim=-1) * self.sin).type_as(t)


class Attention(nn.Module):
    """Causal self-attention. c_attn's output is three blocks, q, k and v, each of H heads."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.num_attention_heads
        self.c_attn = nn.Linear(c.hidden_size, 3 * c.hidden_size)             # biased in any case
        self.c_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=not c.no_bias)
        self.lora_slot = Slot()

    def forward(self, x, rotary, allowed, cache=None):
        B, L, D = x.shape
        qkv = self.c_attn(x)                                                  # (B, L, 3 D)
        for lora in self.lora_slot.active():
            qkv = qkv + lora(x)
        q, k, v = (t.view(B, L, self.heads, -1).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        q, k = rotary.turn(q), rotary.turn(k)                                 # (B, H, L, D/H)
        if rotary.logn is not None:
            q = q * rotary.logn.type_as(q)
        attend = causal_attention if cache is None else cache.attend
        y = attend(q, k, v, allowed)                                          # (B, H, L, D/H)
        return self.c_proj(y.transpose(1, 2).reshape(B, L, D))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        inner = c.intermediate_size // 2
        self.w1 = nn.Linear(c.hidden_size, inner, bias=not c.no_bias)
        self.w2 = nn.Linear(c.hidden_size, inner, bias=not c.no_bias)
        self.c_proj = nn.Linear(inner, c.hidden_size, bias=not c.no_bias)

    def forward(self, x):
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


def language_block(c):
    ln_1, ln_2 = (RMSNorm(c.hidden_size, c.layer_norm_epsilon) for _ in range(2))
    return Block(ln_1, Attention(c), ln_2, MLP(c))


# ---------------------------------------------------------------- the whole model
class QwenVL(Adaptable):
    """A base as base.py describes it; tokenizer and base are None without a checkpoint."""
    question_form, packs = "{} Answer:", True

    def __init__(self, config, tokenizer=None, base=None):
        super().__init__()
        c = self.config = config
        vectors = random_parameter(c.vocab_size, c.hidden_size, std=0.02)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.hidden_size, _weight=vectors),
            h=nn.ModuleList(language_block(c) for _ in range(c.num_hidden_layers)),
            ln_f=RMSNorm(c.hidden_size, c.layer_norm_epsilon),
            visual=VisionTransformer(c.visual)))
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.checkpointing = False       # recompute the blocks of both towers in backward
        self.start(base, tokenizer, CAPTION_PROMPT)

    @classmethod
    def from_pretrained(cls, name_or_dir, dtype=None, device="cpu", weights_too=True,
                        quantize=None):
        """Hub name, or folder in the released layout -> a model in eval mode: base.open_base."""
        device = weights.usable_device(device)
        dtype = dtype or weights.usual_dtype(device)
        folder = weights.resolve(name_or_dir, weights=False)
        config, tokenizer = Config.from_json(folder / "config.json"), Tokenizer(folder)
        weights.check_vocabulary(folder, tokenizer, config)
        with torch.device("meta"):
            model = cls(config, tokenizer, str(name_or_dir))
        if not weights_too:
            return model.eval()
        if quantize:
            int8.replace(model, [model.transformer.wte, model.lm_head])
        weights.check_fits(model, name_or_dir, dtype, device)     # before the weights are fetched
        model.fingerprint = weights.fill(model, weights.resolve(name_or_dir), dtype, device)
        return model.eval()

    # ---- prompts and images
    def look(self, pictures):
        """PIL images, the views of one image -> (V, 3, S, S), normalised."""
        return torch.stack([normalise(square(view, self.image_size)) for view in pictures])

    def head(self, images):
        """Token ids (list) of the image spans of a row; images: from `look`, or how many."""
        n = images if isinstance(images, int) else len(images)
        t, Q = self.tokenizer, self.config.visual.n_queries
        return ([t.image_start_id] + [t.image_pad_id] * Q + [t.image_end_id]) * n

    def request(self, text):
        """Token ids (list) of what a user asks, in which special tokens are plain text."""
        return self.tokenizer.encode(text)

    def answer(self, text):
        """Token ids (list) of what the model writes. Its first token carries the leading space."""
        return self.tokenizer.encode(text if text.startswith(" ") else " " + text)

    @property
    def soft_prompt_id(self):
        return self.tokenizer.soft_prompt_id

    # ---- what adapters.py and generate.py ask for
    def places(self, tower, kind="adapter"):
        """[(slot, width in, width out)]: after attention and MLP of each block, or at q, k, v."""
        blocks, D = self.transformer.h, self.config.hidden_size
        if tower == "vision":
            blocks, D = self.transformer.visual.transformer["resblocks"], self.config.visual.width
        if kind == "lora":
            return [(block.attn.lora_slot, D, 3 * D) for block in blocks]
        return [(slot, D, D) for block in blocks for slot in (block.attn_slot, block.mlp_slot)]

    def embed_text(self, text):
        """A text's embeddings (n, D), from which a soft prompt starts."""
        return self.transformer.wte(torch.tensor(self.request(text), device=self.device))

    def cache(self, samples, room):
        """For forward: keys and values of `samples` continuations of a prefix, of up to `room`."""
        return Cache(len(self.transformer.h), samples, room)

    @property
    def output_layer(self):
        return self.lm_head

    @property
    def seq_length(self):
        return self.config.seq_length

    @property
    def image_size(self):
        return self.config.visual.image_size

    @property
    def cache_bytes(self):
        return 2 * self.config.num_hidden_layers * self.config.hidden_size * self.dtype.itemsize

    def training_bytes(self, trained, world, rows, length=None, views=6):
        """As base.py; without a length, rows are as long as the context."""
        return memory.of_qwen_vl(self, trained, world, rows, length or self.seq_length, views,
                                 BLOCKS_AT_ONCE, LOGITS_AT_ONCE)

    def save(self, folder):
        """Write a folder as from_pretrained reads it."""
        weights.write_base(self, folder, weights.resolve(self.base) / "qwen.tiktoken")

    # ---- forward
    def embed(self, ids, images):
        """Embeddings (B, L, D) of ids (B, L), with image vectors and soft prompt in their slots."""
        x = self.transformer.wte(moved(ids, self.device))
        for soft_prompt in self.soft_prompts.active():
            x = soft_prompt(x, ids == self.tokenizer.soft_prompt_id)
        Q, start = self.config.visual.n_queries, self.config.visual.image_start_id
        row, column = (ids == start).nonzero(as_tuple=True)       # in order of row, then position
        n_images = 0 if images is None else len(images)
        if len(row) != n_images:
            raise ValueError(f"ids hold {len(row)} image spans, but {n_images} images were given")
        if n_images == 0:
            return x
        S, patch = images.shape[-1], self.config.visual.patch_size
        if images.shape[1:] != (3, S, S) or S % patch or not images.is_floating_point():
            raise ValueError(f"images must be (N, 3, S, S) normalised, S a multiple of {patch}; "
                             f"got {tuple(images.shape)} {images.dtype}")
        end = column + Q + 1
        if int(end.max()) >= ids.shape[1] or bool((ids[row, end] != start + 1).any()):
            raise ValueError(f"an image span must be <img>, {Q} slots and </img>")
        vectors = self.transformer.visual(moved(images, x.device), self.checkpointing)
        slots = column[:, None] + 1 + torch.arange(Q, device=ids.device)              # (N, Q)
        slots = moved(row[:, None], x.device), moved(slots, x.device)
        return x.index_put(slots, vectors.to(x.dtype))

    def forward(self, ids, images=None, mask=None, branch=None, positions=None, logp_of=None,
                cache=None):
        """Logits (B, L, vocab), or (B, K, vocab) at `positions`; with `logp_of` log-probs (B, K).

        ids (B, L) int64, image spans as in `head`; images (N, 3, S, S), normalised, in the
        order of the spans; mask (B, L) bool, False = padding; branch (B, L) int, 0 = prefix, k =
        its k-th continuation; positions int64, (K,) or (B, K); cache: from `cache`.
        logp_of (B, K) int64: the log-probability of each of these tokens after its position, in
        float32. -100 is padding, at any valid position: it costs no logits and gives 0.
        Dynamic NTK and logn act in eval mode only, by the logical length of each sequence.
        """
        shapes = {tuple(t.shape) for t in (ids, mask, branch) if t is not None}
        if ids.ndim != 2 or ids.shape[1] == 0 or len(shapes) > 1:
            raise ValueError(f"ids, mask and branch must all be (B, L) with L ≥ 1, not {shapes}")
        if cache is not None and cache.filled:                    # one new token per sequence
            assert ids.shape[1] == 1 and images is None, "a filled cache takes one token per row"
            x, alpha = self.transformer.wte(ids), cache.alpha
            place, allowed = cache.turn()
        else:
            x = self.embed(ids, images)                                       # (B, L, D)
            mask = None if mask is None or bool(mask.all()) else mask.bool()
            ids, mask, branch, positions = (
                moved(t, x.device) for t in (ids, mask, branch, positions))
            place, allowed = layout(ids, mask, branch)
            extends = self.config.use_dynamic_ntk and not self.training
            alpha = batch_alpha(place, mask, branch, self.config.seq_length) if extends else 1
            if cache is not None:
                cache.start(mask, alpha, ids)
        rotary = Rotary(place, alpha, self.config, self.training)
        for i, block in enumerate(self.transformer.h):
            layer = None if cache is None else cache.layers[i]
            x = call(block, x, rotary, allowed, layer, checkpointing=self.checkpointing)
        if positions is not None:
            row = torch.arange(len(x), device=x.device)[:, None]
            x = x[row, positions.expand(len(x), -1)]                          # (B, K, D)
        x = self.transformer.ln_f(x)
        if logp_of is None:
            return self.lm_head(x)                                            # (B, L or K, vocab)
        return log_probabilities(self.lm_head, x, logp_of)                    # (B, K)
