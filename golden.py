"""Stage 3, golden samples: the captioner's own captions, combined, questioned, and freed of what it does not confirm.

READS   images; the captioner, out/sft; the QA adapter, out/qa; a tool LLM
WRITES  out/golden: golden.jsonl for dpo.py, record.jsonl (every image, also those left out, and why), index.html (a
        page to look at), and for each pass a file per rank

    python golden.py --images photos/
    torchrun --nproc_per_node 6 golden.py --images photos/
    torchrun --nproc_per_node 6 golden.py --images photos/ --tool hf:Qwen/Qwen2.5-7B-Instruct
    python golden.py --images photos/ --captioner out/dpo --qa out/qa-2 --out out/golden-2       # the next round

Four passes over files, since captioner and tool LLM do not fit on one card together. Each goes on where it was stopped,
with any number of ranks: a rank takes the images whose names' hash is its own, and appends to files of its own.
  sample   N captions of each image                                          captioner
  combine  one list of statements, taken apart, a yes/no question for each   tool LLM
  verify   P(yes) of every question, each asked alone                        captioner + QA adapter
  compose  the caption of the statements that were confirmed                 tool LLM
Decided where the source is silent:
 1. a statement is kept where P(yes) reaches the threshold that qa_adapter.py calibrated
 2. of statements that exclude each other at most one is kept, the one with the highest P(yes); --no-resolve keeps all
 3. the captions as they were sampled are the rejected side, with their loops and without an end they did not have
"""
import argparse
import gc
import json
import math
import os
import re
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import adapters
import tool_llm
from chunking import BOXES, views
from generate import images_at_once, room_left, sample, without_loop, yes_probability
from model import CAPTION_PROMPT, Config, QwenVL
from plumbing import rules, train, weights
from plumbing.errors import InputError
from plumbing.images import find_images, open_image
from plumbing.page import write_page
from plumbing.shards import check_settings, finished, rows_at, run_pass
from plumbing.tokenizer import Tokenizer

PASSES = ("sample", "combine", "verify", "compose")
CHUNK = 256             # rows that are given to the tool LLM together


def parse_args(argv):
    plain = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=plain)
    p.add_argument("--images", type=Path, required=True, help="folder of images, searched with its subfolders")
    p.add_argument("--captioner", type=Path, default=Path("out/sft"), help="adapter folder of the captioner")
    p.add_argument("--qa", type=Path, default=Path("out/qa"), help="QA adapter folder, trained for this captioner")
    p.add_argument("--base", help="Hub name or folder of the base, if not where the captioner's training found it")
    p.add_argument("--out", type=Path, default=Path("out/golden"), help="folder to write, and to go on from")
    p.add_argument("--passes", default=",".join(PASSES), help="which passes to run, separated by commas")
    # torchrun takes --n for the beginning of an option of its own
    p.add_argument("--samples", "--n", dest="n", type=int, default=8, help="captions per image")
    p.add_argument("--temperature", type=float, default=1.0, help="of sampling")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that hold this share")
    p.add_argument("--max-new-tokens", type=int, help="longest caption, in tokens; left out, what the context leaves")
    p.add_argument("--seed", type=int, default=0, help="of sampling")
    p.add_argument("--threshold", type=float, help="P(yes) from which a statement is kept; left out, as calibrated")
    p.add_argument("--min-votes", type=int, default=1, help="keep only statements that stand in as many captions")
    p.add_argument("--resolve", action=argparse.BooleanOptionalAction, default=True, help="keep at most one of the "
                   "statements that exclude each other")
    p.add_argument("--min-statements", type=int, default=2, help="fewer of them make no golden caption")
    p.add_argument("--retry-errors", action="store_true", help="do the rows again that ended as errors")
    p.add_argument("--batch", type=int, help="images sampled at once; left out, what memory allows")
    p.add_argument("--workers", type=int, default=2, help="threads per rank that decode images")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; left out, bfloat16 on "
                   "a GPU and float32 on the CPU")
    tool_llm.add_flags(p)
    args = p.parse_args(argv)
    tool_llm.check_flags(p, args)
    args.passes = [part.strip() for part in args.passes.split(",") if part.strip()]
    if not args.passes or not set(args.passes) <= set(PASSES):
        p.error(f"--passes: want some of {','.join(PASSES)}")
    for name in ("samples", "max_new_tokens", "batch", "min_votes", "min_statements", "workers"):
        value = getattr(args, "n" if name == "samples" else name)
        if value is not None and value < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1 or not 0 <= (args.threshold or 0) <= 1:
        p.error("--temperature must not be negative, --top-p above 0 and at most 1, --threshold from 0 to 1")
    if args.n > 1 and args.temperature == 0:
        p.error("--samples above 1 needs --temperature above 0: at 0 all captions of an image are the same")
    return args


# ---------------------------------------------------------------- sample, verify: the captioner looks
AHEAD = 32              # images that are decoded before their turn


def looked_at(args, rows, size):
    """Yield (row, views or InputError), the images decoded ahead by threads."""
    def look(row):
        try:
            return views(open_image(args.images / row["image"]), size)
        except InputError as error:
            return error
    with ThreadPoolExecutor(args.workers) as pool:
        waiting = deque()
        for row in rows:
            waiting.append((row, pool.submit(look, row)))
            if len(waiting) > AHEAD:
                row, found = waiting.popleft()
                yield row, found.result()
        for row, found in waiting:
            yield row, found.result()


def open_captioner(args, ranks, *folders):
    """The base with the adapters of some folders."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model = QwenVL.from_pretrained(args.base or adapters.read_card(args.captioner)["base"], dtype, ranks.device)
    for folder in folders:
        adapters.load(model, folder)
    return model


def sample_rows(args, model, rows):
    """Rows with "samples", --samples captions each, raw."""
    room = room_left(model, len(BOXES), args.max_new_tokens)
    at_once = args.batch or images_at_once(model, len(BOXES), args.n, room)

    def sampled(batch):
        try:
            found = sample(model, torch.stack([pixels for _, pixels in batch]), [row["image"] for row, _ in batch],
                           args.n, args.max_new_tokens, args.temperature, args.top_p, args.seed)
        except torch.OutOfMemoryError:
            raise InputError(f"out of memory with {len(batch)} images × {args.n} captions; try a smaller --batch, "
                             "--samples or --max-new-tokens") from None
        for (row, _), samples in zip(batch, found):
            yield {**row, "samples": samples}
    batch = []
    for row, pixels in looked_at(args, rows, model.config.visual.image_size):
        if isinstance(pixels, InputError):
            yield {**row, "error": str(pixels)}
            continue
        batch.append((row, pixels))
        if len(batch) == at_once:
            yield from sampled(batch)
            batch = []
    if batch:
        yield from sampled(batch)


def verify_rows(args, model, rows):
    """Rows whose statements have "p_yes": every question of an image in one forward, none sees another."""
    for row, pixels in looked_at(args, rows, model.config.visual.image_size):
        if isinstance(pixels, InputError):
            yield {**row, "error": str(pixels)}
            continue
        try:
            p_yes = yes_probability(model, pixels, [statement["question"] for statement in row["statements"]]).tolist()
        except torch.OutOfMemoryError:
            raise InputError(f"out of memory with {len(row['statements'])} questions about one image; lower "
                             "generate.MAX_PACKED") from None
        yield {**row, "statements": [{**statement, "p_yes": round(p, 4)}
                                     for statement, p in zip(row["statements"], p_yes)]}


# ---------------------------------------------------------------- combine, compose: the tool LLM reads
def chunks(rows):
    """Lists of up to CHUNK rows."""
    chunk = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def said(result):
    """A sampled caption without the loop, or the unfinished statement, that it ended in."""
    if result["finish"] == "repeat":
        return without_loop(result["caption"])
    return re.sub(r"(^|[,.;])[^,.;]*$", "", result["caption"]) if result["finish"] == "length" else result["caption"]


def combine_rows(tool, rows):
    """Rows with "combined" and its "statements", each with a question."""
    for chunk in chunks(rows):
        captions = [[text for text in map(said, row["samples"]) if rules.statements(text)] for row in chunk]
        speaking = [i for i, texts in enumerate(captions) if texts]
        yield from ({**row, "combined": "", "statements": []} for row, texts in zip(chunk, captions) if not texts)
        combined = {}
        for k, found in tool.run(tool_llm.COMBINE, [captions[i] for i in speaking]):
            if isinstance(found, tool_llm.ToolError):
                yield {**chunk[speaking[k]], "error": f"combine: {found}"}
            else:
                combined[speaking[k]] = rules.fewer(found)      # what is not asked about must not be said
        taken = list(combined)
        for k, found in tool.run(tool_llm.DECOMPOSE, [combined[i] for i in taken]):
            row, text = chunk[taken[k]], ", ".join(statement["text"] for statement in combined[taken[k]])
            yield ({**row, "error": f"decompose: {found}"} if isinstance(found, tool_llm.ToolError) else
                   {**row, "combined": text, "statements": found})


def judge(statements, threshold, min_votes, resolve):
    """Statements with "kept": P(yes) and votes suffice, and, if resolve, nothing that excludes it has a higher P(yes).

    Of equals the one with more votes is kept, then the first.
    """
    likely = [s["p_yes"] >= threshold and s["votes"] >= min_votes for s in statements]
    best = {}
    for k, statement in enumerate(statements):
        group = statement["group"] if resolve and statement["group"] is not None else ("alone", k)
        rank = (statement["p_yes"], statement["votes"], -k)
        if likely[k] and (group not in best or rank > best[group][0]):
            best[group] = rank, k
    kept = {k for _, k in best.values()}
    return [{**statement, "kept": k in kept} for k, statement in enumerate(statements)]


def pair(row, tokenizer, room):
    """A row with its chosen caption -> with "rejected", or with the reason why it is "left_out"."""
    same = " ".join(row["chosen"].split())
    rejected = [s for s in row["samples"] if s["caption"].strip() and " ".join(s["caption"].split()) != same]
    row["tokens"] = len(tokenizer.encode(" " + row["chosen"])) + 1             # and the end token
    if row["tokens"] > room:
        return {**row, "left_out": "golden longer than the context"}
    return {**row, "rejected": rejected} if rejected else {**row, "left_out": "golden equal to its samples"}


def compose_rows(args, tool, tokenizer, room, threshold, rows):
    """Rows with "chosen", the golden caption, and "rejected"; or "left_out" and why."""
    for chunk in chunks(rows):
        asked = []
        for row in chunk:
            row["statements"] = judge(row["statements"], threshold, args.min_votes, args.resolve)
            n_kept = sum(s["kept"] for s in row["statements"])
            if n_kept < args.min_statements:
                yield {**row, "left_out": "too few statements kept" if n_kept else "nothing kept"}
            elif row["combined"] == ", ".join(s["text"] for s in row["statements"] if s["kept"]):   # nothing to correct
                yield pair({**row, "chosen": row["combined"]}, tokenizer, room)
            else:
                asked.append(row)
        for k, found in tool.run(tool_llm.CORRECT, asked):
            yield ({**asked[k], "error": f"correct: {found}"} if isinstance(found, tool_llm.ToolError) else
                   pair({**asked[k], "chosen": found}, tokenizer, room))


def caption_room(base):
    """The tokenizer of a base, and how many tokens a caption of six views may have; without the weights."""
    folder = weights.resolve(base, weights=False)
    config, tokenizer = Config.from_json(folder / "config.json"), Tokenizer(folder)
    prompt = len(BOXES) * (config.visual.n_queries + 2) + len(tokenizer.encode(CAPTION_PROMPT))
    return tokenizer, config.seq_length - prompt


# ---------------------------------------------------------------- what a folder remembers
def settings_of(args, qa):
    """{pass: everything that its rows depend on}: its own settings and those of the passes before it."""
    own = {"sample": {"captioner": adapters.folder_hash(args.captioner), "dtype": str(args.dtype),
                      "images": os.path.relpath(args.images, args.out),
                      **{key: getattr(args, key) for key in ("n", "temperature", "top_p", "max_new_tokens", "seed")}},
           "combine": {"tool": tool_llm.tool_name(args)},
           "verify": {"qa": qa.get("hash")},
           "compose": {"threshold": qa.get("threshold"),
                       **{key: getattr(args, key) for key in ("min_votes", "resolve", "min_statements")}}}
    found, all_before = {}, {}
    for what in PASSES:
        all_before = {**all_before, **own[what]}
        found[what] = all_before
    return found


def read_qa(args):
    """What is to be known of the QA adapter: {"hash", "threshold"}. InputError where it is another captioner's."""
    card = adapters.read_card(args.qa)
    if card.get("parent_hash") != adapters.folder_hash(args.captioner):
        raise InputError(f"{args.qa}: was trained below the captioner {card.get('parent')}, and {args.captioner} is "
                         "another; train it again for this one")
    threshold = card.get("threshold") if args.threshold is None else args.threshold
    if not isinstance(threshold, int | float):
        raise InputError(f"{args.qa}: has no threshold; give one with --threshold")
    return {"hash": adapters.folder_hash(args.qa), "threshold": threshold}


# ---------------------------------------------------------------- the end: one file, a summary, a page
def final(args, row):
    """A row of record.jsonl: as in golden.jsonl, or with the reason why it is not there."""
    # both without links: ".." of a folder that is one leads out of where it points
    image = os.path.relpath(Path(os.path.realpath(args.images), row["image"]), os.path.realpath(args.out))
    if "error" in row:
        return {"image": image, "error": row["error"]}
    raw = [{key: s[key] for key in ("caption", "finish")} for s in row["samples"]]
    rejected = [{key: s[key] for key in ("caption", "finish")} for s in row.get("rejected", [])]
    keys = ("text", "question", "about", "group", "votes", "p_yes", "kept")
    found = {"image": image, "chosen": row.get("chosen"), "rejected": rejected, "samples": raw,
             "combined": row["combined"], "statements": [{key: s[key] for key in keys} for s in row["statements"]]}
    return {**found, "left_out": row["left_out"]} if "left_out" in row else found


def gather_rows(args):
    """Write record.jsonl and golden.jsonl, in order of the images' names -> what the summary tells."""
    places, _ = finished(args.out, "compose")
    count = dict.fromkeys(("images", "golden", "samples", "sample_tokens", "statements", "kept", "golden_tokens"), 0)
    reasons = {}

    def write(temporary, golden_only):
        # a file name need not be text; what of it is none is written as JSON's own \udcff
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for row in rows_at(places[image] for image in sorted(places)):
                reason = row.get("left_out") or ("error" if "error" in row else None)
                if not (golden_only and reason):
                    file.write(json.dumps(final(args, row), ensure_ascii=False) + "\n")
                if not golden_only:
                    tally(row, reason)

    def tally(row, reason):
        count["images"] += 1
        if reason:
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            count["golden"] += 1
            count["golden_tokens"] += row["tokens"]
        if reason != "error":
            count["samples"] += len(row["samples"])
            count["sample_tokens"] += sum(s["tokens"] for s in row["samples"])
            count["statements"] += len(row["statements"])
            count["kept"] += sum(s["kept"] for s in row["statements"])
    train.write_whole(args.out / "record.jsonl", lambda temporary: write(temporary, False))
    train.write_whole(args.out / "golden.jsonl", lambda temporary: write(temporary, True))
    return count, reasons


def summary(count, reasons, times):
    """Lines that tell what came out, and how long it took."""
    read = count["images"] - reasons.get("error", 0)
    left_out = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items())) or "none left out"
    yield f"{count['images']} images: {count['golden']} golden rows; {left_out}"
    if read:
        yield (f"{count['samples']} samples; {count['statements'] / read:.1f} statements per image, "
               f"{100 * count['kept'] / max(count['statements'], 1):.1f} % of them kept")
        yield (f"length in tokens: samples {count['sample_tokens'] / max(count['samples'], 1):.1f}, "
               f"golden {count['golden_tokens'] / max(count['golden'], 1):.1f}")
    spent = [f"{what} {seconds / n:.3f}" for what, (n, seconds) in times.items() if n]
    yield f"seconds per image on a rank: {', '.join(spent) or 'nothing was left to do'}"


# ---------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)

    def go(ranks):
        try:
            return run(args, ranks)
        except OSError as error:            # a full disk, a folder that may not be written
            raise InputError(f"{error.filename or args.out}: {error.strerror or error}; mend that and run the same "
                             "command again") from None
    return train.run_stage("golden.py", args.device, go, patient=True)


def run(args, ranks):
    """All passes on one rank -> exit code."""
    if not args.images.is_dir():
        raise InputError(f"--images {args.images}: is no folder")
    base = args.base or adapters.read_card(args.captioner)["base"]
    qa = read_qa(args) if {"verify", "compose"} & set(args.passes) else {}
    args.out.mkdir(parents=True, exist_ok=True)
    check_settings(args.out, ranks, args.passes, settings_of(args, qa))
    tokenizer, room = caption_room(base)

    # ---- what each pass opens, when it has something to do; it is let go of when the pass is over
    def sampling():
        model = open_captioner(args, ranks, args.captioner)
        return lambda rows: sample_rows(args, model, rows)

    def combining():
        tool = tool_llm.open_tool(args, ranks.device)
        return lambda rows: combine_rows(tool, rows)

    def verifying():
        model = open_captioner(args, ranks, args.captioner, args.qa)
        return lambda rows: verify_rows(args, model, rows)

    def composing():
        tool = tool_llm.open_tool(args, ranks.device)
        return lambda rows: compose_rows(args, tool, tokenizer, room, qa["threshold"], rows)

    # ---- the passes
    times = {}
    for before, what, make_work in zip((None, *PASSES), PASSES, (sampling, combining, verifying, composing)):
        if what not in args.passes:
            continue
        if before:
            source, _ = finished(args.out, before)
        else:
            source = {name: None for path, name in find_images([args.images]) if path != args.images}
        if not source and before not in args.passes:    # else a rank without images is here before others have any
            raise InputError(f"{args.out}: nothing to {what}; run the pass before it first" if before else
                             f"{args.images}: no images in it")
        times[what] = run_pass(args.out, ranks, what, source, make_work, args.retry_errors)
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()        # the next pass has another model on the card

    # ---- one file of them
    everyone = [ranks.gather([times[what]]) for what in times]
    ranks.barrier()
    if ranks.is_master:
        times = {what: (sum(n for n, _ in found), sum(s for _, s in found)) for what, found in zip(times, everyone)}
        report(args, qa, times)
    return 0


def report(args, qa, times):
    """What the first rank does when all are done: golden.jsonl and the page, if it came to that, and the summary."""
    if "compose" in args.passes:
        count, reasons = gather_rows(args)
        write_page(args.out, qa["threshold"], args.seed)
        for line in summary(count, reasons, times):
            print(line)
        print(f"wrote {args.out}/golden.jsonl, record.jsonl and index.html", file=sys.stderr)
    else:
        for what, (n, seconds) in times.items():
            print(f"{what}: {n} images done, {seconds / max(n, 1):.3f} seconds per image on a rank")


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    # all is on disk, and in an orderly exit of several ranks a thread of gloo or of a tokenizer sometimes aborts
    os._exit(code)
