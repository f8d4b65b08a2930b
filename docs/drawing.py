"""Pictures of results, as SVG: legible on white and on black."""

import html
from collections.abc import Callable

# Colours that differ for colour-blind readers, on white and on black (Okabe & Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a828e")
LEFT, TOP, WIDTH, HEIGHT = 44, 26, 430, 240  # pixels
CHARACTER = 7.2  # pixels of width in the legend, at most, on average


def curves(series: dict[str, list[tuple[float, float]]], title: str, label: str) -> str:
    """Draw accuracies in [0, 1] over `label`, a line for each series, as SVG."""
    assert 0 < len(series) <= len(COLOURS)
    points = [point for line in series.values() for point in line]
    most = max(x for x, _ in points)
    low = int(min(10 * y for _, y in points)) / 10
    high = min(1.0, (int(max(10 * y for _, y in points)) + 1) / 10)

    def position(x: float, y: float) -> tuple[float, float]:
        return LEFT + WIDTH * x / most, TOP + HEIGHT * (high - y) / (high - low)

    name = html.escape(title)
    parts = [f'<text class="name" x="0" y="14">{name}</text>']
    parts += axes(position, most, low, high, label)
    for row, ((text, line), colour) in enumerate(zip(series.items(), COLOURS, strict=False)):
        places = [position(*point) for point in line]
        parts += [*drawn(places, colour), *entry(row, text, colour)]
    style = "text{font:13px sans-serif;fill:#7a828e}.name{font-weight:bold}.grid{stroke:#7a828e44}"
    width = round(LEFT + WIDTH + 42 + CHARACTER * max(map(len, series)))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
        f'viewBox="0 0 {width} {TOP + HEIGHT + 44}" role="img" aria-label="{name}">'
        f"<style>{style}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def axes(position: Callable, most: float, low: float, high: float, label: str) -> list[str]:
    """Draw lines at each tenth of accuracy, and numbers below."""
    parts = []
    for tenth in range(round(10 * low), round(10 * high) + 1):
        _, y = position(0, tenth / 10)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}h{WIDTH}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10 * tenth} %</text>'
        )
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200) if most / s <= 8)
    for x in range(0, int(most) + 1, step):
        left, bottom = position(x, low)
        parts.append(f'<text x="{left:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{x}</text>')
    end = f'x="{LEFT + WIDTH}" y="{TOP + HEIGHT + 36}"'
    return [*parts, f'<text {end} text-anchor="end">{html.escape(label)}</text>']


def drawn(places: list[tuple[float, float]], colour: str) -> list[str]:
    """Draw a line with a dot at each of its places."""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    return [f'<path fill="none" stroke="{colour}" stroke-width="2" d="M{path}"/>', *dots]


def entry(row: int, text: str, colour: str) -> list[str]:
    """Draw a line of the legend."""
    x, y = LEFT + WIDTH + 16, TOP + 12 + 22 * row
    return [
        f'<rect x="{x}" y="{y - 9}" width="14" height="4" fill="{colour}"/>'
        f'<text x="{x + 20}" y="{y - 2}">{html.escape(text)}</text>'
    ]
