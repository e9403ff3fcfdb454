"""Sokoban boards: rules, a breadth-first solver, and levels made by reverse play."""

import collections
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from skillsd_jax.environments.base import in_split, split_index

MOVES = ("up", "down", "left", "right")
SYMBOLS = "#_O√XPS"
WALL, FLOOR, TARGET, BOX_ON_TARGET, BOX, PLAYER, PLAYER_ON_TARGET = SYMBOLS
_SEARCH_LIMIT = 200_000  # states a search visits before it gives up
_STARTS = 32  # starting states tried on one board
_TURN = 0.35  # chance that the carving walk changes direction
_DIG = 0.3  # chance that it also opens the square beside it


@dataclasses.dataclass(frozen=True)
class Board:
    """What never moves. A square is row · size + column; the border is wall."""

    size: int
    floor: frozenset[int]  # squares that are not wall
    targets: frozenset[int]

    @property
    def steps(self) -> tuple[int, int, int, int]:
        """How far each of MOVES goes, in squares."""
        return -self.size, self.size, -1, 1

    def name(self, square: int) -> str:
        """Coordinates of a square: 'r2c3', counted from 0 at the top left."""
        return f"r{square // self.size}c{square % self.size}"


@dataclasses.dataclass(frozen=True)
class State:
    """What moves."""

    player: int
    boxes: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """Which levels are kept: bounds on a shortest plan. No box starts on a target."""

    min_pushes: int
    min_moves: int
    max_moves: int


def move(board: Board, state: State, action: int) -> State:
    """The state after one of MOVES; the same state if the way is blocked."""
    step = board.steps[action]
    square = state.player + step
    if square not in board.floor:
        return state
    if square not in state.boxes:
        return State(square, state.boxes)
    beyond = square + step
    if beyond not in board.floor or beyond in state.boxes:
        return state
    return State(square, state.boxes - {square} | {beyond})


def solve(board: Board, state: State) -> tuple[int, ...] | None:
    """A shortest plan, as indices into MOVES.

    Returns:
      () if every box is on a target already; None if there is no plan, or none within
      the search limit.
    """
    came: dict[State, tuple[State, int] | None] = {state: None}
    queue = collections.deque([state])
    while queue and len(came) < _SEARCH_LIMIT:
        current = queue.popleft()
        if current.boxes == board.targets:
            return _trace(came, current)
        for action in range(4):
            following = move(board, current, action)
            if following not in came:
                came[following] = current, action
                queue.append(following)
    return None


def _trace(came: dict, state: State) -> tuple[int, ...]:
    plan = []
    while came[state] is not None:
        state, action = came[state]
        plan.append(action)
    return tuple(reversed(plan))


def pushes(board: Board, state: State, plan: tuple[int, ...]) -> int:
    """How many moves of the plan shift a box."""
    count = 0
    for action in plan:
        following = move(board, state, action)
        count += following.boxes != state.boxes
        state = following
    return count


def distances(board: Board) -> dict[State, int]:
    """Moves to the nearest solved state, by playing backwards from all of them.

    A move backwards steps away from a square and may pull the box that stands on the
    player's other side. Past the search limit only the nearest states are listed.
    """
    solved = [
        State(square, board.targets) for square in sorted(board.floor - board.targets)
    ]
    found = dict.fromkeys(solved, 0)
    queue = collections.deque(solved)
    while queue and len(found) < _SEARCH_LIMIT:
        state = queue.popleft()
        for before in _undone(board, state):
            if before not in found:
                found[before] = found[state] + 1
                queue.append(before)
    return found


def _undone(board: Board, state: State) -> Iterator[State]:
    for step in board.steps:
        square = state.player - step
        if square not in board.floor or square in state.boxes:
            continue
        yield State(square, state.boxes)
        box = state.player + step
        if box in state.boxes:
            yield State(square, state.boxes - {box} | {state.player})


@functools.lru_cache(maxsize=8192)
def draw_level(
    split: str, seed: int, size: int, boxes: int, difficulty: Difficulty
) -> tuple[Board, State]:
    """Level `seed` of a split: the first draw that passes the filters.

    Raises:
      ValueError: a thousand boards in a row had no level that hard.
    """
    number = split_index(split)
    for attempt in range(1000):
        rng = np.random.default_rng([number, seed, attempt])
        board = _carve(rng, size, boxes)
        if board is None:
            continue
        for start in _starts(rng, board, difficulty):
            if in_split(split, "\n".join(draw(board, start))):
                return board, start
    raise ValueError(
        f"no level of size={size} with boxes={boxes} fits {difficulty}: lower "
        "min_pushes or min_moves, or raise size or max_steps"
    )


def _starts(
    rng: np.random.Generator, board: Board, wanted: Difficulty
) -> Iterator[State]:
    far_enough = [
        state
        for state, moves in distances(board).items()
        if wanted.min_moves <= moves <= wanted.max_moves
        and not state.boxes & board.targets
    ]
    for index in rng.permutation(len(far_enough))[:_STARTS]:
        state = far_enough[index]
        plan = solve(board, state)
        if plan is not None and pushes(board, state, plan) >= wanted.min_pushes:
            yield state


def _carve(rng: np.random.Generator, size: int, boxes: int) -> Board | None:
    """Carves a room by a random walk and scatters the targets; None if too small."""
    inner = range(1, size - 1)
    inside = {row * size + column for row in inner for column in inner}
    steps = (-size, size, -1, 1)
    length = 3 * size
    turns, digs = (rng.random((2, length)) < [[_TURN], [_DIG]]).tolist()
    headings, sides = rng.integers(4, size=(2, length)).tolist()
    square = sorted(inside)[int(rng.integers(len(inside)))]
    heading, floor = steps[headings[0]], {square}
    for turn, dig, new, side in zip(turns, digs, headings, sides, strict=True):
        heading = steps[new] if turn else heading
        if dig and square + steps[side] in inside:
            floor.add(square + steps[side])
        if square + heading in inside:
            square += heading
            floor.add(square)
    if len(floor) < 2 * boxes + 1:
        return None
    targets = rng.permutation(sorted(floor))[:boxes].tolist()
    return Board(size, frozenset(floor), frozenset(targets))


def draw(board: Board, state: State) -> list[str]:
    """The rows of the grid in symbols."""
    rows = []
    for row in range(board.size):
        squares = range(row * board.size, (row + 1) * board.size)
        rows.append("".join(_symbol(board, state, square) for square in squares))
    return rows


def _symbol(board: Board, state: State, square: int) -> str:
    if square not in board.floor:
        return WALL
    on_target = square in board.targets
    if square in state.boxes:
        return BOX_ON_TARGET if on_target else BOX
    if square == state.player:
        return PLAYER_ON_TARGET if on_target else PLAYER
    return TARGET if on_target else FLOOR
