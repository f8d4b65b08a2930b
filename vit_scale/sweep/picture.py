"""The picture of a sweep, and the lines about its best run."""

import contextlib
from typing import Any

from vit_scale.errors import UserError
from vit_scale.inspect.curves import read_curves
from vit_scale.runs import report
from vit_scale.runs.json_files import read_json
from vit_scale.storage import files
from vit_scale.sweep.definition import Sweep
from vit_scale.sweep.points import train_arguments, train_command

PICTURE = "sweep.png"


def write_picture(sweep: Sweep, result: dict[str, Any]) -> str:
    """Write SWEEP/sweep.png, and return its path, or why there is none."""
    try:
        from vit_scale.inspect.plots.canvas import encode_png, rasterize
        from vit_scale.inspect.plots.sweep import plot_sweep
    except ModuleNotFoundError:
        return "no picture: matplotlib is not installed (launch/environment.sh inspect)"
    runs, measure = result["runs"], result["measure"]
    curves = [
        read_curves(sweep.folder / run["name"]).get(f"eval/{measure}", ([], [])) for run in runs
    ]
    figure = plot_sweep(
        curves,
        [run["name"] for run in runs],
        [run["point"] for run in runs],
        [run["result"] for run in runs],
        f"{report.format_name(measure)} on {result['split']}",
        measure in report.SHARES,
        f"{result['config']}: {len(runs)} runs",
    )
    file = sweep.folder / PICTURE
    files.write(file, encode_png(rasterize(figure)))
    return str(file)


def describe_best(sweep: Sweep, result: dict[str, Any]) -> list[str]:
    """Return lines about the best run: its name, its result on the final split, its command."""
    if result["best"] is None:
        return ["no run has finished"]
    (point,) = [run["point"] for run in result["runs"] if run["name"] == result["best"]]
    folder = sweep.run_folder(point)
    lines = [f"best: {folder}"]
    with contextlib.suppress(UserError):  # a report that can't be read
        final = read_json(folder / "report.json").get("eval")
        if final:
            lines.append(f"on {final['split']}: {report.format_results(final)}")
    arguments = train_arguments(sweep.config, sweep.overrides, point, folder)
    return [*lines, train_command("vit-scale train", arguments, 0)]
