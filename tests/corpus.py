"""Good, odd and broken image files, and folders, tars, manifests and lists full of them."""

import contextlib
import gzip
import io
import json
import os
import random
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image


def encode(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def write(path, data):
    path.write_bytes(data)
    return path


def photo(width=70, height=60):
    """A picture with smooth and with fine parts."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    smooth = np.stack([3 * y, 2 * x, x + y], axis=-1)
    return Image.fromarray((smooth + noise * (x > 30)[..., None]).clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------- files built by hand
def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows=b"", depth=8, color=2, extra=b""):
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + extra
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def tiff(width, height, strips, compression=1, bits=8, more=()):
    """A gray TIFF whose directory precedes its pixels, as cameras and scanners write it."""
    n = len(strips)
    lists = 8 + 2 + 12 * (9 + len(more)) + 4
    first = lists + 8 * n
    offsets = [first + sum(map(len, strips[:i])) for i in range(n)]
    place = (offsets[0], len(strips[0])) if n == 1 else (lists, lists + 4 * n)
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, bits),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (273, 4, n, place[0]),
        (277, 3, 1, 1),
        (278, 4, 1, -(-height // n)),
        (279, 4, n, place[1]),
        *more,
    ]
    return (
        b"II*\0"
        + struct.pack("<IH", 8, len(tags))
        + b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
        + bytes(4)
        + struct.pack(f"<{2 * n}I", *offsets, *map(len, strips))
        + b"".join(strips)
    )


def gif(screen, frame, data=bytes([2, 2, 0x4C, 1, 0])):
    """A GIF of one frame; the default data is a single pixel."""
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", *screen, 0x80, 0, 0)
        + bytes(6)
        + b","
        + struct.pack("<HHHHB", 0, 0, *frame, 0)
        + data
        + b";"
    )


def bmp(width, height, data=b""):
    return (
        b"BM"
        + struct.pack("<IHHI", 54 + len(data), 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        + data
    )


def webp(width, height):
    """A WebP animation of one frame of 4×4 pixels on a canvas of any size."""

    def chunk(kind, data):
        return kind + struct.pack("<I", len(data)) + data

    canvas = b"\2\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frame = bytes(6) + b"\3\0\0\3\0\0" + bytes(4) + encode(Image.new("RGB", (4, 4)), "WEBP")[12:]
    return chunk(
        b"RIFF", b"WEBP" + chunk(b"VP8X", canvas) + chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", frame)
    )


def jpeg(width, height):
    data = encode(Image.new("RGB", (8, 8)), "JPEG")
    at = data.index(b"\xff\xc0") + 5  # of the frame header's height and width
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def avif(width, height):
    """A good AVIF whose header gives another size."""
    data = encode(Image.new("RGB", (8, 8)), "AVIF")
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", width, height) + data[at + 8 :]


def exif(*entries):
    """An EXIF block of (tag, type, count, four bytes)."""
    return (
        b"Exif\0\0II*\0\x08\0\0\0"
        + struct.pack("<H", len(entries))
        + b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
        + bytes(4)
    )


def orientation(value):
    return 0x0112, 3, 1, struct.pack("<HH", value, 0)


STORED = {  # format -> modes that it keeps, and how far its pixels may stray
    "PNG": ("1 L P LA RGB RGBA I;16 I;16B", 0),
    "TIFF": ("1 L P PA LA RGB RGBA RGBX CMYK LAB I I;16 I;16B I;16L F", 0),
    "BMP": ("1 L P RGB", 0),
    "GIF": ("1 L P RGB RGBA", 0),
    "WEBP": ("1 L P LA RGB RGBA RGBX", 12),
    "JPEG": ("1 L RGB RGBX CMYK YCbCr", 12),
    "AVIF": ("1 L P LA RGB RGBA RGBX", 12),
}


def in_mode(mode):
    """A picture in a mode: red or dark on the left; bright, and transparent where the mode can, on
    the right."""
    half = Image.new("L", (16, 16), 255)
    half.paste(0, (0, 0, 8, 16))
    if mode in ("I", "F") or mode.startswith("I;16"):
        values = (
            np.asarray(half).astype({"F": "<f4", "I": "<i4", "I;16B": ">u2"}.get(mode, "<u2")) * 128
        )
        return Image.frombytes(mode, half.size, values.tobytes())
    if mode == "LAB":
        return Image.merge("LAB", [half, *[Image.new("L", half.size, 128)] * 2])
    image = Image.new("RGBA", (16, 16), (200, 10, 10, 255))
    image.paste((120, 240, 20, 0), (8, 0, 16, 16))
    if mode in ("RGBA", "LA"):
        return image.convert(mode)
    if mode == "PA":
        return image.convert("RGB").quantize().convert("PA")
    return image.convert("RGB").quantize() if mode == "P" else image.convert("RGB").convert(mode)


def corpus():
    """name -> the bytes of a good file, over formats, modes and ways to compress."""
    image, gray16 = (
        photo(),
        Image.fromarray(np.arange(60 * 70, dtype=np.uint16).reshape(60, 70) * 15),
    )
    files = {
        f"jpeg {name}": encode(im, "JPEG", **options)
        for name, im, options in (
            ("plain", image, {}),
            ("progressive", image, {"progressive": True}),
            ("gray", image.convert("L"), {}),
            ("cmyk", image.convert("CMYK"), {}),
            ("exif", image, {"exif": exif(orientation(6), (282, 5, 1, bytes(4)))}),
        )
    }
    files["mpo"] = encode(image, "MPO", save_all=True, append_images=[image])
    files |= {
        f"png {name}": encode(im, "PNG", **options)
        for name, im, options in (
            ("rgb", image, {}),
            ("palette", image.quantize(), {"transparency": 0}),
            ("16 bit", gray16, {}),
            ("1", image.convert("1"), {}),
            ("animated", image, {"save_all": True, "append_images": [image.rotate(9)]}),
        )
    }
    files |= {
        f"webp {name}": encode(im, "WEBP", **options)
        for name, im, options in (
            ("lossy", image, {}),
            ("lossless", image, {"lossless": True}),
            ("alpha", image.convert("RGBA"), {}),
            ("animated", image, {"save_all": True, "append_images": [image.rotate(9)]}),
        )
    }
    files |= {
        f"avif {name}": encode(im, "AVIF", speed=10, **options)
        for name, im, options in (
            ("plain", image, {}),
            ("alpha", image.convert("RGBA"), {}),
            ("animated", image, {"save_all": True, "append_images": [image.rotate(9)]}),
        )
    }
    files["gif"] = encode(image, "GIF")
    files["gif animated"] = encode(image, "GIF", save_all=True, append_images=[image.rotate(9)])
    files |= {f"bmp {mode}": encode(image.convert(mode), "BMP") for mode in ("RGB", "P", "1", "L")}
    files |= {
        f"tiff {name}": encode(image, "TIFF", **({"compression": name} if name != "raw" else {}))
        for name in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg")
    }
    files["tiff group4"] = encode(image.convert("1"), "TIFF", compression="group4")
    files["tiff 16 bit"] = encode(gray16, "TIFF")
    rows = [np.asarray(image.convert("L"))[i : i + 15].tobytes() for i in range(0, 60, 15)]
    files["tiff strips"] = tiff(70, 60, rows)
    files["tiff deflate strips"] = tiff(
        70, 60, [zlib.compress(strip) for strip in rows], compression=8
    )
    return files


CORPUS = corpus()


BOMBS = {
    "png": png(100_000, 100_000),
    "gif": gif((65535, 65535), (65535, 65535)),
    "gif frame": gif((1, 1), (65535, 65535)),
    "tiff": tiff(100_000, 100_000, [b"\0"]),
    "bmp": bmp(100_000, 100_000),
    "bmp upside down": bmp(100_000, -100_000),
    "webp": webp(16384, 16384),
    "webp larger": webp(2**24, 200),
    "jpeg": jpeg(65500, 65500),
    "avif": avif(16000, 16000),
    "just above png": png(9460, 9460),
    "just above gif": gif((9460, 9460), (9460, 9460)),
    "just above gif frame": gif((1, 1), (9460, 9460)),
    "just above tiff": tiff(9460, 9460, [b"\0"]),
    "just above bmp": bmp(9460, 9460),
    "just above jpeg": jpeg(9460, 9460),
    "just above avif": avif(9460, 9460),
    "just above webp": webp(9460, 9460),
    "a long line": png(1_000_001, 1),
    "a high line": png(1, 1_000_001),
}


NO_IMAGES = {
    "empty": b"",
    "a byte": b"\0",
    "text": b"hello\n",
    "html": b"<html></html>",
    "zip": b"PK\3\4" + bytes(99),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"></svg>',
    "psd": b"8BPS\0\1" + bytes(100),
    "zeros": bytes(10_000),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "avif": b"\0\0\0\x1cftypavif" + bytes(50),
    "heic": b"\0\0\0\x18ftypheic" + bytes(50),
}


# ---------------------------------------------------------------- a folder full of all of it
NAMES = [
    "line\nbreak.jpg",
    "tab\tand\x1b[31mred\x07.jpg",
    "'single' \"double\" `back`.jpg",
    "<img>etc<box>.jpg",
    "<|endoftext|>.png",
    "写真 – ü.png",
    "\u202egnp.jpg",
    "a\u2028b.jpg",
    os.fsdecode(b"\xff\xfe.png"),
    "-rf.jpg",
    "%s{0}.jpg",
    " .jpg",
    "a.b.c..jpg",
    "...jpg",
    ".hidden.jpg",
    "n" * 250 + ".jpg",
    "UPPER.JPG",
]


def make_corpus(folder):
    """Write more than 300 files into folder/images, tars, manifests and lists beside it."""
    (folder / "images").mkdir(parents=True)
    make_images(folder / "images")
    make_oddities(folder / "images" / "odd")
    make_tars(folder)
    make_lines(folder)


def arguments(folder):
    """What a command is given to get at everything that make_corpus wrote."""
    others = sorted(str(path) for path in folder.iterdir() if path.name != "images")
    return [str(folder / "images"), *others, str(folder / "images" / "missing.jpg")]


def make_images(folder):
    """Every mode in every orientation; cut, damaged and misnamed files of every format."""
    rng = random.Random(0)
    for fmt in ("PNG", "TIFF", "WEBP", "JPEG", "AVIF"):
        (folder / fmt).mkdir()
        for mode in STORED[fmt][0].split():
            for turn in range(1, 9):
                tag = Image.Exif()
                tag[0x0112] = turn
                options = {"speed": 10} if fmt == "AVIF" else {}
                data = encode(in_mode(mode), fmt, exif=tag, **options)
                write(folder / fmt / f"{mode.replace(';', '')} {turn}.{fmt.lower()}", data)
    for kind in ("whole", "cut", "damaged"):
        (folder / kind).mkdir()
    for number, (name, data) in enumerate(CORPUS.items()):
        suffix = (".jpg", ".png", ".webp", ".gif", ".tif", ".avif")[number % 6]  # mostly wrong
        write(folder / "whole" / f"{name}{suffix}", data)
        for _ in range(3):
            length = rng.randrange(len(data))
            write(folder / "cut" / f"{name} at {length}.jpg", data[:length])
        damaged = bytearray(data)
        for _ in range(9):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        write(folder / "damaged" / f"{name}.png", bytes(damaged))


def make_oddities(folder):
    """Bombs, files that are none, names, links, pipes, and folders called like images."""
    folder.mkdir()
    good = CORPUS["jpeg plain"]
    for name, data in BOMBS.items():
        write(folder / f"bomb {name}.png", data)
    for name, data in NO_IMAGES.items():
        write(folder / f"not {name}.jpg", data)
    for name in NAMES:
        write(folder / name, good)
        write(folder / f"bad{name[-200:]}", b"bad")
    write(folder / "1x1.bmp", encode(Image.new("RGB", (1, 1)), "BMP"))
    write(folder / "long.png", encode(Image.new("L", (5000, 1)), "PNG"))
    write(folder / "huge.webp", b"RIFF")
    os.truncate(folder / "huge.webp", 2**30 + 1)  # takes no room on the disk
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    write(folder / "folder.jpg" / "inside.jpg", good)
    (folder / "empty.jpg").mkdir()
    for name in ("unreadable.jpg", "unreadable"):
        path = folder / name
        write(path, good) if name.endswith(".jpg") else path.mkdir()
        path.chmod(0)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "link.jpg").symlink_to("1x1.bmp")
    (folder / "link to folder.jpg").symlink_to("folder.jpg")
    (folder / "loop").symlink_to(".")
    (folder / "device.jpg").symlink_to("/dev/zero")
    deep = folder.joinpath(*"d" * 60)
    deep.mkdir(parents=True)
    write(deep / "deep.jpg", good)


# ---------------------------------------------------------------- tars
def tar(*members, end=True, **options):
    """(name, bytes, or the type and link of a TarInfo) -> the bytes of a tar."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", errors="surrogateescape", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = data
                archive.addfile(info)
        length = archive.offset
    return file.getvalue() if end else file.getvalue()[:length]


def with_size(data, size, at=0):
    """A tar with another size in the header at a place, its checksum made right."""
    header = bytearray(data[at : at + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


def tars():
    """name -> the bytes of a tar, or of what is called one."""
    good, small = CORPUS["jpeg plain"], CORPUS["png palette"]
    text, row = b"a caption\n", b'{"width": 70, "nan": NaN, "caption": "old"}'
    sample = [("0.jpg", good), ("0.txt", text), ("0.json", row)]
    two = tar(*sample, *[(f"1{name[1:]}", data) for name, data in sample])
    middle = tar(*sample, end=False)
    sparse = bytearray(tar(("s.jpg", (tarfile.GNUTYPE_SPARSE, "")), format=tarfile.GNU_FORMAT))
    types = {
        "symlink.jpg": (tarfile.SYMTYPE, "/etc/passwd"),
        "symlink up.jpg": (tarfile.SYMTYPE, "../../../etc/passwd"),
        "hard link.jpg": (tarfile.LNKTYPE, "0.jpg"),
        "character.jpg": (tarfile.CHRTYPE, ""),
        "block.jpg": (tarfile.BLKTYPE, ""),
        "pipe.jpg": (tarfile.FIFOTYPE, ""),
        "folder.jpg": (tarfile.DIRTYPE, ""),
        "unknown.jpg": (b"9", ""),
    }
    traversal = [
        "../../evil.jpg",
        "/etc/evil.jpg",
        "a/../../evil.jpg",
        "..",
        "./dot.jpg",
        "x//y.jpg",
    ]
    files = {
        "good": two,
        "every file": tar(*((f"{i:03d}.jpg", CORPUS[name]) for i, name in enumerate(CORPUS))),
        "traversal": tar(*((name, good) for name in traversal), *sample),
        "types": tar(*sample, *types.items(), ("last.jpg", good)),
        "sparse": bytes(sparse),
        "duplicates": tar(*sample, *sample, ("0.jpg", small), ("0.jpg#2", types["pipe.jpg"])),
        "two images": tar(("0.jpg", good), ("0.png", small), ("0.mask.png", small), *sample[1:]),
        "no image": tar(*sample[1:], ("1.jpg", good), ("README", b"hello"), ("2.txt", text)),
        "bad json": tar(sample[0], ("0.json", b"{"), ("1.jpg", good), ("1.json", b"[1]")),
        "deep json": tar(sample[0], ("0.json", b"[" * 100_000)),
        "latin": tar(sample[0], ("0.txt", b"caf\xe9"), ("1.jpg", good), ("1.txt", b"")),
        "bombs": tar(*((f"{name}.png", data) for name, data in BOMBS.items())),
        "names": tar(*((name, good) for name in NAMES), *sample),
        "names gnu": tar(*((name, good) for name in NAMES), format=tarfile.GNU_FORMAT),
        "zero": tar(("b.jpg", good), ("a.jpg", good), pax_headers={"path": "a\0b.jpg"}),
        "long name": tar(("a/" * 500 + "long.jpg", good), ("b" * 3000 + ".jpg", good)),
        "other kinds": tar(("a.mp4", b"x"), ("b.heic", b"x")),
        "empty": b"",
        "no members": tar(),
        "text": b"this is not a tar\n" * 100,
        "compressed": gzip.compress(two),
        "no end": middle,
        "joined": two + two,
        "cut in header": two[: len(middle) + 300],
        "cut in data": two[: len(middle) + 700],
        "cut in txt": two[: two.index(b"1.txt") + 515],
        "cut in the first": two[:900],
        "damaged header": two.replace(b"1.jpg", b"1.jpX"),
        "a hole": middle + bytes(1024) + middle,
        "negative size": middle + with_size(two, b"\xff" * 12),
        "backwards": middle + with_size(two, b"\xff" * 10 + b"\xf0\0"),
        "endless size": with_size(two, b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7),
        "endless name": with_size(
            tar(("b" * 300, b""), format=tarfile.GNU_FORMAT), b"77777777777\0"
        ),
        "pax chain": tar(("x", (tarfile.XHDTYPE, "")), end=False) * 3000,
    }
    rng = random.Random(1)
    for _ in range(12):
        length = rng.randrange(1, len(two))
        files[f"cut at {length}"] = two[:length]
        damaged = bytearray(two)
        for _ in range(30):
            at = rng.choice((0, len(middle), len(middle) + two[len(middle) :].index(b"1.txt")))
            damaged[at + rng.randrange(512)] = rng.randrange(256)
        files[f"damaged as {length}"] = bytes(damaged)
    return files


def make_tars(folder):
    for name, data in tars().items():
        write(folder / f"{name}.tar", data)
    write(folder / "whole.tar.gz", gzip.compress(tars()["good"]))
    (folder / "folder.tar").mkdir()
    write(folder / "folder.tar" / "0.jpg", CORPUS["jpeg plain"])
    (folder / "loop.tar").symlink_to("loop.tar")
    os.mkfifo(folder / "pipe.tar")


# ---------------------------------------------------------------- manifests and lists
def manifest_lines():
    """Lines of a manifest, good, odd and broken."""
    good, turned = "images/whole/jpeg plain.jpg", "images/JPEG/RGB 6.jpeg"
    rows = [
        {"image": good, "caption": "old", "id": 7, "tags": ["a", {"b": None}]},
        {"file_name": turned, "text": "old"},
        {"image_path": good, "captions": ["a", "b"]},
        {"image": None, "file_name": good, "image_path": "unused"},
        {"image": good},
        {"image": "../../../../etc/passwd"},
        {"image": "/etc/passwd"},
        {"image": "https://example.org/a.jpg"},
        {"image": "images"},
        {"image": "images/odd/pipe.jpg"},
        {"image": "missing.jpg"},
        {"image": "n" * 300 + ".jpg"},
        {"image": "n" * 30_000 + ".jpg"},
        {"image": "a\0b.jpg"},
        {"image": "half \ud800 a pair.jpg"},
        {"image": "images/odd/\udcff\udcfe.png"},
        {"image": "."},
        {"image": ""},
        {"image": {"bytes": "aaaa"}},
        {"image": [good]},
        {"caption": "no image"},
        {},
        [good],
        good,
        1,
        None,
    ]
    lines = [json.dumps(row).encode() for row in rows]
    lines += [
        b"",
        b"  ",
        b"{",
        b'{"image": "a.jpg"',
        b"not json",
        b"\xff\xfe{}",
        b"\0",
        b"[" * 99_999,
    ]
    lines += [b'{"image": "a.jpg", "n": ' + b"9" * 9999 + b"}"]
    lines += [json.dumps({"image": good, "nan": float("nan")}).encode()]
    lines += [b'{"image": "a.jpg", "huge": [1e999, -1e999, Infinity], "half": "\\ud800"}']
    lines += [
        '{"image": "caf\u00e9.jpg"}'.encode("latin-1"),
        b'{"image": "a.jpg"} {"image": "b.jpg"}',
    ]
    return lines


def list_lines():
    """Lines of a list, the same."""
    lines = ["images/whole/jpeg plain.jpg", "images/odd/1x1.bmp", "images/odd/1x1.bmp", "", " "]
    lines += [
        "images/JPEG",
        "good.tar",
        "list.txt",
        "manifest.jsonl",
        "whole.tar.gz",
        "/etc/passwd",
    ]
    lines += [
        "..",
        ".",
        "/",
        "missing.jpg",
        "a\0b",
        "n" * 300,
        "n" * 30_000,
        "../../x.jpg",
        "a/../b",
    ]
    lines += [f"images/odd/{name}" for name in NAMES if "\n" not in name]
    return [os.fsencode(line) for line in lines]


def make_lines(folder):
    manifest, paths = manifest_lines(), list_lines()
    write(folder / "manifest.jsonl", b"\n".join(manifest))  # the last line is torn
    write(folder / "windows.ndjson", b"\xef\xbb\xbf" + b"\r\n".join(manifest[:5]) + b"\r\n")
    write(folder / "utf-16.jsonl", manifest[0].decode().encode("utf-16"))
    write(folder / "list.txt", b"\n".join(paths) + b"\n")
    write(folder / "windows.txt", b"\xef\xbb\xbf" + b"\r\n".join(paths[:3]) + b"\r\n")
    for name in ("empty.jsonl", "empty.txt"):
        write(folder / name, b"")
        write(folder / f"blank {name}", b"\n\n \n")
    (folder / "folder.txt").mkdir()
    (folder / "folder.jsonl").symlink_to("missing")
    with contextlib.suppress(OSError):
        write(folder / ("n" * 251 + ".txt"), paths[0])
