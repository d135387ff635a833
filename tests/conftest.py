"""What every test shares: real data where present, a small model, shape checks."""

import importlib
import inspect
import os
import pkgutil
import sys
from pathlib import Path

import haiku as hk
import jax
import pytest
from jaxtyping import install_import_hook
from typeguard import check_type

# Turns a JAX transform inside a Haiku one, which leaks tracers, into a readable error.
hk.config.set(check_jax_usage=True)


def check_annotations(function):
    """A type checker for jaxtyping's hook: checks what a function takes and returns.

    `typeguard.typechecked` itself rewrites source, and reads "B T" as Python there.
    """
    signature = inspect.signature(function)

    def checked(*args, **kwargs):
        values = dict(signature.bind(*args, **kwargs).arguments)
        values["return"] = function(*args, **kwargs)
        for name, annotation in function.__annotations__.items():
            if name in values:
                check_type(values[name], annotation)
        return values["return"]

    return checked


# The hook wants an expression, and no test module can be imported by name. It comes
# before the first import of relax, which imports most of relax.ops.
with install_import_hook("relax.ops", f"sys.modules[{__name__!r}].check_annotations"):
    assert "relax.ops" not in sys.modules
    for module in pkgutil.iter_modules(importlib.import_module("relax.ops").__path__):
        importlib.import_module(f"relax.ops.{module.name}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Returns a scheduler that leaves what shares fixtures to one worker.

    A file's tests stay together, and all those of generation, whose fixtures are of
    the session. Files come by name, so that the longest are not the last.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return "generation" if "/generation/" in file else file

    if config.option.dist != "load":  # what -n alone asks for
        return None
    config.option.loadscopereorder = False
    return ByFile(config, log)


# Their programs take longer to compile than to run. The others' run as users' do.
# What they look at are files, texts and errors; no figure and no bit of a promise.
_COMPILED_QUICKLY = (
    *("tasks/", "experiments/test_bench"),
    *("test_generation_interrupts.py", "test_language_model.py", "test_readme.py"),
)


@pytest.fixture(scope="module", autouse=True)
def compiler_effort(request):
    """Most optimisations are off in the modules of _COMPILED_QUICKLY."""
    path = request.path.relative_to(Path(__file__).parent).as_posix()
    quickly = path.startswith(_COMPILED_QUICKLY)
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _folder(variable: str) -> Path:
    """Returns the folder named by an environment variable, or skips the test."""
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    if not Path(value).is_dir():
        pytest.skip(f"{variable}={value} is not a folder")
    return Path(value)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real corpora, tokenizers and checkpoints ($RELAX_DATA_DIR)."""
    return _folder("RELAX_DATA_DIR")


@pytest.fixture(scope="session")
def oracle_dir() -> Path:
    """Numbers that released peers gave ($RELAX_ORACLE_DIR)."""
    return _folder("RELAX_ORACLE_DIR")


@pytest.fixture(scope="session")
def make_config():
    """A callable: the LlamaConfig of a tiny model, with the fields given replaced."""
    from relax.model.config import LlamaConfig

    return lambda **fields: LlamaConfig(**{**_TINY, **fields})


# No two of D, F, L, N, K, H and V are the same number.
_TINY = {
    "vocab_size": 67,
    "hidden_size": 28,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 101,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "qkv_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "sliding_window": None,
    "max_window_layers": 0,
    "rope_theta": 1e4,
    "rope_type": "default",
    "rope_factor": 1.0,
    "rope_original_max_position_embeddings": None,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_beta_fast": 32.0,
    "rope_beta_slow": 1.0,
    "rope_attention_factor": None,
    "rope_truncate": True,
    "dropout": 0.0,
    "initializer_range": 0.02,
    "param_dtype": "float32",
    "compute_dtype": "float32",
    "scan_layers": True,
    "remat": "none",
    "attention": "auto",
    "lora_rank": 0,
    "lora_alpha": 16.0,
    "lora_dropout": 0.0,
    "lora_targets": (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ),
}
