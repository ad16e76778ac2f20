"""Public data sets, as they are released, into the rows that the stages read.

READS   the folder that a data set was downloaded and unpacked to
WRITES  JSONL, image paths relative to it

    python runs/prepare.py docci data/docci --out data/docci.jsonl
    python runs/prepare.py vsr data/vsr --out data/vsr.jsonl
    python runs/prepare.py naturalbench data/naturalbench --out data/naturalbench.jsonl

docci         docci_descriptions.jsonlines, images/      {"image", "caption"} of its training images
vsr           train.jsonl, images/                       {"image", "question", "answer"}
naturalbench  data/*.parquet (pip install pyarrow)       {"image", "question", "answer"} of its
                                                         yes/no questions; images go to images/
Rows whose image is not there are left out and counted.
"""
import argparse
import json
import os
import re
import sys
from pathlib import Path


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("name", choices=tuple(DATA_SETS), help="the data set")
    p.add_argument("folder", type=Path, help="where its files are")
    p.add_argument("--out", type=Path, required=True, help="JSONL to write")
    return p.parse_args(argv)


def read_jsonl(path):
    if not path.is_file():
        sys.exit(f"prepare.py: {path}: no such file")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


# ---------------------------------------------------------------- a data set each
def docci(folder):
    """Yield (image, {"caption"}) of the training split of DOCCI (https://arxiv.org/abs/2404.19753).

    A row: {"example_id": "train_00000", "split": "train", "image_file": "train_00000.jpg",
    "description"}.
    """
    for row in read_jsonl(folder / "docci_descriptions.jsonlines"):
        if row["split"] == "train":
            caption = " ".join(row["description"].split())
            yield folder / "images" / row["image_file"], {"caption": caption}


def vsr(folder):
    """Yield (image, {"question", "answer"}) of VSR's (https://arxiv.org/abs/2205.00363) training
    split.

    A row: {"image": "000000296471.jpg", "caption": "The cat is inside the refrigerator.", "label":
    0}, label 1 where the caption is true.
    """
    for row in read_jsonl(folder / "train.jsonl"):
        answer = "Yes" if row["label"] else "No"
        yield folder / "images" / row["image"], {"question": ask(row["caption"]), "answer": answer}


def ask(statement):
    """A question for a statement: "The cat is on the mat." becomes "Is the cat on the mat?"."""
    statement = statement.strip().rstrip(".")
    parts = re.fullmatch(r"The (.+?) (is|are) (.+)", statement)
    if parts:
        return f"{parts[2].capitalize()} the {parts[1]} {parts[3]}?"
    return f"Is it true that {statement[:1].lower()}{statement[1:]}?"


def naturalbench(folder):
    """Yield (image, {"question", "answer"}) of NaturalBench (https://arxiv.org/abs/2410.14669).

    A row has two images and two questions, each answered for each image: Image_0, Image_1,
    Question_0, Question_1, Image_0_Question_0 … Those of the type "yes_no" are taken, four to a
    row. Images are decoded by nobody here: their bytes become files.
    """
    import pyarrow.parquet  # here, since only this data set needs it

    files = sorted(folder.rglob("*.parquet"))
    if not files:
        sys.exit(f"prepare.py: {folder}: no parquet files in it")
    (folder / "images").mkdir(exist_ok=True)
    for file in files:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=32):
            for row in batch.to_pylist():
                # the column's name has changed between releases
                if row.get("Question_Type", row.get("Question Type")) == "yes_no":
                    yield from pairs(folder / "images", row)


def pairs(folder, row):
    """The four questions of a row of NaturalBench; its two images are written to a folder."""
    for i in (0, 1):
        image = folder / f"{row['Index']:05d}-{i}.jpg"
        image.write_bytes(row[f"Image_{i}"]["bytes"])
        for k in (0, 1):
            answer = row[f"Image_{i}_Question_{k}"]
            yield image, {"question": row[f"Question_{k}"], "answer": answer}


DATA_SETS = {"docci": docci, "vsr": vsr, "naturalbench": naturalbench}


# ---------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{args.out}.tmp")
    written = missing = 0
    with temporary.open("w", encoding="utf-8") as file:
        for image, row in DATA_SETS[args.name](args.folder):
            if not image.is_file():
                missing += 1
                continue
            row = {"image": os.path.relpath(image, args.out.parent), **row}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    if not written:
        sys.exit(f"prepare.py: {args.folder}: no usable row; {missing} have no image")
    os.replace(temporary, args.out)
    print(f"wrote {args.out}: {written} rows; {missing} without an image left out", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
