"""LanguageModel: a trained model as a researcher uses it from a notebook."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from relax.generation.generator import (
    Completion,
    Generator,
    Request,
    check_tokens,
)
from relax.model.config import LlamaConfig
from relax.model.llama import make_llama
from relax.model.parameters import Params
from relax.ops.logprobs import compute_logits
from relax.sampling import SamplingConfig
from relax.sharding import batch_multiple, make_constrain
from relax.steps import make_logprob_step
from relax.text.tokenizers import Tokenizer

Prompt = str | Sequence[int]
STREAM_CHUNK = 8


@dataclass(frozen=True)
class Score:
    """Token ids of a text and the logprob of each in nats, given those before it.

    The first has none (None): nothing comes before it.
    """

    token_ids: list[int]
    logprobs: list[float | None]


class LanguageModel:
    """A model with its parameters and tokenizer.

    `config`, `params` and `tokenizer` are plain attributes; the compiled functions
    take `params` anew at each call, so that they may be replaced.
    """

    def __init__(
        self, config: LlamaConfig, params: Params, tokenizer: Tokenizer, mesh: Mesh
    ):
        """`params` live on `mesh`, laid out as `relax.load` does it."""
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self._multiple = batch_multiple(mesh)
        apply = make_llama(config, make_constrain(mesh)).apply
        self._apply_logits = jax.jit(_logits_function(apply, config.vocab_size))
        self._logprob_step = make_logprob_step(apply, config.vocab_size)
        stop_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self._generator = Generator(apply, config, tokenizer, stop_ids, self._multiple)

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
        B, T = tokens.shape
        key_valid, positions, mask = None, None, None
        if lengths is not None:
            key_valid = jnp.arange(T) < jnp.asarray(lengths)[:, None]
        if attention_mask is not None:
            given = jnp.asarray(attention_mask).astype(bool)
            if given.shape == (B, T):
                key_valid = given if key_valid is None else key_valid & given
                positions = jnp.maximum(jnp.cumsum(given, axis=1) - 1, 0)
            elif given.shape == (B, T, T):
                mask = given[:, None]
            else:
                raise ValueError(
                    f"attention_mask has shape {given.shape}; for tokens {(B, T)} give "
                    f"{(B, T)} or {(B, T, T)}"
                )
        return self._apply_logits(self.params, tokens, positions, key_valid, mask)

    def score(self, texts: Sequence[Prompt], batch_size: int = 16) -> list[Score]:
        """Returns token ids and their logprobs for each text (or list of ids).

        Raises ValueError for an empty text, for one longer than the context and for
        ids that the model does not have.
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

        At most `batch_size` rows run at a time, which changes no completion. Raises
        ValueError for an empty prompt, for one that fills the context and for ids that
        the model does not have.
        """
        sampling = sampling or SamplingConfig()
        requests = [
            Request(tuple(prompt), index, sample)
            for index, prompt in enumerate(self._encode_all(prompts))
            for sample in range(sampling.num_return_sequences)
        ]
        for request in requests:
            self._generator.check(request)
        completions = []
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            completions += self._generator.run(self.params, batch, sampling)
        return completions

    def stream(
        self, prompt: Prompt, sampling: SamplingConfig | None = None
    ) -> Iterator[str]:
        """Yields the text of one completion piece by piece, as it is made.

        The pieces joined are the text that `generate` gives for the same prompt.
        """
        sampling = sampling or SamplingConfig()
        sampling = replace(
            sampling,
            tokens_per_dispatch=min(STREAM_CHUNK, sampling.tokens_per_dispatch),
        )
        request = Request(tuple(self._encode(prompt)), 0, 0)
        completion, sent = Completion(), 0
        for _ in self._generator.run_in_chunks(
            self.params, [request], sampling, [completion]
        ):
            if piece := completion.text[sent:]:
                yield piece
            sent += len(piece)

    def _encode_all(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise ValueError(f"{prompts[:40]!r} is one text; give a list of texts")
        return [self._encode(prompt) for prompt in prompts]

    def _encode(self, prompt: Prompt) -> list[int]:
        """Returns ids: those given, or the text's after the tokenizer's first token."""
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        first = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return first + self.tokenizer.encode(prompt)

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


def _logits_function(apply, vocab_size: int):
    def logits(params, tokens, positions, key_valid, mask):
        out = apply(params, tokens, positions=positions, key_valid=key_valid, mask=mask)
        return compute_logits(out.hidden, out.unembedding, vocab_size)[..., :vocab_size]

    return logits
