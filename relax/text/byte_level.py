"""GPT-2's spelling of bytes by printable characters, which byte-level files use.

A byte that is a printable character of Latin-1 other than a space is spelled by it;
the others, in their order, by the characters from U+0100 on. Radford et al. 2019,
`encoder.py`.
"""

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [value for value in range(256) if value not in _PRINTABLE]
_CHARACTERS = {value: chr(value) for value in _PRINTABLE}
_CHARACTERS |= {value: chr(0x100 + i) for i, value in enumerate(_OTHERS)}
_BYTES = {character: value for value, character in _CHARACTERS.items()}


def spell_bytes(piece: bytes) -> str:
    """Returns the spelling of a piece."""
    return "".join(_CHARACTERS[value] for value in piece)


def spelled_bytes(spelling: str) -> bytes | None:
    """Returns the bytes of a spelling, None where a character spells none."""
    values = [_BYTES.get(character) for character in spelling]
    return None if None in values else bytes(values)
