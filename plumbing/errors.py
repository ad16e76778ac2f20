"""The one error that a user sees: a mistake of theirs, or a damaged file, in one line."""
import contextlib
import errno


class InputError(ValueError):
    """A user's mistake or a bad file: one line with the remedy, printed without a traceback."""


def printable(name):
    """A path as a message shows it: on one line, whatever characters are in it."""
    return str(name) if str(name).isprintable() else repr(str(name))


@contextlib.contextmanager
def explained(path):
    """The system's errors as one line with the remedy; `path` where an error names no file."""
    try:
        yield
    except OSError as error:
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "put that right"
        name = printable(error.filename or path)
        raise InputError(f"{name}: {error.strerror or error}; {remedy} and run the same command "
                         "again") from None
