"""What a folder's chat template does, held against the turns that `Tokenizer` frames.

Prompts are never rendered by a template: it would strip earlier thoughts and read control
tokens in text. It is rendered once, on a probe, before anything starts.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

OPEN, CLOSE = "<|im_start|>", "<|im_end|>"
# What Qwen3's chat template puts before a reply with enable_thinking=False.
NO_THOUGHT = "<think>\n\n</think>\n\n"

_ASK = f"{OPEN}assistant\n"
_SYSTEM = ("system", "be brief")
_SINGLE = (("user", "one question\nof two lines"),)
_SEVERAL = (*_SINGLE, ("assistant", "one answer"), ("user", "another question"))
_EXCERPT = 60  # characters shown of what differs


class Words(Protocol):
    """What the check needs of a tokenizer: our frame, and its transformers twin."""

    @property
    def hf(self): ...

    def encode(self, text: str) -> Sequence[int]: ...

    def open_turn(self, role: str) -> Sequence[int]: ...

    def close_turn(self) -> Sequence[int]: ...


def chosen(settings: dict, source: str) -> str:
    """The default template of a tokenizer_config.json.

    Raises:
      ValueError: there is none.
    """
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if not isinstance(template, str) or not template.strip():
        raise ValueError(
            f"{source} has no chat template: neither chat_template.jinja nor a default "
            "chat_template in tokenizer_config.json; save the tokenizer of an instruct "
            "model there"
        )
    return template


@dataclasses.dataclass(frozen=True)
class Manner:
    """What a template adds of its own accord.

    Args:
      system: the message it puts in front when none is given; "" if none.
      no_thought: what it puts before a reply with enable_thinking=False; "" if nothing.
    """

    system: str
    no_thought: str


def manner(words: Words, source: str) -> Manner:
    """Renders the template on a few conversations.

    Args:
      words: its `hf` renders the template.
      source: the file with the template, for errors.

    Raises:
      ValueError: the template fails, frames turns otherwise than ChatML, opens a thought
        by itself, or the tokenizer reads its text as other ids than ours.
    """
    shown = _render(words.hf, source, _SINGLE)
    system = _leading(shown, source)
    head = [("system", system)] if system else []
    for turns in (_SINGLE, _SEVERAL, (_SYSTEM, *_SINGLE), (_SYSTEM, *_SEVERAL)):
        said = turns if turns[0] == _SYSTEM else (*head, *turns)
        came, wanted = _render(words.hf, source, turns), _framed(said)
        if came != wanted:
            raise ValueError(
                f"{source} does not frame turns as ChatML: " + _differ(wanted, came)
            )
        _check_ids(words, source, said, came)
    wanted = _framed((*head, *_SINGLE))
    came = _render(words.hf, source, _SINGLE, thinking=False)
    if came not in (wanted, wanted + NO_THOUGHT):
        raise ValueError(
            f"{source} with enable_thinking=False begins replies neither at once nor "
            "after an empty thought: " + _differ(wanted + NO_THOUGHT, came)
        )
    return Manner(system, came.removeprefix(wanted))


def _leading(shown: str, source: str) -> str:
    """The system message before a single question."""
    body = _framed(_SINGLE)
    head, found, tail = shown.partition(body)
    if found and "<think>" in tail:
        raise ValueError(
            f"{source} opens a thought before every reply ({tail[:_EXCERPT]!r} after "
            f"{_ASK!r}); thinking-only models are not supported: take one whose "
            "template leaves it to enable_thinking, or an instruct model"
        )
    opened, closed = f"{OPEN}system\n", f"{CLOSE}\n"
    system = head.removeprefix(opened).removesuffix(closed)
    given = system and OPEN not in system and CLOSE not in system
    if head != (f"{opened}{system}{closed}" if given else ""):
        wanted = f"{opened}…{closed}{body}" if shown.startswith(opened) else body
        raise ValueError(
            f"{source} does not frame turns as ChatML: " + _differ(wanted, shown)
        )
    return system


def _framed(turns: Sequence[tuple[str, str]]) -> str:
    told = [f"{OPEN}{role}\n{content}{CLOSE}\n" for role, content in turns]
    return "".join(told) + _ASK


def _render(hf, source: str, turns, thinking: bool = True) -> str:
    import jinja2

    messages = [{"role": role, "content": content} for role, content in turns]
    options = {"add_generation_prompt": True, "enable_thinking": thinking}
    # A template is a program of the folder's author and fails like one.
    failures = (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    )
    try:
        return hf.apply_chat_template(messages, tokenize=False, **options)
    except failures as fault:
        roles = ", ".join(role for role, _ in turns)
        raise ValueError(
            f"{source} fails on a conversation of {roles}: "
            f"{type(fault).__name__}: {fault}"
        ) from None


def _check_ids(words: Words, source: str, turns, text: str) -> None:
    """Raises where the text, read in one piece, is not the ids of its turns."""
    ours: list[int] = []
    for role, content in turns:
        ours += [*words.open_turn(role), *words.encode(content), *words.close_turn()]
    ours += words.open_turn("assistant")
    theirs = words.hf(text, add_special_tokens=False)["input_ids"]
    if ours != theirs:
        name = words.hf.convert_ids_to_tokens
        raise ValueError(
            f"{source}: its tokenizer reads a prompt as other ids than its turns one by "
            "one, as one does that puts a space before every text: "
            + _differ(name(ours), name(theirs))
        )


def _differ(wanted, came) -> str:
    """Both from shortly before they part."""
    pairs = enumerate(zip(wanted, came))
    same = next((i for i, (a, b) in pairs if a != b), min(len(wanted), len(came)))
    part = slice(max(0, same - _EXCERPT // 3), same + _EXCERPT)
    return f"expected {wanted[part]!r}, came {came[part]!r}"
