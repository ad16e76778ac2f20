"""Captions of images, one or millions: the product.

READS   images: files, folders, JSONL manifests, text lists (- is stdin), tar shards; a base (Hub
        name or folder); an adapter folder, if there is one
WRITES  captions to stdout, as text or JSON lines, and what was used and went wrong to stderr; with
        --out, a folder: captions.jsonl, and files for trainers (--write)

    python caption.py img.jpg                           # Qwen/Qwen-VL, newest adapters under out/
    python caption.py --base assets/toy assets/toy/examples/*.png
    torchrun --nproc_per_node 6 caption.py photos/ --out captions       # the same again resumes
    python caption.py shards/*.tar --out captions --write webdataset --shard 3/16
    python caption.py --status captions
    python caption.py photos/ --out captions --union 6 --verify out/qa-2       # with their proof

With --out every input ends as one row, a caption or an error, whatever happens in between:
 1. a row belongs to a worker, one rank of one shard, by a hash of its name; workers do not talk to
    each other, and any number of them may resume what others left
 2. a caption depends on the model, the flags and the image's name: not on batch, worker or restart
 3. --verify takes captions apart into statements and keeps what the judge confirms, by the rules
    of golden.py: with --union N, a golden caption of N samples
"""
import argparse
import functools
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import adapters
from base import open_base
from chunking import LAYOUTS, crops
from generate import Sampling, compiles, judge, stream, yes_probability
from plumbing import arguments, data, inputs, jobs, outputs, reports, rules, workers
from plumbing.errors import InputError, explained, printable
from plumbing.images import open_image
from plumbing.slots import MOST_AT_ONCE, images_at_once, room_left, timed
from plumbing.tally import Tally
from plumbing.texts import on_one_line, tidy, trimmed

DEFAULT_BASE = "Qwen/Qwen-VL"


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("inputs", nargs="*", metavar="INPUT", help="image files; folders, searched with "
                   "their subfolders; .jsonl manifests with image, file_name or image_path; .txt "
                   "lists, or - for stdin; .tar shards")
    add_model_flags(p.add_argument_group("model"))
    add_caption_flags(p.add_argument_group("captions"))
    reports.add_flags(p.add_argument_group("output"))
    args = p.parse_args(argv)
    check(p, args)
    args.n_samples = args.union or args.n
    if args.temperature is None:
        args.temperature = 1.0 if args.union else 0.0
    if args.n_samples > 1 and args.temperature == 0:
        p.error("--n and --union above 1 need --temperature above 0: at 0 all captions of an image "
                "are equal")
    return args


def add_model_flags(group):
    """The flags about what captions, what judges, and where they run."""
    add = group.add_argument
    add("--base", help=f"Hub name or folder (default: the adapters' base, else {DEFAULT_BASE})")
    add("--adapters", help="folder of a training stage, or none (default: the folder that "
        "out/best.txt names, else the newest out/dpo*, else out/sft, else none)")
    add("--views", choices=tuple(LAYOUTS), help="views of an image; must be those that the "
        "adapters were trained with (default: those, else six)")
    arguments.add_caption_prompt(group)
    add("--verify", metavar="QA", help="keep only statements that the judge confirms: a QA adapter "
        "folder made for these adapters, or base, the bare base")
    add("--threshold", type=arguments.probability, help="lowest P(yes) of a statement that is "
        "kept: higher is more precise, lower says more (default: the QA folder's, else .5)")
    add("--batch", type=arguments.count, help="images at once (default: what memory allows, at "
        f"most {MOST_AT_ONCE})")
    add("--workers", type=arguments.count_or_none, default=arguments.DECODERS,
        help="processes that decode images ahead of the device (default: 2 with a GPU, else 0)")
    add("--device", default=arguments.own_device(),
        help="cpu, cuda or cuda:N (default: a GPU if there is one, under torchrun the rank's own)")
    add("--dtype", choices=tuple(arguments.DTYPES),
        help="of the weights (default: bfloat16 on a GPU, float32 on the CPU)")
    arguments.add_quantize(group)
    arguments.add_compile(group)


def add_caption_flags(group):
    """The flags about what captions are like."""
    add = group.add_argument
    add("--n", type=arguments.count, default=1, help="captions per image (default: 1)")
    add("--union", type=arguments.count, metavar="N", help="with --verify: one caption of the "
        "confirmed statements of N samples")
    add("--temperature", type=arguments.not_negative, help="of sampling (default: 0, the likeliest "
        "token; 1 with --union)")
    add("--top-p", type=arguments.share, default=1.0, help="sample from the likeliest tokens that "
        "hold this share of the probability (default: 1, all)")
    add("--seed", type=int, default=0, help="of sampling (default: 0)")
    add("--min-tokens", type=arguments.count_or_none, default=0,
        help="no caption ends before (default: 0)")
    add("--max-new-tokens", type=arguments.count, help="longest caption, in tokens (default: what "
        "the context leaves)")
    add("--past-context", action="store_true", help="let --max-new-tokens go beyond the context")
    add("--max-words", type=arguments.count, help="cut captions at the end of the statement before "
        "this many words")
    add("--prefix", default="", metavar="TEXT", help="put before every caption")
    add("--suffix", default="", metavar="TEXT", help="put behind every caption")


def check(p, args):
    """argparse's one-line error where flags do not go together."""
    if args.status or args.merge:
        given = [n for n, value in vars(args).items() if value not in (p.get_default(n), [])]
        if len(given) > 1:
            p.error("--status and --merge take a folder and nothing else")
        return
    if not args.inputs or not all(args.inputs):
        p.error("give images: files, folders, manifests, lists or tars")
    if args.union and not args.verify:
        p.error("--union goes with --verify")
    if args.verify and args.n > 1:
        p.error("--verify makes one caption; for the statements of several samples give --union")
    if args.threshold is not None and not args.verify:
        p.error("--threshold goes with --verify")
    if args.past_context and args.max_new_tokens is None:
        p.error("--past-context needs --max-new-tokens")
    if args.jsonl and (args.prefix or args.suffix or args.max_words):
        p.error("--jsonl prints what the model wrote; --prefix, --suffix, --max-words need --out")
    reports.check(p, args)


# ---------------------------------------------------------------- what captions, and what judges
def adapters_of(args):
    """The adapter folder that is asked for or the default one, or None, and its description."""
    folder = None if args.adapters == "none" else args.adapters or adapters.newest()
    return folder, adapters.read_card(folder) if folder else {"base": DEFAULT_BASE}


def load_model(args):
    """The base with its adapters, as the arguments say -> model, boxes of the views.

    What is used goes to stderr.
    """
    folder, card = adapters_of(args)
    base = args.base or card["base"]
    model = open_base(base, arguments.DTYPES.get(args.dtype), args.device,
                      caption_prompt=args.caption_prompt, quantize=args.quantize)
    if folder and not args.adapters and card["fingerprint"] != model.fingerprint:
        folder = None               # the default folder, but of another base than the one asked for
    boxes = adapters.views_of(folder, args.views)
    if folder and args.caption_prompt:
        raise InputError(f"--caption-prompt: the adapters in {folder} remember theirs; leave it "
                         "out, or give --adapters none")
    if folder:
        adapters.load(model, folder)
    used = f"adapters {folder}" if folder else "no adapters, its own caption prompt"
    dtype = f"{args.quantize or ''} {model.dtype}".replace("torch.", "").strip()
    print(f"base {base}, {used}, {dtype} on {args.device}", file=sys.stderr)
    return model, boxes


def has_folder(judge):
    return judge not in (None, "base")


def threshold_of(args):
    """The lowest P(yes) of a statement that --verify keeps: the flag, the QA folder's, or .5."""
    if has_folder(args.verify):
        return adapters.threshold_of(args.verify, args.threshold)
    return 0.5 if args.verify and args.threshold is None else args.threshold


def load_judge(args, model):
    """Names for adapters.active: of the adapters that caption, and of those that answer."""
    captioning = list(model.attached)
    if has_folder(args.verify):
        adapters.load(model, Path(args.verify))
        return captioning, list(model.attached)
    return captioning, []


# ---------------------------------------------------------------- captions
class Kept(InputError):
    """No error: an image that keeps the caption it has, this text."""


def look(model, boxes, keeps, opened, item):
    """What a worker process makes of an item: (what the model sees, (width, height)).

    keeps(item) is the caption that an image keeps, or None; opened(item) is the image.
    """
    if item.error:
        raise InputError(item.error)
    if (caption := keeps(item)) is not None:
        raise Kept(caption)
    image = opened(item)
    return model.look(crops(image, model.image_size, boxes)), image.size


class Captioner:
    """The model with all that it needs to caption. flags: those of the command line.

    For Ray Data, on columns `id` and `image`, bytes or paths: dataset.map_batches(Captioner,
    fn_constructor_args=["--adapters", "/data/dpo"], batch_size=64, num_gpus=1, concurrency=8).
    """

    def __init__(self, *flags, args=None):
        # in one of Ray's processes it is not safe to fork others
        self.args = args = args or parse_args(["--workers", "0", *flags, "-"])
        self.model, self.boxes = load_model(args)
        self.captioning, self.asking = load_judge(args, self.model)
        self.threshold = threshold_of(args)
        self.how = Sampling(args.n_samples, args.max_new_tokens, args.temperature, args.top_p,
                            args.seed, args.past_context, args.min_tokens)
        room = room_left(self.model, len(self.boxes), args.max_new_tokens, args.past_context)
        self.slots = args.batch or images_at_once(self.model, len(self.boxes), args.n_samples, room)
        self.clock = Counter()

    def __call__(self, batch):
        """{"id", "image"} -> {"id", "caption", "error"}, a row for each image; one is None."""
        images = list(batch["image"])
        items = [inputs.Item(str(k), str(name), str(name)) for k, name in enumerate(batch["id"])]
        rows = {int(item.id): row for item, row in self.rows(
            items, opened=lambda item: open_image(images[int(item.id)], item.name))}
        return {"id": batch["id"], **{key: [rows[k].get(key) for k in range(len(images))]
                                      for key in ("caption", "error")}}

    def results(self, items, keeps=lambda item: None, opened=inputs.open_item):
        """Yield (item, what `look` gave, results) as captions end; or an InputError for both."""
        see = functools.partial(look, self.model, self.boxes, keeps, opened)
        decoded = data.ahead(items, see, self.args.workers, self.slots)
        images = (((item, seen), item.name, seen if isinstance(seen, InputError) else seen[0])
                  for batch in decoded for item, seen in batch)
        compiled = compiles(self.model, self.args.compile, len(items))
        with adapters.active(self.model, self.captioning):
            for (item, seen), results in stream(self.model, images, self.slots, self.how,
                                                self.clock, compiled):
                yield item, seen, results

    def rows(self, items, **how):
        """Yield (item, row): {"caption", "finish", "tokens", "width", "height"}, or {"error"}.

        With --n, caption, finish and tokens are lists. With --verify, "statements" is the proof.
        """
        for item, seen, results in self.results(items, **how):
            if isinstance(results, Kept):
                yield item, {"caption": str(results), "finish": "kept"}
            elif isinstance(results, InputError):
                yield item, {"error": str(results)}
            else:
                yield item, self.row(item, *seen, results)

    def row(self, item, views, size, results):
        """The row of an image, as in `rows`, made of its n results."""
        args, proof = self.args, {}
        if args.verify:
            statements = self.proved(views, list(map(trimmed, results)))
            kept = ", ".join(row["text"] for row in statements if row["kept"])
            texts = [tidy({"caption": kept, "finish": "eos"}, args.max_words)]
            samples = [{"caption": r["caption"], "finish": r["finish"]} for r in results]
            proof = {"statements": statements, "samples": samples}
        else:
            texts = [tidy(result, args.max_words) for result in results]
        lines = [on_one_line(args.prefix + text + args.suffix) for text in texts if text]
        if not lines:
            why = "no statement was confirmed" if args.verify else "the caption is empty"
            return {"error": f"{printable(item.image)}: {why}", **proof}
        many = args.n > 1 or args.union
        return {"caption": lines if args.n > 1 else lines[0],
                **{key: [r[key] for r in results] if many else results[0][key]
                   for key in ("finish", "tokens")},
                "width": size[0], "height": size[1], **proof}

    def proved(self, views, texts):
        """Captions of an image -> their statements, each with P(yes) and whether it is kept."""
        statements = rules.decompose_rule(rules.combine_rule(texts))
        with adapters.active(self.model, self.asking), timed(self.clock, "verify"):
            p_yes = yes_probability(self.model, views, [row["question"] for row in statements])
        asked = [{**row, "p_yes": round(p, 4)} for row, p in zip(statements, p_yes.tolist())]
        return judge(asked, self.threshold, min_votes=1, resolve=True)


# ---------------------------------------------------------------- to stdout, or beside the images
def show(args, item, result, several):
    """One caption to stdout, an error to stderr; both on one line, and above the progress bar."""
    if "error" in result:
        tqdm.write(f"caption.py: {result['error']}", file=sys.stderr)
    if args.jsonl:
        line = json.dumps({"image": item.image, **result}, ensure_ascii=False)
        tqdm.write(line, file=sys.stdout)
    elif "error" not in result:
        text = result["caption"]
        tqdm.write(f"{printable(item.image)}: {text}" if several else text, file=sys.stdout)
    sys.stdout.flush()


def raw(args, captioner, items):
    """(item, list of results) as the model wrote them, each of which is a line."""
    for item, _, results in captioner.results(items):
        yield item, [{"error": str(results)}] if isinstance(results, InputError) else results


def one_by_one(args, captioner, items):
    """(item, list of rows), a row for each caption."""
    for item, row in captioner.rows(items):
        captions = row.get("caption")
        yield item, [{"caption": c} for c in captions] if isinstance(captions, list) else [row]


def to_stdout(args):
    """Caption everything, in order -> exit code."""
    items = list(inputs.find(args.inputs))
    captioner = Captioner(args=args)
    lines = raw if args.jsonl and not args.verify else one_by_one
    quiet = True if len(items) <= captioner.slots else None     # None: where stderr is a terminal
    failed = 0
    with tqdm(total=len(items), unit="image", disable=quiet) as bar:
        for item, results in data.in_order(items, lines(args, captioner, items)):
            for result in results:
                show(args, item, result, len(items) > 1)
            failed += "error" in results[0]
            bar.update()
    return 1 if failed else 0


def beside_images(args):
    """A text file beside each image -> exit code. What is there is the state of the work."""
    division, failed = workers.Division.from_environment(args.shard), 0
    items = [item for item in outputs.beside(inputs.find(args.inputs)) if division.owns(item.id)]
    captioner = Captioner(args=args)
    with explained("."), tqdm(items, unit="image", disable=None) as bar:    # a full disk ends it
        for item, row in captioner.rows(items, keeps=keeping(args)):
            try:
                if "error" in row:
                    raise InputError(row["error"])
                if row["finish"] != "kept":
                    outputs.replace_text(outputs.text_path(item), row["caption"],
                                         append=args.existing == "append")
            except InputError as error:
                failed += 1
                tqdm.write(f"caption.py: {error}", file=sys.stderr)
            bar.update()
    return 1 if failed else 0


def keeping(args):
    """A function of an item: the caption that it keeps, or None."""
    if args.existing != "skip":
        return lambda item: None
    return functools.partial(jobs.kept, out=args.out, text=args.write == "txt")


# ---------------------------------------------------------------- to a folder
DEPENDS_ON = ("inputs", "quantize", "caption_prompt", "views", "verify", "n", "union",
              "temperature", "top_p", "seed", "min_tokens", "max_new_tokens", "past_context",
              "max_words", "prefix", "suffix", "write", "existing", "keys")


def settings_of(args):
    """All that the captions of a folder depend on: the same for all of its workers."""
    threshold = threshold_of(args)              # reads the judge's folder
    folder, card = adapters_of(args)
    named = {"base": args.base or card["base"], "dtype": args.dtype or f"as {args.device[:4]}",
             "adapters": adapters.folder_hash(folder) if folder else "none",
             "judge": adapters.folder_hash(args.verify) if has_folder(args.verify) else args.verify}
    return {**named, **{name: getattr(args, name) for name in DEPENDS_ON},
            "threshold": threshold}


def to_folder(args):
    """This worker's share of the images, each a row -> exit code: 1 if any ended in an error."""
    began, division = time.monotonic(), workers.Division.from_environment(args.shard)
    items = list(inputs.find(args.inputs, one_per_target=args.write in reports.ONE_FILE_EACH))
    reports.check_new(args.out, args.inputs)
    workers.freeze(args.out, settings_of(args))
    tally, clock = Tally(), Counter()
    with jobs.Job(args.out, division, args.write, args.existing, args.retry_errors) as job:
        todo, rows = job.todo(items), ()
        if division.workers > 1:
            print(f"worker {division.worker} of {division.workers}, counted from 0: {len(todo)} of "
                  f"{len(items)} images to do", file=sys.stderr)
        if todo:                        # else no model need be loaded
            captioner = Captioner(args=args)
            clock, rows = captioner.clock, captioner.rows(todo, keeps=keeping(args))
        with reports.progress(job, items, len(todo)) as bar:
            for item, row in rows:
                with timed(clock, "writing"):
                    row = job.write(item, row)
                tally.add(row)
                bar.step(tally.errors.total())
        job.finish()
        failed = job.failed
    for line in tally.lines(time.monotonic() - began, clock):
        print(line, file=sys.stderr)
    if reports.all_whole(args.out, division):
        reports.merge(args.out, if_old=True)
    else:
        print(f"other workers are not done: caption.py --status {args.out}", file=sys.stderr)
    # a rank or task that ended with 1 would have the others stopped, or be started again
    return 1 if failed and division.workers == 1 else 0


# ---------------------------------------------------------------- main
def run(args):
    """What the flags ask for -> exit code."""
    if args.status:
        return 0 if reports.show_status(args.status) else 1
    if args.merge:
        reports.merge(args.merge)
        return 0
    if args.out:
        return to_folder(args)
    return beside_images(args) if args.write == "txt" else to_stdout(args)


def stop(number, frame):
    """SIGTERM: end as ^C does, with what is done on disk."""
    sys.exit(128 + number)


def main(argv=None):
    args = parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):      # a file name need not be text
        sys.stdout.reconfigure(encoding="utf-8" if args.jsonl else None, errors="backslashreplace")
    try:
        signal.signal(signal.SIGTERM, stop)
        return run(args)
    except InputError as error:
        print(f"caption.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:             # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
