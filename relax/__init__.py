"""ReLax: a research toolkit for Llama-family language models in JAX.

Axis letters, used in every shape of this package:

    B batch            T query length     S key length       L layers
    D model width      N query heads      K key/value heads  G = N / K
    H head width       F feed-forward     V vocabulary       C chunk

Words: `tokens` are ids; `logprobs` are log-probabilities of chosen tokens in nats;
`positions` feed RoPE; `segment_ids` separate packed documents; `loss_mask` weighs
targets; `cache` holds keys and values; `key` is a PRNG key.
"""

from relax.build import load
from relax.language_model import LanguageModel
from relax.sampling import SamplingConfig

__all__ = ["LanguageModel", "SamplingConfig", "load"]
