"""Rows: read from files, split, hashed, made into training examples by worker processes, and those into batches.

Which rows a step takes is a function of the step and the seed alone, whatever the number of ranks.
"""
import hashlib
import json
import math
import os
import random
import signal
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from plumbing.errors import InputError
from plumbing.images import SUFFIXES


# ---------------------------------------------------------------- rows on disk
def read_jsonl(path):
    """Yield (where, row) of a JSONL file, where being file:line; row is None where the line is no JSON object."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield f"{path}:{number}", row if isinstance(row, dict) else None


def caption_files(data):
    """Yield (where, image path, caption or None) from JSONL rows, an imagefolder, or images with .txt beside."""
    data = Path(data)
    if data.is_dir() and not (data / "metadata.jsonl").is_file():
        for image in sorted(p for p in data.rglob("*") if p.suffix.lower() in SUFFIXES):
            text = image.with_suffix(".txt")
            yield str(image), image, text.read_text("utf-8", "replace") if text.is_file() else None
        return
    path = data / "metadata.jsonl" if data.is_dir() else data
    for where, row in read_jsonl(path):
        row = row or {}
        name, caption = row.get("image", row.get("file_name")), row.get("caption", row.get("text"))
        yield where, path.parent / name if isinstance(name, str) else None, caption


def read_captions(data):
    """Captions -> rows [{"image": path, "caption": text}], and what is wrong with the others [(where, reason)]."""
    rows, bad = [], []
    for where, image, caption in caption_files(data):
        if image is None:
            bad.append((where, "no JSON object with image and caption"))
        elif not isinstance(caption, str) or not caption.strip():
            bad.append((where, "no caption"))
        elif not is_there(image):
            bad.append((where, f"{image} is not there"))
        else:
            rows.append({"where": where, "image": image, "caption": " ".join(caption.split())})
    return need_rows(data, rows, bad)


def is_there(image):
    """Whether a path is a file; one that no file can have (a name too long) is none."""
    try:
        return image.is_file()
    except OSError:
        return False


def need_rows(path, rows, bad):
    """rows and bad as they are; InputError where no row is left."""
    if not rows:
        first = f"; the first of {len(bad)} bad ones is {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise InputError(f"{path}: no usable row{first}")
    return rows, bad


def tell_bad(script, bad, most=10):
    """The first bad rows of a file on stderr, with file and line."""
    for where, reason in bad[:most]:
        print(f"{script}: left out: {where}: {reason}", file=sys.stderr)
    if len(bad) > most:
        print(f"{script}: left out: {len(bad) - most} more", file=sys.stderr)


def split(rows, holdout, seed):
    """Rows -> those for training, and those of a share `holdout` of the images for validation, drawn by the seed."""
    images = sorted({str(row["image"]) for row in rows})
    random.Random(f"holdout {seed}").shuffle(images)
    held = set(images[:min(max(round(holdout * len(images)), 1 if holdout > 0 else 0), len(images) - 1)])
    return [row for row in rows if str(row["image"]) not in held], [row for row in rows if str(row["image"]) in held]


def rows_hash(rows):
    """A hash of what rows say: texts, and the names of their images."""
    said = [{key: Path(value).name if key == "image" else value for key, value in row.items() if key != "where"}
            for row in rows]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


# ---------------------------------------------------------------- batches
def n_targets(examples):
    """How many tokens of examples {"ids", "n_prompt"} are targets: all that follow the prompts."""
    return sum(len(row["ids"]) - row["n_prompt"] for row in examples)


def step_rows(n_rows, batch, step, seed):
    """Which rows step number `step` (from 0) takes: `batch` pairs (row number, epoch), each epoch in its own order.

    A function of its arguments alone, so that a resumed run takes the same rows, whatever the number of ranks.
    """
    orders, taken = {}, []
    for position in range(step * batch, (step + 1) * batch):
        epoch = position // n_rows
        if epoch not in orders:
            orders[epoch] = random.Random(f"epoch {seed} {epoch}").sample(range(n_rows), n_rows)
        taken.append((orders[epoch][position % n_rows], epoch))
    return taken


class MicroBatches:
    """The (row number, epoch) of this rank's micro-batches, step after step: what a DataLoader asks its workers for.

    Every rank has the same number of micro-batches a step, if need be empty ones at the end.
    """

    def __init__(self, n_rows, batch, micro_batch, first, last, seed, ranks):
        self.n_rows, self.batch, self.micro_batch, self.seed, self.ranks = n_rows, batch, micro_batch, seed, ranks
        self.first, self.last = first, last
        self.per_step = math.ceil(math.ceil(batch / ranks.world) / micro_batch)

    def __iter__(self):
        for step in range(self.first, self.last):
            own = step_rows(self.n_rows, self.batch, step, self.seed)[self.ranks.rank::self.ranks.world]
            for k in range(self.per_step):
                yield own[k * self.micro_batch:(k + 1) * self.micro_batch]

    def __len__(self):
        return (self.last - self.first) * self.per_step


class Rows(Dataset):
    """Rows by (number, epoch), made into examples by make(row, epoch); what cannot be made is its InputError."""

    def __init__(self, rows, make):
        self.rows, self.make = rows, make

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        number, epoch = at
        try:
            return self.make(self.rows[number], epoch)
        except InputError as error:
            where = self.rows[number].get("where")
            return InputError(f"{where}: {error}") if where else error


def loader(rows, make, batches, workers):
    """Iterate over lists of examples, decoded by `workers` processes ahead of their use."""
    # fork, since make is a closure, which the other ways (usual on a Mac, and from Python 3.14) cannot send
    return DataLoader(Rows(rows, make), multiprocessing_context="fork" if workers else None,
                      batch_sampler=batches, num_workers=workers, collate_fn=list,
                      worker_init_fn=worker_signals)


def collate(examples, model, device):
    """Examples {"ids", "n_prompt", "views"} -> arguments of the model's forward; without any, a blank that counts 0.

    Padding stands on the right. targets (M,) are what follows each row's prompt, in order of row and position.
    """
    side, eos = model.config.visual.image_size, model.tokenizer.eos_id
    blank = {"ids": [*model.image_prompt(1, ""), eos], "n_prompt": model.config.visual.n_queries + 2,
             "views": torch.zeros(1, 3, side, side)}
    rows = examples or [blank]
    longest = max(len(row["ids"]) for row in rows)
    ids = torch.tensor([row["ids"] + [eos] * (longest - len(row["ids"])) for row in rows], device=device)
    length, n_prompt = (torch.tensor(n, device=device)[:, None] for n in
                        ([len(row["ids"]) for row in rows], [row["n_prompt"] for row in rows]))
    place = torch.arange(longest, device=device)[None]
    positions = (place >= n_prompt - 1) & (place < length - 1)          # what follows each of them is a target
    return {"ids": ids, "images": torch.cat([row["views"] for row in rows]).to(device), "mask": place < length,
            "positions": positions, "targets": ids[:, 1:][positions[:, :-1]]}


def worker_signals(_):
    """A loader's workers leave signals to their group to the main process, and end when it says so."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def good_rows(found, broken):
    """What the workers made of a micro-batch -> the examples; a row whose image is broken is told once."""
    for problem in (str(row) for row in found if isinstance(row, InputError)):
        if problem not in broken:
            broken[problem] = True
            tqdm.write(f"left out: {problem}", file=sys.stderr)
    return [row for row in found if not isinstance(row, InputError)]
