"""Trains, samples and saves on several meshes of eight simulated devices.

Run by test_sharding.py in a process of its own, since JAX counts its devices once:
`python sharding_script.py <model config as JSON> <folder>` prints what came out.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from relax.build import abstract_train_state, init_train_state
from relax.checkpoints.native import RunCheckpoints
from relax.generation.generator import Generator
from relax.generation.requests import Request
from relax.language_model import LanguageModel
from relax.model.config import LlamaConfig
from relax.model.llama import make_llama
from relax.optim import OptimizerConfig, make_optimizer
from relax.sampling import SamplingConfig
from relax.sharding import (
    MeshConfig,
    batch_multiple,
    make_constrain,
    make_mesh,
    shard_batch,
)
from relax.steps import make_language_model_loss, make_train_step
from relax.text.tokenizers import TokenizerConfig, make_tokenizer

MESHES = {
    "single": MeshConfig(data=1, fsdp=1, tensor=1),
    "data": MeshConfig(data=8, fsdp=1, tensor=1),
    "fsdp": MeshConfig(data=1, fsdp=-1, tensor=1),
    "tensor": MeshConfig(data=-1, fsdp=1, tensor=2),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}
STEPS, ROWS, CONTEXT = 10, 16, 13
# Lengths of prompts; 20 tokens more come before the fifth.
RAGGED = (1, 31, 5, 17, 3, 44)
# Muon in two micro-batches, so that these too are dealt out to the devices.
ACCUMULATION = {"adamw": 1, "muon": 2}


def optimizer_config(kind: str) -> OptimizerConfig:
    return OptimizerConfig(
        kind=kind,
        learning_rate=0.01,
        adam_learning_rate=0.005,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        momentum=0.95,
        weight_decay=0.1,
        clip_norm=1.0,
        schedule="cosine",
        warmup_steps=2,
        decay_fraction=0.2,
        final_fraction=0.1,
    )


def batches(vocab_size: int) -> dict[str, np.ndarray]:
    """Returns one batch with an uneven mask, once for each step: `[steps, B, T]`."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(vocab_size, size=(ROWS, CONTEXT + 1)).astype(np.int32)
    mask = rng.integers(2, size=(ROWS, CONTEXT)).astype(np.float32)
    mask[5] = 0.0
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": mask}
    return {name: np.stack([array] * STEPS) for name, array in batch.items()}


def train(config: LlamaConfig, mesh, kind: str):
    """Returns the state after ten steps and the loss of each."""
    optimizer = make_optimizer(optimizer_config(kind), STEPS)
    loss_fn = make_language_model_loss(
        make_llama(config, make_constrain(mesh)).apply,
        config.vocab_size,
        z_loss_weight=1e-3,
        max_logits=2**25,
    )
    step = make_train_step(loss_fn, optimizer, seed=0, accumulation=ACCUMULATION[kind])
    state = init_train_state(config, optimizer, mesh, seed=0)
    given = shard_batch(mesh, batches(config.vocab_size), leading=1)
    state, metrics = step(state, given)
    return state, metrics["loss"].tolist()


def completions(config: LlamaConfig, mesh, params) -> list[list[int]]:
    """Returns the tokens drawn for three prompts."""
    constrain = make_constrain(mesh)
    apply = make_llama(config, constrain).apply
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes", encoding=None, path=None))
    generator = Generator(apply, config, tokenizer, (), batch_multiple(mesh), constrain)
    prompts = ((5, 7, 11, 13), (3,), (2, 17, 19, 23, 29))
    requests = [Request(prompt, row, 0) for row, prompt in enumerate(prompts)]
    made = generator.run(params, requests, SamplingConfig(max_new_tokens=7))
    return [completion.token_ids for completion in made]


def ragged_completions(config: LlamaConfig, mesh, params) -> dict:
    """Returns tokens of six ragged prompts, of which two share a prefix of 20.

    Drawn and searched, four rows at a time; shared: tokens that were not run again.
    """
    model = LanguageModel(config, params, None, mesh)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(config.vocab_size, size=n).tolist() for n in RAGGED]
    prompts[4] = prompts[1][:20] + prompts[4]
    drawn = model.generate(prompts, SamplingConfig(max_new_tokens=7), batch_size=4)
    found = {"drawn": [completion.token_ids for completion in drawn]}
    found["shared"] = model.stats.shared_tokens
    beams = SamplingConfig(max_new_tokens=5, temperature=0.0, num_beams=2)
    searched = model.generate(prompts, beams, batch_size=4)
    found["searched"] = [completion.token_ids for completion in searched]
    return found


def shard_shapes(tree) -> dict[str, list]:
    """Returns path -> shape of the whole array and of a device's part."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [
            leaf.shape,
            leaf.sharding.shard_shape(leaf.shape),
        ]
        for path, leaf in leaves
    }


def moved_checkpoint(config: LlamaConfig, state, folder: Path) -> dict[str, bool]:
    """Returns, by mesh, whether a state saved on one came back on it bit for bit."""
    optimizer = make_optimizer(optimizer_config("muon"), STEPS)
    equal = {}
    with RunCheckpoints(folder) as checkpoints:
        checkpoints.save(STEPS, state, None, {})
        for name, mesh_config in MESHES.items():
            abstract = abstract_train_state(config, optimizer, make_mesh(mesh_config))
            restored = checkpoints.restore(STEPS, abstract)
            equal[name] = all(
                np.array_equal(saved, back) and back.sharding == wanted.sharding
                for saved, back, wanted in zip(
                    *map(jax.tree.leaves, (state, restored, abstract)), strict=True
                )
            )
    return equal


def main(config: LlamaConfig, folder: Path) -> dict:
    found = {"losses": {}, "completions": {}, "ragged": {}, "shards": {}}
    for name, mesh_config in MESHES.items():
        mesh = make_mesh(mesh_config)
        for kind in ACCUMULATION:
            state, losses = train(config, mesh, kind)
            found["losses"][f"{kind} {name}"] = losses
            found["shards"][f"{kind} {name}"] = shard_shapes(state)
        found["completions"][name] = completions(config, mesh, state.params)
        if name in ("single", "mixed"):
            found["ragged"][name] = ragged_completions(config, mesh, state.params)
    found["moved"] = moved_checkpoint(config, state, folder)
    placed = shard_batch(make_mesh(MESHES["mixed"]), batches(config.vocab_size), 1)
    found["batch"] = shard_shapes(placed)
    return found


if __name__ == "__main__":
    print(json.dumps(main(LlamaConfig(**json.loads(sys.argv[1])), Path(sys.argv[2]))))
