"""Text from outside: freed of what a prompt could take for markup, read within bounds."""

import json
import re
import unicodedata
from collections.abc import Iterator

DEPTH = 32  # of brackets in JSON that is read
BRACES = 64  # places of a text where an object is looked for
# Control, format (zero-width, writing direction) and halves of surrogate pairs.
HIDDEN = ("Cc", "Cf", "Cs")
# A JSON string, closed or not, or a bracket. Possessive: no way back, so linear.
_PIECE = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_OPENING = re.compile(r"<(?=\S)")


def plain(text: str) -> str:
    """The text without hidden characters, tags and chat markers; lines stay.

    Every '<' gets a space after it: '</skill>' becomes '< /skill>' and '<|im_end|>'
    becomes '< |im_end|>', which no tokenizer and no server takes for a control token.
    White space other than line ends becomes spaces.
    """
    kept = "".join(
        _visible(c) if unicodedata.category(c) in HIDDEN else c for c in text
    )
    return _OPENING.sub("< ", kept)


def line(text: str) -> str:
    """The same on one line, runs of white space collapsed."""
    return " ".join(plain(text).split())


def loads(text: str):
    """JSON of at most `DEPTH` levels; whole numbers are read as 0.

    Nothing here needs a number, and reading one of a million digits takes minutes.

    Raises:
      ValueError: it is no JSON, or too deep.
    """
    depth = 0
    for piece in _PIECE.finditer(text):
        depth += _step(text[piece.start()])
        if depth > DEPTH:
            raise ValueError(f"JSON of more than {DEPTH} levels")
    return json.loads(text, parse_int=lambda _: 0)


def objects(text: str) -> Iterator[dict]:
    """The JSON objects that stand in a text, whatever stands around them.

    In the order they begin, an outer one before what it holds. An object is looked for
    at the first `BRACES` opening braces, so that the time is linear in the length.
    """
    start = -1
    for _ in range(BRACES):
        start = text.find("{", start + 1)
        if start < 0:
            return
        end = _end(text, start)
        if end is None:
            continue
        try:
            found = loads(text[start:end])
        except ValueError:
            continue
        yield found


def _visible(hidden: str) -> str:
    if hidden == "\n":
        return hidden
    return " " if hidden.isspace() else ""


def _step(mark: str) -> int:
    """What a piece that begins so adds to the depth."""
    if mark in "[{":
        return 1
    return -1 if mark in "]}" else 0


def _end(text: str, start: int) -> int | None:
    """Behind the bracket that closes the one at `start`; None: never, or too deep."""
    depth = 0
    for piece in _PIECE.finditer(text, start):
        depth += _step(text[piece.start()])
        if depth == 0:
            return piece.end()
        if depth > DEPTH:
            return None
    return None
