"""ReLax: a research toolkit for Llama-family language models in JAX.

Axis letters, used in every shape of this package:

    B batch            T query length     S key length       L layers
    D model width      N query heads      K key/value heads  G = N / K
    H head width       F feed-forward     V vocabulary       C chunk

Words: `tokens` are ids; `logprobs` are log-probabilities of chosen tokens in nats;
`positions` feed RoPE; `segment_ids` separate packed documents; `loss_mask` weighs
targets; `cache` holds keys and values; `key` is a PRNG key.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relax.build import load
    from relax.language_model import LanguageModel
    from relax.sampling import SamplingConfig

__all__ = ["LanguageModel", "SamplingConfig", "load"]

_MODULES = {
    "LanguageModel": "relax.language_model",
    "SamplingConfig": "relax.sampling",
    "load": "relax.build",
}


def __getattr__(name: str) -> Any:
    """Returns a name of the public API, imported when it is first asked for.

    A process that needs one room alone, as the workers of relax.rewards do, is thus
    spared JAX.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
