"""Small tokenizer folders as Hugging Face keeps them, of several kinds."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
PLAIN = ("<think>", "</think>", "<tool_call>")  # added, but anyone may say them
PIECES = ("user", "assistant", "system", "look", "one", "ques", "tion", "th", "ink")

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUIET = "You are a quiet test."
POLITE = (  # speaks first where nobody else does, as Qwen2.5's
    "{% if messages[0].role != 'system' %}"
    f"{{{{ '<|im_start|>system\n{QUIET}<|im_end|>\n' }}}}"
    "{% endif %}" + CHATML
)
FORGETFUL = (  # drops earlier thoughts and can begin after an empty one, as Qwen3's
    CHATML.replace("m.content", "m.content.split('</think>')[-1].lstrip('\n')")
    + "{% if add_generation_prompt and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
THINKER = CHATML.replace("assistant\n", "assistant\n<think>\n")


def bpe():
    """Byte-level with merges of its own, as Qwen's."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in PIECES:
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            pieces.append(word[: end + 1])
    vocabulary = {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges))))
    words = tokenizers.Regex(
        r" ?\p{L}+|\p{N}|\s*[\r\n]+|\s+(?!\S)|[^\s\p{L}\p{N}]+|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def unigram(scheme="never", spelled=("<unk>",)):
    """Metaspace; `spelled` are pieces the model itself holds."""
    words = [*PIECES, *("▁" + piece for piece in PIECES)]
    characters = ["▁", "\n", *map(chr, range(33, 127))]
    pieces = [(piece, -1.0) for piece in dict.fromkeys((*spelled, *words))]
    pieces += [(piece, -3.0) for piece in characters]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return backend


def folded(backend, normalizer):
    backend.normalizer = normalizer
    return backend


KINDS = {
    "bpe": bpe,
    "unigram": unigram,
    "unigram that leads": lambda: unigram("first"),
    "unigram that leads always": lambda: unigram("always"),
    "unigram that holds markers": lambda: unigram("first", ("<unk>", *CONTROL)),
    "bpe, nfkc": lambda: folded(bpe(), normalizers.NFKC()),
    "bpe, lowercase": lambda: folded(bpe(), normalizers.Lowercase()),
    "unigram that leads and holds markers, nfkc": lambda: folded(
        unigram("first", ("<unk>", *CONTROL)), normalizers.NFKC()
    ),
    "unigram that holds markers, nfkc": lambda: folded(
        unigram("never", ("<unk>", *CONTROL)), normalizers.NFKC()
    ),
}


def marked(kind, marks=None):
    """A backend with its control tokens, which have the options `marks`."""
    backend = KINDS[kind]()
    tokens = [tokenizers.AddedToken(name, **(marks or {})) for name in CONTROL]
    backend.add_special_tokens(tokens)
    backend.add_tokens(list(PLAIN))
    return backend


def write(path, kind="bpe", template=CHATML, how="string", marks=None, **settings):
    """Makes the folder `path`.

    Args:
      kind: of KINDS.
      template: chat template.
      how: where it is kept: 'string' or 'list' in the settings, 'file', 'nothing'.
      marks: options of the control tokens.
      settings: of tokenizer_config.json.
    """
    path.mkdir()
    marked(kind, marks).save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    } | settings
    if how == "string":
        settings["chat_template"] = template
    elif how == "list":
        named = [{"name": "default", "template": template}] if template else []
        settings["chat_template"] = [{"name": "tool_use", "template": "no"}, *named]
    elif how == "file":
        (path / "chat_template.jinja").write_text(template)
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
