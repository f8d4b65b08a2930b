"""Image files without labels: all of a folder, in whatever folders they are."""

import pytest
from PIL import Image

from tests.helpers.objectives import SELF_SUPERVISED
from tests.helpers.tiny import SIZES
from vit_scale import cli, config
from vit_scale.data import open_split
from vit_scale.errors import UserError
from vit_scale.training import objectives

FILES = ("a.png", "b/c.png", "b/d/e.jpg", ".hidden/f.png", "notes.txt")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two folders of the same images: one with, one without the folder of a split."""
    top = tmp_path_factory.mktemp("photos")
    for root in (top / "flat", top / "split/train"):
        for number, name in enumerate(FILES):
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".txt":
                file.write_text("no image")
            else:
                Image.new("RGB", (20, 20), (40 * number, 0, 0)).save(file)
    return top


def data(path, *overrides: str):
    fields = ("data.name=folder", "data.target=none", "data.resolution=16", f"data.path={path}")
    return config.override(config.base(), [*fields, *overrides]).data


@pytest.mark.parametrize("layout", ["flat", "split"])
def test_every_image_is_an_example(photos, layout):
    source = open_split(data(photos / layout), "train")
    batch = source.read([0, 1, 2])
    levels = [int(image[0, 0, 0]) for image in batch["image"]]
    assert len(source) == 3 and source.classes == ("image",)
    assert [round(level / 40) for level in levels] == [0, 1, 2] and not batch["label"].any()
    one, other = (
        open_split(data(photos / layout), part) for part in ("train[:50%]", "train[50%:]")
    )
    assert len(one) + len(other) == 3


@pytest.mark.parametrize(
    ("fields", "split", "message"),
    [
        ((), "test", "has no folder test or val or validation"),
        (("data.name=cifar10",), "train", "data.target=none needs"),
        (("data.name=tar",), "train", "data.target=none is of image files in a folder"),
    ],
)
def test_what_has_no_images_without_labels_is_refused(photos, fields, split, message):
    with pytest.raises(UserError, match=message):
        open_split(data(photos / "flat", *fields), split)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no images"):
        open_split(data(tmp_path), "train")


def train(photos, run, *overrides: str) -> int:
    """MAE on the tutorial's config, in one step."""
    plain = ("augment.mixup=0", "augment.cutmix=0", "augment.smoothing=0", "model.dropout=0")
    fields = (*SIZES, *SELF_SUPERVISED["mae"], *plain, "data.name=folder")
    fields = (*fields, "steps=1", "optim.schedule=constant", "data.train=train")
    fields = (*fields, "data.workers=0", "log.wandb=False", "log.tensorboard=False", *overrides)
    flags = [f"--config.{item}" for item in (*fields, f"data.path={photos / 'flat'}")]
    return cli.main(["train", "--config", "vit_tutorial_cifar", *flags, f"--workdir={run}"])


def test_self_supervision_trains_on_them(photos, tmp_path):
    assert train(photos, tmp_path / "run", "data.target=none") == 0
    assert (tmp_path / "run/checkpoints/1").is_dir()
    with pytest.raises(UserError, match="objective=classification learns class or classes"):
        objectives.check(config.override(config.base(), ["data.target=none"]))
