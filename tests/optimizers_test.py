"""Optimisers by name, a step at a time against their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from skillsd_jax import config as settings
from skillsd_jax import optimizers
from skillsd_jax.models import lora, qwen

MODEL = qwen.ModelConfig(
    vocab=13,
    width=8,
    layers=2,
    heads=2,
    kv_heads=1,
    head_size=4,
    hidden=12,
    qkv_bias=True,
)


def setting(name, **changes) -> settings.Optimizer:
    """No clipping, no decay, a constant rate, unless `changes` says so."""
    plain = {"schedule": "constant", "grad_clip": 1e9, "weight_decay": 0.0}
    return settings.Optimizer(name=name, **plain | changes)


@pytest.fixture(scope="module")
def params():
    made = qwen.init(MODEL, jax.random.key(0))
    return lora.attach(lora.Lora(2, 2.0, "query"), made, jax.random.key(1))


def gradients(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), params)


def changes(config, params, steps=3):
    """What each step adds to the weights, the gradients being noise."""
    rule = optimizers.make(config, 10)
    state, out = rule.init(params), []
    for step in range(steps):
        change, state = rule.update(gradients(params, step), state, params)
        out.append(change)
    return out, state


def test_adamw_takes_the_step_of_its_equation():
    config = setting("adamw", weight_decay=0.1, beta1=0.8, beta2=0.9)
    weight = {"norm": jnp.array([0.5, -2.0])}
    found, _ = changes(config, weight)
    mean = square = 0.0
    for step, change in enumerate(found, start=1):
        g = np.asarray(gradients(weight, step - 1)["norm"])
        mean, square = 0.8 * mean + 0.2 * g, 0.9 * square + 0.1 * g * g
        way = mean / (1 - 0.8**step) / np.sqrt(square / (1 - 0.9**step))
        wanted = -config.learning_rate * (way + 0.1 * np.asarray(weight["norm"]))
        np.testing.assert_allclose(change["norm"], wanted, rtol=1e-4)


def test_lion_takes_the_sign_of_its_mean():
    config = setting("lion", weight_decay=0.1, beta1=0.8, beta2=0.9)
    weight = {"norm": jnp.array([0.5, -2.0])}
    found, _ = changes(config, weight)
    mean = 0.0
    for step, change in enumerate(found):
        g = np.asarray(gradients(weight, step)["norm"])
        way = np.sign(0.8 * mean + 0.2 * g) + 0.1 * np.asarray(weight["norm"])
        mean = 0.9 * mean + 0.1 * g
        np.testing.assert_allclose(change["norm"], -5e-4 * way, rtol=1e-5)


def test_muon_orthogonalises_each_layer_by_itself(params):
    """The stacked update is that of each layer's matrix alone."""
    config = setting("muon")
    (found, *_), _ = changes(config, params)
    single = contrib.muon(config.learning_rate, consistent_rms=0.2)
    slopes = gradients(params, 0)
    for path in (("mlp", "up", "kernel"), ("attention", "query", "lora_down")):
        stacked, slope, weight = (
            tree["layers"][path[0]][path[1]][path[2]]
            for tree in (found, slopes, params)
        )
        for n in range(MODEL.layers):
            alone, _ = single.update(slope[n], single.init(weight[n]), weight[n])
            np.testing.assert_allclose(stacked[n], alone, atol=1e-6)


def test_muon_leaves_what_is_no_matrix_to_adamw(params):
    steps, _ = changes(setting("muon"), params)
    wanted, _ = changes(setting("adamw"), params)
    for name in ("embed", "norm"):
        np.testing.assert_allclose(steps[2][name], wanted[2][name], rtol=1e-5)
    for part, name, leaf in (
        ("attention", "key", "bias"),
        ("attention", "query_norm", "scale"),
    ):
        ours, theirs = (step[2]["layers"][part][name][leaf] for step in (steps, wanted))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    kernel, other = (s[2]["layers"]["mlp"]["up"]["kernel"] for s in (steps, wanted))
    assert not np.allclose(kernel, other, rtol=0.1)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_bfloat16_moments_halve_the_first_ones_alone(name, params):
    _, state = changes(setting(name, moments="bfloat16"), params, steps=1)
    kinds = {
        part: {leaf.dtype.name for leaf in jax.tree.leaves(found)}
        for part in ("mu", "nu")
        if (found := [value for _, value in optax.tree.get_all_with_path(state, part)])
    }
    assert kinds["mu"] == {"bfloat16"}
    assert kinds.get("nu", {"float32"}) == {"float32"}
    _, state = changes(setting(name), params, steps=1)
    leaves = [
        x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}


def test_a_bfloat16_mean_of_lion_stands_still_where_it_is_refused():
    """A gradient of 1 for 2000 steps: 1 − 0.999^2000 = 0.86, in bfloat16 0.5."""
    found = {}
    for moments in ("float32", "bfloat16"):
        rule = optimizers.make(setting("lion", moments=moments), 10)
        weight = {"norm": jnp.ones(1)}

        def step(_, state, rule=rule, weight=weight):
            return rule.update(weight, state, weight)[1]

        state = jax.lax.fori_loop(0, 2000, step, rule.init(weight))
        found[moments] = float(optax.tree.get(state, "mu")["norm"][0])
    assert found["float32"] == pytest.approx(0.865, abs=1e-3)
    assert found["bfloat16"] == 0.5


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_a_loss_falls(name):
    weight = {"kernel": jax.random.normal(jax.random.key(0), (2, 6, 6))}
    rule = optimizers.make(setting(name, learning_rate=0.05), 10)

    def loss(weight):
        return jnp.mean((weight["kernel"] - 1.0) ** 2)

    @jax.jit
    def step(weight, state):
        change, state = rule.update(jax.grad(loss)(weight), state, weight)
        return optax.apply_updates(weight, change), state

    before, state = loss(weight), rule.init(weight)
    for _ in range(100):
        weight, state = step(weight, state)
    assert loss(weight) < 0.5 * before


def test_gradients_are_clipped_before_the_optimiser_sees_them():
    config = setting("lion", beta1=0.0, beta2=0.0, grad_clip=1.0)
    rule = optimizers.make(config, 10)
    weight = {"norm": jnp.zeros(2)}
    _, state = rule.update({"norm": jnp.array([30.0, 40.0])}, rule.init(weight), weight)
    moment = optax.tree.get(state, "mu")["norm"]
    np.testing.assert_allclose(moment, [0.6, 0.8], rtol=1e-6)


def test_the_rate_falls_to_nothing_at_the_end_of_a_run():
    rate = optimizers.schedule(settings.Optimizer(schedule="cosine"), 10)
    np.testing.assert_allclose(
        [rate(0), rate(5), rate(10)], [5e-4, 2.5e-4, 0], atol=1e-9
    )
    rate = optimizers.schedule(settings.Optimizer(schedule="constant"), 10)
    assert rate(0) == rate(10) == 5e-4
