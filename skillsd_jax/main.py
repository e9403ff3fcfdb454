"""Trains an agent.

  python -m skillsd_jax.main                                     what there is
  python -m skillsd_jax.main --config=configs/household.py       trains
  … --config=FILE.py:PRESET --config.objective.name=grpo --workdir=FOLDER
  … --config=FILE.py --config.objective.name=help                the methods

Every setting of skillsd_jax/config.py is a flag: --config.SECTION.KEY=VALUE. The same
command on the same workdir resumes. launch/ starts it in many processes.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from skillsd_jax import presets
from skillsd_jax.validation import Refused, validate

CONFIG = config_flags.DEFINE_config_file("config", None, "FILE.py[:PRESET]")
WORKDIR = flags.DEFINE_string("workdir", "", "folder of the run; default: by its name")
JOB = flags.DEFINE_string(
    "job", "", "HOST:PORT,PROCESSES,INDEX of one of many, or auto"
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"unexpected argument {argv[1]!r}; settings start with --config.")
    if CONFIG.value is None:
        return print(presets.listing())
    if CONFIG.value.objective.name == "help":
        from skillsd_jax.losses import objective

        return print(objective.listing())
    logging.set_verbosity(logging.WARNING)  # orbax tells of every step of every save
    spec = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = WORKDIR.value or presets.default_workdir(spec, CONFIG.value)
    try:
        validate(CONFIG.value)
        from skillsd_jax import train  # jax takes seconds: only now

        train.run(CONFIG.value, workdir, JOB.value)
    except Refused as refusal:
        sys.exit(f"refused: {refusal}")


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; what is wrong ends the program with one message."""
    if {"--help", "-h", "-help"} & set(argv):
        sys.exit(print(f"{__doc__}\n{presets.listing()}"))
    try:
        presets.check(argv[1:])
        return flags.FLAGS(argv)
    except (Refused, flags.Error) as error:
        sys.exit(f"refused: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
