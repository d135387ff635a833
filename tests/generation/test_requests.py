"""Settings that a model can't follow."""

import pytest

from relax.generation.requests import check_ids
from relax.sampling import SamplingConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"logit_bias": {3: 1.0, 11: 1.0}},
            "sampling.logit_bias has the id 11; .* 11 ",
        ),
        ({"stop_token_ids": [13]}, "sampling.stop_token_ids has the id 13; .* 0 to 10"),
        ({"num_top_logprobs": 12}, "sampling.num_top_logprobs=12 must be at most 11"),
    ],
)
def test_ids_that_a_model_does_not_choose_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        check_ids(SamplingConfig(**fields), 11)


def test_the_last_id_of_a_model_is_one():
    fields = {"logit_bias": {10: 1.0}, "stop_token_ids": [10], "num_top_logprobs": 11}
    check_ids(SamplingConfig(**fields), 11)
