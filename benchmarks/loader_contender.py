"""One loader that reads a folder of photos, for loader.py, in turns.

    python -m benchmarks.loader_contender FOLDER PROGRAM WORKERS [bilinear|bicubic]

All deliver batches of 64 random resized crops of 224 px in uint8, mirrored or to be mirrored in the
step. PROGRAM is one of `PROGRAMS`; WORKERS is its number of processes, or threads.
"""

import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.contender import Server, serve
from benchmarks.speed_contender import describe
from vit_scale import config

BATCH, SIZE = 64, 224
TURN_SECONDS = 2.0
AHEAD = 8  # batches before the first that counts, more than any of them reads ahead with a worker


def vit_scale(
    folder: str, workers: int, resample: str, name: str = "folder", threads: int = 1, **fields: Any
) -> Iterator[int]:
    """This project's loader; `fields` are the data block's."""
    from vit_scale.augment.random_crop import random_crop
    from vit_scale.data import open_split, train_batches

    cfg = config.base()
    cfg.data.update({"name": name, "path": folder, "resolution": SIZE, "batch": BATCH})
    cfg.data.update({"workers": workers, "threads": threads, **fields})
    cfg.augment.update({"crop": "torchvision", "resample": resample})
    source = open_split(cfg.data, "train", crop=random_crop(cfg.augment))
    for _, batch in train_batches(source, cfg.data, 0, 0):
        yield len(batch["mask"])


def vit_scale_threads(
    folder: str, workers: int, resample: str, name: str = "folder"
) -> Iterator[int]:
    """The same by threads of the training process."""
    return vit_scale(folder, 0, resample, name, threads=workers)


def timm(folder: str, workers: int, resample: str) -> Iterator[int]:
    """timm's loader of its own image folder, before it normalises: uint8 from its workers."""
    import torch
    from timm.data import create_dataset, create_loader

    torch.set_num_threads(1)
    loader = create_loader(
        create_dataset("", f"{folder}/train"),
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=True,
        interpolation=resample,
        num_workers=workers,
        device=torch.device("cpu"),
    ).loader
    while True:
        for images, _ in loader:
            yield len(images)


def big_vision(folder: str, workers: int, resample: str) -> Iterator[int]:
    """big_vision's preprocessing in tf.data with so many threads; needs TensorFlow and a clone."""
    import tensorflow as tf
    from big_vision.pp import builder, ops_image  # noqa: F401 (registers the operations)

    crop = f'decode_jpeg_and_inception_crop(size={SIZE}, method="{resample}", antialias=True)'
    preprocess = builder.get_preprocess_fn(f"{crop}|flip_lr")
    files = sorted(map(str, pathlib.Path(folder, "train").rglob("*.jpg")))

    def read(file):
        pixels = preprocess({"image": tf.io.read_file(file)})["image"]
        return tf.cast(tf.clip_by_value(pixels, 0, 255), tf.uint8)

    data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    options = tf.data.Options()
    options.threading.private_threadpool_size = workers
    options.threading.max_intra_op_parallelism = 1
    data = data.map(read, num_parallel_calls=workers).batch(BATCH).with_options(options)
    for images in data.prefetch(1):
        yield images.shape[0]


PROGRAMS: dict[str, tuple[Callable[[str, int, str], Iterator[int]], Sequence[str]]] = {
    "vit_scale": (vit_scale, ("pillow", "simplejpeg", "cykooz-resizer")),
    "vit_scale_threads": (vit_scale_threads, ("pillow", "simplejpeg", "cykooz-resizer")),
    "vit_scale_pillow": (functools.partial(vit_scale, decoder="pillow"), ("pillow",)),
    "vit_scale_packed": (functools.partial(vit_scale, name="array_record"), ("array-record",)),
    "vit_scale_packed_threads": (
        functools.partial(vit_scale_threads, name="array_record"),
        ("array-record",),
    ),
    "timm": (timm, ("timm", "torch", "torchvision", "pillow")),
    "big_vision": (big_vision, ("tensorflow-cpu",)),
}


def turn(batches: Iterator[int]) -> dict[str, float]:
    """Read for a while, after the batches that were read ahead while others had their turn."""
    for _ in range(AHEAD):
        next(batches)
    images, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < TURN_SECONDS:
        images += next(batches)
    return {"images_per_second": images / passed}


def start(folder: str, program: str, workers: int, resample: str) -> Server:
    load, packages = PROGRAMS[program]
    batches = load(folder, workers, resample)
    next(batches)
    return Server(describe("cpu", 0, packages), lambda _: turn(batches))


def main(folder: str, program: str, workers: str, resample: str = "bicubic") -> None:
    serve(functools.partial(start, folder, program, int(workers), resample), sys.stdin)


if __name__ == "__main__":
    main(*sys.argv[1:])
