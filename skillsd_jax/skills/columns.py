"""Numbers of many skills as arrays that grow in place, and lists of their rows."""

import numpy as np

FLOATS = ("total", "reward")
INTEGERS = ("uses", "born", "last_shown")


class Columns:
    """One row per skill that ever came in, oldest first; a row that went is dead.

    Attributes, each an array [rows]:
      uses: times shown.
      total: reward credited over all uses.
      reward, born, last_shown: see Skill and Stats.
      alive: whether the row is still held.
    """

    uses: np.ndarray
    total: np.ndarray
    reward: np.ndarray
    born: np.ndarray
    last_shown: np.ndarray
    alive: np.ndarray

    def __init__(self):
        self._room = {name: np.zeros(8) for name in FLOATS}
        self._room |= {name: np.zeros(8, np.int64) for name in INTEGERS}
        self._room["alive"] = np.zeros(8, bool)
        self._show(0)

    def __len__(self) -> int:
        return len(self.alive)

    def append(self, **values: float) -> int:
        """Adds a live row of these values, one per column; returns its number."""
        row = len(self)
        if row == len(self._room["alive"]):
            self._room = {name: _wider(column) for name, column in self._room.items()}
        for name, value in values.items():
            self._room[name][row] = value
        self._room["alive"][row] = True
        self._show(row + 1)
        return row

    def value(self, rows) -> np.ndarray | float:
        """Mean reward, the source episode counted as one use: defined when untried."""
        return (self.reward[rows] + self.total[rows]) / (1 + self.uses[rows])

    def keep(self, rows: np.ndarray) -> None:
        """Drops all rows but these, which are renumbered in order."""
        self._room = {name: column[rows] for name, column in self._room.items()}
        self._show(len(rows))

    def _show(self, count: int) -> None:
        for name, column in self._room.items():
            setattr(self, name, column[:count])


class Rows:
    """Ascending row numbers: a shelf, or all that one question is about."""

    def __init__(self):
        self._room = np.zeros(8, np.int64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def array(self) -> np.ndarray:
        """The numbers, oldest first; a view, right until the next change."""
        return self._room[: self._count]

    def append(self, row: int) -> None:
        """Adds a number above all others."""
        if self._count == len(self._room):
            self._room = _wider(self._room)
        self._room[self._count] = row
        self._count += 1

    def remove(self, row: int) -> None:
        """Takes out a number that is there."""
        at = int(np.searchsorted(self.array, row))
        self._room[at : self._count - 1] = self._room[at + 1 : self._count]
        self._count -= 1

    def renumber(self, new: np.ndarray) -> None:
        """Row r becomes new[r], or goes where that is −1; the order stays."""
        moved = new[self.array]
        self._room = moved[moved >= 0]
        self._count = len(self._room)


def _wider(column: np.ndarray) -> np.ndarray:
    """With room for as much again, so that adding one by one is linear in all."""
    room = np.zeros(max(len(column), 8), column.dtype)
    return np.concatenate([column, room])
