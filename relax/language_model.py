"""LanguageModel: a trained model as a researcher uses it from a notebook."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from relax.checkpoints.adapter import open_adapter, write_adapter
from relax.checkpoints.hf_export import NewFolder, released_json, write_model
from relax.checkpoints.native import RunCheckpoints
from relax.checkpoints.pretrained import Origin
from relax.generation.generator import Generator
from relax.generation.requests import Completion, GenerationStats, Request, check_tokens
from relax.generation.session import Session
from relax.model.config import LlamaConfig
from relax.model.llama import make_llama
from relax.model.lora import merge
from relax.model.parameters import Params, resize_vocabulary
from relax.sampling import SamplingConfig
from relax.sharding import batch_multiple, make_constrain, parameter_shardings
from relax.steps import (
    make_capture_step,
    make_logits_step,
    make_logprob_step,
    visibility,
)
from relax.text.chat import ChatTemplate, ending_ids
from relax.text.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
STREAM_CHUNK, SHARD_BYTES = 8, 5 * 10**9
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Score:
    """Token ids of a text and the logprob of each in nats, given those before it.

    The first has none (None): nothing comes before it.
    """

    token_ids: list[int]
    logprobs: list[float | None]


class LanguageModel:
    """A model with its parameters, and its tokenizer and chat template if it has them.

    The compiled functions take `params` anew at each call, so that they may be
    replaced; so may `chat_template`, whose end of turn then ends completions. A prompt
    is a text, a list of token ids, or a list of chat messages.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: Params,
        tokenizer: Tokenizer | None,
        mesh: Mesh,
        *,
        chat_template: ChatTemplate | None = None,
        origin: Origin | None = None,
    ):
        """`params` live on `mesh`, laid out as `relax.load` does it.

        Raises ValueError where the tokenizer has ids that the model lacks.
        """
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self._chat_template = chat_template
        self.mesh = mesh
        self.origin = origin or Origin()
        self._compile()

    def _compile(self) -> None:
        config, tokenizer = self.config, self.tokenizer
        if tokenizer is not None:
            check_vocabulary(config, tokenizer)
        multiple = batch_multiple(self.mesh)
        constrain = make_constrain(self.mesh)
        apply = make_llama(config, constrain).apply
        self._multiple = multiple
        self._logits_step = make_logits_step(apply, config.vocab_size)
        self._capture_step = make_capture_step(apply)
        self._logprob_step = make_logprob_step(apply, config.vocab_size)
        self._generator = Generator(
            apply, config, tokenizer, self.stop_ids, multiple, constrain
        )

    @property
    def chat_template(self) -> ChatTemplate | None:
        """How messages are written as text, None where that isn't known."""
        return self._chat_template

    @chat_template.setter
    def chat_template(self, template: ChatTemplate | None) -> None:
        self._chat_template = template
        self._compile()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a completion: the checkpoint's, tokenizer's and template's.

        The template's is what it writes after an assistant's turn.
        """
        return ending_ids(self.origin.stop_ids, self.tokenizer, self.chat_template)

    def logits(
        self,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, "B"] | None = None,
        attention_mask: Bool[Array, "B T"] | Bool[Array, "B T T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits of the token after each one.

        lengths: tokens per right-padded row. attention_mask: either `[B, T]`, false
        where a token is padding, on whichever side (positions count the others), or
        `[B, T, T]`, which tokens each one may look at besides being causal. Raises
        ValueError for other shapes.
        """
        tokens = jnp.asarray(tokens)
        inputs = visibility(tokens, lengths, attention_mask)
        return self._logits_step(self.params, tokens, inputs)

    def activations(
        self,
        tokens: Int[Array, "B T"],
        sites: Sequence[str],
        lengths: Int[Array, "B"] | None = None,
        attention_mask: Bool[Array, "B T"] | Bool[Array, "B T T"] | None = None,
    ) -> dict[str, Array]:
        """Returns every layer's values at `sites`, `[L, B, ...]`.

        Sites: `resid_pre` and `resid_post`, the residual stream before and after a
        layer `[L, B, T, D]`; `attn.pattern` `[L, B, N, T, T]`; and `final_norm`, the
        output layer's input `[B, T, D]`. Masks are those of `logits`. Raises ValueError
        for another site.
        """
        tokens = jnp.asarray(tokens)
        inputs = visibility(tokens, lengths, attention_mask)
        return self._capture_step(self.params, tuple(sites), tokens, inputs)

    def score(self, texts: Sequence[Prompt], batch_size: int = 16) -> list[Score]:
        """Returns token ids and their logprobs for each text, or list of ids.

        Raises ValueError for an empty text, one over the context, and unknown ids.
        """
        rows = self._encode_all(texts)
        for index, row in enumerate(rows):
            check_tokens(f"text {index}", row, self.config)
        scores = []
        for start in range(0, len(rows), batch_size):
            scores += self._score_batch(rows[start : start + batch_size])
        return scores

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig | None = None,
        batch_size: int = 16,
    ) -> list[Completion]:
        """Returns `num_return_sequences` completions per prompt, prompt by prompt.

        At most `batch_size` rows run at a time. Raises ValueError for an empty prompt,
        for one that fills the context and for ids that the model does not have.
        """
        sampling = sampling or SamplingConfig()
        requests = [
            Request(tuple(prompt), index, sample)
            for index, prompt in enumerate(self._encode_all(prompts))
            for sample in range(sampling.num_return_sequences)
        ]
        batch_size = min(batch_size, len(requests))
        made = dict(self.complete(requests, sampling, batch_size))
        return [made[index] for index in range(len(requests))]

    def complete(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig | None = None,
        batch_size: int = 16,
        *,
        capacity: int | None = None,
        share_prefixes: bool = True,
    ) -> Iterator[tuple[int, Completion]]:
        """Yields the place of a request and its completion as soon as it is complete.

        `batch_size` rows are run, also for fewer requests; one that ends makes room for
        the next. What prompts share is run once, unless `share_prefixes` is False.
        capacity: tokens of a row, None: as many as are needed. Raises as `generate`.
        """
        completions = [Completion() for _ in requests]
        for ended in self._generator.run_in_chunks(
            self.params,
            requests,
            sampling or SamplingConfig(),
            completions,
            batch_size=batch_size,
            capacity=capacity,
            share_prefixes=share_prefixes,
        ):
            yield from ((index, completions[index]) for index in ended)

    def check(self, sampling: SamplingConfig) -> None:
        """Raises ValueError for what this model can't do, before anything is run."""
        self._generator.plan(1, sampling)

    @property
    def stats(self) -> GenerationStats:
        """Counts of what was generated so far."""
        return self._generator.stats

    def stream(
        self, prompt: Prompt, sampling: SamplingConfig | None = None
    ) -> Iterator[str]:
        """Yields the text of one completion piece by piece, as it is made.

        The pieces joined are the text that `generate` gives for the same prompt.
        """
        sampling = sampling or SamplingConfig()
        request = Request(tuple(self.encode(prompt)), 0, 0)
        soon = {"limit": STREAM_CHUNK, "first_limit": 1}
        completion, sent = Completion(), 0
        for _ in self._generator.run_in_chunks(
            self.params, [request], sampling, [completion], **soon
        ):
            if piece := completion.text[sent:]:
                yield piece
            sent += len(piece)

    def session(self) -> Session:
        """Returns a text that grows turn by turn and runs only what is new."""
        return Session(self._generator)

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the ids of a prompt as the model reads it.

        Those given; a text's after the tokenizer's first token; or the chat template's
        of messages, up to where the assistant answers. Raises ValueError for a text
        without a tokenizer, and for messages without a template.
        """
        is_text = isinstance(prompt, str)
        is_chat = not is_text and any(isinstance(item, Mapping) for item in prompt)
        if not is_text and not is_chat:
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise ValueError(
                "the checkpoint has no tokenizer, so that texts can't be read: give "
                "token ids, or put the tokenizer's files into its folder"
            )
        if is_text:
            first = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
            return first + self.tokenizer.encode(prompt)
        if self.chat_template is None:
            raise ValueError(
                "the checkpoint has no chat template: set model.chat_template = relax."
                "text.chat.named_template(name, model.tokenizer)"
            )
        return self.chat_template.encode(
            self.tokenizer, prompt, add_generation_prompt=True
        )

    def add_special_tokens(
        self, names: Sequence[str], rows: str = "mean", seed: int = 0
    ) -> dict[str, int]:
        """Gives tokenizer and model new special tokens; returns their ids.

        rows: what embedding and head hold for them: "mean" of the tokens so far,
        "zeros", or "normal", drawn with `seed` as at initialisation. Raises ValueError
        for a token that is known already, and for other `rows`.
        """
        if self.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer to add special tokens to")
        tokenizer = self.tokenizer.with_special_tokens(names)
        first, end = self.tokenizer.vocab_size, tokenizer.vocab_size
        config, params = resize_vocabulary(
            self.config, self.params, range(first, end), rows, jax.random.key(seed)
        )
        shardings = parameter_shardings(self.mesh, params)
        self.config, self.params = config, jax.device_put(params, shardings)
        self.tokenizer = tokenizer
        self._compile()
        return {name: tokenizer.special_tokens[name] for name in names}

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `relax.load` reads, whole or not at all.

        Raises FileExistsError where there is one by that name.
        """
        with NewFolder(Path(folder), "folder") as new:
            with RunCheckpoints(new) as checkpoints:
                state = {"params": self.params, "step": jnp.zeros((), jnp.int32)}
                checkpoints.save(0, state, None, self._info())
            if self.tokenizer is not None:
                self.tokenizer.save(new / TOKENIZER_FOLDER)
            if self.chat_template is not None:
                self.chat_template.save(new / TOKENIZER_FOLDER)

    def save_hf(self, folder: str | Path, max_shard_bytes: int = SHARD_BYTES) -> None:
        """Writes a Hugging Face folder, whole or not at all.

        Weights are safetensors in `config.param_dtype`, adapters merged into them, in
        several files where they exceed `max_shard_bytes`. Raises FileExistsError where
        the folder is there, and ValueError where no released family has such a model.
        """
        bos_id = None if self.tokenizer is None else self.tokenizer.bos_id
        with NewFolder(Path(folder), "folder") as new:
            model = merge(self.config, self.params)
            jsons = released_json(self.origin, bos_id, self.stop_ids)
            write_model(new, *model, *jsons, max_shard_bytes)
            if self.tokenizer is not None:
                self.tokenizer.save_hf(new)
            if self.chat_template is not None:
                self.chat_template.save_hf(new)

    def save_adapter(self, folder: str | Path) -> None:
        """Writes the LoRA adapters alone as a folder of PEFT's, whole or not at all.

        Raises FileExistsError where the folder is there, ValueError without adapters.
        """
        with NewFolder(Path(folder), "folder") as new:
            write_adapter(new, self.config, self.params, self.origin.name)

    def load_adapter(self, folder: str | Path) -> None:
        """Gives the model the LoRA adapter in a folder of PEFT's.

        Raises FileNotFoundError where there is none, and ValueError where it is of
        another kind or for another model, or this one has adapters already.
        """
        adapter = open_adapter(Path(folder))
        self.config, self.params = adapter.add_to(self.config, self.params, self.mesh)
        self._compile()

    def merge_lora(self) -> None:
        """Adds the adapters to the matrices; the model computes what it did."""
        self.config, params = merge(self.config, self.params)
        self.params = jax.device_put(params, parameter_shardings(self.mesh, params))
        self._compile()

    def _info(self) -> dict[str, Any]:
        return {"model": asdict(self.config), "origin": asdict(self.origin)}

    def _encode_all(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise ValueError(f"{prompts[:40]!r} is one text; give a list of texts")
        if any(isinstance(prompt, int | Mapping) for prompt in prompts):
            raise ValueError(
                "this is one prompt's ids or messages; give a list of them"
            )
        return [self.encode(prompt) for prompt in prompts]

    def _score_batch(self, rows: list[list[int]]) -> list[Score]:
        padded = [*rows, *[rows[0]] * (-len(rows) % self._multiple)]
        # Power-of-two widths: few shapes are compiled.
        width = 1 << (max(map(len, rows)) - 1).bit_length()
        tokens = np.zeros((len(padded), max(2, width)), np.int32)
        for index, row in enumerate(padded):
            tokens[index, : len(row)] = row
        logprobs = np.asarray(
            self._logprob_step(self.params, tokens[:, :-1], tokens[:, 1:])
        )
        return [
            Score(row, [None, *logprobs[index, : len(row) - 1].tolist()])
            for index, row in enumerate(rows)
        ]


def check_vocabulary(config: LlamaConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError where the tokenizer has ids that the model lacks."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the embedding "
            f"{config.vocab_size} rows (vocab_size): they belong to different models, "
            "or the tokenizer was given tokens that the model wasn't"
        )
