"""The tokenizer.json that does what a tiktoken encoding or sentencepiece model does.

The form is that of the `tokenizers` library, checked with 0.23.
"""

import base64
import json
import logging
import re
from pathlib import Path

from relax.text.base import SpecialTokens
from relax.text.byte_level import spell_bytes
from relax.text.tiktoken_encodings import EncodingSpec

_log = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_SPACE = "▁"
# sentencepiece_model.proto: TrainerSpec.ModelType, and ModelProto.SentencePiece.Type
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


def write(
    folder: Path, spec: dict, special: SpecialTokens, *, unknown: str | None
) -> None:
    """Writes a tokenizer.json that puts BOS first, and its tokenizer_config.json."""
    spec["post_processor"] = post_processor(special)
    add_special_tokens(spec, special.ids)
    write_files(folder, json.dumps(spec, ensure_ascii=False), special, unknown)


def write_files(
    folder: Path, text: str, special: SpecialTokens, unknown: str | None, **config
) -> None:
    """Writes a tokenizer.json of this text, and a config of these tokens."""
    # The class of transformers that takes everything from the tokenizer.json.
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    config |= {
        "add_bos_token": special.bos_id is not None,
        "bos_token": special.name_of(special.bos_id) or config.get("bos_token"),
        "eos_token": special.name_of(special.eos_id),
        "unk_token": unknown,
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def add_special_tokens(spec: dict, ids: dict[str, int]) -> None:
    """Adds tokens to a tokenizer.json, at these ids also where they leave holes."""
    known = {token["content"]: token for token in spec["added_tokens"]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for name, token_id in sorted(ids.items(), key=lambda item: item[1]):
        if name in known:
            known[name]["special"] = True
        else:
            token = {"id": token_id, "content": name, **flags, "special": True}
            spec["added_tokens"].append(token)
    pin_added_tokens(spec)


def pin_added_tokens(spec: dict) -> None:
    """Puts the added tokens into the vocabulary, unless they follow it without a hole.

    The library numbers added tokens itself, but heeds ids that the vocabulary has.
    """
    vocabulary = spec["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        return
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    new = [token_id for name, token_id in ids.items() if name not in vocabulary]
    ends = [max(vocabulary.values(), default=-1) + 1 + i for i in range(len(new))]
    if new != ends or len(vocabulary) != max(vocabulary.values(), default=-1) + 1:
        spec["model"]["vocab"] = ids | vocabulary


def post_processor(special: SpecialTokens) -> dict | None:
    """Returns what puts the BOS token before each text, None where there is none."""
    name = special.name_of(special.bos_id)
    if name is None:
        return None
    first, second = (
        [
            {"SpecialToken": {"id": name, "type_id": number}},
            {"Sequence": {"id": text, "type_id": number}},
        ]
        for number, text in enumerate("AB")
    )
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {
            name: {"id": name, "ids": [special.bos_id], "tokens": [name]}
        },
    }


def tiktoken_json(spec: EncodingSpec) -> dict:
    """Returns the tokenizer.json of a tiktoken encoding, without special tokens."""
    ranks = sorted(spec.ranks.items(), key=lambda item: item[1])
    merges = [
        [spell_bytes(token[:cut]), spell_bytes(token[cut:])]
        for token, _ in ranks
        for cut in range(1, len(token))
        if token[:cut] in spec.ranks and token[cut:] in spec.ranks
    ]
    splits = [_split(_possessive_groups(spec.pattern))] if merges else []
    spell = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    model = _bpe(
        {spell_bytes(token): rank for token, rank in ranks},
        merges,
        ignore_merges=bool(merges),  # tiktoken takes a whole known piece at once
    )
    return _tokenizer(
        model,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*splits, spell]},
        decoder={"type": "ByteLevel"} | {k: spell[k] for k in _BYTE_LEVEL_FLAGS},
    )


_BYTE_LEVEL_FLAGS = ("add_prefix_space", "trim_offsets", "use_regex")


def _possessive_groups(pattern: str) -> str:
    """Returns a pattern for Oniguruma, where `{1,3}+` would repeat `{1,3}`.

    What follows such a repeat in tiktoken's patterns is the end of an alternative,
    where being possessive makes no difference.
    """
    return re.sub(r"(\{\d+,\d*\})\+(?=\||$)", r"\1", pattern)


def sentencepiece_json(model: bytes) -> dict:
    """Returns the tokenizer.json of a sentencepiece model, its unknown piece added.

    Raises ValueError for a model of words or characters.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise ValueError(
            f"a sentencepiece model of type {trainer.model_type} has no tokenizer.json;"
            " train it with model_type=bpe or unigram"
        )
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise ValueError(
            "a sentencepiece model with treat_whitespace_as_suffix="
            f"{trainer.treat_whitespace_as_suffix} and escape_whitespaces="
            f"{normalizer.escape_whitespaces} has no tokenizer.json; train it with "
            "their defaults, false and true"
        )
    if normalizer.precompiled_charsmap:
        _log.warning(
            "the sentencepiece model normalises text (%s); its tokenizer.json does so "
            "a character cluster at a time, and may give other ids for text with "
            'combining characters or "\\r\\n"',
            normalizer.name,
        )
    unigram = trainer.model_type == _UNIGRAM
    splits = [re.escape(piece) for piece in _longest_first(proto, _USER_DEFINED)]
    if unigram:
        splits += _breaks(proto)
    spec = _tokenizer(
        _unigram(proto) if unigram else _piece_bpe(proto),
        normalizer={"type": "Sequence", "normalizers": _normalizers(normalizer)},
        pre_tokenizer=_split("|".join(splits)) if splits else None,
        decoder={"type": "Sequence", "decoders": _decoders(proto)},
    )
    unknown = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == _UNKNOWN}
    add_special_tokens(spec, unknown)
    return spec


def _piece_bpe(proto) -> dict:
    """Returns the model of a sentencepiece BPE, which merges by the pieces' scores."""
    normal = {p.piece: p.score for p in proto.pieces if p.type == _NORMAL}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in sorted(normal, key=normal.__getitem__, reverse=True)
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return _bpe(
        {p.piece: i for i, p in enumerate(proto.pieces)},
        merges,
        unk_token=next(p.piece for p in proto.pieces if p.type == _UNKNOWN),
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
        ignore_merges=any(p.type == _USER_DEFINED for p in proto.pieces),
    )


def _unigram(proto) -> dict:
    return {
        "type": "Unigram",
        "unk_id": [p.type for p in proto.pieces].index(_UNKNOWN),
        "vocab": [[p.piece, p.score] for p in proto.pieces],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }


def _breaks(proto) -> list[str]:
    """Returns patterns of the first character of text that spells a byte or a control.

    Set apart, it keeps the library's Unigram from taking the text for the piece.
    """
    pieces = _longest_first(proto, _CONTROL, _UNKNOWN)
    breaks = [f"{re.escape(p[0])}(?={re.escape(p[1:])})" for p in pieces]
    if proto.trainer_spec.byte_fallback:
        breaks.append("<(?=0x[0-9A-F]{2}>)")
    return breaks


def _longest_first(proto, *types: int) -> list[str]:
    return sorted((p.piece for p in proto.pieces if p.type in types), key=len)[::-1]


def _normalizers(normalizer) -> list[dict]:
    found = []
    if normalizer.precompiled_charsmap:
        charsmap = base64.b64encode(normalizer.precompiled_charsmap).decode()
        found.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if normalizer.remove_extra_whitespaces:
        # sentencepiece takes away a "▁" at the end of a text, as if it were a space.
        found.append(_replace({"Regex": rf"\A +|[ {_SPACE}]+\z"}, ""))
        found.append(_replace({"Regex": " {2,}"}, " "))
    if normalizer.add_dummy_prefix:
        found.append({"type": "Prepend", "prepend": _SPACE})
    return [*found, _replace({"String": " "}, _SPACE)]


def _decoders(proto) -> list[dict]:
    decoders = [_replace({"String": _SPACE}, " ")]
    if proto.trainer_spec.byte_fallback:
        decoders.append({"type": "ByteFallback"})
    decoders.append({"type": "Fuse"})
    if proto.normalizer_spec.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return decoders


def _replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _split(pattern: str) -> dict:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], **options) -> dict:
    defaults = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    options = defaults | options
    return {"type": "BPE", **options, "vocab": vocabulary, "merges": merges}


def _tokenizer(model: dict, *, pre_tokenizer, decoder, normalizer=None) -> dict:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
