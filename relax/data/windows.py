"""Windows of a token stream, batched for training and for validation."""

from collections.abc import Iterator

import numpy as np

from relax.data.corpora import Tokenizer


class TrainingBatches:
    """Batches of shuffled windows: `batches[step]` is pure in (seed, step, process).

    A batch holds `tokens` and `targets` `[B, T]` int32 and `loss_mask` `[B, T]`
    float32. `batch_size` counts the rows of all processes; concatenated in process
    order, their rows are the global batch.

    The windows are stratified. In an epoch, window i starts at i * context plus an
    offset in [0, context) that is drawn once for the epoch, and the order of windows
    is shuffled: no token is a target twice, and fewer than 2 * context are left out.
    n starts drawn independently would leave out a share of (1 - 1/n)^n ≈ 1/e, 37 %, of
    the tokens and spend the same work on seeing others twice or more. The offset keeps
    the windows of one epoch from being those of the next.

    Raises:
      ValueError: the tokens do not fill one window, or the rows cannot be dealt evenly
        to the processes.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        batch_size: int,
        context: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        import grain  # 0.7 s

        if len(tokens) < context + 1:
            raise ValueError(
                f"trainer.context={context} needs at least {context + 1} tokens, the "
                f"training split of data has {len(tokens)}; lower trainer.context or "
                "give a longer text"
            )
        self._rows = process_rows(batch_size, process_index, process_count)
        # Every offset leaves room for this many windows and their last target.
        windows = max(1, len(tokens) // context - 1)
        offsets = min(context, len(tokens) - windows * context)

        def start(index: int, window: int) -> int:
            epoch = index // windows
            offset = np.random.default_rng((seed, epoch)).integers(offsets)
            return window * context + offset

        # Indices beyond an epoch pass through `repeat` as they are: `shuffle` takes a
        # new seed, and `start` a new offset, from index // windows.
        order = grain.MapDataset.range(windows).seed(seed).shuffle()
        self._starts = order.map_with_index(start).repeat().batch(batch_size)
        self._span = np.arange(context + 1)
        self._tokens = tokens
        self.windows_per_epoch = windows

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        starts = self._starts[step][self._rows]
        windows = self._tokens[starts[:, None] + self._span].astype(np.int32)
        tokens, targets = windows[:, :-1], windows[:, 1:]
        loss_mask = np.ones(tokens.shape, np.float32)
        return {"tokens": tokens, "targets": targets, "loss_mask": loss_mask}


def process_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """Returns a process's part of a batch; raises ValueError for uneven parts."""
    if batch_size % process_count:
        raise ValueError(
            f"trainer.batch_size={batch_size} cannot be dealt evenly to "
            f"{process_count} processes; make it a multiple of {process_count}"
        )
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def validation_batches(
    tokens: np.ndarray, *, batch_size: int, context: int
) -> Iterator[dict[str, np.ndarray]]:
    """Returns an iterator of batches in which each of tokens[1:] is a target once.

    Batches have the keys and shapes of `TrainingBatches`; what the text does not fill
    at the end of the last one holds token 0 and loss_mask 0.

    Raises:
      ValueError: there are fewer than two tokens, so nothing to predict.
    """
    if len(tokens) < 2:
        raise ValueError(
            f"the validation split of data has {len(tokens)} tokens, at least 2 are "
            "needed; raise data.validation_fraction or give a longer text"
        )
    shape = (batch_size, context)
    return (
        _validation_batch(tokens[start : start + batch_size * context + 1], shape)
        for start in range(0, len(tokens) - 1, batch_size * context)
    )


def _validation_batch(
    tokens: np.ndarray, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    def padded(values: np.ndarray, dtype: type) -> np.ndarray:
        filled = np.zeros(shape, dtype)
        filled.flat[: len(values)] = values
        return filled

    return {
        "tokens": padded(tokens[:-1], np.int32),
        "targets": padded(tokens[1:], np.int32),
        "loss_mask": padded(np.ones(len(tokens) - 1), np.float32),
    }


def target_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """Returns how many UTF-8 bytes the targets tokens[1:] stand for.

    Special tokens stand for none. A loss in nats summed over the targets, divided by
    this and by ln 2, is in bits per byte.
    """
    ids = range(tokenizer.vocab_size)
    lengths = np.array([len(tokenizer.token_bytes(id)) for id in ids])
    lengths[[id for id in (tokenizer.bos_id, tokenizer.eos_id) if id is not None]] = 0
    return int(lengths[tokens[1:]].sum())
