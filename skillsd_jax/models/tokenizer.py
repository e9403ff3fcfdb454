"""Text to ids and back: trained in process, or read from a Hugging Face folder.

Control tokens mark turns and are added by `open_turn` and `close_turn` only; no text
encodes to one. Nothing here imports jax or torch; transformers only where `hf` is used.
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

_OPEN, _CLOSE, _PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
_SPACE = "▁"  # how sentencepiece spells a space
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
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict):
        self._backend, self._settings = backend, settings
        self._open = _control_id(backend, _OPEN)
        self.stop_id = _control_id(backend, _CLOSE)
        pad = settings.get("pad_token") or _PAD
        pad = pad["content"] if isinstance(pad, dict) else pad
        pad_id = backend.token_to_id(pad)
        self.pad_id: int = self.stop_id if pad_id is None else pad_id
        control = {
            token.content
            for token in backend.get_added_tokens_decoder().values()
            if token.special or re.fullmatch(r"<\|.*\|>", token.content)
        }
        self._control = {backend.token_to_id(text) for text in control}
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

    @property
    def max_id(self) -> int:
        """The largest id; more than vocab_size − 1 where ids are left out."""
        return max(self._backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: never a control id. Lone surrogates become '?'."""
        return list(self._cached(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control ids are left out, torn bytes become U+FFFD."""
        kept = [int(id) for id in ids if int(id) not in self._control]
        return self._backend.decode(kept, skip_special_tokens=False)

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
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        settings = json.dumps(self._settings, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")

    @functools.cached_property
    def hf(self):
        """The same as a transformers PreTrainedTokenizerFast.

        Unlike `encode`, it reads control tokens in text: it is what a chat template
        needs and what text from outside must not reach.
        """
        from transformers import PreTrainedTokenizerFast

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            return PreTrainedTokenizerFast.from_pretrained(folder)

    def _encode(self, text: str) -> tuple[int, ...]:
        text = text.encode("utf-8", "replace").decode()
        ids, start = [], 0
        while found := self._broken.search(text, start):
            if found[0] == _SPACE:
                ids += self._plain(text[start : found.start()]) + self._spelled_space
                start = found.end()
            else:  # cut behind the first character: no part spells the token
                ids += self._plain(text[start : found.start() + 1])
                start = found.start() + 1
        return (*ids, *self._plain(text[start:]))

    def _plain(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


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
    settings = {}
    if (folder / "tokenizer_config.json").is_file():
        text = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
        settings = json.loads(text)
    if (folder / "chat_template.jinja").is_file():
        text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        settings["chat_template"] = text
    return Tokenizer(tokenizers.Tokenizer.from_file(str(path)), settings)


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
