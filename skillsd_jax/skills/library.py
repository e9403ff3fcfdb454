"""Libraries of skills that were written beforehand, as files."""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from skillsd_jax.skills import records
from skillsd_jax.skills.skill import Skill, skill_id

MAX_BYTES = 1 << 26  # of a file
MAX_TEXT = 4_000  # characters of a field or of a step
MAX_STEPS = 100
REWARD = 0.5  # nobody played an episode: neither proven nor refuted
NOTHING = "none"  # as the template says of an empty field
FAMILY = "family:"  # of a Markdown heading
# Family, as ALFWorld's task types and other libraries call it → as ours do.
ALIASES = {
    "pick_and_place": "pick",
    "pick_and_place_simple": "pick",
    "look_at_obj_in_light": "look",
    "examine": "look",
    "pick_clean_then_place_in_recep": "clean",
    "pick_heat_then_place_in_recep": "heat",
    "pick_cool_then_place_in_recep": "cool",
    "pick_two_obj_and_place": "pick_two",
}
# Controls, and surrogates, which no encoding can write.
_WRONG = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+(.*)")


def paths(setting: str) -> list[str]:
    """The comma-separated paths of skills.library, in order; none of ''."""
    return [path.strip() for path in setting.split(",") if path.strip()]


def load(path: Path | str) -> list[Skill]:
    """The skills of a file, by its suffix, or of all such files of a folder by name.

    - .json: {"general_skills": […], "task_specific_skills": {FAMILY: […]},
      "common_mistakes": […]}, as SkillRL (arXiv 2602.08234) publishes; any of the three
      may be missing. A skill has `title`, `principle` and `when_to_apply`, a mistake
      `description` (or `mistake`), `why_it_happens` and `how_to_avoid`.
    - .md: a heading of level two or deeper is a skill; the text below it is its analysis,
      list items are its workflow. It is for all, or after a heading `# Family: NAME` for
      that family, until the next of level one. What stands before is passed over.
    - .jsonl: what Bank.save wrote; the record of its uses is left out.

    Returns:
      In the order of the files. Texts are one line each, free of control characters.

    Raises:
      ValueError: nothing is there, or something is not right: it names file and place.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix in READERS]
        files = [p for p in files if p.is_file()]
    else:
        files = [path]
    skills = [skill for file in files for skill in _file(file)]
    if not skills:
        raise ValueError(
            f"no skills in {path}; a library is {_KINDS} with at least one"
        )
    return skills


def renamed(skill: Skill, families: Collection[str]) -> Skill:
    """The skill with the name that these families have for its own, if they have one."""
    name = ALIASES.get(skill.family, "")
    if skill.family in families or name not in families:
        return skill
    texts = (skill.success_analysis, skill.mistake_analysis, skill.golden_workflow)
    return dataclasses.replace(
        skill, id=skill_id(skill.task, *texts, name), family=name
    )


def _file(path: Path) -> Iterator[Skill]:
    if path.suffix not in READERS:
        raise ValueError(f"{path} is no library; wanted {_KINDS}")
    try:
        size = path.stat().st_size
    except OSError as fault:
        raise ValueError(f"no skills can be read from {path}: {fault}") from fault
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes; at most {MAX_BYTES} are read")
    yield from READERS[path.suffix](path)


def _json(path: Path) -> Iterator[Skill]:
    try:
        values = json.loads(records.read(path))
    except (json.JSONDecodeError, RecursionError) as fault:
        raise ValueError(f"{path} is no JSON: {fault}") from fault
    values = _typed(values, dict, f"{path}")
    general = _typed(values.get("general_skills", []), list, f"{path}, general_skills")
    for i, entry in enumerate(general):
        yield _principle(path, f"general_skills[{i}]", entry)
    where = f"{path}, task_specific_skills"
    families = _typed(values.get("task_specific_skills", {}), dict, where)
    for family, entries in families.items():
        if not _line(family):
            raise ValueError(f"{where} has a family without a name")
        entries = _typed(entries, list, f"{where}.{_line(family)}")
        for i, entry in enumerate(entries):
            place = f"task_specific_skills.{_line(family)}[{i}]"
            yield _principle(path, place, entry, _line(family))
    where = f"{path}, common_mistakes"
    for i, entry in enumerate(_typed(values.get("common_mistakes", []), list, where)):
        yield _mistake(path, f"common_mistakes[{i}]", entry)


def _principle(path: Path, place: str, entry, family: str = "") -> Skill:
    where = f"{path}, {place}"
    entry = _typed(entry, dict, where)
    title, principle, when = (
        _field(entry, (name,), where, needed=name == "principle")
        for name in ("title", "principle", "when_to_apply")
    )
    success = f"{title}: {principle}" if title else principle
    workflow = (f"when: {when}",) if when else ()
    name = _field(entry, ("skill_id",), where) or place
    return _made(f"{path.name} {name}", family, success, NOTHING, workflow)


def _mistake(path: Path, place: str, entry) -> Skill:
    where = f"{path}, {place}"
    entry = _typed(entry, dict, where)
    mistake = _field(entry, ("description", "mistake"), where, needed=True)
    why = _field(entry, ("why_it_happens",), where)
    avoid = _field(entry, ("how_to_avoid",), where)
    mistake = f"{mistake} Why: {why}" if why else mistake
    name = _field(entry, ("mistake_id",), where) or place
    workflow = (avoid,) if avoid else ()
    return _made(f"{path.name} {name}", "", NOTHING, mistake, workflow)


def _markdown(path: Path) -> Iterator[Skill]:
    family, found, fenced = "", None, False
    sections: list[tuple[str, str, int, list[str]]] = []
    for number, line in enumerate(records.read(path).split("\n"), 1):
        fenced ^= line.lstrip().startswith("```")
        level = len(line) - len(line.lstrip("#"))
        title = _line(line[level:].strip().rstrip("#"))
        if fenced or not level or line[level : level + 1] not in (" ", "\t"):
            if found is not None:
                found.append(line)
        elif level == 1:
            named = title.casefold().startswith(FAMILY)
            family, found = title[len(FAMILY) :].strip() if named else "", None
            if named and not family:
                raise ValueError(f"{path}, line {number}: wanted '# Family: NAME'")
        else:
            found = []
            sections.append((family, title, number, found))
    for family, title, number, lines in sections:
        yield _section(path, family, title, number, lines)


def _section(
    path: Path, family: str, title: str, number: int, lines: list[str]
) -> Skill:
    where = f"{path}, line {number}"
    matches = [(line, _ITEM.match(line)) for line in lines]
    text = _line(" ".join(line for line, item in matches if not item))
    steps = [_line(item[1]) for _, item in matches if item]
    if not text and not any(steps):
        raise ValueError(f"{where}: {title!r} has neither text nor list items below it")
    success = _bounded(f"{title}: {text}" if text else title, where)
    steps = [_bounded(step, where) for step in steps if step]
    if len(steps) > MAX_STEPS:
        raise ValueError(f"{where}: {len(steps)} list items; at most {MAX_STEPS}")
    return _made(f"{path.name} {title}", family, success, NOTHING, tuple(steps))


def _lines(path: Path) -> Iterator[Skill]:
    for where, record in records.parse(path):
        held = record.skill
        if len(held.golden_workflow) > MAX_STEPS:
            raise ValueError(f"{where}: golden_workflow has over {MAX_STEPS} steps")
        texts = (held.success_analysis, held.mistake_analysis, *held.golden_workflow)
        success, mistake, *steps = (_bounded(_line(text), where) for text in texts)
        family = _line(held.family)
        yield dataclasses.replace(
            held,
            id=skill_id(held.task, success, mistake, steps, family),
            success_analysis=success,
            mistake_analysis=mistake,
            golden_workflow=tuple(steps),
            family=family,
            source=_line(f"{path.name} {held.id}"),
            born=0,
            policy=0,
            maker="library",
        )


# Suffix → reader of a file.
READERS: dict[str, Callable[[Path], Iterator[Skill]]] = {
    ".json": _json,
    ".md": _markdown,
    ".jsonl": _lines,
}
_KINDS = f"a file {', '.join(READERS)} or a folder of them"


def _made(source: str, family: str, success: str, mistake: str, steps: tuple) -> Skill:
    return Skill(
        id=skill_id("", success, mistake, steps, family),
        success_analysis=success,
        mistake_analysis=mistake,
        golden_workflow=steps,
        task="",
        family=family,
        source=source,
        born=0,
        reward=REWARD,
        maker="library",
    )


def _typed(value, kind: type, where: str):
    if isinstance(value, kind):
        return value
    wanted = {dict: "an object", list: "a list"}[kind]
    raise ValueError(f"{where} must be {wanted}, not {value!r:.60}")


def _field(entry: dict, names: tuple[str, ...], where: str, needed=False) -> str:
    """The first of the names that is there, as one line; '' where none is needed."""
    for name in names:
        value = entry.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise ValueError(f"{where}.{name} must be a text, not {value!r:.60}")
            if _line(value):
                return _bounded(_line(value), f"{where}.{name}")
    if needed:
        raise ValueError(f"{where} has no {names[0]}; wanted a text")
    return ""


def _line(text: str) -> str:
    """On one line, without control characters."""
    return " ".join(_WRONG.sub(" ", text).split())


def _bounded(text: str, where: str) -> str:
    if len(text) > MAX_TEXT:
        raise ValueError(f"{where} has {len(text)} characters; at most {MAX_TEXT}")
    return text
