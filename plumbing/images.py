"""Image files of every kind -> RGB, and folders searched for them. A bad file is one line."""
import io
import logging
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from plumbing.errors import InputError, printable

# Every further decoder is one more way in for a broken file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
MAX_PIXELS = 89_478_485     # a quarter of a GiB as RGB; larger images are refused undecoded
MAX_SIDE = 1_000_000        # resizing takes 32 bytes per pixel of a side: 3 GB at MAX_PIXELS
MAX_BYTES = 2 ** 30         # of a file: Pillow reads a WebP whole, twice, before looking at it

# How to turn upright an image with EXIF orientation 2 to 8.
TURNS = {
    2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
    6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90,
}

# Pillow must not log about a bad file: open_image reports it, once and by name.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def find_images(arguments):
    """Files and folders -> [(path, name)]: files as they are, folders with subfolders, sorted.

    The name is the path within its folder: a sample's random numbers depend on it, and must not
    depend on where the folder is. An empty folder stays in the list, so that open_image reports it.
    """
    images = []
    for argument in map(Path, arguments):
        if not os.path.isdir(argument):         # Path.is_dir raises for a name that is too long
            images.append((argument, argument.name))
            continue
        inside = sorted(path for path in argument.rglob("*")
                        if path.suffix.lower() in SUFFIXES and path.is_file())
        images += [(path, path.relative_to(argument).as_posix()) for path in inside]
        if not inside:
            images.append((argument, argument.name))
    return images


def open_image(source, name=None):
    """An image file, or its bytes -> its first frame as RGB, upright, alpha over white.

    InputError, one line that begins with `name` (the path, if not given), for whatever is wrong.
    """
    name = printable(source if name is None else name)
    try:
        with warnings.catch_warnings(), open_source(name, source) as file:
            warnings.simplefilter("ignore")     # what Pillow warns of either works or is an error
            with Image.open(file, formats=FORMATS) as image:
                check_size(name, *image.size)
                image.load()                    # raises where the file is cut off
                return to_rgb(upright(image))
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{name}: more than the {MAX_PIXELS} pixels that are allowed") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{name}: cannot be read as any of {', '.join(FORMATS)}") from None
    except Exception as error:      # Pillow's decoders raise whatever a broken file leads them to
        if system := getattr(error, "strerror", None):      # says nothing about the contents
            raise InputError(f"{name}: cannot be read ({system[:120]})") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: cannot be read, the file is damaged ({reason[:120]})") from None


def open_source(name, source):
    """A path, or bytes -> a file to read."""
    if isinstance(source, bytes):
        check_bytes(name, len(source))
        return io.BytesIO(source)
    path = Path(source)
    check_file(name, path)
    check_bytes(name, path.stat().st_size)
    return path.open("rb")


def check_file(name, path):
    """InputError for what is not a file: opening a pipe would block."""
    if path.is_dir():
        raise InputError(f"{name}: is a folder without images")
    if not path.is_file():
        raise InputError(f"{name}: no such image file")


def check_bytes(name, size):
    """InputError for a file that is too large to be read."""
    if size > MAX_BYTES:
        raise InputError(f"{name}: {size} bytes, more than the {MAX_BYTES} that are allowed")


def check_size(name, width, height):
    """InputError for an image without pixels, or with too many, according to its header."""
    if not width or not height:
        raise InputError(f"{name}: {width}×{height} pixels, there is nothing to see")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise InputError(f"{name}: {width}×{height} pixels; at most {MAX_PIXELS} are allowed, "
                         f"{MAX_SIDE} on a side")


def upright(image):
    """Apply the EXIF rotation; an image whose EXIF cannot be read stays as it is stored.

    ImageOps.exif_transpose also writes the EXIF anew, and so fails where any other tag is odd.
    """
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:       # broken metadata is no reason to lose a whole picture
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image):
    """Any Pillow mode -> RGB: alpha over white, deep images scaled to 8 bits."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return deep_to_rgb(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def deep_to_rgb(image):
    """A gray image of more than 8 bits -> RGB.

    I;16 is 16 bits by name. Modes I and F do not say which value is white: it is taken to be the
    smallest usual level that no pixel exceeds.
    """
    values = np.asarray(image).astype(np.float32)
    top = values.max(where=np.isfinite(values), initial=0)
    levels = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    white = next((level for level in levels if top <= level), top)
    np.nan_to_num(values, copy=False, posinf=white, neginf=0)       # in place: it may be 1 GiB
    values[values == image.info.get("transparency", np.nan)] = white
    values *= 255 / white
    values.round(out=values).clip(0, 255, out=values)
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")
