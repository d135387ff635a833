"""Examples as rows of a fixed width, batched for training and for validation.

A row has `context` places, each with a token, its target and the target's weight. It
holds an example of up to context + 1 tokens, the last of which is a target only. In a
packed row each example takes as many places as it has tokens, at most `context`, as in
TRL: the place of its last token has no target, unless a token more was cut off there.
"""

from collections.abc import Iterator

import numpy as np

from relax.data.examples import Examples
from relax.data.packing import pack
from relax.data.windows import process_rows

Batch = dict[str, np.ndarray]

SHORTEST = 16  # places of a row that is cut
_SURVEYED_ROWS = 2**16  # half a second of asking for their order


def rounded(length: int) -> int:
    """Returns the width to cut rows of up to `length` places to.

    An eighth of the power of two above it, or SHORTEST, rounds it up: few widths are
    compiled, and little of them is empty.
    """
    step = max(SHORTEST, (1 << max(0, length - 1).bit_length()) // 8)
    return -(-max(length, 1) // step) * step


class ExampleBatches:
    """Batches of shuffled rows: `batches[step]` is pure in (seed, step, process).

    A batch holds `tokens` and `targets` `[B, T]` int32, `loss_mask` `[B, T]` float32
    (the weights of the targets) and, with packing, `segment_ids` `[B, T]` int32, which
    count a row's documents from 1. Places that are left hold token, target, weight and
    segment 0. Of a longer example, the first context + 1 tokens are taken.

    `batch_size` counts the rows of all processes; concatenated in process order, their
    rows are the global batch. Epochs are shuffled each in its own way, and follow each
    other without a gap, so that a batch may have rows of two of them, or more.

    trim: rows are cut to what `rounded` makes of the longest of the batch. Which
    documents share a row is planned once, for all epochs. rows_per_epoch: how many rows
    there are. dropped: records that are in no row.

    Raises:
      ValueError: there are no examples, or the rows cannot be dealt evenly to the
        processes.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        context: int,
        packing: bool,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        trim: bool = False,
    ) -> None:
        import grain  # 0.7 s

        if not len(examples):
            raise ValueError(_nothing_in("training", examples, "add records"))
        self._rows = process_rows(batch_size, process_index, process_count)
        self._layout = _Rows(examples, context, packing)
        self.rows_per_epoch = len(self._layout)
        self.dropped = examples.dropped
        # Beyond an epoch, `shuffle` takes a new seed from index // rows.
        order = grain.MapDataset.range(self.rows_per_epoch).seed(seed).shuffle()
        self._order = order.repeat().batch(batch_size)
        self._trim = trim

    def __getitem__(self, step: int) -> Batch:
        rows = self._order[step]
        batch = self._layout.batch(rows[self._rows], len(rows[self._rows]))
        if not self._trim:
            return batch
        width = self._width(rows)
        return {name: values[:, :width] for name, values in batch.items()}

    @property
    def padding_share(self) -> float:
        """The share of places without a token, of all processes' batches of an epoch.

        With trim, of the first epoch's batches as they are cut, and of no more of them
        than have 65,536 rows.
        """
        if not self._trim:
            return self._layout.padding_share
        used = places = surveyed = step = 0
        while surveyed < min(self.rows_per_epoch, _SURVEYED_ROWS):
            rows = self._order[step]
            used += int(self._layout.row_tokens[rows].sum())
            places += len(rows) * self._width(rows)
            surveyed += len(rows)
            step += 1
        return 1 - used / places

    def tokens_at(self, step: int) -> int:
        """Returns how many places of a batch, of all processes, hold a token."""
        return int(self._layout.row_tokens[self._order[step]].sum())

    def _width(self, rows: np.ndarray) -> int:
        """Returns the places of each of these rows, if they are cut."""
        longest = int(self._layout.row_tokens[rows].max())
        return min(rounded(longest), self._layout.context)


def validation_examples(
    examples: Examples, *, batch_size: int, context: int, packing: bool
) -> Iterator[Batch]:
    """Returns an iterator of batches in which each row is once, in order.

    Batches have the keys and shapes of `ExampleBatches`; what is left of the last one
    is empty rows, of loss_mask 0. Raises ValueError where there are no examples.
    """
    if not len(examples):
        remedy = "raise data.validation_fraction"
        raise ValueError(_nothing_in("validation", examples, remedy))
    layout = _Rows(examples, context, packing)
    return (
        layout.batch(range(start, min(start + batch_size, len(layout))), batch_size)
        for start in range(0, len(layout), batch_size)
    )


class _Rows:
    """Rows of examples, any of them at any time."""

    def __init__(self, examples: Examples, context: int, packing: bool) -> None:
        self._examples = examples
        self.context = context
        self._packing = packing
        lengths = examples.lengths
        # The rows' documents one after another, and where each row's begin.
        if packing:
            rows = pack(lengths, context)
            counts = [len(row) for row in rows]
            self._documents = np.fromiter((i for row in rows for i in row), np.int64)
            self._begins = np.cumsum([0, *counts])
        else:
            self._documents = np.arange(len(lengths))
            self._begins = np.arange(len(lengths) + 1)
        places = np.minimum(lengths if packing else lengths - 1, context)
        by_document = places[self._documents]
        self.row_tokens = np.add.reduceat(by_document, self._begins[:-1])
        self.padding_share = float(1 - places.sum() / (len(self) * context))

    def __len__(self) -> int:
        return len(self._begins) - 1

    def batch(self, rows: np.ndarray | range, size: int) -> Batch:
        """Returns a batch of `size` rows, of which the first are these."""
        shape = size, self.context
        batch = {
            "tokens": np.zeros(shape, np.int32),
            "targets": np.zeros(shape, np.int32),
            "loss_mask": np.zeros(shape, np.float32),
        }
        if self._packing:
            batch["segment_ids"] = np.zeros(shape, np.int32)
        for place, row in enumerate(rows):
            self._fill({name: values[place] for name, values in batch.items()}, row)
        return batch

    def _fill(self, places: Batch, row: int) -> None:
        start = 0
        documents = self._documents[self._begins[row] : self._begins[row + 1]]
        for number, document in enumerate(documents, start=1):
            tokens, weights = self._examples[document]
            if self._packing:
                end = min(start + len(tokens), self.context)
                places["segment_ids"][start:end] = number
            else:
                end = min(len(tokens) - 1, self.context)
            size = end - start
            targets = min(size, len(tokens) - 1)
            places["tokens"][start:end] = tokens[:size]
            places["targets"][start : start + targets] = tokens[1 : targets + 1]
            places["loss_mask"][start : start + targets] = weights[1 : targets + 1]
            start = end


def _nothing_in(split: str, examples: Examples, remedy: str) -> str:
    return (
        f"the {split} split of data has no examples ({examples.dropped} records were "
        f"left out, having no target within trainer.context); {remedy}, or raise "
        "trainer.context"
    )
