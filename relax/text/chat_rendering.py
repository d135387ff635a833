"""Jinja as chat templates use it: sandboxed, with `{% generation %}` blocks.

What a template can call is what transformers 5.23 gives it
(`utils/chat_template_utils.py`), so that a checkpoint's own template renders alike.
This module alone imports jinja2, and is imported where something is to be rendered.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from relax.text.chat_marks import replace_strings

# No name of a template's own can be this one.
_SPAN_MARKS = "generation span marks"


def check_template(source: str, name: str) -> bool:
    """Returns whether a template has generation blocks.

    Raises ValueError, with the line, where it is not Jinja.
    """
    tree = _parse(source, name)
    return tree.find(jinja2.nodes.ExtensionAttribute) is not None


def render_template(
    source: str,
    name: str,
    context: Mapping[str, object],
    literals: tuple[tuple[str, str], ...] = (),
    span_marks: tuple[str, str] = ("", ""),
) -> str:
    """Returns what a template makes of a context.

    literals: pairs of strings; where the template itself spells the first, in its text
    or in a string constant, it writes the second. span_marks: written before and after
    each generation block. Raises ValueError naming the template.
    """
    template = _compile(source, name, literals)
    with _named_errors(name):
        return template.render({**context, _SPAN_MARKS: span_marks})


@functools.lru_cache(maxsize=64)
def _compile(
    source: str, name: str, literals: tuple[tuple[str, str], ...]
) -> jinja2.Template:
    tree = _parse(source, name)
    for node in tree.find_all((jinja2.nodes.Const, jinja2.nodes.TemplateData)):
        if isinstance(node, jinja2.nodes.TemplateData):
            node.data = replace_strings(node.data, literals)
        elif isinstance(node.value, str):
            node.value = replace_strings(node.value, literals)
    with _named_errors(name):
        return _environment().from_string(tree)


def _parse(source: str, name: str) -> jinja2.nodes.Template:
    with _named_errors(name):
        return _environment().parse(source)


class _Generation(jinja2.ext.Extension):
    """Blocks of what an assistant makes; names set inside end there, as in a macro."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _mark(self, context: jinja2.runtime.Context, caller) -> str:
        opening, closing = context[_SPAN_MARKS]
        return opening + caller() + closing


class _Refusal(jinja2.TemplateError):
    """What a template's `raise_exception` raises."""


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turns whatever a template raises into a one-line ValueError."""
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        what = f", line {error.lineno}: {error.message}"
        raise _named_error(name, what) from error
    except _Refusal as error:
        raise _named_error(name, f": {error.message}") from error
    except jinja2.sandbox.SecurityError as error:
        raise _named_error(name, f" does what is forbidden to it: {error}") from error
    except jinja2.UndefinedError as error:
        raise _named_error(name, f" uses what is not defined: {error}") from error
    except Exception as error:  # a program of others, which may fail in any way
        what = f" fails with {type(error).__name__}: {error}"
        raise _named_error(name, what) from error


def _named_error(name: str, what: str) -> ValueError:
    return ValueError(" ".join(f"chat template {name}{what}".split()))
