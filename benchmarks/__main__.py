"""`python -m benchmarks`: each measurement, what it needs, its command, and its result if any."""

import pathlib

from benchmarks import comparison, finetune, speed, tutorial
from benchmarks.measurement import RESULTS, Measurement
from vit_scale.runs.json_files import read_json

MEASUREMENTS = tuple(module.MEASUREMENT for module in (tutorial, finetune, comparison, speed))


def listing(results: pathlib.Path = RESULTS) -> str:
    return "\n\n".join(
        f"{m.name}: {status(m, results)}\n"
        f"  measures  {m.title}\n"
        f"  needs     {', '.join(f'{name} in .data/{folder}' for folder, name in m.data.items())}\n"
        f"  command   {m.command}"
        for m in MEASUREMENTS
    )


def status(measurement: Measurement, results: pathlib.Path) -> str:
    """Where, when and on what it was measured, and whether that still holds."""
    path = results / f"{measurement.name}.json"
    if not path.exists():
        return "no result yet"
    result = read_json(path)
    kind = "toy run" if result["toy"] else "result"
    summary = f"{kind} of {result['date']} on {result['device']['kind']}, {path.name}"
    if result["fingerprint"] != measurement.fingerprint:
        return f"outdated (its script or config has changed since): {summary}"
    return summary


if __name__ == "__main__":
    print(listing())
