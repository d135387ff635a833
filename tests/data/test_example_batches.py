"""Rows of examples: what stands in them, their order, and their loss in a model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.data import example_batches as module
from relax.data.example_batches import ExampleBatches, validation_examples
from relax.data.examples import Examples
from relax.model.llama import make_llama
from relax.model.parameters import parameter_shapes
from relax.steps import make_language_model_loss

CONTEXT = 7
# Of 14 documents, TRL packs 12 rows; its collator's cases are 2 padded, 3 packed.
ROWS, PADDED, PACKED = 12, 2, 3
NAMES = ["tokens", "targets", "loss_mask"]


def examples_of(documents, weights=None, dropped=0):
    """Returns Examples whose tokens all have weight 1, but for each first."""
    weights = weights or [np.arange(len(tokens)) > 0 for tokens in documents]
    return Examples(
        tokens=np.concatenate([np.zeros(0, np.uint16), *documents]).astype(np.uint16),
        weights=np.concatenate([np.zeros(0, bool), *weights]),
        offsets=np.cumsum([0, *map(len, documents)]),
        dropped=dropped,
        truncated=0,
    )


# Example i has 2 to 7 tokens, from 100 * i on: 13 examples in 13 rows.
COUNT = 13
MANY = examples_of([100 * i + np.arange(2 + i % 6) for i in range(COUNT)], dropped=3)


def make_batches(examples=MANY, **changes):
    settings = {"batch_size": 1, "context": CONTEXT, "packing": False, "seed": 11}
    return ExampleBatches(examples, **(settings | changes))


def assert_equal_batches(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_a_row_of_one_example_written_out():
    examples = examples_of([[5, 3, 0, 9]], [np.array([0, 0, 0.5, 1])])
    batch = make_batches(examples, context=5)[0]
    assert list(batch) == NAMES
    assert batch["tokens"].tolist() == [[5, 3, 0, 0, 0]]
    assert batch["targets"].tolist() == [[3, 0, 9, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 0.5, 1, 0, 0]]
    assert [str(v.dtype) for v in batch.values()] == ["int32", "int32", "float32"]


def test_a_packed_row_written_out():
    examples = examples_of([[5, 3], [7, 8, 9]])
    batch = make_batches(examples, context=6, packing=True)[0]
    assert list(batch) == [*NAMES, "segment_ids"]
    assert batch["tokens"].tolist() == [[7, 8, 9, 5, 3, 0]]
    assert batch["targets"].tolist() == [[8, 9, 0, 3, 0, 0]]
    assert batch["loss_mask"].tolist() == [[1, 1, 0, 1, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0]]
    assert batch["segment_ids"].dtype == np.int32


@pytest.mark.parametrize("packing", [False, True])
def test_a_row_holds_as_many_targets_as_places(packing):
    """A token more than places; what is beyond that is cut."""
    for length in (5, 6):
        examples = examples_of([np.arange(1, length + 1)])
        batch = make_batches(examples, context=4, packing=packing)[0]
        assert batch["tokens"].tolist() == [[1, 2, 3, 4]]
        assert batch["targets"].tolist() == [[2, 3, 4, 5]]
        assert batch["loss_mask"].tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_depends_on_its_step_alone(packing):
    steps = [0, 17, 2, 1_000_003, 5]
    first = make_batches(batch_size=5, packing=packing)
    forward = {step: first[step] for step in steps}
    again = make_batches(batch_size=5, packing=packing)
    for step in reversed(steps):
        assert_equal_batches(forward[step], again[step])
        assert_equal_batches(forward[step], first[step])


def test_every_epoch_has_every_row_once_in_another_order():
    batches = make_batches()
    assert (batches.rows_per_epoch, batches.dropped) == (COUNT, 3)

    def order(batches, epoch):
        steps = range(epoch * COUNT, (epoch + 1) * COUNT)
        return [int(batches[step]["tokens"][0, 0]) // 100 for step in steps]

    orders = [order(batches, epoch) for epoch in range(3)]
    orders.append(order(make_batches(seed=13), 0))
    assert all(sorted(one) == list(range(COUNT)) for one in orders)
    assert len(set(map(tuple, orders))) == 4


def test_batches_cross_epochs():
    rows = [make_batches()[step]["tokens"] for step in range(3 * COUNT)]
    expected = np.concatenate(rows)
    made = [make_batches(batch_size=5)[step]["tokens"] for step in range(7)]
    np.testing.assert_array_equal(np.concatenate(made), expected[:35])
    large = make_batches(batch_size=29)[0]["tokens"]
    np.testing.assert_array_equal(large, expected[:29])


@pytest.mark.parametrize("packing", [False, True])
def test_the_processes_rows_are_the_global_batch(packing):
    whole = make_batches(batch_size=6, packing=packing)
    parts = [
        make_batches(batch_size=6, packing=packing, process_index=i, process_count=3)
        for i in range(3)
    ]
    for step in (0, 2, 19):
        rows = [part[step] for part in parts]
        assert {len(row["tokens"]) for row in rows} == {2}
        union = {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
        assert_equal_batches(union, whole[step])


def test_the_share_of_padding():
    """Alone, documents of 3 and 6 tokens leave 3 of 5 places and none; 6 is cut."""
    examples = examples_of([[1, 2, 3], [4, 5], [1, 2, 3, 4, 5, 6]])
    assert make_batches(examples, context=5).padding_share == pytest.approx(7 / 15)
    packed = make_batches(examples, context=5, packing=True)
    assert packed.padding_share == 0
    looser = make_batches(examples, context=7, packing=True)
    assert looser.padding_share == pytest.approx(3 / 14)


@pytest.mark.parametrize(
    ("context", "size", "places"),
    [
        # Rows of 3, 7 and 40 tokens, in 16, 16 and 48 places.
        (64, 1, 16 + 16 + 48),
        (64, 3, 3 * 48),
        # Rounded up, the longest would be wider than the context.
        (37, 1, 16 + 16 + 37),
    ],
)
def test_the_share_of_padding_is_that_of_trimmed_batches(context, size, places):
    examples = examples_of([np.arange(1, n + 2) for n in (3, 7, 40)])
    batches = make_batches(examples, context=context, batch_size=size, trim=True)
    share = 1 - (3 + 7 + min(40, context)) / places
    assert batches.padding_share == pytest.approx(share)
    made = [batches[step]["tokens"] for step in range(3 // size)]
    empty = sum(np.count_nonzero(tokens == 0) for tokens in made)
    assert empty / sum(tokens.size for tokens in made) == pytest.approx(share)


def test_the_share_of_padding_of_a_long_epoch_is_that_of_its_begin(monkeypatch):
    monkeypatch.setattr(module, "_SURVEYED_ROWS", 3)
    batches = make_batches(batch_size=2, context=23, trim=True)
    made = [batches[step]["tokens"] for step in range(2)]
    assert {tokens.shape for tokens in made} == {(2, 16)}
    used = batches.tokens_at(0) + batches.tokens_at(1)
    assert batches.padding_share == pytest.approx(1 - used / 64)


def test_trimmed_rows_are_as_long_as_the_longest_asks_for():
    """A power of two, the same on every process; of a batch nothing else changes."""
    lengths = [3, 17, 18, 33, 60]  # in 2, 16, 17, 32 and 59 places
    examples = examples_of([np.arange(1, n + 1) for n in lengths])
    settings = {"context": 50, "batch_size": 2}
    whole = make_batches(examples, **settings)
    trimmed = make_batches(examples, **settings, trim=True)
    parts = [
        make_batches(examples, **settings, trim=True, process_index=i, process_count=2)
        for i in range(2)
    ]
    seen = set()
    for step in range(12):
        places = whole[step]["tokens"].astype(bool)
        longest = places.sum(axis=1).max()
        width = {2: 16, 16: 16, 17: 32, 32: 32, 50: 50}[int(longest)]
        seen.add(int(longest))
        cut = {name: values[:, :width] for name, values in whole[step].items()}
        assert_equal_batches(trimmed[step], cut)
        rows = [part[step] for part in parts]
        union = {name: np.concatenate([r[name] for r in rows]) for name in NAMES}
        assert_equal_batches(union, cut)
        assert trimmed.tokens_at(step) == parts[0].tokens_at(step) == places.sum()
    assert {16, 17, 32, 50} <= seen


def test_tokens_of_packed_batches_are_counted():
    batches = make_batches(batch_size=5, packing=True)
    for step in range(3):
        segments = batches[step]["segment_ids"]
        assert batches.tokens_at(step) == np.count_nonzero(segments)


@pytest.mark.parametrize("packing", [False, True])
def test_validation_has_every_row_once_and_empty_ones_last(packing):
    batches = list(
        validation_examples(MANY, batch_size=5, context=CONTEXT, packing=packing)
    )
    rows = make_batches(packing=packing).rows_per_epoch
    assert len(batches) == -(-rows // 5)
    shapes = {values.shape for batch in batches for values in batch.values()}
    assert shapes == {(5, CONTEXT)}
    union = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    targets = union["targets"][union["loss_mask"] > 0]
    expected = [t for i in range(COUNT) for t in MANY[i][0][1:]]
    assert sorted(targets.tolist()) == sorted(expected)
    if not packing:
        assert targets.tolist() == expected
    assert not any(values[rows:].any() for values in union.values())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"trainer\.batch_size=5 .* 3 processes"):
        make_batches(batch_size=5, process_count=3)
    none = examples_of([], dropped=17)
    message = r"split of data has no examples \(17 records .*trainer\.context\); "
    with pytest.raises(ValueError, match=f"the training {message}add"):
        make_batches(none)
    with pytest.raises(ValueError, match=rf"the validation {message}raise data\."):
        validation_examples(none, batch_size=1, context=1, packing=False)


@pytest.fixture(scope="module")
def oracle(oracle_dir):
    text = (oracle_dir / "trl_sft_packing_collate.json").read_text()
    return json.loads(text)


def from_trl(documents, labels):
    weights = [np.array(row) != -100 for row in labels]
    for row in weights:
        row[0] = False  # TRL masks it when it collates
    return examples_of(documents, weights)


def labels_of(batch):
    """Returns what TRL would write, -100 where there is no target."""
    masked = np.where(batch["loss_mask"] > 0, batch["targets"], -100)
    return np.pad(masked, ((0, 0), (1, 0)), constant_values=-100)


def test_packed_rows_are_those_of_trl(oracle):
    """But for targets beyond a row's tokens, which TRL's rows have no place for."""
    size, expected = oracle["seq_length"], oracle["packed"]["bfd"]
    examples = from_trl(oracle["input_ids"], oracle["labels"])
    (batch,) = validation_examples(
        examples, batch_size=ROWS, context=size, packing=True
    )
    assert len(expected["input_ids"]) == ROWS
    labels = labels_of(batch)
    for row, tokens in enumerate(expected["input_ids"]):
        n, lengths = len(tokens), expected["seq_lengths"][row]
        assert batch["tokens"][row].tolist() == tokens + [0] * (size - n)
        segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        assert batch["segment_ids"][row].tolist() == [*segments, *[0] * (size - n)]
        starts = np.cumsum([0, *lengths[:-1]])
        collated = np.array(expected["labels"][row])
        collated[starts] = -100
        assert labels[row, :n].tolist() == collated.tolist()
    # Documents of more than 8 tokens are 400, 1000 and 1200: they keep one target more.
    assert labels[:, size].tolist() == [408, -100, -100, 1008, 1208] + [-100] * 7


def test_batches_hold_what_trl_collates(oracle):
    cases = {False: [], True: []}
    for case in oracle["collate"]:
        cases[case["padding_free"]].append(case)
    assert (len(cases[False]), len(cases[True])) == (PADDED, PACKED)
    for packing, case in [(p, case) for p in cases for case in cases[p]]:
        out, documents = case["out"], [e["input_ids"] for e in case["examples"]]
        labels = [e.get("labels", e["input_ids"]) for e in case["examples"]]
        rows, width = np.shape(out["input_ids"])
        (batch,) = validation_examples(
            from_trl(documents, labels),
            batch_size=rows,
            context=width if packing else width - 1,
            packing=packing,
        )
        made = batch["tokens"]
        if packing:
            assert (batch["segment_ids"] - 1).tolist() == out["seq_idx"]
        else:
            made = np.hstack([made[:, :1], batch["targets"]])
        assert made.tolist() == out["input_ids"]
        collated = np.array(out["labels"])
        collated[:, 0] = -100  # never a target in TRL either, which shifts labels
        assert labels_of(batch)[:, :width].tolist() == collated.tolist()


RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(1, 67, n) for n in (5, 4, 2, 9, 3)]
WEIGHTS = [
    np.append(0, RNG.choice([0, 0.5, 1], len(document) - 1)) for document in DOCUMENTS
]
# Sums of 15 float32 losses of about 4, and of as many gradients.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def loss_and_gradients(make_config):
    """The summed loss of a batch, its metrics and gradients, for random parameters."""
    config = make_config(num_hidden_layers=2)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype),
        parameter_shapes(config),
    )
    loss_fn = make_language_model_loss(
        make_llama(config).apply,
        config.vocab_size,
        z_loss_weight=0.0,
        max_logits=2**25,
    )
    compiled = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))

    def run(batch):
        (loss, (sums, _)), grads = compiled(params, batch, None)
        return jax.device_get({"loss": loss, "sums": sums, "grads": grads})

    return run


def difference(a, b):
    """Returns the largest difference of two pytrees, by the largest of each leaf."""

    def of_leaf(x, y):
        return np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1.0)

    return max(jax.tree.leaves(jax.tree.map(of_leaf, a, b)))


def test_packed_loss_and_gradients_equal_the_separate_ones(loss_and_gradients):
    examples = examples_of(DOCUMENTS, WEIGHTS)
    settings = {"batch_size": 5, "context": 8}
    (separate,) = validation_examples(examples, **settings, packing=False)
    (packed,) = validation_examples(examples, **settings, packing=True)
    assert np.count_nonzero(packed["segment_ids"].any(axis=1)) == 3
    # A row of one segment is what it is without any, and needs no program of its own.
    one_segment = {"segment_ids": np.ones((5, 8), np.int32)}
    expected = loss_and_gradients(separate | one_segment)
    weight = expected["sums"]["weight"]
    assert weight == np.count_nonzero(packed["loss_mask"])
    assert weight == sum(map(np.count_nonzero, WEIGHTS))
    assert difference(loss_and_gradients(packed), expected) < TOLERANCE
    dropped = loss_and_gradients(packed | one_segment)
    assert difference(dropped, expected) > 1000 * TOLERANCE
