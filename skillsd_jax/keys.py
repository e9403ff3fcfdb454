"""The random keys of a run, made anew wherever they are needed."""

import jax

PURPOSES = ("rollout", "evaluate", "teacher", "summary")


def key_for(seed: int, purpose: str, index: int = 0) -> jax.Array:
    """A key that depends on (seed, purpose, index) alone: resuming needs no state."""
    key = jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))
    return jax.random.fold_in(key, index)
