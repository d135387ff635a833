"""The chat as its user sees it: parts in this process, and the program from outside."""

import json
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from relax.tasks.chat import (
    ChatConfig,
    Pipe,
    Terminal,
    check,
    chosen_template,
    converse,
)
from relax.tasks.conversation import Turn
from relax.text.chat import named_template
from relax.text.tokenizers import TokenizerConfig, make_tokenizer

ROOT = Path(__file__).parents[2]
CONFIG = ChatConfig(
    kind="chat", template=None, system=None, context=None, history_file=None
)


class Echo:
    """A conversation whose replies repeat what was said, in two pieces."""

    def __init__(self):
        self.turn = None
        self.said = []

    def say(self, text):
        if "bad" in text:
            raise ValueError("no bad\n words")
        self.said.append(text)
        self.turn = Turn(prompt=7, dropped=text.count("drop"), cut="the limit")
        return (piece for piece in (text[:3], text[3:]))


class Script(Pipe):
    """A pipe whose lines are given."""

    def __init__(self, *lines):
        self._lines = lines

    def lines(self):
        return iter(self._lines)


def test_a_line_gives_a_reply_and_a_mistake_a_note(capsys):
    chat = Echo()
    converse(chat, Script("hello", "", "  ", "so bad", "/no", "//x", "/exit", "more"))
    shown = capsys.readouterr()
    assert chat.said == ["hello", "/x"]
    assert shown.out == "hello\n/x\n"
    bad, unknown = shown.err.splitlines()
    assert bad == "no bad words"
    assert unknown.startswith("/no is no command; ")


def test_turns_that_left_are_counted_before_the_reply(capsys):
    converse(Echo(), Script("drop", "drop drop"))
    shown = capsys.readouterr()
    assert shown.out == "drop\ndrop drop\n"
    assert shown.err.splitlines() == [
        "the context is full: the oldest turn dropped",
        "the context is full: the oldest 2 turns dropped",
    ]


def test_a_device_without_memory_is_told_and_the_talk_goes_on(capsys):
    class Small(Echo):
        def say(self, text):
            pieces = super().say(text)
            return self.failing(pieces, text) if "big" in text else pieces

        @staticmethod
        def failing(pieces, text):
            yield "" if "too" in text else next(pieces)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 7 bytes\nin detail")

    converse(Small(), Script("big", "too big", "hello"))
    shown = capsys.readouterr()
    assert shown.out == "big\nhello\n"
    first, second = shown.err.splitlines()
    assert first == second
    assert re.search(r"as it was; .* task.context .*: RESOURCE_EXHAUSTED: 7", first)


def test_another_error_of_a_reply_is_no_one_s_to_hide():
    class Broken(Echo):
        def say(self, text):
            raise RuntimeError("a mistake in the program")

    with pytest.raises(RuntimeError, match="a mistake in the program"):
        converse(Broken(), Script("hello"))


def test_a_context_has_two_tokens():
    assert replace(CONFIG, context=2).context == 2
    with pytest.raises(ValueError, match=r"task.context=1 must be at least 2"):
        replace(CONFIG, context=1)


@pytest.fixture
def terminal(tmp_path):
    """A terminal without history: its file is a folder."""
    return Terminal(tmp_path)


def test_a_reply_cannot_steer_the_terminal(terminal, capsys):
    with terminal:
        terminal.write("a\x1b[2Jb\x07\t\x9b1m\r\né\U0001f44b\u200d")
        terminal.note("c\x1b[0m [red]")
    shown = capsys.readouterr().out
    assert shown == "a\\x1b[2Jb\\x07\t\\x9b1m\né\U0001f44b\u200dc\\x1b[0m [red]\n"


def test_a_limit_that_cut_a_reply_is_told(terminal, capsys):
    terminal.end(Turn(prompt=7, dropped=0))
    terminal.end(Turn(prompt=7, dropped=0, cut="sampling.max_new_tokens=7"))
    shown = capsys.readouterr().out
    assert shown == "\n\n\n[cut by sampling.max_new_tokens=7]\n\n"


def test_an_interrupt_is_a_request_within_the_terminal(terminal, capsys):
    before = signal.getsignal(signal.SIGINT)
    with terminal:
        assert terminal.write("a")
        signal.raise_signal(signal.SIGINT)
        assert not terminal.write("b")
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().out == "ab"


def test_an_interrupt_stops_the_reply_and_closes_it(terminal, monkeypatch, capsys):
    def endless():
        try:
            while True:
                yield "word "
                signal.raise_signal(signal.SIGINT)
        finally:
            closed.append(True)

    class Endless(Echo):
        def say(self, text):
            super().say(text)
            return endless()

    closed, typed = [], iter(["go", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    with terminal:
        converse(Endless(), terminal)
    assert closed == [True]
    assert capsys.readouterr().out.startswith("word word \n")


def test_a_template_is_checked_before_the_model_is_loaded(tmp_path):
    check(CONFIG)
    check(replace(CONFIG, template="llama3"))
    with pytest.raises(ValueError, match=r"task.template='lama3' is unknown; choose"):
        check(replace(CONFIG, template="lama3"))
    with pytest.raises(FileNotFoundError, match=r"task.template='no.jinja'"):
        check(replace(CONFIG, template="no.jinja"))
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% if %}")
    with pytest.raises(ValueError, match=r"broken.jinja"):
        check(replace(CONFIG, template=str(broken)))


def test_the_checkpoints_own_template_or_the_one_named():
    class Model:
        tokenizer = make_tokenizer(
            TokenizerConfig(kind="bytes", encoding=None, path=None)
        )
        chat_template = named_template("plain", tokenizer)

    model = Model()
    assert chosen_template(CONFIG, model) is model.chat_template
    assert chosen_template(replace(CONFIG, template="chatml"), model).name == "chatml"
    model.chat_template = None
    with pytest.raises(ValueError, match=r"task.template=null.* task.template=plain"):
        chosen_template(CONFIG, model)
    model.tokenizer = None
    with pytest.raises(ValueError, match="holds no tokenizer"):
        chosen_template(CONFIG, model)


@pytest.fixture
def environment(tmp_path):
    """One CPU device, no one's home and no settings of a user's readline."""
    (tmp_path / "inputrc").write_text("set enable-bracketed-paste off\n")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    own = {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path), "TERM": "xterm"}
    own |= {"XDG_STATE_HOME": str(tmp_path), "INPUTRC": str(tmp_path / "inputrc")}
    return kept | own


@pytest.fixture
def command(data_dir):
    """A callable: the command of a chat with a checkpoint, stories260K by default."""

    def arguments(*overrides, checkpoint=data_dir / "stories260K_hf"):
        chat = ("task=chat", f"checkpoint={checkpoint}", "runtime.cache_dir=''")
        return [sys.executable, str(ROOT / "infer.py"), *chat, *overrides]

    return arguments


@pytest.mark.slow
def test_through_a_pipe_a_line_gives_a_reply(command, environment, tmp_path):
    lines = [
        *("Tom had a dog.", "/save first.json", "/nonsense", ""),
        *("/set max_new_tokens 5", "/system Be brief.", "/retry", "/stats", "//x"),
        *("/load no.json", "x " * 300, "So bad \xff", "/save last.json"),
    ]
    done = subprocess.run(
        command("task.template=plain", "sampling=greedy", "sampling.max_new_tokens=13"),
        input="\n".join(lines).encode("latin-1"),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
    )
    stderr = done.stderr.decode()
    assert done.returncode == 0, stderr
    assert "\x1b" not in done.stdout.decode() + stderr
    first, last = (
        json.loads((tmp_path / f"{name}.json").read_text())["messages"]
        for name in ("first", "last")
    )
    asked = [message["content"] for message in last if message["role"] == "user"]
    assert asked == ["Tom had a dog.", "/x", "So bad \ufffd"]
    replies = [m["content"] for m in first + last if m["role"] == "assistant"]
    assert done.stdout.decode() == "".join(f"{reply}\n" for reply in replies)

    notes = stderr.splitlines()
    notes = notes[notes.index("first.json: 2 messages written") + 1 :]
    told = [
        *("/nonsense is no command; ", "max_new_tokens 5", "system message set"),
        *("last turn: ", "context: ", "no.json can't be read: ", "the message takes "),
        "last.json: 7 messages written",
    ]
    assert len(notes) == len(told)
    assert all(note.startswith(t) for note, t in zip(notes, told, strict=True)), notes
    assert re.match(r"context: \d+ of 512 tokens used; turns: 1", notes[4])


class Screen:
    """The program in a terminal of its own, as its user types and reads."""

    # A process gets a terminal of its own before it becomes the program.
    START = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"

    def __init__(self, arguments: list[str], env: dict[str, str]):
        self._own, other = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.START, *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            env=env,
        )
        os.close(other)
        self._unread = ""

    def type(self, keys: str) -> None:
        os.write(self._own, keys.encode())

    def read_to(self, pattern: str, seconds: float = 60.0) -> str:
        """Returns what appeared up to the end of the first match."""
        while not (match := re.search(pattern, self._unread)):
            ready, _, _ = select.select([self._own], [], [], seconds)
            assert ready, f"no {pattern!r} in {self._unread!r}"
            self._unread += os.read(self._own, 4096).decode(errors="replace")
        shown, self._unread = match.string[: match.end()], match.string[match.end() :]
        return shown

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)


@pytest.fixture
def screen(command, environment, data_dir, tmp_path):
    """A chat that has room for replies of a minute, at its first prompt."""
    folder = shutil.copytree(data_dir / "stories260K_hf", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 60_000
    (folder / "config.json").write_text(json.dumps(config))
    overrides = (
        *("task.template=plain", "sampling=greedy", "sampling.ignore_eos=true"),
        *("sampling.max_new_tokens=50_000", f"task.history_file={tmp_path}/lines"),
    )
    screen = Screen(command(*overrides, checkpoint=folder), environment)
    yield screen
    screen.close()


@pytest.mark.slow
def test_in_a_terminal_a_reply_streams_and_can_be_stopped(screen, tmp_path):
    assert "Ctrl-D leaves" in screen.read_to(r"\n> ")
    screen.type("Tom had a dog.\n")
    screen.read_to(r"dog\.\r\n")
    screen.read_to(r"[a-z]{2}")
    screen.type("\x03")
    screen.read_to(r"\n> ")
    screen.type("/stats\n")
    shown = screen.read_to(r"turns: 1.*\n> ")
    assert 0 < int(re.search(r", (\d+) made", shown)[1]) < 50_000

    # At the prompt Ctrl-C clears the line, and arrow-up recalls the one before.
    screen.type("half a line")
    screen.read_to("half a line")
    time.sleep(0.5)  # until readline waits: a signal before that waits for a key
    screen.type("\x03")
    screen.read_to(r"\n> ")
    screen.type("\x1b[A")
    screen.read_to("/stats")
    screen.type("\x1b[A")
    screen.read_to("Tom had a dog.")
    screen.type("\x1b[B\n")
    screen.read_to(r"turns: 1.*\n> ")

    screen.type("\x04")
    assert screen.process.wait(60) == 0
    lines = tmp_path / "lines"
    assert stat.S_IMODE(lines.stat().st_mode) == 0o600
    assert lines.read_text().splitlines()[:2] == ["Tom had a dog.", "/stats"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ((), "task.template=null, and the checkpoint has no chat template of its own"),
        (("task.template=nope",), "task.template='nope' is unknown; choose one of"),
        (
            ("task.template=mistral", "task.system=Hm."),
            "task.system='Hm.': ",
        ),
        (
            ("task.template=plain", "task.context=513"),
            "task.context=513 must be at most 512",
        ),
    ],
)
def test_a_chat_that_cannot_begin_ends_in_one_line(
    command, environment, overrides, line
):
    done = subprocess.run(
        command(*overrides),
        stdin=subprocess.DEVNULL,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith(line)
    assert "Traceback" not in done.stderr
