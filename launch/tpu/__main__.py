"""Entry point of `python3 -I launch/tpu`; -I keeps the user's environment out of the imports."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))

from launch.tpu.cli import main
from launch.tpu.journal import Terminal

sys.stdout, sys.stderr = Terminal(sys.stdout), Terminal(sys.stderr)  # type: ignore[assignment]
sys.exit(main())
