"""Where adapters find a place in a model of transformers: its blocks, by their structure."""
from torch import nn

from plumbing.errors import InputError

# The names of the two children by which a block is known.
ATTENTION = {"self_attn", "attn", "attention", "self_attention", "linear_attn", "conv", "mixer"}
MLP = {"mlp", "feed_forward", "ffn", "block_sparse_moe", "moe"}
QKV = ("q_proj", "k_proj", "v_proj", "qkv", "qkv_proj", "query", "key", "value", "in_proj")


def blocks(tower):
    """The blocks of a tower, in order: [(attention, MLP, width)].

    A block is an element of a ModuleList with exactly one attention and one MLP, or what takes
    their place. Its width is that of its first norm.
    """
    found = []
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    for block in (block for elements in lists for block in elements):
        children = dict(block.named_children())
        pair = [[children[name] for name in children if name in names]
                for names in (ATTENTION, MLP)]
        norms = [child for name, child in children.items() if name not in ATTENTION | MLP]
        widths = [p.shape[0] for norm in norms for p in norm.parameters(recurse=False)
                  if p.ndim == 1]
        if [len(part) for part in pair] == [1, 1] and widths:
            found.append((pair[0][0], pair[1][0], widths[0]))
    return found


def projections(attention):
    """The linear layers of an attention that make queries, keys and values, by name."""
    layers = {name.rsplit(".", 1)[-1]: layer for name, layer in attention.named_modules()
              if isinstance(layer, nn.Linear)}
    return {name: layer for name, layer in layers.items() if name in QKV}


def block_shapes(tower, turned):
    """The shapes of a tower's blocks, for estimates of memory (plumbing/memory.py): of the last.

    turned: queries and keys are turned, and keys and values repeated where there are fewer.
    """
    found = blocks(tower)
    attention, mlp, width = found[-1]
    widths = [layer.out_features for layer in projections(attention).values()] or [3 * width]
    linear = [layer for layer in mlp.modules() if isinstance(layer, nn.Linear)]
    norms = [module for module in tower.modules() if "Norm" in type(module).__name__]
    return {"width": width, "blocks": len(found), "gated": len(linear) > 2,
            "inner": max((layer.out_features for layer in linear), default=4 * width),
            "qkv": sum(widths) + (3 * max(widths) if turned else 0),
            "rms": bool(norms) and not isinstance(norms[0], nn.LayerNorm)}


def patch_numbers(tower):
    """How many numbers of an image become one patch: those that its first layer takes."""
    first = next(module for module in tower.modules()
                 if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d))
    return first.weight[0].numel()


def check_towers(name, hf):
    """InputError where adapters would not find a place in every block of both towers."""
    vision, language = hf.get_encoder(modality="image"), hf.get_decoder()
    n_layers = getattr(hf.config.get_text_config(), "num_hidden_layers", None)
    kind = hf.config.model_type
    if vision in (None, hf, hf.base_model) or not blocks(vision):
        raise InputError(f"{name}: the vision tower of {kind} has no blocks with an attention and "
                         "an MLP, behind which adapters stand")
    if len(blocks(language)) != n_layers:
        raise InputError(f"{name}: of the {n_layers} blocks of {kind}'s language model, "
                         f"{len(blocks(language))} have one attention and one MLP; adapters need "
                         "all")
