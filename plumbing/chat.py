"""Two ways to a chat model: transformers in this process, or a server with OpenAI's chat API.

Both take conversations and yield replies. `ask` makes a chat model usable as a tool: it has replies
read by a parser, asks again for those that cannot be read, and caches the others on disk by
content, so that no question is asked twice.
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

from plumbing.data import batched
from plumbing.errors import InputError
from plumbing.rules import Unreadable
from plumbing.weights import usual_dtype

READINGS = 3                # replies asked for until one can be read
TRIES = 6                   # times a request is sent that fails on its way
LONGEST_WAIT = 300          # seconds between two tries, whatever the server asks for
LARGEST_REPLY = 1 << 24     # bytes
GIVE_UP = 50                # requests lost in a row after which the server counts as gone
KEY = "OPENAI_API_KEY"


class ToolError(Exception):
    """There is no usable answer for one item: it becomes an error row, and the run continues."""


# ---------------------------------------------------------------- a model in this process
class Local:
    """A transformers chat model (Hub name or folder), in batches on one device, greedy."""

    def __init__(self, name, device, batch, max_tokens):
        # here, since it takes seconds and only this class needs it
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.name, self.device = f"hf:{name}", device
        self.batch, self.max_tokens = batch, max_tokens
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.model = AutoModelForCausalLM.from_pretrained(
                name, trust_remote_code=False, dtype=usual_dtype(device))
        except Exception as error:      # three packages raise here, without a common base class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise InputError(f"--tool hf:{name}: cannot be loaded ({reason})") from None
        if self.tokenizer.chat_template is None:
            raise InputError(f"--tool hf:{name}: has no chat template; give an instruct model")
        self.model.to(device).eval()
        self.context = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        pads = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0
        self.pad = next(pad for pad in pads if pad is not None)

    def encode(self, conversation):
        """Token ids of a conversation in which special tokens come from the template alone.

        The template is filled with placeholders and encoded around them. The texts are encoded
        separately, so that a special token that a text spells out remains text.
        """
        placeholders = [{"role": message["role"], "content": f"\ue000{k}\ue001"}
                        for k, message in enumerate(conversation)]
        filled = self.tokenizer.apply_chat_template(
            placeholders, tokenize=False, add_generation_prompt=True)
        ids = []
        for part in re.split("(\ue000[0-9]+\ue001)", filled):
            held = re.fullmatch("\ue000([0-9]+)\ue001", part)
            text = conversation[int(held[1])]["content"] if held else part
            ids += self.tokenizer(text, add_special_tokens=False,
                                  split_special_tokens=bool(held))["input_ids"]
        return ids

    def replies(self, conversations):
        """Yield (key, reply or ToolError) for {key: conversation}.

        Prompts of similar length share a batch.
        """
        prompts = {key: self.encode(talk) for key, talk in conversations.items()}
        fitting = []
        for key in sorted(prompts, key=lambda key: len(prompts[key])):
            if len(prompts[key]) < self.context:
                fitting.append(key)
            else:
                yield key, ToolError(f"the prompt has {len(prompts[key])} tokens, and the tool's "
                                     f"context only {self.context}")
        for keys in batched(fitting, self.batch):
            rows = self.generate([prompts[key] for key in keys])
            for key, row in zip(keys, rows):
                yield key, self.tokenizer.decode(row, skip_special_tokens=True)

    @torch.no_grad()
    def generate(self, prompts):
        """Greedy replies to B prompts, lists of token ids -> new ids (B, n)."""
        longest = max(map(len, prompts))
        ids = [[self.pad] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        try:
            both = self.model.generate(
                input_ids=torch.tensor(ids, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                do_sample=False, temperature=None, top_p=None, top_k=None, pad_token_id=self.pad,
                max_new_tokens=min(self.max_tokens, self.context - longest))
        except torch.OutOfMemoryError:
            raise InputError(f"{self.device} is out of memory with {len(prompts)} prompts of "
                             f"{longest} tokens; try a smaller --tool-batch or --tool-tokens"
                             ) from None
        return both[:, longest:]


# ---------------------------------------------------------------- a server
class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: the key goes to the server that the user named and to no other."""

    def redirect_request(self, *_):
        return None


class Server:
    """A server with OpenAI's chat API at http(s)://…/v1, with several requests in flight.

    The key is read from OPENAI_API_KEY. It is sent in the request's header, and neither printed nor
    stored.
    """

    def __init__(self, url, model, in_flight, timeout, max_tokens):
        self.url, self.model, self.in_flight = url.rstrip("/"), model, in_flight
        self.timeout, self.max_tokens, self.lost = timeout, max_tokens, 0
        self.name = f"{self.url} {model}"
        self.key = os.environ.get(KEY, "").strip()
        if not self.key.isascii() or not self.key.isprintable():
            raise InputError(f"{KEY}: holds characters that no key has; set it again")
        if "@" in self.url.split("/")[2]:
            raise InputError(f"--tool: put no password in the address; put the key in {KEY}")
        self.headers = {"Content-Type": "application/json"}
        if self.key:
            self.headers["Authorization"] = f"Bearer {self.key}"
        self.opener = urllib.request.build_opener(NoRedirect)

    def replies(self, conversations):
        """Yield (key, reply or ToolError) for {key: conversation}, in the order of arrival."""
        todo, done = queue.SimpleQueue(), queue.SimpleQueue()
        for item in conversations.items():
            todo.put(item)
        for _ in range(min(self.in_flight, len(conversations))):
            # daemon threads, so that ^C does not wait for the server
            threading.Thread(target=self.work, args=(todo, done), daemon=True).start()
        for _ in conversations:
            key, reply = done.get()
            if isinstance(reply, Exception) and not isinstance(reply, ToolError):
                while not todo.empty():
                    todo.get()
                raise reply
            yield key, reply

    def work(self, todo, done):
        """A thread: takes (key, conversation) from todo and puts (key, reply or error) into done.

        An error other than a ToolError ends the thread. The reader of `done` raises it, since
        nobody would see it raised here.
        """
        while True:
            try:
                key, conversation = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((key, self.reply(conversation)))
            except ToolError as error:
                done.put((key, error))
            except Exception as error:
                done.put((key, error))
                return

    def reply(self, conversation):
        """One reply. Failures that may pass are retried, each time after a longer wait.

        Raises ToolError where this request has failed for good, and InputError where every other
        one would fail too.
        """
        for attempt in range(TRIES):
            wait = random.uniform(0.5, 1) * 2 ** attempt    # seconds, not the same in all threads
            try:
                text = self.send(conversation)
            except urllib.error.HTTPError as error:
                self.raise_if_final(error)
                reason = f"HTTP {error.code}"
                wait = max(wait, retry_after(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = self.one_line(str(getattr(error, "reason", error)), 300)
                reason = reason or type(error).__name__
            else:
                self.lost = 0
                return text
            if attempt + 1 < TRIES:
                time.sleep(min(wait, LONGEST_WAIT))
        self.lost += 1
        if self.lost >= GIVE_UP:
            raise InputError(f"{self.url}: {GIVE_UP} requests in a row were lost, the last with "
                             f"{reason}. Run the same command again when the server is back")
        raise ToolError(f"{self.url}: no answer after {TRIES} tries, the last time: {reason}")

    def raise_if_final(self, error):
        """Raise for an HTTPError that would come again if the request were sent again."""
        if error.code in (301, 302, 303, 307, 308, 401, 403, 404):
            raise InputError(f"{self.url}: HTTP {error.code}; check --tool, --tool-model and {KEY}"
                             ) from None
        may_pass = error.code in (408, 409, 425, 429) or error.code >= 500
        if not may_pass:
            reason = self.one_line(error_body(error), 200)
            raise ToolError(f"{self.url}: HTTP {error.code}: {reason}") from None

    def send(self, conversation):
        """The text of the reply to one request.

        Raises OSError, HTTPException or ValueError where the request failed or the reply is not
        complete.
        """
        body = {"model": self.model, "messages": conversation, "temperature": 0,
                "max_tokens": self.max_tokens}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(),
                                         self.headers)
        deadline, reply = time.monotonic() + self.timeout, b""
        with self.opener.open(request, timeout=self.timeout) as response:
            while piece := response.read1(1 << 16):
                reply += piece
                # the socket's own timeout starts anew with every byte that a slow server sends
                if time.monotonic() > deadline or len(reply) > LARGEST_REPLY:
                    raise TimeoutError(f"the reply is not complete after {self.timeout:g} s or "
                                       f"{len(reply)} bytes")
        try:
            return completion_text(json.loads(reply))
        except (ValueError, LookupError, TypeError, RecursionError):
            shown = self.one_line(reply[:2000].decode("utf-8", "replace"), 80)
            raise ValueError(f"the reply is not a chat completion: {shown!r}") from None

    def one_line(self, text, longest):
        """A server's text on one line, cut to a number of characters, without the key: some servers
        repeat it."""
        if self.key:
            text = text.replace(self.key, "…")
        return " ".join(text.split())[:longest]


def completion_text(completion):
    """The text of a chat completion; "" where its content is not text. LookupError or TypeError for
    JSON of another shape."""
    content = completion["choices"][0]["message"]["content"]
    if isinstance(content, list):           # some servers send the text in parts
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def error_body(error):
    """The beginning of the body of an HTTPError; "" if it does not arrive."""
    try:
        with error:
            # read1 returns what has arrived; waiting for all of it might never end
            return error.read1(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


def retry_after(value):
    """Seconds that a Retry-After header asks for, as a number or a date; 0 without a valid one."""
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


# ---------------------------------------------------------------- asking
class Replies:
    """A cache of readable replies, in files named by a hash of model and conversation."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, chat, conversation):
        content = json.dumps([chat.name, chat.max_tokens, conversation])
        key = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / key[:2] / f"{key[2:]}.txt"

    def get(self, chat, conversation):
        """The cached reply, or None."""
        try:
            content = self.path(chat, conversation).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"--tool-cache {self.folder}: {error.strerror}") from None
        return content.decode("utf-8", "surrogatepass")

    def put(self, chat, conversation, reply):
        """Cache a reply, unless there is one already."""
        path = self.path(chat, conversation)
        if path.is_file():
            return
        # The process id, since several ranks may write the same reply at once. No fsync: it would
        # cost more than asking again for a reply that a crash took.
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(reply.encode("utf-8", "surrogatepass"))
            os.replace(temporary, path)
        except OSError as error:
            raise InputError(f"--tool-cache {self.folder}: {error.strerror}") from None


def cached_or_fresh(chat, cache, conversations):
    """Yield (index, reply or ToolError) for {index: conversation}, cached replies first."""
    fresh = {}
    for i, conversation in conversations.items():
        reply = cache.get(chat, conversation)
        if reply is None:
            fresh[i] = conversation
        else:
            yield i, reply
    yield from chat.replies(fresh)


def ask(chat, cache, prompts, read):
    """Yield (index, value or ToolError) for each of a list of prompts, in the order of arrival.

    read(reply, index) returns the value or raises Unreadable. The model is then sent the reason
    and asked again. If no reply can be read in full, the last that can be read in part counts.
    """
    waiting = {i: [{"role": "user", "content": prompt}] for i, prompt in enumerate(prompts)}
    failures = {i: [] for i in waiting}         # the Unreadables of each prompt
    for _ in range(READINGS):
        again = {}
        for i, reply in cached_or_fresh(chat, cache, waiting):
            value = reply if isinstance(reply, ToolError) else read_or_error(read, reply, i)
            if isinstance(value, Unreadable):
                failures[i].append(value)
                again[i] = ask_again(waiting[i], reply, value)
            elif isinstance(value, ToolError):
                yield i, last_partial(failures[i], value)
            else:
                cache.put(chat, waiting[i], reply)
                yield i, value
        waiting = again
    for i in waiting:
        error = ToolError(f"asked {READINGS} times, no usable answer: {failures[i][0]}")
        yield i, last_partial(failures[i], error)


def read_or_error(read, reply, i):
    """read(reply, i), or the Unreadable that it raises."""
    try:
        return read(reply, i)
    except Unreadable as error:
        return error


def ask_again(conversation, reply, error):
    """The conversation with a reply that could not be read, and a request for another one."""
    request = f"I could not read that: {error}. Answer again, and with the JSON alone."
    return [*conversation, {"role": "assistant", "content": reply[:2000]},
            {"role": "user", "content": request}]


def last_partial(failures, error):
    """What could last be read in part, or else the error."""
    partials = [failure.partial for failure in failures if failure.partial is not None]
    return partials[-1] if partials else error
