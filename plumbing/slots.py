"""Which images are in work at once: slots that are filled again as soon as their captions end.

Captions differ in length. A batch that waits for its longest decodes on for all the others, so an
image whose captions have ended leaves its slot to the next one, and the rest of the batch continues
(continuous batching, https://www.usenix.org/conference/osdi22/presentation/yu).
"""
import contextlib
import time
from collections import Counter
from dataclasses import dataclass

from plumbing.cache import rows_of
from plumbing.errors import InputError
from plumbing.weights import enough_memory

REFILL = 4              # new images come in, together, once 1/REFILL of the slots is free


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


class Slots:
    """Images in work, each in a slot of n rows. A subclass gives `begin`, which prefills images
    and returns their cache, rows, and for each an InputError or None.

    There are at most `slots` slots, and at first as many as images are there. members: a slot's
    Member, or None where it is idle; an idle slot is decoded along with the others, and what comes
    out is not read. rows: tensors with a row for each caption, in the order of the members.
    """

    def __init__(self, model, slots, n, clock):
        self.model, self.slots, self.n, self.clock = model, slots, n, clock
        self.members, self.cache, self.rows = [], None, {}
        self.length = None      # of the prompts of all members, in tokens

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
    def free(self):
        """How many images may come in now: none before there is room for a few."""
        free = self.slots - len(self.busy)
        if self.is_empty:
            return free
        # the state of a hybrid's layers cannot be replaced for a part of the batch
        return free if self.model.packs and free >= self.slots / REFILL else 0

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
        elif self.model.packs and 2 * len(self.busy) <= len(self.members) and self.busy:
            self.take(self.busy)
        return [image for k, image in enumerate(waiting) if k not in numbers]

    def let_in(self, new):
        """Prefill images, and give each a slot."""
        items, names, views, prompts = zip(*new)
        members = [Member(item, [[] for _ in range(self.n)], [None] * self.n) for item in items]
        what = (f"{max(len(self.members), len(new))} images × {self.n} captions; try a smaller "
                "--batch or --max-new-tokens, or fewer captions")
        if self.is_empty:                       # the memory of the batch that has ended
            self.cache, self.rows = None, {}
        with enough_memory(what), timed(self.clock, "prefill"):
            cache, rows, errors = self.begin(names, views, prompts)
            for member, error in zip(members, errors):
                member.error = error
            if self.is_empty:
                self.length = len(prompts[0])
                self.cache, self.rows, self.members = cache, rows, members
            else:
                self.put(members, cache, rows)

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
