"""For tests alone, on PYTHONPATH: lets a torchvision that was built for another torch be imported.

Beside a CPU build of torch, torchvision's usual wheel cannot load its compiled operators, and its
import stops at two that it looks up. No processor of images uses them.
"""

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path


class DefineOperators(importlib.abc.MetaPathFinder):
    """Declares the two operators before torchvision is imported, where its own cannot be loaded."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and not hasattr(sys, "torchvision_operators"):
            sys.torchvision_operators = None
            spec = importlib.machinery.PathFinder.find_spec(name)
            if spec and not self.loads(Path(spec.origin).parent):
                sys.torchvision_operators = self.define()  # they live as long as this object

    def loads(self, folder):
        import torch

        try:
            for library in folder.glob("_C*"):
                torch.ops.load_library(library)
        except OSError:
            return False
        return hasattr(torch.ops.torchvision, "nms")

    def define(self):
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


sys.meta_path.insert(0, DefineOperators())
