"""Lists and objects read from a chat model's answers, which are seldom JSON and nothing else."""
import json
import re

from plumbing.rules import Unreadable, clean

STARTS = 20             # brackets of an answer at which JSON is looked for
DEEPEST = 50            # levels of nested brackets
CLOSERS = {"[": "]", "{": "}"}
SEPARATOR = re.compile(r"[\s,]+")
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*("?)|[\[\]{}]|[\s,]+|[^"\[\]{}\s,]+', re.DOTALL)
FIRST_ENTRY = re.compile(r'\[\s*["\[{]|{\s*"')
LISTED = re.compile(r"(?m)^[^\S\n]*(?:\d+[.):]|[-*•])[^\S\n]+(\S.*)$")
NO_GROUP = ("", "none", "null", "n/a", "-")


# ---------------------------------------------------------------- JSON in a reply
def loose_json(reply):
    """The list or object in a model's answer -> (value, whether it was complete).

    Copes with reasoning before it, code fences, surrounding prose, trailing commas, line breaks in
    strings, and numbered or dashed lines in place of JSON. Of an answer that was cut off, the
    complete entries are used. Raises Unreadable if there is neither a list nor an object.
    """
    reply = re.sub(r"(?s)^.*</think>", "", reply)
    if re.match(r"\s*<think>", reply):
        raise Unreadable("its reasoning has no end")
    longest, answer, end = 0, None, 0
    for start in [bracket.start() for bracket in re.finditer(r"[\[{]", reply)][:STARTS]:
        if start < end:
            continue                    # inside JSON that was read already
        text, length, complete = close_json(reply[start:])
        if not text and start + length == len(reply) and FIRST_ENTRY.match(reply, start):
            break                       # cut off before its first entry was complete
        try:
            value = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            continue                    # a bracket of the prose
        end = start + length
        if value and len(text) > longest:
            longest, answer = len(text), (value, complete)
    return answer or (listed_lines(reply), True)


def listed_lines(reply):
    """The numbered or dashed lines of an answer. Raises Unreadable if it has no such line."""
    lines = LISTED.findall(reply)
    if not lines:
        raise Unreadable("there is no JSON in it")
    return [line.strip().strip('"') for line in lines]


def close_json(text):
    """The JSON at the start of a text, without trailing commas, and closed where it was cut off.

    The text begins with a bracket. Returns (JSON, its length in the text, whether it was complete).
    JSON that was cut off keeps the complete entries of its outermost list; without any it is "".
    """
    pieces, closers = [], []        # the JSON so far, and the brackets that would close it
    n_complete, closing = 0, ""     # its pieces up to the last complete entry, and what closes them
    end = len(text)
    for token in TOKEN.finditer(text):
        piece = token[0]
        if token[1] == "":
            break                   # a string that was cut off
        if piece in CLOSERS:
            closers.append(CLOSERS[piece])
        elif piece in ("]", "}"):
            if SEPARATOR.fullmatch(pieces[-1]):
                pieces.pop()        # a trailing comma
            is_pair = closers.pop() == piece
            if is_pair and not closers:
                return "".join([*pieces, piece]), token.end(), True
            if not is_pair:
                end = token.start()
                break               # not JSON after all
        if len(closers) > DEEPEST:
            end = token.start()
            break                   # no answer is nested so deeply
        pieces.append(piece)
        ends_entry = token[1] or piece in ("]", "}")
        if ends_entry and closers[-1] == "]" and closers.count("]") == 1:
            n_complete, closing = len(pieces), "".join(reversed(closers))
    return "".join(pieces[:n_complete]) + closing, end, False


# ---------------------------------------------------------------- entries and their fields
def entries(value):
    """The list in an answer's JSON: the value itself, or the first list in an object.

    An object with a "text" or "question" counts as the only entry of a list. Raises Unreadable if
    there is no list, or an empty one.
    """
    if isinstance(value, dict) and value.keys() & {"text", "question"}:
        value = [value]
    elif isinstance(value, dict):
        value = next((part for part in value.values() if isinstance(part, list)), [])
    if not isinstance(value, list) or not value:
        raise Unreadable("there is no list in it, or an empty one")
    return value


def field(entry, name):
    """A text of an entry, "" if it has none. An entry may also be its "text" itself."""
    if isinstance(entry, dict):
        return clean(entry.get(name))
    return clean(entry) if name == "text" else ""


def group_of(entry):
    """The name of an entry's group, or None."""
    group = entry.get("group") if isinstance(entry, dict) else None
    if isinstance(group, bool) or not isinstance(group, str | int):
        return None
    name = clean(str(group))
    return None if name.casefold() in NO_GROUP else name
