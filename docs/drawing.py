"""Pictures of results, as SVG: legible on white and on black."""

# Colours that differ for colour-blind readers, on white and on black (Okabe & Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a828e")
LEFT, TOP, WIDTH, HEIGHT, LEGEND = 44, 26, 430, 240, 190  # pixels


def curves(series: dict[str, list[tuple[float, float]]], title: str, label: str) -> str:
    """Draw accuracies in [0, 1] over `label`, a line for each series, as SVG."""
    points = [point for line in series.values() for point in line]
    most = max(x for x, _ in points)
    low = int(min(10 * y for _, y in points)) / 10
    high = min(1.0, (int(max(10 * y for _, y in points)) + 1) / 10)

    def position(x: float, y: float) -> tuple[float, float]:
        return LEFT + WIDTH * x / most, TOP + HEIGHT * (high - y) / (high - low)

    parts = [f'<text class="name" x="0" y="14">{title}</text>']
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
    parts.append(f'<text {end} text-anchor="end">{label}</text>')
    for row, ((name, line), colour) in enumerate(zip(series.items(), COLOURS, strict=False)):
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (position(*point) for point in line))
        parts.append(f'<path fill="none" stroke="{colour}" stroke-width="2" d="M{path}"/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
            for x, y in (position(*point) for point in line)
        ]
        y = TOP + 12 + 22 * row
        parts.append(
            f'<rect x="{LEFT + WIDTH + 16}" y="{y - 9}" width="14" height="4" fill="{colour}"/>'
            f'<text x="{LEFT + WIDTH + 36}" y="{y - 2}">{name}</text>'
        )
    style = "text{font:13px sans-serif;fill:#7a828e}.name{font-weight:bold}.grid{stroke:#7a828e44}"
    size = f"{LEFT + WIDTH + LEGEND} {TOP + HEIGHT + 44}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + LEGEND}" '
        f'viewBox="0 0 {size}" role="img" aria-label="{title}"><style>{style}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
