"""ALFWorld: household tasks in the real text engine, on real or generated games."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from skillsd_jax import config
from skillsd_jax.artifacts import cache_folder
from skillsd_jax.environments import (
    alfworld_expert,
    alfworld_games,
    alfworld_rooms,
    chores,
)
from skillsd_jax.environments.base import TimeStep, parse_action, split_index
from skillsd_jax.trajectory import Task

_MISSING = "ALFWorld is not installed: pip install 'skillsd_jax[alfworld]'"
_VIEWS = ("notes", "native")
_LOOKING = ("look", "inventory", "examine", "help")  # commands that change nothing


class Alfworld:
    """ALFWorld as an environment; options: config.Alfworld.

    The attribute `data` says which games are played: 'original' (ALFWorld's own, from
    `games` or $ALFWORLD_DATA) or 'generated'.

    Raises:
      ImportError: the engine is missing.
      ValueError: an option is wrong, or a folder of games is empty or damaged.
    """

    def __init__(self, split: str = "train", require_think: bool = False, **options):
        split_index(split)  # refuses an unknown split
        chosen = config.Alfworld(**options)
        if chosen.view not in _VIEWS:
            raise ValueError(f"view={chosen.view!r} must be one of {_VIEWS}")
        alfworld_rooms.wheel()
        try:
            from skillsd_jax.environments.alfworld_engine import Engine
        except ImportError as error:
            raise ImportError(_MISSING) from error
        self._games = _games(split, chosen)
        self.data = self._games.data
        self.families = alfworld_games.parse_families(chosen.families)
        self.max_steps = chosen.max_steps
        self._engine = Engine(cache_folder(chosen.cache))
        self._split = split
        self._native = chosen.view == "native"
        self._require_think = require_think
        self._done = True

    def reset(self, seed: int) -> TimeStep:
        self._game = game = self._games.game(seed)
        intro = self._engine.start(game)
        self._task = Task(
            "alfworld", seed, self._split, game.goal.family, game.instruction
        )
        older = self._engine.wording("putobject").startswith("put ")
        self._move = chores.OLD_MOVE if older else chores.MOVE
        self._notes = chores.Notes(game.instruction, intro, self._move)
        self._steps, self._done = 0, False
        self._knows_tools: bool | None = None
        return TimeStep(
            self._observation(intro), admissible=self._admissible(), feedback=intro
        )

    def task(self) -> Task:
        return self._task

    def step(self, text: str) -> TimeStep:
        if self._done:
            raise RuntimeError("the episode is over or not begun: call reset(seed)")
        action, readable = parse_action(text, self._require_think)
        allowed = action in self._engine.admissible
        feedback = self._engine.step(action)
        self._notes.read(action, feedback)
        success = self._engine.won
        self._steps += 1
        self._done = success or self._steps >= self.max_steps
        return TimeStep(
            observation=self._observation(feedback),
            reward=float(success),
            done=self._done,
            success=success,
            admissible=() if self._done else self._admissible(),
            action=action,
            valid=readable and (allowed or self._exists(action)),
            effective=allowed and not action.startswith(_LOOKING),
            feedback=feedback,
        )

    def close(self) -> None:
        self._done = True
        self._engine.close()

    def demonstrate(
        self, rng: np.random.Generator, workflow: Sequence[str] = (), noise: float = 0.0
    ) -> str:
        """A searcher; whether it knows the tools is drawn once per episode (½)."""
        if self._knows_tools is None:
            self._knows_tools = bool(rng.random() < 0.5)
        command = chores.player(self._notes, rng, workflow, noise, self._knows_tools)
        return f"<action>{command}</action>"

    def expert_workflow(self) -> list[str]:
        """A plan that wins from here, read off the true state."""
        names = {id: each.name for id, each in self._engine.entities.items()}
        return alfworld_expert.plan(
            self._engine.facts, names, self._game.goal, self._move
        )

    @classmethod
    def lexicon(cls, **options) -> list[str]:
        """Names of everything in the rooms that the options allow."""
        chosen = config.Alfworld(**options)
        numbers = [
            number
            for split in ("train", "test")
            for number in alfworld_rooms.scenes(split, chosen.rooms)
        ]
        copies = (
            2 if "pick_two" in alfworld_games.parse_families(chosen.families) else 1
        )
        names = set()
        for number in numbers:
            room = alfworld_rooms.room(number, chosen.max_receptacles)
            counts = {kind: len(room.of(kind)) for kind in room.kinds}
            counts |= dict.fromkeys([*room.classes, *room.lamps], copies)
            for kind, count in counts.items():
                names.add((kind.lower(), 0))
                names.update((kind.lower(), i + 1) for i in range(count))
        return chores.lexicon(
            [f"{kind} {i}" if i else kind for kind, i in sorted(names)]
        )

    def _exists(self, action: str) -> bool:
        """Whether the action is worded as a command about things of this game."""
        command = chores.read_command(action)
        if command is None:
            return False
        names = {each.name for each in self._engine.entities.values()}
        return names.issuperset({command.thing, command.place} - {""})

    def _observation(self, feedback: str) -> str:
        return feedback if self._native else self._notes.render()

    def _admissible(self) -> tuple[str, ...]:
        """Without 'help', which only costs a turn."""
        return tuple(each for each in self._engine.admissible if each != "help")


def _games(
    split: str, chosen: config.Alfworld
) -> alfworld_games.Generated | alfworld_games.Original:
    """The user's games, where there are any; else generated ones."""
    limits = (split, chosen.rooms, chosen.families, chosen.max_receptacles)
    folder = Path(chosen.games or os.environ.get("ALFWORLD_DATA", "")) / "json_2.1.1"
    if folder.is_dir():
        return alfworld_games.Original(folder, *limits)
    if chosen.games:
        raise ValueError(
            f"games={chosen.games!r} has no folder json_2.1.1; name the folder that "
            "alfworld-download filled, or leave games unset for generated games"
        )
    return alfworld_games.Generated(*limits)
