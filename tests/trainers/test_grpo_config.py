"""What GRPO can't be told: each wrong value in one line that names it."""

import math
from pathlib import Path

import pytest

from relax.config import load_config, to_dataclass
from relax.sampling import SamplingConfig
from relax.trainers.grpo_config import GRPOConfig, check_unbiased

DEFAULTS = load_config(Path(__file__).parents[2] / "conf/trainer/grpo.yaml")
DEFAULTS.pop("defaults")


def config(**fields) -> GRPOConfig:
    """Through the boundary that every composed config passes."""
    return to_dataclass(GRPOConfig, {**DEFAULTS, **fields}, "trainer")


def test_what_is_derived():
    made = config(
        batch_size=12,
        num_generations=4,
        steps_per_generation=3,
        num_iterations=5,
        rewards=["ends", "format"],
        outcome_reward="format",
    )
    assert (made.rows_per_rollout, made.steps_per_rollout) == (36, 15)
    assert made.outcome_index == 1
    assert config(rewards=["ends", "format"]).outcome_index == 0
    assert made.policy_options.loss_type == "dapo"
    assert made.rewards == ("ends", "format")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_generations": 1},
            r"trainer\.num_generations=1 must be at least 2 with trainer\.scale_rewards"
            r"=group: a group of one has no spread",
        ),
        (
            {"batch_size": 12, "steps_per_generation": 3},
            r"trainer\.batch_size x trainer\.steps_per_generation = 36 must be a "
            r"multiple of trainer\.num_generations=8",
        ),
        (
            {"beta": 0.1},
            r"trainer\.beta=0\.1 and trainer\.reference=none: a KL penalty needs a "
            r"reference \(frozen, base or synced\), and a reference a beta above 0",
        ),
        (
            {"reference": "frozen"},
            r"trainer\.beta=0\.0 and trainer\.reference=frozen: ",
        ),
        (
            {"reference": "moving"},
            r"trainer\.reference='moving' is unknown; choose one",
        ),
        ({"beta": -0.1}, r"trainer\.beta=-0\.1 must be at least 0"),
        (
            {"loss_type": "ppo"},
            r"trainer\.loss_type='ppo' is unknown; choose one of gr",
        ),
        (
            {"importance_sampling_level": "word"},
            r"trainer\.importance_sampling_level='word' is unknown; choose one",
        ),
        ({"kl_estimator": "k4"}, r"trainer\.kl_estimator='k4' is unknown; choose one "),
        ({"scale_rewards": "all"}, r"trainer\.scale_rewards='all' is unknown; choose "),
        *(
            ({name: math.inf}, rf"trainer\.{name}=inf must be finite; give a number")
            for name in ("entropy_coef", "beta", "epsilon", "epsilon_high")
        ),
        ({"delta": math.inf}, r"trainer\.delta=inf must be finite; set it to null"),
        (
            {"mismatch_mean": math.inf},
            r"trainer\.mismatch_mean=inf must be finite; give a number of at least 0",
        ),
        (
            {"rewards": ["ends", "format"], "reward_weights": [0.0, 0.0]},
            r"trainer\.reward_weights=\[0\.0, 0\.0\] leaves no reward that counts; ",
        ),
        ({"rewards": []}, r"trainer\.rewards=\[\] names no reward"),
        (
            {"rewards": ["exact_match"], "outcome_reward": "ends"},
            r"trainer\.outcome_reward='ends' is none of trainer\.rewards="
            r"\['exact_match'\]",
        ),
        ({"steps_per_dispatch": 5}, r"trainer\.steps_per_dispatch=5 must be 1 in grpo"),
        ({"ref_mixup": 1.5}, r"trainer\.ref_mixup=1\.5 must lie in \[0, 1\]"),
        ({"num_iterations": 0}, r"trainer\.num_iterations=0 must be at least 1"),
        ({"mismatch_max": -1.0}, r"trainer\.mismatch_max=-1\.0 must be at least 0"),
        ({"epsilon": -0.2}, r"trainer\.epsilon=-0\.2 must be at least 0"),
        ({"delta": 1.1}, r"trainer\.delta=1\.1 must be above 1 \+ epsilon_high = 1\.2"),
        (
            {"top_entropy_quantile": 1.5},
            r"trainer\.top_entropy_quantile=1\.5 must be in \[0, 1\] \(1 is off\)",
        ),
        ({"rewards": "exact_match"}, r"trainer\.rewards: .*"),
        (
            {"batch_size": 10, "accumulation": 4},
            r"trainer\.batch_size=10 must be a mul",
        ),
    ],
)
def test_a_wrong_value_is_named(fields, message):
    with pytest.raises(ValueError, match=message) as raised:
        config(**fields)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("scale", ["batch", "none"])
def test_a_group_of_one_learns_nothing_and_is_told_so(scale, caplog):
    assert config(num_generations=1, scale_rewards=scale).num_generations == 1
    (told,) = caplog.messages
    assert told == (
        "trainer.num_generations=1 compares a completion with itself: with "
        f"trainer.scale_rewards={scale} all advantages are 0, and rewards teach "
        "nothing; set trainer.num_generations=2 or more"
    )


def test_what_the_loss_knows_may_be_set():
    known = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}
    assert check_unbiased(SamplingConfig(typical_p=0.9, **known)) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", 1.1),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("no_repeat_ngram_size", 3),
        ("min_new_tokens", 1),
        ("logit_bias", {5: 1.0}),
        ("constraint", "digits"),
        ("ignore_eos", True),
    ],
)
def test_what_would_bias_the_ratio_is_refused(field, value):
    with pytest.raises(
        ValueError, match=rf"^sampling\.{field}=.* would bias the ratio"
    ):
        check_unbiased(SamplingConfig(**{field: value}))


def test_a_search_or_the_likeliest_token_is_no_sample():
    with pytest.raises(ValueError, match=r"^sampling\.temperature=0 makes all"):
        check_unbiased(SamplingConfig(temperature=0.0, num_beams=4))
    with pytest.raises(ValueError, match=r"^sampling\.constraint=choices would bias"):
        check_unbiased(SamplingConfig(constraint="choices", choices=("a", "b")))
