"""A progress bar of all ranks, on the first of them: it counts the lines that others write."""
import time

from tqdm import tqdm

POLL = 2.0              # seconds between looks at the files of the others


class Progress:
    """The bar of a rank: hidden on all but the first.

    others: files to which the other ranks append a line for each image.
    """

    def __init__(self, total, others, hidden):
        self.bar = tqdm(total=total, unit="image", disable=True if hidden else None, smoothing=0.05)
        self.others = {} if hidden else {path: size_of(path) for path in others}
        self.next_look = time.monotonic() + POLL

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def step(self, errors):
        """An image of this rank is done; errors: how many had one so far."""
        self.bar.set_postfix(errors=errors, refresh=False)
        self.bar.update()
        if self.others and time.monotonic() >= self.next_look:
            self.bar.update(self.lines_of_others())
            self.next_look = time.monotonic() + POLL

    def lines_of_others(self):
        """How many lines they have written since the last look."""
        lines = 0
        for path, start in self.others.items():
            if size_of(path) > start:
                with path.open("rb") as file:
                    file.seek(start)
                    text = file.read()
                lines += text.count(b"\n")
                self.others[path] = start + len(text)
        return lines


def size_of(path):
    return path.stat().st_size if path.exists() else 0
