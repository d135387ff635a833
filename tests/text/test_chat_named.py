"""The named templates, from Meta's llama and llama-models, Qwen's and Mistral's."""

import pickle
from dataclasses import replace
from itertools import pairwise

import pytest

from relax.text.chat import (
    TEMPLATES,
    ChatTemplate,
    named_template,
)
from relax.text.tiktoken_encodings import bytes_spec
from relax.text.tokenizers import TiktokenTokenizer

QUESTION = [{"role": "user", "content": "Hi"}]
TURN = [*QUESTION, {"role": "assistant", "content": "Yes"}]
TURNS = [*TURN, {"role": "user", "content": " And?\n"}]
SYSTEM = {"role": "system", "content": "Be\nbrief. "}


def user(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def llama3_bytes():
    """Bytes, with Llama 3's special tokens."""
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id")
    ids = {f"<|{n}|>": 256 + i for i, n in enumerate((*names, "eot_id"))}
    return TiktokenTokenizer(replace(bytes_spec(), special_tokens=ids))


def test_llama2_is_as_meta_has_it(tiny):
    chat = named_template("llama2", tiny)
    text = (
        "<s>[INST] <<SYS>>\nBe\nbrief. \n<</SYS>>\n\nHi [/INST] Yes </s>"
        "<s>[INST] And? [/INST]"
    )
    assert chat.render([SYSTEM, *TURNS], add_generation_prompt=True) == text
    assert chat.render(TURN) == "<s>[INST] Hi [/INST] Yes </s>"
    turn = [1, *tiny.encode("[INST] Hi [/INST] Yes "), 2]
    assert chat.encode(tiny, TURNS) == [*turn, 1, *tiny.encode("[INST] And? [/INST]")]
    assert chat.end_of_turn(tiny) == ((2,), ())


def test_mistral_is_as_mistral_has_it(tiny):
    chat = named_template("mistral", tiny)
    text = "<s>[INST] Hi [/INST]Yes</s>[INST]  And?\n [/INST]"
    assert chat.render(TURNS, add_generation_prompt=True) == text
    assert chat.end_of_turn(tiny) == ((2,), ())


def test_llama3_is_as_meta_has_it(llama3_bytes):
    chat = named_template("llama3", llama3_bytes)
    text = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe\nbrief."
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    messages = [SYSTEM, *QUESTION]
    assert chat.render(messages, add_generation_prompt=True) == text
    ids = chat.encode(llama3_bytes, messages, add_generation_prompt=True)
    assert [i for i in ids if i >= 256] == [
        256,
        258,
        259,
        260,
        258,
        259,
        260,
        258,
        259,
    ]
    assert chat.end_of_turn(llama3_bytes) == ((260,), ())


def test_chatml_strips_nothing(byte_tokenizer):
    tokenizer = byte_tokenizer.with_special_tokens(["<|im_start|>", "<|im_end|>"])
    chat = named_template("chatml", tokenizer)
    text = (
        "<|im_start|>system\nBe\nbrief. <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert chat.render([SYSTEM, *QUESTION], add_generation_prompt=True) == text
    assert chat.end_of_turn(tokenizer) == ((258,), ())


def test_plain_has_a_line_for_each_message(tiny, byte_tokenizer):
    chat = named_template("plain", tiny)
    text = "<s>System: Be\nbrief.\nUser: Hi\nAssistant: Yes</s>\nUser: And?\nAssistant:"
    assert chat.render([SYSTEM, *TURNS], add_generation_prompt=True) == text
    chat = named_template("plain", byte_tokenizer)
    assert chat.render(TURN) == "User: Hi\nAssistant: Yes<|endoftext|>\n"
    assert chat.end_of_turn(byte_tokenizer) == ((256,), ())
    assert replace_eos(chat).end_of_turn(byte_tokenizer) == ((), ("\nUser:",))


def replace_eos(chat: ChatTemplate) -> ChatTemplate:
    return ChatTemplate(chat.source, name=chat.name, variables={})


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_beginning_of_the_text_with_its_reply(name, tiny):
    chat = named_template(name, tiny)
    messages = [*TURNS, {"role": "assistant", "content": "No"}]
    texts = [
        chat.render(messages[:1], add_generation_prompt=True),
        chat.render(messages[:2]),
        chat.render(messages[:3], add_generation_prompt=True),
        chat.render(messages),
    ]
    for shorter, longer in pairwise(texts):
        assert longer.startswith(shorter)
        assert len(longer) > len(shorter)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("chatml", ["Yes<|im_end|>", "No<|im_end|>"]),
        ("llama2", [" Yes </s>", " No </s>"]),
        ("llama3", ["Yes<|eot_id|>", "No<|eot_id|>"]),
        ("mistral", ["Yes</s>", "No</s>"]),
        ("plain", [" Yes</s>", " No</s>"]),
    ],
)
def test_the_mask_of_a_named_template_is_what_the_assistant_makes(name, made):
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
    specials = {name: 256 + i for i, name in enumerate(names)}
    tokenizer = TiktokenTokenizer(replace(bytes_spec(), special_tokens=specials))
    source = named_template(name, tokenizer).source
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    chat = ChatTemplate(source, name=name, variables=ends)
    messages = [*TURNS, {"role": "assistant", "content": "No"}]
    ids, mask = chat.encode_with_mask(tokenizer, messages)
    runs, before = [], False
    for token_id, inside in zip(ids, mask, strict=True):
        if inside and not before:
            runs.append([])
        if inside:
            runs[-1].append(token_id)
        before = inside
    names = {i: name.encode() for name, i in specials.items()}
    texts = [b"".join(names.get(i) or bytes([i]) for i in run) for run in runs]
    assert [text.decode() for text in texts] == made


@pytest.mark.parametrize(
    ("name", "messages", "words"),
    [
        ("llama2", [SYSTEM], "llama2: a system message needs a user message after it"),
        ("llama2", TURN[1:], "llama2: roles must alternate user, assistant"),
        ("llama2", [*QUESTION, *QUESTION], "llama2: roles must alternate"),
        ("llama2", [*QUESTION, SYSTEM], "llama2: roles must alternate"),
        ("llama2", user("[/INST] a"), "llama2: a message contains the tag \\[/INST\\]"),
        ("mistral", [SYSTEM, *QUESTION], "mistral: .* there is no system role"),
        ("mistral", [*QUESTION, *QUESTION], "mistral: roles must alternate"),
    ],
)
def test_what_a_named_template_cannot_say_is_refused(tiny, name, messages, words):
    with pytest.raises(ValueError, match=words):
        named_template(name, tiny).encode(tiny, messages)


def test_names_and_files_of_templates(tiny, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ bos_token }}é{{ eos_token }}", encoding="utf-8")
    assert named_template(str(path), tiny).render([]) == "<s>é</s>"
    with pytest.raises(ValueError, match=r"template='alpaca' is unknown; .* plain"):
        named_template("alpaca", tiny)
    with pytest.raises(FileNotFoundError, match=r"task.template='no.jinja'"):
        named_template("no.jinja", tiny)


def test_a_template_travels_to_other_processes(byte_tokenizer):
    chat = named_template("chatml", byte_tokenizer)
    chat.encode(byte_tokenizer, TURN)
    again = pickle.loads(pickle.dumps(chat))
    assert again.encode(byte_tokenizer, TURN) == chat.encode(byte_tokenizer, TURN)
