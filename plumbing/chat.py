"""Two ways to a chat model: a transformers model in this process, or a server with OpenAI's chat API.

Both take conversations and give replies. `ask` adds what makes a chat model usable as a tool: replies are read by a
parser, asked for again when they cannot be, and kept on disk by content, so that nothing is asked twice.
"""
import email.utils
import hashlib
import http.client
import json
import os
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch

from plumbing.errors import InputError
from plumbing.rules import Unreadable
from plumbing.weights import usual_dtype

READINGS = 3            # times a reply is asked for that cannot be read
TRIES = 6               # times a request is sent that fails on its way
LONGEST_WAIT = 300      # seconds between two of them, whatever the server asks for
LARGEST_REPLY = 1 << 24     # bytes
GIVE_UP = 50            # requests in a row lost for good: the server is gone
KEY = "OPENAI_API_KEY"


class ToolError(Exception):
    """One answer could not be had: the row becomes an error row, the others go on."""


# ---------------------------------------------------------------- a model in this process
class Local:
    """A transformers chat model, Hub name or folder, through its chat template, in batches on one device."""

    def __init__(self, name, device, batch, max_tokens):
        from transformers import (  # takes seconds, and only here is it of use
            AutoModelForCausalLM,
            AutoTokenizer,
        )
        from transformers.utils import logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.name, self.device, self.batch, self.max_tokens = f"hf:{name}", device, batch, max_tokens
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, dtype=usual_dtype(device))
        except Exception as error:      # those of transformers, tokenizers and safetensors share no base class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise InputError(f"--tool hf:{name}: cannot be loaded ({reason})") from None
        if self.tokenizer.chat_template is None:
            raise InputError(f"--tool hf:{name}: has no chat template; give a chat (instruct) model")
        self.model.to(device).eval()
        self.context = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        self.pad = next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)

    def encode(self, conversation):
        """Token ids of a conversation; special tokens that its texts spell out are text.

        The template is filled with place holders and what stands between them is encoded as it is; the texts are
        encoded apart, without special tokens.
        """
        holders = [{"role": m["role"], "content": f"\ue000{k}\ue001"} for k, m in enumerate(conversation)]
        whole = self.tokenizer.apply_chat_template(holders, tokenize=False, add_generation_prompt=True)
        ids = []
        for part in re.split("(\ue000[0-9]+\ue001)", whole):
            held = re.fullmatch("\ue000([0-9]+)\ue001", part)
            text = conversation[int(held[1])]["content"] if held else part
            ids += self.tokenizer(text, add_special_tokens=False, split_special_tokens=bool(held))["input_ids"]
        return ids

    @torch.no_grad()
    def replies(self, conversations):
        """Yield (key, reply or ToolError) for {key: conversation}, those of like length together."""
        prompts = {key: self.encode(conversation) for key, conversation in conversations.items()}
        order = sorted(prompts, key=lambda key: len(prompts[key]))
        for key in [key for key in order if len(prompts[key]) >= self.context]:
            order.remove(key)
            yield key, ToolError(f"the prompt is {len(prompts[key])} tokens, the tool's context {self.context}")
        for first in range(0, len(order), self.batch):
            keys = order[first:first + self.batch]
            longest = len(prompts[keys[-1]])
            ids = torch.tensor([[self.pad] * (longest - len(prompts[k])) + prompts[k] for k in keys])
            mask = torch.tensor([[0] * (longest - len(prompts[k])) + [1] * len(prompts[k]) for k in keys])
            try:
                new = self.model.generate(
                    input_ids=ids.to(self.device), attention_mask=mask.to(self.device), do_sample=False,
                    temperature=None, top_p=None, top_k=None, pad_token_id=self.pad,
                    max_new_tokens=min(self.max_tokens, self.context - longest))
            except torch.OutOfMemoryError:
                raise InputError(f"{self.device} is out of memory with {len(keys)} prompts of {longest} tokens; try a "
                                 "smaller --tool-batch or --tool-tokens") from None
            for key, row in zip(keys, new[:, longest:]):
                yield key, self.tokenizer.decode(row, skip_special_tokens=True)


# ---------------------------------------------------------------- a server
class NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the server that the user named, and to no other."""

    def redirect_request(self, *_):
        return None


class Server:
    """A server with OpenAI's chat API at http(s)://…/v1, with many requests in flight. The key comes from the
    environment (OPENAI_API_KEY) and goes nowhere but into the request's header."""

    def __init__(self, url, model, in_flight, timeout, max_tokens):
        self.url, self.model, self.in_flight = url.rstrip("/"), model, in_flight
        self.timeout, self.max_tokens, self.lost = timeout, max_tokens, 0
        self.name = f"{self.url} {model}"
        key = os.environ.get(KEY, "").strip()
        if not key.isascii() or not key.isprintable():
            raise InputError(f"{KEY}: holds characters that no key has; set it again")
        if "@" in self.url.split("/")[2]:
            raise InputError(f"--tool: no password in the address, please; put the key in {KEY}")
        self.key = key
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.opener = urllib.request.build_opener(NoRedirect)

    def replies(self, conversations):
        """Yield (key, reply or ToolError) for {key: conversation}, as they come."""
        todo, done = queue.SimpleQueue(), queue.SimpleQueue()
        for item in conversations.items():
            todo.put(item)

        def work():
            while True:
                try:
                    key, conversation = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((key, self.reply(conversation)))
                except Exception as error:      # a thread has nobody to tell: the reader raises it
                    done.put((key, error))
                    if not isinstance(error, ToolError):
                        return
        for _ in range(min(self.in_flight, len(conversations))):
            threading.Thread(target=work, daemon=True).start()      # daemons: ^C does not wait for the server
        for _ in conversations:
            key, reply = done.get()
            if isinstance(reply, Exception) and not isinstance(reply, ToolError):
                while not todo.empty():
                    todo.get()
                raise reply
            yield key, reply

    def reply(self, conversation):
        """One reply; sent again after failures that may pass, later and later, as late as the server asks."""
        for attempt in range(TRIES):
            wait = random.uniform(0.5, 1) * 2 ** attempt        # seconds; not all at the same moment
            try:
                text = self.send(conversation)
                self.lost = 0
                return text
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}"
                if error.code in (301, 302, 303, 307, 308, 401, 403, 404):
                    raise InputError(f"{self.url}: {reason}; check --tool, --tool-model and {KEY}") from None
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    raise ToolError(f"{self.url}: {reason}: {self.line(body_of(error), 200)}") from None
                wait = max(wait, retry_after(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = self.line(str(getattr(error, "reason", error)), 300) or type(error).__name__
            if attempt + 1 < TRIES:
                time.sleep(min(wait, LONGEST_WAIT))
        self.lost += 1
        if self.lost >= GIVE_UP:
            raise InputError(f"{self.url}: {GIVE_UP} requests in a row were lost, the last one with: {reason}. Run the "
                             "same command again when the server is back")
        raise ToolError(f"{self.url}: no answer after {TRIES} tries, the last time: {reason}")

    def send(self, conversation):
        """One request -> its text; OSError, HTTPException or ValueError where it failed or came in half."""
        body = {"model": self.model, "messages": conversation, "temperature": 0, "max_tokens": self.max_tokens}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), self.headers)
        end, data = time.monotonic() + self.timeout, b""
        with self.opener.open(request, timeout=self.timeout) as response:
            while piece := response.read1(1 << 16):
                data += piece
                if time.monotonic() > end or len(data) > LARGEST_REPLY:     # a server may send a byte now and then
                    raise TimeoutError(f"the reply is not whole after {self.timeout:g} s, or has no end")
        try:
            content = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            said = self.line(data[:2000].decode("utf-8", "replace"), 80)
            raise ValueError(f"the reply is no chat completion: {said!r}") from None
        if isinstance(content, list):           # some servers give the text in parts
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "".join(text for text in texts if isinstance(text, str))
        return content if isinstance(content, str) else ""

    def line(self, text, longest):
        """What a server said, on one line of so many characters; without the key, which some servers repeat."""
        return " ".join((text.replace(self.key, "…") if self.key else text).split())[:longest]


def body_of(error):
    """The beginning of what came with an HTTP error; "" where it does not come."""
    try:
        with error:
            return error.read1(2000).decode("utf-8", "replace")        # what is there: the rest may take for ever
    except (OSError, http.client.HTTPException):
        return ""


def retry_after(value):
    """Seconds that a Retry-After header asks for, given as a number or a date; 0 where there is none."""
    if value is None:
        return 0.0
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return 0.0


# ---------------------------------------------------------------- reading answers
STARTS = 20             # places in an answer where JSON might begin
DEEPEST = 50            # brackets in brackets


def loose_json(reply):
    """The list or object in a model's answer, and whether it was whole. Unreadable where there is none.

    Copes with reasoning before it, fences, prose around, trailing commas, line breaks in strings, numbered or dashed
    lines instead of JSON, and answers that were cut off, of which the whole entries are taken.
    """
    reply = re.sub(r"(?s)^.*</think>", "", reply)
    if re.match(r"\s*<think>", reply):
        raise Unreadable("its reasoning has no end")
    best, end = ("", None, False), 0
    for start in [found.start() for found in re.finditer(r"[\[{]", reply)][:STARTS]:
        text, length, whole = mended(reply[start:]) if start >= end else ("", 0, False)
        try:
            value = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            if not text and start + length == len(reply) and re.match(r'\[\s*["\[{]|{\s*"', reply[start:]):
                break                                           # cut off before its first entry was whole
            continue                                            # a bracket of the prose, or inside what was found
        end = start + length
        if value:
            best = max(best, (text, value, whole), key=lambda found: len(found[0]))
    if best[0]:
        return best[1:]
    lines = re.findall(r"(?m)^[^\S\n]*(?:\d+[.):]|[-*•])[^\S\n]+(\S.*)$", reply)
    if not lines:
        raise Unreadable("there is no JSON in it")
    return [line.strip().strip('"') for line in lines], True


def mended(text):
    """JSON at the start of a text without trailing commas, closed where it was cut off -> (JSON, its length in the
    text, whether it was whole). What was cut off ends with the last whole entry of its outermost list."""
    out, closers, cut, in_string, at = [], [], "", False, 0
    while at < len(text):
        c = text[at]
        if in_string and c == "\\":
            out.append(text[at:at + 2])
            at += 2
            continue
        if c == '"':
            in_string = not in_string
        elif not in_string and c in "[{":
            if len(closers) == DEEPEST:
                break                                           # no answer, and long to read
            closers.append("]" if c == "[" else "}")
        elif not in_string and c in "]}":
            while out[-1].isspace() or out[-1] == ",":
                out.pop()
            if closers.pop() != c:
                break                                           # no JSON after all
            if not closers:
                return "".join(out) + c, at + 1, True
        out.append(c)
        at += 1
        if not in_string and c in ']}"' and closers and closers[-1] == "]" and closers.count("]") == 1:
            cut = len(out), "".join(reversed(closers))
    return ("".join(out[:cut[0]]) + cut[1] if cut else ""), at, False


# ---------------------------------------------------------------- asking
class Replies:
    """Replies that could be read, a file each, named by a hash of model and conversation."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, chat, conversation):
        said = json.dumps([chat.name, chat.max_tokens, conversation])
        key = hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / key[:2] / f"{key[2:]}.txt"

    def get(self, chat, conversation):
        try:
            return self.path(chat, conversation).read_bytes().decode("utf-8", "surrogatepass")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"--tool-cache {self.folder}: {error.strerror}") from None

    def put(self, chat, conversation, reply):
        path = self.path(chat, conversation)
        if path.is_file():
            return
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(reply.encode("utf-8", "surrogatepass"))
            os.replace(temporary, path)
        except OSError as error:
            raise InputError(f"--tool-cache {self.folder}: {error.strerror}") from None


def kept_or_fresh(chat, kept, waiting):
    """Yield (index, reply or ToolError): first what is on disk, then what the model says."""
    fresh = {}
    for i, conversation in waiting.items():
        reply = kept.get(chat, conversation)
        if reply is None:
            fresh[i] = conversation
        else:
            yield i, reply
    yield from chat.replies(fresh)


def ask(chat, kept, prompts, read):
    """Yield (index, value or ToolError) for each of some prompts, as they come.

    read(reply, index) gives the value, or raises Unreadable; then the reason is told to the model, and it is asked
    again. If no reply is whole, half a one will do.
    """
    waiting, lost = {i: [{"role": "user", "content": prompt}] for i, prompt in enumerate(prompts)}, {}
    for _ in range(READINGS):
        again = {}
        for i, reply in kept_or_fresh(chat, kept, waiting):
            if isinstance(reply, ToolError):
                yield i, reply if i not in lost or lost[i].half is None else lost[i].half
                continue
            try:
                value = read(reply, i)
            except Unreadable as error:
                lost[i] = error if error.half is not None or i not in lost else lost[i]
                again[i] = [*waiting[i], {"role": "assistant", "content": reply[:2000]},
                            {"role": "user", "content": f"I could not read that: {error}. Answer again, and with the "
                             "JSON alone."}]
            else:
                kept.put(chat, waiting[i], reply)
                yield i, value
        waiting = again
    for i in waiting:
        half = lost[i].half
        yield i, ToolError(f"asked {READINGS} times, no usable answer: {lost[i]}") if half is None else half
