"""ALFWorld's engine without its waste: Fast Downward's state, ALFWorld's text.

The stock engine translates a game's PDDL four times per episode and parses the text of
every admissible command at every step. Here a game is grounded once and kept, and the
text of a command is made once. What the agent reads, what it may do, and when the game
ends is the same, transition by transition.
Imports fast_downward and textworld: import this module only when they are wanted.
"""

import collections
import ctypes
import dataclasses
import functools
import importlib.metadata
import pickle
import struct
import tempfile
import threading
import zlib
from pathlib import Path

import fast_downward

from skillsd_jax.artifacts import cached, content_hash
from skillsd_jax.environments.alfworld_games import Game
from skillsd_jax.environments.alfworld_ground import Translation, translate
from skillsd_jax.environments.alfworld_state import Fact, Facts, negated, read_atom
from skillsd_jax.environments.alfworld_text import Entity, Grammar, Scope

_KEPT = 2048  # translations kept in memory, about 20 kB each
# The translator works with globals, and all copies of the library share a registry.
_LOCK = threading.Lock()
# Libraries without an engine. They are used again, never unloaded: all copies share one
# registry (a unique symbol), which would go on pointing into the unloaded one.
_IDLE: list[ctypes.CDLL] = []


@dataclasses.dataclass(frozen=True)
class _Choice:
    """A command that can be given now."""

    operator: int
    effects: int  # how many atoms it sets
    action: str
    ids: tuple[str, ...]


class Engine:
    """One live game at a time; many engines live in one process.

    Args:
      cache: folder of translated games.
    """

    def __init__(self, cache: Path):
        self._cache = cache
        self._library = _idle_library() or _load_library()
        self.admissible: list[str] = []  # commands, sorted
        self.won = False

    def start(self, game: Game) -> str:
        """Loads a game; returns its introduction."""
        translation = translated(game, self._cache)
        self._translation = translation
        self._grammar = Grammar(game.grammar)
        self.facts = Facts(translation.facts, translation.types)
        self.entities = _entities(translation.facts)
        self._worded: dict[str, str] = {}  # operator → command
        with _LOCK:
            self._library.load_sas(translation.sas)
        self._look()
        return self._grammar.derive("#intro#", Scope(self.facts, self.entities, {}))

    def step(self, command: str) -> str:
        """Obeys a command; returns what is said. Unknown ones change nothing."""
        choice = self._choices.get(command.strip())
        if choice is None:
            return "Nothing happens."
        atoms = (fast_downward.Atom * choice.effects)()
        self._library.apply_operator(choice.operator, atoms)
        for atom in atoms:
            fact = read_atom(atom.name)
            self.facts.remove(negated(fact))
            self.facts.add(fact)
        said = self._grammar.feedback(choice.action)
        text = self._grammar.derive(said, self._scope(choice.action, choice.ids))
        self._look()
        return text

    def wording(self, action: str) -> str:
        """How the game words the command of an action."""
        return self._grammar.template(action)

    def close(self) -> None:
        """Hands the library to the next engine; this one is of no more use."""
        if self._library is not None:
            _IDLE.append(self._library)
            self._library = None

    def _look(self) -> None:
        """Reads off the library what can be done, and whether the game is won."""
        count = self._library.get_applicable_operators_count()
        operators = (fast_downward.Operator * count)()
        self._library.get_applicable_operators(operators)
        self._choices: dict[str, _Choice] = {}
        for operator in operators:
            name = operator.name
            action, *ids = name.split()
            command = self._worded.get(name)
            if command is None:
                command = self._worded[name] = self._word(action, tuple(ids))
            if command not in self._choices:
                effects = operator.nb_effect_atoms
                choice = _Choice(operator.id, effects, action, tuple(ids))
                self._choices[command] = choice
        self.admissible = sorted(self._choices)
        self.won = self._library.check_goal()

    def _scope(self, action: str, ids: tuple[str, ...]) -> Scope:
        bound = dict(zip(self._translation.slots[action], ids, strict=False))
        return Scope(self.facts, self.entities, bound)

    def _word(self, action: str, ids: tuple[str, ...]) -> str:
        scope = self._scope(action, ids)
        return self._grammar.derive(self._grammar.template(action), scope)


def translated(game: Game, folder: Path) -> Translation:
    """The translation of a game: from memory, from disk, or made and put in both."""
    key = content_hash(game.domain, game.problem)
    with _LOCK:
        packed = _PACKED.pop(key, None)
        if packed is None:
            packed = cached(
                folder / f"alfworld-{_versions()}",
                f"{key}.game",
                make=lambda: zlib.compress(
                    pickle.dumps(translate(game.domain, game.problem)), 1
                ),
                load=Path.read_bytes,
                save=Path.write_bytes,
            )
        _PACKED[key] = packed
        while len(_PACKED) > _KEPT:
            _PACKED.popitem(last=False)
    return pickle.loads(zlib.decompress(packed))


_PACKED: collections.OrderedDict[str, bytes] = collections.OrderedDict()


def _versions() -> str:
    """Names what a stored translation depends on; count up when its form changes."""
    return content_hash(importlib.metadata.version("fast-downward-textworld"), 1)


def _entities(facts: tuple[Fact, ...]) -> dict[str, Entity]:
    """Ids → the names the agent reads: class and number, numbered from the last id."""
    ids = sorted({id for _, arguments in facts for id in arguments})
    classes = {id: _class(id) for id in ids if "_bar_" in id}
    left = collections.Counter(classes.values())
    entities = {}
    for id in ids:
        if id in classes:
            name = f"{classes[id]} {left[classes[id]]}"
            left[classes[id]] -= 1
        else:
            name = f"{id} "  # the stock engine leaves room for a number
        entities[id] = Entity(id, name)
    return entities


def _class(id: str) -> str:
    return id.split("_bar_", 1)[0] + ("basin" if "basin" in id else "")


def _idle_library() -> ctypes.CDLL | None:
    with _LOCK:
        return _IDLE.pop() if _IDLE else None


def _load_library() -> ctypes.CDLL:
    """A copy of Fast Downward of its own: its state is global.

    Only what is mapped into memory is copied, 2 MB of 34: the rest is for debuggers.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "libdownward.so"
        path.write_bytes(_mapped_part(Path(fast_downward.interface.DOWNWARD_LIB_PATH)))
        with _LOCK:
            library = ctypes.CDLL(str(path))
    library.load_sas.argtypes = [ctypes.c_char_p]
    library.check_goal.restype = ctypes.c_bool
    return library


@functools.cache
def _mapped_part(path: Path) -> bytes:
    """An ELF file up to the end of its last loadable segment."""
    content = path.read_bytes()
    if content[:5] != b"\x7fELF\x02":
        return content
    (start,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    ends = []
    for header in range(start, start + size * count, size):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", content, header)
        if kind == 1:  # PT_LOAD
            ends.append(offset + length)
    return content[: max(ends)]
