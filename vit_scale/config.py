"""From `--config NAME[:ARG] --config.block.field=value` to one checked ConfigDict.

A name is a file in `configs/`, which is shipped inside the wheel; anything with a slash or `.py` is
a path. Unknown names, keys and wrong types are refused with the nearest valid one.
"""

import copy
import json
import pathlib
import runpy
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from vit_scale.errors import USAGE, UserError, nearest

HERE = pathlib.Path(__file__).resolve().parent
FOLDER = next(f for f in (HERE / "configs", HERE.parent / "configs") if f.is_dir())
# Fields that there were, and what became of them. Runs that hold one are read without it (law 7).
REMOVED: dict[str, str] = {}
# What runs computed before a field existed, where today's default computes something else. A run
# that does not hold the field keeps this value, also when it is resumed.
OLD_DEFAULTS: dict[str, Any] = {
    "data.exif": False,
    "data.listing": "common",
    "data.slices": "position",
    "data.square": True,
    "eval.fit": "cover",
}


def base() -> ConfigDict:
    """A fresh copy of the full schema with its defaults, configs/base.py."""
    return runpy.run_path(str(FOLDER / "base.py"))["get_config"]()


def names() -> list[str]:
    """The configs that a bare name reaches."""
    return sorted(f.stem for f in FOLDER.glob("*.py") if f.stem != "base")


def find(config: str) -> tuple[pathlib.Path, str]:
    """The file and the argument of "NAME_OR_PATH[:ARG]". Raises UserError for an unknown file."""
    name, _, argument = config.partition(":")
    path = pathlib.Path(name)
    if path.suffix != ".py" and len(path.parts) == 1:
        path = FOLDER / f"{name}.py"
        if name not in names():
            raise UserError(f"no config is named {name!r}; {nearest(name, names())}", USAGE)
    if not path.is_file():
        raise UserError(f"there is no config file {path}", USAGE)
    return path, argument


def title(config: str) -> str:
    """The name of a run of this config: "quickstart:scratch" is "quickstart-scratch"."""
    path, argument = find(config)
    return f"{path.stem}-{argument}" if argument else path.stem


def load(
    config: str, overrides: Iterable[str] = (), begun: Mapping[str, ConfigDict] | None = None
) -> ConfigDict:
    """The config of "NAME_OR_PATH[:ARG]" with overrides such as "optim.lr=3e-4" applied.

    What a config decides by other fields is in a function `resolve(cfg, argument, begun)` of its
    file, which changes `cfg` where the overrides are applied; they are applied again to what it
    leaves. `begun` holds the configs of the runs that there are already, by their arguments.

    Raises UserError for unknown names and keys and for wrong types. What the values mean is checked
    by their owners.
    """
    path, argument = find(config)
    target = f"{path}:{argument}" if argument else str(path)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=[])
    cfg = _parse(values, [f"--config={target}"], f"config {config}: ")
    if not isinstance(cfg, ConfigDict):
        raise UserError(f"config {config}: get_config must return a ConfigDict", USAGE)
    given, known = fields(cfg), fields(base())
    for key in given:
        _refuse_unknown(key, known, f"config {config}: ")
    if missing := sorted(known.keys() - given):
        raise UserError(
            f"config {config} has no {', '.join(missing)}: begin it with vit_scale.config.base()",
            USAGE,
        )
    overrides = list(overrides)
    if resolve := runpy.run_path(str(path)).get("resolve"):
        decided = override(copy.deepcopy(cfg), overrides)
        try:
            resolve(decided, argument, begun or {})
        except Exception as error:  # the user's program, as above
            raise UserError(f"config {config}: {_last_line(error)}", USAGE) from error
        cfg = decided
    return override(cfg, overrides)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def override(cfg: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """`cfg` with "optim.lr=3e-4" and the like applied, in place.

    Raises UserError for unknown keys and for values of another type.
    """
    for item in overrides:
        key, equals, _ = item.partition("=")
        _refuse_unknown(key, fields(cfg), "")
        if not equals:
            raise UserError(f"--config.{key} needs a value: --config.{key}=VALUE", USAGE)
    values, arguments = flags.FlagValues(), [f"--config.{item}" for item in overrides]
    config_flags.DEFINE_config_dict(
        "config", cfg, flag_values=values, sys_argv=["vit-scale", *arguments]
    )
    cfg = _parse(values, arguments, "")
    _refuse_wrong_tuples(cfg)
    return cfg


def _parse(values: flags.FlagValues, arguments: list[str], where: str) -> ConfigDict:
    """What config_flags makes of these arguments, with its errors as one line."""
    try:
        values(["vit-scale", *arguments])
    except Exception as error:  # a config file is the user's program: anything may come out of it
        raise UserError(f"{where}{str(error).strip().splitlines()[-1]}", USAGE) from error
    return values.config


def _refuse_wrong_tuples(cfg: ConfigDict) -> None:
    """config_flags checks a tuple's type, but not what is in it."""
    given = fields(cfg)
    for key, default in fields(base()).items():
        if not isinstance(default, tuple):
            continue
        words = not default or isinstance(default[0], str)
        value, kind = given[key], str if words else (int, float)
        if not isinstance(value, tuple) or not all(isinstance(v, kind) for v in value):
            raise UserError(
                f"{key}={value!r} must be a tuple such as {default or ('a', 'b')}", USAGE
            )


def _refuse_unknown(key: str, known: Collection[str], where: str) -> None:
    if key in REMOVED:
        raise UserError(f"{where}{key} is no field any more: {REMOVED[key]}; leave it out", USAGE)
    if key not in known:
        raise UserError(f"{where}no config field is named {key!r}; {nearest(key, known)}", USAGE)


def fields(cfg: ConfigDict) -> dict:
    """{"optim.lr": 0.001, ...}: every leaf by its dotted name."""
    flat: dict = {}
    for key in cfg:
        value = cfg[key]
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{name}": leaf for name, leaf in fields(value).items()}
        else:
            flat[key] = value
    return flat


def dotted(tree: dict) -> dict:
    """{"config.optim.lr": 0.001, ...}: the leaves of nested dicts by their dotted names."""
    return fields(ConfigDict(tree))


def image_size(cfg: ConfigDict) -> tuple[int, int]:
    """(height, width) in pixels of the images that the model sees."""
    return cfg.data.resolution, cfg.data.width or cfg.data.resolution


def to_json(cfg: ConfigDict) -> dict:
    """Plain dicts, lists and numbers, as they are stored in a run's folder."""
    return json.loads(cfg.to_json())


def from_json(stored: dict) -> ConfigDict:
    """Return the inverse of `to_json`, in this version's schema.

    A missing field takes the value that runs without it computed with (`OLD_DEFAULTS`), else its
    default; a removed field is dropped. Raises UserError for an unknown field and for a value of
    the wrong type.
    """
    cfg = base()
    known = fields(cfg)
    for key, value in {**OLD_DEFAULTS, **dotted(stored)}.items():
        if key in REMOVED:
            continue
        _refuse_unknown(key, known, "the run's config: ")
        owner = cfg
        *blocks, name = key.split(".")
        for block in blocks:
            owner = owner[block]
        try:
            owner[name] = tuple(value) if isinstance(value, list | tuple) else value
        except TypeError as error:
            raise UserError(f"the run's config: {key}={value!r} is of the wrong type") from error
    return cfg


def with_old_defaults(cfg: ConfigDict, stored: dict) -> ConfigDict:
    """`cfg` for resuming a run whose run.json holds the config `stored`.

    A field that the run does not know and that `cfg` leaves at its default has the value that the
    run began with (`OLD_DEFAULTS`).
    """
    given, default, begun = fields(cfg), fields(base()), dotted(stored)
    old = {
        key: value
        for key, value in OLD_DEFAULTS.items()
        if key not in begun and given[key] == default[key]
    }
    cfg = copy.deepcopy(cfg)
    cfg.update_from_flattened_dict(old)
    return cfg


def differences(old: dict, new: dict) -> list[str]:
    """Lines "optim.lr: 0.001 -> 0.003", for two results of `to_json`."""
    left, right = dotted(old), dotted(new)
    return [
        f"{key}: {left.get(key, 'absent')} -> {right.get(key, 'absent')}"
        for key in sorted(left | right)
        if left.get(key) != right.get(key)
    ]
