"""ReLax's side of the training benchmark."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import make_batch

from relax.config import to_dataclass
from relax.model.config import LlamaConfig
from relax.model.llama import make_llama
from relax.model.parameters import parameter_count, unstack_layers
from relax.ops.attention import resolve_implementation
from relax.optim import OptimizerConfig, make_optimizer
from relax.runtime import RuntimeConfig, configure
from relax.steps import init_state, make_language_model_loss, make_train_step


class TrainStep:
    """Steps on one fixed batch, from the seed's weights."""

    def __init__(self, config: Mapping[str, Any]):
        configure(to_dataclass(RuntimeConfig, config["runtime"], "runtime"))
        self.model = to_dataclass(LlamaConfig, config["model"], "model")
        optimizer = to_dataclass(OptimizerConfig, config["optimizer"], "optimizer")
        llama = make_llama(self.model)
        loss = make_language_model_loss(
            llama.apply,
            self.model.vocab_size,
            z_loss_weight=0.0,
            max_logits=config["max_logits"],
        )
        optimizer = make_optimizer(optimizer, num_steps=1)
        tokens, targets = make_batch(config)
        batch = {
            "tokens": tokens,
            "targets": targets,
            "loss_mask": np.ones(tokens.shape, np.float32),
        }
        self._batches = jax.tree.map(lambda x: jnp.asarray(x[None]), batch)
        key = jax.random.key(config["seed"])
        params = jax.jit(llama.init)(key, tokens[:1, :2])
        self._state = init_state(params, optimizer)
        step = make_train_step(loss, optimizer, seed=config["seed"])
        self._compiled = step.lower(self._state, self._batches).compile()

    def run(self, steps: int) -> float:
        """Returns the loss of the last of `steps`, which are over when it returns."""
        for _ in range(steps):
            self._state, metrics = self._compiled(self._state, self._batches)
        jax.block_until_ready(self._state)
        return float(metrics["loss"][0])

    @property
    def num_parameters(self) -> int:
        """How many parameters the model has."""
        return parameter_count(self.model)

    @property
    def attention(self) -> str:
        """The implementation of attention that was chosen."""
        model = self.model
        return resolve_implementation(
            model.attention, jax.default_backend(), model.compute_dtype
        )

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes of the state, and of all that a step needs besides."""
        state = sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))
        asked = self._compiled.memory_analysis()
        whole = asked.argument_size_in_bytes + asked.temp_size_in_bytes
        new = asked.output_size_in_bytes - asked.alias_size_in_bytes
        return state, whole + new - state

    @property
    def program(self) -> str:
        """The optimised HLO of a step."""
        return self._compiled.as_text()

    def weights(self) -> dict[str, np.ndarray]:
        """Returns copies of the weights, as transformers names and lays them out."""
        named = {}
        for module, leaves in unstack_layers(self._state.params).items():
            weight = np.array(leaves["weight"])
            if module.endswith("_proj"):
                inputs = 2 if module.endswith("o_proj") else 1
                weight = weight.reshape(math.prod(weight.shape[:inputs]), -1).T
            named[_transformers_name(module)] = weight
        return named


def _transformers_name(module: str) -> str:
    name = module.removeprefix("llama/").replace("/block/", ".").replace("/", ".")
    name = name.replace("layers_", "layers.")
    return f"{name}.weight" if name == "lm_head" else f"model.{name}.weight"
