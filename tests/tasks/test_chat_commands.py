import json
from dataclasses import fields

import pytest

from relax.sampling import SamplingConfig
from relax.tasks.chat_commands import COMMANDS, changed, respond
from relax.tasks.conversation import Turn


class Echo:
    """A conversation whose replies repeat what was said to it."""

    context = 101

    def __init__(self):
        self.sampling = SamplingConfig()
        self.turn = None
        self.turns = 0
        self.messages = []
        self.system = "S"
        self.calls = []

    def say(self, text):
        self.calls.append(text)
        return iter([text])

    def retry(self):
        return iter(["again"])

    def clear(self):
        self.messages = []

    def set_system(self, text):
        self.system = text

    def load(self, messages):
        self.messages = list(messages)


@pytest.fixture
def chat():
    return Echo()


@pytest.mark.parametrize(
    ("line", "sent"), [("hello", "hello"), (" /help", " /help"), ("//usr", "/usr")]
)
def test_any_other_line_is_a_message(chat, line, sent):
    assert list(respond(line, chat).reply) == [sent]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/retri", "/retri is no command; did you mean /retry?"),
        ("/usr/bin", "/usr/bin is no command; known: /help, /exit, /clear, "),
        ("/", "/ is no command; known: /help"),
        ("/CLEAR", r'is no command; .* is written with "//"\)'),
    ],
)
def test_an_unknown_command_is_told_with_the_nearest(chat, line, words):
    with pytest.raises(ValueError, match=words):
        respond(line, chat)
    assert chat.calls == []


def test_help_has_a_line_for_each_command(chat):
    lines = respond("/help", chat).note.splitlines()
    assert [line.split()[0] for line in lines] == [f"/{name}" for name in COMMANDS]


def test_exit_leaves(chat):
    assert respond("/exit", chat).leave
    assert not respond("/help", chat).leave


def test_retry_brings_a_reply(chat):
    assert list(respond("/retry", chat).reply) == ["again"]


def test_system_sets_the_message_and_takes_it_away(chat):
    respond("/system  Be brief.", chat)
    assert chat.system == "Be brief."
    respond("/system", chat)
    assert chat.system is None


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("temperature", "0", 0.0),
        ("max_new_tokens", "7", 7),
        ("ignore_eos", "true", True),
        ("ignore_eos", "false", False),
        ("stop_strings", r'["\n\n", "End"]', ("\n\n", "End")),
        ("stop_strings", "[]", ()),
    ],
)
def test_a_setting_is_read_by_its_type(chat, name, text, value):
    note = respond(f"/set {name} {text}", chat).note
    assert getattr(chat.sampling, name) == value
    assert type(getattr(chat.sampling, name)) is type(value)
    assert note.startswith(f"{name} ")


def test_every_setting_is_shown_as_it_is_read(chat):
    chat.sampling = SamplingConfig(
        stop_strings=("é\n",),
        ignore_eos=True,
        logit_bias={5: -1.5, 2: 3},
        stop_token_ids=(7, 11),
        constraint="digits",
        early_stopping="never",
    )
    lines = respond("/set", chat).note.splitlines()
    assert len(lines) == len(fields(SamplingConfig))
    assert 'stop_strings ["é\\n"]' in lines
    again = SamplingConfig()
    for line in lines:
        again = changed(again, *line.split(" ", 1))
    assert again == chat.sampling


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("temprature 1", "sampling.temprature is no setting; did you mean temperature"),
        ("xyz 1", "sampling.xyz is no setting; known: max_new_tokens, temperature, "),
        ("top_k 1.5", "sampling.top_k='1.5' must be a whole number"),
        ("top_p much", "sampling.top_p='much' must be a number"),
        ("top_p 2", r"sampling.top_p=2.0 must be in \[0, 1\]"),
        ("temperature nan", "sampling.temperature=nan must be in"),
        ("ignore_eos 1", "sampling.ignore_eos='1' must be true or false"),
        ("stop_strings End", "sampling.stop_strings='End' must be a list of strings"),
        ("stop_token_ids [2.5]", "sampling.stop_token_ids='.2.5.' must be a list of"),
        ("logit_bias 5", "sampling.logit_bias='5' must be numbers by id, such as"),
        ("early_stopping maybe", "sampling.early_stopping='maybe' must be"),
        ("stop_strings [7]", "sampling.stop_strings='.7.' must be a list of strings"),
        ('stop_strings [""]', "sampling.stop_strings=.* must be free of empty"),
        ("temperature", "/set temperature lacks a value; /set alone shows all"),
    ],
)
def test_a_setting_that_cannot_be_changes_nothing(chat, rest, words):
    with pytest.raises(ValueError, match=words):
        respond(f"/set {rest}", chat)
    assert chat.sampling == SamplingConfig()


def test_save_and_load_go_through_a_file(chat, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat.messages = said
    path = tmp_path / "a talk.json"
    assert respond("/save ~/a talk.json", chat).note == f"{path}: 2 messages written"
    chat.messages = []
    assert respond(f"/load {path} ", chat).note == f"{path}: 2 messages read"
    assert chat.messages == said
    path.write_text(json.dumps({"messages": said[:1]}))
    assert respond(f"/load {path}", chat).note.endswith("/retry answers the last")


@pytest.mark.parametrize("line", ["/save", "/load", "/load no.json", "/save ~no/a/b"])
def test_a_file_that_cannot_be_is_told(chat, line):
    chat.messages = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match=r"lacks a file|can't be (read|written)"):
        respond(line, chat)
    assert len(chat.messages) == 1


def test_stats_tell_the_last_turn(chat):
    with pytest.raises(ValueError, match="there has been no reply yet"):
        respond("/stats", chat)
    chat.turns = 3
    chat.turn = Turn(
        prompt=52,
        dropped=0,
        prefilled=25,
        reused=27,
        made=23,
        first_made=1,
        first_seconds=0.25,
        seconds=2.25,
    )
    assert respond("/stats", chat).note == (
        "last turn: 25 tokens prefilled, 27 reused from the cache, 23 made at 11.0 "
        "tokens/s, the first after 0.25 s\n"
        "context: 75 of 101 tokens used; turns: 3"
    )
    chat.turn.made = 1
    assert " 1 made, the first after" in respond("/stats", chat).note
