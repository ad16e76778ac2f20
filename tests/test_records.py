"""records.py: which rows get into golden.jsonl, their paths, and the figures of the summary."""

import json

from stages import read_rows, write_rows

from plumbing import records


def composed(image, kept=(True, False), **more):
    """A row as the compose pass leaves it."""
    fact = {"question": "?", "about": "x", "group": None, "votes": 1, "p_yes": 0.5}
    samples = [{"caption": " a b", "finish": "eos", "tokens": 2}] * 2
    statements = [{**fact, "text": str(k), "kept": is_kept} for k, is_kept in enumerate(kept)]
    return {
        "image": image,
        "samples": samples,
        "combined": "a, b",
        "statements": statements,
        **more,
    }


def test_usable_rows_are_golden_and_all_are_in_the_record_sorted_by_name(tmp_path):
    images, out = tmp_path / "images", tmp_path / "deep/out"
    out.mkdir(parents=True)
    golden = {"chosen": "a", "tokens": 3, "rejected": composed("")["samples"][:1]}
    write_rows(out / "compose-0.jsonl", [composed("c", **golden), composed("b", left_out="empty")])
    broken = json.dumps({**composed("a"), "error": "broken"})
    write_rows(out / "compose-1.jsonl", [broken, composed("\udcff.png", kept=(), left_out="empty")])
    counts, left_out = records.write_records(images, out)
    record = read_rows(out / "record.jsonl")
    assert [row["image"] for row in record] == [
        f"../../images/{name}" for name in ("a", "b", "c", "\udcff.png")
    ]
    assert record[0] == {"image": "../../images/a", "error": "broken"}
    assert record[1]["left_out"] == "empty" and record[1]["rejected"] == []
    assert read_rows(out / "golden.jsonl") == [record[2]] and record[2]["chosen"] == "a"
    assert record[2]["rejected"] == [{"caption": " a b", "finish": "eos"}]
    assert left_out == {"empty": 2, "error": 1}
    assert counts == {
        "images": 4,
        "golden": 1,
        "golden_tokens": 3,
        "samples": 6,
        "sample_tokens": 12,
        "statements": 4,
        "kept": 2,
    }
    times = {"sample": (4, 2.0), "combine": (0, 0.0)}
    assert records.summary(counts, left_out, times).splitlines() == [
        "4 images: 1 golden rows; 2 empty, 1 error",
        "6 samples; 1.3 statements per image, 50.0 % of them kept",
        "length in tokens: samples 2.0, golden 3.0",
        "seconds per image on a rank: sample 0.500",
    ]


def test_a_summary_of_errors_alone_has_no_means(tmp_path):
    write_rows(tmp_path / "compose-0.jsonl", [{"image": "a", "error": "broken"}])
    counts, left_out = records.write_records(tmp_path, tmp_path)
    assert (tmp_path / "golden.jsonl").read_bytes() == b""
    assert records.summary(counts, left_out, {"sample": (0, 0.0)}).splitlines() == [
        "1 images: 0 golden rows; 1 error",
        "seconds per image on a rank: nothing was left to do",
    ]
