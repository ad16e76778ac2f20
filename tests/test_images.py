"""plumbing/images.py: open_image against every mode, format and bad file we could think of."""

import os
import random
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from corpus import (
    BOMBS,
    CORPUS,
    NO_IMAGES,
    STORED,
    bmp,
    encode,
    exif,
    gif,
    in_mode,
    jpeg,
    orientation,
    photo,
    png,
    png_chunk,
    tiff,
    write,
)
from PIL import Image, ImageFile

from plumbing.errors import InputError
from plumbing.images import MAX_BYTES, MAX_PIXELS, find_images, open_image, to_rgb

WHITE = (255, 255, 255)

pytestmark = pytest.mark.filterwarnings("error")  # a warning that open_image lets out is a failure


# What libtiff, which Pillow does not silence, writes about a damaged TIFF: "ZIPDecode: Decoding
# error ...".
LIBTIFF = re.compile(r"\w+(\.tif)?: .+")


def assert_silent(out, err, tiff=True):
    """Nothing is printed, not even by C code, except libtiff's remarks on TIFFs: the error is in
    the InputError."""
    assert out == ""
    assert [line for line in err.splitlines() if not (tiff and LIBTIFF.fullmatch(line))] == []


@pytest.fixture(autouse=True)
def silent(capfd, request):
    yield
    assert_silent(*capfd.readouterr(), tiff="tiff" in request.node.name)


def outcome(path):
    """An RGB image, or the text of the InputError: one line that names the file. Any other
    exception is a failure."""
    try:
        image = open_image(path)
    except InputError as error:
        message = str(error)
        assert message.isprintable() and message.startswith((str(path), repr(str(path))))
        return message
    assert image.mode == "RGB" and min(image.size) > 0
    return image


def refused(path, why):
    message = outcome(path)
    return isinstance(message, str) and why in message


def difference(a, b):
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()


# ---------------------------------------------------------------- good files
@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket", "camera"])
def test_real_photographs(name, tmp_path):
    """Those in scikit-image; nothing is downloaded."""
    image = Image.fromarray(getattr(skimage.data, name)())
    got = open_image(write(tmp_path / "a.png", encode(image, "PNG")))
    assert difference(got, image.convert("RGB")) == 0
    as_jpeg = open_image(write(tmp_path / "a.jpg", encode(image, "JPEG", quality=90)))
    assert as_jpeg.size == image.size and as_jpeg.mode == "RGB"


@pytest.mark.parametrize("name", CORPUS)
def test_bytes_are_opened_like_the_file(name, tmp_path):
    data = CORPUS[name]
    assert difference(open_image(data, "x"), open_image(write(tmp_path / "a", data))) == 0
    for part in (data[: len(data) // 2], data[:20], b""):
        try:
            from_bytes = open_image(part, "in\nside.tar/a.jpg").tobytes()
        except InputError as error:
            from_bytes = str(error)
            assert from_bytes.startswith("'in\\nside.tar/a.jpg': cannot be read")
        got = outcome(write(tmp_path / "a", part))
        assert isinstance(from_bytes, str) if isinstance(got, str) else from_bytes == got.tobytes()


# ---------------------------------------------------------------- modes
MODES = [  # mode, value of all pixels, and the colour that a viewer should see
    ("1", 255, WHITE),
    ("1", 0, (0, 0, 0)),
    ("L", 100, (100,) * 3),
    ("LA", (100, 255), (100,) * 3),
    ("LA", (100, 128), (177,) * 3),
    ("LA", (100, 0), WHITE),
    ("La", (50, 128), (177,) * 3),
    ("PA", (0, 0), WHITE),
    ("RGB", (10, 200, 30), (10, 200, 30)),
    ("RGBX", (10, 200, 30, 77), (10, 200, 30)),
    ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
    ("RGBA", (200, 0, 0, 128), (227, 127, 127)),
    ("RGBA", (200, 0, 0, 0), WHITE),
    ("RGBa", (100, 0, 0, 128), (227, 127, 127)),
    ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ("YCbCr", (76, 85, 255), (254, 0, 0)),
    ("HSV", (85, 255, 255), (0, 255, 0)),
    ("LAB", (255, 128, 128), WHITE),
    ("LAB", (125, 164, 163), (180, 90, 60)),
    ("I", 200, (200,) * 3),
    ("I", 65535, WHITE),
    ("I", 1000, (4,) * 3),
    ("I", 2**30, WHITE),
    ("I", -7, (0, 0, 0)),
    ("F", 0.5, (128,) * 3),
    ("F", 200.0, (200,) * 3),
    ("F", 30000.0, (117,) * 3),
    ("F", 3e38, WHITE),
    ("F", -1.0, (0, 0, 0)),
    ("F", float("nan"), (0, 0, 0)),
    ("F", float("inf"), WHITE),
    ("F", float("-inf"), (0, 0, 0)),
    *(
        (mode, value, (gray,) * 3)
        for mode in ("I;16", "I;16L", "I;16B", "I;16N")
        for value, gray in ((0, 0), (200, 1), (32768, 128), (65535, 255))
    ),
]


@pytest.mark.parametrize("mode, value, expected_color", MODES)
def test_modes(mode, value, expected_color):
    image = Image.new(mode, (5, 4), value)
    rgb = to_rgb(image)
    assert rgb.mode == "RGB" and rgb.size == (5, 4)
    assert difference(rgb, np.full((4, 5, 3), expected_color)) <= 2


def test_every_mode_of_pillow_is_tested():
    assert set(Image.MODES) == {mode for mode, _, _ in MODES} | {"P"}


@pytest.mark.parametrize(
    "transparency, expected_pixels",
    [
        (None, [(10, 20, 30), (200, 0, 0)]),
        (1, [(10, 20, 30), WHITE]),
        (bytes([128, 0]), [(132, 137, 142), WHITE]),
        (bytes([0]), [WHITE, (200, 0, 0)]),
    ],
)
def test_palettes(transparency, expected_pixels, tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putdata([0, 1])
    if transparency is not None:
        image.info["transparency"] = transparency
    assert difference(to_rgb(image), [expected_pixels]) <= 1
    assert (
        difference(open_image(write(tmp_path / "a.png", encode(image, "PNG"))), [expected_pixels])
        <= 1
    )


@pytest.mark.parametrize(
    "fmt, mode", [(fmt, mode) for fmt, (modes, _) in STORED.items() for mode in modes.split()]
)
def test_modes_through_files(fmt, mode, tmp_path):
    image = in_mode(mode)
    assert image.mode == mode
    options = (
        {"quality": 95, "lossless": mode != "LA"}
        if fmt == "WEBP"
        else {"quality": 95}
        if fmt == "JPEG"
        else {}
    )
    got = open_image(
        write(tmp_path / "a.jpg", encode(image, fmt, **options))
    )  # the name does not matter
    assert got.size == (16, 16)
    wanted = to_rgb(image)
    edges = [3, 12]  # away from the border, where a JPEG smears
    assert difference(np.asarray(got)[8, edges], np.asarray(wanted)[8, edges]) <= STORED[fmt][1]
    assert (
        difference(wanted.getpixel((3, 8)), wanted.getpixel((12, 8))) > 50
    )  # there was something to get wrong


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_not_clipped(fmt, tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    got = np.asarray(open_image(write(tmp_path / "deep", encode(Image.fromarray(values), fmt))))
    expected = np.round(values / 257).astype(np.uint8)
    assert (got == expected[..., None]).all()


def test_transparency_that_is_no_alpha_channel(tmp_path):
    rows = b"\0" + struct.pack(">2H", 1000, 60000)
    hidden = png_chunk(b"tRNS", struct.pack(">H", 1000))
    got = open_image(write(tmp_path / "a.png", png(2, 1, rows, 16, 0, hidden)))
    assert difference(got, [[WHITE, (233, 233, 233)]]) == 0
    hidden = png_chunk(b"tRNS", struct.pack(">H", 0x40))
    got = open_image(write(tmp_path / "a.png", png(2, 1, b"\0\x40\x50", 8, 0, hidden)))
    assert difference(got, [[WHITE, (80, 80, 80)]]) == 0
    hidden = png_chunk(b"tRNS", struct.pack(">3H", 9, 9, 9))
    got = open_image(
        write(tmp_path / "a.png", png(2, 1, b"\0" + bytes([9, 9, 9, 8, 9, 9]), 8, 2, hidden))
    )
    assert difference(got, [[WHITE, (8, 9, 9)]]) == 0


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_animations_give_their_first_frame(fmt, tmp_path):
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    path = write(tmp_path / "moving", data)
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert difference(open_image(path), frames[0]) <= (12 if fmt == "AVIF" else 0)


def test_a_phone_photo_with_a_second_picture_inside(tmp_path):
    data = encode(photo(), "MPO", save_all=True, append_images=[photo().rotate(180)])
    assert b"MPF\0" in data
    got = open_image(write(tmp_path / "a.jpg", data))
    assert np.abs(np.asarray(got, int) - np.asarray(photo(), int)).mean() < 12


# ---------------------------------------------------------------- EXIF
def stored_as(pixels, value):
    """How EXIF says upright pixels are stored, from where row 0 and column 0 of the file are
    seen."""
    seen = {
        1: "top left",
        2: "top right",
        3: "bottom right",
        4: "bottom left",
        5: "left top",
        6: "right top",
        7: "right bottom",
        8: "left bottom",
    }[value]
    row, column = seen.split()
    if row in ("left", "right"):
        pixels = pixels.swapaxes(0, 1)
    return pixels[
        :: -1 if row in ("bottom", "right") else 1, :: -1 if column in ("bottom", "right") else 1
    ]


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "TIFF", "JPEG", "AVIF", "16 bit PNG"])
def test_all_orientations_come_upright(fmt, value, tmp_path):
    pixels = np.asarray(photo(32, 16))
    if fmt == "16 bit PNG":
        pixels = pixels[..., 0].astype(np.uint16) * 257
    tag = Image.Exif()
    tag[0x0112] = value
    options = {
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 100, "subsampling": 0},
        "AVIF": {"quality": 100, "subsampling": "4:4:4", "speed": 10},
    }.get(fmt, {})
    stored = Image.fromarray(np.ascontiguousarray(stored_as(pixels, value)))
    got = open_image(write(tmp_path / "a", encode(stored, fmt.split()[-1], exif=tag, **options)))
    assert difference(got, to_rgb(Image.fromarray(pixels))) <= (
        12 if fmt in ("JPEG", "AVIF") else 0
    )


@pytest.mark.parametrize(
    "entry",
    [
        (256, 2, 4, b"abc\0"),
        (256, 1, 1, b"\xff" * 4),
        (258, 4, 1, b"\xff" * 4),
        (269, 11, 1, b"\xff" * 4),
        (282, 2, 4, b"abc\0"),
        (282, 11, 1, b"\xff" * 4),
        (700, 3, 1, b"\xff" * 4),
        (34665, 8, 1, b"\xff" * 4),
    ],
)
def test_an_odd_tag_does_not_hide_the_orientation(entry, tmp_path):
    """Pillow's own exif_transpose fails on each of these, after it has rotated the image, and the
    rotation is lost."""
    image = photo(40, 24)
    data = encode(image, "JPEG", exif=exif(orientation(6), entry))
    assert open_image(write(tmp_path / "a.jpg", data)).size == (24, 40)


@pytest.mark.parametrize(
    "block",
    [
        exif(orientation(0)),
        exif(orientation(9)),
        exif(orientation(65535)),
        exif((0x0112, 2, 4, b"six\0")),
        exif((0x0112, 12, 1, bytes(4))),
        exif((0x0112, 5, 1, b"\xff" * 4)),
        exif((0x0112, 3, 2**31, bytes(4))),
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0" + b"\xff" * 500,
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"nonsense",
    ],
)
def test_broken_exif_leaves_the_picture_as_it_is(block, tmp_path):
    image = photo(40, 24)
    for fmt in ("JPEG", "PNG", "WEBP"):
        got = outcome(write(tmp_path / "a", encode(image, fmt, exif=block)))
        assert (
            got.size == (40, 24)
            and np.abs(np.asarray(got, int) - np.asarray(image, int)).mean() < 12
        )


# ---------------------------------------------------------------- damaged files
@pytest.mark.parametrize("name", CORPUS)
def test_a_file_that_is_cut_off_is_an_error(name, tmp_path):
    """A whole picture may still come of a cut file (its second frame is gone), one with missing
    pixels never."""
    data, path = CORPUS[name], tmp_path / "cut.jpg"
    whole = np.asarray(open_image(write(path, data)))
    lengths = sorted(
        {
            *range(0, len(data), len(data) // 40 + 1),
            *range(len(data) - 9, len(data)),
            1,
            2,
            3,
            8,
            12,
            30,
        }
    )
    errors = 0
    for length in lengths:
        got = outcome(write(path, data[:length]))
        errors += isinstance(got, str)
        assert isinstance(got, str) or np.array_equal(got, whole), f"cut at {length} of {len(data)}"
    several_frames = "animated" in name or name == "mpo"
    assert errors >= (5 if several_frames else len(lengths) - 12)


@pytest.mark.parametrize("name", CORPUS)
def test_random_damage_is_an_image_or_an_error(name, tmp_path):
    rng, path = random.Random(name), tmp_path / "damaged"
    outcomes = set()
    for _ in range(40):
        data = bytearray(CORPUS[name])
        for _ in range(rng.choice((1, 1, 3, 20))):
            at = rng.randrange(min(len(data), rng.choice((64, 400, len(data)))))
            change = rng.random()
            if change < 0.7:
                data[at] = rng.randrange(256)
            elif change < 0.8:
                del data[at : at + rng.randrange(1, 40)]
            elif change < 0.9:
                data[at:at] = rng.randbytes(rng.randrange(1, 40))
            else:
                data[at : at + 40] = rng.choice((bytes(40), b"\xff" * 40))
        outcomes.add(type(outcome(write(path, bytes(data)))))
    assert str in outcomes or name.startswith(("bmp", "jpeg gray", "tiff raw"))


def test_random_bytes_behind_every_magic_number(tmp_path):
    rng = random.Random(0)
    magics = (
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\xff\0\0\0WEBPVP8 ",
        b"GIF89a",
        b"BM",
        b"II*\0\x08\0\0\0",
        b"MM\0*\0\0\0\x08",
        b"II+\0\x08\0\0\0",
        b"\0\0\0\x20ftypavif",
        b"",
    )
    for magic in magics:
        for length in (0, 1, 5, 50, 500):
            assert isinstance(
                outcome(write(tmp_path / "a.png", magic + rng.randbytes(length))), str
            )


def test_a_wrong_checksum(tmp_path):
    data = CORPUS["png rgb"]
    for kind in (b"IHDR", b"IDAT"):
        at = data.index(kind)
        length = int.from_bytes(data[at - 4 : at], "big")
        checksum = at + 4 + length
        damaged = bytearray(data)
        damaged[checksum] ^= 255
        got = outcome(write(tmp_path / "a.png", bytes(damaged)))
        assert isinstance(got, str) or np.array_equal(
            got, photo()
        )  # pixels that are right may pass
        damaged[at + 4 + length // 2] ^= 255
        assert isinstance(outcome(write(tmp_path / "a.png", bytes(damaged))), str)


def test_huge_text_chunks(tmp_path):
    """Text that inflates a thousandfold is refused or left alone, and never fills the memory."""
    bomb = zlib.compress(bytes(30_000_000))
    started = time.perf_counter()
    for kind, text in (
        (b"zTXt", b"a\0\0" + bomb),
        (b"iTXt", b"a\0\1\0\0\0" + bomb),
        (b"iCCP", b"a\0\0" + bomb),
        (b"tEXt", b"a\0" + b"x" * 3_000_000),
        (b"tEXt", b"no end"),
    ):
        got = outcome(
            write(tmp_path / "a.png", png(1, 1, b"\0\1\2\3", extra=png_chunk(kind, text)))
        )
        assert isinstance(got, str) or got.getpixel((0, 0)) == (1, 2, 3)
    assert time.perf_counter() - started < 5


# ---------------------------------------------------------------- bombs
@pytest.fixture
def decoded(monkeypatch):
    """A list that grows when Pillow makes room for an image's pixels."""
    calls, prepare = [], ImageFile.ImageFile.load_prepare
    monkeypatch.setattr(
        ImageFile.ImageFile,
        "load_prepare",
        lambda self: (calls.append(self.size), prepare(self))[1],
    )
    return calls


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_their_header(name, tmp_path, decoded):
    started = time.perf_counter()
    assert refused(write(tmp_path / "bomb.jpg", BOMBS[name]), "allowed")
    assert decoded == [] and time.perf_counter() - started < 3


def test_a_picture_just_below_the_limit_is_decoded(tmp_path, decoded):
    assert 9459**2 < MAX_PIXELS < 9460**2
    assert refused(
        write(tmp_path / "a.png", png(9459, 9459)), "damaged"
    )  # no pixels in it, found by decoding
    assert decoded == [(9459, 9459)]


def test_a_gif_of_very_many_frames_costs_one(tmp_path, decoded):
    data = CORPUS["gif"]
    frame = data[data.index(b",") : -1] if data[13:14] == b"," else data[13 + 768 : -1]
    many = data[:-1] + frame * 3000 + b";"
    assert len(many) > 5_000_000
    got = open_image(write(tmp_path / "a.gif", many))
    assert decoded == [(70, 60)]
    assert np.array_equal(got, open_image(write(tmp_path / "b.gif", data)))


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    path = write(tmp_path / "a.webp", b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(20))
    os.truncate(path, MAX_BYTES + 1)  # sparse: takes no room on the disk
    started = time.perf_counter()
    assert refused(path, "allowed")
    assert time.perf_counter() - started < 3  # reading it takes 7 s


@pytest.mark.parametrize(
    "data",
    [
        png(0, 5),
        png(5, 0),
        gif((0, 0), (0, 0)),
        bmp(0, 5),
        bmp(5, 0),
        tiff(0, 5, [b""]),
        jpeg(0, 9),
        jpeg(9, 0),
    ],
)
def test_no_pixels_at_all(data, tmp_path):
    assert isinstance(outcome(write(tmp_path / "a.png", data)), str)


# ---------------------------------------------------------------- what is no image
@pytest.mark.parametrize(
    "fmt",
    [
        "PPM",
        "EPS",
        "ICO",
        "TGA",
        "PCX",
        "SGI",
        "JPEG2000",
        "DDS",
        "ICNS",
        "MSP",
        "XBM",
        "DIB",
        "PDF",
    ],
)
def test_other_formats_are_refused_whatever_their_name(fmt, tmp_path):
    image = photo(16, 16).convert("1") if fmt in ("XBM", "MSP") else photo(16, 16)
    for name in ("a.jpg", "a.png", "a"):
        assert refused(
            write(tmp_path / name, encode(image, fmt)), "cannot be read as any of JPEG, PNG"
        )


@pytest.mark.parametrize("data", NO_IMAGES.values(), ids=NO_IMAGES)
def test_what_is_no_image_is_refused(data, tmp_path):
    assert refused(write(tmp_path / "a.jpg", data), "cannot be read as any of JPEG, PNG")


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    assert refused(tmp_path / "folder.jpg", "is a folder")
    assert refused(tmp_path / "missing.jpg", "no such image file")
    assert refused(tmp_path / "missing" / "a.jpg", "no such image file")
    write(tmp_path / "file", b"")
    assert refused(tmp_path / "file" / "a.jpg", "no such image file")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert refused(tmp_path / "loop.jpg", "no such image file")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    assert refused(tmp_path / "dangling.jpg", "no such image file")
    assert refused(tmp_path / ("a" * 300 + ".jpg"), "cannot be read (File name too long)")
    assert refused(Path("a\0b.jpg"), "no such image file")


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", Path("/dev/zero"), Path("/dev/stdin")):
        if not path.is_file():  # stdin may be a file
            started = time.perf_counter()
            assert refused(path, "no such image file")
            assert time.perf_counter() - started < 3


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.png", CORPUS["png rgb"])
    monkeypatch.setattr(Path, "open", denied)  # root, who may run this test, may read anything
    assert outcome(path) == f"{path}: cannot be read (Permission denied)"


def test_a_link_to_an_image_is_an_image(tmp_path):
    path = write(tmp_path / "a.png", CORPUS["png rgb"])
    (tmp_path / "link").symlink_to(path)
    assert difference(open_image(tmp_path / "link"), photo()) == 0
    assert difference(open_image(str(path)), photo()) == 0


@pytest.mark.parametrize(
    "name",
    [
        "line\nbreak.jpg",
        "tab\tand\x1b[31mred\x07.jpg",
        "<img>/etc/passwd</img>",
        "<|endoftext|>.png",
        "写真 – ü.png",
        "\u202egnp.exe",
        "a\u2028b.jpg",
        os.fsdecode(b"\xff\xfe.png"),
        "-rf",
        "%s{0}.jpg",
        " ",
    ],
)
def test_file_names(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    assert difference(open_image(write(path, CORPUS["png rgb"])), photo()) == 0
    assert refused(write(path, b"no image"), "cannot be read as any of")
    path.unlink()
    assert refused(path, "no such image file")


# ---------------------------------------------------------------- folders
def test_folders_are_searched_and_names_do_not_depend_on_where_they_are(tmp_path):
    for name in ("a/z.PNG", "a/sub/b.jpg", "a/notes.txt", "a/c.webp", "b.jpg", "empty/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, b"")
    (tmp_path / "a" / "folder.jpg").mkdir()
    inside = [(tmp_path / "a" / name, name) for name in ("c.webp", "sub/b.jpg", "z.PNG")]
    assert find_images([tmp_path / "a"]) == inside
    missing = tmp_path / ("x" * 300)
    arguments = [str(tmp_path / "b.jpg"), tmp_path / "a", tmp_path / "empty", missing]
    expected = [
        (tmp_path / "b.jpg", "b.jpg"),
        *inside,
        (tmp_path / "empty", "empty"),
        (missing, missing.name),
    ]
    assert find_images(arguments) == expected
    assert refused(tmp_path / "empty", "is a folder without images")


# ---------------------------------------------------------------- all of it, as a program would
def test_a_process_prints_nothing_and_stays_small(tmp_path):
    """In a separate process, where pytest does not catch what Pillow prints, and memory can be
    limited."""
    samples = struct.Struct("<HHII")  # which Pillow would log: seven samples per pixel
    seven = tiff(8, 8, [bytes(448)]).replace(samples.pack(277, 3, 1, 1), samples.pack(277, 3, 1, 7))
    damaged = {"seven": seven, **{f"bomb {name}": data for name, data in BOMBS.items()}}
    for name, data in CORPUS.items():
        half = len(data) // 2
        damaged |= {
            f"cut {name}": data[:half],
            f"hole {name}": data[:half] + bytes(300) + data[half + 300 :],
        }
    for name, data in damaged.items():
        write(tmp_path / name, data)
    program = (
        "import resource, sys; from pathlib import Path; from plumbing import images\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 1_000_000_000,) * 2)\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    try: images.open_image(path); print('image')\n"
        "    except images.InputError as error: print(error)\n"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines)) == (0, len(damaged))
    assert_silent("", done.stderr)
    assert (
        sum(line.startswith(f"{tmp_path}/cut ") for line in lines) >= len(CORPUS) - 4
    )  # all but second frames
    assert sum("allowed" in line for line in lines) == len(BOMBS)
