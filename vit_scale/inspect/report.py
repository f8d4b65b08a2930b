"""From run folders to the page and its pictures: what `vit-scale inspect` does, in order."""

import contextlib
import json
import pathlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from vit_scale.data import Source
from vit_scale.errors import UserError
from vit_scale.inspect import plots, samples, sections
from vit_scale.inspect.comparison import Looked, compare, numbers
from vit_scale.inspect.html import Note, Section, file_name, page
from vit_scale.inspect.inspected_run import InspectedRun
from vit_scale.inspect.samples import Samples
from vit_scale.storage import files, paths
from vit_scale.tracking import publish

Drawn = dict[str, np.ndarray]  # uint8 [h, w, 3], by the name of the file
PAGE, NUMBERS = "index.html", "numbers.json"


def report(
    runs: Sequence[str],
    images: str | None,
    split: str | None,
    out: str | None,
    overrides: Sequence[str],
    wandb: bool,
) -> dict:
    subjects = [InspectedRun(run, overrides) for run in runs]
    name_apart(subjects)
    if wandb:
        check_finished(subjects)
    folder = paths.parse(out) if out else default_folder(subjects)
    looked, pages = [], []
    for subject in subjects:
        found, section = look(subject, images, split, bool(split or overrides))
        looked.append(found)
        pages.append(section)
    if len(pages) == 1:
        pages = [pages[0]._replace(name="")]
    together = [Section("comparison", "Comparison", compare(looked))] if len(looked) > 1 else []
    drawn = draw([*together, *pages])
    content = {
        "page": str(folder / PAGE),
        "runs": [numbers(one) for one in looked],
        "notes": [
            f"{section.title}: {part.text}"
            for section in [*together, *pages]
            for part in section.parts
            if isinstance(part, Note)
        ],
    }
    write(
        folder,
        f"Inside {' and '.join(s.name for s in subjects)}",
        [*together, *pages],
        drawn,
        content,
    )
    if wandb:
        for one, section in zip(looked, pages, strict=True):
            track(one, section, together, drawn)
    return content


def look(
    subject: InspectedRun, images: str | None, split: str | None, asked: bool
) -> tuple[Looked, Section]:
    """Everything there is to say of one run. `asked`: a split that isn't there is a mistake."""
    source, missing = open_source(subject, split, asked)
    shown = choose(subject, source, images)
    parts = sections.training(subject)
    if shown is None:
        parts.append(Note("Attention and patches", "No images to look at: give --images DIR."))
    else:
        parts += sections.attention(subject, shown) + sections.patches(subject, shown)
    parts += sections.positions(subject) + sections.filters(subject)
    found = subject.predict(source) if source else None
    if source and found:
        parts += sections.mistakes(subject, found, source) + sections.calibration(subject, found)
    else:
        parts.append(Note("Predictions", missing))
    title = f"{subject.name}: step {subject.step:,}"
    return Looked(subject, found), Section(subject.name, title, parts)


def open_source(subject: InspectedRun, split: str | None, asked: bool) -> tuple[Source | None, str]:
    """The labelled images to measure on, or the line that says why there are none."""
    split = split or subject.cfg.eval.final
    if not split:
        return None, "The run evaluates nothing: give --split to measure its predictions."
    try:
        return subject.open(split), ""
    except UserError as error:
        if asked:
            raise
        return None, f"The run's split {split} can't be opened: {error}."


def choose(subject: InspectedRun, source: Source | None, images: str | None) -> Samples | None:
    """The images to look at: of the folder `images`, else of the split, else of training."""
    if images:
        return samples.from_folder(images, subject.stored, subject.view, exif=subject.cfg.data.exif)
    if source is None:
        with contextlib.suppress(UserError):
            source = subject.open(subject.cfg.data.train)
    found = samples.from_source(source) if source else None
    return found if found and len(found.images) else None


def name_apart(subjects: Sequence[InspectedRun]) -> None:
    """Give runs of one name the step as well, and their folders where that is not enough."""
    for name in (lambda s: f"{s.name}-{s.step}", lambda s: f"{s.folder}-{s.step}"):
        times = Counter(subject.name for subject in subjects)
        for subject in subjects:
            if times[subject.name] > 1:
                subject.name = name(subject).replace("/", "-")


def default_folder(subjects: Sequence[InspectedRun]) -> pathlib.Path:
    return subjects[0].folder / ("inspect" if len(subjects) == 1 else "compare")


def check_finished(subjects: Sequence[InspectedRun]) -> None:
    for subject in subjects:
        if subject.report is None:
            raise UserError(
                f"--wandb adds to the page of a finished run, and {subject.folder} has not ended"
            )


def draw(shown: Sequence[Section]) -> Drawn:
    """The pixels of every picture, by the name of its file."""
    pairs = [(section, picture) for section in shown for picture in section.pictures()]
    with tqdm(pairs, desc="draw", unit="picture", disable=None, leave=False) as bar:
        return {file_name(*pair): plots.draw(pair[1].figure) for pair in bar}


def write(
    folder: pathlib.Path, title: str, shown: Sequence[Section], drawn: Drawn, content: dict
) -> None:
    """The PNGs, the numbers, and last the page, which holds the PNGs as well. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    pngs = {name: plots.encode(pixels) for name, pixels in drawn.items()}
    for name, png in pngs.items():
        files.write(folder / f"{name}.png", png)
    files.write(folder / NUMBERS, (json.dumps(content, indent=2) + "\n").encode())
    files.write(folder / PAGE, page(title, shown, pngs).encode(errors="backslashreplace"))


def track(looked: Looked, section: Section, together: Sequence[Section], drawn: Drawn) -> None:
    """The same pictures and numbers on the run's page of Weights & Biases."""
    subject, shown = looked.subject, {}
    for part, prefix in ((section, ""), *((part, f"{part.name}-") for part in together)):
        for picture in part.pictures():
            shown[f"inspect/{prefix}{picture.name}"] = drawn[file_name(part, picture)]
    values = {
        f"inspect/{name}": value
        for name, value in numbers(looked).items()
        if isinstance(value, int | float)
    }
    publish(subject.folder, subject.cfg.log.project, subject.about["name"], shown, values)
