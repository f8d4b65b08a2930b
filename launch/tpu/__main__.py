"""python3 -I launch/tpu: nothing of the user's environment is imported by accident."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))

from launch.tpu.cli import main

sys.exit(main())
