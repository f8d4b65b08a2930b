"""Export a run to examples/cifar10.safetensors, and write what the run predicts.

    PYTHONPATH=. python tests/golden/make_example.py runs/vit_cifar_speedrun

The golden values are of the run's own parameters in float32; the file has them in float16.
"""

import pathlib
import sys

import numpy as np

import vit_scale
from vit_scale.inference.export import export

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE = ROOT / "examples" / "cifar10.safetensors"
IMAGES = "The images are those of CIFAR-10, recompressed as JPEG at quality 75."
GOLDEN = pathlib.Path(__file__).with_name("example.npz")


def images() -> np.ndarray:
    """Return 4 pictures of coloured stripes, (4, 32, 32, 3) uint8."""
    waves = np.random.RandomState(0).uniform(0.05, 0.6, (4, 2, 3))
    rows, columns = np.mgrid[:32, :32]
    angles = np.einsum("nac,ahw->nhwc", waves, np.stack([rows, columns]))
    return np.uint8(127.5 * (1 + np.sin(angles)))


if __name__ == "__main__":
    run = pathlib.Path(sys.argv[1])
    model = vit_scale.load(run)
    np.savez(GOLDEN, probabilities=model(images()), classes=np.array(model.classes))
    lines = export(run, "safetensors", FILE, licence="apache-2.0", dtype="float16", card=True)
    card = FILE.with_suffix(".md")
    card.write_text(card.read_text().replace("## Data\n", f"## Data\n\n{IMAGES}\n", 1))
    print("\n".join(lines))
