"""ALFRED's rooms: floor plans and tables read from the alfworld wheel.

The wheel holds 120 real floor plans with their fixed receptacles, and which classes of
object were found in each. What is added here is where a class of object is kept.
"""

import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

_HOME_WEIGHTS = (0.65, 0.2)  # of the first and second home; the others share the rest
# Receptacles that real rooms have but the floor plans give no pose for, and how many.
_WITHOUT_POSE = {
    "StoveBurner": 2,
    "CoffeeMachine": 1,
    "GarbageCan": 1,
    "ToiletPaperHanger": 1,
    "TowelHolder": 1,
    "HandTowelHolder": 1,
}
# Where a class of object is kept, most usual first. The same in every room: this is
# what can be learned in the training rooms and used in the unseen ones.
_HOMES = """
AlarmClock: SideTable Desk Dresser; Apple: CounterTop Fridge; BaseballBat: Bed;
BasketBall: Bed ArmChair Sofa; Book: Bed Sofa Desk CoffeeTable CounterTop;
Bowl: Microwave Fridge Shelf DiningTable; Box: Sofa Desk Dresser;
Bread: Microwave CounterTop; ButterKnife: Drawer CounterTop; CD: Desk Drawer;
Candle: Toilet CoffeeTable; CellPhone: Bed Sofa CounterTop; Cloth: BathtubBasin Drawer;
CreditCard: Desk CoffeeTable CounterTop; Cup: SinkBasin Cabinet;
DishSponge: SinkBasin CounterTop; Egg: Fridge Microwave; Fork: Drawer SinkBasin;
Glassbottle: Fridge CounterTop; HandTowel: HandTowelHolder SinkBasin;
Kettle: StoveBurner CounterTop; KeyChain: SideTable Dresser Sofa CoffeeTable;
Knife: CounterTop Drawer; Ladle: Drawer SinkBasin; Laptop: Desk Sofa Bed;
Lettuce: Fridge SinkBasin; Mug: CoffeeMachine Desk SinkBasin;
Newspaper: CoffeeTable Sofa; Pan: StoveBurner SinkBasin; PaperTowel: CounterTop Toilet;
Pen: Desk Drawer SideTable; Pencil: Drawer Desk; PepperShaker: Drawer CounterTop;
Pillow: Bed Sofa ArmChair; Plate: SinkBasin Microwave; Plunger: Cabinet;
Pot: StoveBurner Fridge; Potato: SinkBasin Microwave; RemoteControl: Sofa ArmChair;
SaltShaker: CounterTop Drawer; SoapBar: SinkBasin BathtubBasin Toilet;
SoapBottle: CounterTop Toilet; Spatula: CounterTop Drawer; Spoon: SinkBasin Drawer;
SprayBottle: Toilet Cabinet; Statue: Shelf CoffeeTable; TennisRacket: Bed Dresser;
TissueBox: CoffeeTable Toilet; ToiletPaper: ToiletPaperHanger Toilet;
ToiletPaperRoll: ToiletPaperHanger Toilet; Tomato: Fridge GarbageCan;
Towel: TowelHolder; Vase: Shelf CoffeeTable; Watch: Dresser CoffeeTable;
WateringCan: SideTable CoffeeTable; WineBottle: Fridge GarbageCan
"""


@dataclasses.dataclass(frozen=True)
class Receptacle:
    id: str  # AI2-THOR's: class and position
    kind: str
    location: str


@dataclasses.dataclass(frozen=True)
class Room:
    """A floor plan of ALFRED: fixed receptacles, and what may lie in them."""

    number: int
    kind: str
    receptacles: tuple[Receptacle, ...]
    classes: tuple[str, ...]  # of objects that can be carried
    lamps: tuple[str, ...]

    @property
    def kinds(self) -> list[str]:
        return sorted({r.kind for r in self.receptacles})

    def of(self, kind: str) -> list[Receptacle]:
        """The receptacles of a class, the one called 'KIND 1' first."""
        chosen = [r for r in self.receptacles if r.kind == kind]
        return sorted(chosen, key=lambda r: mangled(r.id), reverse=True)


@functools.cache
def wheel() -> Path:
    """Folder of the alfworld package.

    It is found, not imported: importing alfworld makes ~/.cache/alfworld and sets an
    environment variable.

    Raises:
      ImportError: the package is missing.
    """
    spec = importlib.util.find_spec("alfworld")
    if spec is None or spec.origin is None:
        raise ImportError(
            "ALFWorld is not installed: pip install 'skillsd_jax[alfworld]'"
        )
    return Path(spec.origin).parent


@functools.cache
def constants() -> ModuleType:
    """ALFRED's tables: scenes, affordances, what may lie in what."""
    return table(wheel() / "gen" / "constants.py")


@functools.lru_cache(maxsize=512)
def room(number: int, max_receptacles: int = 0) -> Room:
    """Floor plan `number`.

    Args:
      number: of the ALFRED scene.
      max_receptacles: a larger room loses the last of its most frequent receptacles
        (cabinets, drawers) until it fits; 0 keeps all.
    """
    tables, layouts = constants(), wheel() / "gen" / "layouts"
    kind = next(k for k, numbers in tables.SCENE_TYPE.items() if number in numbers)
    poses = json.loads((layouts / f"FloorPlan{number}-openable.json").read_text())
    found = set(json.loads((layouts / f"FloorPlan{number}-objects.json").read_text()))
    holds = tables.VAL_RECEPTACLE_OBJECTS
    receptacles = []
    for name, (x, z, turn, tilt) in sorted(poses.items()):
        cls = name.split("|")[0] + ("Basin" if "Basin" in name else "")
        if cls in set(holds) - tables.MOVABLE_RECEPTACLES_SET:
            place = f"loc|{round(x / 0.25)}|{round(z / 0.25)}|{turn // 90}|{tilt}"
            receptacles.append(Receptacle(name, cls, place))
    receptacles += _added_receptacles(number, found, {r.kind for r in receptacles})
    carried = set().union(*holds.values())
    lamps = sorted(found & tables.VAL_ACTION_OBJECTS["Toggleable"])
    # Sliced objects are left out, as ALFWorld's own games do.
    classes = sorted(c for c in found & carried if not c.endswith("Sliced"))
    whole = Room(number, kind, tuple(receptacles), tuple(classes), tuple(lamps))
    return _fitted(whole, max_receptacles)


def scenes(split: str, rooms: str) -> list[int]:
    """ALFRED's training scenes for 'train', its unseen ones for the other splits."""
    if rooms not in ("kitchen", "all"):
        raise ValueError(f"rooms={rooms!r} must be 'kitchen' or 'all'")
    tables = constants()
    train = split == "train"
    numbers = tables.TRAIN_SCENE_NUMBERS if train else tables.TEST_SCENE_NUMBERS
    kitchens = tables.SCENE_TYPE["Kitchen"]
    return [n for n in numbers if rooms == "all" or n in kitchens]


def homes(kinds: Sequence[str], cls: str, avoid: str = "") -> dict[str, float]:
    """Chance of each receptacle class of a room to hold an object of class `cls`."""
    holds = constants().VAL_RECEPTACLE_OBJECTS
    kinds = [k for k in kinds if k != avoid and cls in holds[k]]
    usual = [k for k in _home_table().get(cls, ()) if k in kinds]
    order = usual + [k for k in kinds if k not in usual]
    rest = (1 - sum(_HOME_WEIGHTS)) / max(1, len(order) - len(_HOME_WEIGHTS))
    weights = [*_HOME_WEIGHTS, *[rest] * len(order)][: len(order)]
    return {k: w / sum(weights) for k, w in zip(order, weights, strict=True)}


def mangled(name: str) -> str:
    """AI2-THOR's id as PDDL spells it."""
    signs = {"-": "minus", "|": "bar", "+": "plus", ".": "dot", ",": "comma"}
    return re.sub(r"[-|+.,]", lambda m: f"_{signs[m[0]]}_", name)


def position(rng: np.random.Generator) -> str:
    """Made-up coordinates, spelt as AI2-THOR does."""
    values = rng.uniform([-4, 0.3, -4], [4, 1.8, 4])
    return "|".join(f"{value:+06.2f}" for value in values)


def _added_receptacles(
    number: int, found: set[str], have: set[str]
) -> list[Receptacle]:
    rng = np.random.default_rng(number)
    added = []
    for cls, count in _WITHOUT_POSE.items():
        if cls in found - have:
            x, z, turn = rng.integers([-9, -9, 0], [10, 10, 4])
            place = f"loc|{x}|{z}|{turn}|30"
            for _ in range(count):
                added.append(Receptacle(f"{cls}|{position(rng)}", cls, place))
    return added


def _fitted(whole: Room, max_receptacles: int) -> Room:
    kept = list(whole.receptacles)
    while max_receptacles and len(kept) > max_receptacles:
        groups = {k: [r for r in whole.of(k) if r in kept] for k in whole.kinds}
        kept.remove(max(groups.values(), key=len)[-1])
    return dataclasses.replace(whole, receptacles=tuple(kept))


@functools.cache
def _home_table() -> dict[str, tuple[str, ...]]:
    entries = (entry.split(":") for entry in _HOMES.split(";"))
    return {cls.strip(): tuple(kinds.split()) for cls, kinds in entries}


@functools.cache
def text(path: Path) -> str:
    """A text file of the wheel, read once."""
    return path.read_text()


@functools.cache
def table(path: Path) -> ModuleType:
    """A file of tables of the wheel, executed without importing its package."""
    spec = importlib.util.spec_from_file_location(f"_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
