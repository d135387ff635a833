"""Model folders of the Hugging Face hub, by id."""

import re
from pathlib import Path

_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
_NEEDED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
_TORCH = ["*.json", "pytorch_model*.bin", "tokenizer.model", "*.jinja"]
_META = ["*.json", "consolidated.*.pth", "tokenizer.model"]
# Other formats: in folders, or Mistral's beside the one that is read.
_NOT_NEEDED = ["*/*", "consolidated*.safetensors"]


def split_hub_id(reference: str) -> tuple[str, str | None] | None:
    """Returns the id and the revision of `owner/name[@revision]`, None for others."""
    match = _ID.fullmatch(reference)
    return (match[1], match[2]) if match else None


def fetch(repo_id: str, revision: str | None, option: str = "checkpoint") -> Path:
    """Returns the folder of a model, downloaded unless it is in the hub's cache.

    option: what errors call it. Raises OSError saying what failed, such as no network
    and nothing cached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def snapshot(patterns: list[str]) -> Path:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=_NOT_NEEDED,
        )
        return Path(folder)

    try:
        folder = snapshot(_NEEDED)
        if not (folder / "config.json").is_file():
            folder = snapshot(_META)
        elif not any(folder.glob("*.safetensors")):
            folder = snapshot(_TORCH)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        at = f"@{revision}" if revision else ""
        raise OSError(
            f"{option}={repo_id}{at} is neither a folder here nor to be had from the "
            f"Hugging Face hub or its cache ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); check the id, the network, and "
            "HF_TOKEN where the model is gated"
        ) from error
    return folder
