"""A function that is compiled when it first runs, and on a GPU captured as one CUDA graph."""
import sys
import time

import torch

SHAPES = 64             # compiled ones of a function, before torch gives up
WORTH_COMPILING = 32    # images: with fewer, a minute of compiling is never made good


class Compiled:
    """torch.compile of a function whose tensors keep place and shape from call to call.

    On a GPU, "reduce-overhead" records the kernels of a call once and launches them together
    (CUDA graphs); tensors that are written in place must be kept with `keep` for that. The seconds
    of the first call go to stderr; another shape is compiled when it first comes.
    """

    def __init__(self, function, device):
        self.function, self.device, self.has_run = function, device, False
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, SHAPES)
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        self.run = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    def __call__(self, *args):
        torch.compiler.cudagraph_mark_step_begin()
        if self.has_run:
            return self.run(*args)
        began = time.perf_counter()
        result = self.run(*args)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.has_run = True
        print(f"compiled {self.function.__name__} in {time.perf_counter() - began:.0f} s",
              file=sys.stderr)
        return result


def keep(tensors):
    """Declare that tensors stay where they are, so that a captured call may write to them."""
    for t in tensors:
        torch._dynamo.mark_static_address(t)
