"""The trained model that a new run starts from, and what a config may change of it."""

from dataclasses import asdict, replace

import pytest

from relax.base_model import trained_on


@pytest.fixture(scope="module")
def base(make_config):
    return make_config(max_position_embeddings=37)


@pytest.fixture(scope="module")
def wanted(make_config):
    """What a config says of another model, and of how it is trained."""
    return make_config(
        hidden_size=36,
        num_hidden_layers=1,
        max_position_embeddings=59,
        rope_theta=5.0,
        lora_rank=3,
        lora_targets=("q_proj",),
        dropout=0.1,
        remat="full",
    )


def changes(base, model) -> dict:
    """Returns what is other than in the base."""
    values = asdict(base)
    return {k: v for k, v in asdict(model).items() if v != values[k]}


TRAINED = {"lora_rank": 3, "lora_targets": ("q_proj",), "dropout": 0.1, "remat": "full"}


def test_a_config_says_how_a_model_is_trained_and_not_what_it_is(base, wanted):
    model = trained_on(base, wanted, {}, "there")
    assert changes(base, model) == TRAINED


def test_what_the_user_gives_is_heard_where_the_parameters_fit(base, wanted):
    given = {
        "model.max_position_embeddings": 59,
        "+model.rope_theta": 5.0,
        "model.lora_rank": 3,
        "optimizer.weight_decay": 0.0,
    }
    model = trained_on(base, wanted, given, "there")
    assert changes(base, model) == {
        "max_position_embeddings": 59,
        "rope_theta": 5.0,
        **TRAINED,
    }


def test_other_parameters_are_refused(base, wanted):
    given = {"model.max_position_embeddings": 59, "model.hidden_size": 36}
    with pytest.raises(ValueError) as raised:
        trained_on(base, wanted, given, "there")
    assert str(raised.value) == (
        "model.hidden_size=36: the parameters of init=there fit hidden_size="
        f"{base.hidden_size} alone; leave it out"
    )


def test_another_vocabulary_is_refused_though_its_table_is_as_long(base):
    wanted = replace(base, vocab_size=base.vocab_size - 1)
    assert wanted.padded_vocab_size == base.padded_vocab_size
    with pytest.raises(ValueError, match=r"^model\.vocab_size=\d+: the parameters of "):
        trained_on(base, wanted, {"model.vocab_size": wanted.vocab_size}, "there")


def test_a_whole_model_is_refused_unless_it_is_the_same(base, wanted):
    with pytest.raises(ValueError) as raised:
        trained_on(base, wanted, {"model": "tiny"}, "there")
    assert str(raised.value) == (
        "model=tiny: init=there brings its own model, whose hidden_size is "
        f"{base.hidden_size} and not 36; leave model out, or give single values of it "
        "(model.lora_rank=8)"
    )
    same = replace(base, vocab_size=None, remat="full")
    assert trained_on(base, same, {"model": "tiny"}, "there").remat == "full"
