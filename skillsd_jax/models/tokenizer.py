"""Text to ids and back: trained in process, or read from a Hugging Face folder.

Control tokens mark turns and are added by `open_turn` and `close_turn` only; no text
encodes to one. Nothing here imports jax or torch; transformers only where `hf` is used,
by the check of a folder's chat template too.
"""

import functools
import io
import json
import pathlib
import re
import tempfile
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers

from skillsd_jax import artifacts
from skillsd_jax.models import spelling, template

_OPEN, _CLOSE, _PAD = template.OPEN, template.CLOSE, "<|endoftext|>"
_SETTINGS = "tokenizer_config.json"
_SPACE = "▁"  # how sentencepiece spells a space
_MARKER = re.compile(r"<\|.*\|>", re.DOTALL)
_NOWHERE = "\U000ffffd"  # for private use: no vocabulary knows it
_ANCHORS = ("\n", ".", "a")  # a text that begins after one of them is not the first
_FRAME = ("\n", "system\n", "user\n", "assistant\n")
_CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


class Tokenizer:
    """ChatML tokenizer over a `tokenizers` backend.

    Args:
      backend: holds <|im_start|> and <|im_end|> as single added tokens.
      settings: content of tokenizer_config.json, the chat template included.
      source: where the chat template stands, for errors.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: dict,
        source: str = "the tokenizer",
    ):
        self._backend, self._settings, self._source = backend, settings, source
        self._open = _control_id(backend, _OPEN)
        self.stop_id = _control_id(backend, _CLOSE)
        pad = settings.get("pad_token") or _PAD
        pad_id = backend.token_to_id(_content(pad))
        self.pad_id: int = self.stop_id if pad_id is None else pad_id
        control = {_OPEN, _CLOSE} | {
            token.content
            for token in backend.get_added_tokens_decoder().values()
            if token.special or _MARKER.fullmatch(token.content)
        }
        self._control = {backend.token_to_id(text) for text in control}
        self._forbidden = self._control - self._unknown()
        self._leads = self._backend.decode(self._ids("x") * 2) != "xx"
        # Text spelling a space as sentencepiece does must not turn into a space.
        spelled = [backend.token_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()]
        self._spelled_space = [id for id in spelled if id is not None]
        broken = sorted(control, key=len, reverse=True)
        broken += [_SPACE] if self._spelled_space else []
        self._broken = re.compile("|".join(map(re.escape, broken)))
        self._cached = functools.lru_cache(maxsize=65536)(self._encode)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def control_id(self, token: str) -> int:
        """The id of a control token; ValueError if there is none of that name."""
        return _control_id(self._backend, token)

    @property
    def max_id(self) -> int:
        """The largest id; more than vocab_size − 1 where ids are left out."""
        return max(self._backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: never a control id. Lone surrogates become '?'."""
        return list(self._cached(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control ids are left out, torn bytes become U+FFFD.

        So are ids the tokenizer does not know: a model has more rows than that (Qwen's
        are padded to 151936), and a sample may fall on one.
        """
        kept = [int(id) for id in ids if int(id) not in self._control]
        return self._backend.decode(kept, skip_special_tokens=False)

    def pieces(self, size: int | None = None) -> list[bytes]:
        """What each id adds to decoded text; b"" for control ids and unknown ones.

        Joined, they are what `decode` gives, but for what `spelling.pieces` tells of.

        Args:
          size: ids to tell of, a model's rows for instance; all known ones if None.

        Raises:
          ValueError: the decoder is of a kind whose bytes are not known.
        """
        size = self.max_id + 1 if size is None else size
        names = [
            "" if id in self._control else self._backend.id_to_token(id) or ""
            for id in range(size)
        ]
        decoder = self._backend.decoder
        return spelling.pieces(names, decoder.__getstate__() if decoder else "null")

    def means(self, other: "Tokenizer") -> bool:
        """Whether every id means the same to both."""
        return self._backend.get_vocab() == other._backend.get_vocab()

    def open_turn(self, role: str) -> list[int]:
        """<|im_start|>role and a newline."""
        return [self._open, *self.encode(f"{role}\n")]

    def close_turn(self) -> list[int]:
        """<|im_end|> and a newline."""
        return [self.stop_id, *self.encode("\n")]

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as transformers reads them."""
        _write(folder, self._backend, self._settings)

    @functools.cached_property
    def manner(self) -> template.Manner:
        """What the chat template adds of its own accord.

        Raises:
          ValueError: there is no template, or it does not do what our turns do.
        """
        if self._settings.get("chat_template") == _CHAT_TEMPLATE:
            return template.Manner(system="", no_thought=template.NO_THOUGHT)
        template.chosen(self._settings, self._source)
        return template.manner(self, self._source)

    @property
    def default_system(self) -> str:
        """What the chat template says as system when it is given none; "" if nothing."""
        return self.manner.system

    @property
    def no_thought(self) -> str:
        """What it puts before a reply that shall not be thought over; "" if nothing."""
        return self.manner.no_thought

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells tokenizers apart."""
        return artifacts.content_hash(self._backend.to_str())

    @functools.cached_property
    def hf(self):
        """The same as a transformers PreTrainedTokenizerFast.

        Unlike `encode`, it reads control tokens in text: it is what a chat template
        needs and what text from outside must not reach.
        """
        from transformers import PreTrainedTokenizerFast

        with tempfile.TemporaryDirectory() as folder:
            kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
            _write(folder, self._backend, self._settings | kind)
            return PreTrainedTokenizerFast.from_pretrained(folder)

    def _encode(self, text: str) -> tuple[int, ...]:
        text = text.encode("utf-8", "replace").decode()
        ids, start = [], 0
        while found := self._broken.search(text, start):
            if found[0] == _SPACE:
                ids += self._part(text, start, found.start()) + self._spelled_space
                start = found.end()
            else:  # cut behind the first character: no part spells the token
                ids += self._part(text, start, found.start() + 1)
                start = found.start() + 1
        return (*ids, *self._part(text, start, len(text)))

    def _part(self, text: str, start: int, end: int) -> list[int]:
        """Ids of text[start:end], cut further until none of them is a control id.

        A normaliser may fold other characters into a marker, an added token may take
        spaces in, the model may hold a marker: it is what comes out that counts. A
        single character that is a control token by itself becomes '?'.
        """
        ids: list[int] = []
        todo, first = [text[start:end]], start == 0
        while todo:
            part = todo.pop()
            new, spans = self._whole(part) if first else self._continued(part)
            found = [span for id, span in zip(new, spans) if id in self._forbidden]
            if not found:
                ids += new
                first = first and not part
            elif len(part) > 1:
                todo += reversed(_cut(part, found))
            elif part != "?":
                todo.append("?")
        return ids

    def _whole(self, text: str):
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _continued(self, text: str):
        """As `_whole`, without the space that some tokenizers put before a text."""
        for anchor in _ANCHORS if self._leads else ():
            ids, spans = self._whole(anchor + text)
            if not any(start < 1 < end for start, end in spans):
                kept = [i for i, (start, _) in enumerate(spans) if start >= 1]
                shifted = [(spans[i][0] - 1, spans[i][1] - 1) for i in kept]
                return [ids[i] for i in kept], shifted
        return self._whole(text)

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _unknown(self) -> set[int]:
        """What unknown text becomes: no control token, unless it marks something."""
        marks = {self._open, self.stop_id, self.pad_id}
        return {
            id
            for id in self._ids(_NOWHERE)
            if id not in marks and not _MARKER.fullmatch(self._backend.id_to_token(id))
        }


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Parts of a text, each shorter; every span is cut in two or stands alone."""
    cuts = set()
    for start, end in spans:
        cuts |= {(start + end) // 2} if end - start > 1 else {start, end}
    inner = sorted(cut for cut in cuts if 0 < cut < len(text)) or [len(text) // 2]
    return [text[a:b] for a, b in zip([0, *inner], [*inner, len(text)])]


def _write(
    folder: str | pathlib.Path, backend: tokenizers.Tokenizer, settings: dict
) -> None:
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / _SETTINGS).write_text(text, encoding="utf-8")


def _control_id(backend: tokenizers.Tokenizer, token: str) -> int:
    id = backend.token_to_id(token)
    if id is None:
        raise ValueError(
            f"the tokenizer has no {token}; a ChatML tokenizer, as Qwen's, is needed"
        )
    return id


def load(folder: str | pathlib.Path) -> Tokenizer:
    """Reads what `save` wrote, or the fast tokenizer of any Hugging Face folder."""
    folder = pathlib.Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; a folder with a fast tokenizer is needed"
        )
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.no_truncation()  # a file may ask for either; both would spoil prompts
    backend.no_padding()
    return Tokenizer(backend, *_settings(folder))


def _settings(folder: pathlib.Path) -> tuple[dict, str]:
    """What is said beside tokenizer.json, and which file holds the chat template."""
    path, template_path = folder / _SETTINGS, folder / "chat_template.jinja"
    settings = _read(path)
    if "added_tokens_decoder" not in settings:  # else transformers reads no older file
        for name, value in _read(folder / "special_tokens_map.json").items():
            several = isinstance(value, list)
            settings[name] = [*map(_content, value)] if several else _content(value)
    if template_path.is_file():
        settings["chat_template"] = template_path.read_text(encoding="utf-8")
        return settings, str(template_path)
    return settings, str(path if "chat_template" in settings else folder)


def _read(path: pathlib.Path) -> dict:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _content(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token


def train(texts: Iterable[str], lexicon: Sequence[str], pieces: int = 200) -> Tokenizer:
    """Trains sentencepiece BPE on `texts`; deterministic.

    Args:
      texts: what the model will read and write; any text round-trips, but text like
        this in few tokens.
      lexicon: phrases that are one token wherever they occur (the leftmost, then the
        longest wins), with their leading space where they have one.
      pieces: learned pieces, at most; 256 bytes, the lexicon and the characters of
        `texts` come on top.
    """
    backend = _fast(*_sentencepiece(list(texts), lexicon, pieces))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _CLOSE,
        "pad_token": _PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    return Tokenizer(backend, settings)


def _sentencepiece(texts: list[str], lexicon: Sequence[str], pieces: int):
    """The trained processor and the phrases, spelled its way.

    BPE, because a unigram model does not promise to take a phrase whole. The defaults
    would fold spaces and normalise characters.
    """
    import sentencepiece

    if not any(text.strip() for text in texts):
        raise ValueError("no text to train a tokenizer on; pass some of what it reads")
    phrases = [phrase.replace(" ", _SPACE) for phrase in (*_FRAME, *lexicon)]
    phrases = [phrase for phrase in dict.fromkeys(phrases) if phrase]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=257 + len(phrases) + len(set().union(*texts)) + pieces,
        hard_vocab_limit=False,
        user_defined_symbols=phrases,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=1 << 24,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return processor, phrases


def _fast(processor, phrases: Sequence[str]) -> tokenizers.Tokenizer:
    """The same segmentation as a `tokenizers` BPE, control tokens added behind it."""
    names = [processor.id_to_piece(id) for id in range(processor.vocab_size())]
    vocabulary = {name: id for id, name in enumerate(names)}
    first = 257 + len(phrases)  # unknown, bytes and phrases come first
    score = {name: processor.get_score(id) for id, name in enumerate(names)}
    learned = set(names[first:])
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(learned, key=lambda piece: (-score[piece], piece))
        for cut in range(1, len(piece))
        if piece[:cut] in learned and piece[cut:] in learned
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=names[0], byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_tokens(
        [tokenizers.AddedToken(phrase, normalized=True) for phrase in phrases]
    )
    backend.add_special_tokens([_OPEN, _CLOSE, _PAD])
    return backend
