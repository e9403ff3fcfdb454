"""What no method may depend on: how a batch is cut, ordered, padded or placed."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as some

from skillsd_jax import config
from skillsd_jax.losses import masking, objective

B, R = 8, 4
NAMES = [name for name, recipe in objective.OBJECTIVES.items() if recipe.terms]
FEW = effort(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
FLOATS = (
    "student",
    "old",
    "correction",
    "teacher",
    "reference",
    "entropy",
    "divergence",
)
BY_ROW = ("skilled", "group_success")


def batch(seed: int) -> objective.Signals:
    """Eight ragged rows of up to four tokens; some are empty."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(R) < rng.integers(0, R + 1, B)[:, None]).astype(np.float32)
    mask[0] = 1
    values = {n: rng.uniform(-3, -0.05, (B, R)).astype(np.float32) for n in FLOATS}
    skilled = rng.integers(0, 2, B).astype(np.float32)
    return objective.Signals(
        **values,
        advantage=rng.normal(size=(B, R)).astype(np.float32),
        mask=mask,
        segment=rng.integers(0, 3, (B, R)).astype(np.int32),
        turn=rng.integers(0, 3, (B, R)).astype(np.int32),
        skilled=skilled,
        group_success=rng.integers(0, 2, B).astype(np.float32),
        step=np.int32(2),
        stalled=np.int32(0),
        vocabulary=np.int32(50),
        token_count=mask.sum(),
        skilled_count=(mask * skilled[:, None]).sum(),
    )


def rows_of(signals, rows):
    return jax.tree.map(lambda x: x[rows] if np.ndim(x) else x, signals)


def chosen(name, mode="token-mean"):
    return config.Objective(
        name=name,
        kl_coefficient=0.1,
        entropy_coefficient=0.01,
        loss_agg_mode=mode,
        distill_reason_weight=0.5,
        distill_action_weight=2.0,
    )


def value_and_gradient(signals, setting, count):
    def loss(student, divergence):
        moved = dataclasses.replace(signals, student=student, divergence=divergence)
        terms = objective.recipe(setting.name).loss(moved, setting).terms
        return sum(
            masking.aggregate(term, signals.mask, setting.loss_agg_mode, count)
            for term in terms.values()
        )

    value, gradient = jax.value_and_grad(loss, (0, 1))(
        signals.student, signals.divergence
    )
    return value, np.stack(gradient)


names, seeds = some.sampled_from(NAMES), some.integers(0, 2**31)
modes = some.sampled_from(list(masking.COUNTS))


@FEW
@given(names, modes, seeds, some.sets(some.integers(1, B - 1)))
def test_any_micro_batches_add_up_to_the_whole(name, mode, seed, cuts):
    signals, setting = batch(seed), chosen(name, mode)
    count = masking.count_of(signals.mask, mode)
    value, gradient = value_and_gradient(signals, setting, count)
    edges = [0, *sorted(cuts), B]
    parts = [
        value_and_gradient(rows_of(signals, slice(a, b)), setting, count)
        for a, b in itertools.pairwise(edges)
    ]
    np.testing.assert_allclose(sum(v for v, _ in parts), value, atol=1e-5, rtol=1e-5)
    joined = np.concatenate([g for _, g in parts], axis=1)
    np.testing.assert_allclose(joined, gradient, atol=1e-5, rtol=1e-5)


@FEW
@given(names, modes, seeds, some.permutations(range(B)))
def test_the_order_of_rows_does_not_matter(name, mode, seed, order):
    signals, setting = batch(seed), chosen(name, mode)
    order = np.array(order)
    value, gradient = value_and_gradient(signals, setting, None)
    moved, turned = value_and_gradient(rows_of(signals, order), setting, None)
    np.testing.assert_allclose(moved, value, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(turned, gradient[:, order], atol=1e-6, rtol=1e-5)


@FEW
@given(names, modes, seeds, some.sampled_from([np.nan, -np.inf, np.inf, -1e30]))
def test_masked_rows_of_anything_change_nothing(name, mode, seed, rubbish):
    signals, setting = batch(seed), chosen(name, mode)
    value, gradient = value_and_gradient(signals, setting, None)

    def longer(x):
        if not np.ndim(x):
            return x
        fill = rubbish if x.dtype == np.float32 else 0
        return np.concatenate([x, np.full((3, *x.shape[1:]), fill, x.dtype)])

    padded = jax.tree.map(longer, signals)
    zero = {n: longer(getattr(signals, n)) for n in ("mask", *BY_ROW)}
    for x in zero.values():
        x[B:] = 0
    padded = dataclasses.replace(padded, **zero)
    more, further = value_and_gradient(padded, setting, None)
    np.testing.assert_allclose(more, value, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(further[:, :B], gradient, atol=1e-5, rtol=1e-5)
    assert not further[:, B:].any()


def episodes(seed: int, padding: int = 0, order=None) -> objective.Episodes:
    """Four episodes of two turns in two groups, a row each, and padded rows."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(R) < rng.integers(1, R + 1, B)[:, None]).astype(np.float32)
    trajectory = np.repeat(np.arange(4), 2).astype(np.int32)
    turn = np.where(mask > 0, (np.arange(B) % 2)[:, None], -1).astype(np.int32)
    reward = rng.integers(0, 2, 4).astype(np.float32)[trajectory]
    made = {
        "reward": reward,
        "success": reward,
        "group": (trajectory // 2).astype(np.int32),
        "trajectory": trajectory,
        "skilled": rng.integers(0, 2, 4).astype(np.float32)[trajectory],
        "turn": turn,
        "returns": rng.uniform(0, 1, (B, R)).astype(np.float32),
        "anchor": rng.integers(0, 2, B)[:, None].repeat(R, 1).astype(np.int32),
        "mask": mask,
        "old": rng.uniform(-3, 0, (B, R)).astype(np.float32),
        "teacher": rng.uniform(-3, 0, (B, R)).astype(np.float32),
    }
    if padding:
        fill = {"trajectory": -1, "turn": -1, "old": np.nan, "teacher": np.nan}
        made = {
            n: np.concatenate(
                [x, np.full((padding, *x.shape[1:]), fill.get(n, 0), x.dtype)]
            )
            for n, x in made.items()
        }
    if order is not None:
        made = {n: x[order] for n, x in made.items()}
    return objective.Episodes(**made, step=np.int32(1))


@FEW
@given(names, seeds, some.integers(0, 5), some.randoms())
def test_advantages_do_not_see_order_or_padding(name, seed, padding, random):
    setting, recipe = chosen(name), objective.recipe(name)
    plain = np.asarray(recipe.advantage(episodes(seed), setting))
    order = list(range(B + padding))
    random.shuffle(order)
    dealt = recipe.advantage(episodes(seed, padding, np.array(order)), setting)
    back = np.asarray(dealt)[np.argsort(order)]
    np.testing.assert_allclose(back[:B], plain, atol=1e-5, rtol=1e-5)
    assert not back[B:].any()


SHARDED = """
import sys; sys.path.insert(0, {folder!r})
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import properties_test as p
assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()), ("data",))
for name in p.NAMES:
    signals, setting = p.batch(3), p.chosen(name)
    placed = jax.tree.map(
        lambda x: jax.device_put(
            x, NamedSharding(mesh, PartitionSpec("data") if np.ndim(x) else PartitionSpec())
        ),
        signals,
    )
    run = jax.jit(lambda s: p.losses(s, setting))
    for a, b in zip(run(placed), p.losses(signals, setting)):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=name)
    played = p.episodes(3)
    placed = jax.tree.map(
        lambda x: jax.device_put(
            x, NamedSharding(mesh, PartitionSpec("data") if np.ndim(x) else PartitionSpec())
        ),
        played,
    )
    run = jax.jit(lambda e: p.objective.recipe(name).advantage(e, setting))
    wanted = p.objective.recipe(name).advantage(played, setting)
    np.testing.assert_allclose(run(placed), wanted, atol=1e-5, rtol=1e-5, err_msg=name)
print("same")
"""


def losses(signals, setting):
    """Loss and gradients, traceable."""

    def loss(student, divergence):
        moved = dataclasses.replace(signals, student=student, divergence=divergence)
        terms = objective.recipe(setting.name).loss(moved, setting).terms
        return sum(
            masking.aggregate(t, signals.mask, "token-mean") for t in terms.values()
        )

    value, (a, b) = jax.value_and_grad(loss, (0, 1))(
        signals.student, signals.divergence
    )
    return value, a, b


@pytest.mark.slow
def test_eight_devices_give_what_one_gives():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
        "--xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", SHARDED.format(folder=folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("same\n"), done.stderr
