"""The update: exact over micro-batches, teachers kept as named, padding inert."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from skillsd_jax import config as settings
from skillsd_jax import learner, packing, tokens
from skillsd_jax.models import lora, qwen, scoring

MODEL = qwen.ModelConfig(
    vocab=32, width=16, layers=1, heads=2, kv_heads=1, head_size=8, hidden=32
)
ROWS, LENGTH, SCORED = 10, 12, 4


@pytest.fixture(scope="module")
def params():
    return qwen.init(MODEL, jax.random.key(0))


def batch(rows=ROWS, size=ROWS + 1, seed=0):
    """Random rows of two groups; the rest is padding."""
    rng = np.random.default_rng(seed)

    def view(extra):
        ids = np.zeros((size, LENGTH + extra), np.int32)
        ids[:rows] = rng.integers(0, MODEL.vocab, (rows, LENGTH + extra))
        scored = np.ones((size, SCORED), np.int32)
        scored[:rows] = np.arange(SCORED) + extra + 5
        return ids, scored

    (plain, at), (skilled, teacher_at) = view(0), view(3)
    skilled[:rows, 8:12] = plain[:rows, 5:9]
    count = rng.integers(1, SCORED + 1, rows)
    mask = np.zeros((size, SCORED), np.float32)
    mask[:rows] = np.arange(SCORED) < count[:, None]
    trajectory = np.full(size, -1, np.int32)
    trajectory[:rows] = np.arange(rows)
    reward = np.zeros(size, np.float32)
    reward[:rows] = rng.integers(0, 2, rows)
    full = np.full(size, LENGTH, np.int32)
    return tokens.TokenBatch(
        student=tokens.TokenView(tokens=plain, length=full, scored=at),
        teacher=tokens.TokenView(tokens=skilled, length=full + 3, scored=teacher_at),
        old=(-3 * mask).astype(np.float32),
        mask=mask,
        segment=(2 * mask).astype(np.int32),
        turn=np.where(mask > 0, 0, -1).astype(np.int32),
        anchor=np.zeros((size, SCORED), np.int32),
        returns=(reward[:, None] * mask).astype(np.float32),
        skilled=(trajectory % 3 != 0).astype(np.float32) * (trajectory >= 0),
        reward=reward,
        group=np.where(trajectory < 0, 0, trajectory % 2).astype(np.int32),
        trajectory=trajectory,
        success=reward,
    )


def configured(**optimizer):
    config = settings.Config()
    config.optimizer = dataclasses.replace(
        settings.Optimizer(), **{"minibatches": 1, "micro_rows": 4, **optimizer}
    )
    return config


def updated(config, params, data, order=None):
    made = learner.Learner(MODEL, config, updates=10)
    state = made.init(jax.tree.map(jnp.copy, params))
    order = np.arange(ROWS) if order is None else order
    state, sums = made.update(state, tokens.arrange(data, order, config.optimizer))
    return state, learner.means(sums)


def assert_same(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("name", ["grpo", "skill_sd", "sdar"])
def test_micro_batches_change_nothing_but_rounding(params, name, mode):
    one, many = configured(micro_rows=16), configured(micro_rows=2)
    for config in (one, many):
        config.objective.name, config.objective.loss_agg_mode = name, mode
        config.optimizer.learning_rate = 1e-2
    whole, figures = updated(one, params, batch())
    parts, figures_of_parts = updated(many, params, batch())
    assert figures.keys() == figures_of_parts.keys()
    for key, value in figures.items():
        assert figures_of_parts[key] == pytest.approx(value, abs=1e-5, rel=1e-4), key
    # Adam divides by the gradient's size: compare its first moment, not the weights.
    assert_same(whole.optimizer, parts.optimizer, 1e-6)


def ragged(rows=ROWS, seed=0, longest=LENGTH):
    """Random rows of many lengths, some of them shown a skill of three tokens."""
    data, rng = batch(rows, seed=seed), np.random.default_rng(seed)
    views = []
    first = rng.integers(1, longest - SCORED, rows)
    count = data.mask[:rows].sum(1).astype(int)
    for view, extra in (data.student, 0), (data.teacher, 3):
        start = first + extra * data.skilled[:rows].astype(int)
        length, scored = np.ones((ROWS + 1,), np.int32), np.ones_like(view.scored)
        length[:rows] = start + count
        scored[:rows] = np.where(
            data.mask[:rows] > 0, start[:, None] + range(SCORED), 1
        )
        ids = np.where(np.arange(LENGTH + extra) < length[:, None], view.tokens, 0)
        for b in range(rows):
            ids[b, start[b] : length[b]] = data.student.tokens[b, : count[b]]
        views.append(tokens.TokenView(tokens=ids, length=length, scored=scored))
    return dataclasses.replace(data, student=views[0], teacher=views[1])


def packed(data, config, ways=1):
    """Arranged in the buckets that fit the rows, as a run does it."""
    views = data.student.length[:ROWS], data.teacher.length[:ROWS]
    count = config.optimizer.length_buckets
    lengths = packing.fitted(*views, (LENGTH, LENGTH + 3), count)
    shapes = tokens.buckets(lengths, ROWS + 1, config.optimizer, ways)
    return tokens.arrange(data, np.arange(ROWS), config.optimizer, shapes)


METHODS = {
    "grpo": {},
    "skill_sd": {},
    "opsd": {"estimator": "full_jsd"},  # whole distributions
    "rlsd": {},  # credits: the teacher is asked before the update as well
}


@pytest.mark.parametrize("name", METHODS)
def test_buckets_of_many_lengths_change_nothing_but_rounding(params, name):
    one = rescoring(minibatches=2, learning_rate=1e-2)
    many = rescoring(
        minibatches=2, learning_rate=1e-2, length_buckets=8, micro_tokens=60
    )
    for config in (one, many):
        config.objective.name = name
        for key, value in METHODS[name].items():
            setattr(config.objective, key, value)
    arranged = packed(ragged(), many)
    assert len(arranged.buckets) > 4
    assert len({shape.rows for shape in arranged.buckets}) > 1
    made = learner.Learner(MODEL, many, updates=10)
    parts, sums = made.update(made.init(jax.tree.map(jnp.copy, params)), arranged)
    whole, figures = updated(one, params, ragged())
    figures_of_parts = learner.means(sums)
    assert figures.keys() == figures_of_parts.keys()
    for key, value in figures.items():
        assert figures_of_parts[key] == pytest.approx(value, abs=1e-5, rel=1e-4), key
    assert_same(whole.optimizer, parts.optimizer, 1e-6)


def test_rows_of_other_lengths_compile_nothing(params):
    config = configured(minibatches=2, length_buckets=8, micro_tokens=60)
    made = learner.Learner(MODEL, config, updates=10)
    state = made.init(jax.tree.map(jnp.copy, params))
    first = packed(ragged(), config)
    for rows, seed, longest in ((ROWS, 0, LENGTH), (7, 1, 8), (ROWS, 2, LENGTH)):
        data, order = ragged(rows, seed, longest), np.arange(rows)
        arranged = tokens.arrange(data, order, config.optimizer, first.buckets)
        state, _ = made.update(state, arranged)
    assert made._update._cache_size() == 1


def scored(params, data):
    """The batch with the scorer's log-probs for the sampler's."""
    found = scoring.score(MODEL, params, data.student, 1.0, data.mask)
    return dataclasses.replace(data, old=np.array(found.logprob))


def shifted(data, rows, nats):
    """The batch with a sampler that gave those rows' tokens so much more."""
    old = data.old.copy()
    old[rows] += nats * data.mask[rows]
    return dataclasses.replace(data, old=old)


def rescoring(cap=0.0, **optimizer):
    config = configured(**optimizer)
    config.rollout.old_logprobs, config.rollout.correction_cap = "recomputed", cap
    return config


@pytest.mark.parametrize("made", [configured, rescoring])
def test_a_sampler_and_a_scorer_agree_but_for_what_is_put_between_them(params, made):
    data = scored(params, batch())
    _, figures = updated(made(micro_rows=2), params, data)
    assert 0 <= figures["old_difference_mean"] <= figures["old_difference_max"] < 1e-5
    assert figures["old_difference_share"] == 0
    data = shifted(shifted(data, [1, 4], 0.25), [2], -0.005)
    _, figures = updated(made(micro_rows=2), params, data)
    count, many, few = (data.mask[rows].sum() for rows in (slice(None), [1, 4], [2]))
    assert figures["old_difference_max"] == pytest.approx(0.25, abs=1e-5)
    mean = (0.25 * many + 0.005 * few) / count
    assert figures["old_difference_mean"] == pytest.approx(mean, abs=1e-5)
    assert figures["old_difference_share"] == pytest.approx(many / count, abs=1e-6)


@pytest.mark.parametrize("made, seen", [(configured, False), (rescoring, True)])
def test_without_a_pass_of_its_own_agreement_is_that_of_the_first_minibatch(
    params, made, seen
):
    data = shifted(scored(params, batch()), slice(1, None, 2), 0.25)
    _, figures = updated(made(minibatches=2, learning_rate=0.1), params, data)
    share = data.mask[1::2].sum() / data.mask.sum() if seen else 0
    assert figures["old_difference_share"] == pytest.approx(share, abs=1e-6)
    assert figures["old_difference_max"] == pytest.approx(0.25 * seen, abs=1e-5)


def test_episodes_that_nobody_sampled_in_this_view_are_not_compared(params):
    config = configured()
    config.objective.name = "hdpo"
    data = scored(params, batch())
    rescued = np.flatnonzero(data.skilled)
    _, figures = updated(config, params, shifted(data, rescued, 1.0))
    assert figures["old_difference_max"] < 1e-5
    config.objective.name = "sad"
    made = learner.Learner(MODEL, config, updates=10, external=MODEL)
    state = made.init(jax.tree.map(jnp.copy, params), params)
    arranged = tokens.arrange(data, np.arange(ROWS), config.optimizer)
    _, sums = made.update(state, arranged)
    assert not any(name.startswith("old_") for name in sums)


def test_the_agreement_changes_no_bit_of_an_update(params, monkeypatch):
    config = configured(minibatches=2, micro_rows=2, learning_rate=1e-2)
    state, figures = updated(config, params, batch())
    monkeypatch.setattr(learner.Learner, "_mismatch", lambda *_: {})
    bare, fewer = updated(config, params, batch())
    assert figures.keys() - fewer.keys() == {
        f"old_difference_{name}" for name in ("mean", "max", "share")
    }
    assert fewer.items() <= figures.items()
    jax.tree.map(np.testing.assert_array_equal, state, bare)


@pytest.mark.parametrize("name", ["grpo", "skill_sd", "opid"])
def test_recomputed_log_probs_take_the_place_of_wrong_ones(params, name):
    """In the ratio, in the distillation and in the credits."""
    right, wrong = scored(params, batch()), batch()
    sampled, recomputed = (
        make(minibatches=2, learning_rate=1e-2) for make in (configured, rescoring)
    )
    for config in (sampled, recomputed):
        config.objective.name, config.objective.gap_weight = name, 1.0
    wanted, figures = updated(sampled, params, right)
    found, again = updated(recomputed, params, wrong)
    assert_same(found.optimizer, wanted.optimizer, 1e-6)
    for key in figures.keys() - {"old_difference_mean", "old_difference_max"}:
        if key != "old_difference_share":
            assert again[key] == pytest.approx(figures[key], abs=1e-5, rel=1e-4), key
    other, _ = updated(sampled, params, wrong)
    with pytest.raises(AssertionError):
        assert_same(other.optimizer, wanted.optimizer, 1e-6)


def test_after_recomputing_the_first_ratio_is_one(params):
    _, figures = updated(rescoring(), params, batch())
    assert figures["ratio"] == pytest.approx(1, abs=1e-5)
    _, figures = updated(configured(), params, batch())
    assert abs(figures["ratio"] - 1) > 0.1


@pytest.mark.parametrize("cap, weight", [(10.0, 2.0), (1.5, 1.5)])
def test_a_correction_weighs_the_policy_gradient_up_to_its_cap(params, cap, weight):
    right = scored(params, batch())
    doubtful = shifted(right, slice(None), -np.log(2))  # π_scorer / π_sampler = 2
    _, plain = updated(rescoring(), params, right)
    _, figures = updated(rescoring(cap), params, doubtful)
    assert figures["correction_mean"] == pytest.approx(weight, abs=1e-5)
    assert figures["correction_capped"] == (weight == cap)
    assert abs(plain["loss_policy"]) > 1e-3
    wanted = weight * plain["loss_policy"]
    assert figures["loss_policy"] == pytest.approx(wanted, rel=1e-4)
    wanted = plain["loss_distillation"]
    assert figures["loss_distillation"] == pytest.approx(wanted, rel=1e-4)
    assert "correction_mean" not in plain


def test_the_cap_holds_the_tokens_that_are_beyond_it(params):
    data = shifted(scored(params, batch()), [1, 4], -np.log(3))
    _, figures = updated(rescoring(2.0, micro_rows=2), params, data)
    share = data.mask[[1, 4]].sum() / data.mask.sum()
    assert figures["correction_capped"] == pytest.approx(share, abs=1e-6)
    assert figures["correction_mean"] == pytest.approx(1 + share, abs=1e-5)


def test_the_order_of_rows_changes_nothing_but_rounding(params):
    a, _ = updated(configured(), params, batch())
    b, _ = updated(configured(), params, batch(), order=np.arange(ROWS)[::-1])
    assert_same(a.optimizer, b.optimizer, 1e-6)


def test_padding_rows_change_nothing(params):
    a, _ = updated(configured(), params, batch())
    b, _ = updated(configured(), params, batch(size=3 * ROWS))
    assert_same(a.optimizer, b.optimizer, 1e-6)


def test_minibatch_rows_fill_as_many_updates_as_there_are_rows(params):
    config = configured(minibatch_rows=5, micro_rows=1)
    arranged = tokens.arrange(batch(size=41), np.arange(ROWS), config.optimizer)
    filled = (arranged.rows.mask.sum((1, 2)) > 0).sum()
    assert arranged.rows.mask.shape[0] == 9 and filled == 2
    state, figures = updated(config, params, batch(size=41))
    counts = [x for x in jax.tree.leaves(state.optimizer) if x.ndim == 0]
    assert {int(count) for count in counts} == {2}
    assert figures["grad_norm"] > 0


def test_every_row_is_dealt_once():
    config = configured(minibatches=3)
    order = np.random.default_rng(0).permutation(ROWS)
    arranged = tokens.arrange(batch(), order, config.optimizer)
    dealt = arranged.rows.trajectory[arranged.rows.trajectory >= 0]
    np.testing.assert_array_equal(np.sort(dealt), np.arange(ROWS))


@pytest.mark.parametrize("kind,same", [("frozen", True), ("periodic", False)])
def test_a_periodic_teacher_follows_and_a_frozen_one_stays(params, kind, same):
    config = configured()
    config.teacher.kind, config.teacher.every = kind, 2
    made = learner.Learner(MODEL, config, updates=10)
    state = made.init(jax.tree.map(jnp.copy, params))
    arranged = tokens.arrange(batch(), np.arange(ROWS), config.optimizer)
    state, _ = made.update(state, arranged)
    assert_same(state.teacher, params, 0)
    state, _ = made.update(state, arranged)
    reference = params if same else state.params
    assert_same(state.teacher, reference, 0)
    moved = jnp.abs(state.params["embed"] - params["embed"]).max()
    assert moved > 0


def test_an_ema_teacher_takes_in_a_share_of_the_student(params):
    config = configured()
    config.teacher.kind, config.teacher.rate = "ema", 0.25
    state, _ = updated(config, params, batch())
    mixed = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, params, state.params)
    assert_same(state.teacher, mixed, 1e-6)


def test_an_external_teacher_may_be_of_another_shape_and_stays(params):
    wide = dataclasses.replace(MODEL, width=24, layers=2)
    weights = qwen.init(wide, jax.random.key(3))
    config = configured()
    config.objective.name = "opd"
    made = learner.Learner(MODEL, config, updates=10, external=wide)
    with pytest.raises(ValueError, match="external teacher needs weights"):
        made.init(params)
    state = made.init(jax.tree.map(jnp.copy, params), weights)
    arranged = tokens.arrange(batch(), np.arange(ROWS), config.optimizer)
    state, sums = made.update(state, arranged)
    assert_same(state.teacher, weights, 0)
    assert abs(learner.means(sums)["gap"]) > 1e-3


@pytest.mark.parametrize("name", ["rlsd", "grsd", "agent_opsd", "gigpo", "sdpo"])
def test_whole_batch_figures_do_not_see_micro_batches(params, name):
    one, many = configured(micro_rows=16), configured(micro_rows=2)
    for config in (one, many):
        config.objective.name = name
    whole, figures = updated(one, params, batch())
    parts, figures_of_parts = updated(many, params, batch())
    for key, value in figures.items():
        assert figures_of_parts[key] == pytest.approx(value, abs=1e-5, rel=1e-4), key
    assert_same(whole.optimizer, parts.optimizer, 1e-6)


def test_a_retired_teacher_teaches_no_more(params):
    config = configured(learning_rate=1e-12)  # the gap cannot shrink
    config.objective.schedules = "sdl_lambda=plateau:2"
    made = learner.Learner(MODEL, config, updates=10)
    state = made.init(jax.tree.map(jnp.copy, params))
    arranged = tokens.arrange(batch(), np.arange(ROWS), config.optimizer)
    seen = []
    for _ in range(5):
        state, sums = made.update(state, arranged)
        seen.append(learner.means(sums)["coefficient_sdl_lambda"])
    np.testing.assert_allclose(seen, [0.1, 0.1, 0.1, 0, 0], atol=1e-7)


def poisoned(data, rows):
    """The same batch, and a log-prob of these rows that no sampler could have."""
    old = data.old.copy()
    old[rows, 0] = np.nan
    return dataclasses.replace(data, old=old)


@pytest.mark.parametrize("kind", ["ema", "periodic"])
def test_a_batch_that_is_not_finite_changes_nothing(params, kind):
    config = configured(minibatches=2)
    config.teacher.kind, config.teacher.every = kind, 1
    made = learner.Learner(MODEL, config, updates=10)
    data, order = batch(), np.arange(ROWS)
    state = made.init(jax.tree.map(jnp.copy, params))
    state, sums = made.update(state, tokens.arrange(data, order, config.optimizer))
    assert learner.means(sums)["skipped_updates"] == 0
    before = jax.tree.map(np.array, state)
    bad = tokens.arrange(poisoned(data, order), order, config.optimizer)
    state, sums = made.update(state, bad)
    assert learner.means(sums)["skipped_updates"] == 2
    assert int(state.step) == 2
    # Of the gap, which is finite here, the schedules go on taking notice.
    held = dataclasses.replace(state, step=before.step, plateau=before.plateau)
    for x, y in zip(*map(jax.tree.leaves, (held, before)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert made._update._cache_size() == 1


def test_of_two_minibatches_the_one_that_is_finite_counts(params):
    config = configured(minibatches=2)
    config.teacher.kind = "ema"
    made = learner.Learner(MODEL, config, updates=10)
    order = np.arange(ROWS)
    arranged = tokens.arrange(batch(), order, config.optimizer)
    rows = dataclasses.replace(arranged.rows, old=arranged.rows.old.copy())
    rows.old[1] = np.nan
    half = dataclasses.replace(arranged, rows=rows)
    first = jax.tree.map(lambda x: x[:1], arranged)
    state, sums = made.update(made.init(jax.tree.map(jnp.copy, params)), half)
    assert learner.means(sums)["skipped_updates"] == 1
    wanted, _ = made.update(made.init(jax.tree.map(jnp.copy, params)), first)
    assert_same(state.params, wanted.params, 1e-6)
    assert_same(state.optimizer, wanted.optimizer, 1e-6)
    assert_same(state.teacher, wanted.teacher, 1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_live_teacher_is_the_student_itself(params):
    config = configured(learning_rate=1e-3)
    config.teacher.kind = "live"
    data = batch()
    data = dataclasses.replace(data, teacher=data.student)
    state, figures = updated(config, params, data)
    assert state.teacher is None
    assert figures["gap"] == pytest.approx(0, abs=1e-6)


def test_rows_without_a_skill_add_no_distillation(params):
    data = dataclasses.replace(batch(), skilled=np.zeros(ROWS + 1, np.float32))
    skill_sd, grpo = configured(), configured()
    grpo.objective.name = "grpo"
    a, figures = updated(skill_sd, params, data)
    b, _ = updated(grpo, params, data)
    assert figures["loss_distillation"] == 0
    assert (figures["gap"], figures["gap_rms"]) == (0, 0)
    assert_same(a.params, b.params, 0)


def test_grpo_keeps_no_teacher_and_no_reference(params):
    config = configured()
    config.objective.name = "grpo"
    state = learner.Learner(MODEL, config, updates=1).init(params)
    assert state.teacher is None and state.reference is None


def test_the_update_compiles_once(params):
    config = configured()
    made = learner.Learner(MODEL, config, updates=10)
    state = made.init(jax.tree.map(jnp.copy, params))
    for rows in (10, 7, 3):
        data = batch(rows=rows, size=ROWS + 1)
        arranged = tokens.arrange(data, np.arange(rows), config.optimizer)
        state, _ = made.update(state, arranged)
    assert made._update._cache_size() == 1


ADAPTED = dataclasses.replace(MODEL, lora=lora.Lora(rank=2, alpha=4.0, targets="mlp"))


@pytest.mark.parametrize("kind", ["frozen", "periodic", "ema", "live"])
def test_with_adapters_everything_that_moves_is_an_adapter(params, kind):
    """Trained, teacher, reference and moments have the adapters' structure."""
    weights = lora.attach(ADAPTED.lora, params, jax.random.key(5))
    adapters, base = lora.split(weights)
    config = configured(learning_rate=0.01)
    config.objective.kl_coefficient = 0.01
    config.teacher.kind, config.teacher.every = kind, 1
    made = learner.Learner(ADAPTED, config, updates=10)
    state = made.init(jax.tree.map(jnp.copy, weights))
    held = [
        state.params,
        state.reference,
        *optax.tree.get_all_with_path(state.optimizer, "mu")[0][1:],
    ]
    held += [] if kind == "live" else [state.teacher]
    for tree in held:
        assert jax.tree.structure(tree) == jax.tree.structure(adapters)
    arranged = tokens.arrange(batch(), np.arange(ROWS), config.optimizer)
    for _ in range(2):
        state, sums = made.update(state, arranged)
    assert made._update._cache_size() == 1
    assert_same(state.frozen, base, 0)
    assert all(
        np.abs(a - b).max() > 0
        for a, b in zip(*map(jax.tree.leaves, (state.params, adapters)))
    )
    assert jax.tree.structure(state.weights) == jax.tree.structure(weights)
    assert np.isfinite(learner.means(sums)["loss"])


def test_adapters_learn_what_the_gradient_of_the_whole_says(params):
    """Their first moment is the chain rule through kernel = base + 2 A B."""
    config = configured(grad_clip=1e9)
    config.objective.name = "grpo"
    weights = lora.attach(ADAPTED.lora, params, jax.random.key(5))
    made = learner.Learner(ADAPTED, config, updates=10)
    state = made.init(jax.tree.map(jnp.copy, weights))
    arranged = tokens.arrange(batch(), np.arange(ROWS), config.optimizer)
    first = jax.tree.map(lambda x: x[:1], arranged)
    state, _ = made.update(state, first)
    whole = learner.Learner(MODEL, config, updates=10)
    plain = whole.init(jax.tree.map(jnp.copy, params))
    plain, _ = whole.update(plain, first)
    part = optax.tree.get_all_with_path(plain.optimizer, "mu")[0][1]["layers"]["mlp"]
    found = optax.tree.get_all_with_path(state.optimizer, "mu")[0][1]["layers"]["mlp"]
    for name in ("gate", "up", "down"):
        down = weights["layers"]["mlp"][name]["lora_down"]
        wanted = 2.0 * jnp.einsum("nir,nio->nro", down, part[name]["kernel"])
        np.testing.assert_allclose(found[name]["lora_up"], wanted, atol=1e-6)
        assert np.abs(wanted).max() > 1e-4
        assert not found[name]["lora_down"].any()  # B is zero at the start


def test_a_frozen_kernel_costs_no_gradient():
    """No product of the compiled update has the shape of an MLP kernel, [24, 56] or
    [56, 24]; without adapters there are the gradients of gate, up and down."""
    shape = dataclasses.replace(MODEL, width=24, hidden=56)
    config = configured()
    config.objective.name = "grpo"
    arranged = tokens.arrange(batch(), np.arange(ROWS), config.optimizer)
    for adapters, count in ((ADAPTED.lora, 0), (None, 3)):
        model = dataclasses.replace(shape, lora=adapters)
        made = learner.Learner(model, config, updates=10)
        state = made.init(qwen.init(model, jax.random.key(0)))
        program = made._update.lower(state, arranged).compile().as_text()
        products = re.findall(r"= f32\[(?:24,56|56,24)\]\S* dot\(", program)
        assert len(products) == count


def test_weights_that_are_not_float32_are_not_trained(params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    with pytest.raises(ValueError, match="must be float32, not bfloat16"):
        learner.Learner(MODEL, configured(), updates=1).init(half)
