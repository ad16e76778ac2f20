"""Many captions by the toy base, for bench.py: how full the slots of a batch are kept, and how busy
a device, by decoding pictures ahead of it and by two ranks."""
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from PIL import Image

import generate
from base import open_base
from chunking import seen_by
from generate import Sampling, stream
from plumbing import data, slots
from plumbing.errors import InputError
from plumbing.images import find_images
from plumbing.texts import loops
from toy_world import world

ROOT = Path(__file__).parent.parent
TOY = str(ROOT / "assets/toy")
SLOTS, RANK_SCENES = 16, 2000
LONG, ONE_IN = 5, 10    # each tenth caption is five times as long as the others


def ignored(*caption):
    """The cost of looking for loops, without the verdict: captions of random tokens continue."""
    loops(*caption)
    return False


# ---------------------------------------------------------------- slots
class Uneven(generate.Batch):
    """A batch of images, by number, whose captions end where they are meant to."""

    @property
    def short(self):
        """Tokens of a usual caption."""
        return self.how.min_tokens // LONG

    def tokens_of(self, number):
        return self.short * (LONG if number % ONE_IN == 0 else 1)

    def step(self):
        ended = super().step()
        for i, member in enumerate(self.members):
            if member and len(member.captions[0]) >= self.tokens_of(member.item):
                ended.append((member.item, None))
                self.members[i] = None
        return ended


class Even(Uneven):
    """As many tokens in all, in captions of one length."""

    def tokens_of(self, number):
        return self.short * (ONE_IN - 1 + LONG) // ONE_IN


class Waiting(Uneven):
    """A batch that decodes finished captions along until the longest has ended."""

    def take(self, slots):
        """No slot is given up."""


def caption_all(model, n_images, short, kind, at_once):
    """Caption n images in batches of a kind, so many images handed to each; a usual caption has
    `short` tokens."""
    views = model.look([Image.new("RGB", (model.image_size,) * 2)] * 6)
    images = [(k, str(k), views) for k in range(n_images)]
    longest = short * LONG
    how = Sampling(1, longest + 1, temperature=0.0, min_tokens=longest, past_context=True)
    with mock.patch.object(generate, "Batch", kind), mock.patch.object(slots, "loops", ignored):
        for start in range(0, n_images, at_once):
            for _ in stream(model, images[start:start + at_once], SLOTS, how):
                pass


def ways(n_images, short, device):
    """Three ways: slots that are filled again, batches that wait, captions of one length."""
    model = open_base(TOY, device=device)
    run = functools.partial(caption_all, model, n_images, short)
    return (functools.partial(run, Uneven, n_images), functools.partial(run, Waiting, SLOTS),
            functools.partial(run, Even, n_images))


# ---------------------------------------------------------------- a device, and ranks
def photographs(folder, seconds):
    """How busy a device that takes so many seconds an image is kept -> {processes: share}."""
    images = [path for path, _ in find_images([folder])]
    model, shares = open_base(TOY), {}
    for workers in (2, 0):
        see = functools.partial(seen_by, model)
        began, busy = time.perf_counter(), 0.0
        for batch in data.ahead(images, see, workers, 4):
            time.sleep(seconds * len(batch))
            busy += seconds * len(batch)
        shares[workers] = busy / (time.perf_counter() - began)
    return shares


def ranks():
    """Seconds of caption.py on toy scenes by one process and by two, start included -> {n: s}."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        world.draw_scenes(folder / "scenes", range(RANK_SCENES))
        for n in (1, 2):
            command = [sys.executable, "caption.py", str(folder / "scenes"), "--base", TOY,
                       "--adapters", "none", "--out", str(folder / f"out-{n}")]
            began = time.perf_counter()
            running = [subprocess.Popen(command, cwd=ROOT, env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(n), "OMP_NUM_THREADS": "1"},
                stderr=subprocess.DEVNULL) for rank in range(n)]
            if any([process.wait() for process in running]):
                raise InputError("caption.py failed")
            seconds[n] = time.perf_counter() - began
    return seconds
