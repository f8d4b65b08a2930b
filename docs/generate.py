"""Write the pages and the picture that are made from the code and from results/.

    .venv/bin/python docs/generate.py            # after a change of a flag, a field or a config

cli.md comes from the parsers of vit-scale and of the launchers, configuration.md from
configs/base.py and the headers of the other configs, and tables and pictures from the run folders
in results/ (measured.py). A test fails where a file is stale.
"""

import argparse
import ast
import importlib.util
import io
import pathlib
import re
import sys
import tokenize
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import cifar10  # noqa: E402
import measured  # noqa: E402

DOCS = ROOT / "docs"
CLI = """\
<!-- Made by docs/generate.py: do not edit. -->

# Command line

Every command prints its flags with `--help`. `--config.FIELD=VALUE` overrides a field of the
[configuration](configuration.md) wherever a command takes one.
"""
CONFIGURATION = """\
<!-- Made by docs/generate.py: do not edit. -->

# Configuration

A config is a Python file whose `get_config()` returns `vit_scale.config.base()` with what it
changes. `configs/base.py` holds every field with its default, and no default is anywhere else.
`--config.BLOCK.FIELD=VALUE` overrides a field on the command line; an unknown name, or a value of
another type, is refused with the nearest valid one.

```bash
# every field, as the run has it
vit-scale show --config vit_cifar:S/16 --config.optim.lr=3e-3
```

## Configs

`--config NAME` takes one of these names, or the path of a file of your own.

| name | |
|---|---|
"""


# The command line


def cli() -> str:
    """The page on the commands, from their parsers."""
    from launch.tpu import flags
    from vit_scale.cli.parser import parser

    lines = [CLI]
    for name, sub in verbs(parser()):
        lines += [
            f"## vit-scale {name}",
            "",
            sentence(sub.description),
            *usage(sub),
            *described(sub),
        ]
        if sub.epilog:
            lines += [sentence(sub.epilog), ""]
    lines += ["## launch/tpu_vm.sh", "", "Trains on a TPU slice: see [TPU pods](tpu-pods.md).", ""]
    lines += ["| verb | |", "|---|---|"]
    lines += [f"| `{verb}` | {cell(text)} |" for verb, text in flags.VERBS.items()] + [""]
    lines += described(flags.parser(), skip={"verb"})
    gke = load(ROOT / "launch" / "gke.py")
    lines += ["## launch/gke.py", "", sentence(gke.parser().description), ""]
    lines += described(gke.parser())
    return "\n".join(lines).rstrip() + "\n"


def load(file: pathlib.Path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verbs(
    top: argparse.ArgumentParser, prefix: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """("data pack", its parser) for each command below `top`."""
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                inner = list(verbs(sub, f"{prefix}{name} "))
                yield from inner or [(f"{prefix}{name}", sub)]


def usage(sub: argparse.ArgumentParser) -> list[str]:
    """The usage of a command as a block, in lines that a page has room for."""
    lines = [sub.prog]
    for action in sub._actions:
        if "--help" in action.option_strings:
            continue
        word = spelling(action) + (" ..." if action.nargs in ("+", "*") else "")
        word = word if action.required and action.nargs != "*" else f"[{word}]"
        if len(lines[-1]) + len(word) > 76:
            lines.append("   ")
        lines[-1] += f" {word}"
    return ["", "```text", *lines, "```", ""]


def spelling(action: argparse.Action) -> str:
    """--flag METAVAR, or the METAVAR of an argument."""
    metavar = action.metavar or action.dest.upper()
    metavar = metavar if isinstance(metavar, str) else " ".join(metavar)
    if not action.option_strings:
        return metavar
    flag = next((o for o in action.option_strings if o.startswith("--")), action.option_strings[0])
    return flag if action.nargs == 0 else f"{flag} {metavar}"


def described(sub: argparse.ArgumentParser, skip: set[str] = frozenset()) -> list[str]:
    """A table of the arguments of each group."""
    lines: list[str] = []
    plain = ("positional arguments", "options")
    ours = [g for g in sub._action_groups if g.title in plain]
    others = [g for g in sub._action_groups if g.title not in plain]
    together = [action for group in ours for action in group._group_actions]
    for title, text, actions in [
        ("", "", together),
        *((g.title, g.description, g._group_actions) for g in others),
    ]:
        visible = (a for a in actions if a.help != argparse.SUPPRESS)
        shown = [a for a in visible if a.dest not in skip and "--help" not in a.option_strings]
        if not shown:
            continue
        lines += [f"**{sentence(title)[:-1]}**", ""] if title else []
        lines += [sentence(text), ""] if text else []
        lines += ["| argument | |", "|---|---|"]
        lines += [f"| `{names(action)}` | {cell(text_of(action))} |" for action in shown] + [""]
    return lines


def names(action: argparse.Action) -> str:
    """Every spelling of an argument."""
    main = spelling(action)
    return ", ".join([*(o for o in action.option_strings if o != main.split()[0]), main])


def text_of(action: argparse.Action) -> str:
    """The help of an argument, with its default where that is a value and not said yet."""
    text = (action.help or "").replace("%%", "%")
    plain = action.default in (None, False, "", argparse.SUPPRESS) or isinstance(
        action.default, list
    )
    if plain or action.nargs == 0 or "default" in text:
        return text
    return f"{text} (default: {action.default})".strip()


def sentence(text: str | None) -> str:
    """The text with a capital and a full stop, flags as code."""
    text = " ".join((text or "").replace("%%", "%").split())
    if not text:
        return ""
    text = re.sub(r"(?<![\w`/-])(--[\w.-]*\w(?:=[^\s,;]*[^\s,;:.])?)", r"`\1`", text)
    text = text if text.startswith("`") else text[0].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


def cell(text: str) -> str:
    """Text in a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


# The configuration


def configuration() -> str:
    """The page on the fields and the configs, from configs/."""
    from vit_scale import config

    source = (ROOT / "configs" / "base.py").read_text()
    comments, tree = comments_of(source), ast.parse(source)
    blocks = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    lines, former = [], []
    for name in config.names():
        header = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text())) or ""
        title = " ".join(header.partition("\n\n")[0].split())
        if alias := re.fullmatch(r"(`[^`]+`) under its former name\.", title):
            former.append(f"`{name}` ({alias[1]})")
        else:
            lines.append(f"| `{name}` | {cell(title)} |")
    if former:
        lines += ["", f"Former names that still work: {', '.join(former)}."]
    fields = config.fields(config.base())
    lines += ["", *table("", blocks["get_config"], blocks, comments, fields, "The run")]
    for key, value in entries(blocks["get_config"]):
        if isinstance(value, ast.Call) and getattr(value.func, "id", "") in blocks:
            lines += table(f"{key}.", blocks[value.func.id], blocks, comments, fields, key)
    return CONFIGURATION + "\n".join(lines).rstrip() + "\n"


def comments_of(source: str) -> dict[int, str]:
    """{line: its comment}."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def dictionary(node: ast.AST) -> ast.Dict:
    return next(n for n in ast.walk(node) if isinstance(n, ast.Dict))


def entries(node: ast.AST) -> list[tuple[str, ast.expr]]:
    """(key, value) of the first dictionary in `node`."""
    inner = dictionary(node)
    return [(k.value, v) for k, v in zip(inner.keys, inner.values, strict=True)]


def table(prefix, node, blocks, comments, fields, title) -> list[str]:
    """The section of one block: a row for each field, with the comment that explains it."""
    inner = dictionary(node)
    about = comments.get(inner.lineno, "")
    lines = [f"## {title}", ""]
    lines += [sentence(about), ""] if about else []
    lines += ["| field | default | |", "|---|---|---|"]
    lines += rows(prefix, inner, blocks, comments, fields)
    return [*lines, ""]


def rows(prefix, inner, blocks, comments, fields) -> list[str]:
    """Return the table rows of a dictionary; a nested one follows its own comment."""
    table = []
    ends = [k.lineno - 1 for k in inner.keys[1:]] + [inner.end_lineno - 1]
    for key, value, end in zip(inner.keys, inner.values, ends, strict=True):
        name = f"{prefix}{key.value}"
        if isinstance(value, ast.Call) and getattr(value.func, "id", "") in blocks:
            continue
        if isinstance(value, ast.Dict):
            table.append(f"| `{name}.*` | | {cell(comments.get(key.lineno, ''))} |")
            table += rows(f"{name}.", value, blocks, comments, fields)
            continue
        lines = range(key.lineno, max(end, key.lineno) + 1)
        text = " ".join(comments[line] for line in lines if line in comments)
        table.append(f"| `{name}` | {default(fields[name])} | {cell(text)} |")
    return table


def default(value: object) -> str:
    """A default as it is typed; nothing where a field has none."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    return f"`{value}`"


# The results


def filled() -> dict[pathlib.Path, str]:
    """Each document with tables of results, with them made anew."""
    pages = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
    texts = {page: page.read_text() for page in pages}
    return {page: measured.fill(text) for page, text in texts.items() if measured.BLOCK in text}


FILES = {
    "cli.md": cli,
    "configuration.md": configuration,
    "images/pretraining.svg": measured.pretraining,
    "images/pretraining-methods.svg": measured.pretraining_curves,
    "images/cifar10-scratch.svg": cifar10.scratch_curves,
}


def main() -> None:
    for name, make in FILES.items():
        (DOCS / name).parent.mkdir(exist_ok=True)
        (DOCS / name).write_text(make())
    for page, text in filled().items():
        page.write_text(text)


if __name__ == "__main__":
    main()
