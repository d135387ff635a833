"""What is asked of a model, what it answered, and what that took."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from relax.model.config import LlamaConfig
from relax.sampling import SamplingConfig
from relax.text.detokenizer import StopStrings, StreamingDetokenizer
from relax.text.tokenizers import Tokenizer

SHORTEST = 64


@dataclass(frozen=True)
class Request:
    """One row to complete: a prompt, and which sample of which input it is.

    max_new_tokens: of this row; None: the sampling's.
    """

    prompt: tuple[int, ...]
    input_index: int
    sample_index: int
    max_new_tokens: int | None = None


@dataclass
class Completion:
    """What one row gave.

    text: what the tokens add to the prompt's, up to the first stop string. token_ids:
    the end of text included where it came, and the token that completed a stop string.
    logprobs: of these tokens under the full softmax at temperature 1. sampled_logprobs:
    under the distribution drawn from. top_logprobs: for each token the most likely ones
    and their logprobs, where sampling.num_top_logprobs asks for them. finish_reason:
    "stop" (end of text or a stop string), "length", or "none" where a search found
    fewer beams than were asked for. score: of a beam. support: for each token a bit for
    every id that could be drawn (`ops.draws.pack_support`), where a run keeps it.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    score: float | None = None
    support: list[np.ndarray] = field(default_factory=list, compare=False)

    def row(self) -> dict[str, Any]:
        """Returns the fields as a line of output has them, those not asked for out."""
        row = {"completion": self.text, **vars(self)}
        absent = [name for name in ("top_logprobs", "score") if row[name] in ([], None)]
        return {k: v for k, v in row.items() if k not in ("text", "support", *absent)}


@dataclass
class GenerationStats:
    """Counts of tokens since a generator was made, and of the programs it compiled.

    prompt_tokens: of all prompts, of which shared_tokens were found in the cache, as a
    prefix of another text or of the row's last one, and the others were run. new_tokens
    were made; of drafted_tokens, which speculation guessed, accepted_tokens were right.
    """

    prompt_tokens: int = 0
    shared_tokens: int = 0
    new_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    programs: int = 0


class CompletionText:
    """A completion's text as its tokens come, and whether a stop string has ended it.

    Raises ValueError for stop strings without a tokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        stop_strings: Sequence[str],
    ):
        if tokenizer is None and stop_strings:
            raise ValueError(
                f"sampling.stop_strings={list(stop_strings)} need a tokenizer, which "
                "this model lacks; set sampling.stop_strings=[]"
            )
        self._detokenizer = tokenizer and StreamingDetokenizer(tokenizer)
        self._stops = StopStrings(stop_strings)
        if tokenizer is not None:
            # Sentencepiece drops a space at the start of a text: here the prompt's.
            self._detokenizer.add(prompt)

    def add(self, *tokens: int) -> tuple[str, bool]:
        """Returns the text that has become final, and whether a stop string came.

        It came with the last token, or some of the text belongs to those after it.
        """
        if self._detokenizer is None:
            return "", False
        return self._stops.add(self._detokenizer.add(tokens))

    def flush(self) -> str:
        """Returns the text held back, where nothing more will come."""
        if self._detokenizer is None:
            return ""
        piece, stopped = self._stops.add(self._detokenizer.flush())
        return piece if stopped else piece + self._stops.flush()


def check_tokens(
    name: str, tokens: Sequence[int], config: LlamaConfig, room: int = 0
) -> None:
    """Raises ValueError for tokens that the model can't take, `room` more to come."""
    limit = config.max_position_embeddings - room
    if not 1 <= len(tokens) <= limit:
        raise ValueError(
            f"{name} has {len(tokens)} tokens; give 1 to {limit} "
            f"(model.max_position_embeddings={config.max_position_embeddings})"
        )
    if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
        raise ValueError(
            f"{name} holds ids from {min(tokens)} to {max(tokens)}; give ids below "
            f"model.vocab_size={config.vocab_size}"
        )


def power_of_two(count: int) -> int:
    """Returns the next power of two: few shapes are compiled."""
    return 1 << (int(count) - 1).bit_length()


def bucket(length: int, limit: int) -> int:
    """Returns the next power of two from SHORTEST on, at most `limit`, the context."""
    return min(limit, max(SHORTEST, power_of_two(length)))


def bias_of(sampling: SamplingConfig, num_columns: int) -> np.ndarray | None:
    """Returns what is added to each id's logit `[V]`, None for nothing."""
    if not sampling.logit_bias:
        return None
    bias = np.zeros(num_columns, np.float32)
    for token, value in sampling.logit_bias:
        bias[token] += value
    return bias


def allowed_tokens(
    request: Request, sampling: SamplingConfig, config: LlamaConfig
) -> int:
    """Returns how many tokens a row may get, as far as the context goes."""
    asked = request.max_new_tokens
    asked = sampling.max_new_tokens if asked is None else asked
    return min(asked, config.max_position_embeddings - len(request.prompt))


def check_request(request: Request, config: LlamaConfig) -> None:
    """Raises ValueError where a prompt can't be completed."""
    name = f"prompt {request.input_index}"
    check_tokens(name, request.prompt, config, room=1)
    if request.max_new_tokens is not None and request.max_new_tokens < 1:
        raise ValueError(
            f"{name} has max_new_tokens={request.max_new_tokens}, which must be at "
            "least 1"
        )


def check_ids(sampling: SamplingConfig, num_ids: int) -> None:
    """Raises ValueError for ids that a model of `num_ids` ids never chooses."""
    for name in ("logit_bias", "stop_token_ids"):
        values = getattr(sampling, name)
        for token in dict(values) if name == "logit_bias" else values:
            if token >= num_ids:
                raise ValueError(
                    f"sampling.{name} has the id {token}; the model chooses among "
                    f"{num_ids} ids: give ids from 0 to {num_ids - 1}"
                )
    if sampling.num_top_logprobs > num_ids:
        raise ValueError(
            f"sampling.num_top_logprobs={sampling.num_top_logprobs} must be at most "
            f"{num_ids}, the number of ids that the model chooses among"
        )
