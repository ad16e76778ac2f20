"""The one error that a user sees: a mistake of theirs, or a damaged file, in one line."""


class InputError(ValueError):
    """A user's mistake or a bad file: one line with the remedy, printed without a traceback."""
