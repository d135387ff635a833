"""LoRA's parameters apart from the model's: taken out, put back, added to its matrices.

Hu et al. 2021, https://arxiv.org/abs/2106.09685. The adapters themselves stand in
`layers.Linear`; here are the trees that hold them.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from relax.model.config import LORA_TARGETS, LlamaConfig
from relax.model.llama import make_llama
from relax.model.parameters import STACKED, Params

# What a checkpoint says of adapters that was saved before there were any.
NO_LORA = {
    "lora_rank": 0,
    "lora_alpha": 16.0,
    "lora_dropout": 0.0,
    "lora_targets": LORA_TARGETS,
}
_PREFIX = "lora_"


def split_trainable(params: Params) -> tuple[Params, Params]:
    """Returns what is trained and what is frozen.

    The adapters and all else; or all and nothing, where there are no adapters. `join`
    puts the two together again.
    """
    trained = _only(params, adapters=True)
    return (trained, _only(params, adapters=False)) if trained else (params, {})


def join(trainable: Params, frozen: Params) -> Params:
    """Returns the parameters that `split_trainable` took apart."""
    modules = sorted(trainable.keys() | frozen.keys())
    return {m: {**frozen.get(m, {}), **trainable.get(m, {})} for m in modules}


def base_of(config: LlamaConfig, params: Params) -> tuple[LlamaConfig, Params]:
    """Returns the model that the adapters adapt, without them."""
    return replace(config, lora_rank=0), _only(params, adapters=False)


def merge(config: LlamaConfig, params: Params) -> tuple[LlamaConfig, Params]:
    """Returns the model without adapters that computes the same.

    alpha/r · A·B is added to each matrix in float32.
    """
    if not config.lora_rank:
        return config, params
    scale, merged = config.lora_alpha / config.lora_rank, {}
    for module, leaves in params.items():
        kept = {n: leaf for n, leaf in leaves.items() if not n.startswith(_PREFIX)}
        if len(kept) < len(leaves):
            layers = leaves["weight"].shape[:1] if module.startswith(STACKED) else ()
            a = leaves["lora_a"].reshape(*layers, -1, config.lora_rank)
            b = leaves["lora_b"].reshape(*layers, config.lora_rank, -1)
            kept["weight"] = _added(leaves["weight"], a, b, scale)
        merged[module] = kept
    return replace(config, lora_rank=0), merged


def with_lora(config: LlamaConfig, params: Params, key: Array) -> Params:
    """Returns the parameters with new adapters wherever `config` has one more.

    They are drawn with `key` as at initialisation: the model computes what it did. On
    several devices the caller lays them out.
    """
    tokens = jnp.zeros((1, 2), jnp.int32)

    @jax.jit
    def fresh(key):
        # What isn't returned isn't computed: the matrices are never drawn.
        return _only(make_llama(config).init(key, tokens), adapters=True)

    return join(params, fresh(key)) if config.lora_rank else params


def _added(weight: Array, a: Array, b: Array, scale: float) -> Array:
    """Returns the weight plus scale · A·B, summed in float32, in its own dtype."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product = jnp.matmul(a, b, precision="highest").reshape(weight.shape)
    return (weight.astype(jnp.float32) + scale * product).astype(weight.dtype)


def _only(params: Params, *, adapters: bool) -> Params:
    chosen = {
        module: {
            name: leaf
            for name, leaf in leaves.items()
            if name.startswith(_PREFIX) == adapters
        }
        for module, leaves in params.items()
    }
    return {module: leaves for module, leaves in chosen.items() if leaves}
