"""Mixtures: how much of each set a batch has depends on the weights and the step alone."""

import json
from itertools import chain

import numpy as np
import pytest

from tests.data.test_image_folder import picture, save
from tests.data.test_tar_shards import refused
from tests.helpers.tiny import tiny_config
from vit_scale import cli, config, data
from vit_scale.data import InMemory, Mixture, loader
from vit_scale.data.loader import TrainBatches, shuffled
from vit_scale.data.mixtures import relabel
from vit_scale.data.orders import permutation
from vit_scale.errors import UserError
from vit_scale.runs import resume
from vit_scale.training.splits import open_splits

CLASSES = ("ant", "bee")


def numbered(n: int, first: int, classes=CLASSES) -> InMemory:
    """A set whose images are numbers: first, first + 1, ..."""
    images = np.zeros((n, 1, 1, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(first, first + n)
    return InMemory(f"set at {first}", images, np.arange(n) % len(classes), classes)


def mixture(weights=(6, 3, 1)) -> Mixture:
    return Mixture([numbered(30, 0), numbered(20, 100), numbered(5, 200)], weights)


def steps(source, batch=20, seed=1, start=0, stop=30, rows=None) -> list[list[int]]:
    batches = TrainBatches(source, batch, seed, start, stop, rows)
    return [batches[i]["image"][:, 0, 0, 0].tolist() for i in range(len(batches))]


def test_batches_hold_the_sets_in_their_proportion():
    """Each batch of 20, and so does any number of steps, as far as whole examples can."""
    for batch in steps(mixture()):
        assert np.bincount(np.array(batch) // 100, minlength=3).tolist() == [12, 6, 2]
    uneven = steps(mixture((0.5, 0.33, 0.17)), batch=7, stop=100)
    counts = np.cumsum([np.bincount(np.array(b) // 100, minlength=3) for b in uneven], axis=0)
    expected = np.outer(7 * np.arange(1, 101), [0.5, 0.33, 0.17])
    assert np.abs(counts - expected).max() < 2
    assert (counts[:, 1:] <= expected[:, 1:]).all()


def test_each_set_has_epochs_of_its_own():
    batches = steps(mixture())
    for first, n in ((0, 30), (100, 20), (200, 5)):
        stream = [x - first for batch in batches for x in sorted(batch) if x // 100 * 100 == first]
        assert len(stream) > 2 * n
        # Within a batch the order is another, so whole batches are compared.
        per_batch = len(stream) // len(batches)
        seed = 1 + (0, 100, 200).index(first)
        expected = shuffled(np.arange(len(stream)), n, seed).reshape(-1, per_batch)
        np.testing.assert_array_equal(
            np.sort(np.reshape(stream, (-1, per_batch))), np.sort(expected)
        )


def test_few_orders_of_a_set_are_kept():
    n = 1000
    stream = shuffled(np.arange(12 * n), n, 3).reshape(12, n)
    for epoch, order in enumerate(stream):
        np.testing.assert_array_equal(order, permutation(n, 3, epoch))
    assert sorted(loader._orders(n, 3)) == [8, 9, 10, 11]
    np.testing.assert_array_equal(shuffled(np.arange(n), n, 3), stream[0])


def test_a_step_is_the_same_for_any_start_and_hosts():
    whole = steps(mixture())
    assert steps(mixture(), start=17) == whole[17:]
    halves = [steps(mixture(), rows=rows) for rows in np.split(np.arange(20), 4)]
    assert [list(chain(*parts)) for parts in zip(*halves, strict=True)] == whole
    assert steps(mixture(), seed=2) != whole
    of_first = [[i for i, x in enumerate(batch) if x >= 200] for batch in whole]
    assert len(set(map(tuple, of_first))) > 20  # rows are shuffled, or hosts would get one set each


def test_classes_of_the_same_name_are_one():
    one, other = numbered(4, 0), numbered(6, 100, ("cow", "bee", "ant"))
    mixed = Mixture([one, other], (1, 1))
    assert mixed.classes == ("ant", "bee", "cow")
    assert mixed.read(np.arange(4, 10))["label"].tolist() == [2, 1, 0, 2, 1, 0]
    assert mixed.read(np.array([9, 0, 1]))["label"].tolist() == [0, 0, 1]
    evaluated = relabel(numbered(3, 0, ("cow", "ant")), mixed.classes)
    assert evaluated.read(np.arange(3))["label"].tolist() == [2, 0, 2]
    assert relabel(one, CLASSES) is one
    assert "class 'dog' of set at 0 is in none of data.mixture's sets" in refused(
        lambda: relabel(numbered(3, 0, ("dog", "ant")), mixed.classes)
    )
    assert "the classes of set at 9 have no names" in refused(
        lambda: Mixture([one, numbered(3, 9, ("0", "1", "2"))], (1, 1))
    )


def test_sets_of_other_numbers_are_refused():
    one, other = Numbers("ages", ("age", "height")), Numbers("plain", ("age",))
    with pytest.raises(UserError, match=r"other numbers \(ages: age, height; plain: age\)"):
        Mixture([one, other], [1, 1], numbers=True)
    assert Mixture([one, one], [1, 1], numbers=True).targets == 2


class Numbers:
    size, decodes, targets = (8, 8), False, 2

    def __init__(self, name, classes):
        self.name, self.classes = name, classes

    def __len__(self):
        return 3


@pytest.fixture
def folders(tmp_path):
    for name, classes, n in (("one", "ab", 12), ("two", "bc", 6)):
        for number in range(n):
            file = f"{name}/train/{classes[number % 2]}/{number}.png"
            save(tmp_path / file, picture(12, 12, number + ord(name[1])))
    for number in range(3):
        save(tmp_path / "one/val/b" / f"{number}.png", picture(12, 12, 90 + number))
    return tmp_path


def mixed(folders, *more: str):
    entries = f'(("folder:{folders}/one", 2), ("folder:{folders}/two", 1.0))'
    fields = ("data.name=folder", f"data.path={folders}/one", "data.batch=6", "data.resolution=8")
    return tiny_config(*fields, f"data.mixture={entries}", "eval.final=val", "eval.split=", *more)


def test_a_config_names_its_sets(folders, capsys):
    cfg = mixed(folders, "steps=10", "augment.crop=torchvision")
    splits = open_splits(cfg)
    assert isinstance(splits.train, Mixture) and splits.train.crops
    assert splits.train.classes == splits.final.classes == ("a", "b", "c")
    assert len(splits.train) == 18 and splits.final.read(np.arange(3))["label"].tolist() == [1] * 3
    assert "mixture in 10 steps: one train 3.33 epochs, two train 3.33 epochs" in (
        capsys.readouterr().err
    )
    assert config.from_json(json.loads(json.dumps(config.to_json(cfg)))).data.mixture == (
        (f"folder:{folders}/one", 2),
        (f"folder:{folders}/two", 1.0),
    )
    batches = list(data.train_batches(splits.train, cfg.data, 0, 0, 4))
    assert len({batch["image"].tobytes() for _, batch in batches}) == 4
    before = data.describe(splits.train)["fingerprint"]
    save(folders / "two/train/b/new.png", picture(12, 12, 5))
    assert data.describe(data.open_training(cfg))["fingerprint"] != before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("data.mixture=('folder',)",), "data.mixture has 'folder', which must be"),
        (("data.mixture=(('folder:x', 'y'),)",), 'which must be ("NAME:PATH", weight)'),
        (("data.mixture=(('foldr:x', 1),)",), "data.name='foldr' is unknown"),
        (("data.batch=1",), "data.batch=1 is too small for the 2 sets of data.mixture"),
        (("data.repeats=2",), "data.repeats=2 cannot be combined with data.mixture"),
        (
            ("augment.crop=torchvision", "data.mixture=(('cifar10', 1), ('folder:x', 1))"),
            "data.name=cifar10 is in memory",
        ),
    ],
)
def test_bad_mixtures_are_one_line(folders, fields, message):
    def opened():
        cfg = mixed(folders, *fields)
        data.check_crop(cfg)
        data.open_training(cfg)

    assert message in refused(opened)


def test_sets_of_one_name_have_epochs_of_their_own():
    sets = [numbered(3, 0), numbered(6, 3), numbered(6, 9)]
    for source, name in zip(sets, ("set", "other", "set"), strict=True):
        source.name = name
    epochs = Mixture(sets, (1, 1, 2)).epochs(3, 4)
    assert epochs == [("set", 1.0), ("other", 0.5), ("set (2)", 1.0)]


def test_a_run_resumes_where_its_sets_have_moved(tmp_path):
    """As it does with one set: what is in them is compared, not where they are."""

    def description(*mixture) -> dict:
        cfg = config.base()
        cfg.data.mixture = mixture
        return {"config": config.to_json(cfg)}

    before = description(("folder:DIR", 0.7), ("tar:OTHER", 1.0))
    resume.check_same_config(
        tmp_path, before, description(("folder:gs://there", 0.7), ("tar:x", 1.0))
    )
    for other in (
        [("folder:DIR", 0.6), ("tar:OTHER", 1.0)],
        [("folder:DIR", 0.7), ("folder:OTHER", 1.0)],
        [("tar:OTHER", 1.0), ("folder:DIR", 0.7)],
        [("folder:DIR", 0.7)],
    ):
        with pytest.raises(UserError, match=r"with a different config \(data.mixture: "):
            resume.check_same_config(tmp_path, before, description(*other))


def test_weights_and_sizes_are_checked():
    for weights in ((1, 0, 1), (1, -1, 1), (1, 2)):
        assert "must be above 0" in refused(lambda w=weights: mixture(w))
    large = InMemory("large", np.zeros((2, 2, 2, 3), np.uint8), np.zeros(2, int), CLASSES)
    assert "images of different sizes" in refused(lambda: Mixture([numbered(3, 0), large], (1, 1)))


@pytest.mark.slow
def test_a_run_reports_its_epochs(folders, tmp_path):
    cfg = mixed(folders, "steps=4", "model.classes=3", "data.workers=0", "data.resolution=16")
    overrides = [
        f"--config.{key}={value}" for key, value in config.fields(cfg).items() if value is not None
    ]
    run = tmp_path / "run"
    command = ["train", "--config", "vit_tutorial_cifar", "--workdir", str(run), "--quiet"]
    assert cli.main([*command, *overrides]) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["epochs"] == {"one train": 16 / 12, "two train": 8 / 6}
    assert report["data"]["classes"] == 3
    for verb in (["eval", str(run)], ["inspect", str(run), "--out", str(tmp_path / "page")]):
        assert cli.main(verb) == 0, verb
