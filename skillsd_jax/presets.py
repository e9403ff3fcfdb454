"""Config files and their presets: what there is, and what an argument asks for."""

import dataclasses
import importlib.util
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from skillsd_jax.config import Config, Evaluate, Rollout
from skillsd_jax.validation import Refused

FOLDER = Path(__file__).resolve().parent.parent / "configs"


def listing(folder: Path = FOLDER) -> str:
    """One line for every config and preset: what to write and what it is."""
    rows = [
        (f"{path}:{preset}" if preset else path, summary)
        for path in _files(folder)
        for preset, summary in load(path).PRESETS.items()
    ]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"--config={name:<{width}}  {summary}" for name, summary in rows)


def load(path: str) -> ModuleType:
    """The config file as a module with `PRESETS` and `get_config(preset)`.

    Raises:
      Refused: there is no such file.
    """
    if not Path(path).is_file():
        known = ", ".join(_files(FOLDER))
        raise Refused(f"no config file {path!r}; known: {known}")
    spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise Refused(f"config file {path!r} must be Python and end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def known(preset: str, presets: Collection[str]) -> str:
    """`preset` itself; every `get_config` asks this first.

    Raises:
      Refused: it is none of `presets`.
    """
    if preset not in presets:
        names = ", ".join(name or "'' (none)" for name in presets)
        raise Refused(f"unknown preset {preset!r}; known: {names}")
    return preset


def smoke(config: Config) -> Config:
    """Shrinks any embedded config to about a minute: it runs, it does not learn."""
    config.iterations = 2
    config.checkpoint_every = 1
    config.environment.train_tasks = 16
    config.rollout = Rollout(prompts=4, group_size=4, rows=16)
    config.optimizer.minibatches = 2
    config.optimizer.micro_rows = 16
    config.imitate.steps = 20
    config.imitate.rows = 16
    config.imitate.episodes = 64
    config.imitate.tasks = 16
    config.evaluate = Evaluate(every=1, tasks=8, teacher_tasks=8)
    return config


def check(arguments: Sequence[str]) -> None:
    """Checks the command line as far as the flag parser's own messages are poor.

    Args:
      arguments: of the command, without the program.

    Raises:
      Refused: unknown config file, preset or setting, or a value of the wrong type.
    """
    config = None
    for number, argument in enumerate(arguments):
        name, _, text = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            continue
        if name == "config":
            spec = text or "".join(arguments[number + 1 : number + 2])
            path, _, preset = spec.partition(":")
            config = load(path).get_config(preset)
        elif name.removeprefix("no").startswith("config."):
            if config is None:
                raise Refused(f"{argument} must come after --config=FILE")
            setting = name.removeprefix("no").removeprefix("config.")
            _check_setting(config, setting, text if "=" in argument else None)


def default_workdir(spec: str, config: Config) -> str:
    """Where a run lies unless it is told: runs/CONFIG-PRESET-OBJECTIVE-seedN."""
    path, _, preset = spec.partition(":")
    parts = [Path(path).stem, preset, config.objective.name, f"seed{config.seed}"]
    return os.path.join("runs", "-".join(filter(None, parts)))


def _files(folder: Path) -> Iterator[str]:
    """The config files, written so that the shell's folder finds them."""
    for path in sorted(folder.glob("*.py")):
        yield os.path.relpath(path)


def _check_setting(config: Config, name: str, text: str | None) -> None:
    section, value = "config", config
    for part in name.split("."):
        if not dataclasses.is_dataclass(value):
            raise Refused(f"{section} is a value, not a section: no {name!r} in it")
        names = [field.name for field in dataclasses.fields(value)]
        if part not in names:
            raise Refused(
                f"unknown setting --config.{name}; known in {section}: "
                f"{', '.join(names)}"
            )
        section, value = f"{section}.{part}", getattr(value, part)
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        raise Refused(f"--{section} is a section; set one of: {', '.join(names)}")
    if text is not None and type(value) in (int, float):
        try:
            type(value)(text)
        except ValueError as error:
            wanted = type(value).__name__
            raise Refused(f"--{section} wants {wanted}, not {text!r}") from error
