"""The published shapes against the published numbers of parameters."""

import math
import subprocess
import sys

import jax
import pytest

from skillsd_jax.models import qwen, shapes

# Billions, as the model cards and technical reports give them (arXiv 2412.15115,
# 2505.09388): all parameters, tied ones once.
PUBLISHED = {
    "qwen2.5-0.5b": 0.49,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.62,  # 7.61 on the card, 7.616 exactly
    "qwen3-0.6b": 0.60,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
}


def test_every_shape_has_a_published_size():
    assert shapes.SHAPES.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_published_number_of_parameters(name):
    config = shapes.SHAPES[name]
    params = jax.eval_shape(lambda: qwen.init(config, jax.random.key(0)))
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert total / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)


def test_the_families_differ_in_bias_and_norm():
    for name, config in shapes.SHAPES.items():
        assert config.qk_norm == name.startswith("qwen3")
        assert config.qkv_bias == name.startswith("qwen2.5")
        assert (config.rope_theta, config.norm_eps) == (1e6, 1e-6)


def test_importing_the_shapes_makes_no_array():
    code = (
        "import jax; from skillsd_jax.models import shapes\n"
        "assert not jax._src.xla_bridge._backends, 'a backend was started'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
