"""What may be said: from the text so far to the ids that may follow.

A constraint is a function of a `TextState` of B rows that returns bool `[B, V]`, V
being `num_columns`, the padded vocabulary. It is traced, so that it computes with
jax.numpy alone, and it is a static part of compiled programs, which know it by
identity: the functions here give the same object for the same arguments. Where a
constraint and the other settings leave a row nothing at all, its stop ids are allowed,
so that the row ends there.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from relax.sampling import SamplingConfig, TextState
from relax.text.base import Tokenizer

Constraint = Callable[[TextState], Bool[Array, "B V"]]

# Each one kept holds a program's constants, and its tokenizer.
KEPT = 64


def make_constraint(
    sampling: SamplingConfig,
    tokenizer: Tokenizer | None,
    stop_ids: Sequence[int],
    num_columns: int,
) -> Constraint | None:
    """Returns the constraint that `sampling` names, None where it names none.

    "module:function" is called with (tokenizer, stop_ids, num_columns) and returns the
    constraint. Raises ValueError for a module or function that is not there, and where
    digits or choices can't be said in the tokenizer's ids.
    """
    if sampling.constraint is None:
        return None
    stop_ids = tuple(stop_ids)
    if sampling.constraint not in ("digits", "choices"):
        return _imported(sampling.constraint, tokenizer, stop_ids, num_columns)
    if tokenizer is None:
        raise ValueError(
            f"sampling.constraint={sampling.constraint} needs a tokenizer, which this "
            "model lacks; set sampling.constraint=null"
        )
    if sampling.constraint == "digits":
        return digits_only(tokenizer, stop_ids, num_columns)
    if not stop_ids:
        raise ValueError(
            "sampling.constraint=choices needs an id that ends a completion, which "
            "this model lacks; set sampling.stop_token_ids"
        )
    choices = tuple(_spelled(choice, tokenizer) for choice in sampling.choices)
    return one_of(choices, stop_ids, num_columns)


@lru_cache(KEPT)
def digits_only(
    tokenizer: Tokenizer, stop_ids: tuple[int, ...], num_columns: int
) -> Constraint:
    """Returns the constraint to the digits 0 to 9, at least one token of them.

    A digit with a space before it is none. A stop id may follow the first token.
    Raises ValueError where the tokenizer has no token of digits.
    """
    ids = range(min(tokenizer.vocab_size, num_columns))
    digits = [i for i in ids if tokenizer.token_bytes(i).isdigit()]
    if not digits:
        raise ValueError(
            "sampling.constraint=digits: the tokenizer has no token of digits alone; "
            "set sampling.constraint=null"
        )
    digits, stops = _marks(digits, num_columns), _marks(stop_ids, num_columns)

    def constraint(state: TextState) -> Bool[Array, "B V"]:
        begun = state.lengths > state.prompt_lengths
        return digits | (begun[:, None] & stops)

    return constraint


@lru_cache(KEPT)
def one_of(
    choices: tuple[tuple[int, ...], ...], stop_ids: tuple[int, ...], num_columns: int
) -> Constraint:
    """Returns the constraint to exactly one of the choices, and a stop id after it.

    One choice may begin as another, or be all of its beginning.
    """
    stops = _marks(stop_ids, num_columns)
    counts = np.array([len(choice) for choice in choices])
    width = counts.max() + 1
    table = np.full((len(choices), width), num_columns)
    for row, choice in zip(table, choices, strict=True):
        row[: len(choice)] = choice

    def constraint(state: TextState) -> Bool[Array, "B V"]:
        made = state.lengths - state.prompt_lengths
        slots = state.prompt_lengths[:, None] + np.arange(width)
        # Slots that there are not come later than all that was made.
        text = jnp.take_along_axis(state.text, slots, axis=1)
        later = np.arange(width) >= made[:, None]
        agrees = (text[:, None] == table) | later[:, None]
        fits = jnp.all(agrees, axis=-1) & (made[:, None] <= counts)
        # What follows a whole choice stands in a column that there is not.
        following = jnp.asarray(table).T[jnp.minimum(made, width - 1)]
        following = jnp.where(fits, following, num_columns)
        rows = jnp.arange(made.shape[0])[:, None]
        allowed = jnp.zeros((made.shape[0], num_columns), bool)
        allowed = allowed.at[rows, following].set(True, mode="drop")
        whole = jnp.any(fits & (made[:, None] == counts), axis=1)
        return allowed | (whole[:, None] & stops)

    return constraint


@lru_cache(KEPT)
def _imported(
    name: str, tokenizer: Tokenizer | None, stop_ids: tuple[int, ...], num_columns: int
) -> Constraint:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"sampling.constraint={name}: {module_name} can't be imported ({error}); "
            "give a module that Python finds (PYTHONPATH), then :function"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(
            f"sampling.constraint={name}: {module_name} has no function {function_name}"
        )
    try:
        constraint = function(tokenizer, stop_ids, num_columns)
    except Exception as error:
        raise ValueError(
            f"sampling.constraint={name} failed, called with the tokenizer, the stop "
            f"ids and {num_columns}: {type(error).__name__}: {error}"
        ) from error
    if not callable(constraint):
        raise ValueError(
            f"sampling.constraint={name} gave {constraint!r}; it must return a "
            "function of a TextState"
        )

    def checked(state: TextState) -> Bool[Array, "B V"]:
        allowed = constraint(state)
        expected = (state.text.shape[0], num_columns)
        if allowed.shape != expected or allowed.dtype != bool:
            raise ValueError(
                f"sampling.constraint={name} gave {allowed.dtype}{list(allowed.shape)};"
                f" it must give bool{list(expected)}, a mark for each id of each row"
            )
        return allowed

    return checked


def _spelled(choice: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids of a choice as they go on a text.

    That is without the space which some tokenizers put before a text of its own. Raises
    ValueError where the ids stand for another text.
    """
    ids = tokenizer.encode(choice, inside=True)
    spelled = b"".join(map(tokenizer.token_bytes, ids))
    if spelled != choice.encode():
        raise ValueError(
            f"sampling.choices holds {choice!r}, which the tokenizer turns into "
            f"{spelled.decode(errors='replace')!r}; give texts that it keeps"
        )
    return tuple(ids)


def _marks(ids: Sequence[int], num_columns: int) -> np.ndarray:
    """Returns bool `[V]`, true at the ids."""
    return np.isin(np.arange(num_columns), list(ids))
