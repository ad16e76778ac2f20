"""MVMCICE, "multi view multi crop image chunking embedding": one image becomes six views at two resolutions.

The whole image at the model's own size, and five crops of it at twice that size: the quadrants, and the centre on which
all four cut objects. Each view is an image of its own to the model.

    image = open_image("photo.jpg")
    pixels = views(image)               # (6, 3, 448, 448)
"""
import contextlib
import ctypes
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

from loading import InputError

# The six boxes, as left, top, right, bottom in fractions of the image, in the order in which the model reads them.
# The source says six views and 448 -> 896, not which: this layout is ours. Edit the list for another.
BOXES = (
    (0.0, 0.0, 1.0, 1.0),
    (0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0),
    (0.25, 0.25, 0.75, 0.75),
)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")     # every further decoder is one more way in for a broken file
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 89_478_485             # a quarter of a GiB as RGB; above it an image is refused before it is decoded
MAX_SIDE = 1_000_000                # resizing takes 32 bytes per pixel of a side: 3 GB for a line of MAX_PIXELS
MAX_BYTES = 2 ** 30                 # of a file: Pillow reads a WebP whole, and twice, before it looks at it

# How EXIF's orientations 2 to 8 are turned upright.
TURNS = dict(enumerate((Image.FLIP_LEFT_RIGHT, Image.ROTATE_180, Image.FLIP_TOP_BOTTOM, Image.TRANSPOSE,
                        Image.ROTATE_270, Image.TRANSVERSE, Image.ROTATE_90), start=2))

# What is wrong with a file is said by open_image, once and by name. Left alone, libtiff and Pillow's log would each add
# lines on stderr that name no file.
logging.getLogger("PIL").addHandler(logging.NullHandler())
with contextlib.suppress(OSError, AttributeError):          # a Pillow with libtiff linked in does not let it be called
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


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


def open_image(path):
    """An image file -> an RGB image, upright, alpha over white, first frame. InputError, one line, for a bad file."""
    path = Path(path)
    name = str(path) if str(path).isprintable() else repr(str(path))
    try:
        if not path.is_file():                      # a pipe is none either: it would block
            raise InputError(f"{name}: {'is a folder without images' if path.is_dir() else 'no such image file'}")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{name}: {path.stat().st_size} bytes, more than the {MAX_BYTES} that are allowed")
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")         # Pillow warns of oddities on stderr; here they work or are errors
            with Image.open(file, formats=FORMATS) as image:
                check_size(name, *image.size)
                image.load()                        # raises where the file is cut off
                return to_rgb(upright(image))
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{name}: more than the {MAX_PIXELS} pixels that are allowed") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{name}: cannot be read as any of {', '.join(FORMATS)}") from None
    except Exception as error:      # Pillow's decoders raise whatever a broken file leads them to
        system = getattr(error, "strerror", None)   # the file could not be reached: nothing is known of what is in it
        reason = system or " ".join(str(error).split()) or type(error).__name__
        what = "cannot be read" if system else "cannot be read, the file is damaged"
        raise InputError(f"{name}: {what} ({reason[:120]})") from None


def check_size(name, width, height):
    """InputError for an image that would take too much memory, or has no pixels, as its header says."""
    if not width or not height:
        raise InputError(f"{name}: {width}×{height} pixels, there is nothing to see")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise InputError(f"{name}: {width}×{height} pixels; at most {MAX_PIXELS} are allowed, {MAX_SIDE} on a side")


def upright(image):
    """Apply the EXIF rotation; an image whose EXIF cannot be read stays as it is stored.

    ImageOps.exif_transpose also writes the EXIF anew, and so fails where any other of its tags is odd.
    """
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:       # broken metadata is no reason to lose a whole picture
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image):
    """Any Pillow mode -> RGB: alpha over white, deep images scaled to 8 bits."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float32)
        top = values.max(where=np.isfinite(values), initial=0)
        # I;16 is 16 bits by name; I and F do not say what white is: the smallest usual level that holds every value
        usual = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
        white = next((level for level in usual if top <= level), top)
        np.nan_to_num(values, copy=False, posinf=white, neginf=0)
        values[values == image.info.get("transparency", np.nan)] = white
        values *= 255 / white
        return Image.fromarray(values.round(out=values).clip(0, 255, out=values).astype(np.uint8)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
