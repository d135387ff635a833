"""Loads checkpoints on several meshes of eight simulated devices.

Run by test_hf_import.py in a process of its own, since JAX counts its devices once:
`python mesh_script.py <folder> ...` prints what came out for each.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from relax.checkpoints.hf_import import load_params
from relax.checkpoints.pretrained import open_pretrained
from relax.language_model import LanguageModel
from relax.model.parameters import flat_parameters, parameter_shapes, stack_layers
from relax.sharding import MeshConfig, make_mesh, parameter_shardings

MESHES = {
    "single": MeshConfig(data=1, fsdp=1, tensor=1),
    "fsdp": MeshConfig(data=1, fsdp=8, tensor=1),
    "tensor": MeshConfig(data=4, fsdp=1, tensor=2),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}


def load(checkpoint, mesh, scan_layers=True):
    """Returns the parameters and the most numbers that one read of a file gave."""
    config = dataclasses.replace(checkpoint.config, scan_layers=scan_layers)
    largest = 0

    def counted(read):
        def reading(slices):
            nonlocal largest
            piece = read(slices)
            largest = max(largest, piece.size)
            return piece

        return reading

    tensors = {
        name: tensor._replace(read=counted(tensor.read))
        for name, tensor in checkpoint.tensors.items()
    }
    shardings = parameter_shardings(mesh, parameter_shapes(config))
    return load_params(config, tensors, shardings, checkpoint.source), largest


def compare(params, alone) -> dict[str, list]:
    """Returns path -> whether the bits are equal, and the shape of a device's part."""
    expected = dict(flat_parameters(alone))
    found = {}
    for path, array in flat_parameters(params):
        whole = np.asarray(expected[path])
        equal = array.dtype == whole.dtype and all(
            np.array_equal(shard.data, whole[shard.index])
            for shard in array.addressable_shards
        )
        found[path] = [equal, array.sharding.shard_shape(array.shape)]
    return found


def exported(checkpoint):
    """Returns the parameters of a folder that was written from a mesh."""
    mesh = make_mesh(MESHES["mixed"])
    params, _ = load(checkpoint, mesh)
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, "new")
        LanguageModel(checkpoint.config, params, None, mesh).save_hf(new)
        back, _ = load(open_pretrained(new, "auto", "cpu"), mesh)
    return back


def main(folder: Path) -> dict:
    assert jax.device_count() == 8
    checkpoint = open_pretrained(folder, "auto", "cpu")
    alone, _ = load(checkpoint, make_mesh(MESHES["single"]))
    found = {}
    for name, config in MESHES.items():
        params, largest = load(checkpoint, make_mesh(config))
        found[name] = {"arrays": compare(params, alone), "largest": largest}
    found["exported"] = {"arrays": compare(exported(checkpoint), alone)}
    unrolled, _ = load(checkpoint, make_mesh(MESHES["single"]), scan_layers=False)
    found["unrolled"] = {"arrays": compare(stack_layers(unrolled), alone)}
    return found


if __name__ == "__main__":
    print(json.dumps([main(Path(folder)) for folder in sys.argv[1:]]))
