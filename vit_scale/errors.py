"""What a user did wrong, in one line, and the exit codes that launchers read."""

import difflib
import errno

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
    """The sentence that ends an "unknown name" error: the closest valid names, or all of them."""
    valid = sorted(map(str, valid))
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"valid: {', '.join(valid)}"
