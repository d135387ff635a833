"""Rewards for what a completion looks like, whatever its task."""

import re

from relax.rewards.samples import Sample

_FORMAT = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")
_TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
# DAPO's L_cache / L_max: 4,096 of 20,480 tokens.
_BUFFER = 0.2


def exact_match(sample: Sample) -> float | None:
    """Returns 1 where the completion is the answer, whitespace around both aside."""
    if sample.answer is None:
        return None
    return float(sample.completion.strip() == sample.answer.strip())


def think_answer(sample: Sample) -> float:
    """Returns 1 for `<think>..</think> <answer>..</answer>` alone, each tag once."""
    # Counted first: with each tag there once, the pattern has one way to match.
    tags = _TAG.findall(sample.completion)
    return float(tags == _TAGS and bool(_FORMAT.fullmatch(sample.completion)))


def ends(sample: Sample) -> float:
    """Returns 1 where the completion ended by itself."""
    return float(sample.finished)


def length(sample: Sample) -> float:
    """Returns 1 for no token and less for each, down to 0 for max_new_tokens."""
    return 1 - sample.num_tokens / sample.max_new_tokens


def overlong(sample: Sample) -> float:
    """Returns 0, and towards -1 over the last fifth of max_new_tokens.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), with its ratio of the
    buffer to the longest length.
    """
    buffer = _BUFFER * sample.max_new_tokens
    expected = sample.max_new_tokens - buffer
    return max(min((expected - sample.num_tokens) / buffer, 0.0), -1.0)
