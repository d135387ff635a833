"""The tokenizer of a model folder, by the files that are there."""

import re
from dataclasses import replace
from pathlib import Path

from relax.text.base import SPEC_FILE, SpecialTokens, Tokenizer
from relax.text.files import read_json
from relax.text.hf_export import CONFIG_FILE, TOKENIZER_FILE
from relax.text.hf_tokenizer import HfTokenizer, token_name
from relax.text.tiktoken_encodings import file_spec
from relax.text.tokenizers import (
    SentencePieceTokenizer,
    TiktokenTokenizer,
    load_tokenizer,
)

_MODEL_FILE = "tokenizer.model"
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")


def load_folder_tokenizer(folder: Path) -> Tokenizer | None:
    """Returns the tokenizer of a folder, None where it holds none.

    The folder is one that `Tokenizer.save` wrote, or else has a tokenizer.json, or
    else a tokenizer.model of sentencepiece's or tiktoken's form; the last two heed
    the tokenizer_config.json beside them. Raises ValueError where they are damaged.
    """
    if (folder / SPEC_FILE).is_file():
        return load_tokenizer(folder)
    if (folder / TOKENIZER_FILE).is_file():
        return HfTokenizer.from_file(folder / TOKENIZER_FILE)
    if not (folder / _MODEL_FILE).is_file():
        return None
    config = read_json(folder / CONFIG_FILE)
    tokenizer = _load_model(folder / _MODEL_FILE, config)
    special = _configured(tokenizer, config, folder / CONFIG_FILE)
    return (
        tokenizer.with_special(special) if special != tokenizer.special else tokenizer
    )


def _load_model(path: Path, config: dict) -> Tokenizer:
    model = path.read_bytes()
    if _RANK_LINE.match(model):
        return TiktokenTokenizer(file_spec(str(path)))
    try:
        # What transformers calls legacy is a space of the model's own after each
        # special token; without it only the very start of a text has one.
        once = config.get("legacy") is False
        return SentencePieceTokenizer(model, prefix_at_start_only=once)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is neither a sentencepiece model nor lines of `base64 rank`; "
            "fetch it again"
        ) from error


def _configured(tokenizer: Tokenizer, config: dict, path: Path) -> SpecialTokens:
    """Returns the special tokens that a model file and its config have together.

    Special tokens of the config take their ids from any of the model file's; an id
    whose own name the config gives to another gets one that no text has.
    """
    special = tokenizer.special
    known = {token_id: name for name, token_id in special.ids.items()}
    named = {}
    for key, token in config.get("added_tokens_decoder", {}).items():
        token_id, name = int(key), token["content"]
        if token_id < tokenizer.vocab_size and token_id not in known:
            continue  # an ordinary or the unknown piece, which the model file has
        if name not in special.ids and not token.get("special", False):
            raise ValueError(
                f"{path}: added token {name!r} with id {token_id} is not special, "
                f"which only a {TOKENIZER_FILE} can have; put one beside it"
            )
        named[token_id] = name
    taken = set(named.values())
    unnamed = {i: f"<|unused_{i}|>" for i, name in known.items() if name in taken}
    names = known | unnamed | named
    ids = {name: token_id for token_id, name in sorted(names.items())}
    return _with_ends(replace(special, ids=ids), config, path)


def _with_ends(special: SpecialTokens, config: dict, path: Path) -> SpecialTokens:
    """Returns special tokens with the BOS and EOS that a config names."""
    ends = {"bos_token": special.bos_id, "eos_token": special.eos_id}
    for key in ends:
        if key in config:
            name = token_name(config[key])
            if name is not None and name not in special.ids:
                raise ValueError(
                    f"{path} names {key}={name!r}, which is no special token; choose "
                    f"one of {', '.join(special.ids)}"
                )
            ends[key] = special.ids.get(name)
    bos_id = None if config.get("add_bos_token") is False else ends["bos_token"]
    return replace(special, bos_id=bos_id, eos_id=ends["eos_token"])
