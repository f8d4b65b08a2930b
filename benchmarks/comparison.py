"""ViT, hybrid, CNN and ResNet on CIFAR-10 under one loop: accuracy, loss, parameters, images/s.

    python -m benchmarks.comparison --data-note "CIFAR-10 (JPEG q75)"

The tutorial's 200 epochs for each, of the same images in the same order with the same augmentation;
each is optimised as its own literature does. bfloat16, but for the toy.
"""

import sys

from benchmarks.measurement import Measurement, Session, main

CONTENDERS = {
    "ViT": "vit_tutorial_cifar",
    "hybrid": "vit_hybrid_cifar",
    "CNN": "cnn_cifar",
    "ResNet-18": "resnet_cifar",
}
MEASUREMENT = Measurement(
    name="comparison",
    title="ViT, hybrid, CNN and ResNet-18 on CIFAR-10, 200 epochs each under the same loop",
    data={"cifar-10-batches-bin": "CIFAR-10"},
    configs=tuple(CONTENDERS.values()),
    files=("comparison.py",),
)
# A ResNet of one block a stage, and a stem of two convolutions, compile in seconds.
TOYS = {"hybrid": ["model.variant=C+Ti/4"], "ResNet-18": ["model.depth=10"]}
REFERENCE = {
    "slides' ViT": 0.77,
    "slides' CNN": 0.89,
    "source": "test accuracies in the slides 'Vision Transformers': 180 epochs, 3.2M and 5.9M",
}


def measure(session: Session) -> dict:
    precision = "model.dtype=" + ("float32" if session.toy else "bfloat16")
    results = {}
    for name, config in CONTENDERS.items():
        fields = [f"data.path={session.data}", precision]
        if session.toy:
            fields += ["eval.final=test[:1000]", "eval.split=", *TOYS.get(name, ())]
        results[name] = session.train(config, config, *fields)
    return {"table": [row(name, result) for name, result in results.items()], **results} | {
        "reference": REFERENCE
    }


def row(name: str, result: dict) -> dict:
    """One line of the table; accuracy and loss are of the last step."""
    measured = result["eval"]
    return {
        "model": name,
        "parameters": result["parameters"],
        "accuracy": measured["accuracy"],
        "loss": measured["loss"],
        "n": measured["n"],
        "images_per_second": result["images_per_second"],
        "mfu": result["mfu"],
    }


if __name__ == "__main__":
    sys.exit(main(MEASUREMENT, measure))
