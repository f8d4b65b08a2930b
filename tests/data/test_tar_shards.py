"""Tar shards: examples are grouped and labelled as in WebDataset; a stale index is refused."""

import errno
import io
import os
import tarfile
from unittest import mock

import numpy as np
import pytest

from tests.data.test_array_record import Inline
from tests.data.test_image_folder import block, everything, picture
from vit_scale import cli, data
from vit_scale.data import tar_shards
from vit_scale.errors import RESUMABLE, UserError
from vit_scale.storage import ranges


def png(seed: int) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture(8, 8, seed)).save(stream, "png")
    return stream.getvalue()


def write_tar(file, members: dict[str, bytes]):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def test_splits_that_are_labelled_in_two_ways_are_refused(tmp_path):
    numbered = {"a/1.png": png(1), "a/1.cls": b"0", "b/2.png": png(2), "b/2.cls": b"1"}
    folders = {"a/1.png": png(1), "b/2.png": png(2)}
    for name, train, val in (("one", numbered, folders), ("other", folders, numbered)):
        write_tar(tmp_path / name / "train-0.tar", train)
        write_tar(tmp_path / name / "val-0.tar", val)
        tar_shards.index_shards(str(tmp_path / name))
        with pytest.raises(UserError, match=r"val has .*, and train .*: label both alike"):
            data.open_split(block(tmp_path / name, name="tar"), "val")


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", Inline)


@pytest.fixture
def shards(tmp_path):
    """Two shards of three and two images, and one of validation, in WebDataset's layout."""
    folder = tmp_path / "set"
    write_tar(
        folder / "train-000.tar",
        {
            "a/1.png": png(1),
            "a/1.cls": b"2",
            "a/1.txt": b"a caption",
            "b.2.json": b'{"label": 0, "caption": "\\u00e9"}',
            "b.2.x.PNG": png(2),
            "c.cls": b"1\n",
            "c.png": png(3),
        },
    )
    write_tar(folder / "train-001.tar", {f"d{i}.{x}": v for i in (4, 5) for x, v in pair(i)})
    write_tar(folder / "val-000.tar", {"v.cls": b"1", "v.png": png(6)})
    return folder


def pair(i: int):
    return (("cls", str(i % 3).encode()), ("png", png(i)))


def index(path, capsys=None):
    return tar_shards.index_shards(str(path))


def tar_block(path, **changes):
    return block(path, name="tar", **changes)


def refused(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_and_labels_are_those_of_the_members(shards):
    assert index(shards) == {"train": 5, "val": 1}
    source = data.open_split(tar_block(shards), "train")
    batch = everything(source)
    assert batch["label"].tolist() == [2, 0, 1, 1, 2]
    for i, image in enumerate(batch["image"], 1):
        np.testing.assert_array_equal(image, picture(8, 8, i))
    assert source.classes == ("0", "1", "2")
    assert everything(data.open_split(tar_block(shards), "test"))["label"].tolist() == [1]
    backwards = source.read(np.array([4, 0]))
    np.testing.assert_array_equal(backwards["image"], batch["image"][[4, 0]])


def test_class_names_are_in_a_file_beside_the_shards(shards):
    (shards / "classes.txt").write_text("ant\nbee\ncow\ndog\n")
    index(shards)
    assert data.open_split(tar_block(shards), "val").classes == ("ant", "bee", "cow", "dog")
    (shards / "classes.txt").write_text("ant\nbee\n")
    error = refused(lambda: data.open_split(tar_block(shards), "train"))
    assert "label 2 at position 0 is outside the 2 classes" in error


def test_without_labels_folders_are_classes(tmp_path):
    """As `tar cf train.tar -C train .` writes them."""
    write_tar(tmp_path / "train.tar", {"./bee/1.png": png(1), "./ant/2.png": png(2)})
    write_tar(tmp_path / "val.tar", {"./bee/3.png": png(3)})
    index(tmp_path)
    train, val = (data.open_split(tar_block(tmp_path), split) for split in ("train", "val"))
    assert train.classes == val.classes == ("ant", "bee")
    assert everything(train)["label"].tolist() == [1, 0]
    assert everything(val)["label"].tolist() == [1]
    write_tar(tmp_path / "val.tar", {"./cow/3.png": png(3)})
    index(tmp_path)
    assert "class 'cow' is not in the training shards" in refused(
        lambda: data.open_split(tar_block(tmp_path), "val")
    )


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("{split}-*.tar", 5),
        ("{split}-00[01].tar", 5),
        ("{split}-{000..001}.tar", 5),
        ("train-001.tar", 2),
        ("train-{000..000}.tar", 3),
    ],
)
def test_patterns(shards, pattern, count):
    path = f"{shards}/{pattern}"
    assert index(path)["train"] == count
    assert len(data.open_split(tar_block(path), "train")) == count


def test_shards_may_be_in_a_folder_of_their_split(shards, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "deep" / split).mkdir(parents=True)
        for file in shards.glob(f"{split}-*.tar"):
            file.rename(tmp_path / "deep" / split / file.name.removeprefix(f"{split}-"))
    assert index(tmp_path / "deep") == {"train": 5, "val": 1}
    assert len(data.open_split(tar_block(tmp_path / "deep"), "train")) == 5


def test_an_index_that_does_not_fit_its_shards_is_refused(shards):
    def opened():
        return data.open_split(tar_block(shards), "train")

    again = f"run `vit-scale data index {shards}`"
    assert refused(opened) == f"{shards} has no index of its train shards; {again}"
    index(shards)
    shard, written = shards / "train-001.tar", (shards / "train.index.npz").stat().st_mtime
    opened()
    os.utime(shard, (written + 1, written + 1))
    assert refused(opened) == f"{shard} is newer than its index; {again}"
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    assert f"{shard} has {len(content) - 512} bytes, and its index is of one with" in refused(
        opened
    )
    shard.rename(shards / "train-002.tar")
    assert "does not know train-002.tar" in refused(opened)
    (shards / "train-002.tar").unlink()
    assert f"{shard} is missing" in refused(opened)
    (shards / "train.index.npz").write_bytes(b"PK")
    assert again in refused(opened)


def test_a_truncated_or_foreign_shard_is_named(shards):
    shard = shards / "train-001.tar"
    content = shard.read_bytes()
    end = 512 * (2 + 1 + len(content) // 512 // 8)
    for cut in (end, len(content.rstrip(b"\0")) // 512 * 512 + 512, 700, 0):
        shard.write_bytes(content[:cut])
        assert str(shard) in refused(lambda: index(shards)), cut
        assert not (shards / "train.index.npz").exists()
    shard.write_bytes(b"this is no tar file" * 100)
    assert str(shard) in refused(lambda: index(shards))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.cls", b"ant", "(e.cls) has no label that is a number below 1,000,000, but b'ant'"),
        ("e.cls", b"-1", "(e.cls) has no label that is a number"),
        ("e.cls", b"3000000000", "(e.cls) has no label that is a number below 1,000,000"),
        ("e.json", b'{"label": "ant"}', "(e.json) has no label that is a number"),
        ("e.json", b"{", "(e.json) has no label that is a number"),
        ("e.json", b'{"class": 1}', "(e.png) has no label; each image needs"),
        ("e.json", b"[1]", "(e.png) has no label; each image needs"),
        ("e.txt", b"1", "(e.png) has no label; each image needs"),
    ],
)
def test_an_image_without_a_label_is_named(shards, name, content, message):
    write_tar(shards / "train-002.tar", {name: content, "e.png": png(7)})
    assert message in refused(lambda: index(shards))


@pytest.mark.parametrize("json", [b'{"url": "x"}', b'{"label": 1}', b"[[3, 4]]"])
def test_a_label_stands_beside_json_without_one(shards, json):
    write_tar(shards / "train-002.tar", {"e.cls": b"1", "e.jpg": png(7), "e.json": json})
    index(shards)
    assert everything(data.open_split(tar_block(shards), "train"))["label"][5] == 1


def test_two_labels_of_one_image_are_refused(shards):
    members = {"e.cls": b"1", "e.json": b'{"label": 2}', "e.png": png(7)}
    write_tar(shards / "train-002.tar", members)
    assert "e.cls has the label 1, and e.json 2" in refused(lambda: index(shards))


def test_what_follows_the_end_of_a_shard_is_not_left_out(shards):
    """As `cat` makes of two tars."""
    shard = shards / "train-001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content + bytes(20_000))
    assert index(shards)["train"] == 5
    shard.write_bytes(content + (shards / "train-000.tar").read_bytes())
    assert "more follows its end" in refused(lambda: index(shards))


def test_the_order_of_shards_is_the_indexs(tmp_path):
    """A range counts to 10, a folder is sorted by name: the same index serves both."""
    for number in range(11):
        write_tar(tmp_path / f"train-{number}.tar", {f"{number}.{x}": v for x, v in pair(number)})
    index(tmp_path)
    batches = [
        everything(data.open_split(tar_block(f"{tmp_path}/{path}"), "train"))
        for path in ("{split}-*.tar", "{split}-{0..10}.tar")
    ]
    for field in ("image", "label"):
        np.testing.assert_array_equal(batches[0][field], batches[1][field])
    (tmp_path / "train-4.tar").unlink()
    assert "train-4.tar of" in refused(lambda: index(f"{tmp_path}/{{split}}-{{0..10}}.tar"))
    assert "names several folders" in refused(lambda: index(f"{tmp_path}/{{0..1}}/train.tar"))


def test_two_images_of_one_example_are_refused(shards):
    write_tar(shards / "train-002.tar", {"e.cls": b"0", "e.png": png(7), "e.seg.png": png(8)})
    assert "e.png and e.seg.png are images of one example" in refused(lambda: index(shards))


def test_an_example_without_its_image_is_refused(shards):
    """It would be left out, and nothing would say so."""
    shard = write_tar(shards / "train-002.tar", {"e.cls": b"0", "e.jxr": b"..."})
    assert "e.cls, e.jxr is an example with a label and no image" in refused(lambda: index(shards))
    with tarfile.open(shard, "w") as tar:  # as tar stores a file's second name
        link = tarfile.TarInfo("f.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a/1.png"
        tar.addfile(link)
    assert "f.png is no file, but a link" in refused(lambda: index(shards))


def test_hidden_members_are_no_examples(shards):
    """The tar of macOS stores a file's attributes beside it."""
    members = {"._e.cls": b"\0\5", "e.cls": b"0", "._e.png": b"\0\5", "e.png": png(7)}
    members |= {"a/@eaDir/1.png/THUMB.png": png(8), "__MACOSX/a/1.png": b"\0\5"}
    write_tar(shards / "train-002.tar", members)
    assert index(shards)["train"] == 6
    assert data.open_split(tar_block(shards), "train").location(5).endswith("(e.png)")


def test_members_that_are_no_images_are_counted(shards, capsys):
    write_tar(shards / "train-002.tar", {"e.cls": b"0", "e.png": png(7), "f.heic": b"..."})
    assert index(shards)["train"] == 6
    assert capsys.readouterr().err.endswith(": .heic 1 (first: f.heic); skipped\n")


@pytest.mark.parametrize("on_corrupt", ["fail", "skip"])
def test_a_shard_that_cannot_be_read_is_no_corrupt_image(shards, monkeypatch, on_corrupt):
    index(shards)
    source = data.open_split(tar_block(shards, on_corrupt=on_corrupt), "train")
    with monkeypatch.context() as patch:
        stale = mock.Mock(side_effect=OSError(errno.ESTALE, "Stale file handle"))
        patch.setattr(ranges.paths, "read_range", stale)
        with pytest.raises(UserError, match=r"train-000\.tar: Stale file handle") as caught:
            everything(source)
        assert caught.value.code == RESUMABLE
    (shards / "train-001.tar").unlink()
    with pytest.raises(UserError, match=r"train-001\.tar: No such file"):
        everything(source)


def test_a_corrupt_member_is_named_or_skipped(shards):
    write_tar(shards / "train-002.tar", {"e.cls": b"0", "e.png": png(7)[:60]})
    index(shards)
    source = data.open_split(tar_block(shards), "train")
    error = refused(lambda: everything(source))
    assert f"cannot read {shards / 'train-002.tar'} (e.png): " in error
    skipping = data.open_split(tar_block(shards, on_corrupt="skip"), "train")
    assert everything(skipping)["mask"].tolist() == [True] * 5 + [False]


def test_the_command(shards, capsys):
    assert cli.main(["data", "index", str(shards)]) == 0
    assert capsys.readouterr().out == f"{shards}: train 5, val 1\n"
    assert cli.main(["data", "index", str(shards / "none")]) == 1
    assert "has no shards of split 'train'; expected train*.tar" in capsys.readouterr().err
