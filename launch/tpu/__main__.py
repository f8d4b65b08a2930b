"""Entry point of `python3 -I launch/tpu`; -I keeps the user's environment out of the imports."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))

from launch.tpu.cli import main

sys.exit(main())
