"""Tokens per second and cache bytes of grouped-query attention, beside PyTorch's.

PyTorch's scaled_dot_product_attention runs twice: with enable_gqa, and on keys and
values repeated to as many heads as the queries have. Each side keeps its own layout:
ReLax `[B, T, N, H]`; PyTorch the same for training, transposed as its Llamas do, and a
cache of `[B, K, S, H]`. Decoding writes the new token into the cache and attends to all
of it; ReLax runs its calls in a compiled loop and PyTorch one by one, as in generation.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import MEBIBYTE, load, speed_ratio, take_turns, use_cores
from torch.nn.functional import scaled_dot_product_attention

from relax.config import to_dataclass
from relax.model.cache import read, write
from relax.ops.attention import attention
from relax.ops.cached_attention import BLOCKS, LARGE_BLOCK, cached_attention
from relax.ops.masks import AttentionMask
from relax.runtime import RuntimeConfig, configure

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


class Arrays(NamedTuple):
    """Queries and what goes with them: `[B, T, N, H]` and `[B, S, K, H]`."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    d_out: np.ndarray


Side = Callable[[int], np.ndarray]  # runs so many calls; returns the last output


def main(overrides: list[str]) -> None:
    """Runs the benchmark of attention.yaml and prints its figures."""
    config = load("attention", overrides)
    use_cores(config["threads"])
    configure(to_dataclass(RuntimeConfig, config["runtime"], "runtime"))
    torch.set_num_threads(config["threads"])
    print(
        f"{config['num_heads']} heads of {config['head_dim']}, batch "
        f"{config['batch_size']}, {config['dtype']}, {config['threads']} threads"
    )
    for kv_heads in config["kv_heads"]:
        train(config, kv_heads)
    for kv_heads in config["kv_heads"]:
        decode(config, kv_heads)


def train(config: Mapping[str, Any], kv_heads: int) -> None:
    """Compares forward and backward passes over whole rows."""
    length = config["context"]
    arrays = make_arrays(config, kv_heads, length, length)
    sides = {
        name: relax_train(arrays, name, config["dtype"])
        for name in config["implementations"]
    }
    for name, repeat in (("torch enable_gqa", False), ("torch repeated", True)):
        sides[name] = torch_train(arrays, repeat, config["dtype"])
    title = f"forward and backward, {kv_heads} kv heads, {length} tokens"
    compare(config, title, sides, config["train_calls"], length)


def decode(config: Mapping[str, Any], kv_heads: int) -> None:
    """Compares single new tokens against a full cache."""
    arrays = make_arrays(config, kv_heads, 1, config["cache_slots"])
    sides = {"cached": relax_decode(arrays, config["dtype"])}
    for name, repeat in (("torch enable_gqa", False), ("torch repeated", True)):
        sides[name] = torch_decode(arrays, repeat, config["dtype"])
    size = 2 * arrays.k.size * jnp.dtype(config["dtype"]).itemsize
    title = f"decode, {kv_heads} kv heads, cache of {size / MEBIBYTE:.1f} MiB"
    compare(config, title, sides, config["decode_calls"], 1)


def compare(config, title: str, sides: dict[str, Side], calls: int, length: int):
    """Prints each side's speed and its ratio to each of PyTorch's.

    Raises ValueError where the sides' outputs differ.
    """
    outputs = {name: run(calls) for name, run in sides.items()}
    expected = outputs["torch repeated"]
    for name, out in outputs.items():
        difference = np.abs(out - expected).max()
        if not difference < TOLERANCE[config["dtype"]]:
            raise ValueError(f"{title}: {name} differs by {difference:.1e}")
    seconds = take_turns(
        {name: partial(run, calls) for name, run in sides.items()},
        warmup=config["warmup"],
        rounds=config["rounds"],
    )
    print(title)
    peers = [name for name in sides if name.startswith("torch")]
    tokens = config["batch_size"] * length * calls
    for name, times in seconds.items():
        line = f"  {name:18}{tokens / median(times):12,.0f} tokens/s"
        if name not in peers:
            for peer in peers:
                line += f"   / {peer} {speed_ratio(times, seconds[peer])}"
        print(line)


def make_arrays(config, kv_heads: int, queries: int, keys: int) -> Arrays:
    """Returns random float32 arrays."""
    generator = np.random.default_rng(config["seed"])
    B, N, H = config["batch_size"], config["num_heads"], config["head_dim"]
    q, k = (B, queries, N, H), (B, keys, kv_heads, H)
    shapes = (q, k, k, q)
    return Arrays(*(generator.normal(size=s).astype(np.float32) for s in shapes))


def relax_train(arrays: Arrays, implementation: str, dtype: str) -> Side:
    """Returns the gradients' side of ReLax."""

    @jax.jit
    def forward_backward(q, k, v, d_out):
        attend = partial(attention, mask=AttentionMask(), implementation=implementation)
        return jax.vjp(attend, q, k, v)[1](d_out)

    inputs = [jnp.asarray(x, dtype) for x in arrays]

    def run(calls: int) -> np.ndarray:
        for _ in range(calls):
            grads = jax.block_until_ready(forward_backward(*inputs))
        return _flat(grads)

    return run


def torch_train(arrays: Arrays, repeat: bool, dtype: str) -> Side:
    """Returns the gradients' side of PyTorch."""
    q, k, v, d_out = (torch.tensor(x).to(getattr(torch, dtype)) for x in arrays)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def run(calls: int) -> np.ndarray:
        for _ in range(calls):
            heads_first = [x.transpose(1, 2) for x in inputs]
            out = _torch_attention(*heads_first, repeat, is_causal=True)
            grads = torch.autograd.grad(out.transpose(1, 2), inputs, d_out)
        return _flat([grad.float().numpy() for grad in grads])

    return run


def relax_decode(arrays: Arrays, dtype: str) -> Side:
    """Returns the decoding side of ReLax; a call's output is the next one's query."""
    B, S, K, _ = arrays.k.shape
    slots = jnp.full((B, 1), S - 1)
    block = BLOCKS.get(jax.default_backend(), LARGE_BLOCK)

    def step(_, carry):
        q, *buffers = carry
        buffers = [write(buffer, 0, None, slots, q[:, :, :K]) for buffer in buffers]

        def read_block(start, size):
            return tuple(read(buffer, 0, None, start, size) for buffer in buffers)

        mask = AttentionMask(query_slots=slots)
        return cached_attention(q, read_block, mask, S, block), *buffers

    @partial(jax.jit, donate_argnums=(1, 2))
    def decode(q, keys, values, calls):
        return jax.lax.fori_loop(0, calls, step, (q, keys, values))

    q, k, v = (jnp.asarray(x, dtype) for x in arrays[:3])
    buffers = [(k.transpose(0, 2, 1, 3),), (v.transpose(0, 2, 1, 3),)]

    def run(calls: int) -> np.ndarray:
        out, *buffers[:] = jax.block_until_ready(decode(q, *buffers, calls))
        return _flat([out])

    return run


@torch.inference_mode()
def torch_decode(arrays: Arrays, repeat: bool, dtype: str) -> Side:
    """Returns the decoding side of PyTorch."""
    tensors = (torch.tensor(x).to(getattr(torch, dtype)) for x in arrays[:3])
    q, keys, values = (x.transpose(1, 2).contiguous() for x in tensors)
    K = keys.shape[1]

    @torch.inference_mode()
    def run(calls: int) -> np.ndarray:
        out = q
        for _ in range(calls):
            keys[:, :, -1:] = values[:, :, -1:] = out[:, :K]
            out = _torch_attention(out, keys, values, repeat, is_causal=False)
        return _flat([out.float().numpy()])

    return run


def _torch_attention(q, k, v, repeat: bool, is_causal: bool):
    groups = q.shape[1] // k.shape[1]
    if repeat:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return scaled_dot_product_attention(
        q, k, v, is_causal=is_causal, enable_gqa=not repeat and groups > 1
    )


def _flat(arrays) -> np.ndarray:
    return np.concatenate([np.ravel(x).astype(np.float32) for x in arrays])


if __name__ == "__main__":
    main(sys.argv[1:])
