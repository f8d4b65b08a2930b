"""The project's documents as tests read them: their blocks of code, inline code and links."""

import pathlib
import re
import shlex
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL_CARD = "---\nlicense:"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PATTERNS = ("*.md", "docs/*.md", "benchmarks/*.md", "results/**/*.md", "examples/*.md")


def documents() -> dict[str, str]:
    """{"docs/data.md": text, ...} of every document; `export --card` writes model cards."""
    files = sorted({file for pattern in PATTERNS for file in ROOT.glob(pattern)})
    texts = {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}
    return {name: text for name, text in texts.items() if not text.startswith(MODEL_CARD)}


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
