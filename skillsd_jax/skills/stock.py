"""The bank a run begins with: its libraries, as far as the run can show them."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from skillsd_jax import config as settings
from skillsd_jax.skills import library
from skillsd_jax.skills.bank import ROOM, Bank
from skillsd_jax.skills.skill import Skill
from skillsd_jax.skills.summarizer import render
from skillsd_jax.skills.written import Room

NAMED = 8  # families that a line lists


def open_bank(
    config: settings.Skills,
    room: Room | None = None,
    families: Collection[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Bank:
    """A bank with the skills of the libraries that are set, and nothing else.

    Args:
      config: the libraries, and how much the bank holds.
      room: of a skill in a prompt; a longer one is left out. None: not known yet, all
        are taken.
      families: kinds that a training task may be of; (): not known yet.
      say: told, a line at a time, what will never be shown.

    Raises:
      ValueError: a library cannot be read, nothing of it fits the prompt, or it is more
        than the bank holds.
    """
    skills: list[Skill] = []
    read: list[Skill] = []
    for path in library.paths(config.library):
        loaded = [library.renamed(s, families) for s in library.load(path)]
        read += loaded
        skills += loaded if room is None else _shown(path, loaded, room, say)
    # Of all that was read, so that a longer prompt does not end in another refusal.
    _check_capacity(read, config)
    if families:
        _say_unmet(skills, families, say)
    bank = _bank(config)
    bank.absorb(skills)
    return bank


def _shown(
    path: str, skills: Sequence[Skill], room: Room, say: Callable[[str], None]
) -> list[Skill]:
    """Those that fit a prompt."""
    sizes = [room.measure(render(skill)) for skill in skills]
    kept = [skill for skill, size in zip(skills, sizes) if size <= room.tokens]
    if not kept:
        raise ValueError(
            f"skills.library: none of the {len(skills)} skills of {path} can be shown in "
            f"prompt.max_skill_length={room.tokens} tokens; the shortest needs "
            f"{min(sizes)}, all of them fit {max(sizes)}: raise it, or leave the library "
            "out"
        )
    if len(kept) < len(skills):
        say(
            f"library {path}: {len(skills) - len(kept)} of {len(skills)} skills are "
            f"longer than prompt.max_skill_length={room.tokens} tokens and left out; "
            f"{max(sizes)} would hold all"
        )
    return kept


def _check_capacity(skills: Sequence[Skill], config: settings.Skills) -> None:
    """Raises ValueError where a shelf would lose skills before the run begins."""
    most = max(len(skills), 1)
    bank = Bank(most, most, most, config.similarity)
    bank.absorb(skills)
    held = bank.skills(bank.all_rows())
    count = Counter((s.scope, s.task or s.family) for s in held)
    for (scope, name), needed in count.most_common():
        room = getattr(config, ROOM[scope])
        if needed > room:
            whose = {"task": f"of task {name:.80}", "family": f"for family {name:.80}"}
            raise ValueError(
                f"skills.library has {needed} skills {whose.get(scope, 'for all')} and "
                f"skills.{ROOM[scope]}={room}; set it to at least {needed}, or some "
                "would be evicted unseen"
            )


def _say_unmet(
    skills: Sequence[Skill], families: Collection[str], say: Callable[[str], None]
) -> None:
    """Says which families no training task is of."""
    of_family = [s.family for s in skills if s.scope == "family"]
    unmet = Counter(name for name in of_family if name not in families)
    if unmet:
        names = [f"{name:.40}" for name in sorted(unmet)]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        say(
            f"library: {unmet.total()} skills are for {', '.join(names[:NAMED])}{more}, "
            f"which no training task is of; tasks are of {', '.join(families)}. Only "
            "the shelf 'bank' of skills.retrieval shows them"
        )


def _bank(config: settings.Skills) -> Bank:
    return Bank(
        config.capacity,
        config.family_capacity,
        config.global_capacity,
        config.similarity,
    )
