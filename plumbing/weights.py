"""Reading a released checkpoint: where it is, whether it fits, and every tensor accounted for. Writing one, too.

The weights may be one safetensors file, several with an index, or `.bin` files (pickles, read with weights_only).
"""
import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plumbing.errors import InputError

# Stored by some revisions, computed at run time by all: the only names that may be left over.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias)$")


# ---------------------------------------------------------------- where it is
def resolve(name_or_dir, weights=True):
    """A folder as it is, or a Hub name -> the folder of its cached snapshot, downloaded where needed.

    weights=False fetches only what comes before them: configuration, vocabulary and index.
    """
    name = str(name_or_dir)
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):                           # Path.is_dir raises for a name that is too long
        return folder
    if os.path.exists(folder) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise InputError(f"{name}: not a folder, and not a Hub name such as Qwen/Qwen-VL")
    from huggingface_hub import snapshot_download
    before = ["config.json", "qwen.tiktoken", "*.index.json"]
    wanted = [["model*.safetensors"], ["pytorch_model*.bin"]] if weights else [before]
    try:
        for patterns in wanted:
            folder = Path(snapshot_download(name, allow_patterns=patterns))
            if list(folder.glob("model*.safetensors")):
                break
    except Exception as error:      # the Hub client's errors share no base class: network, name, access, disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name}: no such folder, and the Hub did not give it ({reason[:200]}); with a network, "
                         f"run `hf download {name}`, or give a folder with --base; the toy needs neither: "
                         "--base assets/toy") from None
    return folder


def weight_files(folder):
    """The files that hold the weights, safetensors before .bin; those of an index in its order. InputError if none."""
    for whole, index in (("model.safetensors", "model.safetensors.index.json"),
                         ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (folder / index).is_file():
            try:
                weight_map = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
                names = list(dict.fromkeys(weight_map.values()))
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise InputError(f"{folder / index}: is not an index of shards ({error!r}); fetch it again") from None
            for name in names:
                if not isinstance(name, str) or Path(name).name != name:
                    raise InputError(f"{folder / index}: names {name!r}, which is outside its folder")
                if not (folder / name).is_file():
                    raise InputError(f"{folder}: {name} is missing, which {index} names; fetch it again")
            return [folder / name for name in names]
        if (folder / whole).is_file():
            return [folder / whole]
    raise InputError(f"{folder}: holds no weights (model.safetensors, pytorch_model.bin, or shards and their index)")


def tensors(path):
    """Yield (name, shape, read) of each tensor in a weight file; read() gives the tensor, not kept in memory after."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 (a safe_open handle is no dict)
                    yield name, tuple(file.get_slice(name).get_shape()), lambda name=name: file.get_tensor(name)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(stored, dict) or not all(isinstance(n, str) and is_plain(t) for n, t in stored.items()):
                raise InputError(f"{path}: is not a dictionary of tensors")
            for name, tensor in stored.items():
                yield name, tuple(tensor.shape), lambda tensor=tensor: tensor
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"{path}: is not a whole safetensors file ({error}); fetch it again") from None
    except Exception as error:      # torch.load has no error class of its own; an unsafe pickle ends here as well
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise InputError(f"{path}: refused, not a plain file of tensors ({reason})") from None


def is_plain(tensor):
    return isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"


# ---------------------------------------------------------------- its configuration
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


# ---------------------------------------------------------------- whether it fits
def usable_device(name):
    """A device by its name ("cpu", "cuda", "cuda:1"). InputError where this machine does not have it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: want cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: {torch.cuda.device_count()} CUDA devices are here; try --device cpu")
    return device


def usual_dtype(device):
    """float32 on the CPU; on a GPU bfloat16, or float16 where it is too old for that."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def free_bytes(device):
    """Bytes of memory free on a device, as far as the system tells; None where it does not."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo)[1]) * 1024
    except (OSError, TypeError):
        return None
    try:        # a container may have less than the machine
        limit, used, stat = (Path("/sys/fs/cgroup", f"memory.{f}").read_text() for f in ("max", "current", "stat"))
        cached = int(re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)[1])      # given back when it is needed
        return min(free, int(limit) - int(used) + cached)
    except (OSError, ValueError, TypeError):
        return free


def check_fits(model, name, dtype, device):
    """InputError with both numbers where the weights are larger than the memory that is free."""
    numbers = sum(t.numel() for t in model.state_dict().values())
    need, free = numbers * dtype.itemsize, free_bytes(device)
    if free is None or need <= free:
        return
    ways = [f"--dtype bfloat16 ({numbers * 2 / 1e9:.1f} GB)"] if dtype.itemsize > 2 else []
    ways += ["--device cpu" if device.type == "cuda" else "a GPU (--device cuda)", "the toy (--base assets/toy)"]
    raise InputError(f"{name}: needs {need / 1e9:.1f} GB as {str(dtype).removeprefix('torch.')} on {device}, "
                     f"{free / 1e9:.1f} GB are free; try {' or '.join(ways)}")


# ---------------------------------------------------------------- filling
def fill(model, folder, dtype, device):
    """Give a model built on the meta device its tensors from a folder, one by one, in `dtype` on `device`.

    Host memory never holds more than what is filled so far and one tensor. Names and shapes of all shards are checked
    first, so no error comes after minutes of reading: InputError names what is missing, left over or misshaped.
    Returns the checkpoint's fingerprint: a hash of every tensor's name, shape and first values, whatever the files.
    """
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    files, found = weight_files(folder), {}
    for path in files:
        for name, shape, _ in tensors(path):
            if name in found:
                raise InputError(f"{path}: holds {name}, which {found[name]} holds too")
            found[name] = path.name
            if name not in wanted and not COMPUTED.search(name):
                what = "which the model described by config.json does not have"
                if re.search(r"\.(qweight|qzeros|scales|g_idx)$", name):
                    what = "an Int4/GPTQ tensor; use the float checkpoint, Qwen/Qwen-VL"
                raise InputError(f"{path}: holds {name}, {what}")
            if name in wanted and shape != wanted[name]:
                raise InputError(f"{path}: {name} has shape {shape}, config.json asks for {wanted[name]}")
    if missing := [name for name in wanted if name not in found]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder}: the weights lack {missing[0]}{others}; fetch them again")
    marks = {}
    for path in files:
        for name, shape, read in tensors(path):
            if name in wanted:
                owner, _, leaf = name.rpartition(".")
                owner = model.get_submodule(owner)
                stored = read()
                if not stored.is_floating_point():
                    raise InputError(f"{path}: {name} holds {stored.dtype}, not floating-point numbers")
                tensor = torch.empty(shape, dtype=dtype, device=device).copy_(stored)    # own memory, not the file's
                marks[name] = f"{shape} {stored.flatten()[:256].tolist()}"
                if leaf in owner._buffers:
                    owner._buffers[leaf] = tensor
                else:
                    owner._parameters[leaf] = torch.nn.Parameter(tensor)
    return hashlib.sha256("\n".join(f"{name} {marks[name]}" for name in sorted(marks)).encode()).hexdigest()


# ---------------------------------------------------------------- writing
def write_base(model, folder, vocabulary):
    """Write a model in the released layout: config.json, model.safetensors in bfloat16, a copy of the vocabulary."""
    folder, vocabulary = Path(folder), Path(vocabulary).read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qwen.tiktoken").write_bytes(vocabulary)
    config = {"architectures": ["QWenLMHeadModel"], "model_type": "qwen", **dataclasses.asdict(model.config)}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    weights = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors.tmp")
    (folder / "model.safetensors.tmp").replace(folder / "model.safetensors")
