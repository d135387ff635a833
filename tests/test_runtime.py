"""Runtime settings act before JAX initialises, and importing ReLax acts on nothing."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from relax.runtime import RuntimeConfig

REPOSITORY = Path(__file__).parents[1]
UNSET = RuntimeConfig(
    platform=None,
    preallocate=None,
    memory_fraction=None,
    host_devices=None,
    xla_flags=None,
    matmul_precision=None,
    cache_dir="",
    keep_freed_memory=False,
)


def run_python(script: str, **environment: str) -> dict:
    """Returns the JSON that a script prints in a fresh interpreter without settings."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**bare, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def configured(config: RuntimeConfig, **environment: str) -> dict:
    """Returns what a fresh process is set to once `config` was applied."""
    return run_python(
        f"""
import json, os
import jax
from jax._src import xla_bridge
from relax.runtime import RuntimeConfig, configure

configure({config!r})
initialised = xla_bridge.backends_are_initialized()
print(json.dumps({{
    "initialised": initialised,
    "devices": jax.device_count(),
    "environment": dict(os.environ),
    "precision": jax.config.jax_default_matmul_precision,
    "cache": jax.config.jax_compilation_cache_dir,
}}))
""",
        **environment,
    )


def test_settings_reach_jax(tmp_path):
    config = replace(
        UNSET,
        preallocate=False,
        memory_fraction=0.3,
        host_devices=3,
        xla_flags="--xla_cpu_enable_fast_math=false",
        matmul_precision="highest",
        cache_dir=str(tmp_path),
        keep_freed_memory=True,
    )
    state = configured(config, XLA_FLAGS="--xla_llvm_disable_expensive_passes=false")
    assert not state["initialised"]
    assert state["devices"] == 3
    assert state["environment"]["XLA_FLAGS"].split() == [
        "--xla_llvm_disable_expensive_passes=false",
        "--xla_cpu_enable_fast_math=false",
        "--xla_force_host_platform_device_count=3",
    ]
    assert state["environment"]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert state["environment"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.3"
    assert state["precision"] == "highest"
    assert state["cache"] == str(tmp_path)


def test_null_leaves_jax_s_own_settings():
    state = configured(UNSET)
    assert not state["initialised"]
    assert state["precision"] is None
    assert state["cache"] is None
    assert not state["environment"]["XLA_FLAGS"]
    assert not [name for name in state["environment"] if name.startswith("XLA_PYTHON")]


def test_compiled_programs_go_to_the_user_s_cache_folder_by_default(tmp_path):
    config = replace(UNSET, cache_dir=None)
    state = configured(config, XDG_CACHE_HOME=str(tmp_path))
    assert Path(state["cache"]).name == "xla"
    assert Path(state["cache"]).parent.name == "relax"
    if sys.platform == "linux":
        assert state["cache"] == str(tmp_path / "relax" / "xla")


def test_a_process_is_configured_once_and_for_a_platform_that_is_there():
    state = run_python(
        f"""
import json
from dataclasses import replace
from relax.runtime import RuntimeConfig, configure

def message(config):
    try:
        configure(config)
    except ValueError as error:
        return str(error)

first = {replace(UNSET, platform="tpu")!r}
configs = [first, first, replace(first, platform="cpu")]
print(json.dumps([message(config) for config in configs]))
"""
    )
    assert state[0].startswith("runtime.platform=tpu can't be used: ")
    assert state[0].endswith("null takes what there is")
    assert state[1] is None
    assert "platform='cpu'" in state[2]
    assert "platform='tpu'" in state[2]
    assert "run the jobs of this sweep one by one" in state[2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("platform", "cuda"),
        ("matmul_precision", "bf16"),
        ("memory_fraction", 0.0),
        ("memory_fraction", 1.1),
        ("host_devices", 0),
    ],
)
def test_a_setting_that_cannot_be_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^runtime\.{field}={value!r}"):
        replace(UNSET, **{field: value})


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_platforms_are_known(platform):
    assert replace(UNSET, platform=platform).platform == platform


def test_importing_relax_and_the_programs_runs_nothing():
    state = run_python(
        """
import json, os, pkgutil, signal, sys

def process():
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    return dict(os.environ), handlers

before = process()
import relax
import train, infer
for module in pkgutil.walk_packages(relax.__path__, "relax."):
    __import__(module.name)
from jax._src import xla_bridge

heavy = ("wandb", "matplotlib", "torch", "orbax", "tensorstore", "grain")
print(json.dumps({
    "initialised": xla_bridge.backends_are_initialized(),
    "unchanged": before == process(),
    "heavy": [name for name in heavy if name in sys.modules],
}))
"""
    )
    assert state == {"initialised": False, "unchanged": True, "heavy": []}
