"""Optimisers by name, from optax; clipping by global norm comes before each.

Masters and gradients are float32. `optimizer.moments=bfloat16` halves the first moments
alone: a second moment moves by 1 − β2 = 1e-3 of itself per step, less than half a step
between neighbouring bfloat16 numbers (2e-3), and would stand still.
"""

from collections.abc import Callable

import jax
import optax
from optax import contrib

from skillsd_jax import config as settings

# Kernels [N, inputs, outputs] and adapters: a matrix per layer.
_STACKED = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
_MATRICES = ("kernel", "lora_down", "lora_up")


def make(
    config: settings.Optimizer, steps: int
) -> optax.GradientTransformationExtraArgs:
    """The configured optimiser.

    Args:
      config: name, rates, moments.
      steps: of the whole run, for the schedule.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip),
        OPTIMIZERS[config.name](schedule(config, steps), config),
    )


def per_iteration(config: settings.Optimizer, rows: int) -> int:
    """Optimiser steps of an iteration of so many rows, at most."""
    if config.minibatch_rows:
        return -(-rows // config.minibatch_rows)
    return config.minibatches


def schedule(config: settings.Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by optimiser step."""
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(config.learning_rate, max(1, steps))
    return optax.constant_schedule(config.learning_rate)


def _adamw(rate: optax.Schedule, config: settings.Optimizer):
    return optax.adamw(
        rate,
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mu_dtype=_moments(config),
    )


def _lion(rate: optax.Schedule, config: settings.Optimizer):
    """Lion (arXiv 2302.06675), whose authors use β2 = 0.99 and a third to a tenth of
    AdamW's learning rate."""
    return optax.lion(
        rate,
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mu_dtype=_moments(config),
    )


def _muon(rate: optax.Schedule, config: settings.Optimizer):
    """Muon on the matrices of the layers, AdamW on embeddings, head, norms and biases.

    An update has AdamW's root mean square (0.2 · √max(in, out) of arXiv 2502.16982), so
    both share one learning rate. Muon's momentum is its authors' 0.95.
    """
    muon = contrib.muon(
        rate,
        weight_decay=config.weight_decay,
        mu_dtype=_moments(config),
        muon_weight_dimension_numbers=lambda tree: jax.tree.map(
            lambda _: _STACKED, tree
        ),
        consistent_rms=0.2,
    )
    return optax.partition({True: muon, False: _adamw(rate, config)}, _matrices)


OPTIMIZERS: dict[str, Callable] = {"adamw": _adamw, "lion": _lion, "muon": _muon}


def _moments(config: settings.Optimizer) -> str | None:
    return None if config.moments == "float32" else config.moments


def _matrices(params):
    """Which leaves hold a matrix per layer."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in _MATRICES, params
    )
