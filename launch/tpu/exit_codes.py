"""The exit codes of the launcher, and the exception that ends it with one line."""

DONE = 0
FAILED = 1  # the training failed, by a mistake of its own
USAGE = 64
BAD_INPUT = 65  # config, secrets or data
NO_CAPACITY = 69
SETUP = 70  # the workers' environments could not be made, or differ
INFRASTRUCTURE = 75  # restarted as often as is allowed
CRASH_LOOP = 76
AUTH = 77
REFUSED = 78  # quota, zone, type or runtime
TPU_HELD = 79  # by another program
LIMIT = 124  # of hours or cost; the run can go on
INTERRUPTED = 130  # detached or stopped, by somebody
ALL = (0, 1, 64, 65, 69, 70, 75, 76, 77, 78, 79, 124, 130)

RESULTS = {
    DONE: "done",
    FAILED: "failed",
    USAGE: "usage",
    BAD_INPUT: "bad input",
    NO_CAPACITY: "no capacity",
    SETUP: "setup failed",
    INFRASTRUCTURE: "infrastructure",
    CRASH_LOOP: "crash loop",
    AUTH: "not permitted",
    REFUSED: "refused",
    TPU_HELD: "tpu held",
    LIMIT: "limit reached",
    INTERRUPTED: "interrupted",
}


class Stop(Exception):
    """Ends the launcher with `code`; the message is one line for the user."""

    def __init__(self, code: int, line: str):
        super().__init__(line)
        self.code = code
