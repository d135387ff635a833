"""Where arrays live: logical axes, mesh axes, and partition specs by parameter path."""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. A batch is split over both kinds of data parallelism.
LOGICAL_AXES = {
    "batch": ("data", "fsdp"),
    "length": None,
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


class Rule(NamedTuple):
    """Logical axes of the parameters whose path (below the layer) matches `pattern`.

    `optional` rules are for parameters that a model may lack (biases, an untied head,
    adapters).
    """

    pattern: str
    axes: tuple[str | None, ...]
    optional: bool = False


RULES = (
    Rule(r"embed_tokens/weight", ("vocab", "embed")),
    Rule(r"lm_head/weight", ("vocab", "embed"), optional=True),
    Rule(r"self_attn/q_proj/weight", ("embed", "heads", None)),
    Rule(r"self_attn/[kv]_proj/weight", ("embed", "kv_heads", None)),
    Rule(r"self_attn/q_proj/bias", ("heads", None), optional=True),
    Rule(r"self_attn/[kv]_proj/bias", ("kv_heads", None), optional=True),
    Rule(r"self_attn/o_proj/weight", ("heads", None, "embed")),
    Rule(r"self_attn/o_proj/bias", (None,), optional=True),
    Rule(r"self_attn/[qk]_norm/weight", (None,), optional=True),
    Rule(r"mlp/(gate|up)_proj/weight", ("embed", "mlp")),
    Rule(r"mlp/(gate|up)_proj/bias", ("mlp",), optional=True),
    Rule(r"mlp/down_proj/weight", ("mlp", "embed")),
    Rule(r"mlp/down_proj/bias", (None,), optional=True),
    # A row-parallel matrix splits LoRA's A, a column-parallel one its B.
    Rule(r"self_attn/[qkv]_proj/lora_a", ("embed", None), optional=True),
    Rule(r"self_attn/q_proj/lora_b", (None, "heads", None), optional=True),
    Rule(r"self_attn/[kv]_proj/lora_b", (None, "kv_heads", None), optional=True),
    Rule(r"self_attn/o_proj/lora_a", ("heads", None, None), optional=True),
    Rule(r"mlp/(gate|up)_proj/lora_a", ("embed", None), optional=True),
    Rule(r"mlp/(gate|up)_proj/lora_b", (None, "mlp"), optional=True),
    Rule(r"mlp/down_proj/lora_a", ("mlp", None), optional=True),
    Rule(r"(self_attn/o|mlp/down)_proj/lora_b", (None, "embed"), optional=True),
    Rule(r"(input|post_attention)_layernorm/weight", (None,)),
    Rule(r"norm/weight", (None,)),
)

_PREFIX = re.compile(r"llama/(layers/block/|layers_\d+/block/)?")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that are left.

    data: replicas. fsdp: replicas whose parameters are split along the model width.
    tensor: heads, feed-forward and vocabulary are split.
    """

    data: int
    fsdp: int
    tensor: int

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                f"mesh.data={self.data}, mesh.fsdp={self.fsdp}, mesh.tensor="
                f"{self.tensor}: each must be at least 1, and one at most -1"
            )


def make_mesh(config: MeshConfig) -> Mesh:
    """Returns a mesh with the axes MESH_AXES over the first devices that it needs.

    Raises ValueError where there are too few devices, or -1 can't be filled.
    """
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    devices = jax.devices()
    fixed = math.prod(size for size in sizes if size != -1)
    described = ", ".join(
        f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True)
    )
    if -1 in sizes and len(devices) % fixed:
        raise ValueError(
            f"{described}: {fixed} does not divide the {len(devices)} devices present"
        )
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    count = math.prod(sizes)
    if count > len(devices):
        raise ValueError(
            f"{described} needs {count} devices, {len(devices)} are present; lower the "
            "numbers, or simulate devices with runtime.host_devices"
        )
    return jax.make_mesh(
        tuple(sizes),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=np.array(devices[:count]),
    )


def logical_sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """Returns the sharding of an array with the given logical axes.

    Raises ValueError where two of its axes would take the same mesh axis.
    """
    taken = [LOGICAL_AXES[axis] if axis else None for axis in axes]
    flat = [axis for entry in taken if entry for axis in np.atleast_1d(entry)]
    if len(flat) != len(set(flat)):
        raise ValueError(f"logical axes {axes} take a mesh axis twice: {taken}")
    return NamedSharding(mesh, P(*taken))


def make_constrain(mesh: Mesh):
    """Returns the function by which a model lays out its activations."""

    def constrain(x, axes):
        if mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, logical_sharding(mesh, axes))

    return constrain


def parameter_shardings(mesh: Mesh, shapes, rules: tuple[Rule, ...] = RULES):
    """Returns the tree of shardings of a parameter tree.

    Raises ValueError where a parameter matches no rule or several, where a rule that is
    not optional matches nothing, and where a mesh axis doesn't divide its dimension.
    """
    used = set()

    def place(path, leaf):
        name = "/".join(key.key for key in path)
        rule = _rule_for(name, rules)
        used.add(rule)
        stacked = ("layers",) if "/layers/" in name else ()
        sharding = logical_sharding(mesh, stacked + rule.axes)
        _check_divides(mesh, sharding, name, leaf.shape)
        return sharding

    shardings = jax.tree_util.tree_map_with_path(place, shapes)
    unused = [rule for rule in rules if rule not in used and not rule.optional]
    if unused:
        raise ValueError(f"partition rules match no parameter: {unused}")
    return shardings


def _rule_for(name: str, rules: tuple[Rule, ...]) -> Rule:
    short = _PREFIX.sub("", name)
    matching = [rule for rule in rules if re.fullmatch(rule.pattern, short)]
    if len(matching) != 1:
        raise ValueError(
            f"parameter {name} matches {len(matching)} partition rules, not one: "
            f"{[rule.pattern for rule in matching]}"
        )
    return matching[0]


def _check_divides(mesh, sharding, name, shape):
    if len(sharding.spec) != len(shape):
        raise ValueError(f"parameter {name} {shape} has another rank than its rule")
    for size, entry in zip(shape, sharding.spec, strict=True):
        for axis in np.atleast_1d(entry) if entry else ():
            if size % mesh.shape[axis]:
                raise ValueError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide the {size} of "
                    f"{name} {shape}; lower mesh.{axis}"
                )


def state_shardings(mesh: Mesh, state_shapes, param_shardings):
    """Returns shardings of a train state: optimizer leaves follow their parameter.

    A leaf belongs to the parameter whose two last path keys (module, name) it shares;
    all else, counts and coefficients, is replicated.
    """
    by_name = {
        _last_keys(path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(param_shardings)
    }
    replicated = NamedSharding(mesh, P())

    def place(path, leaf):
        del leaf
        return by_name.get(_last_keys(path), replicated)

    return jax.tree_util.tree_map_with_path(place, state_shapes)


def _last_keys(path) -> tuple[str, ...]:
    return tuple(getattr(key, "key", None) for key in path[-2:])


def shard_batch(mesh: Mesh, batch, leading: int = 0):
    """Returns global arrays of this process's rows, split over the batch axes.

    `leading` axes (steps of a dispatch) stand before the batch axis.
    """
    axes = ("layers",) * leading + ("batch",)
    sharding = logical_sharding(mesh, axes)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), batch
    )


def batch_multiple(mesh: Mesh) -> int:
    """Returns what the number of rows of a batch must be a multiple of."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
