"""What a parameter of ours is called in released files, and how its numbers lie there.

A matrix of theirs is `[out, in]`, the product's transpose; ours keeps heads apart and
puts what goes in first.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from relax.model.config import LlamaConfig
from relax.model.parameters import flat_parameters, parameter_shapes


class Name(NamedTuple):
    """One module: below `llama/` or its layer, in Hugging Face's files, in Meta's."""

    ours: str
    hf: str
    meta: str


LAYER_NAMES = (
    Name("input_layernorm", "input_layernorm", "attention_norm"),
    Name("self_attn/q_proj", "self_attn.q_proj", "attention.wq"),
    Name("self_attn/k_proj", "self_attn.k_proj", "attention.wk"),
    Name("self_attn/v_proj", "self_attn.v_proj", "attention.wv"),
    Name("self_attn/o_proj", "self_attn.o_proj", "attention.wo"),
    Name("self_attn/q_norm", "self_attn.q_norm", "attention.q_norm"),
    Name("self_attn/k_norm", "self_attn.k_norm", "attention.k_norm"),
    Name("post_attention_layernorm", "post_attention_layernorm", "ffn_norm"),
    Name("mlp/gate_proj", "mlp.gate_proj", "feed_forward.w1"),
    Name("mlp/up_proj", "mlp.up_proj", "feed_forward.w3"),
    Name("mlp/down_proj", "mlp.down_proj", "feed_forward.w2"),
)
OTHER_NAMES = (
    Name("embed_tokens", "model.embed_tokens", "tok_embeddings"),
    Name("norm", "model.norm", "norm"),
    Name("lm_head", "lm_head", "output"),
)
_LAYER_PREFIX = {"hf": "model.layers.{}.", "meta": "layers.{}."}
_LAYER = re.compile(r"llama/layers(?:_(\d+))?/block/")
# An adapter's factors in PEFT's files.
_PARAMETERS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
_PEFT_PREFIX = "base_model.model."
# Buffers that old files hold beside the parameters.
IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|rope\.freqs)")


class Leaf(NamedTuple):
    """One array of ours, and the tensors of theirs that it is made of.

    shape: ours, without the layer axis. names: theirs, one per layer where the array is
    stacked (`stacked`). input_axes: how many leading axes of a matrix go in; 0 for what
    lies the same way in both (tables, norms, biases).
    """

    module: str
    name: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    input_axes: int

    @property
    def is_table(self) -> bool:
        """Whether the rows are those of the vocabulary."""
        return self.module in ("llama/embed_tokens", "llama/lm_head")

    def their_shape(self, vocab_size: int) -> tuple[int, ...]:
        """Returns the shape of one of the tensors."""
        if self.is_table:
            return (vocab_size, self.shape[1])
        if not self.input_axes:
            return (math.prod(self.shape),)
        inside, outside = self.shape[: self.input_axes], self.shape[self.input_axes :]
        return (math.prod(outside), math.prod(inside))


def leaves(config: LlamaConfig, source: str = "hf") -> Iterator[Leaf]:
    """Yields every array of a model with its names in `source`, "hf" or "meta"."""
    for path, leaf in flat_parameters(parameter_shapes(config)):
        module, name = path.rsplit("/", 1)
        layer = _LAYER.match(module)
        stacked = layer is not None and layer[1] is None
        if layer is None:
            names = [_theirs(OTHER_NAMES, module.removeprefix("llama/"), source)]
        else:
            inner = _theirs(LAYER_NAMES, module[layer.end() :], source)
            indices = range(config.num_hidden_layers) if stacked else [layer[1]]
            names = [_LAYER_PREFIX[source].format(i) + inner for i in indices]
        yield Leaf(
            module,
            name,
            leaf.shape[1:] if stacked else leaf.shape,
            tuple(f"{theirs}.{_PARAMETERS.get(name, name)}" for theirs in names),
            stacked,
            _input_axes(module, name),
        )


def adapter_leaves(config: LlamaConfig) -> list[Leaf]:
    """Returns the arrays of a model's adapters, with their names in PEFT's files."""
    return [
        leaf._replace(names=tuple(_PEFT_PREFIX + theirs for theirs in leaf.names))
        for leaf in leaves(config)
        if leaf.name in _PARAMETERS
    ]


def _theirs(table: tuple[Name, ...], ours: str, source: str) -> str:
    [entry] = [entry for entry in table if entry.ours == ours]
    return getattr(entry, source)


def _input_axes(module: str, name: str) -> int:
    if not module.endswith("_proj") or name == "bias":
        return 0
    if name == "lora_b":  # the rank goes in
        return 1
    return 2 if module.endswith("o_proj") else 1
