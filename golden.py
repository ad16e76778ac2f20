"""Stage 3: golden captions, combined from samples and stripped of statements that fail the check.

READS   images; the captioner, out/sft, or none, the bare base; the QA adapter, out/qa, or none; a
        tool LLM, by default plain rules
WRITES  out/golden: golden.jsonl for dpo.py; record.jsonl, every image, with the reason if it was
        left out (both by plumbing/records.py); index.html, a page to look at; a file per pass and
        rank

    python golden.py --images photos/
    torchrun --nproc_per_node 6 golden.py --images photos/ --tool hf:Qwen/Qwen2.5-7B-Instruct
    # the next round
    python golden.py --images photos/ --captioner out/dpo --qa out/qa-2 --out out/golden-2
    # with a base that follows instructions: no data but the images
    python golden.py --images photos/ --captioner none --qa none --base Qwen/Qwen3-VL-4B-Instruct

Captioner and tool LLM may not fit on one card together, so the work is split into four passes that
exchange files. Each can be stopped at any moment and resumed with any number of ranks.
  sample   N captions of each image                                          captioner
  combine  their statements in one list, and a yes/no question for each      tool LLM
  verify   P(yes) of every question, each asked alone                        captioner, QA adapter
  compose  a caption of the statements that pass                             tool LLM
What the source, the blog post ATAC-Qwen-VL, leaves open:
 1. a statement is kept if its P(yes) reaches the threshold that qa_adapter.py calibrated; a golden
    caption has at least two (--min-statements)
 2. of statements that exclude each other at most one is kept, the one with the highest P(yes), and
    only with half of their sum; --no-resolve keeps all that pass
 3. the rejected side is the samples as they are: one that loops or is cut off keeps its loop and
    gets no end token, so that training lowers the probability of the loop and not of ending
 4. without a QA adapter the bare base answers, whoever captions: a judge that no round changes. Its
    threshold is .5, or calibrated on --calibrate's questions
"""
import argparse
import os
import sys
from functools import partial
from pathlib import Path

import adapters
import tool_llm
from base import open_base
from chunking import LAYOUTS, seen_by
from generate import Sampling, calibrated, compiles, judge, stream, yes_probability
from plumbing import arguments, data, rules, shards, train, weights
from plumbing.errors import InputError
from plumbing.images import find_images
from plumbing.page import write_page
from plumbing.records import summary, write_records
from plumbing.slots import images_at_once, room_left
from plumbing.texts import trimmed

PASSES = ("sample", "combine", "verify", "compose")
CHUNK = 256             # rows that the tool LLM is given together
AHEAD = 8               # images that a decoding process hands over together


def parse_args(argv):
    p = arguments.parser(__doc__)
    add = p.add_argument
    add("--images", type=Path, required=True, help="folder of images, searched with its subfolders")
    folder = arguments.folder_or_none
    add("--captioner", type=folder, default=Path("out/sft"), help="adapter folder of the "
        "captioner, or none: the bare base captions")
    add("--qa", type=folder, default=Path("out/qa"), help="QA adapter folder made for this "
        "captioner, or none: the bare base answers")
    add("--base", help="Hub name or folder of the base; left out, the captioner's")
    add("--calibrate", type=Path, metavar="FILE", help="with --qa none: questions with answers "
        "(JSONL) on which its threshold is set; left out, it is .5")
    add("--views", choices=tuple(LAYOUTS), help="views of an image; left out, the captioner's")
    add("--out", type=Path, default=Path("out/golden"), help="folder to write, or to resume")
    add("--passes", default=",".join(PASSES), help="which passes to run, separated by commas")
    # torchrun takes --n for an abbreviation of its own options
    add("--samples", "--n", dest="n", type=arguments.count, default=8, help="captions per image")
    add("--temperature", type=arguments.not_negative, default=1.0, help="of sampling")
    add("--top-p", type=arguments.share, default=1.0,
        help="sample from the smallest set of tokens with this much probability")
    add("--max-new-tokens", type=arguments.count,
        help="longest caption, in tokens; left out, as long as the context allows")
    add("--seed", type=int, default=0, help="of sampling")
    add("--threshold", type=arguments.probability,
        help="lowest P(yes) of a statement that is kept, a dial from recall (low) to precision "
        "(high); left out, as calibrated")
    add("--min-votes", type=arguments.count, default=1,
        help="samples that must contain a statement that is kept")
    add("--resolve", action=argparse.BooleanOptionalAction, default=True,
        help="keep at most one of the statements that exclude each other, and none where several "
        "are about equally likely")
    add("--min-statements", type=arguments.count, default=2, help="fewest in a golden caption")
    add("--retry-errors", action="store_true", help="redo the images that ended in an error")
    add("--batch", type=arguments.count,
        help="images sampled at once; left out, as many as memory allows")
    add("--workers", type=arguments.count_or_none, default=arguments.DECODERS,
        help="processes per rank that decode images; left out, 2 with a GPU, else 0")
    arguments.add_device(p)
    arguments.add_compile(p)
    arguments.add_caption_prompt(p)
    tool_llm.add_flags(p)
    args = p.parse_args(argv)
    tool_llm.check_flags(p, args)
    check_bare(p, args)
    args.passes = [name.strip() for name in args.passes.split(",") if name.strip()]
    if not args.passes or not set(args.passes) <= set(PASSES):
        p.error(f"--passes: want some of {','.join(PASSES)}")
    if args.n > 1 and args.temperature == 0:
        p.error("--samples above 1 needs --temperature above 0: at 0 all captions of an image are "
                "the same")
    return args


def check_bare(p, args):
    """argparse's one-line error where flags about a bare base and about adapters meet."""
    if args.captioner is None and not args.base:
        p.error("--captioner none needs --base, the Hub name or folder of the base that captions")
    if args.captioner is None and args.qa:
        p.error("--captioner none goes with --qa none: a QA adapter is made for a captioner")
    arguments.check_caption_prompt(p, args, "--captioner")
    if args.qa and args.calibrate:
        p.error("--calibrate: qa_adapter.py calibrated the threshold of --qa; leave it out")


# ---------------------------------------------------------------- sample
def look(model, folder, boxes, image):
    """An image of the folder, by name -> what the model sees of it; done by worker processes."""
    return seen_by(model, folder / image, boxes)


def sample_rows(args, model, boxes, images):
    """Images by name -> rows {"image", "samples"}, --samples raw captions each, or with "error"."""
    room = room_left(model, len(boxes), args.max_new_tokens)
    at_once = args.batch or images_at_once(model, len(boxes), args.n, room)
    how = Sampling(args.n, args.max_new_tokens, args.temperature, args.top_p, args.seed)
    see = partial(look, model, args.images, boxes)
    decoded = data.ahead(images, see, args.workers, at_once)
    named = ((image, image, seen) for batch in decoded for image, seen in batch)
    compiled = compiles(model, args.compile, len(images))
    for image, samples in stream(model, named, at_once, how, compiled=compiled):
        if isinstance(samples, InputError):
            yield {"image": image, "error": str(samples)}
        else:
            yield {"image": image, "samples": samples}


# ---------------------------------------------------------------- combine
def combine_rows(tool, rows):
    """Yield rows with "combined" and "statements", each with its question, or with "error"."""
    for chunk in data.batched(rows, CHUNK):
        described, captions = [], []
        for row in chunk:
            texts = [text for text in map(trimmed, row["samples"]) if rules.statements(text)]
            if texts:
                described.append(row)
                captions.append(texts)
            else:
                yield {**row, "combined": "", "statements": []}

        combined, statements = [], []
        for k, answer in tool.run(tool_llm.COMBINE, captions):
            if isinstance(answer, tool_llm.ToolError):
                yield {**described[k], "error": f"combine: {answer}"}
            else:
                combined.append(described[k])
                # cap at the question limit, by votes: a statement that no question was asked about
                # must not get into a golden caption
                statements.append(rules.fewer(answer))

        for k, answer in tool.run(tool_llm.DECOMPOSE, statements):
            if isinstance(answer, tool_llm.ToolError):
                yield {**combined[k], "error": f"decompose: {answer}"}
            else:
                text = ", ".join(statement["text"] for statement in statements[k])
                yield {**combined[k], "combined": text, "statements": answer}


# ---------------------------------------------------------------- verify
def verify_row(model, row, seen):
    """A row whose statements have "p_yes", or one with "error" where the image cannot be read.

    All questions about the image are in one forward, and none sees another. seen: what the model
    sees of the image.
    """
    if isinstance(seen, InputError):
        return {**row, "error": str(seen)}
    questions = [statement["question"] for statement in row["statements"]]
    p_yes = yes_probability(model, seen, questions).tolist()
    statements = [{**s, "p_yes": round(p, 4)} for s, p in zip(row["statements"], p_yes)]
    return {**row, "statements": statements}


def verify_rows(args, model, boxes, todo):
    """Yield the rows of `verify_row`."""
    see = partial(look, model, args.images, boxes)
    for decoded in data.ahead(todo.images, see, args.workers, AHEAD):
        for image, seen in decoded:
            yield verify_row(model, todo.row(image), seen)


# ---------------------------------------------------------------- compose
def pair(row, model, room):
    """A row with "chosen" -> with "rejected" too, or with "left_out", why it cannot be used.

    room: how many tokens a caption may have, end token included.
    """
    chosen = " ".join(row["chosen"].split())
    rejected = []
    for result in row["samples"]:
        text = " ".join(result["caption"].split())
        if text and text != chosen:
            rejected.append(result)
    row = {**row, "tokens": len(model.answer(row["chosen"])) + 1}           # and the end token
    if row["tokens"] > room:
        return {**row, "left_out": "golden longer than the context"}
    if not rejected:
        return {**row, "left_out": "golden equal to its samples"}
    return {**row, "rejected": rejected}


def compose_rows(args, tool, model, room, threshold, rows):
    """Yield rows with "chosen", the golden caption, and "rejected", or "left_out", or "error"."""
    for chunk in data.batched(rows, CHUNK):
        to_correct = []
        for row in chunk:
            judged = judge(row["statements"], threshold, args.min_votes, args.resolve)
            row = {**row, "statements": judged}
            kept = [statement["text"] for statement in judged if statement["kept"]]
            if len(kept) < args.min_statements:
                yield {**row, "left_out": "too few statements kept" if kept else "nothing kept"}
            elif row["combined"] == ", ".join(kept):        # nothing was split or refused
                yield pair({**row, "chosen": row["combined"]}, model, room)
            else:
                to_correct.append(row)

        for k, answer in tool.run(tool_llm.CORRECT, to_correct):
            if isinstance(answer, tool_llm.ToolError):
                yield {**to_correct[k], "error": f"correct: {answer}"}
            else:
                yield pair({**to_correct[k], "chosen": answer}, model, room)


# ---------------------------------------------------------------- the four passes
def open_pass(args, ranks, name):
    """The images that a pass still has to do; those of the pass before that ended in an error are
    handed on as they are.

    InputError if the pass before left no rows and is not in --passes.
    """
    if name == "sample":
        images = [name for path, name in find_images([args.images]) if path != args.images]
        if not images:
            raise InputError(f"{args.images}: no images in it")
        return shards.Pass(args.out, ranks, name, images, retry_errors=args.retry_errors)
    before = PASSES[PASSES.index(name) - 1]
    todo = shards.Pass(args.out, ranks, name, before=before, retry_errors=args.retry_errors)
    # if it is run, a rank without images may get here before the others have written any row
    if not todo.source and before not in args.passes:
        raise InputError(f"{args.out}: nothing to {name}; run the pass before it first")
    return todo


def rows_of_pass(args, ranks, boxes, prompts, threshold, name, todo):
    """The rows of one of the four passes, as they are done. prompts: the base without weights."""
    weights.release_memory(ranks.device)
    if name == "sample":
        return sample_rows(args, open_captioner(args, ranks.device), boxes, todo.images)
    if name == "verify":
        return verify_rows(args, open_judge(args, ranks.device), boxes, todo)
    tool = tool_llm.open_tool(args, ranks.device)
    if name == "combine":
        return combine_rows(tool, todo.rows())
    return compose_rows(args, tool, prompts, room_left(prompts, len(boxes)), threshold,
                        todo.rows())


def base_of(args):
    """The name or folder of the base."""
    return args.base or adapters.read_card(args.captioner)["base"]


def open_with(args, device, *folders):
    """The base with the adapters of some folders, in that order."""
    model = open_base(base_of(args), arguments.DTYPES.get(args.dtype), device,
                      caption_prompt=args.caption_prompt, quantize=args.quantize)
    for folder in folders:
        adapters.load(model, folder)
    return model


def open_captioner(args, device):
    """The model that captions: base and captioner, or the bare base."""
    return open_with(args, device, *([args.captioner] if args.captioner else []))


def open_judge(args, device):
    """The model that answers questions: captioner and QA adapter, or the bare base."""
    return open_with(args, device, *([args.captioner, args.qa] if args.qa else []))


# ---------------------------------------------------------------- before the passes
def read_qa(args):
    """{"hash", "threshold"} of the QA adapter. InputError where it is for another captioner."""
    if args.qa is None:
        asked = data.rows_hash(data.read_questions(args.calibrate)[0]) if args.calibrate else None
        return {"hash": "none", "threshold": args.threshold, "calibrate": asked}
    card = adapters.read_card(args.qa)
    if card.get("parent_hash") != adapters.folder_hash(args.captioner):
        raise InputError(f"{args.qa}: was trained below the captioner {card.get('parent')}, and "
                         f"{args.captioner} is another; train it again for this one")
    return {"hash": adapters.folder_hash(args.qa),
            "threshold": adapters.threshold_of(args.qa, args.threshold)}


def threshold_of_bare(args, ranks, boxes):
    """The threshold of a judge without a QA adapter: --threshold, or calibrated, or .5."""
    if args.threshold is not None or args.calibrate is None:
        return 0.5 if args.threshold is None else args.threshold
    judge_of = partial(open_judge, args, ranks.device)
    return calibrated(args.calibrate, args.out / "calibration.json", ranks, judge_of, boxes)


def settings_of(args, qa, caption_prompt):
    """{pass: all that its rows depend on}: the settings of this pass and of those before it."""
    captioner = {"captioner": adapters.folder_hash(args.captioner)} if args.captioner else {
        "captioner": "none", "base": args.base, "caption_prompt": caption_prompt,
        "views": args.views}
    added = {
        "sample": {**captioner, "dtype": str(args.dtype),
                   "images": os.path.relpath(args.images, args.out), "n": args.n,
                   "temperature": args.temperature, "top_p": args.top_p,
                   "max_new_tokens": args.max_new_tokens, "seed": args.seed},
        "combine": {"tool": tool_llm.tool_name(args)},
        "verify": {"qa": qa.get("hash")},
        "compose": {"threshold": qa.get("threshold"), "min_votes": args.min_votes,
                    "resolve": args.resolve, "min_statements": args.min_statements}}
    if args.quantize:                           # older folders have no such setting
        added["sample"]["quantize"] = args.quantize
    if "calibrate" in qa:
        added["compose"]["calibrate"] = qa["calibrate"]
    settings, so_far = {}, {}
    for name in PASSES:
        so_far = {**so_far, **added[name]}
        settings[name] = so_far
    return settings


# ---------------------------------------------------------------- main
def run(args, ranks):
    """The passes on this rank and, on the first rank, the files made of all rows -> exit code."""
    if not args.images.is_dir():
        raise InputError(f"--images {args.images}: is not a folder")
    boxes = adapters.views_of(args.captioner, args.views)
    qa = read_qa(args) if {"verify", "compose"} & set(args.passes) else {}
    prompts = open_base(base_of(args), weights_too=False, caption_prompt=args.caption_prompt)
    if args.captioner:
        card = adapters.read_card(args.captioner)
        prompts.caption_text = card.get("caption_prompt", prompts.caption_text)
    room_left(prompts, len(boxes))              # refuses a context too short for the prompt
    args.out.mkdir(parents=True, exist_ok=True)
    settings = settings_of(args, qa, prompts.caption_text)
    shards.check_settings(args.out, ranks, args.passes, settings)
    if "compose" in args.passes and args.qa is None:
        qa["threshold"] = threshold_of_bare(args, ranks, boxes)

    times = {}              # {pass: (images done, seconds)}
    for name in filter(args.passes.__contains__, PASSES):
        with open_pass(args, ranks, name) as todo:
            if todo.images:
                for row in rows_of_pass(args, ranks, boxes, prompts, qa.get("threshold"), name,
                                        todo):
                    todo.write(row)
        times[name] = todo.count, todo.seconds
    for name in times:
        of_ranks = ranks.gather([times[name]])
        times[name] = tuple(map(sum, zip(*of_ranks)))
    ranks.barrier()
    if ranks.is_master:
        report(args, qa, times)
    return 0


def report(args, qa, times):
    """At the end, on the first rank: the files made of the rows of all ranks, and a summary."""
    if "compose" in args.passes:
        counts, left_out = write_records(args.images, args.out)
        write_page(args.out, qa["threshold"], args.seed)
        print(summary(counts, left_out, times))
        print(f"wrote {args.out}/golden.jsonl, record.jsonl and index.html", file=sys.stderr)
        return
    for name, (n, seconds) in times.items():
        print(f"{name}: {n} images done, {seconds / max(n, 1):.3f} seconds per image on a rank")


def run_safely(args, ranks):
    """run(), with an error of the file system, such as a full disk, as an InputError."""
    try:
        return run(args, ranks)
    except OSError as error:
        raise InputError(f"{error.filename or args.out}: {error.strerror or error}; fix that and "
                         "run the same command again") from None


def main(argv=None):
    args = parse_args(argv)
    return train.run_stage("golden.py", args.device, partial(run_safely, args), patient=True)


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    # all files are on disk, and an orderly exit sometimes aborts in a thread of gloo or a tokenizer
    os._exit(code)
