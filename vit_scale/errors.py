"""Errors of the user, as one line each, and the exit codes that launchers read."""

import difflib
import errno
import unicodedata

SIMILAR = 0.6  # difflib's ratio from which a name is suggested for a misspelt one
DONE, FAILED, USAGE, RESUMABLE, DIVERGED = 0, 1, 2, 42, 43
# Errors of a disk that is full, over quota, read-only or failing, or of a lost bucket: a run is
# resumable once that is repaired.
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


class UserError(Exception):
    """A message of one line, printed without a traceback: what is wrong, the value, what to do.

    `code` is the process's exit code.
    """

    def __init__(self, message: str, code: int = FAILED):
        super().__init__(message)
        self.code = code


def nearest(name: str, valid) -> str:
    """Return the end of an "unknown name" error: "did you mean X?", or the valid names.

    Of a dotted name such as optim.lr, the last part is matched, first in its own block, then in
    others. Without a similar name all names of the block are listed, or all blocks.
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
    if similar := difflib.get_close_matches(leaf, leaves, n=3, cutoff=SIMILAR):
        return [leaves[one] for one in similar]
    if elsewhere := {
        one.rpartition(".")[0]: one for one in valid if one.rpartition(".")[2] == leaf
    }:
        similar = difflib.get_close_matches(block, elsewhere, n=1, cutoff=SIMILAR)
        return [elsewhere[one] for one in similar] or list(elsewhere.values())[:3]
    # The block may be misspelt, if the last part is right.
    whole = difflib.get_close_matches(name, valid, n=3, cutoff=SIMILAR)
    return [one for one in whole if block and one.rpartition(".")[2] == leaf]


def printable(text: str) -> str:
    """Return `text`, such as a file's name, as one line that any UTF-8 stream can print.

    Bytes that are not UTF-8 become \\xe9, line breaks \\n. Letters of any script and emoji stay.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in UNPRINTABLE else c for c in text)


UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, lone surrogates, line breaks


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
