"""Inspect trained models: the `vit-scale inspect` command, as a function.

`inspect` writes one self-contained HTML page per call: training curves, attention, position
embeddings, patch filters, features and their neighbours, reconstructions of a masked autoencoder,
mistakes and calibration of a run, and a comparison of several; of a run without a head all but the
predictions. Every figure names the run and the checkpoint's step, and the number of images behind
it. Computation (attention, embeddings, features, reconstruction, predictions, curves) is separate
from drawing (plots) and layout (sections, comparison, html). Inspection never changes a run's
training program or its checkpoints.
"""

from collections.abc import Sequence

from vit_scale.errors import UserError


def inspect(
    runs: Sequence[str],
    images: str | None = None,
    split: str | None = None,
    out: str | None = None,
    overrides: Sequence[str] = (),
    wandb: bool = False,
) -> dict:
    """Write an HTML report on runs, which needs no other file, and its figures as PNGs beside it.

    Args:
      runs: run folders, or RUN/checkpoints/STEP; several are also compared.
      images: folder of images, without labels, to show attention on; else those of the split.
      split: the split to evaluate and show, such as `test` or `train[98%:]`; else each run's
        eval.final.
      out: folder to write to; else `inspect` in the run's folder, or `compare` in that of the first
        of several runs.
      overrides: of the runs' configs, such as "data.path=DIR".
      wandb: also log the figures to the runs' Weights & Biases pages.

    Returns:
      {"page": path, "runs": [{"run": ..., "step": ..., "n": ..., "accuracy": ..., ...}],
      "notes": [what is missing from the report, and why]}

    Raises:
      UserError: matplotlib is not installed, a folder is not a run, or a split or folder that was
        asked for can't be read.
    """
    try:
        from vit_scale.inspect.report import report
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise UserError(
            "inspect needs matplotlib, which is not installed: run launch/environment.sh inspect "
            "in a clone, or pip install matplotlib"
        ) from error
    return report(runs, images, split, out, overrides, wandb)


def format_rows(rows: Sequence[dict]) -> list[dict[str, str]]:
    """Format the "runs" that `inspect` returns as the text cells of a table."""
    from vit_scale.inspect.comparison import format_row

    return [format_row(row) for row in rows]
