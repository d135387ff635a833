"""Rows of a cache, what text each of them holds, and how new texts get into them."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from relax.generation.decode import Steps
from relax.model.cache import Cache, grown
from relax.model.parameters import Params


class _Pieces(NamedTuple):
    """Prompts are run in pieces of these sizes, and so many tokens at a time."""

    sizes: tuple[int, ...]
    together: int


# On two CPU cores pieces of 512 are a sixth slower than of 128, which stay in its
# caches; few rows at a time leave few empty places among the last ones.
PIECES = {"cpu": _Pieces((32, 128), 128)}
PIECES_ELSEWHERE = _Pieces((64, 512), 4096)
# A shorter prefix is not worth a copy, unless nothing else is to be run.
MIN_SHARED = 16


class Slots:
    """A cache of B rows, and the text that each of them holds.

    text `[B, S]`: as far as `held` `[B]` its keys and values are in the cache, or will
    be when `fill` has been called. The cache belongs to one set of parameters.
    """

    def __init__(self, steps: Steps, rows: int, capacity: int, together: int):
        """`together`: rows that are run at a time at least (of a mesh)."""
        self._steps = steps
        self._cache: Cache | None = steps.new_cache(rows, capacity)
        self._leaves: list[weakref.ref] = []
        self._together = together
        self._fills: dict[int, _Fill] = {}
        self._last: tuple[Sequence[int], np.ndarray] | None = None
        self.capacity = capacity
        self.text = np.zeros((rows, capacity), np.int32)
        self.held = np.zeros(rows, np.int64)

    @property
    def rows(self) -> int:
        """B, how many texts it holds at a time."""
        return len(self.held)

    def use(self, params: Params) -> None:
        """Forgets all texts that were not run with these parameters, or are lost.

        A dispatch that failed has used the cache up.
        """
        if self._is_lost():
            self._cache = self._steps.new_cache(self.rows, self.capacity)
            self.held[:] = 0
        leaves = jax.tree.leaves(params)
        self._cache = _on_mesh_of(self._cache, leaves)
        self._last = None
        if not _same_arrays(self._leaves, leaves):
            self.held[:] = 0
            self._leaves = [weakref.ref(leaf) for leaf in leaves]
        for row, fill in self._fills.items():  # broken off
            self.held[row] = min(self.held[row], fill.done)
        self._fills.clear()

    def surviving(self, row: int) -> int:
        """Returns how many tokens of a row are still held."""
        return 0 if self._is_lost() else int(self.held[row])

    def take_cache(self) -> Cache:
        """Returns the cache, which the caller uses up and gives back by `put_cache`."""
        cache, self._cache = self._cache, None
        return cache

    def put_cache(self, cache: Cache) -> None:
        """Takes back what a step returned."""
        self._cache = cache

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` tokens a row; a shorter cache stays as long."""
        if capacity <= self.capacity:
            return
        more = ((0, 0), (0, capacity - self.capacity))
        if not self._is_lost():
            self._cache = grown(self.take_cache(), capacity)
        self.text = np.pad(self.text, more)
        self.capacity = capacity

    def place(
        self, prompt: Sequence[int], idle: Sequence[int], share: bool
    ) -> tuple[int, int]:
        """Puts a prompt into an idle row; returns it and how much it need not run.

        All of the prompt but its last token, which is run as a decode step and gives
        the first logits, is to be in the cache. What another row holds of it is copied,
        the row's own is kept.
        """
        target = len(prompt) - 1
        own = self._common(prompt) if share else np.zeros_like(self.held)
        # The row that keeps most, else the one that holds least.
        rows = np.asarray(idle)
        rows = rows[own[rows] == own[rows].max()]
        row = int(rows[np.argmin(self.held[rows])])
        source, done = int(np.argmax(own)), int(own[row])
        # Of another row, what is worth a copy.
        most = int(own[source])
        shared = most if most >= MIN_SHARED or most == target else done
        # What is broken off leaves in `held` what is there.
        self.held[row] = done
        if done < shared and source not in self._fills:
            # At once: the next prompt may be put into the source.
            self._copy([(source, row, shared)])
            done = shared
        self.text[row, : len(prompt)] = prompt
        self._fills[row] = _Fill(done, target, source, shared)
        self.held[row] = target
        own[row] = target
        self._last = (prompt, own) if share else None
        return row, shared

    def _common(self, prompt: Sequence[int]) -> np.ndarray:
        """Returns how many tokens of a prompt but its last one each row holds `[B]`."""
        if self._last is not None and self._last[0] == prompt:
            return self._last[1]  # copies of a prompt come one after another
        return _common_lengths(self.text, self.held, np.asarray(prompt[:-1], np.int32))

    def fill(self, params: Params) -> None:
        """Runs what `place` has put into rows; what they share waits for its source."""
        self._last = None
        while self._fills:
            self._copy_shared()
            self._fills = {r: f for r, f in self._fills.items() if f.done < f.target}
            ready = [r for r, fill in self._fills.items() if fill.done >= fill.shared]
            if ready:
                self._prefill(params, ready)

    def _is_lost(self) -> bool:
        cache = self._cache
        return cache is None or any(x.is_deleted() for x in jax.tree.leaves(cache))

    def _copy_shared(self) -> None:
        """Copies to the rows that wait what their sources have by now."""
        fills = {}
        for row, fill in self._fills.items():
            done = fills[fill.source].done if fill.source in fills else None
            done = self._done(fill.source) if done is None else done
            if fill.done < fill.shared <= done:
                fills[row] = fill._replace(done=fill.shared)
        if fills:
            self._copy([(fill.source, row, fill.shared) for row, fill in fills.items()])
            self._fills |= fills

    def _copy(self, copies: list[tuple[int, int, int]]) -> None:
        """Copies first slots: from a source, to a target, so many of them."""
        pairs = np.zeros((self.rows, 3), np.int32)
        pairs[: len(copies)] = copies
        self.put_cache(self._steps.copy(self.take_cache(), pairs, len(copies)))

    def _done(self, row: int) -> int:
        fill = self._fills.get(row)
        return int(self.held[row]) if fill is None else fill.done

    def _prefill(self, params: Params, ready: list[int]) -> None:
        """Runs the next piece of some rows."""
        by_size: dict[int, list[int]] = {}
        for row in ready:
            fill = self._fills[row]
            by_size.setdefault(_piece(fill.target - fill.done), []).append(row)
        # The fullest group: others may become as full by waiting.
        size = max(by_size, key=lambda n: (len(by_size[n]) / self._group(n), n))
        group = self._group(size)
        chosen = by_size[size][:group]
        whole = group == self.rows
        # A row that the cache does not have stands for none.
        rows = np.arange(group) if whole else np.full(group, self.rows)
        places = chosen if whole else range(len(chosen))
        tokens = np.zeros((group, size), np.int32)
        starts, lengths = np.zeros((2, group), np.int32)
        for place, row in zip(places, chosen, strict=False):
            fill = self._fills[row]
            count = min(size, fill.target - fill.done)
            rows[place], starts[place], lengths[place] = row, fill.done, count
            tokens[place, :count] = self.text[row, fill.done : fill.done + count]
        args = (tokens, rows.astype(np.int32), starts, lengths)
        self.put_cache(self._steps.prefill(params, self.take_cache(), *args))
        for place, row in zip(places, chosen, strict=False):
            fill = self._fills[row]
            self._fills[row] = fill._replace(done=fill.done + int(lengths[place]))

    def _group(self, size: int) -> int:
        """Returns how many rows are run together in pieces of a size."""
        return min(self.rows, max(1, _pieces().together // size, self._together))


class _Fill(NamedTuple):
    """A row on its way to hold `target` tokens, of which `done` are in the cache.

    The first `shared` are copied from the row `source` when that has them.
    """

    done: int
    target: int
    source: int
    shared: int


def _pieces() -> _Pieces:
    return PIECES.get(jax.default_backend(), PIECES_ELSEWHERE)


def _piece(count: int) -> int:
    """Returns the size of the piece to run next: the largest that is mostly filled."""
    sizes = _pieces().sizes
    return max((n for n in sizes if 4 * count > 3 * n), default=sizes[0])


def _common_lengths(text: np.ndarray, held: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns how many ids each row begins with as `ids` does `[B]`."""
    other = np.ones((len(text), len(ids) + 1), bool)
    np.not_equal(text[:, : len(ids)], ids, out=other[:, :-1])
    return np.minimum(np.argmax(other, axis=1), held)


def _on_mesh_of(cache: Cache, leaves: list) -> Cache:
    """Returns the cache as a step with these parameters gives it back.

    A mesh of one device is part of an array's type: without it each step would be
    compiled once for the new cache and again for its own.
    """
    sharding = getattr(leaves[0], "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size > 1:
        return cache
    return jax.device_put(cache, NamedSharding(sharding.mesh, PartitionSpec()))


def _same_arrays(known: list[weakref.ref], leaves: list) -> bool:
    return len(known) == len(leaves) and all(
        ref() is leaf for ref, leaf in zip(known, leaves, strict=True)
    )
