"""Render a report as one self-contained HTML file: no other file, script or network is needed."""

import base64
import html
from collections.abc import Sequence
from typing import Any, NamedTuple

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { margin-top: 2.2em; border-bottom: 2px solid #0072B2; }
h3 { margin: 1.6em 0 .3em; font-size: 1.05em; }
nav a { margin-right: 1.2em; } a { color: #005b8f; }
figure { margin: .5em 0 1.5em; } img { max-width: 100%; height: auto; display: block; }
figcaption, .note { color: #444; max-width: 75ch; } .note { font-style: italic; }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: left; }
"""


class Picture(NamedTuple):
    """A matplotlib figure with the name of its PNG, a title, and a caption."""

    name: str
    title: str
    caption: str
    figure: Any


class Table(NamedTuple):
    """Rows of text cells, all with the same keys."""

    title: str
    rows: Sequence[dict[str, str]]


class Note(NamedTuple):
    """Text in place of a figure that is not available, with the reason."""

    title: str
    text: str


Part = Picture | Table | Note


class Section(NamedTuple):
    """The parts of the report on one run, or on the comparison of several."""

    name: str  # prefix of the names of its PNGs; may be empty
    title: str
    parts: Sequence[Part]

    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]


def render_page(title: str, sections: Sequence[Section], pngs: dict[str, bytes]) -> str:
    """Render the HTML page; `pngs` are the encoded figures, by `file_name`."""
    links = "".join(f'<a href="#{_id(s.name)}">{_escape(s.title)}</a>' for s in sections)
    body = "\n".join(_section(section, pngs) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{_escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_escape(title)}</h1>\n<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )


def file_name(section: Section, picture: Picture) -> str:
    """The file name of a picture's PNG, without its extension."""
    return f"{section.name}-{picture.name}" if section.name else picture.name


def _section(section: Section, pngs: dict[str, bytes]) -> str:
    parts = []
    for part in section.parts:
        parts.append(f"<h3>{_escape(part.title)}</h3>")
        match part:
            case Picture():
                parts.append(_picture(part, pngs[file_name(section, part)]))
            case Table():
                parts.append(_table(part.rows))
            case Note():
                parts.append(f'<p class="note">{_escape(part.text)}</p>')
    content = "\n".join(parts)
    title = f"<h2>{_escape(section.title)}</h2>"
    return f'<section id="{_id(section.name)}">\n{title}\n{content}\n</section>'


def _picture(picture: Picture, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{_escape(picture.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_escape(picture.caption)}</figcaption></figure>"
    )


def _table(rows: Sequence[dict[str, str]]) -> str:
    head = "".join(f"<th>{_escape(name)}</th>" for name in rows[0])
    lines = ("".join(f"<td>{_escape(cell)}</td>" for cell in row.values()) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _id(name: str) -> str:
    return _escape(name.replace(" ", "-")) or "run"


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
