"""The exit codes of the launcher and of what it calls, and the exception that ends the launcher."""

DONE = 0
FAILED = 1  # the training failed by an error of its own
USAGE = 64
BAD_INPUT = 65  # config, secrets or data
NO_CAPACITY = 69
SETUP = 70  # the workers' environments could not be made, or differ
INFRASTRUCTURE = 75  # restarted as often as is allowed
CRASH_LOOP = 76
AUTH = 77
REFUSED = 78  # quota, zone, type or runtime
TPU_HELD = 79  # by another program
LIMIT = 124  # of hours or cost; the run can be resumed
INTERRUPTED = 130  # detached or stopped by the user

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

# The trainer's, as in vit_scale/errors.py, beside DONE and FAILED.
TRAINER_USAGE, RESUMABLE, DIVERGED = 2, 42, 43
# Exit codes after which the same command resumes: saved, killed by a signal, or the machine lost.
RESTARTABLE = (RESUMABLE, *range(127, 256))

# agent.sh's, beside USAGE and TPU_HELD.
AGENT_DAMAGED = 65  # what arrived is not what was sent
AGENT_SETUP = 70
AGENT_DISK_FULL = 71
AGENT_BUSY = 75  # or too late


class Stop(Exception):
    """Ends the launcher with exit code `code`; the message is one line for the user."""

    def __init__(self, code: int, line: str):
        super().__init__(line)
        self.code = code
