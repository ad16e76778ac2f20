"""page.py: what the page of a record shows, and that the record's text stays text."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from stages import write_rows

from plumbing import page

NASTY = "<script>alert('1')</script> & \"quoted\" 'too' <img src=x onerror=y> </span></p>"


def picture(path, width=40, height=30, **how):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **how)
    return path


def fact(text, p_yes=0.75, kept=True, votes=2, group=None, **more):
    return {
        "text": text,
        "question": f"Does the image show {text}?",
        "about": text.split()[0],
        "group": group,
        "votes": votes,
        "p_yes": p_yes,
        "kept": kept,
        **more,
    }


def record_row(image, **more):
    samples = [
        {"caption": " red ring, blue cross", "finish": "eos"},
        {"caption": " ", "finish": "length"},
    ]
    return {
        "image": image,
        "chosen": "red ring",
        "rejected": samples[:1],
        "samples": samples,
        "combined": "red ring, blue cross",
        "statements": [fact("red ring"), fact("blue cross", 0.25, False, 1)],
        **more,
    }


class Read(HTMLParser):
    """What a browser makes of a page: elements [tag, attributes, text directly inside].

    Fails where an end tag closes another element.
    """

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        element = [tag, dict(attributes), ""]
        self.elements.append(element)
        if tag not in ("img", "input", "meta", "br", "link"):
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open:
            self.open[-1][2] += data

    def all(self, tag, *classes):
        return [
            (attributes, text)
            for name, attributes, text in self.elements
            if name == tag and set(classes) <= set(attributes.get("class", "").split())
        ]


def written(folder, rows, threshold=0.5, seed=0):
    write_rows(folder / "record.jsonl", rows)
    page.write_page(folder, threshold, seed)
    return (folder / "index.html").read_text("utf-8")


def image_in(tag):
    """The picture inside an <img> -> (format, its pixels)."""
    kind, data = re.search(r'src="data:image/(\w+);base64,([^"]*)"', tag).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert image.format.lower() == kind
    return kind, image


# ---------------------------------------------------------------- thumbnails
@pytest.mark.parametrize(
    "size, expected_kind, expected_size",
    [
        ((40, 30), "png", (40, 30)),
        ((128, 1), "png", (128, 1)),
        ((129, 20), "jpeg", (129, 20)),
        ((320, 320), "jpeg", (320, 320)),
        ((1280, 640), "jpeg", (320, 160)),
        ((300, 900), "jpeg", (107, 320)),
        ((4000, 3), "jpeg", (320, 1)),
    ],
)
def test_a_thumbnail_is_small_and_of_the_kind_that_suits_it(
    tmp_path, size, expected_kind, expected_size
):
    tag = page.thumbnail(picture(tmp_path / "a.png", *size))
    kind, image = image_in(tag)
    assert (kind, image.size) == (expected_kind, expected_size)
    assert ("class=small" in tag) == (expected_kind == "png")  # shown with its pixels
    if size == (40, 30):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "a.png")))


def test_a_thumbnail_is_what_the_model_sees(tmp_path):
    """Upright by its EXIF, alpha over white."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    picture(tmp_path / "turned.png", 60, 20, exif=exif)
    assert image_in(page.thumbnail(tmp_path / "turned.png"))[1].size == (20, 60)
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert image_in(page.thumbnail(tmp_path / "clear.png"))[1].getpixel((4, 4)) == (255, 255, 255)
    Image.new("I;16", (200, 200), 65535).save(tmp_path / "deep.png")
    assert image_in(page.thumbnail(tmp_path / "deep.png"))[0] == "jpeg"


def test_a_broken_image_is_a_line_with_the_reason(tmp_path):
    (tmp_path / "<b>text.png").write_text("text")
    for name, expected in (
        ("<b>text.png", "cannot be read"),
        ("gone & away.png", "no such image file"),
    ):
        ((attributes, text),) = Read(page.thumbnail(tmp_path / name)).all("p")
        assert attributes == {"class": "reason"} and expected in text and name in text


# ---------------------------------------------------------------- statements and rows
@pytest.mark.parametrize("kept, expected", [(True, "s kept"), (False, "s refused")])
def test_a_statement_has_its_verdict_as_class_and_its_numbers_as_data(kept, expected):
    span = page.statement(fact("red ring", 0.0625, kept, 3, "top 3"))
    ((attributes, text),) = Read(span).all("span")
    assert text == "red ring"
    assert attributes["class"] == expected
    assert attributes["data-exact"] == "0.0625" and attributes["data-p"] == "0.06"
    assert attributes["title"] == (
        "Does the image show red ring? P(yes) = 0.0625, in 3 of the samples, excludes others "
        "of top 3"
    )
    assert "excludes" not in page.statement(fact("red ring"))


def test_a_row_shows_samples_statements_and_golden_caption(tmp_path):
    picture(tmp_path / "a.png")
    read = Read(page.article(record_row("a.png"), tmp_path / "a.png"))
    assert [text for _, text in read.all("h2")] == ["a.png"]
    assert [text.strip() for _, text in read.all("li")] == ["red ring, blue cross", "(empty)"]
    assert [text for _, text in read.all("small")] == ["eos", "length"]
    assert [text for _, text in read.all("span", "s", "kept")] == ["red ring"]
    assert [text for _, text in read.all("span", "s", "refused")] == ["blue cross"]
    assert [text for _, text in read.all("p", "golden")] == ["red ring"]
    assert not read.all("p", "reason") and len(read.all("img")) == 1


def test_a_row_that_was_left_out_shows_why(tmp_path):
    picture(tmp_path / "a.png")
    row = record_row(
        "a.png", chosen=None, rejected=[], statements=[], combined="", left_out="nothing <b>kept"
    )
    read = Read(page.article(row, tmp_path / "a.png"))
    assert [text for _, text in read.all("p", "reason")] == ["left out: nothing <b>kept"]
    assert [text for _, text in read.all("p", "golden")] == ["–"]
    assert [text for attributes, text in read.all("p") if not attributes] == ["(empty)"]


def test_an_error_row_says_its_error_in_place_of_all_else(tmp_path):
    picture(tmp_path / "a.png")
    read = Read(page.article({"image": "a.png", "error": f"combine: {NASTY}"}, tmp_path / "a.png"))
    assert [text for _, text in read.all("p", "reason")] == [f"combine: {NASTY}"]
    assert (
        [text for _, text in read.all("h2")] == ["a.png"]
        and not read.all("h3")
        and len(read.all("img")) == 1
    )


def test_nothing_in_a_row_becomes_anything_but_text(tmp_path):
    names = ["<script>alert(1)<script>.png", "a\"b' & <b>.png", "new\nline.png", "\udcff.png"]
    nasty = {**fact(NASTY, group=NASTY), "question": NASTY + '" onclick="z'}
    samples = [{"caption": NASTY, "finish": "<i>"}, {"caption": "]]> --> <!--", "finish": None}]
    rows = [
        record_row(name, chosen=NASTY, samples=samples, statements=[nasty], left_out=NASTY)
        for name in names
    ]
    for name in names:
        picture(tmp_path / name)
    text = written(tmp_path, [*rows, {"image": names[0], "error": NASTY}])
    read = Read(text)
    assert len(read.all("script")) == 1 and "alert" not in read.all("script")[0][1]
    allowed = {
        "html",
        "meta",
        "title",
        "style",
        "header",
        "h1",
        "span",
        "b",
        "br",
        "label",
        "input",
        "article",
        "div",
        "img",
        "h2",
        "h3",
        "ol",
        "li",
        "small",
        "p",
        "script",
    }
    assert {tag for tag, _, _ in read.elements} <= allowed and len(
        read.all("b")
    ) == 1  # the page's own one
    assert not any(key.startswith("on") for _, attributes, _ in read.elements for key in attributes)
    assert [inside for _, inside in read.all("span", "s")][2:] == [
        NASTY
    ] * 4  # after those of the header
    assert [inside for _, inside in read.all("p", "golden")] == [NASTY] * 4
    assert sorted(inside for _, inside in read.all("h2")) == sorted([*names[:3], "?.png", names[0]])
    assert len(read.all("img")) == 5


# ---------------------------------------------------------------- the page
def test_the_page_is_one_file_that_refers_to_nothing_outside(tmp_path):
    picture(tmp_path / "small.png")
    picture(tmp_path / "large.png", 500, 400)
    text = written(tmp_path, [record_row("small.png"), record_row("large.png")])
    assert text.count("data:image/png;base64,") == text.count("data:image/jpeg;base64,") == 1
    rest = re.sub(r'"data:image/\w+;base64,[^"]*"', '""', text)
    assert not re.search(r"http|//|@import|url\(|href|fetch|data:", rest)
    assert re.findall(r'\bsrc="(.*?)"', rest) == ["", ""]


def test_the_threshold_is_on_the_page_and_in_its_script(tmp_path):
    picture(tmp_path / "a.png")
    text = written(tmp_path, [record_row("a.png")], threshold=0.123456)
    assert "const THRESHOLD = 0.123456;" in text and "at P(yes) 0.12;" in text
    marked = {attributes["id"] for _, attributes, _ in Read(text).elements if "id" in attributes}
    assert marked == set(re.findall(r'getElementById\("(\w+)"\)', text))


def test_of_many_rows_a_hundred_are_drawn_by_the_seed_and_stay_in_order(tmp_path):
    picture(tmp_path / "a.png", 4, 4)
    rows = [{**record_row("a.png"), "chosen": f"row {k:03d} ä"} for k in range(137)]
    text = written(tmp_path, rows)
    shown = [inside for _, inside in Read(text).all("p", "golden")]
    assert len(set(shown)) == page.ROWS == 100 and shown == sorted(shown)
    assert "Golden samples: 100 of 137 images" in text and '<b id="shown">100</b>' in text
    assert text == written(tmp_path, rows)
    other = [inside for _, inside in Read(written(tmp_path, rows, seed=1)).all("p", "golden")]
    assert len(set(other)) == 100 and other != shown
    few = [inside for _, inside in Read(written(tmp_path, rows[:7])).all("p", "golden")]
    assert few == [row["chosen"] for row in rows[:7]]
