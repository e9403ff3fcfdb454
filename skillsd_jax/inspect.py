"""Shows both views of an episode side by side, the scored tokens marked.

  python -m skillsd_jax.inspect --workdir=RUN [--task=N] [--step=N]

The run's student plays a training task under the plain prompt; the teacher's view has
the skill that the run's bank gives for it. Beside each scored token stands what the
student's weights make of it in either view, in nats.
"""

import sys
from pathlib import Path

from absl import app, flags, logging

from skillsd_jax import runfolder

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
TASK = flags.DEFINE_integer("task", 0, "index of a training task", lower_bound=0)
STEP = flags.DEFINE_integer("step", None, "iterations done; default: the last saved")


def main(_) -> None:
    logging.set_verbosity(logging.ERROR)  # orbax warns of reading only
    workdir = Path(WORKDIR.value)
    try:
        config = runfolder.read_config(workdir)
        from rich.console import Console

        from skillsd_jax import inspection  # jax takes seconds: only now

        student = inspection.restore(config, workdir, STEP.value, print)
        seen = inspection.inspect(student, config, TASK.value)
    except (ImportError, ValueError, OSError) as fault:
        sys.exit(f"refused: {fault}")
    Console().print(inspection.render(seen))


if __name__ == "__main__":
    app.run(main)
