"""`python -m vit_scale.cli VERB ...` is `vit-scale VERB ...`."""

import sys

from vit_scale.cli.entry import main

if __name__ == "__main__":  # not in the processes that decode images, which import this module
    sys.exit(main())
