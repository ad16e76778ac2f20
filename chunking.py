"""MVMCICE, "multi view multi crop image chunking embedding": one image becomes six views at two resolutions.

The whole image at the model's own size, and five crops of it at twice that size: the quadrants, and the centre on which
all four cut objects. Each view is an image of its own to the model.

    image = open_image("photo.jpg")
    pixels = views(image)               # (6, 3, 448, 448)
"""
import numpy as np
import torch
from PIL import Image

# The six boxes, as left, top, right, bottom in fractions of the image, in the order in which the model reads them.
# The source says six views and 448 -> 896, not which: this layout is ours. Edit the list for another.
BOXES = (
    (0.0, 0.0, 1.0, 1.0),
    (0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0),
    (0.25, 0.25, 0.75, 0.75),
)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def normalise(image):
    """An RGB image -> (3, height, width) float32 with CLIP's mean and deviation."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return (pixels.float() / 255 - MEAN) / STD


def views(image, size=448):
    """An RGB image -> its views (6, 3, size, size), normalised; size is the model's image_size.

    View 0 is the base model's own preprocessing, bit for bit: the image stretched to a square, PIL's bicubic filter.
    The crops are cut from the original resized once to twice that size, never from view 0.
    """
    full = image.resize((2 * size, 2 * size), Image.BICUBIC)
    cut = []
    for box in BOXES:
        if box == (0.0, 0.0, 1.0, 1.0):
            cut.append(normalise(image.resize((size, size), Image.BICUBIC)))
        else:
            crop = full.crop([round(edge * 2 * size) for edge in box])
            cut.append(normalise(crop.resize((size, size), Image.BICUBIC)))     # a crop of this size stays as it is
    return torch.stack(cut)
