"""The project's documents as tests read them: their blocks of code, inline code and links."""

import pathlib
import re
import shlex
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PATTERNS = ("*.md", "docs/*.md", "benchmarks/*.md", "results/**/*.md", "examples/*.md")


def documents() -> dict[str, str]:
    """{"docs/data.md": text, ...} of every document."""
    files = sorted({file for pattern in PATTERNS for file in ROOT.glob(pattern)})
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, such as "bash"."""
    return [code for name, code in FENCED.findall(text) if name == language]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in a document's bash blocks, up to a pipe."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words[: words.index("|")] if "|" in words else words


def inline(text: str) -> list[str]:
    """The inline code outside of blocks."""
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", text))


def links(text: str) -> list[str]:
    """Where a document's links and pictures lead, but for other hosts."""
    found = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text))
    return [link for link in found if "://" not in link]


def anchors(text: str) -> set[str]:
    """What a link may name of a document's headings."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}
