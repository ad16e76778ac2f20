"""Which images are in work at once: slots that are filled again as soon as their captions end.

Captions differ in length. A batch that waits for its longest decodes on for all the others, so an
image whose captions have ended leaves its slot to the next one, and the rest of the batch continues
(continuous batching, https://www.usenix.org/conference/osdi22/presentation/yu).

Whether they have ended is known to the host only, which reads their tokens. A GPU must not wait for
that: there the host looks every few steps, at a copy that was started the time before.
"""
import contextlib
import time
from collections import Counter
from dataclasses import dataclass

import torch

from plumbing.cache import rows_of
from plumbing.compiled import keep
from plumbing.errors import InputError
from plumbing.texts import loops
from plumbing.weights import enough_memory, free_bytes

LONGEST = 2048          # tokens of a caption where no limit is given and the context is longer
MOST_AT_ONCE = 16       # images in a batch, even where memory allows more
REFILL = 4              # new images come in, together, once 1/REFILL of the slots is free
LOOK_EVERY = {"cuda": 8}        # steps of a compiled batch; else after each


# ---------------------------------------------------------------- how many, how long
def room_left(model, images, max_new_tokens=None, past_context=False):
    """How many tokens a caption may have: max_new_tokens, and unless past_context no more than the
    trained context has left. InputError where the prompt alone fills the context.

    images: what `look` gave for an image, or how many views there are.
    """
    prefix = len(model.caption_prompt(images))
    left = model.seq_length - prefix
    if past_context and max_new_tokens is not None:
        return max_new_tokens
    if left < 1:
        raise InputError(f"the prompt is {prefix} tokens, the context {model.seq_length}; take "
                         "fewer views (--views one)")
    return min(left, LONGEST if max_new_tokens is None else max_new_tokens)


def images_at_once(model, n_views, samples, room):
    """How many images, with `samples` tails of `room` tokens each, fit in half the free memory."""
    free = free_bytes(model.device)
    if free is None:
        return MOST_AT_ONCE
    prefixes = 1 if model.packs else samples
    tokens = prefixes * len(model.caption_prompt(n_views)) + samples * room
    return max(1, min(MOST_AT_ONCE, int(free / 2 / (model.cache_bytes * tokens))))


# ---------------------------------------------------------------- a batch


@contextlib.contextmanager
def timed(clock, what):
    """Add the seconds inside to clock[what]."""
    began = time.perf_counter()
    yield
    clock[what] += time.perf_counter() - began


@dataclass
class Member:
    """An image in a slot: n captions (lists of ids), and why each ended, None while it has not."""
    item: object
    captions: list
    finish: list
    error: InputError | None = None     # takes the place of captions
    read: int = 0                       # tokens that the host has read of each caption

    @property
    def has_ended(self):
        return self.error is not None or None not in self.finish

    def append(self, k, tokens, tokenizer, room):
        """Append tokens to the k-th caption until it ends."""
        caption = self.captions[k]
        for token in tokens:
            if self.finish[k] is not None:
                return
            if token in tokenizer.ends:
                self.finish[k] = "eos"
                return
            caption.append(token)
            if loops(caption, tokenizer.plain_text):
                self.finish[k] = "repeat"
            elif len(caption) == room:
                self.finish[k] = "length"

    def results(self, tokenizer):
        return [{"caption": tokenizer.plain_text(caption), "finish": finish,
                 "tokens": len(caption)} for caption, finish in zip(self.captions, self.finish)]


@dataclass
class Glimpse:
    """The last tokens of all rows at a moment, on their way to the host."""
    members: list
    written: list           # tokens of each member's captions
    tokens: torch.Tensor    # (I·n, steps between two looks), newest last; on the host
    arrived: object         # an event, or None where they are there already


class Slots:
    """Images in work, each in a slot of n rows. A subclass gives `begin`, which prefills images
    and returns their cache, rows, and for each an InputError or None.

    There are at most `slots` slots, and at first as many as images are there. members: a slot's
    Member, or None where it is idle; an idle slot is decoded along with the others, and what comes
    out is not read. rows: tensors with a row for each caption, in the order of the members, among
    them "tokens". is_fixed: all slots are there from the start, and stay.
    """

    def __init__(self, model, slots, n, clock, is_fixed):
        self.model, self.slots, self.n, self.clock = model, slots, n, clock
        self.is_fixed = is_fixed
        self.members, self.cache, self.rows = [], None, {}
        self.length = None      # of the prompts of all members, in tokens
        self.look_every = LOOK_EVERY.get(model.device.type, 1) if is_fixed else 1
        self.steps, self.last_glimpse = 0, None

    @property
    def busy(self):
        return [i for i, member in enumerate(self.members) if member]

    @property
    def idle(self):
        return [i for i, member in enumerate(self.members) if not member]

    @property
    def is_empty(self):
        return not self.busy

    @property
    def can_shrink(self):
        return self.model.packs and not self.is_fixed and not self.is_empty

    @property
    def free(self):
        """How many images may come in now: none before there is room for a few."""
        free = self.slots - len(self.busy)
        if self.is_empty:
            return free
        # the state of a hybrid's layers cannot be replaced for a part of the batch
        return free if self.model.packs and free >= self.slots / REFILL else 0

    def expect(self, n):
        """No more than n images will come: a batch that has not begun needs no more slots."""
        if not self.members:
            self.slots = max(1, min(self.slots, n))

    def next_of(self, waiting):
        """The numbers of the waiting images (…, prompt) that come in next."""
        length = self.length
        if self.is_empty and waiting:           # the most common one; of equals, the first
            length = Counter(len(image[-1]) for image in waiting).most_common(1)[0][0]
        alike = [k for k, image in enumerate(waiting) if len(image[-1]) == length]
        return alike[:self.free]

    def wants_more(self, waiting):
        return len(self.next_of(waiting)) < self.free and len(waiting) < 2 * self.slots

    def admit(self, waiting):
        """Let in some of the waiting images (item, name, views, prompt) -> those that still wait.

        Without any to let in, half a batch of idle slots is given up.
        """
        numbers = self.next_of(waiting)
        if numbers:
            self.let_in([waiting[k] for k in numbers])
        elif self.can_shrink and 2 * len(self.busy) <= len(self.members):
            self.take(self.busy)
        return [image for k, image in enumerate(waiting) if k not in numbers]

    def let_in(self, new):
        """Prefill images, and give each a slot."""
        items, names, views, prompts = zip(*new)
        members = [Member(item, [[] for _ in range(self.n)], [None] * self.n) for item in items]
        what = (f"{max(len(self.members), len(new))} images × {self.n} captions; try a smaller "
                "--batch or --max-new-tokens, or fewer captions")
        is_continued = not self.is_empty or self.can_reuse(len(prompts[0]))
        if not is_continued:                         # the memory of the batch that has ended
            self.cache, self.rows = None, {}
        with enough_memory(what), timed(self.clock, "prefill"):
            cache, rows, errors = self.begin(names, views, prompts)
            for member, error in zip(members, errors):
                member.error = error
            self.length = len(prompts[0])
            if is_continued and rows["tokens"].shape[1] == self.rows["tokens"].shape[1]:
                self.put(members, cache, rows)
                return
            self.cache, self.rows, self.members = cache, rows, members
            if self.is_fixed:
                self.fix()

    def can_reuse(self, length):
        """Whether an empty batch may keep its cache."""
        return self.is_fixed and self.cache is not None and self.cache.holds(length)

    def fix(self):
        """Make all slots, and let their tensors stay where they are."""
        if missing := self.slots - len(self.members):
            self.take([*range(len(self.members)), *[0] * missing])
        self.cache.fix()
        keep([*self.cache.tensors(), *self.rows.values()])

    def put(self, members, cache, rows):
        """Put new members into idle slots."""
        missing = len(members) - len(self.idle)
        if missing > 0:                         # a slot is made by doubling any
            self.take([*range(len(self.members)), *[0] * missing])
        slots = self.idle[:len(members)]
        self.cache.replace(slots, cache)
        at = rows_of(slots, self.n)
        for name, values in rows.items():
            self.rows[name][at] = values
        for slot, member in zip(slots, members):
            self.members[slot] = member

    def take(self, slots):
        """Keep these slots, in this order; what is a repetition becomes an idle slot."""
        self.cache.take(slots)
        at = rows_of(slots, self.n)
        self.rows = {name: values[at] for name, values in self.rows.items()}
        self.members = [self.members[i] if i not in slots[:k] else None
                        for k, i in enumerate(slots)]

    def look(self):
        """[(slot, member, n lists of its new tokens)], once in a while."""
        self.steps += 1
        if self.steps % self.look_every:
            return []
        glimpse = self.glimpse()
        if self.look_every > 1:
            glimpse, self.last_glimpse = self.last_glimpse, glimpse
        return [] if glimpse is None else list(self.read(glimpse))

    def glimpse(self):
        """Start to copy the last tokens of all rows to the host."""
        written = (self.cache.used + 1).tolist()
        back = torch.arange(1 - self.look_every, 1, device=self.cache.now.device)
        now = self.cache.now.repeat_interleave(self.n)[:, None]               # (I·n, 1)
        tokens = self.rows["tokens"].gather(1, (now + back).clamp(min=0))     # (I·n, steps)
        return Glimpse(list(self.members), written, *on_its_way(tokens))

    def read(self, glimpse):
        """Yield (slot, member, n lists of its new tokens) of the members that are still there."""
        if glimpse.arrived:                     # for long, unless the device is far behind
            glimpse.arrived.synchronize()
        rows = glimpse.tokens.view(len(glimpse.members), self.n, -1).tolist()
        for i, (member, written) in enumerate(zip(glimpse.members, glimpse.written)):
            if member and self.members[i] is member:
                new = written - member.read
                member.read = written
                yield i, member, [row[len(row) - new:] for row in rows[i]]


def on_its_way(tensor):
    """A copy of a tensor on the host, and the event of its arrival, or None if it is there."""
    if tensor.device.type == "cpu":
        return tensor, None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived
