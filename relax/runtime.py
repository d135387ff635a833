"""Device, memory and compilation settings, applied before JAX initialises."""

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import jax

PLATFORMS = ("cpu", "gpu", "tpu")
PRECISIONS = ("default", "high", "highest")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """What must be known before the first JAX computation; None leaves JAX's own.

    platform: one of PLATFORMS. preallocate, memory_fraction: of the accelerator's
    memory. host_devices: how many devices to simulate on a CPU. xla_flags: added to
    XLA_FLAGS. matmul_precision: of float32 products on accelerators. cache_dir: of
    compiled programs, "" turns it off. keep_freed_memory: the process keeps host
    memory that it freed for its next use (glibc alone), which a step on a CPU needs
    again at once: giving it back and faulting it in anew cost a third of the step.
    """

    platform: str | None
    preallocate: bool | None
    memory_fraction: float | None
    host_devices: int | None
    xla_flags: str | None
    matmul_precision: str | None
    cache_dir: str | None
    keep_freed_memory: bool

    def __post_init__(self):
        for name, value, choices in (
            ("platform", self.platform, PLATFORMS),
            ("matmul_precision", self.matmul_precision, PRECISIONS),
        ):
            if value is not None and value not in choices:
                raise ValueError(
                    f"runtime.{name}={value!r} is unknown; choose one of "
                    f"{', '.join(choices)}, or null"
                )
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise ValueError(
                f"runtime.memory_fraction={self.memory_fraction} must lie in (0, 1]"
            )
        if self.host_devices is not None and self.host_devices < 1:
            raise ValueError(f"runtime.host_devices={self.host_devices} must be >= 1")


_applied: list[RuntimeConfig] = []


def configure(config: RuntimeConfig) -> None:
    """Applies `config` to this process.

    Raises ValueError where an earlier job of the same process (a sweep) applied another
    one, since JAX initialises once, and where the platform asked for is not there.
    """
    if _applied:
        if _applied[0] != config:
            raise ValueError(
                f"runtime={config} differs from {_applied[0]}, with which this process "
                "initialised JAX; run the jobs of this sweep one by one"
            )
        return
    _applied.append(config)
    flags = [os.environ.get("XLA_FLAGS", ""), config.xla_flags or ""]
    if config.host_devices is not None:
        flags.append(f"--xla_force_host_platform_device_count={config.host_devices}")
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags if flag)
    if config.preallocate is not None:
        value = str(config.preallocate).lower()
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = value
    if config.memory_fraction is not None:
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(config.memory_fraction)
    if config.platform is not None:
        name = {"gpu": "cuda"}.get(config.platform, config.platform)
        jax.config.update("jax_platforms", name)
    if config.matmul_precision is not None:
        jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    _configure_cache(config.cache_dir)
    if config.keep_freed_memory:
        _keep_freed_memory()
    if config.platform is not None:
        _require_platform(config.platform)


def _configure_cache(cache_dir: str | None) -> None:
    """Turns on the persistent compilation cache; None is the user's cache folder."""
    if cache_dir == "":
        return
    import platformdirs

    folder = cache_dir or Path(platformdirs.user_cache_dir("relax")) / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _keep_freed_memory() -> None:
    """Tells glibc's allocator to map nothing and to give nothing back."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another libc, musl say
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**28)


def _require_platform(platform: str) -> None:
    """Initialises JAX; raises ValueError where it finds no such device."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an empty assertion: no plug-in
        reason = str(error) or f"no plug-in for {platform} is installed"
        raise ValueError(
            f"runtime.platform={platform} can't be used: {reason}; null takes what "
            "there is"
        ) from error
