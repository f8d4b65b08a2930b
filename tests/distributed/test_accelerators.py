"""accelerators: peaks by device name, and MFU."""

import pytest

from vit_scale.distributed.accelerators import mfu, peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("TPU7x", 1153.5e12),  # 2307 a chip, two devices a chip
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA RTX A1000", None),
        ("TPU v4 lite", None),
        ("NVIDIA GeForce RTX 3090", None),
        ("cpu", None),
    ],
)
def test_peak_by_device_kind(kind, peak):
    assert peak_flops(kind) == peak


def test_mfu_of_a_published_speed():
    """NVIDIA's 1,459 images/s of ViT-B/16 on one H100 are 16 %."""
    flops = 6 * 17.57e9  # forward and backward
    assert mfu(1459, flops, 1, "NVIDIA H100 80GB HBM3") == pytest.approx(0.1555, abs=5e-4)
    assert mfu(4 * 1459, flops, 4, "NVIDIA H100 80GB HBM3") == pytest.approx(0.1555, abs=5e-4)
    assert mfu(1459, flops, 1, "cpu") is None
