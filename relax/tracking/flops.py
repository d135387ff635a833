"""What a device could do at best, and which share of it a run uses."""

import re

# Dense peaks in TFLOP/s from the vendors' datasheets; where those print only the
# figure with 2:4 sparsity, half of it. NVIDIA: A100, H100, H200, L4 and A10 datasheets,
# the Hopper and Ada architecture whitepapers. Google: Cloud TPU system architecture,
# bfloat16 per chip. The first pattern that fits the device kind is used.
_DTYPES = ("bfloat16", "tensorfloat32", "float32")
_TERAFLOPS: tuple[tuple[str, tuple[float | None, ...]], ...] = (
    (r"\bMIG\b", (None, None, None)),  # a slice of a chip has no peak of its own
    (r"\bA100\b", (312.0, 156.0, 19.5)),
    (r"\bH100 PCIe\b", (756.0, 378.0, 51.0)),
    (r"\bH[12]00 NVL\b", (835.5, 417.5, 60.0)),
    (r"\bH[12]00\b", (989.4, 494.7, 66.9)),
    (r"\bL4\b", (121.0, 60.0, 30.3)),
    (r"\bA10\b", (125.0, 62.5, 31.2)),
    (r"\bRTX 4090$", (165.2, 82.6, 82.6)),  # float32 accumulation; not D or Laptop
    (r"\bTPU v4$", (275.0, None, None)),
    (r"\bTPU (v5 lite|v5e)$", (197.0, None, None)),
    (r"\bTPU (v5|v5p)$", (459.0, None, None)),  # JAX calls a v5p "TPU v5"
    (r"\bTPU (v6 lite|v6e)$", (918.0, None, None)),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns a device's dense peak in FLOP/s, None where none is published.

    `device_kind` is what `jax.Device.device_kind` says. `dtype` is that of the matrix
    products: bfloat16 (float16 has the same peak), tensorfloat32 or float32. JAX at
    its default precision computes float32 products as tensorfloat32 on NVIDIA GPUs
    since Ampere and as bfloat16 on TPUs: ask for the type that really runs.
    """
    dtype = "bfloat16" if dtype == "float16" else dtype
    for pattern, peaks in _TERAFLOPS:
        if re.search(pattern, device_kind, re.IGNORECASE):
            teraflops = dict(zip(_DTYPES, peaks, strict=True)).get(dtype)
            return None if teraflops is None else teraflops * 1e12
    return None


def mfu(
    tokens_per_second: float,
    flops_per_token: float,
    num_devices: int,
    peak: float | None,
) -> float | None:
    """Returns the model FLOPs utilisation in [0, 1], None without a known peak.

    `peak` is per device. Chowdhery et al. 2022, PaLM, appendix B.
    """
    if peak is None:
        return None
    return tokens_per_second * flops_per_token / (num_devices * peak)
