"""Options that more than one task has: task.template and task.context."""

from relax.model.config import LlamaConfig
from relax.text.chat import named_template
from relax.text.tokenizers import TokenizerConfig, make_tokenizer


def check_template(template: str | None) -> None:
    """Raises ValueError or FileNotFoundError for a template that there is not."""
    if template is not None:
        any_tokenizer = TokenizerConfig(kind="bytes", encoding=None, path=None)
        named_template(template, make_tokenizer(any_tokenizer))


def check_context(context: int | None) -> None:
    """Raises ValueError for a context without room for a token and the next."""
    if context is not None and context < 2:
        raise ValueError(f"task.context={context} must be at least 2")


def chosen_context(context: int | None, config: LlamaConfig) -> int:
    """Returns the tokens to use of a model's context, null being all of them.

    Raises ValueError where the model has fewer.
    """
    longest = config.max_position_embeddings
    if context is not None and context > longest:
        raise ValueError(
            f"task.context={context} must be at most {longest}, the context of the "
            "model; null takes all of it"
        )
    return longest if context is None else context
