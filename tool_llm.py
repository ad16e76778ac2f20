"""The tool LLM: a text-only helper that never sees an image, and its five operations.

READS   captions: JSONL of {"image", "caption"}, an imagefolder, or images with .txt files
WRITES  rewrite: the same rows with captions in shorthand
        triplets: rows {"image", "question", "answer"} for qa_adapter.py

    python tool_llm.py rewrite raw.jsonl --out captions.jsonl --tool hf:Qwen/Qwen2.5-7B-Instruct
    python tool_llm.py rewrite raw.jsonl --out captions.jsonl --tool http://localhost:8000/v1 \
                       --tool-model NAME
    python tool_llm.py triplets captions.jsonl --out qa.jsonl --tool shorthand

golden.py uses the other three operations: combine, decompose and correct. A stopped run can simply
be started again: a chat model's answers are cached by content, so it is not asked twice. The
default, `shorthand`, uses the rules of plumbing/rules.py and no model. Captions are data: in a
prompt they are JSON strings, with the brackets escaped that special tokens and tags consist of.
"""
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing import arguments, data, files, rules
from plumbing.answers import entries, field, group_of, loose_json
from plumbing.chat import Local, Replies, Server, ToolError, ask
from plumbing.errors import InputError
from plumbing.quotes import DATA, numbered, quoted, words
from plumbing.rules import Unreadable, clean, drop_lone_groups, fewer, statements
from plumbing.weights import usable_device


# ---------------------------------------------------------------- rows
def by_about(rows):
    """Rows with one "about", their subject, next to each other; subjects in their first order."""
    order = list(dict.fromkeys(row["about"].casefold() for row in rows))
    return sorted(rows, key=lambda row: order.index(row["about"].casefold()))


# ---------------------------------------------------------------- the five operations
@dataclass
class Operation:
    """What a chat model is asked about an item, how its answer is read, and the rule in its place.

    prompt(item) -> text. read(JSON value, item) -> result; it raises Unreadable with a reason for
    the model, which is then asked again. rule(item) -> result, from the shorthand tool.
    """
    name: str
    prompt: Callable
    read: Callable
    rule: Callable


# ---- rewrite: any caption -> shorthand
REWRITE_PROMPT = """\
Rewrite an image caption in shorthand, in the manner of a Stable Diffusion prompt: short \
statements\nabout what can be seen, each able to stand alone. Keep every fact, add none, change \
none. Leave out filler such as "the\nimage shows", opinions, moods and guesses. Answer with JSON \
alone:
{"statements": ["first statement", "second statement"]}
"""


def rewrite_prompt(caption):
    return f"{REWRITE_PROMPT}{DATA}{quoted(caption)}"


def read_rewrite(value, caption):
    """-> the caption in shorthand."""
    texts = ", ".join(field(entry, "text") for entry in entries(value))
    shorthand = ", ".join(statements(texts))
    if not shorthand:
        raise Unreadable("the statements are empty")
    if len(shorthand) > 1.5 * len(clean(caption)) + 20:
        raise Unreadable("it is longer than the caption: nothing may be added")
    return shorthand


# ---- combine: several captions of an image -> statements
COMBINE_PROMPT = """\
Several captions describe one image, each in part, some wrongly. Combine them into one list of \
short\nstatements that says everything any of them says, once. Put statements about the same \
thing together. For each: "text";\n"about", what it speaks of (one name for one thing: "the dog \
on the left"); "in", the numbers of the captions that say\nit; "group": a shared name for \
statements that cannot both be true (two colours of one thing), else null. Two things\nthat can \
both be true are no group. Keep both sides of a contradiction. Add nothing. Answer with JSON \
alone:
{"statements": [{"text": "…", "about": "…", "in": [1, 3], "group": null}]}
"""


def combine_prompt(captions):
    return f"{COMBINE_PROMPT}{DATA}{numbered(captions)}"


def read_combine(value, captions):
    """-> [{"text", "about", "group", "votes"}], statements on the same subject together."""
    rows = {}
    for entry in entries(value):
        text = field(entry, "text")
        if text:
            rows.setdefault(text.casefold(), {
                "text": text, "about": field(entry, "about") or text, "group": group_of(entry),
                "votes": votes_of(entry, len(captions))})
    if not rows:
        raise Unreadable("the statements are empty")
    return drop_lone_groups(by_about(rows.values()))


def votes_of(entry, n_captions):
    """How many of the captions an entry names as those that state it; at least one does."""
    numbers = entry.get("in") if isinstance(entry, dict) else None
    if not isinstance(numbers, list):
        return 1
    valid = {k for k in numbers if isinstance(k, int) and 1 <= k <= n_captions}
    return max(len(valid), 1)


# ---- decompose and ask: statements -> single facts, each with its question
DECOMPOSE_PROMPT = """\
Take statements about an image apart into single facts (one object there, one attribute, \
one\nrelation, one count each) and write a yes/no question for each. A question is answered \
alone, by someone who sees the\nimage and nothing else: name the object so that it cannot be \
mistaken ("Is the dog on the left brown?"), never "it". Yes\nmust mean that the fact is true. 30 \
to 120 questions for a long list, fewer for a short one; none twice. For each: "of",\nthe number \
of its statement; "text", the fact; "question"; "about", the thing; "group": a shared name for \
facts that\ncannot both be true, else null. Answer with JSON alone:
{"questions": [{"of": 1, "text": "…", "question": "…?", "about": "…", "group": null}]}
"""


def decompose_prompt(rows):
    return f"{DECOMPOSE_PROMPT}{DATA}{numbered(row['text'] for row in rows)}"


def read_decompose(value, rows):
    """-> [{"text", "question", "group", "about", "votes"}]; a fact has its statement's votes."""
    listed = entries(value)
    if not any(isinstance(entry, dict) for entry in listed):
        listed = with_questions(rows, listed)
    facts = {}
    for entry in listed:
        fact = read_fact(entry, rows)
        if fact["text"] and fact["question"]:
            facts.setdefault(fact["question"].casefold(), fact)
    if not facts:
        raise Unreadable('no entry has both a "text" and a "question"')
    return drop_lone_groups(fewer(by_about(facts.values())))


def with_questions(rows, questions):
    """Entries for an answer of questions alone, which needs one for each statement."""
    if len(questions) != len(rows):
        raise Unreadable('want an object with "text" and "question" for each fact')
    return [{**row, "question": clean(question), "of": k}
            for k, (row, question) in enumerate(zip(rows, questions), 1)]


def read_fact(entry, rows):
    """An entry as a fact of the statement that it names; on its own if it names none of them."""
    number = entry.get("of") if isinstance(entry, dict) else None
    text, about = field(entry, "text"), field(entry, "about")
    is_known = isinstance(number, int) and 1 <= number <= len(rows)
    source = rows[number - 1] if is_known else {"about": text, "votes": 1}
    return {"text": text, "question": field(entry, "question"), "group": group_of(entry),
            "about": about or source["about"], "votes": source["votes"]}


# ---- correct: the caption without the refused statements
CORRECT_PROMPT = """\
Rewrite an image caption so that it says all facts that were confirmed, none that was refused, \
and\nnothing else. Keep its wording and order where you can. Use only words of the caption and of \
the confirmed facts. Answer\nwith JSON alone:
{"caption": "…"}
"""
SMALL_WORDS = words("a an the and or of in on at to with by is are was has have there it its that "
                    "which this these one while from for as but also into over under near next")


def correct_prompt(item):
    kept = [row["text"] for row in item["statements"] if row["kept"]]
    refused = [row["text"] for row in item["statements"] if not row["kept"]]
    return (f"{CORRECT_PROMPT}{DATA}Caption:\n{quoted(item['combined'])}\n"
            f"Confirmed:\n{numbered(kept)}\nRefused:\n{numbered(refused)}")


def read_correct(value, item):
    """-> the corrected caption. Unreadable if it adds a word or keeps a refused statement."""
    caption = clean(value.get("caption")) if isinstance(value, dict) else ""
    if not caption:
        raise Unreadable('there is no "caption" in it')
    kept = [row["text"] for row in item["statements"] if row["kept"]]
    known = words(" ".join([item["combined"], *kept])) | SMALL_WORDS
    new = words(caption) - known
    if new:
        raise Unreadable("it has a word that neither caption nor confirmed facts have: "
                         f"{min(new)}")
    for row in item["statements"]:
        refused = not row["kept"] and row["text"].casefold() in caption.casefold()
        if refused and not is_part(row["text"], kept):
            raise Unreadable(f"it still says what was refused: {quoted(row['text'])}")
    return caption


def is_part(text, others):
    """Whether one of the other texts contains a text, whatever the case."""
    return any(text.casefold() in other.casefold() for other in others)


# ---- triplets: trusted captions -> questions with answers
TRIPLETS_PROMPT = """\
Write yes/no questions about an image from its caption, which is true. Half of the answers are \
yes.\nThe others are near misses: the same object with another colour, count, side, material or \
action than the caption says,\nso that the caption proves the answer. Each question is answered \
alone by someone who sees the image and nothing else:\nname the object so that it cannot be \
mistaken. An answer starts with Yes or No and then says what is there. Answer with\nJSON alone:
{"triplets": [{"question": "…?", "answer": "Yes, …"}, {"question": "…?", "answer": "No, …"}]}
"""


def triplets_prompt(item):
    return f"{TRIPLETS_PROMPT}{DATA}{quoted(item['caption'])}"


def read_triplets(value, item):
    """-> [{"question", "answer"}], answers that begin with Yes or No, some with either."""
    rows = {}
    for entry in entries(value):
        question, answer = field(entry, "question"), field(entry, "answer")
        verdict = re.match(r"(yes|no)\b", answer, re.IGNORECASE)
        if question and verdict:
            answer = verdict[1].capitalize() + answer[verdict.end():]
            rows.setdefault(question, {"question": question, "answer": answer})
    if len({row["answer"][0] for row in rows.values()}) < 2:
        raise Unreadable("want questions whose answers start with Yes, and some with No")
    return list(rows.values())


REWRITE = Operation("rewrite", rewrite_prompt, read_rewrite, rules.rewrite_rule)
COMBINE = Operation("combine", combine_prompt, read_combine, rules.combine_rule)
DECOMPOSE = Operation("decompose", decompose_prompt, read_decompose, rules.decompose_rule)
CORRECT = Operation("correct", correct_prompt, read_correct, rules.correct_rule)
TRIPLETS = Operation("triplets", triplets_prompt, read_triplets, rules.triplets_rule)


# ---------------------------------------------------------------- the tool
class Shorthand:
    """The rules in place of a model."""
    name = "shorthand"

    def run(self, operation, items):
        """Yield (index, result or ToolError) for each item."""
        for i, item in enumerate(items):
            try:
                yield i, operation.rule(item)
            except Unreadable as error:
                yield i, ToolError(str(error))


class Chat:
    """A chat model, whose answers are cached on disk."""

    def __init__(self, chat, folder):
        self.chat, self.cache, self.name = chat, Replies(folder), chat.name

    def run(self, operation, items):
        """Yield (index, result or ToolError) for each item, in the order of arrival."""
        items = list(items)
        prompts = [operation.prompt(item) for item in items]
        yield from ask(self.chat, self.cache, prompts, partial(read_reply, operation, items))


def read_reply(operation, items, reply, i):
    """The result for item i. Raises Unreadable, with a partial result, if the reply was cut off."""
    value, complete = loose_json(reply)
    result = operation.read(value, items[i])
    if not complete:
        raise Unreadable("it was cut off", result)
    return result


def add_flags(parser):
    """The flags that choose the tool LLM, for every script that uses one."""
    g = parser.add_argument_group("tool LLM")
    g.add_argument("--tool", default="shorthand",
                   help="shorthand (rules), hf:NAME-or-folder (a transformers chat model), or the "
                        "http(s)://…/v1 address of an OpenAI-compatible server (its key in "
                        "OPENAI_API_KEY)")
    g.add_argument("--tool-model", help="the model's name on that server")
    g.add_argument("--tool-requests", type=arguments.count, default=32,
                   help="requests in flight, per rank")
    g.add_argument("--tool-timeout", type=arguments.positive, default=300.0,
                   help="seconds for one reply of the server")
    g.add_argument("--tool-batch", type=arguments.count, default=8,
                   help="prompts per batch, for hf:")
    g.add_argument("--tool-tokens", type=arguments.count, default=6144,
                   help="longest reply, in tokens")
    g.add_argument("--tool-cache", type=Path, default=Path("out/tool-cache"),
                   help="folder of cached answers")


def check_flags(parser, args):
    """Refuse a --tool that names no tool, in one line."""
    if re.match("https?://", args.tool):
        if not re.match(r"https?://[^/\s]+", args.tool) or not args.tool_model:
            parser.error("--tool http(s)://HOST/v1 needs the host, and --tool-model NAME")
    elif args.tool != "shorthand" and not re.match("hf:.", args.tool):
        parser.error(f"--tool {args.tool!r}: want shorthand, hf:NAME-or-folder, or "
                     "http(s)://HOST/v1")


def tool_name(args):
    """The tool as a run's settings record it."""
    return f"{args.tool} {args.tool_model}" if args.tool_model else args.tool


def open_tool(args, device):
    """The tool LLM that the flags name; a transformers model is loaded on `device`."""
    if args.tool == "shorthand":
        return Shorthand()
    if args.tool.startswith("hf:"):
        name = args.tool.removeprefix("hf:")
        chat = Local(name, device, args.tool_batch, args.tool_tokens)
    else:
        chat = Server(args.tool, args.tool_model, args.tool_requests, args.tool_timeout,
                      args.tool_tokens)
    return Chat(chat, args.tool_cache)


# ---------------------------------------------------------------- rewrite and triplets of a file
def parse_args(argv):
    p = arguments.parser(__doc__)
    p.add_argument("operation", choices=("rewrite", "triplets"),
                   help="turn captions into shorthand, or into questions with answers")
    p.add_argument("captions", type=Path,
                   help="JSONL, imagefolder, or folder of images with .txt files")
    p.add_argument("--out", type=Path, required=True, help="JSONL to write")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu or cuda, for hf:")
    add_flags(p)
    args = p.parse_args(argv)
    check_flags(p, args)
    return args


def read_rows(path, out):
    """Rows [{"image", "caption"}], and the bad ones [(where, reason)].

    The image's path is relative to the folder of `out`, the file that will hold it.
    """
    rows, bad = [], []
    for where, image, caption in data.caption_files(path):
        if image is None or not clean(caption):
            bad.append((where, "no image with a caption"))
        else:
            rows.append({"image": os.path.relpath(image, out.parent), "caption": clean(caption)})
    return data.need_rows(path, rows, bad)


def convert(args, tool, rows):
    """[the output rows of each input row]; one {"image", "error"} where the tool failed."""
    captions = [row["caption"] for row in rows]
    if args.operation == "rewrite":
        operation, items = REWRITE, captions
    else:
        slots = rules.slots(captions)
        operation = TRIPLETS
        items = [{"caption": caption, "slots": slots} for caption in captions]
    converted = [None] * len(rows)
    for i, result in tqdm(tool.run(operation, items), total=len(rows), unit="caption"):
        if isinstance(result, ToolError):
            result = [{"error": str(result)}]
        elif operation is REWRITE:
            result = [{"caption": result}]
        converted[i] = [{"image": rows[i]["image"], **row} for row in result]
    return converted


def write_rows(path, rows):
    """Write JSONL; bytes of a file name that are not text are escaped. InputError if it fails."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(path) as temporary:
            temporary.write_text(text, "utf-8", "backslashreplace")
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror}; run the same command again when it can "
                         "be written") from None


def main(argv=None):
    args = parse_args(argv)
    try:
        sources = args.captions.resolve(), (args.captions / "metadata.jsonl").resolve()
        if args.out.resolve() in sources:
            raise InputError(f"--out {args.out} is the input; give another file")
        if args.out.is_dir():
            raise InputError(f"--out {args.out} is a folder; give a file")
        rows, bad = read_rows(args.captions, args.out)
        data.report_bad("tool_llm.py", bad)
        tool = open_tool(args, usable_device(args.device))
        converted = convert(args, tool, rows)
        write_rows(args.out, [row for group in converted for row in group])
    except InputError as error:
        print(f"tool_llm.py: {error}", file=sys.stderr)
        return 1
    failed = sum("error" in group[0] for group in converted)
    print(f"wrote {args.out}: {len(rows) - failed} captions done, {failed} error rows, "
          f"{len(bad)} left out", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
