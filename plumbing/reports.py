"""What a folder of captions is asked for as a whole: its flags, merging it, listing what it lacks.
"""
import importlib.util
import json
import os
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from plumbing import arguments, inputs, jobs, outputs, workers
from plumbing.errors import InputError, explained
from plumbing.images import open_image
from plumbing.page import write_page
from plumbing.progress import Progress

ONE_FILE_EACH = ("txt",)        # --write: two images must not have the same target


def add_flags(group):
    """The flags of caption.py about what it writes, and where."""
    add = group.add_argument
    add("--out", type=Path, metavar="DIR", help="folder to write, or to resume (default: captions "
        "go to stdout)")
    add("--write", choices=jobs.WRITE, help="jsonl: DIR/captions.jsonl, which is always written; "
        "txt: also a file for each image, under DIR, or without --out beside the image; "
        "webdataset: also tar shards with image, txt and json; parquet: also DIR/captions.parquet "
        "(default: jsonl)")
    add("--existing", choices=jobs.EXISTING, help="what happens to an image that has a caption, in "
        "its .txt file, manifest or tar (default: skip with --write txt, else overwrite)")
    add("--keys", type=arguments.two_names, metavar="IMAGE,CAPTION", help="names of these two in "
        "captions.jsonl, such as image_path,caption or file_name,text (default: image,caption)")
    add("--shard", type=workers.shard, metavar="I/N", help="do part I of N, counted "
        "from 0 (default: from SLURM's array variables, else all)")
    add("--retry-errors", action="store_true", help="retry images that ended in an error")
    add("--jsonl", action="store_true", help="to stdout, JSON objects: image, caption as the model "
        "wrote it, finish, tokens; or error")
    add("--status", type=Path, metavar="DIR", help="list what of a folder is done, failed and "
        "missing, and nothing else")
    add("--merge", type=Path, metavar="DIR", help="write the captions.jsonl of a folder whose "
        "shards ran apart, and nothing else")


def check(p, args):
    """argparse's one-line error where the flags above do not go together; sets their defaults."""
    beside = args.write == "txt" and not args.out
    for flag, given in (("--keys", args.keys), ("--retry-errors", args.retry_errors),
                        ("--write webdataset", args.write == "webdataset"),
                        ("--write parquet", args.write == "parquet"),
                        ("--existing", args.existing and not beside)):
        if given and not args.out:
            p.error(f"{flag} needs --out, a folder for the captions")
    if args.write == "parquet" and importlib.util.find_spec("pyarrow") is None:
        p.error("--write parquet needs pyarrow: pip install pyarrow")
    if args.jsonl and (args.out or args.write):
        p.error("--jsonl is for stdout; with --out there is a captions.jsonl")
    if args.shard or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if "-" in args.inputs:
            p.error("-: only one process can read stdin; write the list to a file")
        if not args.out and not beside:
            p.error("several workers need --out, a folder for their captions")
    args.write, args.keys = args.write or "jsonl", args.keys or ["image", "caption"]
    args.existing = args.existing or ("skip" if args.write == "txt" else "overwrite")


def settings_of(out):
    """The settings with which a folder was begun. InputError where it has no settings."""
    try:
        return json.loads((out / "settings.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{out}: is not a folder of captions that --out made") from None


def check_new(out, arguments):
    """InputError where a folder has a captions.jsonl that is not ours to write over."""
    path = out / "captions.jsonl"
    is_ours = (out / "settings.json").exists()
    if path.exists() and (not is_ours or any(Path(a).resolve() == path.resolve()
                                             for a in arguments if a != "-")):
        raise InputError(f"{path}: would be written over; give another --out")


def merge(out, if_old=False):
    """Write captions.jsonl and what else is made of all rows; `if_old`: unless it is newer."""
    settings = settings_of(out)
    with explained(out), workers.locked(out / "rows/merge.lock", 3600,
                                        "is held by a process that merges"):
        if if_old and is_newer(out / "captions.jsonl", (out / "rows").glob("*.jsonl")):
            return
        captions, errors = outputs.merge(out, None, settings["keys"],
                                         parquet=settings["write"] == "parquet")
        if settings["verify"]:
            write_page(out, settings["threshold"], settings["seed"], "captions.jsonl",
                       settings["keys"], image_at)
    print(f"wrote {out}/captions.jsonl: {captions} captions, {errors} errors", file=sys.stderr)


def is_newer(path, others):
    """Whether a file was written after all others."""
    return path.exists() and all(path.stat().st_mtime_ns > other.stat().st_mtime_ns
                                 for other in others)


@lru_cache(maxsize=2)
def members_of(tar):
    """{path of a tar/member: item}; rows of a tar follow each other, so few tars are remembered."""
    return {item.image: item for item in inputs.find([tar])}


def image_at(path):
    """The image at a path, which may lead into a tar."""
    head, tar, _ = str(path).rpartition(".tar/")
    if tar and os.path.isfile(f"{head}.tar"):
        path = members_of(f"{head}.tar").get(str(path), path)
    return inputs.open_item(path) if isinstance(path, inputs.Item) else open_image(path)


def show_status(out):
    """Print what a folder has and lacks -> whether every input has a row."""
    settings = settings_of(out)
    ids = None
    if "-" not in settings["inputs"]:           # what stdin named cannot be read again
        one_each = settings["write"] in ONE_FILE_EACH
        ids = [item.id for item in inputs.find(settings["inputs"], one_per_target=one_each)]
    report = jobs.status(out, ids)
    print("\n".join(report["lines"]))
    if len(report["missing"]) == report["inputs"]:
        print("the inputs are named relative to the folder in which caption.py ran: is this it?")
    return not report["missing"] and not report["unfinished"]


def progress(job, items, todo):
    """The bar of a rank that has `todo` images to do: on the first one, of all ranks of its shard.
    """
    if job.division.rank:
        return Progress(0, (), hidden=True)
    ranks = [replace(job.division, rank=rank) for rank in range(1, job.division.world)]
    ids = [item.id for item in items if any(rank.owns(item.id) for rank in ranks)]
    done = jobs.done_in(job.out, set(ids).__contains__) if ids else {}
    total = todo + sum(id not in done for id in ids)
    return Progress(total, [job.rows / f"{rank.name}.jsonl" for rank in ranks], hidden=False)


def all_whole(out, division):
    """Whether every worker of a division has its share whole."""
    names = (workers.name_of(worker, division.workers) for worker in range(division.workers))
    return all((out / f"rows/{name}.json").exists() for name in names)
