"""config.json: what defines the network, read from a checkpoint, and every number in it checked."""
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from loading import InputError


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
        raw = read_config(path)

        def known(part, kind):
            return {k: v for k, v in part.items() if k in kind.__dataclass_fields__}
        return cls(**{**known(raw, cls), "visual": VisionConfig(**known(raw["visual"], VisionConfig))})


def read_config(path):
    """A checkpoint's config.json as a dict. InputError for another architecture, or one this code does not compute."""
    wants = "this code runs Qwen/Qwen-VL (the 2023 float model, or a folder in its layout)"
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a model configuration ({error}); {wants}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: is not a JSON object; {wants}")
    kind = raw.get("model_type", "qwen")
    if kind != "qwen" or not isinstance(raw.get("visual"), dict):
        names = raw.get("architectures")
        name = names[0] if isinstance(names, list) and names else kind
        lacks = " without a vision tower" if kind == "qwen" else ""
        raise InputError(f"{path}: is a {' '.join(str(name).split())} model{lacks}; {wants}")
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method", "quantized") if isinstance(quantised, dict) else quantised
        raise InputError(f"{path}: is an Int4/{str(method).upper()} checkpoint; {wants}")
    for key, value in (("rotary_pct", 1.0), ("tie_word_embeddings", False), ("scale_attn_weights", True)):
        if raw.get(key, value) != value:
            raise InputError(f"{path}: {key} is {raw[key]}, only {value} is supported; {wants}")
    return raw
