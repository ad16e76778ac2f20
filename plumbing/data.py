"""Rows on disk and on their way to the device: read, split, hashed, decoded by worker processes,
batched.

Which rows a step takes depends on the step and the seed alone, whatever the number of ranks.
"""
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from plumbing.errors import InputError
from plumbing.images import SUFFIXES

MOST_UNREADABLE = 100       # unreadable rows in a row before a run stops: the disk is gone


# ---------------------------------------------------------------- rows on disk
def read_jsonl(path):
    """Yield (where, row) of a JSONL file, where being file:line; row is None if the line is not a
    JSON object."""
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
    """Yield (where, image path, caption or None) from JSONL rows, an imagefolder, or images with
    .txt files."""
    data = Path(data)
    if data.is_dir() and not (data / "metadata.jsonl").is_file():
        for image in sorted(p for p in data.rglob("*") if p.suffix.lower() in SUFFIXES):
            text = image.with_suffix(".txt")
            yield str(image), image, text.read_text("utf-8", "replace") if text.is_file() else None
        return
    path = data / "metadata.jsonl" if data.is_dir() else data
    for where, row in read_jsonl(path):
        row = row or {}
        name = row.get("image", row.get("file_name"))
        caption = row.get("caption", row.get("text", row.get("chosen")))
        yield where, path.parent / name if isinstance(name, str) else None, caption


def read_captions(data):
    """Captions -> rows [{"where", "image": path, "caption": text}], and the bad ones [(where,
    reason)].

    Of golden rows, the chosen caption is taken.
    """
    rows, bad = [], []
    for where, image, caption in caption_files(data):
        if image is None:
            bad.append((where, "not a JSON object with image and caption"))
        elif not isinstance(caption, str) or not caption.strip():
            bad.append((where, "no caption"))
        elif not is_there(image):
            bad.append((where, f"{image} is not there"))
        else:
            rows.append({"where": where, "image": image, "caption": " ".join(caption.split())})
    return need_rows(data, rows, bad)


def read_golden(path):
    """Rows [{"id", "where", "image", "chosen", "rejected"}], and the bad ones [(where, reason)].

    id is the line in the file.
    """
    rows, bad = [], []
    for where, row in read_jsonl(path):
        row = row or {}
        image, chosen, rejected = (row.get(key) for key in ("image", "chosen", "rejected"))
        if not isinstance(rejected, list) or not all(isinstance(r, dict) for r in rejected):
            rejected = []
        texts = [image, chosen, *(r.get("caption") for r in rejected)]
        if not rejected or not all(isinstance(text, str) and text.strip() for text in texts):
            bad.append((where, "not a JSON object with image, chosen, and rejected captions"))
        elif not is_there(Path(path).parent / image):
            bad.append((where, f"{image} is not there"))
        else:
            samples = [{"caption": r["caption"], "finish": r.get("finish")} for r in rejected]
            rows.append({"id": where.rsplit(":", 1)[1], "where": where, "chosen": chosen,
                         "image": Path(path).parent / image, "rejected": samples})
    return need_rows(path, rows, bad)


def read_questions(path):
    """Rows [{"where", "image", "question", "answer", "yes"}], and the bad ones [(where, reason)].

    Answers become `Yes …` or `No …`, so that the first token answers the question.
    """
    rows, bad = [], []
    for where, row in read_jsonl(path):
        row = row or {}
        image, question, answer = (row.get(key) for key in ("image", "question", "answer"))
        if not all(isinstance(text, str) and text.strip() for text in (image, question, answer)):
            bad.append((where, "not a JSON object with image, question and answer"))
            continue
        image, answer = Path(path).parent / image, " ".join(answer.split())
        verdict = re.match(r"(yes|no)\b", answer, re.IGNORECASE)
        if verdict is None:
            bad.append((where, f"the answer {answer[:30]!r} starts with neither yes nor no"))
        elif not is_there(image):
            bad.append((where, f"{image} is not there"))
        else:
            answer = f"{verdict[1].capitalize()}{answer[verdict.end():]}"
            rows.append({"where": where, "image": image, "question": " ".join(question.split()),
                         "answer": answer, "yes": verdict[1].lower() == "yes"})
    return need_rows(path, rows, bad)


def made_by(golden, base, views, caption_prompt):
    """(base, views, caption prompt) of the bare base that made a file of golden rows, as golden.py
    noted them beside it; what is given here goes before. InputError where no base is known."""
    try:
        made = json.loads((Path(golden).parent / "settings.json").read_text("utf-8"))["sample"]
    except (OSError, ValueError, LookupError, TypeError):
        made = {}
    if not (base or made.get("base")):
        raise InputError(f"--init none: no settings.json beside {golden} names the base that made "
                         "its rows; give --base")
    return (base or made["base"], views or made.get("views"),
            caption_prompt or made.get("caption_prompt"))


def is_there(image):
    """Whether a path is a file; False for a name too long for any, where Path.is_file raises."""
    try:
        return image.is_file()
    except OSError:
        return False


def need_rows(path, rows, bad):
    """rows and bad as they are; InputError if no row is left."""
    if not rows:
        first = f"; the first of {len(bad)} bad ones is {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise InputError(f"{path}: no usable row{first}")
    return rows, bad


def report_bad(script, bad, most=10):
    """The first bad rows of a file on stderr, with file and line."""
    for where, reason in bad[:most]:
        print(f"{script}: left out: {where}: {reason}", file=sys.stderr)
    if len(bad) > most:
        print(f"{script}: left out: {len(bad) - most} more", file=sys.stderr)


def split(rows, holdout, seed):
    """Rows -> (training, held out): a share `holdout` of the images is held out, with all its rows.

    At least one image is held out if any share is asked for, and at least one is left to train on.
    """
    images = sorted({str(row["image"]) for row in rows})
    random.Random(f"holdout {seed}").shuffle(images)
    n_held = max(round(holdout * len(images)), 1 if holdout > 0 else 0)
    held = set(images[:min(n_held, len(images) - 1)])
    training = [row for row in rows if str(row["image"]) not in held]
    return training, [row for row in rows if str(row["image"]) in held]


def rows_hash(rows):
    """A hash of what rows hold: texts, and the names of their images; not where the folder lies."""
    contents = [{key: Path(value).name if key == "image" else value
                 for key, value in row.items() if key != "where"} for row in rows]
    return hashlib.sha256(json.dumps(contents, sort_keys=True, default=str).encode()).hexdigest()


# ---------------------------------------------------------------- which rows a step takes
def step_rows(n_rows, batch, step, seed):
    """The rows of step number `step` (from 0): `batch` pairs (row number, epoch), each epoch in its
    own order.

    A function of its arguments alone, so a resumed run takes the same rows, whatever the number of
    ranks.
    """
    orders, taken = {}, []
    for position in range(step * batch, (step + 1) * batch):
        epoch = position // n_rows
        if epoch not in orders:
            orders[epoch] = random.Random(f"epoch {seed} {epoch}").sample(range(n_rows), n_rows)
        taken.append((orders[epoch][position % n_rows], epoch))
    return taken


class MicroBatches:
    """The (row number, epoch) of this rank's micro-batches, step after step: a DataLoader's
    batch_sampler.

    All ranks have the same number of micro-batches per step. A rank with a row less than others may
    have an empty one; it comes first, so that the last micro-batch, after which DDP averages, is
    never empty.
    """

    def __init__(self, n_rows, batch, micro_batch, first, last, seed, ranks):
        self.n_rows, self.batch, self.micro_batch, self.seed = n_rows, batch, micro_batch, seed
        self.ranks, self.first, self.last = ranks, first, last
        self.per_step = math.ceil(math.ceil(batch / ranks.world) / micro_batch)

    def __iter__(self):
        for step in range(self.first, self.last):
            rows = step_rows(self.n_rows, self.batch, step, self.seed)
            own = list(batched(rows[self.ranks.rank::self.ranks.world], self.micro_batch))
            yield from [[]] * (self.per_step - len(own)) + own

    def __len__(self):
        return (self.last - self.first) * self.per_step


# ---------------------------------------------------------------- decoding, ahead of the device
def batched(items, n):
    """Lists of up to n items, in order."""
    items = iter(items)
    while batch := list(itertools.islice(items, n)):
        yield batch


class Examples(Dataset):
    """Training examples by (row number, epoch): make(row, epoch), and the errors met on the way.

    A row whose image cannot be read is replaced by the next row whose image can: a choice that
    depends on the files alone, hence the same on every rank and after every resume. Without any
    such row the example is None.
    """

    def __init__(self, rows, make):
        self.rows, self.make = rows, make

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        number, epoch = place
        unreadable = []
        for k in range(min(len(self.rows), MOST_UNREADABLE)):
            row = self.rows[(number + k) % len(self.rows)]
            try:
                return self.make(row, epoch), unreadable
            except InputError as error:
                unreadable.append(f"{row['where']}: {error}")
        return None, unreadable


class Decoded(Dataset):
    """Pairs (item, make(item)); an item that cannot be made is paired with its InputError."""

    def __init__(self, items, make):
        self.items, self.make = items, make

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        item = self.items[number]
        try:
            return item, self.make(item)
        except InputError as error:
            return item, error


def loader(dataset, workers, **batches):
    """Yield lists of a dataset's items, made by worker processes ahead of their use.

    Tensors come from the workers as arrays, through a pipe. Through shared memory, as PyTorch sends
    them, a large batch needs more of it, or more open files, than containers often allow, and then
    the loader waits for ever.
    """
    # fork: the other start methods (usual on a Mac, and from Python 3.14) would have to pickle the
    # dataset
    start = "fork" if workers else None
    made = iter(DataLoader(dataset, num_workers=workers, collate_fn=to_arrays,
                           worker_init_fn=worker_signals, multiprocessing_context=start,
                           **batches))
    while True:
        try:
            items = next(made)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise InputError(f"a process that decodes images died ({str(error).splitlines()[0]}); "
                             "run the same command again, with --workers 0 if it does so at the "
                             "same place") from None
        yield to_tensors(items)


def to_arrays(value):
    """A value with arrays in place of the tensors in its lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: to_arrays(part) for key, part in value.items()}
    return type(value)(map(to_arrays, value)) if type(value) in (list, tuple) else value


def to_tensors(value):
    """The reverse of to_arrays."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {key: to_tensors(part) for key, part in value.items()}
    return type(value)(map(to_tensors, value)) if type(value) in (list, tuple) else value


def ahead(items, make, workers, batch=1):
    """Yield lists of up to `batch` pairs (item, make(item) or its InputError), in order."""
    workers = workers if len(items) > batch else 0          # nothing to be ahead of
    yield from loader(Decoded(items, make), workers, batch_size=batch)


def in_order(items, pairs):
    """Pairs (item, value) that come in any order -> the same in the order of the items."""
    early = {}
    pairs = iter(pairs)
    for item in items:
        while item.id not in early:
            done, value = next(pairs)
            early[done.id] = value
        yield item, early.pop(item.id)


def worker_signals(_):
    """Leave signals to the main process, which ends the workers.

    torchrun signals the whole process group, and a worker that died of it would take its rank
    along.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collate(examples, pad_id):
    """Examples {"ids", "n_prompt", "views"} -> the arguments of the model's forward, on the CPU:
    what forward asks of ids and targets then costs no wait for a GPU.

    The targets of a row are what follows its prompt. ids and mask (B, L), padded on the right;
    positions and logp_of (B, K): each target, and the position before it; -100 is padding.
    """
    L = max(len(row["ids"]) for row in examples)
    K = max(len(row["ids"]) - row["n_prompt"] for row in examples)
    ids = torch.full((len(examples), L), pad_id)
    mask = torch.zeros(len(examples), L, dtype=torch.bool)
    positions = torch.zeros(len(examples), K, dtype=torch.long)
    targets = torch.full((len(examples), K), -100)
    for b, row in enumerate(examples):
        n_ids, n_prompt = len(row["ids"]), row["n_prompt"]
        ids[b, :n_ids] = torch.tensor(row["ids"])
        mask[b, :n_ids] = True
        positions[b, :n_ids - n_prompt] = torch.arange(n_prompt - 1, n_ids - 1)
        targets[b, :n_ids - n_prompt] = torch.tensor(row["ids"][n_prompt:])
    return {"ids": ids, "mask": mask, "positions": positions, "logp_of": targets,
            "images": together([row["views"] for row in examples])}


def together(views):
    """What a base's `look` gave for several images -> the images of a batch: one tensor of all
    their views where they are tensors, else the list."""
    return torch.cat(list(views)) if isinstance(views[0], torch.Tensor) else list(views)


def padded(examples, key, fill):
    """A list of each example, padded on the right -> (B, longest) int64, on the CPU."""
    longest = max(len(example[key]) for example in examples)
    rows = [example[key] + [fill] * (longest - len(example[key])) for example in examples]
    return torch.tensor(rows)


def count_targets(examples):
    """How many tokens of examples {"ids", "n_prompt"} follow their prompts."""
    return sum(len(row["ids"]) - row["n_prompt"] for row in examples)
