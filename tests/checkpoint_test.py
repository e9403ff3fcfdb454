import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from skillsd_jax import checkpoint
from skillsd_jax.checkpoint import Checkpointer


def tree(value: float = 1.0) -> dict:
    """All that a learner's state may hold: the odd kinds included."""
    params = {"a": jnp.full((2, 3), value, jnp.bfloat16), "b": jnp.arange(4.0)}
    return {
        "step": np.int32(7),
        "params": params,
        "teacher": {},
        "nothing": None,
        "optimizer": optax.adamw(1e-3).init(params),
        "key": jax.random.key(3),
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def saved(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=2)
    yield checkpointer
    checkpointer.close()


def test_an_empty_folder_has_nothing_to_restore(saved):
    assert saved.restore(tree()) is None


def test_tree_and_host_come_back_as_they_were(saved):
    generator = np.random.default_rng(5)
    host = {"rng": generator.bit_generator.state, "text": "Δ", "list": [1, 0.1, None]}
    saved.save(3, tree(2.0), host)
    step, found, found_host = saved.restore(tree(0.0))
    assert step == 3
    assert_same(found, tree(2.0))
    assert found_host == host
    # Integers of 128 bits survive: the generator goes on where it was.
    other = np.random.default_rng()
    other.bit_generator.state = found_host["rng"]
    assert other.random() == generator.random()


def test_the_newest_are_kept_also_by_the_next_process(tmp_path):
    first = Checkpointer(tmp_path, keep=2)
    for step in (1, 2, 5):
        first.save(step, tree(step), {"step": step})
    first.close()
    second = Checkpointer(tmp_path, keep=2)
    step, found, host = second.restore(tree())
    second.close()
    assert (step, host) == (5, {"step": 5})
    assert_same(found, tree(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5"]


def test_a_step_saved_twice_is_an_error_not_a_silent_skip(saved):
    saved.save(5, tree(), {})
    for step in (4, 5):
        with pytest.raises(ValueError, match="later than the saved step 5"):
            saved.save(step, tree(), {})


def test_a_save_that_was_interrupted_is_not_restored(tmp_path):
    first = Checkpointer(tmp_path, keep=2)
    first.save(5, tree(5), {})
    first.close()
    (tmp_path / "7.orbax-checkpoint-tmp" / "tree").mkdir(parents=True)
    second = Checkpointer(tmp_path, keep=2)
    assert second.restore(tree())[0] == 5
    second.save(7, tree(7), {})
    assert second.restore(tree())[0] == 7
    second.close()


def test_the_tree_may_be_donated_right_after_a_save(saved):
    state = {"x": jnp.ones(100_000)}
    saved.save(1, state, {})
    jax.jit(lambda s: {"x": s["x"] * 3}, donate_argnums=0)(state)
    np.testing.assert_array_equal(saved.restore({"x": jnp.zeros(100_000)})[1]["x"], 1)


def test_a_tree_of_another_shape_is_refused(saved):
    saved.save(1, {"x": jnp.ones(3)}, {})
    with pytest.raises(ValueError, match="shape"):
        saved.restore({"x": jnp.ones(4)})


def test_restored_arrays_lie_where_the_like_tree_lies(saved):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    saved.save(1, {"x": jnp.ones(4)}, {})
    found = saved.restore({"x": jax.device_put(jnp.zeros(4), place)})[1]
    assert found["x"].sharding == place


def test_one_branch_is_read_without_a_template(saved, tmp_path):
    for step in (1, 2):
        saved.save(step, tree(step), {"n": step})
    folder = tmp_path / "checkpoints"
    step, params, host = checkpoint.read(folder, "params")
    assert (
        step == 2
        and host == {"n": 2}
        and all(isinstance(x, np.ndarray) for x in params.values())
    )
    assert_same(params, jax.tree.map(np.asarray, tree(2)["params"]))
    step, params, _ = checkpoint.read(folder, "params", 1)
    assert step == 1 and (params["a"] == 1).all()


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(saved, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint of step None.*there: none"):
        checkpoint.read(tmp_path / "checkpoints", "params")
    saved.save(3, tree(), {})
    for step in (0, 5):
        with pytest.raises(ValueError, match=f"of step {step} in .*there: 3"):
            checkpoint.read(tmp_path / "checkpoints", "params", step)
