"""The peer's side of the training benchmark: transformers in PyTorch eager."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from common import make_batch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
)


class TrainStep:
    """Steps on one fixed batch, from given weights or random ones."""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, np.ndarray] | None = None,
        fused: bool | None = None,
    ):
        """`fused` is AdamW's; None leaves torch's own choice (foreach, or a loop)."""
        torch.set_num_threads(config["threads"])
        model, optimizer = config["model"], config["optimizer"]
        fields = {name: model[name] for name in SHARED}
        rope = {"rope_type": "default", "rope_theta": model["rope_theta"]}
        llama = LlamaConfig(
            **fields, rope_parameters=rope, attn_implementation="sdpa", use_cache=False
        )
        self._model = LlamaForCausalLM(llama).to(getattr(torch, model["param_dtype"]))
        if weights is not None:
            _set_weights(self._model, weights)
        self._clip_norm = optimizer["clip_norm"]
        self._optimizer = _make_adamw(self._model, optimizer, fused)
        tokens, targets = make_batch(config)
        self._tokens = torch.tensor(tokens, dtype=torch.long)
        self._targets = torch.tensor(targets, dtype=torch.long).flatten()

    def run(self, steps: int) -> float:
        """Returns the loss of the last of `steps`."""
        for _ in range(steps):
            self._optimizer.zero_grad()
            logits = self._model(input_ids=self._tokens).logits
            loss = cross_entropy(logits.flatten(0, 1).float(), self._targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
            self._optimizer.step()
        return loss.item()


def _set_weights(model: LlamaForCausalLM, weights: Mapping[str, np.ndarray]) -> None:
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)


def _make_adamw(model, config: Mapping[str, Any], fused: bool | None):
    """Returns AdamW that decays matrices only, as ReLax's does."""
    groups = {
        decay: [p for p in model.parameters() if (p.ndim > 1) == bool(decay)]
        for decay in (config["weight_decay"], 0.0)
    }
    return torch.optim.AdamW(
        [{"params": ps, "weight_decay": decay} for decay, ps in groups.items()],
        lr=config["learning_rate"],
        betas=(config["b1"], config["b2"]),
        eps=config["eps"],
        fused=fused,
    )
