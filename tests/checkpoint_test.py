import os
import subprocess
import threading
import time

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


def restored(checkpointer, like=None):
    """The newest as (step, tree, host)."""
    step, host = checkpointer.newest()
    return step, checkpointer.restore(step, tree() if like is None else like), host


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_empty_folder_has_nothing_to_restore(saved):
    assert saved.newest() is None


def test_tree_and_host_come_back_as_they_were(saved):
    generator = np.random.default_rng(5)
    host = {"rng": generator.bit_generator.state, "text": "Δ", "list": [1, 0.1, None]}
    saved.save(3, tree(2.0), host)
    step, found, found_host = restored(saved, tree(0.0))
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
    step, found, host = restored(second)
    second.close()
    second.close()
    assert (step, host) == (5, {"step": 5})
    assert_same(found, tree(5))
    assert names(tmp_path) == ["2", "5"]


def test_the_best_are_kept_besides_the_newest(tmp_path):
    saved = Checkpointer(tmp_path, keep=1, best=2)
    scores = {1: 0.5, 2: 0.9, 3: None, 4: 0.5, 5: 0.1, 6: None}
    for step, score in scores.items():
        saved.save(step, tree(), {}, score)
    saved.close()
    assert names(tmp_path) == ["2", "4", "6"]


def test_a_step_saved_twice_is_an_error_not_a_silent_skip(saved):
    saved.save(5, tree(), {})
    for step in (4, 5):
        with pytest.raises(ValueError, match="later than the saved step 5"):
            saved.save(step, tree(), {})


@pytest.mark.parametrize("cut", ["tree", "host.json", "name"])
def test_a_save_that_was_interrupted_is_not_restored(tmp_path, monkeypatch, cut):
    """Broken off before, while and after its files are written: it has no name yet."""
    first = Checkpointer(tmp_path, keep=2)
    first.save(5, tree(5), {})
    first.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(checkpoint.manifest, "write", interrupted)
        first.save(7, tree(7), {})
        with pytest.raises(checkpoint.Unsaved):
            first.close()
    part = tmp_path / ".part-7"
    if cut == "tree":
        (part / "tree").rename(part / "tree.orbax-checkpoint-tmp")
    if cut != "name":
        (part / "host.json").unlink()
    assert names(tmp_path) == [".part-7", "5"]
    second = Checkpointer(tmp_path, keep=2)
    assert restored(second)[0] == 5
    second.save(7, tree(7), {})
    assert restored(second)[0] == 7
    second.close()
    assert names(tmp_path) == ["5", "7"]


def interrupted(*_):
    raise OSError(5, "the process died here")


def test_the_loop_does_not_wait_for_the_disk(saved, monkeypatch):
    """The save goes on in a thread; the next one and `wait` wait for it."""
    gate, write = threading.Event(), checkpoint.manifest.write

    def slow(*arguments):
        assert gate.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpoint.manifest, "write", slow)
    host = {"list": [1]}
    saved.save(1, tree(1), host)  # returns though the gate is shut
    host["list"].append(2)
    saved.check()
    threading.Timer(0.2, gate.set).start()
    saved.save(2, tree(2), host)
    saved.wait()
    folder = saved._directory
    assert checkpoint.read(folder, "params", 1)[2] == {"list": [1]}
    assert checkpoint.read(folder, "params", 2)[2] == {"list": [1, 2]}


def test_the_tree_may_be_donated_right_after_a_save(saved):
    triple = jax.jit(lambda s: {"x": s["x"] * 3}, donate_argnums=0)
    like = {"x": jnp.zeros(3_000_000)}
    for step in range(1, 4):
        state = {"x": jnp.ones(3_000_000)}
        saved.save(step, state, {})
        triple(triple(state))
        np.testing.assert_array_equal(restored(saved, like)[1]["x"], 1)


def test_a_tree_of_another_shape_is_refused(saved):
    saved.save(1, {"x": jnp.ones(3)}, {})
    with pytest.raises(ValueError, match="shape"):
        restored(saved, {"x": jnp.ones(4)})


def test_restored_arrays_lie_where_the_like_tree_lies(saved):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    saved.save(1, {"x": jnp.ones(4)}, {})
    found = restored(saved, {"x": jax.device_put(jnp.zeros(4), place)})[1]
    assert found["x"].sharding == place


def test_one_branch_is_read_without_a_template(saved, tmp_path):
    for step in (1, 2):
        saved.save(step, tree(step), {"n": step})
    saved.wait()
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
    saved.wait()
    for step in (0, 5):
        with pytest.raises(ValueError, match=f"of step {step} in .*there: 3"):
            checkpoint.read(tmp_path / "checkpoints", "params", step)


def cut(folder):
    path = max(
        (folder / "tree").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size
    )
    path.write_bytes(path.read_bytes()[:-1])


def lose(folder):
    (folder / "tree" / "_METADATA").unlink()


def forget(folder):
    (folder / "manifest.json").unlink()


@pytest.fixture
def three(tmp_path):
    """Checkpoints 1, 2 and 3."""
    saved = Checkpointer(tmp_path / "three", keep=3)
    for step in (1, 2, 3):
        saved.save(step, tree(step), {"n": step})
    saved.close()
    return tmp_path / "three"


@pytest.mark.parametrize(
    "damage, why",
    [(cut, "bytes instead of"), (lose, "_METADATA is"), (forget, "manifest")],
)
def test_a_damaged_checkpoint_is_told_and_set_aside_for_the_one_before(
    three, damage, why
):
    damage(three / "3")
    said = []
    step, _, _ = checkpoint.read(three, "params", say=said.append)
    assert step == 2 and why in said[0] and names(three) == ["1", "2", "3"]
    with pytest.raises(ValueError, match=f"3 is damaged .*{why}.*there: 1, 2, 3"):
        checkpoint.read(three, "params", 3)
    second = Checkpointer(three, keep=3, say=said.append)
    step, found, host = restored(second)
    assert (step, host) == (2, {"n": 2})
    assert_same(found, tree(2))
    assert "checkpoint 3 is damaged" in said[1] and why in said[1]
    # Its step can be saved again, and be damaged again.
    second.save(3, tree(4), {"n": 4})
    second.wait()
    damage(three / "3")
    assert restored(second)[0] == 2
    second.close()
    assert names(three) == ["1", "2", "damaged-3", "damaged-3.2"]


def test_where_all_are_damaged_nothing_is_moved_and_each_is_named(three):
    for step, damage in zip(("1", "2", "3"), (cut, lose, forget)):
        damage(three / step)
    second = Checkpointer(three, keep=3)
    for call in (second.newest, lambda: checkpoint.read(three, "params")):
        with pytest.raises(ValueError, match="(?s)every .*3: manifest.*2: .*1: tree/"):
            call()
    second.close()
    assert names(three) == ["1", "2", "3"]


def full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["tree", "host.json", "manifest.json"])
def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(saved, monkeypatch, where):
    saved.save(1, tree(1), {"n": 1})
    saved.wait()
    with monkeypatch.context() as patch:
        module, name = {
            "tree": (saved._orbax, "save"),
            "host.json": (checkpoint.artifacts, "write_atomic"),
            "manifest.json": (checkpoint.manifest, "write"),
        }[where]
        patch.setattr(module, name, full)
        with pytest.raises(
            checkpoint.Unsaved,
            match=r"2 of .* MB .*checkpoints \(.* free\): no space .*1 is",
        ):
            saved.save(2, tree(2), {"n": 2})
            saved.wait()
    assert names(saved._directory) == ["1"]
    assert restored(saved)[0] == 1
    saved.save(2, tree(2), {"n": 2})
    assert restored(saved)[0] == 2


def test_a_failed_save_is_heard_of_without_waiting(saved, monkeypatch):
    monkeypatch.setattr(checkpoint.manifest, "write", full)
    saved.save(1, tree(1), {})
    with pytest.raises(checkpoint.Unsaved, match="there is none before it"):
        for _ in range(600):
            saved.check()
            time.sleep(0.1)
    saved.check()  # told once


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="a superuser can mount"
)
def test_a_file_system_that_is_really_full(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        saved = Checkpointer(folder, keep=9)
        with pytest.raises(checkpoint.Unsaved, match="no space left; [0-9]+ is still"):
            for step in range(1, 20):
                noise = jax.random.normal(jax.random.key(step), (50_000,))
                saved.save(step, {"x": noise}, {})
                saved.wait()
        found = restored(saved, {"x": jnp.zeros(50_000)})
        noise = jax.random.normal(jax.random.key(found[0]), (50_000,))
        np.testing.assert_array_equal(found[1]["x"], noise)
        saved.close()
    finally:
        subprocess.run(["umount", str(folder)], check=True)
