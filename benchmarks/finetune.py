"""What pretraining is worth: Tiny-ImageNet-200 at 64 px, then CIFAR-10 at 96 and 128 px.

    python -m benchmarks.finetune --data-note "CIFAR-10 (JPEG q75)"

A ViT-S/8. The fine-tunings with and without pretraining differ in their initialisation alone.
"""

import os
import sys

from benchmarks.measurement import Measurement, Session, main

MEASUREMENT = Measurement(
    name="finetune",
    title="ViT-S/8: Tiny-ImageNet-200 at 64 px, then CIFAR-10 at 96 and 128 px, against scratch",
    data={"cifar-10-batches-bin": "CIFAR-10", "tiny-imagenet-200": "Tiny-ImageNet-200"},
    configs=("tiny_imagenet:S", "cifar_from_tiny_imagenet:S"),
    files=("finetune.py",),
)
RESOLUTIONS = (96, 128)


def measure(session: Session) -> dict:
    precision = "model.dtype=" + ("float32" if session.toy else "bfloat16")
    resolutions = RESOLUTIONS[:1] if session.toy else RESOLUTIONS
    pretraining = session.train(
        "tiny_imagenet:S",
        "pretrain",
        f"data.path={session.data / 'tiny-imagenet-200'}",
        f"data.workers={os.cpu_count()}",
        precision,
    )
    figures: dict = {"pretraining": pretraining, "fine-tuning": {}}
    for resolution in resolutions:
        results = {}
        for start, source in (("pretrained", session.workdir / "pretrain"), ("scratch", "")):
            results[start] = session.train(
                "cifar_from_tiny_imagenet:S",
                f"{start}-{resolution}",
                f"data.path={session.data}",
                f"data.resolution={resolution}",
                f"init.source={source}",
                precision,
                *(("eval.final=test[:500]",) if session.toy else ()),
            )
        accuracy = {start: result["eval"]["accuracy"] for start, result in results.items()}
        results["gain"] = accuracy["pretrained"] - accuracy["scratch"]
        figures["fine-tuning"][f"{resolution} px"] = results
    return figures


if __name__ == "__main__":
    sys.exit(main(MEASUREMENT, measure))
