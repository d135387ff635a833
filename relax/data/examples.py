"""Records as tokens and weights, encoded once into a memory-mapped cache."""

import json
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from relax.data.cache import cache_key, write_atomically
from relax.data.forms import is_chat
from relax.data.records import Record
from relax.data.targets import Encoded, RecordEncoder, Template, Tokenizer

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 2  # of the cached files; raise it when what is encoded changes
_USED = ("messages", "prompt", "completion", "text", "tools")  # of a record
_ARRAYS = ("tokens", "weights", "offsets")
_COUNTS = "counts.json"


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Tokens `[N]` of n examples one after another, and their weights as targets `[N]`.

    offsets: where each example begins, and where the last one ends `[n + 1]`. dropped:
    records left out, since they had no target. truncated: examples that were cut.
    """

    tokens: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray
    dropped: int
    truncated: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens and the weights of one, int32 and float32."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span].astype(np.int32), self.weights[span].astype(np.float32)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def encode_examples(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    template: Template | None,
    loss_on: str,
    max_length: int,
    *,
    as_messages: bool,
    template_names: Sequence[str] = (),
    cache: Path | None = None,
    first_index: int = 0,
) -> Examples:
    """Returns the tokens and weights of records, as `RecordEncoder` says.

    What is beyond `max_length` tokens is cut off, and examples without a target are
    dropped and counted. as_messages: whether data.template is set, and a prompt and a
    completion that are texts become messages. template_names: what an error proposes
    where there is no template. cache: a folder, in which the result is kept under a key
    of all that it depends on; processes that start at once do the same work twice and
    leave the same files. first_index: what errors call the first record.

    Raises ValueError with the record's index, as `RecordEncoder` does, and naming
    data.cache_dir where the cache cannot be written.
    """
    encoder = RecordEncoder(
        tokenizer=tokenizer,
        template=template,
        loss_on=loss_on,
        as_messages=as_messages,
        template_names=template_names,
    )
    if cache is None:
        examples = _encode(records, encoder, max_length, first_index)
    else:
        folder = cache / "examples" / _key(records, encoder, max_length)
        if not (folder / _COUNTS).is_file():
            _save(folder, _encode(records, encoder, max_length, first_index))
        examples = _load(folder)
    if examples.dropped:
        logger.warning(
            "data: %d of %d records have no target within %d tokens and are left out",
            examples.dropped,
            len(records),
            max_length,
        )
    return examples


def _encode(
    records: Sequence[Record], encoder: RecordEncoder, max_length: int, first_index: int
) -> Examples:
    # Arrays of the standard library grow in place, at four bytes a number.
    tokens, weights, offsets = array("I"), array("f"), array("q", [0])
    dropped = truncated = unwritten = 0
    console = Console(stderr=True)
    shown = track(
        records,
        description="Encoding",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    for index, record in enumerate(shown, start=first_index):
        encoded = _encode_one(encoder, record, index)
        unwritten += _has_unwritten_tools(encoder, record)
        kept = encoded.weights[:max_length]
        if not kept.any():
            dropped += 1
            continue
        truncated += len(encoded.tokens) > max_length
        tokens.extend(encoded.tokens[:max_length])
        weights.frombytes(kept.tobytes())
        offsets.append(len(tokens))
    if unwritten:
        logger.warning(
            "data: %d of %d records have tools, which chat template %s does not write; "
            "choose one that does with data.template",
            unwritten,
            len(records),
            encoder.template.name,
        )
    small = encoder.tokenizer.vocab_size <= 2**16
    by_token = np.frombuffer(weights, np.float32)
    whole = np.isin(by_token, (0, 1)).all()
    return Examples(
        tokens=np.array(tokens, np.uint16 if small else np.uint32),
        weights=by_token.astype(bool) if whole else by_token,
        offsets=np.array(offsets, np.int64),
        dropped=dropped,
        truncated=truncated,
    )


def _encode_one(encoder: RecordEncoder, record: Record, index: int) -> Encoded:
    try:
        return encoder(record)
    except ValueError as error:
        raise ValueError(f"data: record {index}: {error}") from error


def _has_unwritten_tools(encoder: RecordEncoder, record: Record) -> bool:
    if not record.get("tools") or not is_chat(record, chat=encoder.as_messages):
        return False
    return "tools" not in encoder.template.source


def _key(records: Sequence[Record], encoder: RecordEncoder, max_length: int) -> str:
    template = encoder.template
    settings = {
        "version": _FORMAT_VERSION,
        "tokenizer": encoder.tokenizer.fingerprint,
        "template": template and [template.source, dict(template.variables)],
        "loss_on": encoder.loss_on,
        "as_messages": encoder.as_messages,
        "max_length": max_length,
    }
    used = ({k: record[k] for k in _USED if k in record} for record in records)
    # Keys in their order: templates write the tools' as they are.
    parts = (json.dumps(settings, sort_keys=True), *map(json.dumps, used))
    return cache_key(parts)


def _save(folder: Path, examples: Examples) -> None:
    for name in _ARRAYS:
        values = getattr(examples, name)
        write_atomically(
            folder / f"{name}.npy", lambda file, values=values: np.save(file, values)
        )
    counts = {"dropped": examples.dropped, "truncated": examples.truncated}
    # Last: where there are counts, there is all the rest.
    text = json.dumps(counts).encode()
    write_atomically(folder / _COUNTS, lambda file: file.write(text))
    logger.info("data: %d tokens written to %s", len(examples.tokens), folder)


def _load(folder: Path) -> Examples:
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    return Examples(**arrays, **json.loads((folder / _COUNTS).read_text()))
