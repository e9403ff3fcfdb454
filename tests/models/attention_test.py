"""Every kernel that runs here against the equation, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax.models import attention

ROWS, LENGTH, HEADS, KEYS, SIZE = 2, 13, 4, 2, 8


def inputs(length=LENGTH, size=SIZE, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(ROWS, length, heads, size) for heads in (HEADS, KEYS, KEYS)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def by_hand(q, k, v, window):
    """In float64, a query at a time."""
    out = np.zeros_like(q, dtype=np.float64)
    for b, t, h in np.ndindex(q.shape[:3]):
        first = 0 if window is None else max(0, t - window + 1)
        near = slice(first, t + 1)
        shared = h // (q.shape[2] // k.shape[2])
        score = k[b, near, shared] @ q[b, t, h].astype(np.float64) / q.shape[3] ** 0.5
        weight = np.exp(score - score.max())
        out[b, t, h] = weight / weight.sum() @ v[b, near, shared]
    return out


@pytest.mark.parametrize("kind", ["plain", "xla"])
@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_a_query_sees_itself_and_what_its_window_holds(kind, window):
    q, k, v = inputs()
    run = jax.jit(functools.partial(attention.causal, kind, window=window))
    np.testing.assert_allclose(run(q, k, v), by_hand(q, k, v, window), atol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_splash_says_the_same_as_the_equation(window):
    """The TPU kernel, interpreted; 150 is no multiple of its blocks."""
    q, k, v = inputs(length=150, size=128)
    found = attention._splash(q, k, v, window, interpret=True)
    np.testing.assert_allclose(found, by_hand(q, k, v, window), atol=1e-4)


@pytest.mark.slow
def test_splash_has_the_gradient_of_the_equation_within_layers():
    """Interpreted, under checkpoint, cond and scan, as the decoder uses it."""
    q, k, v = inputs(length=130, size=128)
    target = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)

    def loss(attend, q):
        @jax.checkpoint
        def layer(x, slides):
            near = functools.partial(attend, window=40)
            far = functools.partial(attend, window=None)
            return jax.lax.cond(slides, near, far, x, k, v), None

        out, _ = jax.lax.scan(layer, q, np.array([True, False]))
        return jnp.sum(out * target)

    splash = functools.partial(attention._splash, interpret=True)
    plain = functools.partial(attention.causal, "plain")
    found, wanted = (
        jax.jit(jax.grad(functools.partial(loss, a)))(q) for a in (splash, plain)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_kernels_have_the_same_gradient():
    arrays = inputs()
    target = np.random.default_rng(1).standard_normal(arrays[0].shape)

    def slope(kind):
        def loss(*arrays):
            return jnp.sum(attention.causal(kind, *arrays, window=5) * target)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

    for a, b in zip(slope("plain"), slope("xla")):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "kind, size, dtype, backend, named",
    [
        ("flash", 64, "bfloat16", "gpu", "'flash' is not known: plain, xla, cudnn"),
        ("cudnn", 64, "bfloat16", "cpu", "wants a GPU; here: cpu"),
        ("cudnn", 64, "float32", "gpu", "wants model.dtype=bfloat16"),
        ("cudnn", 256, "bfloat16", "gpu", "head size ≤ 128"),
        ("cudnn", 20, "bfloat16", "gpu", "that 8 divides"),
        ("splash", 128, "bfloat16", "gpu", "wants a TPU"),
        ("splash", 64, "bfloat16", "tpu", "that 128 divides"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(kind, size, dtype, backend, named):
    assert named in attention.refuse(kind, size, dtype, backend)


@pytest.mark.parametrize(
    "kind, size, dtype, backend",
    [
        ("plain", 6, "float32", "cpu"),
        ("xla", 6, "float32", "tpu"),
        ("cudnn", 128, "bfloat16", "gpu"),
        ("splash", 128, "float32", "tpu"),
    ],
)
def test_a_kernel_that_runs_is_not_refused(kind, size, dtype, backend):
    assert attention.refuse(kind, size, dtype, backend) is None
