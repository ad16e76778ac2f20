"""chunking.py: the views against the official preprocessing, against crops by hand, and every
layout."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file

import chunking
from chunking import BOXES, LAYOUTS, views
from plumbing.images import open_image

FIXTURES = Path(__file__).parent / "fixtures"
WHITE = (255, 255, 255)


def photo(width=70, height=60):
    """A picture with smooth and with fine parts."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    smooth = np.stack([3 * y, 2 * x, x + y], axis=-1)
    return Image.fromarray((smooth + noise * (x > 30)[..., None]).clip(0, 255).astype(np.uint8))


def test_view_0_is_the_official_preprocessing_bit_for_bit():
    """Made by the official code from the same pixels; only hashes of its float32 results are
    kept."""
    raw = load_file(FIXTURES / "preproc.safetensors")
    expected_sha256 = (
        "05c98c0b833cf8e522546f2214f54661129ceffd4c000b3ecc0780df6916da66",
        "e71fb9d524c56ae6d6db9b9268de596910cf0c0a6a62d62d2fdf91cabb463abe",
    )
    for i, expected in enumerate(expected_sha256):
        view = views(Image.fromarray(raw[f"{i}.raw"].numpy()))[0]
        assert view.shape == (3, 448, 448) and view.dtype == torch.float32
        assert hashlib.sha256(view.numpy().tobytes()).hexdigest() == expected


def reference(pixels):
    """uint8 (S, S, 3) -> (3, S, S), CLIP's normalisation written once more, in float64."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.from_numpy(((pixels / 255 - mean) / std).transpose(2, 0, 1))


@pytest.mark.parametrize("size", [448, 32, 28, 14])
@pytest.mark.parametrize("shape", [(640, 480), (333, 217), (61, 97)])
def test_crops_are_cut_from_the_original_at_twice_the_size(size, shape):
    image = photo(*shape)
    full = np.asarray(image.resize((2 * size, 2 * size), Image.BICUBIC))
    half = size // 2
    corners = [
        (0, 0),
        (0, size),
        (size, 0),
        (size, size),
        (half, half),
    ]  # top, left of views 1 to 5
    got = views(image, size)
    assert got.shape == (6, 3, size, size) and got.dtype == torch.float32 and got.is_contiguous()
    for view, (top, left) in zip(got[1:], corners):
        assert (view - reference(full[top : top + size, left : left + size])).abs().max() < 1e-6
    whole = np.asarray(image.resize((size, size), Image.BICUBIC))
    assert (got[0] - reference(whole)).abs().max() < 1e-6


def test_views_look_where_they_should():
    """Four quadrants of one colour each and a square on the seam, recognised by colour: no resizing
    to compare with."""
    colors = np.array([[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (200, 200, 0)]], dtype=np.uint8)
    pixels = colors.repeat(150, axis=0).repeat(101, axis=1)  # 300 high, 202 wide
    pixels[135:165, 91:111] = 255
    got = views(Image.fromarray(pixels), 56)
    seen = [
        tuple(((v * chunking.STD + chunking.MEAN) * 255).round().int()[:, 14, 14].tolist())
        for v in got
    ]
    expected_seen = [(200, 0, 0), (200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (200, 0, 0)]
    assert seen == expected_seen
    middle = [
        tuple(((v * chunking.STD + chunking.MEAN) * 255).round().int()[:, 28, 28].tolist())
        for v in got
    ]
    expected_middle = [WHITE, (200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), WHITE]
    assert middle == expected_middle


def test_crops_keep_detail_that_view_0_has_lost():
    noise = np.random.default_rng(1).integers(0, 256, (896, 896, 3), dtype=np.uint8)
    got = views(Image.fromarray(noise))
    assert (got[1] - reference(noise[:448, :448])).abs().max() < 1e-6  # not one pixel was resampled
    assert got[0].std() < 0.7 * got[1].std()


def test_other_boxes_give_as_many_views_of_the_same_size():
    boxes = ((0.125, 0.125, 0.875, 0.875), (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.5))
    image = photo(300, 200)
    got = views(image, 64, boxes)
    assert got.shape == (3, 3, 64, 64)
    full = image.resize((128, 128), Image.BICUBIC)
    for k, box in ((0, (16, 16, 112, 112)), (2, (0, 0, 128, 64))):
        crop = np.asarray(full.crop(box).resize((64, 64), Image.BICUBIC))
        assert (got[k] - reference(crop)).abs().max() < 1e-6
    assert torch.equal(got[1], views(image, 64)[0])


def test_layouts_are_the_six_views_or_a_part_of_them_and_a_wider_centre():
    """Every layout starts with the whole image; adapters.json of published folders holds these very
    boxes."""
    image, six = photo(300, 200), views(photo(300, 200), 64)
    assert list(LAYOUTS) == ["six", "five", "one", "six-wide"] and LAYOUTS["six"] == BOXES
    got = {name: views(image, 64, boxes) for name, boxes in LAYOUTS.items()}
    assert torch.equal(got["six"], six) and torch.equal(got["five"], six[:5])
    assert torch.equal(got["one"], six[:1]) and torch.equal(got["six-wide"][:5], six[:5])
    crop = image.resize((128, 128), Image.BICUBIC).crop(
        (16, 16, 112, 112)
    )  # the centre three quarters
    expected = reference(np.asarray(crop.resize((64, 64), Image.BICUBIC)))
    assert (got["six-wide"][5] - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (3, 1), (1, 5000), (65_500, 1), (1, 65_500), (449, 447), (2, 90_000)]
)
def test_views_of_odd_and_extreme_shapes(shape):
    got = views(Image.new("RGB", shape, (255, 0, 102)), 28)
    expected = reference(np.full((28, 28, 3), (255, 0, 102)))
    assert got.shape == (6, 3, 28, 28) and (got - expected).abs().max() < 1e-6


PHOTOGRAPHS = ["astronaut", "coffee", "chelsea", "rocket", "camera"]


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_views_of_real_photographs(name, tmp_path):
    """Those in scikit-image; nothing is downloaded."""
    image = Image.fromarray(getattr(skimage.data, name)())
    image.save(tmp_path / "a.jpg", quality=90)
    a, b = views(open_image(tmp_path / "a.jpg")), views(image.convert("RGB"))
    assert (a - b).abs().mean() < 0.05
    assert a.isfinite().all() and a.min() >= -1.8 and a.max() <= 2.2  # what 0 and 255 become
