"""What the decoder of a tokenizer.json makes of one token after another."""

import re
from dataclasses import dataclass

from relax.text.byte_level import spelled_bytes

_SUPPORTED = ("ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace")
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the name of a token becomes bytes, and what the first of a text loses."""

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    # A character that the first token loses wherever it has it.
    first_loses: str | None = None
    # Whether a space at the start of a text is dropped.
    drops_space: bool = False

    def piece(self, name: str) -> bytes:
        """Returns the bytes of a token inside a text."""
        if self.byte_level:
            spelled = spelled_bytes(name)
            return name.encode() if spelled is None else spelled
        for old, new in self.replacements:
            name = name.replace(old, new)
        byte = self.byte_fallback and _BYTE_PIECE.fullmatch(name)
        return bytes.fromhex(byte[1]) if byte else name.encode()

    def first(self, name: str) -> tuple[bytes, bool]:
        """Returns the bytes of a token before any other, and if they start a text."""
        if self.first_loses is not None:
            return self.piece(name.replace(self.first_loses, "")), True
        piece = self.piece(name)
        return piece.removeprefix(b" ") if self.drops_space else piece, bool(piece)


def read_decoding(decoder: dict | None) -> Decoding:
    """Returns what a decoder does, as tokenizer.json has it.

    Raises ValueError for one of another type, and for what cannot be done as ids come:
    steps in another order, or something cut off the end of a text.
    """
    steps = _steps(decoder)
    types = [step["type"] for step in steps]
    if unknown := [name for name in types if name not in _SUPPORTED]:
        raise ValueError(
            f"a decoder of type {unknown[0]} is not supported; these are: "
            f"{', '.join(_SUPPORTED)}, and a Sequence of them"
        )
    if types == ["ByteLevel"]:
        return Decoding(byte_level=True)
    if "ByteLevel" in types or not _in_order(types):
        raise ValueError(
            f"a decoder of {' then '.join(types)} is not supported; ByteLevel stands "
            "alone, and the others come as Replace or Metaspace, ByteFallback, Fuse, "
            "Strip"
        )
    metaspace = next((s for s in steps if s["type"] == "Metaspace"), None)
    first_loses = None
    if metaspace is not None and metaspace["prepend_scheme"] != "never":
        first_loses = metaspace["replacement"]
    return Decoding(
        byte_fallback="ByteFallback" in types,
        replacements=tuple(_replacement(s) for s in steps if _replacement(s)),
        first_loses=first_loses,
        drops_space=any(_drops_space(s) for s in steps if s["type"] == "Strip"),
    )


def _steps(decoder: dict | None) -> list[dict]:
    if decoder is None:
        return [{"type": "null"}]
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps(part)]
    return [decoder]


def _in_order(types: list[str]) -> bool:
    """Returns whether one pass over the tokens does it."""
    order = {"Replace": 0, "Metaspace": 0, "ByteFallback": 1, "Fuse": 2, "Strip": 3}
    places = [order[name] for name in types]
    return places == sorted(places) and ("Strip" not in types or "Fuse" in types)


def _replacement(step: dict) -> tuple[str, str] | None:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    if step["type"] != "Replace":
        return None
    if "String" not in step["pattern"]:
        raise ValueError(
            f"a decoder that replaces {step['pattern']} is not supported; it must "
            'replace a {"String": ...}'
        )
    return step["pattern"]["String"], step["content"]


def _drops_space(step: dict) -> bool:
    if (step["content"], step["stop"]) != (" ", 0) or step["start"] > 1:
        raise ValueError(
            f"a decoder that strips {step['start']} times {step['content']!r} from the "
            f"start and {step['stop']} times from the end is not supported; it must "
            "strip one space from the start"
        )
    return step["start"] == 1
