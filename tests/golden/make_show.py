"""Write tests/golden/show.json: what `show --json` printed for every config at commit c062dd0.

    git worktree add /tmp/c062dd0 c062dd0
    PYTHONPATH=/tmp/c062dd0 python tests/golden/make_show.py

Later commits add configs and fields; what is in the file never changes.
"""

import json
import pathlib

from vit_scale.program import summary  # where that commit has it

from vit_scale import config

FILE = pathlib.Path(__file__).with_name("show.json")


def main() -> None:
    shown = {}
    for name in config.names():
        cfg = config.load(name)
        shown[name] = summary(cfg)
        for stage in cfg.stages:
            shown[f"{name}:{stage}"] = config.to_json(config.load(f"{name}:{stage}"))
    lines = [f'"{name}": {json.dumps(shown[name], sort_keys=True)}' for name in sorted(shown)]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
