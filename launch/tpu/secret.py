"""Secrets: command lines hold only their names; values go to a worker over standard input.

The receiver requires the last line #END: gcloud retries a dropped connection with empty input.
"""

import json
import os
import pathlib
import re
import stat
from collections.abc import Iterable

from launch.tpu.exit_codes import Exit, Stop

USUAL = ("WANDB_API_KEY", "HF_TOKEN")  # sent if set


def collect(names: Iterable[str], file: str = "") -> dict[str, str]:
    """Return the values of `names` and of USUAL from the environment, and everything in `file`.

    Raises Stop for a missing secret, and for a file that others can read.
    """
    names, stored = list(names), read(file) if file else {}
    values = {name: os.environ.get(name) or stored.get(name, "") for name in (*names, *USUAL)}
    for name in names:
        if not values[name]:
            raise Stop(Exit.BAD_INPUT, f"secret {name} is not set: export it, or pass --env-file")
    values = {name: value for name, value in (stored | values).items() if value}
    for name, value in values.items():
        if not name.isidentifier() or "\n" in value:
            what = "is not an identifier, or its value has several lines"
            raise Stop(Exit.BAD_INPUT, f"secret {name!r} {what}")
    return values


def read(file: str) -> dict[str, str]:
    path = pathlib.Path(file)
    try:
        mode = path.stat().st_mode
        text = path.read_text()
    except OSError as error:
        raise Stop(Exit.BAD_INPUT, f"--env-file {file}: {error.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise Stop(Exit.BAD_INPUT, f"--env-file is readable by others; run: chmod 600 {file}")
    return parse_env(text)


def parse_env(text: str) -> dict[str, str]:
    """Parse NAME=VALUE lines, as a shell would; `export`, quotes and comments are allowed."""
    pairs = (line.removeprefix("export ").partition("=") for line in text.splitlines())
    lines = ((name.strip(), value.strip()) for name, equals, value in pairs if equals)
    return {name: _unquoted(value) for name, value in lines if not name.startswith("#")}


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value


def encode(values: dict[str, str]) -> bytes:
    pairs = {**values, "VIT_SCALE_REDACT": "|".join(redactable(values))}  # by the logs' upload
    return "".join(f"{name}={value}\n" for name, value in pairs.items()).encode() + b"#END\n"


def redactable(values: dict[str, str]) -> list[str]:
    """Return patterns of the values, longest first, however JSON, Python or a shell quotes them.

    Values under 6 characters occur by chance.
    """
    long = sorted((value for value in values.values() if len(value) >= 6), key=len, reverse=True)
    return ["".join(map(_quoted, value)) for value in long]


def _quoted(character: str) -> str:
    """Return a pattern of a character and of its escape sequences, which may be escaped again."""
    if character.isascii() and character.isalnum():
        return character
    if character == "'":
        return r"""\\*'(?:\\*"\\*'\\*"\\*')?"""  # a shell's '"'"'
    escaped = (ascii(character)[1:-1], json.dumps(character)[1:-1])
    forms = [form.replace("\\", r"\\+") for form in escaped if form.startswith("\\")]
    return rf"\\*(?:{'|'.join([re.escape(character), *forms])})"
