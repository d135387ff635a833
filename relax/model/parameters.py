"""Haiku parameter trees: paths, counts, scanned and unrolled layouts."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from relax.model.config import LlamaConfig
from relax.model.llama import make_llama

Params = dict[str, dict[str, jax.Array]]

NEW_ROWS = ("mean", "zeros", "normal")
_TABLES = ("llama/embed_tokens", "llama/lm_head")
STACKED = "llama/layers/"
_LAYER = re.compile(r"llama/layers_(\d+)/")


def parameter_shapes(config: LlamaConfig) -> Params:
    """Returns the tree of `jax.ShapeDtypeStruct`s without computing anything."""
    return {module: dict(leaves) for module, leaves in _traced_shapes(config).items()}


@functools.cache  # tracing a model takes a tenth of a second, and a start asks often
def _traced_shapes(config: LlamaConfig) -> Params:
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(make_llama(config).init, jax.random.key(0), tokens)


def parameter_count(config: LlamaConfig) -> int:
    """Returns the number of parameters, padded embedding rows left out."""
    total = sum(leaf.size for _, leaf in flat_parameters(parameter_shapes(config)))
    tables = 1 if config.tie_word_embeddings else 2
    padding = config.padded_vocab_size - config.vocab_size
    return total - tables * padding * config.hidden_size


def flat_parameters(params: Mapping) -> Iterator[tuple[str, jax.Array]]:
    """Yields `(module path/parameter name, leaf)` in a fixed order."""
    for module in sorted(params):
        for name in sorted(params[module]):
            yield f"{module}/{name}", params[module][name]


def with_layers(
    config: LlamaConfig, params: Params, scan_layers: bool
) -> tuple[LlamaConfig, Params]:
    """Returns config and parameters in the scanned or the unrolled form.

    What changes is copied one array at a time.
    """
    if config.scan_layers != scan_layers:
        params = stack_layers(params) if scan_layers else unstack_layers(params)
    return dataclasses.replace(config, scan_layers=scan_layers), params


def stack_layers(params: Params) -> Params:
    """Returns the scanned form of unrolled parameters: `[L, ...]` leaves."""
    stacked, layers = {}, {}
    for module, leaves in params.items():
        match = _LAYER.match(module)
        if match is None:
            stacked[module] = leaves
        else:
            path = STACKED + module[match.end() :]
            layers.setdefault(path, {})[int(match[1])] = leaves
    for path, by_layer in layers.items():
        ordered = [by_layer[i] for i in sorted(by_layer)]
        stacked[path] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
    return stacked


def unstack_layers(params: Params) -> Params:
    """Returns the unrolled form of scanned parameters: one module path per layer."""
    unrolled = {}
    for module, leaves in params.items():
        if not module.startswith(STACKED):
            unrolled[module] = leaves
            continue
        rest = module[len(STACKED) :]
        split = {name: jnp.unstack(leaf) for name, leaf in leaves.items()}
        for index in range(len(next(iter(split.values())))):
            layer = {name: parts[index] for name, parts in split.items()}
            unrolled[f"llama/layers_{index}/{rest}"] = layer
    return unrolled


def resize_vocabulary(
    config: LlamaConfig, params: Params, new_ids: range, rows: str, key: jax.Array
) -> tuple[LlamaConfig, Params]:
    """Returns a model whose tables have rows for `new_ids`, which follow the old ids.

    rows: "mean" of the rows before them (of `lm_head` its own), "zeros", or "normal",
    drawn with `key` as at initialisation. Raises ValueError for others.
    """
    if rows not in NEW_ROWS:
        raise ValueError(f"rows={rows!r} is unknown; choose one of {NEW_ROWS}")
    size = max(config.vocab_size, new_ids.stop)
    config = dataclasses.replace(config, vocab_size=size)
    tables = {name: params[name] for name in _TABLES if name in params}
    resized = {
        name: {"weight": _resize(config, leaves["weight"], new_ids, rows, table_key)}
        for (name, leaves), table_key in zip(
            tables.items(), jax.random.split(key, len(tables)), strict=True
        )
    }
    return config, params | resized


def _resize(config, table, new_ids, rows, key):
    """Returns `[padded rows, D]` with the new ids' rows set."""
    padding = config.padded_vocab_size - len(table)
    known = table[: new_ids.start].astype(jnp.float32)
    shape = (len(new_ids), table.shape[1])
    made = {
        "mean": lambda: jnp.broadcast_to(jnp.mean(known, axis=0), shape),
        "zeros": lambda: jnp.zeros(shape),
        "normal": lambda: config.initializer_range * jax.random.normal(key, shape),
    }[rows]()
    table = jnp.pad(table, ((0, padding), (0, 0)))
    return table.at[jnp.asarray(new_ids)].set(made.astype(table.dtype))


def training_flops_per_token(config: LlamaConfig, context: int) -> float:
    """Returns FLOPs of forward and backward per token, attention not halved.

    6 per parameter of a matrix product and 12·L·N·H·T for attention (Chowdhery et al.
    2022, PaLM, https://arxiv.org/abs/2204.02311, appendix B). The embedding counts as
    the output layer alone. Where adapters are trained, the parameters that they leave
    frozen count 4: they have no gradient.
    """
    weights = parameter_count(config)
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size
    heads = config.num_attention_heads * config.head_width
    attention = 12.0 * config.num_hidden_layers * heads * context
    frozen = 0
    if config.lora_rank:
        base = dataclasses.replace(config, lora_rank=0)
        adapters = parameter_count(config) - parameter_count(base)
        frozen = weights - adapters
    return 6.0 * weights - 2.0 * frozen + attention
