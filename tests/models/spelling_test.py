"""Bytes of single tokens against what whole sequences decode to."""

import functools
import itertools
import random

import pytest
import tokenizers
from tokenizers import decoders

from skillsd_jax.models import spelling, tokenizer
from tests.models import folders

CORPUS = ["go to cabinet 12, it's über 日本\n<action>look</action>"]
KINDS = ["trained", "llama", *folders.KINDS]


@functools.cache
def words(kind):
    if kind == "trained":
        return tokenizer.train(CORPUS, ["<action>", " cabinet 12"])
    if kind == "llama":  # as Llama 2's: text may lose a space at its beginning
        backend = tokenizers.Tokenizer.from_str(words("trained")._backend.to_str())
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
        return tokenizer.Tokenizer(backend, {})
    backend = folders.marked(kind)
    backend.add_tokens(["<a tag>", "日本", "naïve"])
    return tokenizer.Tokenizer(backend, {})


def byte_tokens(kind):
    """Ids of bytes that are no character alone, where sentencepiece spells them so."""
    names = [f"<0x{byte:02X}>" for byte in range(128, 256)]
    ids = {words(kind)._backend.token_to_id(name) for name in names}
    return ids - {None}


@pytest.mark.parametrize("kind", KINDS)
def test_joined_pieces_are_the_decoded_text(kind):
    """Behind a first token: what a decoder does to the beginning of a text is its own."""
    rng = random.Random(kind)
    pieces = words(kind).pieces()
    assert len(pieces) == words(kind).max_id + 1
    single = [[id] for id in range(len(pieces)) if id not in words(kind)._control]
    torn = byte_tokens(kind)
    units = [unit for unit in single if not torn & set(unit)]
    units += [words(kind).encode(character) for character in "éü日🍎"] * 9
    assert bool(torn) == (kind in ("trained", "llama"))
    first = words(kind)._backend.token_to_id("a") or single[0][0]
    for _ in range(300):
        ids = [first, *itertools.chain(*rng.choices(units, k=12))]
        text = b"".join(pieces[id] for id in ids).decode(errors="replace")
        assert text == words(kind).decode(ids)


@pytest.mark.parametrize("kind", ["bpe", "trained"])
def test_torn_characters_are_the_same_bytes_and_read_almost_alike(kind):
    pieces = words(kind).pieces()
    ids = words(kind).encode("é🍎")
    assert b"".join(pieces[id] for id in ids) == "é🍎".encode()
    cut = ids[:-1]
    text = b"".join(pieces[id] for id in cut).decode(errors="replace")
    assert text == "é\ufffd"
    if kind == "bpe":
        assert words(kind).decode(cut) == text
    else:  # sentencepiece gives a whole run of bytes up
        assert words(kind).decode(cut) == "\ufffd" * 5


def test_a_piece_has_its_space_also_where_a_decoder_would_strip_it():
    for kind in ("llama", "unigram that leads"):
        id = words(kind)._backend.token_to_id("▁")
        assert words(kind).pieces()[id] == b" "
        assert words(kind).decode([id]) == ""


def test_control_and_unknown_ids_add_nothing():
    pieces = words("trained").pieces(2000)
    assert len(pieces) == 2000
    for id in (words("trained").stop_id, words("trained").pad_id, 1999):
        assert pieces[id] == b""
    said = words("trained").encode("<action>x cabinet 12\n")
    assert [pieces[id] for id in said] == [b"<action>", b"x", b" cabinet 12", b"\n"]


def test_added_tokens_of_byte_level_tokenizers_are_spelled_as_they_are():
    """All but those that a byte-level decoder takes for names of bytes."""
    pieces, backend = words("bpe").pieces(), words("bpe")._backend
    for name in ("<think>", "<a tag>", "日本"):
        assert pieces[backend.token_to_id(name)] == name.encode()
    assert pieces[backend.token_to_id("naïve")] == b"na\xefve"
    assert words("bpe").decode([backend.token_to_id("naïve")]) == "na\ufffdve"


def test_steps_apply_in_their_order_until_bytes_are_known():
    parts = [decoders.ByteFallback(), decoders.Replace("▁", " ")]
    names = ["<0xE2>", "▁a", "<0x▁>"]
    found = spelling.pieces(names, decoders.Sequence(parts).__getstate__())
    assert found == [b"\xe2", b" a", b"<0x >"]


@pytest.mark.parametrize(
    "decoder, told",
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]), "after Fuse"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0)]), "Strip"),
        (decoders.Replace(tokenizers.Regex("a+"), "b"), "a plain string"),
    ],
)
def test_decoders_that_do_more_are_refused(decoder, told):
    with pytest.raises(ValueError, match=told):
        spelling.pieces(["a"], decoder.__getstate__())


def test_a_tokenizer_without_a_decoder_is_refused():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"x": 0}, []))
    backend.add_special_tokens(list(folders.CONTROL))
    with pytest.raises(ValueError, match="the decoder none"):
        tokenizer.Tokenizer(backend, {}).pieces()
