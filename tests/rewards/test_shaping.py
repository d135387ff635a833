"""Form and length, by hand."""

import pytest

from relax.rewards import REWARDS, Sample


def score(name, completion="", answer=None, num_tokens=3, limit=7, finished=True):
    sample = Sample("", completion, answer, {}, num_tokens, limit, finished)
    return REWARDS[name](sample)


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("46", "46", 1),
        (" 46\n", "46 ", 1),
        ("46.", "46", 0),
        ("", "", 1),
        ("Paris", "paris", 0),
        ("46", None, None),
    ],
)
def test_exact_match(completion, answer, reward):
    assert score("exact_match", completion, answer) == reward


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>a\nb</think>\n<answer>c</answer>", 1),
        ("\n<think></think><answer></answer> ", 1),
        ("<think>a</think> so <answer>c</answer>", 0),
        ("<think>a</think><answer>c</answer>.", 0),
        ("Well, <think>a</think><answer>c</answer>", 0),
        ("<answer>c</answer><think>a</think>", 0),
        ("<think>a</think><think>b</think><answer>c</answer>", 0),
        ("<think>a<answer>b</answer></think><answer>c</answer>", 0),
        ("<think>a</think><answer>c</answer><answer>d</answer>", 0),
        ("<think>a</think><answer>c", 0),
        ("c", 0),
        ("", 0),
    ],
)
def test_format(completion, reward):
    assert score("format", completion) == reward


def test_format_of_many_tags_takes_no_time():
    """Each could begin or end a group: two of them make a square."""
    pairs = "</think><answer></answer>" * 20_000
    assert score("format", f"<think>{pairs}x") == 0


def test_ends():
    assert score("ends", finished=True) == 1
    assert score("ends", finished=False) == 0


@pytest.mark.parametrize(("num_tokens", "reward"), [(0, 1), (5, 0.75), (20, 0)])
def test_length(num_tokens, reward):
    assert score("length", num_tokens=num_tokens, limit=20) == reward


# DAPO's own: L_max 20,480 and L_cache 4,096, so that nothing is lost up to 16,384.
@pytest.mark.parametrize(
    ("num_tokens", "reward"),
    [
        (1, 0),
        (16_384, 0),
        (17_408, -0.25),
        (18_432, -0.5),
        (20_480, -1),
        (20_481, -1),
    ],
)
def test_overlong(num_tokens, reward):
    assert score("overlong", num_tokens=num_tokens, limit=20_480) == reward
    assert str(score("overlong", num_tokens=1)) == "0.0"
