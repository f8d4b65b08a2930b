"""TensorFlow Datasets: features are found by type, and slices by file names once indexed."""

import io

import numpy as np
import pytest

from tests.data.test_image_folder import block, everything, picture
from tests.data.test_tar_shards import png, refused
from vit_scale import cli, data
from vit_scale.data import image_files, tfds_sets

tfds = pytest.importorskip("tensorflow_datasets")


def prepare(folder, content: dict[str, list], features: dict, kind: str = "array_record"):
    """Prepare a set whose splits have these rows; return the folder of its version."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        __module__ = "prepared"  # or the place of its code is looked for

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {split: self._generate_examples(rows) for split, rows in content.items()}

        def _generate_examples(self, rows):
            yield from ((str(i), row) for i, row in enumerate(rows))

    builder = Tiny(data_dir=str(folder), file_format=kind)
    builder.download_and_prepare()
    return builder.data_dir


def features(**more) -> dict:
    return {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=["ant", "bee"]),
        "file_name": tfds.features.Text(),
        **more,
    }


def rows(n: int, **more) -> list[dict]:
    """Pictures of seeds 0 to n - 1, named by them."""
    return [
        {"image": io.BytesIO(png(i)), "label": i % 2, "file_name": f"{i}.png", **more}
        for i in range(n)
    ]


@pytest.fixture(autouse=True)
def quiet():
    tfds.disable_progress_bar()
    image_files.print_once.cache_clear()


@pytest.fixture
def prepared(tmp_path):
    return prepare(tmp_path, {"train": rows(5), "validation": rows(2)}, features())


def tfds_block(path, **changes):
    return block(path, name="tfds", **changes)


def test_images_and_labels(prepared):
    source = data.open_split(tfds_block(prepared), "train")
    assert source.classes == ("ant", "bee") and len(source) == 5
    batch = everything(source)
    seen = {
        image.tobytes(): label for image, label in zip(batch["image"], batch["label"], strict=True)
    }
    assert seen == {picture(8, 8, i).tobytes(): i % 2 for i in range(5)}
    assert len(data.open_split(tfds_block(prepared), "test")) == 2


def test_slices_go_by_file_names_once_they_are_indexed(prepared, capsys):
    half = data.open_split(tfds_block(prepared), "train[:50%]")
    assert data.describe(half)["slices"] == "position"
    assert "has no names of its images" in capsys.readouterr().err
    assert cli.main(["data", "index", prepared]) == 0
    assert capsys.readouterr().out == f"{prepared}: train 5, validation 2\n"
    source = data.open_split(tfds_block(prepared), "train")
    assert sorted(source.examples.files.tolist()) == [f"{i}.png".encode() for i in range(5)]
    for name, image in zip(source.examples.files, everything(source)["image"], strict=True):
        np.testing.assert_array_equal(image, picture(8, 8, int(name[:1])))
    half = data.open_split(tfds_block(prepared), "train[:50%]")
    assert data.describe(half)["slices"] == "example"
    file = tfds_sets.index_file(prepared, "train")
    file.write_bytes(tfds_sets.index_file(prepared, "validation").read_bytes())
    assert f"has 2 names of 5 images; run `vit-scale data index {prepared}`" in refused(
        lambda: data.open_split(tfds_block(prepared), "train").examples
    )


def test_features_are_named_where_their_types_do_not_decide(tmp_path):
    more = {"coarse": tfds.features.ClassLabel(names=["x", "y", "z"])}
    folder = prepare(tmp_path, {"train": rows(3, coarse=2)}, features(**more))
    error = refused(lambda: data.open_split(tfds_block(folder), "train"))
    assert "columns coarse, label might be the labels" in error.replace(
        "columns label, coarse", "columns coarse, label"
    )
    assert "set --config.data.label_column" in error
    source = data.open_split(tfds_block(folder, label_column="coarse"), "train")
    assert everything(source)["label"].tolist() == [2, 2, 2]


def test_an_index_has_the_labels_of_each_feature(tmp_path):
    """Labels of another feature would be packed and sampled by as if they were the chosen ones."""
    more = {"coarse": tfds.features.ClassLabel(names=["x", "y", "z"])}
    folder = prepare(tmp_path, {"train": rows(3, coarse=2)}, features(**more))
    file = tfds_sets.index_file(folder, "train")

    def labels(column: str) -> list[int]:
        source = data.open_split(tfds_block(folder, label_column=column), "train")
        assert source.examples.files.tolist() == [b"%d.png" % image for image in range(3)]
        return source.labels(np.arange(3)).tolist()

    tfds_sets.index_names(folder)
    assert labels("label") == [0, 1, 0] and labels("coarse") == [2, 2, 2]

    # Earlier versions wrote those of the last feature alone.
    last = [
        f for f in tfds.builder_from_directory(folder).info.features if f in more or f == "label"
    ]
    with np.load(file) as stored:
        np.savez(file, files=stored["files"], labels=stored[tfds_sets.labels_of(last[1])])
    assert labels(last[1]) == {"label": [0, 1, 0], "coarse": [2, 2, 2]}[last[1]]
    assert f"lacks the labels '{last[0]}'; run `vit-scale data" in refused(lambda: labels(last[0]))


def test_what_cannot_be_read_is_one_line(tmp_path, prepared):
    def opened(path, split="train"):
        return lambda: data.open_split(tfds_block(path), split)

    assert "is no set of TensorFlow Datasets" in refused(opened(tmp_path / "none"))
    assert "is no set of TensorFlow Datasets" in refused(opened("no_such_set"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/dataset_info.json").write_text("{")
    assert "is no set of TensorFlow Datasets" in refused(opened(tmp_path / "bad"))
    unnamed = {k: v for k, v in features().items() if k != "file_name"}
    content = [{k: v for k, v in row.items() if k != "file_name"} for row in rows(2)]
    folder = prepare(tmp_path / "unnamed", {"train": content}, unnamed)
    assert "nothing to index" in refused(lambda: tfds_sets.index_names(folder))
    assert "has no split 'val'; it has train" in refused(opened(folder, "val"))
    wrong = prepare(tmp_path / "w", {"train": [*rows(1), {**rows(1)[0], "label": -1}]}, features())
    source = data.open_split(tfds_block(wrong), "train")
    assert "label -1 is outside the 2 classes" in refused(lambda: everything(source))


@pytest.mark.parametrize("validated", [True, False])
def test_a_test_set_without_labels_is_skipped_or_refused(tmp_path, capsys, validated):
    content = {"train": rows(2), "test": [{**row, "label": -1} for row in rows(3)]}
    folder = prepare(tmp_path, content | ({"validation": rows(2)} if validated else {}), features())
    if validated:
        assert len(data.open_split(tfds_block(folder), "test")) == 2
        assert "test has no labels, all are -1: validation is read" in capsys.readouterr().err
    else:
        assert "split test has no labels, all are -1" in refused(
            lambda: data.open_split(tfds_block(folder), "test")
        )
