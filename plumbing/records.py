"""What golden.py makes of the rows of its last pass: record.jsonl, golden.jsonl and a summary."""
import json
import os
from collections import Counter
from pathlib import Path

from plumbing import files, shards

STATEMENT = ("text", "question", "about", "group", "votes", "p_yes", "kept")


def write_records(images, out):
    """Write out/record.jsonl, every image, and out/golden.jsonl, the usable rows -> (counts, why).

    images: the folder that the names of the rows are relative to; in the files, paths are relative
    to `out`. Rows are sorted by name. counts: see counts_of; why: {reason: rows left out for it}.
    """
    places, _ = shards.finished(out, "compose")
    counts, left_out = Counter(), Counter()
    # a file name need not be text: what is not is written as JSON's escape, such as \udcff
    as_text = {"mode": "w", "encoding": "utf-8", "errors": "backslashreplace"}
    with (files.whole(out / "record.jsonl") as record_path,
          files.whole(out / "golden.jsonl") as golden_path,
          record_path.open(**as_text) as record,
          golden_path.open(**as_text) as golden):
        for row in shards.rows_at(places[image] for image in sorted(places)):
            reason = "error" if "error" in row else row.get("left_out")
            line = json.dumps(record_row(row, images, out), ensure_ascii=False) + "\n"
            record.write(line)
            if reason:
                left_out[reason] += 1
            else:
                golden.write(line)
            counts.update(counts_of(row, reason))
    return counts, left_out


def record_row(row, images, out):
    """A row of the compose pass -> one of record.jsonl, and of golden.jsonl if it is usable."""
    # both without links: ".." of a folder that is a link leads out of the folder it points to
    image = os.path.relpath(Path(os.path.realpath(images), row["image"]), os.path.realpath(out))
    if "error" in row:
        return {"image": image, "error": row["error"]}
    samples, rejected = (
        [{"caption": result["caption"], "finish": result["finish"]} for result in results]
        for results in (row["samples"], row.get("rejected", [])))
    statements = [{key: statement[key] for key in STATEMENT} for statement in row["statements"]]
    reason = {"left_out": row["left_out"]} if "left_out" in row else {}
    return {"image": image, "chosen": row.get("chosen"), "rejected": rejected, "samples": samples,
            "combined": row["combined"], "statements": statements, **reason}


def counts_of(row, reason):
    """What a row adds to the counts; reason: why it is not in golden.jsonl, or None."""
    if reason == "error":
        return {"images": 1}
    golden = {} if reason else {"golden": 1, "golden_tokens": row["tokens"]}
    return {"images": 1, "samples": len(row["samples"]), "statements": len(row["statements"]),
            "sample_tokens": sum(result["tokens"] for result in row["samples"]),
            "kept": sum(statement["kept"] for statement in row["statements"]), **golden}


def summary(counts, left_out, times):
    """The lines of a summary; times: {pass: (images done, seconds)}, both summed over ranks."""
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(left_out.items()))
    lines = [f"{counts['images']} images: {counts['golden']} golden rows; "
             f"{reasons or 'none left out'}"]
    readable = counts["images"] - left_out["error"]
    if readable:
        kept = 100 * counts["kept"] / max(counts["statements"], 1)
        sampled = counts["sample_tokens"] / max(counts["samples"], 1)
        golden = counts["golden_tokens"] / max(counts["golden"], 1)
        lines += [f"{counts['samples']} samples; {counts['statements'] / readable:.1f} statements "
                  f"per image, {kept:.1f} % of them kept",
                  f"length in tokens: samples {sampled:.1f}, golden {golden:.1f}"]
    spent = [f"{name} {seconds / n:.3f}" for name, (n, seconds) in times.items() if n]
    lines.append(f"seconds per image on a rank: {', '.join(spent) or 'nothing was left to do'}")
    return "\n".join(lines)
