"""throughput: what is counted as an image a second, and what `data bench` prints of it."""

import itertools
import json

import pytest

from tests.data.test_image_folder import picture, save
from vit_scale import cli
from vit_scale.data import throughput


class Clock:
    """A clock that passes a second whenever it is read."""

    def __init__(self):
        self.ticks = itertools.count()

    def perf_counter(self) -> float:
        return float(next(self.ticks))


def test_batches_that_were_read_ahead_do_not_count(monkeypatch):
    monkeypatch.setattr(throughput, "time", Clock())
    sizes = iter([1000, 1000, 1000, 5, 6, 7, 999])
    batches = ({"mask": [True] * size} for size in sizes)
    assert throughput._rate(batches, seconds=4, ahead=2) == pytest.approx((5 + 6 + 7) / 4)
    assert next(sizes) == 999


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        save(tmp_path / f"set/train/class_{number % 2}/{number}.png", picture(20, 24, number))
    return tmp_path / "set"


def command(folder, *more: str) -> list[str]:
    fields = (f"path={folder}", "name=folder", "batch=4", "resolution=16", "workers=0", *more)
    overrides = [f"--config.data.{field}" for field in fields]
    crop = "--config.augment.crop=torchvision"
    return ["data", "bench", "--config", "vit_tutorial_cifar", crop, "--seconds", "1", *overrides]


def test_the_command(folder, capsys):
    assert cli.main([*command(folder, "train=train", "threads=2"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["images"], result["height"], result["width"]) == (6, 16, 16)
    assert (result["workers"], result["threads"]) == (0, 2)
    assert result["images_per_second"] > 0 and result["images_per_second_per_thread"] > 0
    cfg = throughput.ConfigDict(
        {"data": {"train": "train", "path": "DIR"}, "augment": {"crop": "inception"}}
    )
    shown = {"images": 1_281_167, "height": 224, "width": 160, "workers": 8, "threads": 12}
    shown |= {"images_per_second": 20_000.4, "images_per_second_per_thread": 500.0, "cores": 112}
    lines = [
        "train of DIR: 1,281,167 images, read at 224 x 160, crop inception",
        "one thread: 500 images/s",
        "this host: 20,000 images/s with 8 workers of 12 threads, on 112 cores",
    ]
    assert throughput.summary(cfg, shown).splitlines() == lines
    plan = {"fits": True, "images_per_second": 45_000, "hosts": 4, "topology": "v5e:4x4"}
    assert throughput.summary(cfg, shown | {"plan": plan}).splitlines()[3] == (
        "v5e:4x4 needs 11,250 images/s of each of its 4 hosts: 22.5 such threads (predicted, not "
        "measured)"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("load=32",), "not to data.load=32: set data.load=0"),
        (("memory=True",), "data.memory decodes each only once: set data.memory=False"),
        (("name=cifar10",), "data.name=cifar10 is in memory: set augment.crop=resized"),
    ],
)
def test_a_crop_without_files_to_crop_is_refused(folder, capsys, more, message):
    assert cli.main(command(folder, "train=train", *more)) == 1
    error = capsys.readouterr().err
    assert "augment.crop=torchvision crops image files each time they are read, and " in error
    assert message in error and error.count("\n") == 1
