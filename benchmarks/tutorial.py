"""The tutorial's ViT on CIFAR-10 for its 200 epochs: test accuracy beside the tutorial's 78.4 %.

python -m benchmarks.tutorial --data-note "CIFAR-10 (JPEG q75)"
"""

import sys

from benchmarks.measurement import Measurement, Session, main

MEASUREMENT = Measurement(
    name="tutorial",
    title="The tutorial's 200 epochs on CIFAR-10: test accuracy beside its 78.4 %",
    data={"cifar-10-batches-bin": "CIFAR-10"},
    configs=("vit_tutorial_cifar",),
    files=("tutorial.py",),
)
REFERENCE = {"test accuracy": 0.784, "epochs": 200, "source": "UvA deep-learning tutorial 15, JAX"}


def measure(session: Session) -> dict:
    toy = ("eval.final=test[:1000]",) if session.toy else ()
    trained = session.train("vit_tutorial_cifar", "train", f"data.path={session.data}", *toy)
    return {"vit_scale": trained, "reference": REFERENCE}


if __name__ == "__main__":
    sys.exit(main(MEASUREMENT, measure))
