"""The exit codes of the launcher and of what it calls, and the exception that ends the launcher."""

import enum


class Exit(enum.IntEnum):
    """The launcher's exit codes; `result` names one in the final status."""

    DONE = 0
    FAILED = 1  # the training failed by an error of its own
    USAGE = 64
    BAD_INPUT = 65  # config, secrets or data
    NO_CAPACITY = 69
    SETUP_FAILED = 70  # the workers' environments could not be created, or differ
    INFRASTRUCTURE = 75  # restarted as often as is allowed
    CRASH_LOOP = 76
    NOT_PERMITTED = 77
    REFUSED = 78  # quota, zone, type or runtime
    TPU_HELD = 79  # by another program
    LIMIT_REACHED = 124  # of hours or cost; the run can be resumed
    INTERRUPTED = 130  # detached or stopped by the user

    @property
    def result(self) -> str:
        return self.name.lower().replace("_", " ")


class Trainer(enum.IntEnum):
    """The trainer's exit codes, as in vit_scale/errors.py."""

    DONE, FAILED, USAGE, RESUMABLE, DIVERGED = 0, 1, 2, 42, 43


class Agent(enum.IntEnum):
    """The exit codes of agent.sh, whose header explains them."""

    DONE, USAGE, DAMAGED, SETUP_FAILED, DISK_FULL, BUSY, TPU_HELD = 0, 64, 65, 70, 71, 75, 79


class Stop(Exception):
    """Ends the launcher with exit code `code`; the message is one line for the user."""

    def __init__(self, code: Exit, line: str):
        super().__init__(line)
        self.code = code
