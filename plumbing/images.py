"""Image files of every kind -> RGB, and folders searched for them. A bad file is one line that names it."""
import logging
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from plumbing.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")     # every further decoder is one more way in for a broken file
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 89_478_485             # a quarter of a GiB as RGB; above it an image is refused before it is decoded
MAX_SIDE = 1_000_000                # resizing takes 32 bytes per pixel of a side: 3 GB for a line of MAX_PIXELS
MAX_BYTES = 2 ** 30                 # of a file: Pillow reads a WebP whole, and twice, before it looks at it

# How EXIF's orientations 2 to 8 are turned upright.
TURNS = dict(enumerate((Image.FLIP_LEFT_RIGHT, Image.ROTATE_180, Image.FLIP_TOP_BOTTOM, Image.TRANSPOSE,
                        Image.ROTATE_270, Image.TRANSVERSE, Image.ROTATE_90), start=2))

logging.getLogger("PIL").addHandler(logging.NullHandler())      # open_image reports a bad file, once and by name


def find_images(arguments):
    """Files and folders -> [(path, name)]: files as they are, folders searched with their subfolders, sorted.

    The name is the path within its folder; a sample's random numbers depend on it, not on where the folder lies.
    """
    found = []
    for argument in map(Path, arguments):
        if os.path.isdir(argument):             # Path.is_dir raises for a name that is too long
            inside = sorted(p for p in argument.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            # an empty folder stays as itself, to be told as an image that cannot be opened
            found += [(p, p.relative_to(argument).as_posix()) for p in inside] or [(argument, argument.name)]
        else:
            found.append((argument, argument.name))
    return found


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
