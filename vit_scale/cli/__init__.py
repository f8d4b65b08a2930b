"""The command line: `vit-scale VERB ...`. Each verb is a few lines over the rest of the package."""

from vit_scale.cli.entry import main

__all__ = ["main"]
