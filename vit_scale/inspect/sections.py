"""Build the report's figures of one run and its model: curves, attention, positions, filters.

Each function returns parts of the report: figures with captions, or a note on why there is none.
Every figure's title names the run, the checkpoint's step, and the n of what is averaged.
"""

import numpy as np

from vit_scale import pretrained
from vit_scale.errors import UserError
from vit_scale.inspect import embeddings, plots
from vit_scale.inspect.attention import patch_distances
from vit_scale.inspect.html import Note, Part, Picture
from vit_scale.inspect.inspected_run import InspectedRun
from vit_scale.inspect.samples import Samples, evenly_spaced
from vit_scale.models.position_embeddings import resample, sincos2d
from vit_scale.storage import paths

FILTERS = 28  # components shown, as in the ViT paper's figure 7
ROWS = 6  # images whose attention maps are shown
OVERLAYS = 4  # images that each head's map is laid over


def show_training(run: InspectedRun) -> list[Part]:
    """Training curves."""
    if not run.curves:
        return [Note("Training curves", "Not available: the run has no metrics.jsonl.")]
    last = max(steps[-1] for steps, _ in run.curves.values())
    title = f"Training: {run.name}, up to step {last:,}"
    figure = plots.plot_curves({run.name: run.curves}, title, [run.cfg])
    caption = (
        f"Each point of a training curve is the mean over {run.cfg.log.every} steps of "
        f"{run.cfg.data.batch} images each, with augmentation (and mixup or CutMix, if enabled)."
    )
    if run.cfg.eval.split:
        caption += f" Evaluation is on {run.cfg.eval.split}, without augmentation"
        if run.cfg.eval.probe:
            bank = run.cfg.eval.bank or run.cfg.data.train
            caption += f": accuracy is that of {run.cfg.eval.probe} on features, from {bank}"
        caption += "."
    return [Picture("curves", "Training curves", caption, figure)]


def show_attention(run: InspectedRun, samples: Samples) -> list[Part]:
    """Attention maps, attention rollout and mean attention distance."""
    if run.model.attention is None:
        return [Note("Attention", "Not available: this model has no attention.")]
    shown = samples.to_show()
    maps = run.attention_maps(shown.images)
    pixels, heads = list(run.display_pixels(shown.images)), maps["heads"]
    return [
        *_attention_maps(run, shown, pixels, heads),
        _overlays(run, shown, pixels, maps),
        *_registers(run, shown, pixels, maps["registers"]),
        _rollout(run, shown, pixels, maps["rollout"]),
        _distances(run, samples),
    ]


def _attention_maps(
    run: InspectedRun, shown: Samples, pixels: list, heads: np.ndarray
) -> list[Part]:
    blocks, count = heads.shape[1], heads.shape[2]
    query = "from [CLS]" if run.reads_cls else "averaged over all tokens"
    rows = min(ROWS, len(pixels))
    images, names = pixels[:rows], shown.names
    suffix = run.title_suffix(rows, f"images of {shown.source}")
    columns = evenly_spaced(range(count), plots.MAX_COLUMNS - 1)
    last = plots.plot_attention(
        images, names, [f"head {i + 1}" for i in columns], heads[:rows, -1][:, columns],
        f"Attention {query}, last of {blocks} blocks, by head: {suffix}",
    )  # fmt: skip
    columns = evenly_spaced(range(blocks), plots.MAX_COLUMNS - 1)
    depth = plots.plot_attention(
        images, names, [f"block {i + 1}" for i in columns],
        heads[:rows, columns].mean(axis=2),
        f"Attention {query}, mean over {count} heads, by block: {suffix}",
    )  # fmt: skip
    caption = (
        "Attention to each patch, relative to uniform attention over all tokens (1). The maps of a "
        "figure share one colour scale."
    )
    return [
        Picture("attention-heads", "Attention maps of the last block", caption, last),
        Picture("attention-blocks", "Attention maps by block", caption, depth),
    ]


def _overlays(run: InspectedRun, shown: Samples, pixels: list, maps: dict) -> Part:
    """What each head of the last block attends to from [CLS], over the image, as in DINO."""
    title = "Attention of [CLS] over the image, by head"
    if not run.has_cls:
        text = f"Not available: this model has no [CLS] (pool={run.model.shape.pool})."
        return Note(title, text)
    count = maps["cls"].shape[1]
    rows, columns = min(OVERLAYS, len(pixels)), evenly_spaced(range(count), plots.MAX_COLUMNS - 1)
    suffix = run.title_suffix(rows, f"images of {shown.source}")
    figure = plots.plot_head_overlays(
        pixels[:rows], shown.names[:rows], [f"head {i + 1}" for i in columns],
        maps["cls"][:rows, columns], f"Attention of [CLS], last block, by head: {suffix}",
    )  # fmt: skip
    caption = (
        f"Attention of [CLS] to each patch in the last of {run.model.shape.size.depth} blocks "
        f"(Caron et al. 2021, figure 1), of {len(columns)} of {count} heads. Each map has its own "
        "scale; above it is its maximum, relative to uniform attention over all tokens (1)."
    )
    return Picture("attention-cls", title, caption, figure)


def _registers(run: InspectedRun, shown: Samples, pixels: list, maps: np.ndarray) -> list[Part]:
    """What each register attends to; nothing for a model without them."""
    count = maps.shape[1]
    if not count:
        return []
    rows = min(ROWS, len(pixels))
    columns = evenly_spaced(range(count), plots.MAX_COLUMNS - 1)
    suffix = run.title_suffix(rows, f"images of {shown.source}")
    figure = plots.plot_attention(
        pixels[:rows], shown.names, [f"register {i + 1}" for i in columns], maps[:rows][:, columns],
        f"Attention from registers, last block, mean over heads: {suffix}",
    )  # fmt: skip
    caption = (
        "Attention of each register to each patch, relative to uniform attention over all tokens "
        "(1). Registers have no patch (Darcet et al. 2024), and are in no other map."
    )
    return [Picture("attention-registers", "Attention from registers", caption, figure)]


def _rollout(run: InspectedRun, shown: Samples, pixels: list, maps: np.ndarray) -> Picture:
    suffix = run.title_suffix(len(pixels), f"images of {shown.source}")
    pooled = "the input of the classification head" if run.has_head else "the pooled features"
    caption = (
        f"Share of each patch in {pooled}, through all blocks and their skip connections (Abnar & "
        "Zuidema 2020), relative to an equal share (1). In the last row, each image is shaded by "
        "its map, which is scaled to its maximum."
    )
    figure = plots.plot_rollouts(pixels, shown.names, maps, f"Attention rollout: {suffix}")
    return Picture("rollout", "Attention rollout", caption, figure)


def _distances(run: InspectedRun, samples: Samples) -> Picture:
    distances = run.attention_distances(samples.images)
    uniform = float(patch_distances(run.grid, run.patch_size).mean())
    n = len(samples.images)
    suffix = run.title_suffix(n, f"images of {samples.source}")
    caption = (
        "Distance between two patches in pixels of the "
        f"{run.size[0]} x {run.size[1]} input, weighted by the attention from one to the other and "
        f"averaged over all patches and {n} images (ViT paper, figure 7). Uniform attention gives "
        f"{uniform:.1f} pixels."
    )
    figure = plots.plot_distances(distances, uniform, f"Mean attention distance: {suffix}")
    return Picture("attention-distance", "Mean attention distance", caption, figure)


def show_positions(run: InspectedRun) -> list[Part]:
    """Similarity of position embeddings, also before resampling if the run was fine-tuned."""
    title = "Similarity of position embeddings"
    if run.model.attention is None:
        return [Note(title, "Not available: this model has no position embeddings.")]
    h, w = run.grid
    if run.cfg.model.posemb == "none":
        text = f"Not available: this model has no position embeddings (rope={run.cfg.model.rope})."
        return [Note(title, text)]
    if "posemb" not in run.params:
        table = np.asarray(sincos2d(run.grid, run.model.shape.size.width))
        panels, note = {f"fixed sin-cos, {h} x {w}": table}, None
    else:
        panels, note = _positions_before(run)
        panels[f"{run.name}, step {run.step:,}: {h} x {w}"] = np.asarray(run.params["posemb"])
    maps = {name: embeddings.similarity(table) for name, table in panels.items()}
    figure = plots.plot_similarities(maps, f"{title}: {run.title_suffix()}")
    caption = (
        "Each tile belongs to the patch at its position, and shows the cosine similarity of that "
        "patch's position embedding to those of all patches (ViT paper, figure 7)."
    )
    if len(panels) > 1:
        caption += " All panels share one colour scale."
    picture = Picture("positions", title, caption, figure)
    return [picture, *([Note("Position embeddings before resampling", note)] if note else [])]


def _positions_before(run: InspectedRun) -> tuple[dict[str, np.ndarray], str | None]:
    """The source's position embeddings, before and after resampling; or a note on why not."""
    source, method = run.cfg.init.source, run.cfg.init.resample
    if not source:
        return {}, None
    try:
        path = paths.resolve(source, run.folder, run.metadata.get("cwd", ""))
        hints = pretrained.hints_from_config(run.cfg, run.cfg.model.heads)
        loaded = pretrained.load_model(path, hints)
    except UserError as error:
        return {}, f"Not available: the run's init.source can't be loaded: {error}."
    before = loaded.params.get("posemb")
    if before is None or before.shape[:2] == run.grid:
        return {}, None
    old, new = (f"{h} x {w}" for h, w in (before.shape[:2], run.grid))
    name = source.rstrip("/").split("/")[-1]
    return {
        f"before: {name}, step {loaded.step:,}: {old}": np.asarray(before),
        f"resampled ({method}), step 0: {new}": np.asarray(resample(before, run.grid, method)),
    }, None


def show_filters(run: InspectedRun) -> list[Part]:
    """Principal components of the patch embedding's filters."""
    kernel = run.params.get("embed", {}).get("kernel")
    name = "Patch embedding filters"
    if kernel is None or kernel.ndim != 4 or kernel.shape[2] != 3:
        return [Note(name, "Not available: this model does not embed patches of pixels.")]
    components, shares = embeddings.principal_components(np.asarray(kernel), FILTERS)
    d, (p, q) = kernel.shape[3], kernel.shape[:2]
    title = f"Principal components of the patch filters: {run.title_suffix(d, 'filters')}"
    caption = (
        f"The first {len(components)} principal components of the {d} filters of {p} x {q} pixels "
        f"(ViT paper, figure 7), each with its share of their variance; together "
        f"{100 * float(shares.sum()):.1f} %. Grey is 0; each has its own scale."
    )
    return [Picture("filters", name, caption, plots.plot_filters(components, shares, title))]


def show_patches(run: InspectedRun, samples: Samples) -> list[Part]:
    """One image as the model's input, cut into patches; nothing for a model without patches."""
    if run.model.attention is None:
        return []
    image, name = samples.images[0], samples.names[0]
    (pixels,) = run.display_pixels(image[None])
    suffix = run.title_suffix(1, f"image of {samples.source}")
    h, w = run.grid
    caption = (
        f"Resized as in evaluation, then cut into {h * w} patches, each of which becomes one token."
    )
    title = f"An image as the model sees it ({name}): {suffix}"
    figure = plots.plot_patches(image, pixels, run.grid, title)
    return [Picture("patches", "Patches of an image", caption, figure)]
