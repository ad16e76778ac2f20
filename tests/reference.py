"""Qwen-VL's forward in float64, slow and plain: written from notes on the official code, sharing
nothing with model.py. Weights are a dict under the official names; the config is the dict of
config.json.

Letters: B rows, L tokens of a row, C width, N images, P patches of an image, Q queries of the
resampler."""

import math

import torch
import torch.nn.functional as F


def grid_table(table, cells):
    """The (n, C) table of a square grid, stretched to a grid of that many cells by bicubic
    interpolation."""
    n, width = table.shape
    if n == cells:
        return table
    side, new_side = math.isqrt(n), math.isqrt(cells)
    planes = table.reshape(side, side, width).permute(2, 0, 1)[None]
    planes = F.interpolate(planes, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return planes[0].permute(1, 2, 0).reshape(cells, width)


def layer_norm(x, weights, name):
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + 1e-6).sqrt() * weights[name + ".weight"] + weights[name + ".bias"]


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def linear(x, weights, name):
    """x through the Linear of that name; its bias is added where the checkpoint has one."""
    y = x @ weights[name + ".weight"].T
    return y + weights[name + ".bias"] if name + ".bias" in weights else y


def attend(q, k, v, visible=None):
    """One head: q (q, d), k and v (k, d); visible (q, k) bool. A query that sees nothing gets
    zeros."""
    scores = q @ k.T / math.sqrt(q.shape[-1])
    if visible is None:
        return scores.softmax(-1) @ v
    out = torch.zeros(q.shape[0], v.shape[1], dtype=v.dtype)
    for i in range(q.shape[0]):
        keys = visible[i].nonzero()[:, 0]
        if len(keys):
            out[i] = scores[i, keys].softmax(-1) @ v[keys]
    return out


def patches_of(image, weights):
    """One image (3, S, S) to its patches (P, C), row by row."""
    kernel = weights["transformer.visual.conv1.weight"]
    size = kernel.shape[-1]
    flat_kernel = kernel.reshape(kernel.shape[0], -1)
    rows = []
    for top in range(0, image.shape[1], size):
        for left in range(0, image.shape[2], size):
            rows.append(flat_kernel @ image[:, top : top + size, left : left + size].reshape(-1))
    return torch.stack(rows)


def vision_block(x, weights, name, heads):
    y = linear(layer_norm(x, weights, name + ".ln_1"), weights, name + ".attn.in_proj")
    d = x.shape[-1] // heads
    outs = []
    for head in range(heads):  # in_proj's output is laid out head by head: q, k and v of each
        q, k, v = y[:, head * 3 * d : (head + 1) * 3 * d].split(d, dim=-1)
        outs.append(attend(q, k, v))
    x = x + linear(torch.cat(outs, -1), weights, name + ".attn.out_proj")
    y = linear(layer_norm(x, weights, name + ".ln_2"), weights, name + ".mlp.c_fc")
    y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    return x + linear(y, weights, name + ".mlp.c_proj")


def resample(x, weights):
    """The patches (P, C) to (Q, hidden): one cross-attention, positions on the queries and the keys
    only."""
    name = "transformer.visual.attn_pool"
    kv = x
    if name + ".kv_proj.weight" in weights:
        kv = x @ weights[name + ".kv_proj.weight"].T
    kv = layer_norm(kv, weights, name + ".ln_kv")
    positions = weights[name + ".pos_embed"]
    q_in = layer_norm(weights[name + ".query"], weights, name + ".ln_q") + positions
    k_in = kv + grid_table(positions, len(kv))
    c = kv.shape[-1]
    wq, wk, wv = weights[name + ".attn.in_proj_weight"].split(c)
    bq, bk, bv = weights[name + ".attn.in_proj_bias"].split(c)
    q, k, v = q_in @ wq.T + bq, k_in @ wk.T + bk, kv @ wv.T + bv
    outs = [
        attend(q[:, i : i + 128], k[:, i : i + 128], v[:, i : i + 128]) for i in range(0, c, 128)
    ]
    return linear(torch.cat(outs, -1), weights, name + ".attn.out_proj")


def encode_image(image, weights, config):
    """One image (3, S, S) to its embeddings, with what comes before them: vit_out (P, C),
    resampler_out (Q, hidden), image_embeds (Q, hidden)."""
    name = "transformer.visual"
    x = patches_of(image, weights)
    x = x + grid_table(weights[name + ".positional_embedding"], len(x))
    x = layer_norm(x, weights, name + ".ln_pre")
    for i in range(config["visual"]["layers"]):
        x = vision_block(x, weights, f"{name}.transformer.resblocks.{i}", config["visual"]["heads"])
    pooled = resample(x, weights)
    return x, pooled, layer_norm(pooled, weights, name + ".ln_post") @ weights[name + ".proj"]


def ntk_alpha(config, length, training=False):
    """The dynamic NTK factor of a prefill of that many slots, pads included."""
    if training or not config["use_dynamic_ntk"]:
        return 1.0
    return max(2.0 ** math.ceil(math.log2(length / config["seq_length"]) + 1) - 1, 1.0)


def rotate(x, base):
    """The half-split rotation of one head (L, d); the slot is the position."""
    d = x.shape[-1]
    out = torch.empty_like(x)
    for i in range(d // 2):
        angle = torch.arange(len(x), dtype=torch.float64) / base ** (2 * i / d)
        a, b = x[:, i], x[:, i + d // 2]
        out[:, i] = a * angle.cos() - b * angle.sin()
        out[:, i + d // 2] = b * angle.cos() + a * angle.sin()
    return out


def language_block(x, weights, name, config, visible, alpha, logn):
    """One row x (L, C) through one block."""
    eps, d, length = config["layer_norm_epsilon"], config["kv_channels"], len(x)
    base = config["rotary_emb_base"] * alpha ** (d / (d - 2))
    y = linear(rms_norm(x, weights[name + ".ln_1.weight"], eps), weights, name + ".attn.c_attn")
    q, k, v = y.chunk(3, dim=-1)
    outs = []
    for left in range(0, q.shape[-1], d):
        q_head, k_head = rotate(q[:, left : left + d], base), rotate(k[:, left : left + d], base)
        if logn:
            scale = [max(math.log(p + 1, config["seq_length"]), 1.0) for p in range(length)]
            q_head = q_head * torch.tensor(scale, dtype=torch.float64)[:, None]
        outs.append(attend(q_head, k_head, v[:, left : left + d], visible))
    x = x + linear(torch.cat(outs, -1), weights, name + ".attn.c_proj")
    y = rms_norm(x, weights[name + ".ln_2.weight"], eps)
    gate = linear(y, weights, name + ".mlp.w2")
    y = linear(y, weights, name + ".mlp.w1") * gate / (1 + torch.exp(-gate))
    return x + linear(y, weights, name + ".mlp.c_proj")


@torch.no_grad()
def forward(
    weights, config, ids, images=None, mask=None, training=False, alpha=None, prompt_length=None
):
    """Everything from ids (B, L) and images (N, 3, S, S) to the logits (B, L, vocab), in float64.

    mask (B, L) is 1 at real tokens; logits at the others mean nothing. alpha overrides the NTK
    factor; spans are looked for in the first prompt_length slots only (all, when None)."""
    weights = {name: w.detach().double() for name, w in weights.items()}
    n_rows, length = ids.shape
    mask = torch.ones(n_rows, length, dtype=torch.bool) if mask is None else mask.bool()
    out = {"vit_out": None, "resampler_out": None, "image_embeds": None}
    hidden = weights["transformer.wte.weight"][ids]
    if images is not None:
        encoded = [encode_image(image.double(), weights, config) for image in images]
        out["vit_out"], out["resampler_out"], out["image_embeds"] = (
            torch.stack(parts) for parts in zip(*encoded)
        )
        n_spans = 0
        for row in range(n_rows):
            for slot in range(length if prompt_length is None else prompt_length):
                if ids[row, slot] == config["visual"]["image_start_id"]:
                    embeds = out["image_embeds"][n_spans]
                    hidden[row, slot + 1 : slot + 1 + len(embeds)] = embeds
                    n_spans += 1
        assert n_spans == len(images), f"{n_spans} spans, {len(images)} images"
    out["hidden_spliced"] = hidden.clone()
    if alpha is None:
        alpha = ntk_alpha(config, length, training)
    logn = config["use_logn_attn"] and not training
    causal = torch.ones(length, length).tril().bool()
    logits = []
    for row in range(n_rows):
        x = hidden[row]
        for i in range(config["num_hidden_layers"]):
            x = language_block(
                x, weights, f"transformer.h.{i}", config, causal & mask[row], alpha, logn
            )
        x = rms_norm(x, weights["transformer.ln_f.weight"], config["layer_norm_epsilon"])
        logits.append(x @ weights["lm_head.weight"].T)
    out["logits"], out["alpha"] = torch.stack(logits), alpha
    return out


def greedy(weights, config, ids, images, mask, steps):
    """The ids (B, steps) that the official cached greedy decoding picks, and the logits (B, steps,
    vocab) that they are picked from. Everything is recomputed at each step, with the NTK factor of
    the prompt's length."""
    mask = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
    length = ids.shape[1]
    alpha = ntk_alpha(config, length)
    step_logits = []
    for _ in range(steps):
        logits = forward(weights, config, ids, images, mask, alpha=alpha, prompt_length=length)[
            "logits"
        ][:, -1]
        step_logits.append(logits)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids[:, length:], torch.stack(step_logits, 1)
