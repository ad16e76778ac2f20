"""A tar shard's samples, from its headers alone: members are read in place, never extracted."""
import os
import tarfile
from itertools import groupby

from plumbing.errors import printable

MAGICS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")   # gzip, bzip2, xz, zstandard
COMPRESSED = "is compressed, so its members cannot be read one by one; decompress it to a .tar"
TAIL = 2 ** 20      # bytes behind the last member that are looked at


def samples(path, damage):
    """Yield (key, headers) of each sample, a webdataset's: neighbours up to their first dot.

    What is wrong with the tar as a whole is added to the list `damage` when the samples before that
    have been yielded.
    """
    for key, headers in groupby(members(path, damage), lambda member: sample_key(member.name)):
        yield key, list(headers)


def sample_key(name):
    folder, base = os.path.split(name)
    return os.path.join(folder, base.partition(".")[0] or base)


def extension(name):
    """What tells the members of a sample apart: all behind that dot."""
    return os.path.basename(name).partition(".")[2].lower()


def members(path, damage):
    """The headers of a tar, directories left out."""
    if not os.path.isfile(path):        # opening a pipe would block
        damage.append("no such file")
        return
    try:
        with open(path, "rb") as file:
            if file.read(6).startswith(MAGICS):
                damage.append(COMPRESSED)
                return
            file.seek(0)
            yield from whole_members(file)
    except Exception as error:      # tarfile raises whatever a broken header leads it to
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        damage.append(f"is cut off or damaged ({reason}); the members before that are read")


def whole_members(file):
    """The headers. An error where one is damaged or its data are not all there."""
    size, end = os.fstat(file.fileno()).st_size, 0
    tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
    while member := tar.next():
        tar.members.clear()         # tarfile would keep a million headers
        data_end = member.offset_data + member.size if member.type in tarfile.REGULAR_TYPES else 0
        if data_end > size and not member.issparse():
            raise tarfile.ReadError(f"{printable(member.name)} is cut off")
        if member.size < 0 or tar.offset <= end:    # tarfile would go round in circles
            raise tarfile.ReadError("a negative size")
        end = tar.offset
        if not member.isdir():
            yield member
    file.seek(tar.offset)
    tail = file.read(TAIL)          # tarfile takes a broken header for the end, and no end for one
    if not tail or tail.strip(b"\0"):
        raise tarfile.ReadError("what follows the last member is not the end of a tar")


def problem(member):
    """Why the bytes of a member are not read, or nothing."""
    if not member.isreg() or member.issparse():
        return "is a link, a device or a sparse file; only whole, plain files are read"
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts or "\0" in member.name:
        return "names a place outside the tar"
    return ""
