"""Writes two_towers/: SigLIP 2 as big_vision saves it, tiny, and its embeddings of some images.

Run with numpy, jax, flax and what big_vision imports, and the path of a clone of it:
    python tests/golden/make_two_towers.py CLONE
Its models/proj/image_text/two_towers.py has the parameters and computes the embeddings: with
models/vit.py, its blocks scanned or not, and with naflex_vit.py. Nothing here imports vit_scale.
"""

import pathlib
import shutil
import sys

import flax
import jax
import numpy as np

FOLDER = pathlib.Path(__file__).with_name("two_towers")
PATCH, GRID = 4, 3
IMAGE = {"width": 24, "depth": 2, "num_heads": 3, "mlp_dim": 20, "pool_type": "map"}
TEXT = {"width": 12, "depth": 1, "num_heads": 3, "mlp_dim": 8, "vocab_size": 9}
PATCHES = {"patch_size": (PATCH, PATCH), "posemb": "learn"}
NAFLEX = {"image_model": "proj.image_text.naflex_vit"}
RANDOM = np.random.RandomState(0)
EXPECTED: dict[str, np.ndarray] = {}


def naflex_input(images: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return patches, row by row, whether each is one, and their rows and columns."""
    b, (rows, columns) = len(images), np.mgrid[:GRID, :GRID].reshape(2, 1, -1)
    patches = images.reshape(b, GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    shape = (b, GRID * GRID)
    ones = np.ones(shape, np.int32)
    return patches.reshape(*shape, -1), ones, ones * rows, ones * columns


def write(case: str, image: dict, out_dim=(None, 24), **options) -> None:
    from big_vision.models.proj.image_text import two_towers

    model = two_towers.Model(
        image={**IMAGE, **image}, text=TEXT, out_dim=out_dim, bias_init=-10.0, **options
    )
    images = RANDOM.uniform(-1, 1, (2, GRID * PATCH, GRID * PATCH, 3)).astype(np.float32)
    pixels = naflex_input(images) if options else images
    tokens = np.zeros((2, 4), np.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), pixels, tokens))["params"]
    arrays = {
        key: (float(key.endswith("scale")) + 0.3 * RANDOM.standard_normal(leaf.shape)).astype("f")
        for key, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items()
    }
    params = {"params": flax.traverse_util.unflatten_dict(arrays, sep="/")}
    normalised, _, out = model.apply(params, pixels)
    EXPECTED[f"{case}/images"] = images
    EXPECTED[f"{case}/values"] = np.asarray(normalised * out["img/norm"])
    np.savez_compressed(FOLDER / f"{case}.npz", **{f"params/{key}": x for key, x in arrays.items()})


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    write("siglip2", PATCHES)
    write("siglip2-scanned", PATCHES | {"scan": True})
    write("siglip2-naflex", {"nposemb": GRID}, **NAFLEX)
    write("projected", PATCHES, out_dim=(6, 6))
    np.savez_compressed(FOLDER / "expected.npz", **EXPECTED)
    for file in sorted(FOLDER.glob("*.npz")):
        print(f"{file.name}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
