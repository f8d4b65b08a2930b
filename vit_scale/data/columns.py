"""Sets with named columns and splits: choose the split, and the columns of images and of labels."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vit_scale.data.image_files import print_once
from vit_scale.data.image_folder import FOLDERS
from vit_scale.data.sources import MissingSplit
from vit_scale.errors import UserError, nearest


def labelled_split(
    cfg: ConfigDict, name: str, splits: Collection[str], is_labelled: Callable[[str], bool]
) -> str:
    """Return the split to open as `name`; without a labelled test set it is the validation set.

    The labels of a test set that is not public are often -1. Raises MissingSplit.
    """
    unlabelled: list[str] = []
    for candidate in FOLDERS[name]:
        if candidate not in splits:
            continue
        if is_labelled(candidate):
            if unlabelled:
                print_once(
                    f"{cfg.path}: {unlabelled[0]} has no labels, all are -1: {candidate} is read"
                )
            return candidate
        unlabelled.append(candidate)
    if unlabelled:
        raise MissingSplit(f"{cfg.path}: split {unlabelled[0]} has no labels, all are -1")
    raise MissingSplit(f"{cfg.path} has no split {name!r}; it has {', '.join(splits)}")


def choose_column(
    features: Mapping[str, Any], tests: Sequence[Callable[[Any], bool]], kind: str, cfg: ConfigDict
) -> str:
    """Return the column of images or labels (`kind`): the named one, or the only one of that type.

    `tests` are of a column's type, the surest first. Raises UserError if none or several fit.
    """
    if named := cfg[f"{kind}_column"]:
        if named not in features:
            hint = nearest(named, list(features))
            raise UserError(f"data.{kind}_column={named!r} is not in {cfg.path}; {hint}")
        return named
    for test in tests:
        fitting = [name for name, feature in features.items() if test(feature)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            break
    which = f"columns {', '.join(fitting)} might be" if fitting else "no column has the type of"
    raise UserError(
        f"{cfg.path}: {which} the {kind}s, of {', '.join(features)}: "
        f"set --config.data.{kind}_column"
    )
