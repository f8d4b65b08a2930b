"""Train on a data set of your own: images listed in a CSV file.

    python examples/custom_dataset.py

Registering a set takes one function and one line; slicing, decoding in worker processes, masking,
evaluation and resuming come with it. The images are drawn by this script, so that it runs as it is.
There is no `if __name__ == "__main__"`: worker processes do not run the script again.
"""

import csv
import pathlib

import numpy as np
from PIL import Image

import vit_scale
from vit_scale import config
from vit_scale.data import registry
from vit_scale.data.decode import Corrupt
from vit_scale.data.encoded_images import EncodedImages, decoded_size

CLASSES = ("checks", "rows", "columns")
HERE = pathlib.Path("runs/custom_dataset")


class Listed(EncodedImages):
    """The images of DIR/SPLIT.csv, which has the columns `file` and `class`."""

    def __init__(self, cfg, split):
        super().__init__(f"patterns {split}", CLASSES, cfg)
        self.folder = pathlib.Path(cfg.path)
        with (self.folder / f"{split}.csv").open() as file:
            self.rows = list(csv.DictReader(file))

    def __len__(self):
        return len(self.rows)

    def encoded(self, index):
        """Return the bytes and the label of one image; runs in a worker process."""
        row = self.rows[index]
        try:
            data = (self.folder / row["file"]).read_bytes()
        except OSError as error:
            raise Corrupt(str(error)) from error
        return data, CLASSES.index(row["class"])

    def location(self, index):
        """Name one image in an error message."""
        return str(self.folder / self.rows[index]["file"])


# The names of the splits, the function that opens one, and the size of the images in a batch.
registry.SETS["listed"] = registry.DataSet(("train", "test"), Listed, decoded_size)


def draw(folder, split, count, seed):
    """Write `count` noisy patterns of 40 x 40 pixels and their CSV file."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    row, column = np.indices((40, 40)) // 5 % 2
    patterns = {"checks": row ^ column, "rows": row, "columns": column}
    with (folder / f"{split}.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["file", "class"])
        for number in range(count):
            name = CLASSES[number % len(CLASSES)]
            pixels = 160 * patterns[name][..., None] + random.integers(0, 96, (40, 40, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / split / f"{number}.png")
            table.writerow([f"{split}/{number}.png", name])


draw(HERE / "images", "train", 240, seed=0)
draw(HERE / "images", "test", 60, seed=1)

cfg = config.base()
cfg.steps = 40
cfg.data.name = "listed"
cfg.data.path = str(HERE / "images")
cfg.data.resolution = 32  # files are decoded to it
cfg.data.batch = 24
cfg.data.workers = 2  # processes that decode
cfg.augment.flip = True
cfg.model.variant = "Ti/8"
cfg.model.width = 48
cfg.model.depth = 2
cfg.model.mlp = 96
cfg.model.scan = False
cfg.model.classes = len(CLASSES)
cfg.eval.batch = 30
cfg.log.wandb = False

report = vit_scale.train(cfg, HERE / "run", quiet=True)
accuracy, n = report["eval"]["accuracy"], report["eval"]["n"]
print(f"test accuracy {accuracy:.1%} (n = {n}) after {report['step']} steps")

model = vit_scale.load(HERE / "run")
print("test/0.png:", model.top(HERE / "images/test/0.png", k=1))
