"""What happened to many images: counted row by row, reported at the end."""
import re
from collections import Counter


def kind_of(error):
    """An error message without what is its image's own: names, numbers and details."""
    text = error.rsplit(": ", 1)[-1].split(" (")[0].split(";")[0]
    return re.sub(r"\d+", "N", text)[:80]


class Tally:
    """Counts of rows. Of several captions of an image, each counts."""

    def __init__(self):
        self.images = self.captions = self.kept = 0
        self.proved = self.confirmed = self.with_proof = 0
        self.errors, self.finish, self.lengths = Counter(), Counter(), Counter()

    def add(self, row):
        """Count a row, as caption.py makes it."""
        self.images += 1
        statements = row.get("statements", [])
        self.proved += len(statements)
        self.confirmed += sum(statement["kept"] for statement in statements)
        self.with_proof += bool(statements)
        if "error" in row:
            self.errors[kind_of(row["error"])] += 1
        elif row["finish"] == "kept":
            self.kept += 1
        else:
            finish, tokens = row["finish"], row["tokens"]
            self.captions += 1
            self.finish.update(finish if isinstance(finish, list) else [finish])
            self.lengths.update(tokens if isinstance(tokens, list) else [tokens])

    def lines(self, seconds, clock):
        """Lines of a summary. clock: {what: seconds} of where the time went."""
        errors = sum(self.errors.values())
        speed = self.images / max(seconds, 1e-9)
        kept = f", {self.kept} kept as they were" if self.kept else ""
        yield f"{self.images} images: {self.captions} captioned{kept}, {errors} errors, " \
              f"{speed:.3g} images/s"
        yield from (f"  {count} × {kind}" for kind, count in self.errors.most_common(10))
        if self.lengths:
            n = sum(self.lengths.values())
            mean = sum(length * count for length, count in self.lengths.items()) / n
            yield (f"length in tokens: {mean:.1f} on average, {min(self.lengths)} to "
                   f"{max(self.lengths)}; {self.finish['eos'] / n:.1%} ended by themselves")
        if self.proved:
            yield (f"statements: {self.proved / self.with_proof:.1f} per image, "
                   f"{1 - self.confirmed / self.proved:.1%} of them refused")
        if total := sum(clock.values()):
            yield "time: " + ", ".join(f"{what} {spent / total:.0%}"
                                       for what, spent in clock.most_common())
