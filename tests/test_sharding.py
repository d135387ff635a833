"""Rules and errors in this process, layouts on eight simulated devices in another."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from relax.model.parameters import flat_parameters, parameter_shapes
from relax.sharding import (
    LOGICAL_AXES,
    MESH_AXES,
    RULES,
    MeshConfig,
    Rule,
    batch_multiple,
    logical_sharding,
    make_mesh,
    parameter_shardings,
)

ALL_OPTIONS = {
    "qkv_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "qk_norm": True,
    "tie_word_embeddings": False,
}
# In a layer; the scanned layout has one more axis before these, which is not split.
SPECS = {
    "input_layernorm/weight": [None],
    "post_attention_layernorm/weight": [None],
    "self_attn/q_proj/weight": ["fsdp", "tensor", None],
    "self_attn/k_proj/weight": ["fsdp", "tensor", None],
    "self_attn/v_proj/weight": ["fsdp", "tensor", None],
    "self_attn/o_proj/weight": ["tensor", None, "fsdp"],
    "self_attn/q_proj/bias": ["tensor", None],
    "self_attn/k_proj/bias": ["tensor", None],
    "self_attn/v_proj/bias": ["tensor", None],
    "self_attn/o_proj/bias": [None],
    "self_attn/q_norm/weight": [None],
    "self_attn/k_norm/weight": [None],
    "mlp/gate_proj/weight": ["fsdp", "tensor"],
    "mlp/up_proj/weight": ["fsdp", "tensor"],
    "mlp/down_proj/weight": ["tensor", "fsdp"],
    "mlp/gate_proj/bias": ["tensor"],
    "mlp/up_proj/bias": ["tensor"],
    "mlp/down_proj/bias": [None],
    "self_attn/q_proj/lora_a": ["fsdp", None],
    "self_attn/k_proj/lora_a": ["fsdp", None],
    "self_attn/v_proj/lora_a": ["fsdp", None],
    "self_attn/o_proj/lora_a": ["tensor", None, None],
    "mlp/gate_proj/lora_a": ["fsdp", None],
    "mlp/up_proj/lora_a": ["fsdp", None],
    "mlp/down_proj/lora_a": ["tensor", None],
    "self_attn/q_proj/lora_b": [None, "tensor", None],
    "self_attn/k_proj/lora_b": [None, "tensor", None],
    "self_attn/v_proj/lora_b": [None, "tensor", None],
    "self_attn/o_proj/lora_b": [None, "fsdp"],
    "mlp/gate_proj/lora_b": [None, "tensor"],
    "mlp/up_proj/lora_b": [None, "tensor"],
    "mlp/down_proj/lora_b": [None, "fsdp"],
}
OUTSIDE = {
    "llama/embed_tokens/weight": P("tensor", "fsdp"),
    "llama/lm_head/weight": P("tensor", "fsdp"),
    "llama/norm/weight": P(None),
}


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """Returns a mesh of devices that nobody needs to have."""
    return AbstractMesh((data, fsdp, tensor), MESH_AXES)


@pytest.fixture(scope="module")
def shapes(make_config):
    return parameter_shapes(make_config(**ALL_OPTIONS, lora_rank=5))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_parameter_has_its_place(scan_layers, make_config):
    config = make_config(**ALL_OPTIONS, lora_rank=5, scan_layers=scan_layers)
    shapes = parameter_shapes(config)
    placed = dict(flat_parameters(parameter_shardings(mesh_of(2, 2, 2), shapes)))
    if scan_layers:
        layers = {f"llama/layers/block/{k}": P(None, *v) for k, v in SPECS.items()}
    else:
        layers = {
            f"llama/layers_{index}/block/{path}": P(*axes)
            for path, axes in SPECS.items()
            for index in range(3)
        }
    assert {path: each.spec for path, each in placed.items()} == OUTSIDE | layers


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.pattern)
def test_every_rule_is_needed_and_matches_alone(rule, shapes):
    without = tuple(each for each in RULES if each is not rule)
    with pytest.raises(ValueError, match=r"^parameter llama/.* matches 0 .*, not one"):
        parameter_shardings(mesh_of(), shapes, without)
    twice = (*RULES, rule._replace(axes=()))
    with pytest.raises(ValueError, match=r"^parameter llama/.* matches 2 .*, not one"):
        parameter_shardings(mesh_of(), shapes, twice)


def test_a_rule_that_matches_nothing_is_an_error_unless_optional(shapes):
    stale = Rule("self_attn/qkv_proj/weight", ("embed", "heads", None))
    with pytest.raises(ValueError, match=r"match no parameter: .*qkv_proj"):
        parameter_shardings(mesh_of(), shapes, (*RULES, stale))
    parameter_shardings(mesh_of(), shapes, (*RULES, stale._replace(optional=True)))


def test_a_model_may_lack_what_is_optional(make_config):
    shapes = parameter_shapes(make_config(tie_word_embeddings=True))
    found = [
        path for path, _ in flat_parameters(parameter_shardings(mesh_of(), shapes))
    ]
    assert len(found) == 11


def test_a_rule_of_another_rank_is_an_error(shapes):
    wrong = tuple(
        rule._replace(axes=("embed",)) if "gate" in rule.pattern else rule
        for rule in RULES
    )
    with pytest.raises(ValueError, match=r"^parameter llama/layers/block/mlp/.* rank"):
        parameter_shardings(mesh_of(), shapes, wrong)


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (mesh_of(tensor=3), r"mesh\.tensor=3 does not divide the 128 of llama/embed"),
        (mesh_of(tensor=4), r"mesh\.tensor=4 does not divide the 2 of .*/k_proj/"),
        (mesh_of(fsdp=8), r"mesh\.fsdp=8 does not divide the 28 of llama/embed"),
    ],
)
def test_a_mesh_that_does_not_divide_a_parameter_is_named(mesh, expected, shapes):
    with pytest.raises(ValueError, match=rf"^{expected}.*; lower mesh\.\w+$"):
        parameter_shardings(mesh, shapes)


def test_no_array_takes_a_mesh_axis_twice():
    with pytest.raises(ValueError, match=r"'heads', 'mlp'.* take a mesh axis twice"):
        logical_sharding(mesh_of(), ("heads", "mlp"))
    with pytest.raises(ValueError, match="take a mesh axis twice"):
        logical_sharding(mesh_of(), ("batch", "embed"))
    for rule in RULES:
        assert logical_sharding(mesh_of(), rule.axes)


def test_a_batch_is_split_over_both_kinds_of_data_parallelism():
    assert LOGICAL_AXES["batch"] == ("data", "fsdp")
    spec = logical_sharding(mesh_of(2, 3, 5), ("batch", "length", "heads", None)).spec
    assert spec == P(("data", "fsdp"), None, "tensor", None)
    assert batch_multiple(mesh_of(2, 3, 5)) == 6


@pytest.mark.parametrize(
    "sizes", [(0, 1, 1), (1, -2, 1), (-1, -1, 1), (-1, 1, -1), (-1, -1, -1)]
)
def test_sizes_that_cannot_be_are_refused(sizes):
    data, fsdp, tensor = sizes
    expected = f"^mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor}: .*-1$"
    with pytest.raises(ValueError, match=expected):
        MeshConfig(data=data, fsdp=fsdp, tensor=tensor)


def test_a_mesh_larger_than_the_machine_is_refused():
    count = jax.device_count()
    with pytest.raises(
        ValueError,
        match=rf"mesh\.tensor=1 needs {count + 1} devices, {count} are present; .*"
        r"runtime\.host_devices$",
    ):
        make_mesh(MeshConfig(data=count + 1, fsdp=1, tensor=1))


def test_the_rest_of_the_devices_must_come_out_even():
    count = jax.device_count()
    with pytest.raises(
        ValueError,
        match=rf"^mesh\.data=-1, .*: {count + 1} does not divide the {count} devices",
    ):
        make_mesh(MeshConfig(data=-1, fsdp=1, tensor=count + 1))


@pytest.fixture(scope="session")
def eight_devices(make_config, tmp_path_factory) -> dict:
    """What sharding_script.py found for a model with every option."""
    config = make_config(
        **ALL_OPTIONS, hidden_size=24, num_hidden_layers=2, dropout=0.1
    )
    script = Path(__file__).with_name("sharding_script.py")
    # Unoptimised programs compile in half the time.
    quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "JAX_PLATFORMS": "cpu"}
    flags = "--xla_force_host_platform_device_count=8"
    folder = tmp_path_factory.mktemp("run")
    ran = subprocess.run(
        [sys.executable, "-W", "error", script, json.dumps(asdict(config)), folder],
        env={**os.environ, **quickly, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


MESHES = ("single", "data", "fsdp", "tensor", "mixed")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[1:])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_gives_the_same_losses_on_every_mesh(kind, mesh, eight_devices):
    alone = eight_devices["losses"][f"{kind} single"]
    found = eight_devices["losses"][f"{kind} {mesh}"]
    assert len(found) == 10
    assert alone[0] - alone[-1] > 0.5
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_sampling_gives_the_same_tokens_on_every_mesh(mesh, eight_devices):
    alone = eight_devices["completions"]["single"]
    assert [len(tokens) for tokens in alone] == [7] * 3
    assert eight_devices["completions"][mesh] == alone


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drawn", "searched"])
def test_ragged_prompts_give_the_same_tokens_on_a_mesh(kind, eight_devices):
    """Also where a prefix is copied from row to row, and rows follow one another."""
    alone, mixed = (eight_devices["ragged"][mesh] for mesh in ("single", "mixed"))
    assert alone["shared"] == mixed["shared"] == 20
    length = {"drawn": 7, "searched": 5}[kind]
    assert [len(tokens) for tokens in alone[kind]] == [length] * 6
    assert mixed[kind] == alone[kind]


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_is_restored_on_every_other(eight_devices):
    assert eight_devices["moved"] == dict.fromkeys(MESHES, True)


# Shape of a device's part; L=2 D=24 N=6 K=2 H=10 F=44, 128 rows of 67 ids.
PARTS = {
    "fsdp": {
        "embed_tokens/weight": [128, 3],
        "self_attn/q_proj/weight": [2, 3, 6, 10],
        "self_attn/o_proj/weight": [2, 6, 10, 3],
        "mlp/down_proj/weight": [2, 44, 3],
        "mlp/up_proj/bias": [2, 44],
        "input_layernorm/weight": [2, 24],
    },
    "tensor": {
        "embed_tokens/weight": [64, 24],
        "self_attn/q_proj/weight": [2, 24, 3, 10],
        "self_attn/k_proj/weight": [2, 24, 1, 10],
        "mlp/down_proj/weight": [2, 22, 24],
        "mlp/up_proj/bias": [2, 22],
        "input_layernorm/weight": [2, 24],
    },
    "mixed": {
        "lm_head/weight": [64, 12],
        "self_attn/q_proj/weight": [2, 12, 3, 10],
        "self_attn/o_proj/weight": [2, 3, 10, 12],
        "mlp/gate_proj/weight": [2, 12, 22],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "parameter"), [(mesh, each) for mesh in PARTS for each in PARTS[mesh]]
)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_parameters_and_their_moments_are_split(kind, mesh, parameter, eight_devices):
    shards = eight_devices["shards"][f"{kind} {mesh}"]
    found = {path: part for path, (_, part) in shards.items() if parameter in path}
    of_params = {path for path in found if path.startswith("params/")}
    # Adam keeps two moments, Muon one.
    orthogonal = kind == "muon" and "proj/weight" in parameter
    assert (len(of_params), len(found)) == (1, 2 if orthogonal else 3)
    assert set(map(tuple, found.values())) == {tuple(PARTS[mesh][parameter])}


@pytest.mark.slow
def test_a_batch_is_split_by_rows(eight_devices):
    assert eight_devices["batch"] == {
        name: [[10, 16, 13], [10, 4, 13]] for name in ("tokens", "targets", "loss_mask")
    }
