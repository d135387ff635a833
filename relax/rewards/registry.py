"""Rewards by name."""

import importlib
import os
import sys

from relax.rewards import expressions, numeric, shaping
from relax.rewards.samples import Reward

REWARDS: dict[str, Reward] = {
    "exact_match": shaping.exact_match,
    "numeric_answer": numeric.numeric_answer,
    "last_number": numeric.last_number,
    "arithmetic": expressions.arithmetic,
    "countdown": expressions.countdown,
    "format": shaping.think_answer,
    "ends": shaping.ends,
    "length": shaping.length,
    "overlong": shaping.overlong,
}

NEEDS_ANSWER = ("exact_match", "numeric_answer", "last_number")  # in the record


def find_reward(name: str, option: str = "trainer.rewards") -> Reward:
    """Returns one of REWARDS, or the function that `module:function` names.

    A module is also looked for in the working directory. Raises ValueError that lists
    the names, or says what is wrong with the module, and names the `option`.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon:
        if name not in REWARDS:
            raise ValueError(
                f"{option}={name} is unknown; choose among "
                f"{', '.join(REWARDS)}, or name a function of yours as module:function"
            )
        return REWARDS[name]
    function = getattr(_import(module_name, f"{option}={name}"), function_name, None)
    if not callable(function):
        raise ValueError(
            f"{option}={name}: {module_name} has no function {function_name!r}"
        )
    return function


def _import(module_name: str, given: str):
    """Returns the module; imported with the working directory last on the path."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    # A module of the user's may raise anything; SystemExit is no Exception.
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{given}: {module_name!r} can't be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
