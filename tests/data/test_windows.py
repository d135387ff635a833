"""Training windows are pure and cover an epoch once; validation covers all, once."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from relax.data.windows import TrainingBatches, target_bytes, validation_batches

CONTEXT = 7
TOKENS = np.arange(103, dtype=np.uint16)  # a token is its own position
WINDOWS = 13  # floor(103 / 7) - 1


def make_batches(tokens=TOKENS, **changes):
    settings = {"batch_size": 1, "context": CONTEXT, "seed": 11} | changes
    return TrainingBatches(tokens, **settings)


def epoch_targets(batches, epoch):
    """The targets of one epoch, one row per window in the order of training."""
    steps = range(epoch * WINDOWS, (epoch + 1) * WINDOWS)
    return np.concatenate([batches[step]["targets"] for step in steps])


def assert_each_token_once(targets):
    """Fails unless the targets are one run of tokens without gap or repetition."""
    seen = np.sort(targets, axis=None)
    np.testing.assert_array_equal(seen, seen[0] + np.arange(WINDOWS * CONTEXT))


def assert_equal_batches(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_a_batch_has_the_promised_names_shapes_and_types():
    batch = make_batches(batch_size=5)[3]
    assert list(batch) == ["tokens", "targets", "loss_mask"]
    for name, dtype in zip(batch, (np.int32, np.int32, np.float32), strict=True):
        assert batch[name].shape == (5, CONTEXT)
        assert batch[name].dtype == dtype
    assert batch["loss_mask"].min() == 1
    np.testing.assert_array_equal(batch["tokens"] + 1, batch["targets"])
    np.testing.assert_array_equal(np.diff(batch["tokens"]), 1)


def test_a_batch_depends_on_its_step_alone():
    steps = [0, 17, 2, 1_000_003, 5]
    first = make_batches(batch_size=5)
    forward = {step: first[step] for step in steps}
    again = make_batches(batch_size=5)
    for step in reversed(steps):
        assert_equal_batches(forward[step], again[step])
        assert_equal_batches(forward[step], first[step])


def test_seeds_and_epochs_differ():
    orders = [epoch_targets(make_batches(seed=seed), 0) // CONTEXT for seed in (11, 13)]
    assert (orders[0] != orders[1]).any()
    batches = make_batches()
    epochs = [epoch_targets(batches, epoch) for epoch in range(3)]
    for one, next_one in pairwise(epochs):
        assert (one != next_one).any()


@pytest.mark.parametrize("epoch", [0, 1, 2, 29])
def test_an_epoch_has_every_token_as_target_once(epoch):
    batches = make_batches()
    assert batches.windows_per_epoch == WINDOWS
    targets = epoch_targets(batches, epoch)
    assert_each_token_once(targets)
    assert targets.min() <= CONTEXT
    assert (np.diff(targets[:, 0]) < 0).any()  # shuffled


def test_the_once_per_epoch_check_catches_overlapping_windows():
    overlapping = epoch_targets(make_batches(), 0)
    overlapping[5] = overlapping[4] + 1
    with pytest.raises(AssertionError):
        assert_each_token_once(overlapping)
    starts = np.random.default_rng(3).integers(103 - CONTEXT, size=WINDOWS)
    independent = starts[:, None] + np.arange(CONTEXT)
    with pytest.raises(AssertionError):
        assert_each_token_once(independent)


def test_every_offset_of_the_windows_comes_up():
    batches = make_batches()
    firsts = {int(epoch_targets(batches, epoch).min()) for epoch in range(61)}
    assert firsts == {1, 2, 3, 4, 5, 6, 7}


def test_batches_cross_epochs():
    """A batch of 5 windows crosses the ends of epochs of 13, one of 29 spans three."""
    windows = [make_batches()[step]["targets"] for step in range(29)]
    expected = np.concatenate(windows)
    small = make_batches(batch_size=5)
    rows = np.concatenate([small[step]["targets"] for step in range(6)])
    np.testing.assert_array_equal(rows[:29], expected)
    np.testing.assert_array_equal(make_batches(batch_size=29)[0]["targets"], expected)


@pytest.mark.parametrize("process_count", [1, 2, 3, 6])
def test_the_processes_rows_are_the_global_batch(process_count):
    whole = make_batches(batch_size=6)
    parts = [
        make_batches(batch_size=6, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    for step in (0, 2, 19):
        rows = [part[step] for part in parts]
        assert {len(row["tokens"]) for row in rows} == {6 // process_count}
        union = {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
        assert_equal_batches(union, whole[step])


@pytest.mark.parametrize("length", [8, 9, 13, 14, 15, 20, 21])
def test_short_texts_fill_their_windows(length):
    """From one window of 7 + 1 tokens on, each start leaves room for its targets."""
    batches = make_batches(TOKENS[:length])
    assert batches.windows_per_epoch == (2 if length == 21 else 1)
    targets = np.concatenate([batches[step]["targets"] for step in range(101)])
    assert targets.min() == 1
    assert targets.max() == min(length - 1, 13 if length < 21 else 20)


def test_a_memory_mapped_file_gives_plain_arrays(tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    batch = make_batches(mapped)[0]
    assert {type(array) for array in batch.values()} == {np.ndarray}
    assert_equal_batches(batch, make_batches()[0])


def test_too_little_text_is_an_error():
    message = r"trainer\.context=7 needs at least 8 tokens, .* data has 7"
    with pytest.raises(ValueError, match=message):
        make_batches(TOKENS[:7])


def test_an_uneven_deal_of_rows_is_an_error():
    with pytest.raises(ValueError, match=r"trainer\.batch_size=5 .* 3 processes"):
        make_batches(batch_size=5, process_count=3)


@pytest.mark.parametrize("length", [2, 7, 8, 9, 21, 22, 23, 43, 103])
def test_validation_counts_every_target_once(length):
    batches = list(validation_batches(TOKENS[:length], batch_size=3, context=CONTEXT))
    assert len(batches) == -(-(length - 1) // 21)
    assert {b[name].shape for b in batches for name in b} == {(3, CONTEXT)}
    mask = np.concatenate([b["loss_mask"] for b in batches]).ravel()
    tokens = np.concatenate([b["tokens"] for b in batches]).ravel()
    targets = np.concatenate([b["targets"] for b in batches]).ravel()
    np.testing.assert_array_equal(targets[mask == 1], np.arange(1, length))
    np.testing.assert_array_equal(tokens[mask == 1], np.arange(length - 1))
    padding = mask == 0
    assert not (tokens[padding].any() or targets[padding].any())
    assert padding.sum() == len(batches) * 21 - (length - 1)


def test_validation_windows_written_out():
    tokens = np.array([5, 2, 3, 7, 11, 13], np.uint16)
    (batch,) = validation_batches(tokens, batch_size=3, context=2)
    assert batch["tokens"].tolist() == [[5, 2], [3, 7], [11, 0]]
    assert batch["targets"].tolist() == [[2, 3], [7, 11], [13, 0]]
    assert batch["loss_mask"].tolist() == [[1, 1], [1, 1], [1, 0]]
    dtypes = [str(array.dtype) for array in batch.values()]
    assert dtypes == ["int32", "int32", "float32"]


def test_an_empty_validation_split_is_an_error_at_once():
    with pytest.raises(ValueError, match=r"has 1 tokens.*data\.validation_fraction"):
        validation_batches(TOKENS[:1], batch_size=3, context=CONTEXT)


def test_target_bytes_leaves_out_the_first_token_and_specials():
    pieces = [b"<s>", b"</s>", b"a", "é".encode(), "日本".encode()]
    tokenizer = SimpleNamespace(
        vocab_size=5, bos_id=0, eos_id=1, token_bytes=pieces.__getitem__
    )
    tokens = np.array([4, 2, 1, 3, 4, 0, 2], np.uint16)
    assert target_bytes(tokens, tokenizer) == 1 + 0 + 2 + 6 + 0 + 1
    tokenizer.bos_id = tokenizer.eos_id = None
    assert target_bytes(tokens, tokenizer) == 1 + 4 + 2 + 6 + 3 + 1
