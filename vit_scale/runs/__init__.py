"""A run's folder: description, lock, watchdog, goodput, rollbacks, report, and verification.

Guaranteed: one process at a time writes to a run; its files are whole or absent; a run continues
only with the config and the data that it began with; a process that hangs, or whose peer has died,
ends with a status that a launcher can act on; the folder alone is enough to load the model.
"""

from vit_scale.runs.json_files import read_json, write_json
from vit_scale.runs.resume import resumed_config
from vit_scale.runs.run_folder import Run

__all__ = ["Run", "read_json", "resumed_config", "write_json"]
