"""Inspect runs and write the report: what `vit-scale inspect` does, step by step."""

import contextlib
import json
import pathlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from vit_scale.data import Source
from vit_scale.errors import UserError
from vit_scale.inspect import feature_sections, plots, prediction_sections, samples, sections
from vit_scale.inspect.comparison import Inspection, compare, measurements
from vit_scale.inspect.html import Note, Section, file_name, render_page
from vit_scale.inspect.inspected_run import InspectedRun
from vit_scale.inspect.samples import Samples
from vit_scale.storage import files, paths
from vit_scale.tracking import publish

Pixels = dict[str, np.ndarray]  # uint8 [h, w, 3] of each figure, by file name
PAGE, NUMBERS = "index.html", "numbers.json"


def report(
    sources: Sequence[str],
    images: str | None,
    split: str | None,
    out: str | None,
    overrides: Sequence[str],
    wandb: bool,
) -> dict:
    """Inspect runs and write the report. Arguments and result as of `inspect`."""
    runs = [InspectedRun(source, overrides) for source in sources]
    make_names_unique(runs)
    if wandb:
        check_finished(runs)
    folder = paths.parse(out) if out else default_folder(runs)
    inspections, run_sections = [], []
    for run in runs:
        inspection, section = inspect_run(run, images, split, bool(split or overrides))
        inspections.append(inspection)
        run_sections.append(section)
    if len(run_sections) == 1:
        run_sections = [run_sections[0]._replace(name="")]
    comparison = []
    if len(runs) > 1:
        comparison = [Section("comparison", "Comparison", compare(inspections))]
    all_sections = [*comparison, *run_sections]
    pixels = rasterize(all_sections)
    content = {
        "page": str(folder / PAGE),
        "runs": [measurements(inspection) for inspection in inspections],
        "notes": list_notes(all_sections),
    }
    title = f"Inspection of {', '.join(run.name for run in runs)}"
    write_report(folder, title, all_sections, pixels, content)
    if wandb:
        for inspection, section in zip(inspections, run_sections, strict=True):
            log_to_wandb(inspection, section, comparison, pixels)
    return content


def inspect_run(
    run: InspectedRun, images: str | None, split: str | None, required: bool
) -> tuple[Inspection, Section]:
    """Inspect one run. With `required`, a split that can't be opened is an error, else a note."""
    source, missing = open_source(run, split, required)
    shown, shown_split = source, split or run.cfg.eval.final
    if source is None:
        shown_split = run.cfg.data.train
        with contextlib.suppress(UserError):
            shown = run.open_split(shown_split)
    chosen = choose_samples(run, shown, images)
    parts = sections.show_training(run)
    if chosen is None:
        parts.append(Note("Attention and patches", "Not available: no images; set --images DIR."))
    else:
        parts += sections.show_attention(run, chosen) + sections.show_patches(run, chosen)
        parts += feature_sections.show_reconstructions(run, chosen)
    parts += sections.show_positions(run) + sections.show_filters(run)
    more, nearest = feature_sections.show_features(run, shown, shown_split)
    parts += more
    if not run.has_head:
        source, missing = None, "Not available: this model has no head (model.classes=0)."
    result = run.predict(source) if source else None
    if source and result:
        parts += prediction_sections.show_mistakes(run, result, source)
        parts += prediction_sections.show_calibration(run, result)
    else:
        parts.append(Note("Predictions", missing))
    title = f"{run.name}, step {run.step:,}"
    return Inspection(run, result, nearest), Section(run.name, title, parts)


def open_source(run: InspectedRun, split: str | None, required: bool) -> tuple[Source | None, str]:
    """Open the split to evaluate, or say why there is none. Raises UserError if it is required."""
    split = split or run.cfg.eval.final
    if not split:
        return None, "Not available: the run has no eval.final; set --split."
    try:
        return run.open_split(split), ""
    except UserError as error:
        if required:
            raise
        return None, f"Not available: the run's split {split} can't be opened: {error}."


def choose_samples(run: InspectedRun, source: Source | None, images: str | None) -> Samples | None:
    """Images to show: from the folder `images`, else from the split."""
    if images:
        return samples.from_folder(images, run.decode_size, run.decode_view, exif=run.cfg.data.exif)
    chosen = samples.from_source(source) if source else None
    return chosen if chosen and len(chosen.images) else None


def make_names_unique(runs: Sequence[InspectedRun]) -> None:
    """Add the step to the names of runs that share one, or the folder where that isn't enough."""
    for name in (lambda run: f"{run.name}-{run.step}", lambda run: f"{run.folder}-{run.step}"):
        times = Counter(run.name for run in runs)
        for run in runs:
            if times[run.name] > 1:
                run.name = name(run).replace("/", "-")


def list_notes(all_sections: Sequence[Section]) -> list[str]:
    """The notes of all sections, each on one line with the titles above it."""
    return [
        f"{section.title}: {part.title}: {part.text}"
        for section in all_sections
        for part in section.parts
        if isinstance(part, Note)
    ]


def default_folder(runs: Sequence[InspectedRun]) -> pathlib.Path:
    return runs[0].folder / ("inspect" if len(runs) == 1 else "compare")


def check_finished(runs: Sequence[InspectedRun]) -> None:
    """Check that no run is still training, and logging to its page. Raises UserError."""
    for run in runs:
        if run.report is None:
            raise UserError(
                f"--wandb needs a finished run, and {run.folder} has no report.json yet: finish "
                "training first, or leave out --wandb"
            )


def rasterize(all_sections: Sequence[Section]) -> Pixels:
    """Render every figure, by the name of its file."""
    pairs = [(section, picture) for section in all_sections for picture in section.pictures()]
    with tqdm(pairs, desc="draw", unit="figure", disable=None, leave=False) as bar:
        return {file_name(*pair): plots.rasterize(pair[1].figure) for pair in bar}


def write_report(
    folder: pathlib.Path,
    title: str,
    all_sections: Sequence[Section],
    pixels: Pixels,
    content: dict,
) -> None:
    """Write the PNGs, numbers.json, and last the page, which embeds the PNGs. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    pngs = {name: plots.encode_png(image) for name, image in pixels.items()}
    for name, png in pngs.items():
        files.write(folder / f"{name}.png", png)
    files.write(folder / NUMBERS, (json.dumps(content, indent=2) + "\n").encode())
    html = render_page(title, all_sections, pngs)
    files.write(folder / PAGE, html.encode(errors="backslashreplace"))


def log_to_wandb(
    inspection: Inspection, section: Section, comparison: Sequence[Section], pixels: Pixels
) -> None:
    """Log the figures and measurements to the run's Weights & Biases page."""
    run, figures = inspection.run, {}
    for part, prefix in ((section, ""), *((part, f"{part.name}-") for part in comparison)):
        for picture in part.pictures():
            figures[f"inspect/{prefix}{picture.name}"] = pixels[file_name(part, picture)]
    values = {
        f"inspect/{name}": value
        for name, value in measurements(inspection).items()
        if isinstance(value, int | float)
    }
    publish(run.folder, run.cfg.log.project, run.metadata["name"], figures, values)
