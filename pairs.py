"""Golden rows as one image prefix with several captions behind it, and what the reference says of them.

A row's chosen and rejected captions are branches of one sequence, so the ViT and the 1548 tokens of six views are
computed once for all of them. The reference's log-probs do not change in training: computed once, kept on disk.
"""
import contextlib
import hashlib
import json
from pathlib import Path

import torch
from tqdm import tqdm

import dataset
from chunking import BOXES
from loading import InputError


# ---------------------------------------------------------------- golden rows
def read_golden(path):
    """Rows [{"id", "image", "chosen", "rejected"}] and the bad ones [(where, reason)]; id is the place in the file."""
    rows, bad = [], []
    for where, row in dataset.read_jsonl(path):
        row = row or {}
        image, chosen, rejected = (row.get(key) for key in ("image", "chosen", "rejected"))
        whole = isinstance(rejected, list) and rejected and all(
            isinstance(r, dict) and isinstance(r.get("caption"), str) and r["caption"].strip() for r in rejected)
        if not isinstance(image, str) or not isinstance(chosen, str) or not chosen.strip() or not whole:
            bad.append((where, "no JSON object with image, chosen, and rejected captions"))
        elif not dataset.is_there(Path(path).parent / image):
            bad.append((where, f"{image} is not there"))
        else:
            rows.append({"id": where.rsplit(":", 1)[1], "where": where, "image": Path(path).parent / image,
                         "chosen": chosen,
                         "rejected": [{"caption": r["caption"], "finish": r.get("finish")} for r in rejected]})
    return dataset.need_rows(path, rows, bad)


def encode_rows(tokenizer, rows, room):
    """Add to each row the target ids of its captions -> the rows whose chosen caption fits, and how many do not.

    A chosen caption ends in the end token; a rejected one only where it really ended and fits. The next row's chosen
    caption is the mismatched one of a row.
    """
    fitting = []
    for row in rows:
        chosen = [*tokenizer.encode(" " + row["chosen"].strip()), tokenizer.eos_id]
        row = {**row, "chosen_ids": chosen, "rejected_ids": []}
        for r in row["rejected"]:
            text = r["caption"] if r["caption"].startswith(" ") else " " + r["caption"]
            ids = tokenizer.encode(text) + [tokenizer.eos_id] * (r["finish"] == "eos")
            row["rejected_ids"].append(ids[:room])
        if len(row["chosen_ids"]) <= room:
            fitting.append(row)
    for row, following in zip(fitting, [*fitting[1:], *fitting[:1]]):
        row["mismatched_ids"] = following["chosen_ids"]
    return fitting, len(rows) - len(fitting)


def pack(prompt, captions):
    """One image prefix and its captions (lists of target ids) as one sequence with a branch each.

    Returns ids and branch, and of every target token in order: the position it follows, itself, its caption's number.
    The first token of every caption follows the prompt's last one.
    """
    ids, branch, positions, targets, owner = list(prompt), [0] * len(prompt), [], [], []
    for k, caption in enumerate(captions):
        positions += [len(prompt) - 1, *range(len(ids), len(ids) + len(caption) - 1)]
        ids += caption[:-1]
        branch += [k + 1] * (len(caption) - 1)
        targets += caption
        owner += [k] * len(caption)
    return {"ids": ids, "branch": branch, "positions": positions, "targets": targets, "owner": owner}


def caption_logps(model, examples, eos_id, device):
    """Summed log-probabilities of each example's captions -> (B, C), C the largest number of captions."""
    def padded(key, fill):
        longest = max(len(example[key]) for example in examples)
        rows = [example[key] + [fill] * (longest - len(example[key])) for example in examples]
        return torch.tensor(rows, device=device)
    ids, n_captions = padded("ids", eos_id), max(max(example["owner"]) for example in examples) + 1
    length = torch.tensor([len(example["ids"]) for example in examples], device=device)[:, None]
    logps = model(ids, torch.cat([example["views"] for example in examples]).to(device),
                  mask=torch.arange(ids.shape[1], device=device)[None] < length, branch=padded("branch", 0),
                  positions=padded("positions", 0), targets=padded("targets", eos_id))
    sums = logps.new_zeros(len(examples), n_captions + 1)                   # the last column takes the padding
    return sums.scatter_add(1, padded("owner", n_captions), logps)[:, :-1]


def make_blank(model, prompt):
    """An example that stands where every image of a micro-batch was broken; it weighs nothing."""
    side, eos = model.config.visual.image_size, [model.tokenizer.eos_id]
    return {**pack(prompt, [eos, eos, eos]), "views": torch.zeros(len(BOXES), 3, side, side), "id": None, "drawn": [0],
            "lengths": [1, 1, 1]}


# ---------------------------------------------------------------- reference
def reference_logps(args, ranks, model, rows, make_all, start_hash):
    """Log-probs under the starting adapters -> {row id: [chosen, mismatched, rejected …]}, computed once and kept.

    The file's name is a hash of all that they depend on; a stopped run goes on where it was.
    """
    what = [model.fingerprint, start_hash, str(model.lm_head.weight.dtype), model.config.seq_length, BOXES,
            [[str(row[k]) for k in ("id", "image", "chosen_ids", "mismatched_ids", "rejected_ids")]
             + [row["image"].stat().st_size, row["image"].stat().st_mtime_ns] for row in rows]]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    args.out.mkdir(parents=True, exist_ok=True)
    known = {}
    for path in sorted(args.out.glob(f"reference-{key}-*.jsonl")):
        for _, row in dataset.read_jsonl(path):
            if row and "logps" in row:                          # a torn last line is computed again
                known[row["id"]] = row["logps"]
    # a rank's rows do not depend on what others have written by the time that it looks
    missing = [row for row in rows[ranks.rank::ranks.world] if row["id"] not in known]
    own = args.out / f"reference-{key}-{ranks.rank}.jsonl"
    with own.open("a", encoding="utf-8", buffering=1) as file, torch.no_grad():       # a line is on disk once computed
        file.write("\n")                                        # after a torn line, a fresh one
        for row in tqdm(missing, desc="reference", unit="row", disable=not ranks.is_master):
            with contextlib.suppress(InputError):               # a broken image is told where it is trained on
                logps = caption_logps(model, [make_all(row)], model.tokenizer.eos_id, ranks.device)[0].tolist()
                file.write(json.dumps({"id": row["id"], "logps": logps}) + "\n")
                known[row["id"]] = logps
    return dict(ranks.gather(known.items()))
