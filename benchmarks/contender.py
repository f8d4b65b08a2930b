"""Programs that take turns, each in its own process, which answers lines with lines of JSON."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.measurement import TimeUp
from vit_scale.errors import UserError


class Server(NamedTuple):
    """A program that stands ready."""

    description: dict[str, Any]
    answer: Callable[[str], dict[str, Any]]


def serve(start: Callable[[], Server], questions: Iterable[str]) -> None:
    """Print the description of what `start` returns, then its answer to each question.

    An exception ends the program, and is printed as {"error": ...}.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else writes to standard output may not garble the answers
    try:
        server = start()
        print(json.dumps(server.description), file=answers)
        for line in questions:
            print(json.dumps(server.answer(line.strip())), file=answers)
    except UserError as error:
        print(json.dumps({"error": str(error)}), file=answers)
    except Exception as error:  # noqa: BLE001 (not installed, out of memory, no such kernel ...)
        first = (str(error).splitlines() or [""])[0][:200]
        print(json.dumps({"error": f"{type(error).__name__}: {first}"}), file=answers)


class Contender:
    """A process of a module of benchmarks/ that runs `serve`; it ends with the context.

    `seconds` returns how long the next answer may take, and the first one, which comes when the
    program is compiled and warmed up; `environment` is added to this process's. Raises UserError
    where it can't take part, and TimeUp where an answer takes longer; either is its end.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        seconds: Callable[[], float],
        environment: Mapping[str, str] | None = None,
    ):
        self._command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
        self._seconds, self._environment = seconds, dict(environment or {})

    def __enter__(self) -> "Contender":
        # The contenders stand side by side on the device: none may take all of its memory.
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | self._environment
        self._process = subprocess.Popen(
            self._command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self.description = self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, question: str) -> dict:
        """Return the program's answer."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it is dead; the missing answer says so
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        assert self._process.stdout
        began, seconds = time.monotonic(), self._seconds()
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line and time.monotonic() - began >= seconds:
            raise TimeUp(f"no answer within {seconds:g} s")
        answer = json.loads(line) if line else {"error": f"ended with {self._process.wait()}"}
        if "error" in answer:
            raise UserError(answer["error"])
        return answer


def start_all(
    stack: contextlib.ExitStack, contenders: Mapping[str, Contender]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Start the contenders one by one; return those that are ready, and why the others are not."""
    present: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    for name, contender in contenders.items():
        try:
            present[name] = stack.enter_context(contender)
        except (UserError, TimeUp) as error:
            absent[name] = str(error)
        print(f"{name}: {absent.get(name, 'ready')}", flush=True)
    return present, absent
