"""A look inside trained models: `vit-scale inspect`, and the same as a function.

What is computed (attention, embeddings, predictions, curves) is apart from how it is drawn
(pictures) and from where it stands (sections, comparison, page). Nothing here is part of training.
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
    """Write a report on runs, which needs no other file, and its pictures as PNGs beside it.

    Args:
      runs: folders of runs, or steps in them; several are compared.
      images: a folder of any images to look at attention with, instead of the split's.
      split: measured and looked at, such as `test` or `train[98%:]`; else each run's eval.final.
      out: folder to write to; else RUN/inspect, or RUN/compare in the first of several.
      overrides: of the runs' configs, such as "data.path=DIR".
      wandb: add the pictures to the runs' pages of Weights & Biases.

    Returns:
      {"page": path, "runs": [{"run": ..., "step": ..., "n": ..., "accuracy": ..., ...}],
      "notes": [what is missing, and why]}

    Raises:
      UserError: matplotlib is not installed, a folder is no run, or what was asked for is missing.
    """
    try:
        from vit_scale.inspect.report import report
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise UserError(
            "inspect draws with matplotlib, which is not here: launch/environment.sh inspect in a "
            "clone, or pip install matplotlib"
        ) from error
    return report(runs, images, split, out, overrides, wandb)


def format_rows(rows: Sequence[dict]) -> list[dict[str, str]]:
    """What `inspect` gives for "runs" as text, for a table."""
    from vit_scale.inspect.comparison import format_row

    return [format_row(row) for row in rows]
