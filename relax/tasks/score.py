"""Scores texts: the logprob of every token, negative log-likelihood, perplexity."""

import glob
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from relax.language_model import LanguageModel, Score
from relax.sampling import SamplingConfig
from relax.tasks.files import check_output, read_text, read_texts, write_rows
from relax.tasks.options import check_context, chosen_context
from relax.text.tokenizers import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What to score and where to put it.

    prompt: one text; prompts_file: one text per line, or under "text" or "prompt" of a
    .jsonl file; path: a file or a glob, each file one text; one of the three is given.
    output_path: a .jsonl file, one line per text; null: the terminal. context: the
    tokens of a window over a text; null: the model's max_position_embeddings. stride:
    by how many tokens the windows of a text longer than the context advance; null: half
    the context. batch_size: windows that run at a time.
    """

    kind: str
    prompt: str | None
    prompts_file: str | None
    path: str | None
    output_path: str | None
    context: int | None
    stride: int | None
    batch_size: int

    def __post_init__(self):
        given = [
            f"task.{name}={getattr(self, name)!r}"
            for name in ("prompt", "prompts_file", "path")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'no text'} given; give one of prompt, "
                "prompts_file and task.path"
            )
        check_context(self.context)
        for name in ("stride", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"task.{name}={value} must be at least 1")


def check(config: ScoreConfig) -> None:
    """Raises ValueError or OSError where texts or output can't work."""
    _read(config)
    check_output(config.output_path)


def run(
    config: ScoreConfig,
    model: LanguageModel,
    sampling: SamplingConfig,
    terminal: TextIO = sys.stdout,
) -> None:
    """Writes one JSON line per text, and the sums of all to the log."""
    del sampling
    named = _read(config)
    rows = [model.encode(text) for _, text in named]
    context = chosen_context(config.context, model.config)
    stride = config.stride or context // 2
    scores = score_rows(model, rows, context, stride, config.batch_size)
    lines = [
        name | {"text": text} | describe(model, score)
        for (name, text), score in zip(named, scores, strict=True)
    ]
    if config.output_path is not None:
        write_rows(config.output_path, lines)
    else:
        for line in lines:
            terminal.write(json.dumps(line, ensure_ascii=False) + "\n")
    count = sum(line["num_scored"] for line in lines)
    nll = sum(line["nll"] for line in lines)
    logger.info("%d texts: %s", len(lines), _in_words(nll, count))


def score_rows(
    model: LanguageModel,
    rows: Sequence[Sequence[int]],
    context: int,
    stride: int,
    batch_size: int,
) -> list[Score]:
    """Returns a score for each list of ids, also where it exceeds the context.

    Such a list is scored in windows as long as the context, each `stride` further on;
    a token counts in the first window that holds it, given all of that window before.
    """
    spans = [list(windows(len(row), context, stride)) for row in rows]
    pieces = [
        row[start:stop]
        for row, row_spans in zip(rows, spans, strict=True)
        for start, stop in row_spans
    ]
    scored = iter(model.score(pieces, batch_size))
    scores = []
    for row, row_spans in zip(rows, spans, strict=True):
        logprobs: list[float | None] = []
        for start, _ in row_spans:
            logprobs += next(scored).logprobs[len(logprobs) - start :]
        scores.append(Score(list(row), logprobs))
    return scores


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yields the spans `[start, stop)` by which a text of `length` tokens is covered.

    Each starts at most `context` - 1 tokens on, so that no token lacks one before it.
    """
    start, stop = 0, min(context, length)
    yield start, stop
    while stop < length:
        start += min(stride, context - 1)
        stop = min(start + context, length)
        yield start, stop


def describe(model: LanguageModel, score: Score) -> dict[str, Any]:
    """Returns what a line of output says of a score; logprobs are in nats.

    Its tokens keep their spaces, so that they can be laid along the text: a special one
    is its name, and bytes that are not UTF-8 by themselves are U+FFFD.
    """
    known = [logprob for logprob in score.logprobs if logprob is not None]
    nll = -math.fsum(known)
    tokens = {}
    if model.tokenizer is not None:
        tokens = {"tokens": [_shown(model.tokenizer, i) for i in score.token_ids]}
    return {
        "token_ids": score.token_ids,
        **tokens,
        "logprobs": score.logprobs,
        "num_scored": len(known),
        "nll": nll,
        "perplexity": perplexity(nll, len(known)),
    }


def perplexity(nll: float, count: int) -> float | None:
    """Returns exp(nll / count), None where nothing was scored or it overflows."""
    if count == 0 or nll / count > 700.0:
        return None
    return math.exp(nll / count)


def _shown(tokenizer: Tokenizer, token_id: int) -> str:
    """Returns the text that an id stands for, the name of a special one."""
    piece = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
    return piece or tokenizer.special.name_of(token_id) or ""


def _in_words(nll: float, count: int) -> str:
    if count == 0:
        return "nothing to score"
    value = perplexity(nll, count)
    shown = "perplexity beyond floats" if value is None else f"perplexity {value:.3f}"
    return f"{count} tokens scored: {nll / count:.4f} nats per token, {shown}"


def _read(config: ScoreConfig) -> list[tuple[dict[str, str], str]]:
    """Returns each text and what it is called by (a file by its path)."""
    if config.path is not None:
        paths = sorted(p for p in glob.glob(config.path, recursive=True))
        files = [Path(path) for path in paths if Path(path).is_file()]
        if not files:
            raise FileNotFoundError(f"task.path={config.path} fits no file")
        named = [({"path": str(p)}, read_text(p, "task.path")) for p in files]
    elif config.prompts_file is not None:
        path = Path(config.prompts_file)
        texts = read_texts(path, "task.prompts_file", ("text", "prompt"))
        named = [({}, text) for text in texts]
    else:
        named = [({}, config.prompt)]
    for name, text in named:
        if not text:
            where = name.get("path") or config.prompts_file or "task.prompt"
            raise ValueError(f"{where} holds an empty text; there is nothing to score")
    if not named:
        raise ValueError(f"task.prompts_file={config.prompts_file} holds no text")
    return named
