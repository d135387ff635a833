"""The chat template that a model folder of Hugging Face holds."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from relax.text.files import read_json, read_text
from relax.text.hf_export import CONFIG_FILE

TEMPLATE_FILE = "chat_template.jinja"
VARIABLES_FILE = "relax_chat_template.json"  # beside it where it is ReLax's own


def find_template(folder: Path) -> tuple[str, str] | None:
    """Returns a folder's chat template and the name of its file, None without one.

    Raises ValueError naming the file where it can't be read.
    """
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return read_text(path), str(path)
    for path in (folder / CONFIG_FILE, folder / "chat_template.json"):
        template = read_json(path).get("chat_template")
        if template is not None:
            return _default(template, path), str(path)
    return None


def token_variables(folder: Path) -> dict[str, str]:
    """Returns the special tokens' strings that templates use, such as bos_token.

    Those of tokenizer_config.json, and those that only special_tokens_map.json has.
    """
    variables = {}
    for file in ("special_tokens_map.json", CONFIG_FILE):
        variables.update(_tokens(read_json(folder / file)))
    return variables


def _default(template: object, path: Path) -> str:
    """Returns the template of a file that has one, or several with names.

    Of several that is the one named default; a single one may have any name.
    """
    if isinstance(template, str):
        return template
    try:
        named = {entry["name"]: entry["template"] for entry in template}
        return next(iter(named.values())) if len(named) == 1 else named["default"]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{path} has a chat_template that is neither a text nor a list of "
            "{name, template} with one named default"
        ) from error


def _tokens(config: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if not name.endswith("_token"):
            continue
        if isinstance(value, dict):
            value = value.get("content")
        if value is None or isinstance(value, str):  # add_bos_token is neither
            yield name, value or ""
