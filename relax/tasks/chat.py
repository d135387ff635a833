"""A conversation in the terminal, or one line in and one reply out through a pipe."""

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import jax
import rich.console
from rich.text import Text

from relax.language_model import LanguageModel
from relax.sampling import SamplingConfig
from relax.tasks.chat_commands import respond
from relax.tasks.conversation import Conversation, Turn
from relax.tasks.options import check_context, check_template
from relax.text.chat import ChatTemplate, named_template

logger = logging.getLogger(__name__)

HISTORY_LINES = 1000
# What a model may write and a terminal would obey, spelled out; "\r" is left out.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_VISIBLE |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): None}


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How to talk.

    template: null (the checkpoint's own), a name that relax.text.chat.TEMPLATES has, or
    a path to a .jinja file. system: the system message to begin with. context: the most
    tokens that a prompt and its reply may have; null: the model's
    max_position_embeddings. history_file: of the lines typed; null: in the user's state
    folder; "": none.
    """

    kind: str
    template: str | None
    system: str | None
    context: int | None
    history_file: str | None

    def __post_init__(self):
        check_context(self.context)


def check(config: ChatConfig) -> None:
    """Raises ValueError or FileNotFoundError for a template that there is not."""
    check_template(config.template)


def run(config: ChatConfig, model: LanguageModel, sampling: SamplingConfig) -> None:
    """Talks until the user leaves; raises ValueError where the talk can't begin.

    In a terminal replies appear as they are made, and Ctrl-C ends one. Otherwise each
    line of stdin that is not blank gets a reply on stdout, written as it is with one
    newline after it, and all else that there is to say goes to stderr.
    """
    template = chosen_template(config, model)
    conversation = Conversation(model, template, sampling, config.context)
    if config.system is not None:
        try:
            conversation.set_system(config.system)
        except ValueError as error:
            raise ValueError(f"task.system={config.system!r}: {error}") from None
    for stream in (sys.stdin, sys.stdout):
        # A character that the stream's encoding lacks is no reason to end a talk.
        stream.reconfigure(errors="replace")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        converse(conversation, Pipe())
        return
    with Terminal(_history_path(config)) as terminal:
        terminal.note(
            f"{conversation.context} tokens of context; /help lists the commands, "
            "Ctrl-C stops a reply, Ctrl-D leaves"
        )
        converse(conversation, terminal)


def chosen_template(config: ChatConfig, model: LanguageModel) -> ChatTemplate:
    """Returns the template; raises ValueError where there is none."""
    if model.tokenizer is None:
        raise ValueError(
            "checkpoint holds no tokenizer, without which there is no chat; put its "
            "tokenizer.json or tokenizer.model into the folder"
        )
    if config.template is not None:
        return named_template(config.template, model.tokenizer)
    if model.chat_template is None:
        raise ValueError(
            "task.template=null, and the checkpoint has no chat template of its own; "
            "name the one that it was trained with, or task.template=plain for a model "
            "that knows no chat"
        )
    return model.chat_template


def converse(conversation: Conversation, console: "Pipe | Terminal") -> None:
    """Answers line after line; what can't be answered is told and changes nothing."""
    for line in console.lines():
        if not line.strip():
            continue
        try:
            answer = respond(line, conversation)
            if answer.note:
                console.note(answer.note)
            if answer.leave:
                return
            if answer.reply is not None:
                _show(answer.reply, conversation.turn, console)
        except ValueError as error:
            console.note(" ".join(str(error).split()), style="red")
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).partition("\n")[0]
            console.note(
                "the device failed, and the conversation is as it was; a smaller "
                f"task.context takes less memory: {reason}",
                style="red",
            )


def _show(reply: Iterator[str], turn: Turn, console: "Pipe | Terminal") -> None:
    if turn.dropped:
        turns = "turn" if turn.dropped == 1 else f"{turn.dropped} turns"
        console.note(f"the context is full: the oldest {turns} dropped")
    shown = False
    try:
        with contextlib.closing(reply):
            for piece in reply:
                shown |= bool(piece)
                if not console.write(piece):
                    break
    except jax.errors.JaxRuntimeError:
        if shown:
            console.write("\n")
        raise
    console.end(turn)


class Pipe:
    """Lines from stdin, replies alone to stdout, notes to stderr."""

    def lines(self) -> Iterator[str]:
        for line in sys.stdin:
            yield line.removesuffix("\n")

    def write(self, piece: str) -> bool:
        """Shows a piece of a reply; returns whether more is wanted."""
        sys.stdout.write(piece)
        sys.stdout.flush()
        return True

    def end(self, turn: Turn) -> None:
        self.write("\n")

    def note(self, text: str, style: str = "dim") -> None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class Terminal:
    """A prompt with line editing and history; a context manager.

    Within it Ctrl-C clears the line at the prompt. Elsewhere it is a request, which
    `write` passes on between two dispatches: no exception breaks into the device's
    work.
    """

    def __init__(self, history: Path):
        self._history = history
        self._rich = rich.console.Console()
        self._reading = False
        self._stop_requested = False

    def __enter__(self) -> Self:
        self._readline = _with_history(self._history)
        self._handler = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._handler)
        if self._readline is not None:
            _write_history(self._readline, self._history)

    def _interrupted(self, number: int, frame: object) -> None:
        if self._reading:
            raise KeyboardInterrupt
        self._stop_requested = True

    def lines(self) -> Iterator[str]:
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                self._put("\n")
                continue
            except EOFError:
                self._put("\n")
                return
            yield line

    def _read(self) -> str:
        self._reading, self._stop_requested = True, False
        try:
            return input("> ")
        finally:
            self._reading = False

    def write(self, piece: str) -> bool:
        self._put(piece.translate(_VISIBLE))
        return not self._stop_requested

    def end(self, turn: Turn) -> None:
        self._put("\n")
        if turn.cut:
            self.note(f"[cut by {turn.cut}]")
        self._put("\n")

    def note(self, text: str, style: str = "dim") -> None:
        self._rich.print(Text(text.translate(_VISIBLE), style), soft_wrap=True)

    def _put(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _history_path(config: ChatConfig) -> Path:
    if config.history_file is not None:
        return Path(config.history_file).expanduser()
    import platformdirs

    return platformdirs.user_state_path("relax") / "chat_history"


def _with_history(path: Path):
    """Returns readline with the lines of a file, or None where there is no readline.

    Importing it gives `input` line editing.
    """
    try:
        import readline
    except ImportError:
        return None
    readline.set_history_length(HISTORY_LINES)
    if path.is_file():
        try:
            readline.read_history_file(path)
        except OSError as error:
            logger.warning("task.history_file=%s can't be read: %s", path, error)
    return readline


def _write_history(readline, path: Path) -> None:
    """Writes the lines for the user's eyes alone; a path that is no file is none."""
    if path.exists() and not path.is_file():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)
        readline.write_history_file(path)
    except OSError as error:
        logger.warning("task.history_file=%s can't be written: %s", path, error)
