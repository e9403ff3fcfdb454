"""Writes a trained student as a Hugging Face folder, adapters merged.

  python -m skillsd_jax.export --workdir=RUN --out=FOLDER [--step=N] [--dtype=bfloat16]

transformers loads the folder as it is: weights, config.json, tokenizer, chat template.
"""

import json
import shutil
import sys
import uuid
from pathlib import Path

from absl import app, flags, logging

from skillsd_jax import config as settings
from skillsd_jax import runfolder
from skillsd_jax.validation import Refused

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
OUT = flags.DEFINE_string("out", None, "new or empty folder", required=True)
STEP = flags.DEFINE_integer("step", None, "iterations done; default: the last saved")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "of the written weights"
)


def claim(out: Path) -> None:
    """Makes the folder.

    Raises:
      Refused: it holds something, or cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = any(out.iterdir())
    except OSError as fault:
        raise Refused(f"--out={out} cannot be written: {fault.strerror}") from fault
    if taken:
        raise Refused(f"--out={out} is not empty; name a new folder")


def inherited(config: settings.Config) -> dict:
    """Fields of the folder it started from that no weight tells."""
    if not config.model.path:
        return {}
    text = json.loads((Path(config.model.path) / "config.json").read_text())
    names = ("bos_token_id", "max_position_embeddings")
    return {name: text[name] for name in names if name in text}


def export(workdir: Path, out: Path, step: int | None, dtype: str) -> str:
    """Writes the folder; returns what was done, in a line."""
    config = runfolder.read_config(workdir)
    from skillsd_jax import agent, checkpoint  # jax takes seconds: only now
    from skillsd_jax.models import huggingface

    out = out.resolve()
    part = out.with_name(f".{uuid.uuid4().hex}-{out.name}")  # never another's folder
    try:
        step, trained, host = checkpoint.read(workdir / "checkpoints", "params", step)
        claim(out)
        words, model, params = agent.finished(config, trained, host["origin"], print)
        fields = inherited(config) | {
            "eos_token_id": words.stop_id,
            "pad_token_id": words.pad_id,
        }
        huggingface.save(part, model, params, dtype=dtype, tokens=fields)
        words.save(part)
        part.rename(out)
    except (ImportError, ValueError, OSError) as fault:
        shutil.rmtree(part, ignore_errors=True)
        raise Refused(str(fault)) from fault
    return f"iteration {step} of {workdir} lies in {out}, {dtype}"


def main(_) -> None:
    logging.set_verbosity(logging.ERROR)  # orbax warns of reading only
    try:
        workdir, out = Path(WORKDIR.value), Path(OUT.value)
        print(export(workdir, out, STEP.value, DTYPE.value))
    except Refused as refusal:
        sys.exit(f"refused: {refusal}")


if __name__ == "__main__":
    app.run(main)
