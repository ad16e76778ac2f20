"""Models and processors of transformers, from a folder or the Hub: opened or refused in one line.

Nothing is downloaded before it is known that the model is one that runs here and fits the memory,
and no code of a checkpoint's own is ever run.
"""
import contextlib
import hashlib
import re

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from plumbing import int8
from plumbing.errors import InputError

REMOTE = re.compile("trust_remote_code|remote code|custom code")
INT8 = "int8_per_channel"       # its name among transformers' ways to quantise
PACKAGE = re.compile(r"requires the (\w[\w.-]*) library|No module named '([\w.]+)'|"
                     r"`?(?:pip3? install|install) ([\w.-]+)")

transformers.utils.logging.set_verbosity_error()        # what matters is checked here, and said
transformers.utils.logging.disable_progress_bar()


def one_line(error):
    """The first line of an error's text, short; its class where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


def read_config(name):
    """A base's configuration. InputError for one that is no image-text model of transformers."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:          # transformers and the Hub client share no error class
        if REMOTE.search(str(error)):
            raise InputError(f"{name}: needs code of its own, which is never run here; give a base "
                             "that transformers knows") from None
        if found := re.search(r"model type `([^`]+)`", str(error)):
            raise InputError(f"{name}: is a {found[1]} model, which transformers "
                             f"{transformers.__version__} does not know; a newer one "
                             "may") from None
        raise InputError(f"{name}: its configuration cannot be read ({one_line(error)})") from None
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise InputError(f"{name}: is a {config.model_type} model and no vision-language model; "
                         "give a base that reads images and text, such as "
                         "Qwen/Qwen3-VL-4B-Instruct")
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        if getattr(part, "quantization_config", None):
            raise InputError(f"{name}: is a quantised checkpoint; give the float one, which is "
                             "frozen in --dtype bfloat16 or with --quantize int8")
    return config


def check_package(name, part, error):
    """InputError that names the package whose lack was the error."""
    package = PACKAGE.search(str(error))
    if isinstance(error, ImportError) and package:
        package = next(filter(None, package.groups())).lower()
        raise InputError(f"{name}: its {part} needs the package {package}; pip install "
                         f"{package}") from None


def read_processor(name):
    """A base's processor. InputError where it is missing, or a package that it needs."""
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        check_package(name, "processor", error)
        raise InputError(f"{name}: has no processor that can be read ({one_line(error)}); a base "
                         "needs its tokenizer and preprocessor files") from None
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise InputError(f"{name}: has no processor for images and text, only a "
                         f"{type(processor).__name__}; a base needs preprocessor_config.json and "
                         "its tokenizer's files; some processors need torchvision as well")
    return processor


def on_meta(name, config):
    """The model of a configuration without its numbers, to look at. InputError where transformers
    cannot build it with its usual attention."""
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(
                config, attn_implementation="sdpa", trust_remote_code=False).eval()
    except Exception as error:
        check_package(name, "model", error)
        raise InputError(f"{name}: a {config.model_type} model cannot be built here "
                         f"({one_line(error)})") from None


@contextlib.contextmanager
def understood(name, kind):
    """Inside, any failure of a model that is tried out is an InputError in one line."""
    try:
        yield
    except InputError:
        raise
    except (torch.OutOfMemoryError, MemoryError):
        raise InputError(f"{name}: out of memory while it is tried out; it needs a larger card, or "
                         "--device cpu") from None
    except Exception as error:
        raise InputError(f"{name}: a {kind} model is not understood here ({one_line(error)}); give "
                         "another base") from error


def filled(name, config, dtype, device, quantize=None):
    """The model with its weights, every tensor accounted for, and their fingerprint."""
    how = Int8Config(dtype) if quantize else None
    stored = torch.bfloat16 if dtype == torch.float16 else dtype    # one fingerprint for all dtypes
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            name, config=config, dtype=stored, attn_implementation="sdpa", trust_remote_code=False,
            output_loading_info=True, **({"quantization_config": how} if how else {}))
    except Exception as error:
        raise InputError(f"{name}: its weights cannot be read ({one_line(error)})") from None
    scales = {f"{name}.scale" for name in int8.layers(model)}       # made here: none is stored
    for key, status in (("missing_keys", "lack"), ("mismatched_keys", "have another shape of")):
        if tensors := sorted(map(str, set(info[key]) - scales)):
            raise InputError(f"{name}: the weights {status} {tensors[0]}; fetch them again")
    without_dropout(model)
    known = fingerprint(model, how.made if how else {})
    for parameter in model.parameters():            # buffers, such as tables of angles, stay
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model.to(device).eval(), known


def without_dropout(model):
    """Switch dropout off for good: policy and reference must differ by what was learned alone."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def mark(tensor):
    """What the fingerprint of a model knows of a tensor: its shape and first numbers."""
    return f"{tuple(tensor.shape)} {tensor.flatten()[:256].to(torch.bfloat16).tolist()}"


def fingerprint(model, marks):
    """A hash of the name, shape and first values of every tensor, the same in every dtype.

    marks {layer: mark}: those of quantised weights, taken before; of tied ones, one is enough.
    """
    digest, state, quantised = hashlib.sha256(), model.state_dict(), int8.layers(model)
    of_weight = {quantised[name].weight: marks[name] for name in marks}
    own = {f"{name}.weight": of_weight[layer.weight] for name, layer in quantised.items()}
    scales = {f"{name}.scale" for name in quantised}
    for name in sorted(state.keys() - scales):
        digest.update(f"{name} {own.get(name) or mark(state[name])}\n".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- int8 weights
# transformers' own loader makes them, as it reads one tensor after another
@register_quantization_config(INT8)
class Int8Config(QuantizationConfigMixin):
    """dtype: of the scales. made: {name of a layer: what `mark` says of its weight as it was read},
    filled while weights are read."""

    def __init__(self, dtype, **_):
        self.quant_method, self.dtype, self.made = INT8, dtype, {}

    def to_dict(self):
        return {"quant_method": INT8}


@register_quantizer(INT8)
class Int8Quantizer(HfQuantizer):
    """What transformers asks of a way to quantise."""
    is_trainable = False

    def is_serializable(self):
        return False

    def _process_model_before_weight_loading(self, model, **kwargs):
        int8.replace(model, [model.get_input_embeddings(), model.get_output_embeddings()])

    def param_needs_quantization(self, model, param_name, **kwargs):
        above, _, last = param_name.rpartition(".")
        return last == "weight" and int8.is_int8(model.get_submodule(above))

    def get_quantize_ops(self):
        return Quantise(self.quantization_config)

    def _process_model_after_weight_loading(self, model, **kwargs):
        layers, made = int8.layers(model), self.quantization_config.made
        scale_of = {layers[name].weight: layers[name].scale for name in made}
        for layer in layers.values():       # transformers ties the weights, but not their scales
            layer.scale = scale_of.get(layer.weight, layer.scale)
        self.remove_quantization_config(model)


class Quantise(ConversionOps):
    """A weight as it was read, or several that were stored as one -> int8 numbers and scales."""

    def __init__(self, config):
        self.config = config

    def convert(self, input_dict, model=None, full_layer_name=None, **kwargs):
        quantised, tensors = int8.layers(model), {}
        for name, value in input_dict.items():
            name = full_layer_name if len(input_dict) == 1 else name
            tensor = value[0] if isinstance(value, list) else value
            layer, _, last = name.rpartition(".")
            if last != "weight" or layer not in quantised:
                tensors[name] = tensor
                continue
            self.config.made[layer] = mark(tensor)
            values, scale = int8.quantised(name, tensor, self.config.dtype)
            tensors |= {name: values, f"{layer}.scale": scale}
        return tensors
