"""Bytes that a token adds to decoded text, from its name and the tokenizer's decoder.

Nothing here imports jax, and `tokenizers` not either: a decoder is read as the JSON that
tokenizer.json holds of it.
"""

import json
import re
from collections.abc import Callable, Sequence

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
# Byte-level BPE names a byte by its Latin-1 character, hidden ones from U+0100 on.
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + n): byte for n, byte in enumerate(_HIDDEN)}

Step = Callable[[str], str | bytes]


def pieces(names: Sequence[str], decoder: str | bytes) -> list[bytes]:
    """What each name adds to a text that holds other text before it.

    Joined bytes are the decoded text, but for two things that a decoder does to a whole
    text: a space at its beginning may be stripped, and a run of <0x..> tokens that is no
    UTF-8 becomes U+FFFD throughout, while here its readable bytes stay readable.

    Args:
      decoder: the JSON of a decoder, as in tokenizer.json.

    Raises:
      ValueError: the decoder is of a kind whose bytes are not known.
    """
    steps = _steps(json.loads(decoder))
    return [_spell(name, steps) for name in names]


def _spell(name: str, steps: Sequence[Step]) -> bytes:
    piece: str | bytes = name
    for step in steps:
        if isinstance(piece, str):  # bytes are final
            piece = step(piece)
    return piece.encode("utf-8", "replace") if isinstance(piece, str) else piece


def _steps(decoder: dict | None) -> list[Step]:
    kind = decoder["type"] if decoder else "none"
    if kind == "Sequence":
        parts = decoder["decoders"]
        kinds = [part["type"] for part in parts]
        fuse = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
        # What comes after Fuse sees the whole text; stripping touches but its ends.
        if set(kinds[fuse + 1 :]) <= {"Strip"}:
            return [step for part in parts[:fuse] for step in _steps(part)]
        kind = " after ".join([kinds[-1], "Fuse"])
    elif kind in _STEPS:
        return [_STEPS[kind](decoder)]
    elif kind == "Fuse":
        return []
    raise ValueError(
        f"the bytes of tokens are not known for the decoder {kind}; a tokenizer with "
        "ByteLevel, Metaspace or Replace and ByteFallback is needed"
    )


def _byte_level(_: dict) -> Step:
    def step(name: str) -> bytes:
        if all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return name.encode("utf-8", "replace")  # an added token, spelled as it is

    return step


def _metaspace(decoder: dict) -> Step:
    return lambda name: name.replace(decoder["replacement"], " ")


def _replace(decoder: dict) -> Step:
    pattern, content = decoder["pattern"], decoder["content"]
    if "String" not in pattern:
        raise ValueError(
            f"the bytes of tokens are not known where the decoder replaces {pattern}; "
            "a plain string is needed"
        )
    return lambda name: name.replace(pattern["String"], content)


def _byte_fallback(_: dict) -> Step:
    def step(name: str) -> str | bytes:
        byte = _BYTE.fullmatch(name)
        return bytes([int(byte[1], 16)]) if byte else name

    return step


_STEPS: dict[str, Callable[[dict], Step]] = {
    "ByteLevel": _byte_level,
    "Metaspace": _metaspace,
    "Replace": _replace,
    "ByteFallback": _byte_fallback,
}
