"""`vit_imagenet:B/16` under its former name.

    vit-scale train --config vit_base_imagenet --config.data.path=IMAGENET

Result: not measured yet.
"""

from vit_scale.config import load


def get_config():
    return load("vit_imagenet:B/16")
