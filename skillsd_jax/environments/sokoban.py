"""Sokoban in text: push every box onto a target.

The return of an episode is the share of boxes on targets at its end, paid as the
difference on every step. The last line of an observation names the squares of the
player and of the boxes: with the command after it, that is how a skill's workflow is
keyed ("r2c3 r3c3 down"), because advice looked up by state is within reach of a small
model and advice looked up by step number is not.
"""

from collections.abc import Sequence

import numpy as np

from skillsd_jax import config
from skillsd_jax.environments import sokoban_levels as levels
from skillsd_jax.environments.base import TimeStep, parse_action, split_index
from skillsd_jax.trajectory import Task

INSTRUCTION = (
    "You are P in the grid. Push every box X onto a target O with up, down, left and "
    "right; a box cannot be pulled, and # is wall."
)
_SOUND = 0.25  # chance that the scripted player without advice sees the right move


class Sokoban:
    """Sokoban as an environment; options: config.Sokoban."""

    def __init__(self, split: str = "train", require_think: bool = False, **options):
        split_index(split)  # refuses an unknown split
        self._options = config.Sokoban(**options)
        self.max_steps = self._options.max_steps
        if self._options.min_moves > self.max_steps:
            raise ValueError(
                f"min_moves={self._options.min_moves} leaves no level that "
                f"max_steps={self.max_steps} turns could solve; lower min_moves"
            )
        self.data, self.families = "generated", (f"boxes_{self._options.boxes}",)
        self._split = split
        self._require_think = require_think
        self._done = True

    def reset(self, seed: int) -> TimeStep:
        options = self._options
        # A plan fits in the turns of an episode, so max_steps shapes the levels too.
        difficulty = levels.Difficulty(
            options.min_pushes, options.min_moves, options.max_steps
        )
        self._board, self._state = levels.draw_level(
            self._split, seed, options.size, options.boxes, difficulty
        )
        self._task = Task("sokoban", seed, self._split, self.families[0], INSTRUCTION)
        self._plan: dict[levels.State, str | None] = {}
        self._steps, self._done = 0, False
        return TimeStep(self._render(), admissible=levels.MOVES)

    def task(self) -> Task:
        return self._task

    def step(self, text: str) -> TimeStep:
        if self._done:
            raise RuntimeError("the episode is over or not begun: call reset(seed)")
        action, readable = parse_action(text, self._require_think)
        exists = action in levels.MOVES
        before = self._state
        if exists:
            self._state = levels.move(self._board, before, levels.MOVES.index(action))
        gain = self._on_target(self._state) - self._on_target(before)
        success = self._state.boxes == self._board.targets
        effective = self._state != before
        self._steps += 1
        self._done = success or self._steps >= self.max_steps
        return TimeStep(
            observation=self._render(),
            reward=gain / len(self._board.targets),
            done=self._done,
            success=success,
            admissible=() if self._done else levels.MOVES,
            action=action,
            valid=readable and exists,
            effective=effective,
            feedback="" if effective else "Nothing happens.",
        )

    def close(self) -> None:
        self._done = True

    def demonstrate(
        self, rng: np.random.Generator, workflow: Sequence[str] = (), noise: float = 0.0
    ) -> str:
        """Follows the workflow's entry for this state; else a plan, now and then.

        Without advice the player makes the move of a shortest plan with a fixed chance
        and a random one otherwise, so that there is something left to learn.
        """
        if noise and rng.random() < noise:
            return _reply(_random_move(rng))
        advice = dict(entry.rpartition(" ")[::2] for entry in workflow)
        told = advice.get(self._key(self._state))
        if told in levels.MOVES:
            return _reply(told)
        sound = rng.random() < _SOUND
        planned = self._planned_move() if sound else None
        return _reply(planned or _random_move(rng))

    def expert_workflow(self) -> list[str]:
        """A shortest plan, one entry per state, as a skill would have it."""
        state, entries = self._state, []
        for action in levels.solve(self._board, state) or ():
            entries.append(f"{self._key(state)} {levels.MOVES[action]}")
            state = levels.move(self._board, state, action)
        return entries

    @classmethod
    def lexicon(cls, **options) -> list[str]:
        inner = range(1, config.Sokoban(**options).size - 1)
        squares = [f"r{row}c{column}" for row in inner for column in inner]
        return [
            *("<action>", "</action>", "<think>", "</think>", INSTRUCTION),
            *("player", " box", " target"),
            *levels.MOVES,
            *levels.SYMBOLS,
            *(f" {word}" for word in (*squares, *levels.MOVES)),
        ]

    def _on_target(self, state: levels.State) -> int:
        return len(state.boxes & self._board.targets)

    def _planned_move(self) -> str | None:
        if self._state not in self._plan:
            state = self._state
            self._plan[state] = None  # stays so in a position without a solution
            for action in levels.solve(self._board, state) or ():
                self._plan[state] = levels.MOVES[action]
                state = levels.move(self._board, state, action)
        return self._plan[self._state]

    def _key(self, state: levels.State) -> str:
        """A state as a workflow names it: the player's square, then the boxes'."""
        squares = [state.player, *sorted(state.boxes)]
        return " ".join(map(self._board.name, squares))

    def _render(self) -> str:
        name = self._board.name
        grid = "\n".join(levels.draw(self._board, self._state))
        boxes = " ".join(map(name, sorted(self._state.boxes)))
        targets = " ".join(map(name, sorted(self._board.targets)))
        player = name(self._state.player)
        return f"{grid}\nplayer {player} box {boxes} target {targets}"


def _random_move(rng: np.random.Generator) -> str:
    return levels.MOVES[int(rng.integers(len(levels.MOVES)))]


def _reply(command: str) -> str:
    return f"<action>{command}</action>"
