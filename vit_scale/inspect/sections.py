"""What the report says of one run: its pictures, tables and numbers, or why there is none.

Every picture's title names the run, the checkpoint's step, and the n of what was averaged.
"""

from collections.abc import Sequence

import numpy as np

from vit_scale import pretrained
from vit_scale.data import Source
from vit_scale.errors import UserError, printable
from vit_scale.inspect import embeddings, plots, predictions
from vit_scale.inspect.attention import patch_distances
from vit_scale.inspect.html import Note, Picture, Table
from vit_scale.inspect.inspected_run import InspectedRun
from vit_scale.inspect.predictions import Predictions
from vit_scale.inspect.samples import Samples, spread
from vit_scale.models.position_embeddings import resample, sincos2d
from vit_scale.storage import paths

Parts = list[Picture | Table | Note]
WORST = 24  # mistakes shown
CONFUSED = 10  # pairs of classes listed
FILTERS = 28  # components shown, as in the ViT paper's figure 7
ROWS = 6  # images whose attention is shown head by head


def training(subject: InspectedRun) -> Parts:
    if not subject.curves:
        return [Note("Training curves", "The run has no metrics.jsonl: nothing is known of it.")]
    last = max(steps[-1] for steps, _ in subject.curves.values())
    figure = plots.curves(
        {subject.name: subject.curves}, f"Training: {subject.name}, up to step {last:,}"
    )
    caption = (
        f"Each point of a training curve is a mean over {subject.cfg.log.every} steps of "
        f"{subject.cfg.data.batch} images, augmented, and mixed where mixup or CutMix is on."
    )
    if subject.cfg.eval.split:
        caption += f" Evaluation is of {subject.cfg.eval.split}, as it is."
    return [Picture("curves", "Training curves", caption, figure)]


def attention(subject: InspectedRun, samples: Samples) -> Parts:
    """Maps, rollout and distances. Of a model without attention, the line that says so."""
    if subject.model.attention is None:
        return [Note("Attention", "This model has no attention: no maps, rollout or distances.")]
    shown = samples.shown()
    found = subject.maps(shown.images)
    seen, heads = list(subject.see(shown.images)), found["heads"]
    return [
        *_maps(subject, shown, seen, heads),
        _rollout(subject, shown, seen, found["rollout"]),
        _distances(subject, samples),
    ]


def _maps(subject: InspectedRun, shown: Samples, seen: list, heads: np.ndarray) -> list[Picture]:
    blocks, count = heads.shape[1], heads.shape[2]
    said = subject.model.shape.pool == "cls"
    whose = "of [CLS]" if said else "averaged over all tokens"
    rows = min(ROWS, len(seen))
    stamp = subject.stamp(rows, f"images of {shown.source}")
    which = spread(range(count), plots.COLUMNS - 1)
    last = plots.attention(
        seen[:rows], shown.names, [f"head {i + 1}" for i in which], heads[:rows, -1][:, which],
        f"Attention {whose}, last block (of {blocks}), by head: {stamp}",
    )  # fmt: skip
    which = spread(range(blocks), plots.COLUMNS - 1)
    depth = plots.attention(
        seen[:rows], shown.names, [f"block {i + 1}" for i in which],
        heads[:rows, which].mean(axis=2),
        f"Attention {whose}, mean over {count} heads, by block: {stamp}",
    )  # fmt: skip
    scale = "1 is what uniform attention over all tokens gives; each picture has one colour scale"
    return [
        Picture("attention-heads", "Attention maps of the last block", f"{scale}.", last),
        Picture("attention-blocks", "Attention maps through the blocks", f"{scale}.", depth),
    ]


def _rollout(subject: InspectedRun, shown: Samples, seen: list, maps: np.ndarray) -> Picture:
    title = f"Attention rollout: {subject.stamp(len(seen), f'images of {shown.source}')}"
    caption = (
        "Share of each patch in what the classifier gets, through all blocks with their skip "
        "connections (Abnar & Zuidema 2020); 1 is an equal share. Below, each image is lit by its "
        "own map, scaled to its maximum."
    )
    figure = plots.rollouts(seen, shown.names, maps, title)
    return Picture("rollout", "Attention rollout", caption, figure)


def _distances(subject: InspectedRun, samples: Samples) -> Picture:
    found = subject.distances(samples.images)
    uniform = float(patch_distances(subject.grid, subject.patch).mean())
    n = len(samples.images)
    title = f"Mean attention distance: {subject.stamp(n, f'images of {samples.source}')}"
    caption = (
        f"How far apart, in pixels of the {subject.size[0]} x {subject.size[1]} that the model "
        "sees, two patches are, weighted by the attention of one to the other, averaged over all "
        f"patches and {n} images (ViT paper, figure 7). Uniform attention would give "
        f"{uniform:.1f} pixels."
    )
    figure = plots.distances(found, uniform, title)
    return Picture("attention-distance", "Mean attention distance", caption, figure)


def positions(subject: InspectedRun) -> Parts:
    """Similarity of position embeddings; where they were resampled, before and after."""
    name = "Position embeddings"
    if subject.model.attention is None:
        return [Note(name, "This model has no position embeddings.")]
    h, w = subject.grid
    if "posemb" not in subject.params:
        table = np.asarray(sincos2d(subject.grid, subject.model.shape.size.width))
        panels, note = {f"fixed sin-cos, {h} x {w}": table}, None
    else:
        panels, note = _history(subject)
        panels[f"{subject.name}, step {subject.step:,}: {h} x {w}"] = np.asarray(
            subject.params["posemb"]
        )
    maps = {title: embeddings.similarity(table) for title, table in panels.items()}
    figure = plots.similarities(maps, f"Similarity of position embeddings: {subject.stamp()}")
    caption = (
        "Each tile stands where its patch is, and shows the cosine similarity of that patch's "
        "position embedding with those of all patches (ViT paper, figure 7)."
    )
    if len(panels) > 1:
        caption += " The panels share one colour scale."
    picture = Picture("positions", "Similarity of position embeddings", caption, figure)
    return [picture, *([Note("Before resampling", note)] if note else [])]


def _history(subject: InspectedRun) -> tuple[dict[str, np.ndarray], str | None]:
    """The tables that this one came from, before and after resampling, or why they are missing."""
    source, method = subject.cfg.init.source, subject.cfg.init.resample
    if not source:
        return {}, None
    try:
        given = pretrained.load_model(
            paths.resolve(source, subject.folder, subject.about.get("cwd", ""))
        )
    except UserError as error:
        return {}, f"What the run was fine-tuned from can't be read: {error}."
    before = given.params.get("posemb")
    if before is None or before.shape[:2] == subject.grid:
        return {}, None
    grids = [f"{h} x {w}" for h, w in (before.shape[:2], subject.grid)]
    return {
        f"before: {source.rstrip('/').split('/')[-1]}, step {given.step:,}: {grids[0]}": np.asarray(
            before
        ),
        f"resampled ({method}), step 0: {grids[1]}": np.asarray(
            resample(before, subject.grid, method)
        ),
    }, None


def filters(subject: InspectedRun) -> Parts:
    kernel = subject.params.get("embed", {}).get("kernel")
    name = "Patch filters"
    if kernel is None or kernel.ndim != 4 or kernel.shape[2] != 3:
        return [Note(name, "This model has no filters of patches of pixels.")]
    found, shares = embeddings.principal_components(np.asarray(kernel), FILTERS)
    d, (p, q) = kernel.shape[3], kernel.shape[:2]
    title = f"Principal components of the patch filters: {subject.stamp(d, 'filters')}"
    caption = (
        f"The first {len(found)} principal components of the {d} filters of {p} x {q} pixels (ViT "
        f"paper, figure 7), each with its share of their variance; together "
        f"{100 * float(shares.sum()):.1f} %. Grey is 0, and each has its own scale."
    )
    return [Picture("filters", name, caption, plots.filters(found, shares, title))]


def patches(subject: InspectedRun, samples: Samples) -> Parts:
    """One image as the model gets it."""
    if subject.model.attention is None:
        return []
    image, name = samples.images[0], samples.names[0]
    (seen,) = subject.see(image[None])
    title = f"An image as the model sees it ({name}): {subject.stamp(1, f'of {samples.source}')}"
    h, w = subject.grid
    caption = (
        f"Resized as in evaluation, then cut into {h * w} patches; each becomes one token, without "
        "a look at its neighbours."
    )
    figure = plots.patches(image, seen, subject.grid, title)
    return [Picture("patches", "Patches of an image", caption, figure)]


def mistakes(subject: InspectedRun, found: Predictions, source: Source) -> Parts:
    """The confusion matrix, the most frequent confusions, and the worst mistakes."""
    classes = tuple(map(printable, subject.classes))
    stamp = subject.stamp(found.n, f"images of {found.source}")
    matrix = predictions.confusion(found.labels, found.said, len(classes))
    low, high = predictions.interval(int(found.right.sum()), found.n)
    caption = (
        f"Accuracy {100 * found.accuracy:.2f} % (95 % interval {100 * low:.2f} to "
        f"{100 * high:.2f} %), cross-entropy {found.losses.mean():.4f}, n = {found.n:,}."
    )
    figure = plots.confusion(matrix, classes, f"Confusion matrix: {stamp}")
    parts: Parts = [Picture("confusion", "Confusion matrix", caption, figure)]
    pairs = predictions.confused(matrix, CONFUSED)
    if not pairs:
        return [*parts, Note("Worst mistakes", f"None of {found.n:,} images is a mistake.")]
    rows = [_pair(classes, matrix, *pair) for pair in pairs]
    parts.append(Table(f"Most frequent confusions: {stamp}", rows))
    chosen = predictions.worst(found, WORST)
    images = source.read(found.positions[chosen])["image"]
    texts = [_mistake(classes, found, i) for i in chosen]
    wrong = found.n - int(found.right.sum())
    figure = plots.mistakes(list(images), texts, f"Worst mistakes: {stamp}")
    caption = (
        f"Of the {wrong:,} mistakes in {found.n:,} images, the {len(chosen)} with the highest "
        "loss: the model gave the true class the least probability."
    )
    return [*parts, Picture("mistakes", "Worst mistakes", caption, figure)]


def _pair(classes: Sequence[str], matrix: np.ndarray, true: int, said: int, times: int) -> dict:
    n = int(matrix[true].sum())
    share = f"{100 * times / n:.1f} % of n = {n:,}"
    return {"true": classes[true], "said": classes[said], "times": f"{times:,}", "share": share}


def _mistake(classes: Sequence[str], found: Predictions, i: int) -> str:
    said, true = found.said[i], found.labels[i]
    lines = (("said", said), ("true", true))
    return "\n".join(
        f"{word} {classes[of][:14]} {100 * found.probabilities[i, of]:.3g} %" for word, of in lines
    )


def calibration(subject: InspectedRun, found: Predictions) -> Parts:
    measured = predictions.calibration(found.probabilities, found.labels)
    sure = float(found.probabilities.max(-1).mean())
    stamp = subject.stamp(found.n, f"images of {found.source}")
    title = f"Calibration: ECE {100 * measured.ece:.2f} %: {stamp}"
    how = "over" if sure > found.accuracy else "under"
    caption = (
        f"Expected calibration error {100 * measured.ece:.2f} % ({predictions.BINS} equally wide "
        f"bins, n = {measured.n:,}; Guo et al. 2017). On average the model is {100 * sure:.2f} % "
        f"sure and {100 * found.accuracy:.2f} % right: {how}confident by "
        f"{100 * abs(sure - found.accuracy):.2f} points."
    )
    figure = plots.reliability(measured, title)
    return [Picture("calibration", "Calibration", caption, figure)]
