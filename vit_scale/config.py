"""Configs: from `--config NAME[:ARG] --config.block.field=value` to one checked ConfigDict.

A name is a file in `configs/`, which the wheel contains; anything with a slash or `.py` is a path.
Unknown names and keys and wrong types are refused, with the nearest valid name.
"""

import copy
import json
import pathlib
import runpy
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from vit_scale.errors import USAGE, UserError, nearest

HERE = pathlib.Path(__file__).resolve().parent
FOLDER = next(f for f in (HERE / "configs", HERE.parent / "configs") if f.is_dir())
# Removed fields, and what replaced them. Old runs that have one are read without it.
REMOVED: dict[str, str] = {}
NESTED = ("data.mixture",)  # whose tuples hold tuples: data/registry.py checks them
# Tuples of numbers, empty until a run begins, which fills them in from its training set.
FROM_DATA = ("class_weights.weights", "regression.mean", "regression.std")
# What runs computed before a field existed, where its default computes something else. A run that
# lacks the field keeps this value, when it is read and when it is resumed.
OLD_DEFAULTS: dict[str, Any] = {
    "data.exif": False,
    "data.listing": "common",
    "data.slices": "position",
    "data.square": True,
    "eval.fit": "cover",
}


def base() -> ConfigDict:
    """Return a fresh copy of the schema with its defaults, configs/base.py."""
    return runpy.run_path(str(FOLDER / "base.py"))["get_config"]()


def names() -> list[str]:
    """List the configs in `configs/`."""
    return sorted(f.stem for f in FOLDER.glob("*.py") if f.stem != "base")


def find(config: str) -> tuple[pathlib.Path, str]:
    """Split "NAME_OR_PATH[:ARG]" into file and argument. Raises UserError for an unknown file."""
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
    """Return the name of this config's run: "vit_cifar-S-16" for "vit_cifar:S/16"."""
    path, argument = find(config)
    return f"{path.stem}-{argument.replace('/', '-')}" if argument else path.stem


def load(
    config: str, overrides: Iterable[str] = (), begun: Mapping[str, ConfigDict] | None = None
) -> ConfigDict:
    """Load "NAME_OR_PATH[:ARG]" and apply overrides such as "optim.lr=3e-4".

    A config file may define `resolve(cfg, argument, begun)`, which derives fields from others after
    the overrides were applied; overrides are applied once more to its result. `begun` maps the
    arguments of runs that exist already to their configs.

    Raises UserError for unknown names and keys and for wrong types. The code that uses a value
    checks its meaning.
    """
    path, argument = find(config)
    target = f"{path}:{argument}" if argument else str(path)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=[])
    # It loads each file as the module of this name, anew into the one that is there: a config that
    # loads another would find the other's constants in place of its own.
    sys.modules.pop("config_config", None)
    cfg = _parse(values, [f"--config={target}"], f"config {config}: ")
    if not isinstance(cfg, ConfigDict):
        raise UserError(f"config {config}: get_config must return a ConfigDict", USAGE)
    schema = fields(base())
    for key in fields(cfg):
        _refuse_unknown(key, schema, f"config {config}: ")
    if missing := sorted(schema.keys() - fields(cfg)):
        raise UserError(
            f"config {config} has no {', '.join(missing)}: start it from vit_scale.config.base()",
            USAGE,
        )
    overrides = list(overrides)
    if resolve := runpy.run_path(str(path)).get("resolve"):
        resolved = override(copy.deepcopy(cfg), overrides)
        try:
            resolve(resolved, argument, begun or {})
        except Exception as error:  # user code may raise anything
            raise UserError(f"config {config}: {_last_line(error)}", USAGE) from error
        cfg = resolved
    return override(cfg, overrides)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def override(cfg: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """Apply overrides such as "optim.lr=3e-4" to `cfg`, in place, and return it.

    Raises UserError for unknown keys and for values of the wrong type.
    """
    overrides, known = list(overrides), fields(cfg)
    only = ConfigDict()  # what is overridden, because config_flags formats a whole config as text
    for item in overrides:
        key, equals, _ = item.partition("=")
        _refuse_unknown(key, known, "")
        if not equals:
            raise UserError(f"--config.{key} needs a value: --config.{key}=VALUE", USAGE)
        _copy_field(cfg, only, key)
    values, arguments = flags.FlagValues(), [f"--config.{item}" for item in overrides]
    config_flags.DEFINE_config_dict(
        "config", only, flag_values=values, sys_argv=["vit-scale", *arguments]
    )
    cfg.update_from_flattened_dict(fields(_parse(values, arguments, "")))
    cfg.lock()
    _refuse_wrong_tuples(cfg)
    return cfg


def _copy_field(source: ConfigDict, target: ConfigDict, key: str) -> None:
    """Copy one field, such as "optim.lr", with its type where it has no value yet."""
    *blocks, name = key.split(".")
    for block in blocks:
        source = source[block]
        if block not in target:
            target[block] = ConfigDict()
        target = target[block]
    value = source[name]
    target[name] = config_dict.placeholder(source.get_type(name)) if value is None else value


def _parse(values: flags.FlagValues, arguments: list[str], where: str) -> ConfigDict:
    """Parse `arguments` with config_flags; its errors become one line."""
    try:
        values(["vit-scale", *arguments])
    except Exception as error:  # a config file is user code, which may raise anything
        raise UserError(f"{where}{str(error).strip().splitlines()[-1]}", USAGE) from error
    return values.config


def _refuse_wrong_tuples(cfg: ConfigDict) -> None:
    """Check the items of tuples, which config_flags does not."""
    values = fields(cfg)
    for key, default in fields(base()).items():
        if not isinstance(default, tuple) or key in NESTED:
            continue
        strings = key not in FROM_DATA and (not default or isinstance(default[0], str))
        value, kind = values[key], str if strings else (int, float)
        if not isinstance(value, tuple) or not all(isinstance(v, kind) for v in value):
            raise UserError(
                f"{key}={value!r} must be a tuple such as "
                f"{default or (('a', 'b') if strings else (1.0, 2.0))}",
                USAGE,
            )


def _refuse_unknown(key: str, schema: Collection[str], where: str) -> None:
    if key in REMOVED:
        raise UserError(f"{where}{key} was removed: {REMOVED[key]}; leave it out", USAGE)
    if key not in schema:
        raise UserError(f"{where}no config field is named {key!r}; {nearest(key, schema)}", USAGE)


def check_field(name: str) -> None:
    """Raise UserError for the name of no field, with the nearest one."""
    _refuse_unknown(name, fields(base()), "")


def fields(cfg: ConfigDict) -> dict:
    """Return {"optim.lr": 0.001, ...}: every leaf of a config by its dotted name."""
    flat: dict = {}
    for key in cfg:
        value = cfg[key]
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{name}": leaf for name, leaf in fields(value).items()}
        else:
            flat[key] = value
    return flat


def dotted(tree: dict) -> dict:
    """Return {"config.optim.lr": 0.001, ...}: the leaves of nested dicts by dotted names."""
    return fields(ConfigDict(tree))


def image_size(cfg: ConfigDict) -> tuple[int, int]:
    """Return (height, width) in pixels of the model's input."""
    return cfg.data.resolution, cfg.data.width or cfg.data.resolution


def to_json(cfg: ConfigDict) -> dict:
    """Return the config as JSON types, as run.json holds it."""
    return json.loads(cfg.to_json())


def from_json(stored: dict) -> ConfigDict:
    """Return the inverse of `to_json`, in this version's schema.

    A missing field takes the value that runs without it computed with (`OLD_DEFAULTS`), else its
    default; a removed field is dropped. Raises UserError for an unknown field and for a value of
    the wrong type.
    """
    cfg = base()
    schema = fields(cfg)
    for key, value in {**OLD_DEFAULTS, **dotted(stored)}.items():
        if key in REMOVED:
            continue
        _refuse_unknown(key, schema, "the run's config: ")
        owner = cfg
        *blocks, name = key.split(".")
        for block in blocks:
            owner = owner[block]
        try:
            owner[name] = _tuples(value)
        except TypeError as error:
            raise UserError(f"the run's config: {key}={value!r} has the wrong type") from error
    return cfg


def _tuples(value: Any) -> Any:
    """Return lists, which JSON has, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def with_old_defaults(cfg: ConfigDict, stored: dict) -> ConfigDict:
    """Return a copy of `cfg` for resuming a run whose run.json holds the config `stored`.

    A field that the run lacks, and that `cfg` leaves at its default, takes the value that the run
    computed with (`OLD_DEFAULTS`).
    """
    values, default, recorded = fields(cfg), fields(base()), dotted(stored)
    old = {
        key: value
        for key, value in OLD_DEFAULTS.items()
        if key not in recorded and values[key] == default[key]
    }
    cfg = copy.deepcopy(cfg)
    cfg.update_from_flattened_dict(old)
    return cfg


def differences(old: dict, new: dict) -> list[str]:
    """Return lines such as "optim.lr: 0.001 -> 0.003" for two results of `to_json`."""
    left, right = dotted(old), dotted(new)
    return [
        f"{key}: {left.get(key, 'absent')} -> {right.get(key, 'absent')}"
        for key in sorted(left | right)
        if left.get(key) != right.get(key)
    ]
