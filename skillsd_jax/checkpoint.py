"""One pytree and one dict of host state, saved and restored as one."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any


class Checkpointer:
    """The checkpoints of a run, newest kept, each whole or absent.

    A save is finished when `save` returns: the tree may be donated right after. A save
    that a crash interrupts leaves an unfinished folder, which is never restored.

    Args:
      directory: made where missing.
      keep: how many steps stay; older ones are deleted.
    """

    def __init__(self, directory: Path | str, keep: int):
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, step: int, tree: PyTree, host: dict) -> None:
        """Saves both under `step`.

        Args:
          step: later than every saved one.
          tree: of arrays, typed keys and numbers; empty parts and None are kept.
          host: what JSON can hold.

        Raises:
          ValueError: the step is not later than the last one saved.
        """
        latest = self._manager.latest_step()
        if latest is not None and step <= latest:
            # Orbax would skip the save and say nothing.
            raise ValueError(
                f"step {step} must be later than the saved step {latest}; restore it "
                f"first or use another folder"
            )
        self._manager.save(
            step,
            args=ocp.args.Composite(
                tree=ocp.args.StandardSave(jax.tree.map(_array, tree)),
                host=ocp.args.JsonSave(host),
            ),
        )

    def restore(self, like: PyTree) -> tuple[int, PyTree, dict] | None:
        """The newest checkpoint as (step, tree, host), or None where there is none.

        Args:
          like: a tree of the same structure, shapes, types and shardings; its values
            are not read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        wanted = jax.tree.map(
            ocp.utils.to_shape_dtype_struct, jax.tree.map(_array, like)
        )
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                tree=ocp.args.StandardRestore(wanted), host=ocp.args.JsonRestore()
            ),
        )
        return step, found.tree, found.host

    def close(self) -> None:
        self._manager.close()


def read(directory: Path | str, branch: str, step: int | None = None):
    """One branch of a saved tree, as numpy arrays, without a template.

    Args:
      directory: of a Checkpointer.
      branch: name of a field of the saved tree.
      step: None: the newest.

    Returns:
      (step, the branch, the host's dict).

    Raises:
      ValueError: there is no such checkpoint; those that are there are named.
    """
    handlers = {
        "tree": ocp.PyTreeCheckpointHandler(),
        "host": ocp.JsonCheckpointHandler(),
    }
    manager = ocp.CheckpointManager(
        Path(directory).absolute(),
        options=ocp.CheckpointManagerOptions(create=False, read_only=True),
        item_handlers=handlers,
    )
    steps = sorted(manager.all_steps())
    step = steps[-1] if step is None and steps else step
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ValueError(f"no checkpoint of step {step} in {directory}; there: {there}")
    saved = manager.item_metadata(step).tree.tree[branch]
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    arguments = ocp.args.PyTreeRestore(
        item={branch: wanted}, restore_args={branch: plain}, partial_restore=True
    )
    found = manager.restore(
        step, args=ocp.args.Composite(tree=arguments, host=ocp.args.JsonRestore())
    )
    manager.close()
    return step, found.tree[branch], found.host


def _array(leaf):
    """Orbax refuses numpy scalars."""
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
