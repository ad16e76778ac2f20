"""MVMCICE, "multi view multi crop image chunking embedding": one image becomes six views.

View 0 is the whole image at the model's own size. The others are crops of the image at twice that
size: the four quadrants, and the centre, through which every border between quadrants runs. Each
view is a separate image to the model, so small details are seen at twice the resolution without any
change to the vision tower.

    image = open_image("photo.jpg")
    pixels = views(image)               # (6, 3, 448, 448)
"""
import numpy as np
import torch
from PIL import Image

from plumbing.images import open_image

# The boxes, as left, top, right, bottom in fractions of the image, in the order in which the model
# reads them. The source gives the number, six, and the sizes, 448 -> 896; the layout is our choice.
WHOLE = (0.0, 0.0, 1.0, 1.0)
BOXES = (
    WHOLE,
    (0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0),
    (0.25, 0.25, 0.75, 0.75),
)
# Layouts to compare, by the name that --views takes. The centre of "six-wide" covers more of the
# seams, at a resolution between that of the whole image and that of the quadrants.
LAYOUTS = {
    "six": BOXES,
    "five": BOXES[:5],
    "one": BOXES[:1],
    "six-wide": (*BOXES[:5], (0.125, 0.125, 0.875, 0.875)),
}
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def normalise(image):
    """An RGB image -> (3, height, width) float32, with CLIP's mean and standard deviation."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return (pixels.float() / 255 - MEAN) / STD


def crops(image, size=448, boxes=BOXES):
    """An RGB image -> its views as PIL images of size × size, one for each box.

    The whole image is stretched to a square with PIL's bicubic filter, as Qwen-VL's own
    preprocessing does. The others are cut from the original, resized once to twice that size, never
    from the small whole image. Where the whole image is the only view it stays as it is: the
    model's `look` brings it to a size of its own.
    """
    if set(boxes) == {WHOLE}:
        return [image] * len(boxes)
    side = 2 * size
    full = image.resize((side, side), Image.BICUBIC)
    pictures = []
    for box in boxes:
        view = image if box == WHOLE else full.crop([round(edge * side) for edge in box])
        pictures.append(square(view, size))
    return pictures


def seen_by(model, path, boxes=BOXES):
    """An image file -> what a base's `look` gives for its views. InputError for a bad file."""
    return model.look(crops(open_image(path), model.image_size, boxes))


def square(image, size):
    """An image stretched to size × size; as it is if it has that size."""
    return image if image.size == (size, size) else image.resize((size, size), Image.BICUBIC)


def views(image, size=448, boxes=BOXES):
    """An RGB image -> its views (V, 3, size, size), normalised; size is the model's image_size."""
    return torch.stack([normalise(square(view, size)) for view in crops(image, size, boxes)])
