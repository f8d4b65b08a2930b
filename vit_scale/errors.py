"""What a user did wrong, in one line, and the exit codes that launchers read."""

import difflib
import errno
import unicodedata

NEAR = 0.6  # share of the letters that two names have in common, to be taken for one another
DONE, FAILED, USAGE, RESUMABLE, DIVERGED = 0, 1, 2, 42, 43
# What a disk says that is full, over its quota, read-only or failing: a run can go on elsewhere, or
# when that is mended.
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


class UserError(Exception):
    """One line: what was wrong, the value, what to do. No traceback; the exit code is `code`."""

    def __init__(self, message: str, code: int = FAILED):
        super().__init__(message)
        self.code = code


def nearest(name: str, valid) -> str:
    """The sentence that ends an "unknown name" error: the closest valid names, or all of them.

    Where none is close, all of the block are named, or all blocks. Of names with points, such as
    optim.lr, it is the last part that has to be close, in the same block first; the same last part
    in another block is close as well.
    """
    valid = sorted(map(str, valid))
    close = _close(name, valid)
    if close:
        return f"did you mean {' or '.join(close)}?"
    block = [one for one in valid if one.startswith(f"{name.rpartition('.')[0]}.")]
    short = {f"{one.partition('.')[0]}.*" if "." in one else one for one in valid}
    return f"valid: {', '.join(block or sorted(short))}"


def _close(name: str, valid: list[str]) -> list[str]:
    block, _, leaf = name.rpartition(".")
    leaves = {one.rpartition(".")[2]: one for one in valid if one.rpartition(".")[0] == block}
    if found := difflib.get_close_matches(leaf, leaves, n=3, cutoff=NEAR):
        return [leaves[one] for one in found]
    if elsewhere := [one for one in valid if one.rpartition(".")[2] == leaf]:
        return elsewhere[:3]
    # A block that is misspelt: the rest has to be right.
    whole = difflib.get_close_matches(name, valid, n=3, cutoff=NEAR)
    return [one for one in whole if block and one.rpartition(".")[2] == leaf]


def printable(text: str) -> str:
    """`text` on one line that every UTF-8 stream takes, for people: of names from a disk.

    A byte that is no UTF-8 is shown as \\xe9, a line break as \\n. Scripts and emoji stay.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in UNPRINTABLE else c for c in text)


UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, half a character, breaks of lines


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python carries a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
