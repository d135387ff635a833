"""Slots alone: steps that only write down what they are asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.generation import slots as slots_module
from relax.generation.decode import Steps
from relax.generation.slots import MIN_SHARED, Slots, _Pieces
from relax.model.cache import empty_cache

PARAMS = {"weight": jnp.arange(5.0)}
ROWS, CAPACITY = 5, 47
SYSTEM = list(range(100, 100 + MIN_SHARED))


class Buffer:
    """A cache that knows for each slot which text its key was made from.

    A key depends on all tokens up to its own, as it does in a model.
    """

    def __init__(self, rows: int, capacity: int):
        self.texts = [[()] * capacity for _ in range(rows)]
        self.deleted = False

    def is_deleted(self) -> bool:
        return self.deleted


class FakeSteps:
    """Steps over a Buffer. calls: what was run; a prefill as row -> (start, tokens)."""

    def __init__(self):
        self.calls = []
        self.shapes = []
        self.steps = Steps(self.new_cache, self.prefill, self.copy, None, lambda: 0)

    def new_cache(self, rows, capacity):
        self.calls.append(("new_cache", rows, capacity))
        return Buffer(rows, capacity)

    def prefill(self, params, cache, tokens, rows, starts, lengths):
        assert params is PARAMS and not cache.deleted
        group, size = tokens.shape
        self.shapes.append((group, size))
        if group == len(cache.texts):
            np.testing.assert_array_equal(rows, np.arange(group))
        run = {}
        for row, start, count, ids in zip(rows, starts, lengths, tokens, strict=True):
            if row == len(cache.texts):
                assert count == 0
            if count == 0:
                continue
            assert row not in run and count <= size
            run[int(row)] = (int(start), ids[:count].tolist())
            self._write(cache.texts[row], int(start), ids[:count].tolist())
        self.calls.append(("prefill", run))
        return cache

    def _write(self, texts, start, ids):
        text = texts[start - 1] if start else ()
        for slot, token in enumerate(ids, start):
            text = (*text, int(token))
            texts[slot] = text

    def copy(self, cache, pairs, count):
        assert pairs.shape == (len(cache.texts), 3)
        for source, target, length in pairs[:count].tolist():
            self.calls.append(("copy", source, target, length))
            cache.texts[target][:length] = cache.texts[source][:length]
        return cache

    def of(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def fake():
    return FakeSteps()


@pytest.fixture
def make_slots(fake, monkeypatch):
    """A callable: slots whose prompts run in pieces of 3 and 7, 14 tokens together."""
    monkeypatch.setattr(slots_module, "_pieces", lambda: _Pieces((3, 7), 14))

    def make(rows=ROWS, together=1) -> Slots:
        slots = Slots(fake.steps, rows, CAPACITY, together)
        slots.use(PARAMS)
        return slots

    return make


def assert_keys_are_those_of_the_text(slots: Slots) -> None:
    cache = slots.take_cache()
    for row, held in enumerate(slots.held):
        text = slots.text[row].tolist()
        made_from = [tuple(text[: slot + 1]) for slot in range(held)]
        assert cache.texts[row][:held] == made_from
    slots.put_cache(cache)


def put(slots, prompt, idle, share=True):
    """Returns where a prompt was put and what it shares, once it has been run."""
    placed = slots.place(prompt, idle, share)
    slots.fill(PARAMS)
    assert_keys_are_those_of_the_text(slots)
    return placed


# Where a prompt goes.


def test_all_but_the_last_token_is_run(fake, make_slots):
    slots = make_slots()
    assert put(slots, [7, 11, 13, 17], [2, 3]) == (2, 0)
    assert fake.of("prefill") == [({2: (0, [7, 11, 13])},)]
    assert slots.held.tolist() == [0, 0, 3, 0, 0]
    assert slots.text[2, :4].tolist() == [7, 11, 13, 17]


def test_a_prompt_of_one_token_runs_nothing(fake, make_slots):
    slots = make_slots()
    assert put(slots, [7], [1]) == (1, 0)
    assert fake.of("prefill") == []


def test_the_row_that_holds_most_of_a_prompt_keeps_it(fake, make_slots):
    slots = make_slots()
    for row, ids in enumerate([[1, 2, 9, 9], [1, 2, 3, 9], [9, 9, 9, 9], [1, 9]]):
        put(slots, ids, [row])
    before = len(fake.calls)
    assert put(slots, [1, 2, 3, 4, 5], [0, 1, 2, 3, 4]) == (1, 3)
    # However short, what is there already is kept.
    assert put(slots, [1, 2, 7, 8], [0, 2, 3, 4]) == (0, 2)
    assert fake.calls[before:] == [
        ("prefill", {1: (3, [4])}),
        ("prefill", {0: (2, [7])}),
    ]


def test_a_prompt_that_is_held_whole_runs_nothing(fake, make_slots):
    slots = make_slots()
    put(slots, [1, 2, 3, 4], [3])
    before = len(fake.calls)
    assert put(slots, [1, 2, 3, 9], [0, 3]) == (3, 3)
    assert put(slots, [1, 2, 9], [0, 3]) == (3, 2)
    assert fake.calls[before:] == []
    assert slots.held[3] == 2


def test_without_a_match_the_row_that_holds_least_is_taken(make_slots):
    slots = make_slots()
    for row, length in enumerate([4, 2, 5, 3, 6]):
        put(slots, [9] * length, [row])
    assert put(slots, [1, 2], [0, 2, 3]) == (3, 0)


def test_what_another_row_holds_is_copied(fake, make_slots):
    slots = make_slots()
    put(slots, [*SYSTEM, 1, 2], [0])
    before = len(fake.calls)
    assert put(slots, [*SYSTEM, 3, 4], [2, 4]) == (2, MIN_SHARED)
    assert fake.calls[before:] == [
        ("copy", 0, 2, MIN_SHARED),
        ("prefill", {2: (MIN_SHARED, [3])}),
    ]


def test_a_short_prefix_is_not_worth_a_copy(fake, make_slots):
    slots = make_slots()
    put(slots, [*SYSTEM[1:], 1, 2], [0])
    assert put(slots, [*SYSTEM[1:], 3, 4], [1]) == (1, 0)
    assert fake.of("copy") == []


def test_a_short_prompt_is_copied_where_that_is_all_there_is_to_run(fake, make_slots):
    slots = make_slots()
    put(slots, [1, 2, 3, 4], [0])
    assert put(slots, [1, 2, 3, 5], [1]) == (1, 3)
    assert put(slots, [1, 2, 9], [2]) == (2, 2)
    assert fake.of("copy") == [(0, 1, 3), (0, 2, 2)]
    assert len(fake.of("prefill")) == 1


def test_what_a_row_has_is_kept_where_another_has_no_more(fake, make_slots):
    slots = make_slots()
    for row in (0, 1):
        put(slots, [*SYSTEM, 1, 2], [row], share=False)
    assert put(slots, [*SYSTEM, 3, 4], [1]) == (1, MIN_SHARED)
    assert fake.of("copy") == []


def test_a_row_that_has_some_is_given_the_more_that_another_has(fake, make_slots):
    slots = make_slots()
    put(slots, [*SYSTEM, 1, 2, 3], [0])
    put(slots, [*SYSTEM[:5], 9, 9], [1])
    assert put(slots, [*SYSTEM, 1, 7, 8], [1, 2]) == (1, MIN_SHARED + 1)
    assert fake.of("copy") == [(0, 1, MIN_SHARED + 1)]


def test_nothing_is_shared_where_that_is_not_wanted(fake, make_slots):
    slots = make_slots()
    put(slots, [*SYSTEM, 1, 2], [0])
    assert put(slots, [*SYSTEM, 1, 2], [0, 1], share=False) == (1, 0)
    assert put(slots, [*SYSTEM, 1, 2], [0], share=False) == (0, 0)
    assert fake.of("copy") == []
    assert sum(
        len(ids) for (run,) in fake.of("prefill") for _, ids in run.values()
    ) == (3 * (MIN_SHARED + 1))


# Prompts that come together.


def test_the_common_part_of_prompts_is_run_once(fake, make_slots):
    slots = make_slots()
    tails = ([1, 2], [3, 4, 5], [6])
    idle = [0, 1, 2, 3, 4]
    placed = []
    for tail in tails:
        placed.append(slots.place([*SYSTEM, *tail], idle, True))
        idle.remove(placed[-1][0])
    assert placed == [(0, 0), (1, MIN_SHARED), (2, MIN_SHARED)]
    assert fake.of("copy") == fake.of("prefill") == []
    slots.fill(PARAMS)
    assert_keys_are_those_of_the_text(slots)
    assert fake.of("copy") == [(0, 1, MIN_SHARED), (0, 2, MIN_SHARED)]
    ran = [run for (run,) in fake.of("prefill")]
    assert sum(len(ids) for run in ran for _, ids in run.values()) == MIN_SHARED + 1 + 2
    # 7 + 7 + 3 tokens of the first, and then the two that waited for the sixteenth.
    assert ran == [
        {0: (0, SYSTEM[:7])},
        {0: (7, SYSTEM[7:14])},
        {0: (14, [*SYSTEM[14:], 1])},
        {1: (MIN_SHARED, [3, 4])},
    ]


def test_a_row_waits_for_one_that_waits_itself(fake, make_slots):
    slots = make_slots()
    middle = [200 + index for index in range(MIN_SHARED)]
    for row, prompt in enumerate(
        ([*SYSTEM, 1], [*SYSTEM, *middle, 2, 3], [*SYSTEM, *middle, 4, 5])
    ):
        assert slots.place(prompt, [row], True) == (row, row * MIN_SHARED)
    slots.fill(PARAMS)
    assert_keys_are_those_of_the_text(slots)
    assert fake.of("copy") == [(0, 1, MIN_SHARED), (1, 2, 2 * MIN_SHARED)]


def test_a_row_begins_once_its_source_has_what_it_shares(fake, make_slots):
    """The source has 24 more tokens to run, of which the other waits for two."""
    slots = make_slots()
    long = [300 + index for index in range(24)]
    slots.place([*SYSTEM, *long], [0], True)
    slots.place([*SYSTEM, 1, 2, 3], [1], True)
    slots.fill(PARAMS)
    assert_keys_are_those_of_the_text(slots)
    copied = fake.calls.index(("copy", 0, 1, MIN_SHARED))
    last = max(i for i, call in enumerate(fake.calls) if call[0] == "prefill")
    assert copied < last


def test_a_source_is_copied_before_another_prompt_takes_its_place(fake, make_slots):
    slots = make_slots()
    put(slots, [*SYSTEM, 1, 2], [0])
    assert slots.place([*SYSTEM, 3, 4], [1], True) == (1, MIN_SHARED)
    assert fake.of("copy") == [(0, 1, MIN_SHARED)]
    assert slots.place([9] * 20, [0], True) == (0, 0)
    slots.fill(PARAMS)
    assert_keys_are_those_of_the_text(slots)


def test_a_source_that_keeps_its_own_prefix_gives_it_away(fake, make_slots):
    """Row 0 goes on from what it holds; what row 1 wants of it is there already."""
    slots = make_slots()
    put(slots, [*SYSTEM, 1, 2], [0])
    assert slots.place([*SYSTEM, 3, 4, 5], [0, 1], True) == (0, MIN_SHARED)
    assert slots.place([*SYSTEM, 6, 7], [1], True) == (1, MIN_SHARED)
    slots.fill(PARAMS)
    assert_keys_are_those_of_the_text(slots)
    assert fake.of("copy") == [(0, 1, MIN_SHARED)]


def test_many_prompts_at_random(fake, make_slots, monkeypatch):
    """Few ids, short pieces and prefixes: all that can happen does, many times over."""
    monkeypatch.setattr(slots_module, "MIN_SHARED", 3)
    slots, rng = make_slots(), np.random.default_rng(0)
    wanted = shared = 0
    for _ in range(700):
        idle = rng.permutation(ROWS)[: rng.integers(1, ROWS + 1)].tolist()
        used = []
        for _ in range(rng.integers(1, len(idle) + 1)):
            prompt = rng.integers(0, 2, rng.integers(1, 30))
            row, found = slots.place(prompt.tolist(), idle, bool(rng.random() < 0.9))
            idle.remove(row)
            used.append(row)
            wanted += len(prompt) - 1
            shared += found
        slots.fill(PARAMS)
        assert_keys_are_those_of_the_text(slots)
        # Some rows go on by a few tokens, as a decode step does it.
        for row in used:
            start, count = slots.held[row], rng.integers(0, 4)
            ids = rng.integers(0, 2, count + 1)
            slots.text[row, start : start + count + 1] = ids
            cache = slots.take_cache()
            fake._write(cache.texts[row], int(start), ids[:count].tolist())
            slots.put_cache(cache)
            slots.held[row] += count
    ran = sum(len(ids) for (run,) in fake.of("prefill") for _, ids in run.values())
    assert ran == wanted - shared
    assert shared > 1000 < ran
    assert len(fake.of("copy")) > 100


@pytest.mark.parametrize("broken", ["copy", "common"])
def test_a_wrong_prefix_is_seen(make_slots, fake, monkeypatch, broken):
    if broken == "copy":
        fake.steps = fake.steps._replace(copy=lambda cache, *_: cache)
    else:
        common = slots_module._common_lengths
        monkeypatch.setattr(
            slots_module,
            "_common_lengths",
            lambda text, held, ids: np.minimum(common(text, held, ids) + 1, held),
        )
    slots = make_slots()
    put(slots, [*SYSTEM, 1, 2], [0])
    with pytest.raises(AssertionError):
        put(slots, [*SYSTEM, 3, 4], [1])


# Pieces.


@pytest.mark.parametrize(
    ("target", "pieces"),
    [
        (1, [(3, 1)]),
        (3, [(3, 3)]),
        (4, [(3, 3), (3, 1)]),
        (5, [(3, 3), (3, 2)]),
        (6, [(7, 6)]),
        (7, [(7, 7)]),
        (13, [(7, 7), (7, 6)]),
        (17, [(7, 7), (7, 7), (3, 3)]),
    ],
)
def test_a_prompt_runs_in_pieces_that_are_mostly_full(fake, make_slots, target, pieces):
    put(make_slots(), list(range(target + 1)), [1])
    ran = [run[1] for (run,) in fake.of("prefill")]
    sizes = [size for _, size in fake.shapes]
    lengths = [len(ids) for _, ids in ran]
    assert list(zip(sizes, lengths, strict=True)) == pieces
    assert [ids for _, piece in ran for ids in piece] == list(range(target))


def test_rows_run_in_the_group_that_is_fullest(fake, make_slots):
    """Four rows go together in pieces of 3, two in pieces of 7."""
    slots = make_slots()
    for row, target in enumerate((7, 2, 3, 1, 8)):
        slots.place([row] * (target + 1), [row], True)
    slots.fill(PARAMS)
    assert_keys_are_those_of_the_text(slots)
    ran = [
        {row: len(ids) for row, (_, ids) in run.items()}
        for (run,) in fake.of("prefill")
    ]
    assert ran == [{0: 7, 4: 7}, {1: 2, 2: 3, 3: 1, 4: 1}]
    assert fake.shapes == [(2, 7), (4, 3)]


def test_two_shapes_are_all_there_are(fake, make_slots):
    slots = make_slots()
    rng = np.random.default_rng(1)
    for _ in range(50):
        for row in range(rng.integers(1, ROWS + 1)):
            slots.place(rng.integers(0, 9, rng.integers(1, 40)).tolist(), [row], True)
        slots.fill(PARAMS)
    assert set(fake.shapes) == {(2, 7), (4, 3)}


@pytest.mark.parametrize(
    ("rows", "together", "shape"), [(2, 1, (2, 3)), (3, 1, (3, 3)), (11, 11, (11, 3))]
)
def test_a_group_of_all_rows_has_them_in_order(fake, make_slots, rows, together, shape):
    """Of few rows all go together; of a mesh they must."""
    slots = make_slots(rows, together)
    put(slots, [5, 7, 11], [1])
    assert fake.shapes == [shape]
    assert fake.of("prefill") == [({1: (0, [5, 7])},)]


# What is forgotten.


def test_the_same_parameters_keep_what_was_run(make_slots):
    slots = make_slots()
    put(slots, [1, 2, 3, 4], [0])
    slots.use({**PARAMS})
    assert slots.surviving(0) == 3
    assert slots.place([1, 2, 3, 9], [0, 1], True) == (0, 3)


@pytest.mark.parametrize(
    "other",
    [
        {"weight": jnp.arange(5.0)},
        {**PARAMS, "more": PARAMS["weight"]},
    ],
    ids=["equal", "more"],
)
def test_other_parameters_find_nothing(make_slots, other):
    slots = make_slots()
    put(slots, [1, 2, 3, 4], [0])
    slots.use(other)
    assert slots.held.tolist() == [0] * ROWS
    assert slots.place([1, 2, 3, 9], [0, 1], True)[1] == 0


def test_parameters_are_not_kept_alive(make_slots):
    slots = make_slots()
    put(slots, [1, 2, 3, 4], [0])
    slots.use({"weight": jnp.arange(5.0)})
    (leaf,) = slots._leaves
    assert leaf() is None


@pytest.mark.parametrize("lost", ["taken", "deleted"])
def test_a_lost_cache_is_made_anew(fake, make_slots, lost):
    slots = make_slots()
    put(slots, [1, 2, 3, 4], [0])
    cache = slots.take_cache()
    if lost == "deleted":
        cache.deleted = True
        slots.put_cache(cache)
    assert slots.surviving(0) == 0
    slots.use(PARAMS)
    assert fake.of("new_cache") == [(ROWS, CAPACITY)] * 2
    assert put(slots, [1, 2, 3, 9], [0]) == (0, 0)


def test_what_was_placed_and_not_run_is_dropped(fake, make_slots):
    """A run that ends between the two is followed by one with other parameters."""
    slots = make_slots()
    slots.place([1, 2, 3, 4], [0], True)
    slots.use({"weight": jnp.arange(3.0)})
    slots.fill(PARAMS)
    assert fake.of("prefill") == []
    assert slots.held.tolist() == [0] * ROWS


def interrupted_at(call, function):
    """Returns the function, of which one call is broken off before it begins."""
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args)

    return interrupted


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_prompt_broken_off_between_its_pieces_is_not_taken_for_run(
    make_slots, monkeypatch, call
):
    """As Ctrl-C does it: the cache is there, and the same parameters come again."""
    slots, prompt = make_slots(), [*SYSTEM, 1, 2, 3]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(slots, "_prefill", interrupted_at(call, slots._prefill))
        put(slots, prompt, [0])
    slots.use(PARAMS)
    assert_keys_are_those_of_the_text(slots)
    assert slots.surviving(0) == 7 * (call - 1)
    put(slots, prompt, [0])
    put(slots, prompt, [1])


def test_a_copy_after_which_all_ends_is_not_taken_for_the_text_before(
    make_slots, monkeypatch
):
    """The row held a text of its own, over which the prefix was copied."""
    slots = make_slots()
    put(slots, [*SYSTEM, 1, 2], [0])
    put(slots, [9] * 30, [1])
    copy = slots._copy

    def interrupted(*args):
        copy(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(slots, "_copy", interrupted)
        put(slots, [*SYSTEM, 3, 4], [1])
    slots.use(PARAMS)
    assert_keys_are_those_of_the_text(slots)
    put(slots, [9] * 30, [1])


# Room.


@pytest.fixture
def real_slots(make_config):
    """Slots of a real cache, whose steps only make it."""
    config = make_config(num_hidden_layers=1)

    def new_cache(rows, capacity):
        return empty_cache(config, rows, capacity)

    steps = Steps(new_cache, None, None, None, lambda: 0)
    slots = Slots(steps, 3, 7, 1)
    slots.use(PARAMS)
    return slots


def test_growing_keeps_texts_and_keys(real_slots):
    slots = real_slots
    slots.text[1, :7] = range(10, 17)
    slots.held[1] = 6
    cache = slots.take_cache()
    slots.put_cache(jax.tree.map(lambda x: x + 2, cache))
    slots.grow(13)
    assert slots.capacity == 13
    assert slots.surviving(1) == 6
    assert slots.text.shape == (3, 13)
    assert slots.text[1].tolist() == [*range(10, 17), *[0] * 6]
    keys = jax.tree.leaves(slots.take_cache().keys)[0]
    assert keys.shape[-2] == 13
    assert np.all(keys[..., :7, :] == 2) and np.all(keys[..., 7:, :] == 0)


@pytest.mark.parametrize("capacity", [5, 7])
def test_a_shorter_capacity_changes_nothing(real_slots, capacity):
    cache = real_slots._cache
    real_slots.grow(capacity)
    assert real_slots.capacity == 7 and real_slots._cache is cache


def test_a_lost_cache_grows_when_it_is_made_anew(real_slots):
    real_slots.held[1] = 6
    real_slots.take_cache()
    real_slots.grow(13)
    assert real_slots.surviving(1) == 0
    real_slots.use(PARAMS)
    assert real_slots._cache.capacity == 13
    assert real_slots.held.tolist() == [0, 0, 0]
