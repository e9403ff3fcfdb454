import numpy as np
import pytest

from skillsd_jax.environments import sokoban_levels as levels
from skillsd_jax.environments.base import SPLITS
from skillsd_jax.environments.sokoban_levels import (
    MOVES,
    Board,
    Difficulty,
    State,
    draw,
    draw_level,
    move,
    pushes,
    solve,
)

EASY = Difficulty(min_pushes=1, min_moves=4, max_moves=15)


def parse(text):
    rows = text.split()
    size = len(rows)
    squares = {i: s for i, s in enumerate("".join(rows))}
    board = Board(
        size,
        frozenset(i for i, s in squares.items() if s != "#"),
        frozenset(i for i, s in squares.items() if s in "O√S"),
    )
    player = next(i for i, s in squares.items() if s in "PS")
    return board, State(player, frozenset(i for i, s in squares.items() if s in "X√"))


def play(board, state, *names):
    for name in names:
        state = move(board, state, MOVES.index(name))
    return state


ROOM = "###### #P__## #_X_## #__O## #___## ######"


def test_drawing_is_what_was_parsed():
    for text in (ROOM, "##### #S√## #_X## #O_## #####"):
        assert draw(*parse(text)) == text.split()


def test_player_walks_and_walls_stop_it():
    board, state = parse(ROOM)
    assert play(board, state, "right").player == state.player + 1
    assert play(board, state, "down").player == state.player + 6
    assert play(board, state, "up") == state
    assert play(board, state, "left") == state


def test_box_is_pushed_and_never_pulled():
    board, state = parse(ROOM)
    pushed = play(board, state, "down", "right")
    assert draw(board, pushed)[2] == "#_PX##"
    assert draw(board, play(board, pushed, "left"))[2] == "#P_X##"


@pytest.mark.parametrize(
    "row", ["#PXX_#", "#__PX#", "#_PX√#"], ids=["box", "wall", "box on target"]
)
def test_box_stops_at_a_wall_and_at_another_box(row):
    board, state = parse(f"###### {row} #____# #O_O_# #____# ######")
    assert play(board, state, "right") == state


def test_solution_by_hand_is_found():
    # Right and down push the box to row 3; left, down and right push it one square to
    # the right. A box one row and one column away takes two pushes and three walks.
    board, state = parse(ROOM)
    plan = solve(board, state)
    assert len(plan) == 5
    assert pushes(board, state, plan) == 2
    assert play(board, state, *(MOVES[a] for a in plan)).boxes == board.targets


def test_solved_board_needs_no_move_and_a_deadlock_has_no_plan():
    assert solve(*parse("##### #P√## #__## #__## #####")) == ()
    assert solve(*parse("##### #XP## #__## #_O## #####")) is None


def test_plans_are_as_short_as_playing_backwards_says():
    # Two searches from opposite ends, over every state of 12 boards.
    for seed in range(12):
        board, _ = draw_level("train", seed, 5, 1 + seed % 2, EASY)
        distances = levels.distances(board)
        rng = np.random.default_rng(seed)
        floor = sorted(board.floor)
        for _ in range(40):
            player, *boxes = rng.permutation(floor)[: 1 + len(board.targets)].tolist()
            state = State(player, frozenset(boxes))
            plan = solve(board, state)
            assert (None if plan is None else len(plan)) == distances.get(state)


@pytest.mark.parametrize("boxes", [1, 2])
def test_levels_are_solvable_and_pass_the_filters(boxes):
    wanted = Difficulty(min_pushes=2, min_moves=6, max_moves=11)
    for seed in range(40):
        board, start = draw_level("test", seed, 6, boxes, wanted)
        plan = solve(board, start)
        assert 6 <= len(plan) <= 11
        assert pushes(board, start, plan) >= 2
        assert len(start.boxes) == len(board.targets) == boxes
        assert not start.boxes & board.targets
        assert start.player not in start.boxes
        border = [row for row in draw(board, start)]
        assert set(border[0] + border[-1]) == {"#"}
        assert {row[0] + row[-1] for row in border} == {"##"}


def test_splits_share_no_level():
    drawn = {
        split: {
            tuple(draw(*draw_level(split, seed, 5, 1, EASY))) for seed in range(150)
        }
        for split in SPLITS
    }
    assert len(set().union(*drawn.values())) == sum(map(len, drawn.values()))


def test_impossible_filters_are_refused():
    with pytest.raises(ValueError, match="no level of size=4 .* lower min_pushes"):
        draw_level("train", 0, 4, 1, Difficulty(9, 30, 50))
