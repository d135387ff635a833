"""Prompts of records: where they end, how they are written, and which are refused."""

import logging
from types import SimpleNamespace

import pytest

from relax.data.records import Records
from relax.text.chat import ChatTemplate, named_template
from relax.text.tokenizers import TokenizerConfig, make_tokenizer
from relax.trainers import grpo
from relax.trainers.evaluation import held_out_prompts, prompts_that_fit
from relax.trainers.prompts import LengthError, PromptOrder, check_length, make_prompt

BYTES = make_tokenizer(TokenizerConfig(kind="bytes", encoding=None, path=None))
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Ho"}


def setup_of(template=None, context=13, longest=5):
    """Returns what a prompt reads of a setup."""
    named = template and named_template(template, BYTES, "data.template")
    return SimpleNamespace(
        data=SimpleNamespace(template=template),
        template=named,
        tokenizer=BYTES,
        trainer=SimpleNamespace(context=context),
        sampling=SimpleNamespace(max_new_tokens=longest),
    )


def text_of(prompt) -> str:
    return BYTES.decode(prompt.ids)


def test_a_text_stays_one():
    record = {"prompt": "1+2=", "answer": "3", "completion": "three"}
    prompt = make_prompt(record, 0, setup_of())
    first = [] if BYTES.bos_id is None else [BYTES.bos_id]
    assert prompt.ids == (*first, *b"1+2=")
    assert prompt[1:] == ("1+2=", "3", record)


def test_the_completion_is_the_answer_where_there_is_no_other():
    assert make_prompt({"prompt": "1", "completion": "2"}, 0, setup_of()).answer == "2"
    assert make_prompt({"prompt": "1"}, 0, setup_of()).answer is None


def test_a_text_becomes_a_message_under_a_template():
    setup = setup_of("plain")
    prompt = make_prompt({"prompt": "Hi"}, 0, setup)
    same = make_prompt({"prompt": [USER]}, 0, setup)
    assert prompt.ids == same.ids
    expected = setup.template.encode(BYTES, [USER], add_generation_prompt=True)
    assert prompt.ids == tuple(expected)
    assert prompt.text == "Hi"


def test_messages_end_where_the_assistant_first_answers():
    setup = setup_of("plain")
    last = {"role": "user", "content": "Hm"}
    prompt = make_prompt({"messages": [USER, ASSISTANT, last, ASSISTANT]}, 0, setup)
    assert prompt.ids == make_prompt({"messages": [USER]}, 0, setup).ids
    assert "Ho" not in text_of(prompt)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "record 7 of the data holds no prompt, but text; give prompt"),
        ({}, "record 7 of the data holds no prompt, but nothing; give prompt or"),
        ({"messages": []}, "record 7 of the data holds no prompt, but messages;"),
        ({"messages": [ASSISTANT]}, "record 7 of the data begins with the assistant"),
    ],
)
def test_a_record_without_a_prompt_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        make_prompt(record, 7, setup_of("plain"))


def test_messages_need_a_template():
    with pytest.raises(ValueError, match=r"data\.template=null, and the model has no "):
        make_prompt({"messages": [USER]}, 0, setup_of())


@pytest.mark.parametrize("length", [1, 8])
def test_a_prompt_may_fill_what_the_completion_leaves(length):
    prompt = make_prompt({"prompt": "a" * length}, 0, setup_of())
    assert check_length(prompt, 0, setup_of()) is None


@pytest.mark.parametrize("length", [0, 9])
def test_a_prompt_that_is_empty_or_too_long_is_named(length):
    prompt = make_prompt({"prompt": "a" * length}, 7, setup_of())
    with pytest.raises(ValueError) as raised:
        check_length(prompt, 7, setup_of())
    assert str(raised.value) == (
        f"prompt 7 of the data has {length} tokens, and with sampling.max_new_tokens=5 "
        "trainer.context=13 has room for 1 to 8; raise trainer.context, lower "
        "sampling.max_new_tokens, or leave such prompts out with "
        "trainer.skip_long_prompts=true"
    )


@pytest.mark.parametrize("longest", [13, 60])
def test_a_context_without_room_for_any_prompt_is_named(longest):
    setup = setup_of(longest=longest)
    prompt = make_prompt({"prompt": "a"}, 7, setup)
    with pytest.raises(LengthError) as raised:
        check_length(prompt, 7, setup)
    assert str(raised.value) == (
        f"sampling.max_new_tokens={longest} and trainer.context=13 leave no room for "
        "any prompt; raise trainer.context, or lower sampling.max_new_tokens"
    )


def test_tools_of_a_record_reach_the_template():
    setup = setup_of("plain")
    source = "{% if tools %}{{ tools[0].name }}{% endif %}{{ messages[0].content }}"
    setup.template = ChatTemplate(source, name="with tools")
    chat = {"messages": [USER]}
    assert text_of(make_prompt(chat, 0, setup)) == "Hi"
    chat["tools"] = [{"name": "clock"}]
    assert text_of(make_prompt(chat, 0, setup)) == "clockHi"


def test_an_order_goes_through_all_prompts_before_it_repeats_one():
    records = [{"prompt": str(number)} for number in range(7)]
    order = PromptOrder(records, setup_of_order())
    taken = [order.at(number).text for number in range(14)]
    assert sorted(taken[:7]) == sorted(taken[7:]) == [str(n) for n in range(7)]
    assert taken[:7] != taken[7:]


def test_a_prompt_that_does_not_fit_is_told_of_before_and_left_out_after(caplog):
    order = PromptOrder([{"prompt": "1" * 9}], setup_of_order())
    with pytest.raises(ValueError, match="prompt 0 of the data has 9 tokens, and with"):
        order.check()
    assert [order.at(number) for number in range(3)] == [None] * 3
    (told,) = caplog.messages
    assert "left out, as others may be: prompt 0 of the data has 9 tokens" in told


def test_long_prompts_are_left_out_where_that_is_asked_for():
    """Four of seven fit."""
    records = [{"prompt": "1" * (7 + 2 * (number % 2))} for number in range(7)]
    order = PromptOrder(records, setup_of_order(skip=True))
    taken = [prompt for number in range(7) if (prompt := order.at(number))]
    assert [prompt.text for prompt in taken] == ["1" * 7] * 4
    assert order.check() == taken[0]


def test_prompts_that_are_all_too_long_are_refused_though_they_may_be_left_out():
    order = PromptOrder([{"prompt": "1" * 9}] * 3, setup_of_order(skip=True))
    with pytest.raises(ValueError, match="of the data has 9 tokens, and with sampling"):
        order.check()


REFUSING = """{% if messages[0].content == 'No' %}{{ raise_exception('no!') }}
{% endif %}{{ messages[0].content }}"""
BAD = {
    "begins": ({"messages": [ASSISTANT]}, "begins with the assistant"),
    "none": ({"text": "a"}, "holds no prompt, but text"),
    "refused": ({"messages": [{**USER, "content": "No"}]}, "record 1 of the .* no!"),
    "answer": ({"prompt": "1", "answer": ["2"]}, r'has the answer \["2"\], neither'),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("skip", [False, True])
def test_a_record_that_asks_nothing_ends_a_run_only_at_its_start(name, skip, caplog):
    record, message = BAD[name]
    long = {"messages": [{**USER, "content": "1" * 99}]}
    setup = setup_of_order(skip=skip)
    setup.template = ChatTemplate(REFUSING, name="refusing")
    order = PromptOrder([{"messages": [USER]}, record], setup)
    with pytest.raises(ValueError, match=message):
        order.check()
    order = PromptOrder([{"messages": [USER]}, record, record, long], setup)
    taken = [order.at(number) for number in range(12)]
    assert [prompt.text for prompt in taken if prompt] == ["Hi"] * 3
    # Each kind once, whichever comes first.
    assert len(caplog.messages) == 2
    assert all(told.startswith("left out, as ") for told in caplog.messages)
    assert sum("99 tokens" in told for told in caplog.messages) == 1


def held_out(*texts, count=2, **options):
    """Returns the texts of the held-out prompts, which fit up to 8 tokens."""
    setup = setup_of()
    setup.model = SimpleNamespace(max_position_embeddings=13)
    records = Records([], [{"prompt": text} for text in texts], "a test")
    return [p.text for p in held_out_prompts(setup, records, count, **options)]


def test_a_held_out_prompt_that_is_too_long_is_told_of():
    assert held_out("2", "4", "1" * 9) == ["2", "4"]
    with pytest.raises(
        ValueError, match=r"prompt 1 of the data has 9 .*, or leave the "
    ):
        held_out("2", "1" * 9, "4")


def test_long_held_out_prompts_are_left_out_where_that_is_asked_for():
    texts = "1" * 9, "2", "3" * 9, "4", "5"
    assert held_out(*texts, skip_long=True) == ["2", "4"]
    assert held_out(*texts, skip_long=True, count=7) == ["2", "4", "5"]
    with pytest.raises(ValueError, match="and no validation record has a prompt that "):
        held_out("1" * 9, skip_long=True)


def test_what_is_completed_beside_fine_tuning_is_what_asks_and_fits(caplog):
    caplog.set_level(logging.INFO)
    setup = setup_of("plain", longest=5)
    setup.model = SimpleNamespace(max_position_embeddings=40)
    chats = [
        {"messages": [ASSISTANT]},
        {"text": "a"},
        {"messages": [USER, ASSISTANT]},
        {"prompt": "1" * 99},
        {"prompt": "Hm"},
        {"prompt": "Oh"},
    ]
    records = Records([{}], chats, "a test")
    asked = prompts_that_fit(setup, records, 2)
    assert [prompt.text for prompt in asked] == ["Hi", "Hm"]
    assert caplog.messages == [
        "data: 3 of the first 5 held-out records are not completed: record 1 of the "
        "data begins with the assistant, to name the first"
    ]
    assert prompts_that_fit(setup, records._replace(validation=chats[:2]), 2) == []
    assert len(prompts_that_fit(setup, records._replace(validation=chats[4:]), 7)) == 2
    assert len(caplog.messages) == 2


def setup_of_order(skip=False):
    setup = setup_of()
    setup.seed, setup.trainer.skip_long_prompts = 3, skip
    return setup


def test_a_number_is_an_answer_as_a_text():
    assert make_prompt({"prompt": "1", "answer": 2}, 0, setup_of()).answer == "2"


def test_an_answer_in_messages_is_what_the_last_one_says():
    record = {"prompt": "1", "completion": [USER, ASSISTANT]}
    assert make_prompt(record, 0, setup_of()).answer == "Ho"


@pytest.mark.parametrize("answer", [["2", "3"], [], {"a": 1}, [{"role": "user"}], True])
def test_an_answer_that_is_no_text_is_named(answer):
    with pytest.raises(ValueError) as raised:
        make_prompt({"prompt": "1", "answer": answer}, 7, setup_of())
    assert str(raised.value).startswith("record 7 of the data has the answer ")
    assert str(raised.value).endswith(
        ", neither a text nor a number nor messages; write it as a text"
    )


@pytest.mark.parametrize(
    ("reward", "record", "message"),
    [
        ("exact_match", {"prompt": "1"}, "exact_match, which compares with an answer"),
        ("countdown", {"prompt": "1", "answer": "2"}, "countdown, which can't judge"),
    ],
)
def test_a_reward_that_can_judge_nothing_is_refused(reward, record, message):
    setup = setup_of()
    setup.trainer.rewards = (reward,)
    with pytest.raises(ValueError, match=message):
        grpo._check_rewards(make_prompt(record, 0, setup), setup)


@pytest.mark.parametrize(
    ("reward", "warns"), [("exact_match", True), ("countdown", False)]
)
def test_a_reward_that_the_data_s_own_completion_misses_is_told_of(
    reward, warns, caplog
):
    record = {"prompt": "3 4 -> 7: ", "completion": "3+4", "answer": "7"}
    setup = setup_of()
    setup.trainer.rewards, setup.trainer.outcome_index = (reward,), 0
    prompt = make_prompt(record | {"numbers": [3, 4], "target": 7}, 0, setup)
    grpo._check_rewards(prompt, setup)
    told = [line for line in caplog.messages if f"{reward} gives 0.0 to" in line]
    assert len(told) == warns
