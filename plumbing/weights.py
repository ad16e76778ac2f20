"""Checkpoints: where one is, whether it fits, reading it with every tensor checked, writing one.

The weights may be one safetensors file, several with an index, or `.bin` files (pickles, read with
weights_only).
"""
import contextlib
import dataclasses
import gc
import hashlib
import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plumbing import int8
from plumbing.errors import InputError

# Stored by some revisions, computed at run time by all: the only names that may be left over.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias)$")
QUANTISED = re.compile(r"\.(qweight|qzeros|scales|g_idx)$")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SUPPORTED = "this code runs Qwen/Qwen-VL (the 2023 float model, or a folder in its layout)"


# ---------------------------------------------------------------- where it is
def is_hub_name(name):
    """Whether a base's name is one on the Hub, such as Qwen/Qwen-VL, and not a file or folder."""
    return HUB_NAME.fullmatch(name) is not None and not os.path.exists(os.path.expanduser(name))


def resolve(name_or_dir, weights=True):
    """A folder as it is, or a Hub name -> the folder of its cached snapshot, downloaded if needed.

    weights=False fetches what is needed before the weights: configuration, vocabulary and index.
    """
    name = str(name_or_dir)
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):                           # Path.is_dir raises for a name too long
        return folder
    if not is_hub_name(name):
        raise InputError(f"{name}: not a folder, and not a Hub name such as Qwen/Qwen-VL")
    from huggingface_hub import snapshot_download  # here, since it is slow to import

    small_files = ["config.json", "qwen.tiktoken", "*.index.json"]
    attempts = [["model*.safetensors"], ["pytorch_model*.bin"]] if weights else [small_files]
    try:
        for patterns in attempts:
            folder = Path(snapshot_download(name, allow_patterns=patterns))
            if list(folder.glob("model*.safetensors")):
                break
    except Exception as error:      # the Hub client's errors share no base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{name}: no such folder, and the Hub did not deliver it ({reason}); with a network, "
            f"run `hf download {name}`, or give a folder with --base; the toy needs neither: "
            "--base assets/toy") from None
    return folder


def weight_files(folder):
    """The files that hold the weights, safetensors before .bin. InputError without any."""
    for whole, index in (("model.safetensors", "model.safetensors.index.json"),
                         ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (folder / index).is_file():
            return shards(folder, index)
        if (folder / whole).is_file():
            return [folder / whole]
    raise InputError(f"{folder}: holds no weights (model.safetensors, pytorch_model.bin, or shards "
                     "and their index)")


def shards(folder, index):
    """The files that an index names, in its order. InputError where one is missing or outside."""
    try:
        weight_map = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(weight_map.values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{folder / index}: is not an index of shards ({error!r}); "
                         "fetch it again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{folder / index}: names {name!r}, which is outside its folder")
        if not (folder / name).is_file():
            raise InputError(f"{folder}: {name} is missing, which {index} names; fetch it again")
    return [folder / name for name in names]


def tensors(path):
    """Yield (name, shape, read) of each tensor in a weight file; read() loads that tensor alone."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 (a safe_open handle is not a dict)
                    shape = tuple(file.get_slice(name).get_shape())
                    yield name, shape, lambda name=name: file.get_tensor(name)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(stored, dict) or not all(map(is_plain, stored, stored.values())):
                raise InputError(f"{path}: is not a dictionary of tensors")
            for name, tensor in stored.items():
                yield name, tuple(tensor.shape), lambda tensor=tensor: tensor
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"{path}: is not a whole safetensors file ({error}); "
                         "fetch it again") from None
    except Exception as error:      # torch.load has no error class; an unsafe pickle ends here too
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise InputError(f"{path}: refused, not a plain file of tensors ({reason})") from None


def is_plain(name, tensor):
    return (isinstance(name, str) and isinstance(tensor, torch.Tensor)
            and tensor.layout == torch.strided and tensor.device.type == "cpu")


# ---------------------------------------------------------------- its configuration
def read_config(path):
    """A checkpoint's config.json as a dict. InputError for a model that this code does not run."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a model configuration ({error}); "
                         f"{SUPPORTED}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: is not a JSON object; {SUPPORTED}")
    kind = raw.get("model_type", "qwen")
    if kind != "qwen" or not isinstance(raw.get("visual"), dict):
        names = raw.get("architectures")
        name = names[0] if isinstance(names, list) and names else kind
        lacks = " without a vision tower" if kind == "qwen" else ""
        raise InputError(f"{path}: is a {' '.join(str(name).split())} model{lacks}; {SUPPORTED}")
    if quantised := raw.get("quantization_config"):
        method = quantised
        if isinstance(quantised, dict):
            method = quantised.get("quant_method", "quantized")
        raise InputError(f"{path}: is an Int4/{str(method).upper()} checkpoint; {SUPPORTED}")
    for key, value in (("rotary_pct", 1.0), ("tie_word_embeddings", False),
                       ("scale_attn_weights", True)):
        if raw.get(key, value) != value:
            raise InputError(f"{path}: {key} is {raw[key]}, only {value} is supported; {SUPPORTED}")
    return raw


def checked_config(kind, values, where=""):
    """Make a dataclass of type `kind` from a dict, in which other keys are ignored.

    InputError for a value of another type than the field's, or a number that is not above 0.
    """
    known = {}
    for field in dataclasses.fields(kind):
        if field.name not in values:
            continue
        name, value = where + field.name, values[field.name]
        if dataclasses.is_dataclass(field.type):
            known[field.name] = checked_config(field.type, value, f"{name}.")
            continue
        types = (int, float) if field.type is float else field.type
        fits = isinstance(value, types) and isinstance(value, bool) == (field.type is bool)
        if not fits or (field.type is not bool and not 0 < value < math.inf):
            wanted = "true or false" if field.type is bool else f"{field.type.__name__} above 0"
            raise InputError(f"config.json: {name} is {value!r}, want {wanted}")
        known[field.name] = value
    return kind(**known)


def check_rules(config):
    """InputError where the numbers of a configuration do not fit together."""
    head, v = config.kv_channels, config.visual
    rules = {
        "kv_channels must be even and above 2": head > 2 and head % 2 == 0,
        "kv_channels × num_attention_heads must equal hidden_size":
            head * config.num_attention_heads == config.hidden_size,
        "visual.output_dim must equal hidden_size": v.output_dim == config.hidden_size,
        "visual.output_dim must be a multiple of 128": v.output_dim % 128 == 0,
        "visual.width must be a multiple of visual.heads": v.width % v.heads == 0,
        "visual.n_queries must be a square": math.isqrt(v.n_queries) ** 2 == v.n_queries,
        "visual.patch_size must divide visual.image_size": v.image_size % v.patch_size == 0,
    }
    for rule, holds in rules.items():
        if not holds:
            raise InputError(f"config.json: {rule}")


def check_vocabulary(folder, tokenizer, config):
    """InputError where qwen.tiktoken and config.json of a folder disagree about their ids."""
    same_start = tokenizer.image_start_id == config.visual.image_start_id
    if not same_start or tokenizer.n_vocab > config.vocab_size:
        raise InputError(
            f"{folder}: qwen.tiktoken puts <img> at {tokenizer.image_start_id} of "
            f"{tokenizer.n_vocab} ids, config.json at {config.visual.image_start_id} of "
            f"{config.vocab_size}; they belong to different models")


# ---------------------------------------------------------------- whether it fits
def usable_device(name):
    """A torch device by its name ("cpu", "cuda", "cuda:1"). InputError if this machine lacks it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: want cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA "
                         "devices; try --device cpu")
    return device


def usual_dtype(device):
    """float32 on the CPU; on a GPU bfloat16, or float16 where it is too old for that."""
    if device.type == "cpu":
        return torch.float32
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def free_bytes(device):
    """Bytes of free memory on a device, or None where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo)[1]) * 1024
    except (OSError, TypeError):
        return None
    group = Path("/sys/fs/cgroup")          # a container may have less than the machine
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = (group / "memory.stat").read_text()
        cached = int(re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)[1])
    except (OSError, ValueError, TypeError):
        return free
    return min(free, limit - used + cached)             # the file cache is released when needed


def release_memory(device):
    """Free the model of the pass before: the next one may need the whole card."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_fits(model, name, dtype, device):
    """InputError with both numbers where the weights are larger than the free memory."""
    need, free = int8.stored_bytes(model, dtype), free_bytes(device)
    if free is None or need <= free:
        return
    ways = []
    if dtype.itemsize > 2:
        ways.append(f"--dtype bfloat16 ({int8.stored_bytes(model, torch.bfloat16) / 1e9:.1f} GB)")
    if not int8.layers(model):
        ways.append("--quantize int8 (about half of that)")
    ways.append("--device cpu" if device.type == "cuda" else "a GPU (--device cuda)")
    ways.append("the toy (--base assets/toy)")
    kinds = ("int8 and " if int8.layers(model) else "") + str(dtype).removeprefix("torch.")
    raise InputError(f"{name}: needs {need / 1e9:.1f} GB as {kinds} on {device}, "
                     f"{free / 1e9:.1f} GB are free; try {' or '.join(ways)}")


# ---------------------------------------------------------------- reading
def fill(model, folder, dtype, device):
    """Give a model built on the meta device its tensors from a folder, in `dtype` on `device`.

    Each weight of an int8 layer is quantised as it is read. Host memory never holds more than what
    is filled so far and one tensor. Names and shapes of all files are checked first, so that no
    error comes after minutes of reading: InputError names the tensor that is missing, left over,
    misshaped or not of floating-point numbers.
    Returns the checkpoint's fingerprint, a hash of the name, shape and first values of every
    tensor, however the tensors are spread over files.
    """
    quantised = int8.layers(model)
    scales = {f"{name}.scale" for name in quantised}
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in scales}
    files = weight_files(folder)
    check_tensors(folder, files, wanted)
    state, marks = {}, {}
    for path in files:
        for name, shape, read in tensors(path):
            if name not in wanted:
                continue
            stored = read()
            if not stored.is_floating_point():
                raise InputError(f"{path}: {name} holds {stored.dtype}, not floating-point numbers")
            layer = name.removesuffix(".weight")
            if layer in quantised and layer != name:
                state[name], state[f"{layer}.scale"] = int8.quantised(name, stored, dtype, device)
            else:
                # a copy: it may be a view of the file, which may change while a model runs
                state[name] = torch.empty(shape, dtype=dtype, device=device).copy_(stored)
            marks[name] = f"{shape} {stored.flatten()[:256].tolist()}"
    model.load_state_dict(state, assign=True)
    lines = (f"{name} {marks[name]}" for name in sorted(marks))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_tensors(folder, files, wanted):
    """InputError unless the files hold each tensor of `wanted` {name: shape} once, and no other."""
    file_of = {}
    for path in files:
        for name, shape, _ in tensors(path):
            if name in file_of:
                raise InputError(f"{path}: holds {name}, which {file_of[name]} holds too")
            file_of[name] = path.name
            if name in wanted and shape != wanted[name]:
                raise InputError(f"{path}: {name} has shape {shape}, config.json asks for "
                                 f"{wanted[name]}")
            if name not in wanted and QUANTISED.search(name):
                raise InputError(f"{path}: holds {name}, an Int4/GPTQ tensor; use the float "
                                 "checkpoint, Qwen/Qwen-VL")
            if name not in wanted and not COMPUTED.search(name):
                raise InputError(f"{path}: holds {name}, which the model described by config.json "
                                 "does not have")
    if missing := [name for name in wanted if name not in file_of]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder}: the weights lack {missing[0]}{others}; fetch them again")


# ---------------------------------------------------------------- writing
def write_base(model, folder, vocabulary):
    """Write a model in the released layout: config.json, bfloat16 safetensors, the vocabulary."""
    folder, vocabulary = Path(folder), Path(vocabulary).read_bytes()
    config = {"architectures": ["QWenLMHeadModel"], "model_type": "qwen",
              **dataclasses.asdict(model.config)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (folder / "qwen.tiktoken").write_bytes(vocabulary)
    state = {name: t.detach().to("cpu", torch.bfloat16) for name, t in model.state_dict().items()}
    save_file(state, folder / "model.safetensors.tmp")
    (folder / "model.safetensors.tmp").replace(folder / "model.safetensors")


@contextlib.contextmanager
def enough_memory(what):
    """Inside, an error for want of memory becomes an InputError that says what to lessen."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        words = ("out of memory", "allocate memory", "not enough memory")
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in words):
            raise
        raise InputError(f"out of memory with {what}") from None
