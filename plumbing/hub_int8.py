"""int8 weights of a transformers model, made by its own loader as it reads tensor after tensor.

This is transformers' way to add a quantisation: a configuration and a quantizer, registered under
a name. The layers and their numbers are those of plumbing/int8.py.
"""
import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from plumbing import int8

METHOD = "int8_per_channel"


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """dtype: of the scales. marks: {name of a weight: what `mark` says of its own numbers}, filled
    while weights are read."""

    def __init__(self, dtype, **_):
        self.quant_method, self.dtype, self.marks = METHOD, dtype, {}

    def to_dict(self):
        return {"quant_method": METHOD}


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """What transformers asks of a way to quantise."""
    is_trainable = False

    def is_serializable(self):
        return False

    def _process_model_before_weight_loading(self, model, **kwargs):
        int8.replace(model, [model.get_input_embeddings(), model.get_output_embeddings()])

    def param_needs_quantization(self, model, param_name, **kwargs):
        layer, _, last = param_name.rpartition(".")
        return last == "weight" and layer in int8.layers(model)

    def get_quantize_ops(self):
        return Quantise(self.quantization_config)

    def _process_model_after_weight_loading(self, model, **kwargs):
        scales = {layer.weight: layer.scale for layer in int8.layers(model).values()
                  if layer.scale.device.type != "meta"}
        for layer in int8.layers(model).values():           # tied weights, not their scales, are
            layer.scale = scales[layer.weight]              # tied by transformers
        self.remove_quantization_config(model)


class Quantise(ConversionOps):
    """A weight as it was read, or several that were stored as one -> int8 numbers and scales."""

    def __init__(self, config):
        self.config = config

    def convert(self, input_dict, model=None, full_layer_name=None, missing_keys=None, **kwargs):
        quantised, tensors = int8.layers(model), {}
        for name, value in input_dict.items():
            name = full_layer_name if len(input_dict) == 1 else name
            tensor = value[0] if isinstance(value, list) else value
            layer = quantised.get(name.removesuffix(".weight"))
            if layer is None or not name.endswith(".weight"):
                tensors[name] = tensor
                continue
            self.config.marks[name] = mark(tensor)
            scale_of = f"{name.removesuffix('weight')}scale"
            tensors[name], tensors[scale_of] = int8.quantised(name, tensor, self.config.dtype)
            missing_keys -= {f"{other}.scale" for other, sharing in quantised.items()
                             if sharing.weight is layer.weight}
        return tensors


def mark(tensor):
    """What the fingerprint of a model knows of a tensor: its shape and first numbers."""
    return f"{tuple(tensor.shape)} {tensor.flatten()[:256].to(torch.bfloat16).tolist()}"
