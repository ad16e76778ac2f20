"""What bench.py measures with: the limits of a device, contestants that take turns, peak memory,
and the table with its JSON."""
import contextlib
import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from plumbing import int8

# Larger than any cache, and large enough that starting a kernel costs nothing beside it.
COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}      # bytes of the tensor whose copy is timed
SIDE = {"cuda": 8192, "cpu": 2048}              # of the square matrices whose product is timed
TRIES = 5                                       # the fastest one is the limit
WEIGHT = 0.02                                   # standard deviation of random weights
COLUMNS = {"row": 9, "rival": 26, "seconds": 8, "rival s": 8, "times": 6, "bare s": 8,
           "of bare": 7, "floor s": 8, "of floor": 8, "+ MB": 7, "rival + MB": 10, "target": 6}


# ---------------------------------------------------------------- seconds
def wait_for(device):
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device, run):
    """Seconds of run(), with what it leaves to the device."""
    wait_for(device)
    began = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - began


def in_turn(contestants, rounds, device):
    """{name: run}, run() -> the seconds that count, -> {name: figures}.

    After a first run of each, the warm-up, they take turns: the seconds of "rounds", and their
    median "seconds". Memory is that of the last round: "peak" in bytes, and "bytes" above what was
    in use before.
    """
    figures = {name: {"rounds": []} for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            at_rest = reset_peak(device) if number == rounds else 0
            seconds = run()
            if number:
                figures[name]["rounds"].append(seconds)
            peak = peak_memory(device)
            figures[name] |= {"peak": peak, "bytes": peak - at_rest}
    return {name: {**row, "seconds": statistics.median(row["rounds"])}
            for name, row in figures.items()}


# ---------------------------------------------------------------- memory
def peak_memory(device):
    """The most bytes since reset_peak; on a CPU that cannot reset it, of the process's life."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # here, since Windows lacks it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024)


def reset_peak(device):
    """Forget the peak so far, and hand back what is free -> bytes in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


# ---------------------------------------------------------------- the limits of a device
def copy_bandwidth(device):
    """Bytes per second of copying a large tensor, each byte counted as read and as written."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    tries = [seconds_of(device, lambda: target.copy_(source)) for _ in range(TRIES + 1)]
    return 2 * source.nbytes / min(tries[1:])


def matrix_rate(device, dtype):
    """Floating-point operations per second of a large square product, 2 n³ of them."""
    n = SIDE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    tries = [seconds_of(device, lambda: a @ b) for _ in range(TRIES + 1)]
    return 2 * n ** 3 / min(tries[1:])


def operations_of(run):
    """Floating-point operations of the products with weights in run(), backward included.

    Attention's own products are left out: how many are needed depends on the mask.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    aten, counts = torch.ops.aten, counter.get_flop_counts()["Global"]
    return sum(counts.get(kind, 0) for kind in (aten.mm, aten.addmm, aten.convolution))


def linear_calls(model, run):
    """[(layer, rows)] of the linear layers that run() calls, in their order."""
    calls = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_hook(
        lambda layer, args, y: calls.append((layer, args[0].shape[:-1].numel())))
        for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def weight_bytes(calls):
    """Bytes of the weights that linear_calls read, again in each call."""
    return sum(t.nbytes for layer, _ in calls for t in (layer.weight, *int8_scale(layer)))


def int8_scale(layer):
    return [layer.scale] if int8.is_int8(layer) else []


class Bare:
    """The products of linear_calls and nothing else, each on rows of random numbers."""

    def __init__(self, calls):
        self.calls, self.inputs = calls, {}
        for layer, rows in calls:
            dtype, device = int8.dtype_of(layer), layer.weight.device
            shape = rows, layer.in_features
            if shape not in self.inputs:
                self.inputs[shape] = torch.randn(shape, device=device).to(dtype)

    @torch.no_grad()
    def __call__(self):
        for layer, rows in self.calls:
            x = self.inputs[rows, layer.in_features]
            if int8.is_int8(layer):
                int8.product(x, layer.weight, layer.scale)
            else:
                F.linear(x, layer.weight)


# ---------------------------------------------------------------- random weights
@torch.no_grad()
def fill_randomly(model, dtype, device, seed=0):
    """Give a model on the meta device random weights in dtype, made where they stay.

    Matrices have a standard deviation of WEIGHT, norms are 1 and biases 0, so that activations
    stay in the range of a trained model's.
    """
    model.to(dtype).to_empty(device=device)
    torch.manual_seed(seed)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.dtype == torch.int8:
            t.random_(-int8.LARGEST, int8.LARGEST + 1)          # of standard deviation 127 / √3
        elif name.endswith(".scale"):
            t.fill_(WEIGHT * 3 ** 0.5 / int8.LARGEST)
        elif t.ndim > 1:
            t.normal_(std=WEIGHT)
        else:
            t.fill_(0 if name.endswith("bias") else 1)
    return model


# ---------------------------------------------------------------- what is reported
@dataclass
class Contest:
    """A row of the table: contestants, which return the seconds that count, and their floor."""
    rival_is: str
    ours: Callable
    rival: Callable
    bare: Callable | None = None    # the matrix products of ours and nothing else
    bytes_read: int = 0             # of weights that ours has to read
    operations: int = 0             # of products with weights
    facts: dict | None = None       # what else to report


def held(contest, rounds, device, limits):
    """Hold a contest -> its figures. limits: of the device, in bytes/s and operations/s."""
    sides = {"ours": contest.ours, "rival": contest.rival, "bare": contest.bare}
    turns = in_turn({side: run for side, run in sides.items() if run}, rounds, device)
    ours, rival = turns["ours"], turns["rival"]
    row = {"rival": contest.rival_is, "seconds": ours["seconds"],
           "rival_seconds": rival["seconds"], "times": rival["seconds"] / ours["seconds"],
           "megabytes": ours["bytes"] / 1e6, "rival_megabytes": rival["bytes"] / 1e6,
           "peak_gib": ours["peak"] / 2 ** 30, "bytes_read": contest.bytes_read,
           "operations": contest.operations}
    if contest.bare:
        bare = turns["bare"]["seconds"]
        row |= {"bare_seconds": bare, "of_bare": bare / ours["seconds"]}
    bandwidth, rate = limits
    if floor := contest.bytes_read / bandwidth + contest.operations / rate:
        row |= {"floor_seconds": floor, "of_floor": floor / ours["seconds"]}
    rounds = {side: turn["rounds"] for side, turn in turns.items()}
    return {**row, **(contest.facts or {}), "rounds": rounds}


def heading(limits):
    """The limits of the device, and the first two lines of the table, in Markdown."""
    bandwidth, rate = limits
    text = f"copy {bandwidth / 1e9:.1f} GB/s, matrix product {rate / 1e12:.3f} TFLOP/s\n\n"
    cells = [name.ljust(width) for name, width in COLUMNS.items()]
    return text + line_of(cells) + "\n" + line_of("-" * width for width in COLUMNS.values())


def line_of(cells):
    return "| " + " | ".join(cells) + " |"


def line(name, row, target):
    """A row of the table, in Markdown."""
    def number(key, form):
        return format(row[key], form) if key in row else "–"

    if "logits_megabytes" in row:
        target += f" ({row['peak_gib']:.1f} GiB, logits {row['logits_megabytes']:.1f} MB)"
    cells = [name, row["rival"], number("seconds", ".3f"), number("rival_seconds", ".3f"),
             number("times", ".2f"), number("bare_seconds", ".3f"), number("of_bare", ".0%"),
             number("floor_seconds", ".3f"), number("of_floor", ".0%"),
             number("megabytes", ".0f"), number("rival_megabytes", ".0f"), target]
    widths = zip(cells, COLUMNS.values())
    return line_of(cell.ljust(width) if k in (0, 1, len(cells) - 1) else cell.rjust(width)
                   for k, (cell, width) in enumerate(widths))


def hardware(device, threads):
    """What the figures were measured on."""
    if device.type == "cuda":
        return {"gpu": torch.cuda.get_device_name(device), "threads": threads}
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "threads": threads}


def versions(packages=("torch", "transformers")):
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
