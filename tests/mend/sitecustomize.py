"""For tests alone, on PYTHONPATH: lets a torchvision that was built for another torch be imported.

Beside a CPU build of torch, torchvision's own wheel lacks its compiled operators, and its import
stops at two that it looks up. No processor of images uses them.
"""

import importlib.abc
import sys


class DefineOperators(importlib.abc.MetaPathFinder):
    """Declares the two operators before torchvision is imported, where they do not exist."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.torchvision_operators = self.library  # they live as long as this object
        return None


sys.meta_path.insert(0, DefineOperators())
