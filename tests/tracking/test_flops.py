"""Device peaks by the names that JAX reports, and the utilisation they give."""

import pytest

from relax.tracking.flops import mfu, peak_flops


@pytest.mark.parametrize(
    ("device_kind", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100-PCIE-40GB", "tensorfloat32", 156e12),
        ("NVIDIA A100 80GB PCIe", "float32", 19.5e12),
        ("NVIDIA A10", "bfloat16", 125e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 PCIe", "float16", 756e12),
        ("NVIDIA H200", "tensorfloat32", 494.7e12),
        ("NVIDIA H200 NVL", "bfloat16", 835.5e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2e12),
        ("TPU v4", "bfloat16", 275e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5", "bfloat16", 459e12),
        ("TPU v5p", "bfloat16", 459e12),
        ("TPU v6 lite", "bfloat16", 918e12),
    ],
)
def test_known_devices_have_their_published_dense_peak(device_kind, dtype, peak):
    assert peak_flops(device_kind, dtype) == pytest.approx(peak)


@pytest.mark.parametrize(
    ("device_kind", "dtype"),
    [
        ("cpu", "float32"),
        ("TPU v4", "float32"),
        ("TPU v4 lite", "bfloat16"),
        ("NVIDIA A10G", "bfloat16"),
        ("NVIDIA L40S", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "int8"),
    ],
)
def test_no_peak_is_guessed(device_kind, dtype):
    assert peak_flops(device_kind, dtype) is None


def test_mfu_is_the_share_of_all_devices_peak():
    # 700 tokens/s of 6e9 FLOPs are 4.2e12 FLOP/s; three devices could do 21e12.
    assert mfu(700.0, 6e9, num_devices=3, peak=7e12) == pytest.approx(0.2)


def test_no_peak_no_mfu():
    assert mfu(700.0, 6e9, num_devices=3, peak=None) is None
