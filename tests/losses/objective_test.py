import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax import config
from skillsd_jax.losses import distillation, gates, masking, objective, policy_gradient

B, R = 6, 4
NAMES = list(objective.OBJECTIVES)
DISTILLED = ["skill_sd", "sdar"]


def settings(name="skill_sd", **changes):
    return config.Objective(name=name, **changes)


@pytest.fixture
def signals():
    """Six rows of up to four tokens: the third is empty, every other row skilled."""
    rng = np.random.default_rng(5)
    length = np.array([4, 2, 0, 3, 1, 4])
    mask = (np.arange(R) < length[:, None]).astype(np.float32)

    def draw():
        return (rng.uniform(-3, -0.05, (B, R)) * mask).astype(np.float32)

    student = draw()
    return objective.Signals(
        student=student,
        old=student + (rng.normal(0, 0.3, (B, R)) * mask).astype(np.float32),
        teacher=draw(),
        reference=draw(),
        entropy=-draw(),
        advantage=rng.normal(size=(B, 1)).astype(np.float32) * mask,
        mask=mask,
        skilled=np.array([1, 0, 1, 0, 1, 0], np.float32),
    )


def total(signals, objective_settings, count=None):
    """The learner's sum."""
    output = objective.recipe(objective_settings.name).loss(signals, objective_settings)
    mode = objective_settings.loss_agg_mode
    return sum(
        masking.aggregate(term, signals.mask, mode, count)
        for term in output.terms.values()
    )


def loss_of(signals, objective_settings, count=None):
    """The same as a function of the student's log-probs."""
    return lambda student: total(
        dataclasses.replace(signals, student=student), objective_settings, count
    )


def test_a_recipe_is_the_sum_of_its_equations(signals):
    s, skilled = signals, signals.skilled[:, None]
    surrogate = policy_gradient.clipped_surrogate(
        s.student, s.old, s.advantage, 0.1, 0.3, 2.0
    )
    kl = policy_gradient.reference_kl(s.student, s.reference, "k2")
    sdl = distillation.weighted_reverse_kl(s.student, s.teacher, s.old, 10.0, 20.0)
    gate = gates.gap_gate(s.student, s.teacher, 3.0)
    sdar = distillation.gated(s.student, s.teacher, gate)
    expected = {
        "grpo": {},
        "skill_sd": {"distillation": 0.7 * skilled * sdl},
        "sdar": {"distillation": 0.6 * skilled * sdar},
    }
    for name, distilled in expected.items():
        chosen = settings(
            name,
            clip_low=0.1,
            clip_high=0.3,
            dual_clip=2.0,
            kl_coefficient=0.5,
            kl_kind="k2",
            sdl_lambda=0.7,
            sdar_coef=0.6,
            gate_beta=3.0,
        )
        terms = objective.recipe(name).loss(signals, chosen).terms
        wanted = {"policy": surrogate, "reference_kl": 0.5 * kl} | distilled
        assert terms.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_allclose(terms[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", DISTILLED)
def test_at_coefficient_zero_a_distilled_objective_is_grpo(name, signals):
    zero = settings(name, sdl_lambda=0.0, sdar_coef=0.0)
    gradient = jax.grad(loss_of(signals, zero))(signals.student)
    plain = jax.grad(loss_of(signals, settings("grpo")))(signals.student)
    np.testing.assert_allclose(gradient, plain, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", DISTILLED)
def test_rows_without_a_skill_are_not_distilled(name, signals):
    chosen = settings(name)
    terms = objective.recipe(name).loss(signals, chosen).terms
    assert not terms["distillation"][signals.skilled == 0].any()
    assert terms["distillation"][0].all()
    everywhere = dataclasses.replace(signals, skilled=None)
    terms = objective.recipe(name).loss(everywhere, chosen).terms
    assert terms["distillation"][signals.mask > 0].all()


@pytest.mark.parametrize("bad", [-np.inf, np.inf, np.nan, -7.0])
@pytest.mark.parametrize("name", NAMES)
def test_what_stands_outside_the_mask_reaches_nothing(name, bad, signals):
    chosen = settings(name, kl_coefficient=0.1, gate="soft_or")
    spoilt = {
        n: np.where(signals.mask > 0, getattr(signals, n), bad)
        for n in objective.PER_TOKEN
        if getattr(signals, n) is not None
    }
    spoilt = dataclasses.replace(signals, **spoilt)
    output = objective.recipe(name).loss(spoilt, chosen)
    for term in output.terms.values():
        assert not term[signals.mask == 0].any()
    for values, weight in output.metrics.values():
        assert np.isfinite(values).all() and not weight[signals.mask == 0].any()
    value, gradient = jax.value_and_grad(loss_of(spoilt, chosen))(spoilt.student)
    clean = jax.value_and_grad(loss_of(signals, chosen))(signals.student)
    np.testing.assert_array_equal(value, clean[0])
    np.testing.assert_array_equal(gradient, clean[1])
    assert not gradient[signals.mask == 0].any()


@pytest.mark.parametrize("mode", masking.COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_change_nothing(name, mode, signals):
    chosen = settings(name, kl_coefficient=0.1, loss_agg_mode=mode)
    count = masking.count_of(signals.mask, mode)
    whole = jax.value_and_grad(loss_of(signals, chosen))(signals.student)
    value, gradients = 0, []
    for rows in (slice(0, 1), slice(1, 3), slice(3, 6)):  # 4, 2 and 8 tokens
        part = jax.tree.map(lambda x, rows=rows: x[rows], signals)
        each = jax.value_and_grad(loss_of(part, chosen, count))(part.student)
        value, gradients = value + each[0], [*gradients, each[1]]
    np.testing.assert_allclose(value, whole[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        np.concatenate(gradients), whole[1], rtol=1e-5, atol=1e-7
    )


def test_without_rewards_skill_sd_follows_the_reverse_kl(words):
    """Each of five words is a row, weighted by the sampler's probability of it."""

    def loss(logits):
        column = jax.nn.log_softmax(logits)[:, None]
        signals = objective.Signals(
            student=column,
            old=words.old[:, None],
            teacher=words.teacher[:, None],
            entropy=np.zeros((5, 1)),
            advantage=np.zeros((5, 1)),
            mask=np.ones((5, 1)),
        )
        terms = (
            objective.recipe("skill_sd").loss(signals, settings(sdl_lambda=0.3)).terms
        )
        return (np.exp(words.old)[:, None] * sum(terms.values())).sum()

    with jax.enable_x64(True):
        gradient = jax.grad(loss)(words.logits)
    np.testing.assert_allclose(gradient, 0.3 * words.reverse_kl_gradient(), atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_student_is_moved(name, signals):
    chosen = settings(name, kl_coefficient=0.1, gate="soft_or")
    gradients = jax.grad(total)(signals, chosen)
    for field in ("old", "teacher", "reference", "entropy", "advantage"):
        assert not getattr(gradients, field).any(), field
    assert gradients.student.any()


def test_the_gate_is_the_one_that_is_set(signals):
    s = signals
    expected = {
        "gap": gates.gap_gate(s.student, s.teacher, 2.0),
        "entropy": gates.entropy_gate(s.entropy, 2.0),
        "soft_or": gates.soft_or_gate(s.entropy, s.student, s.teacher, 2.0),
    }
    for gate, wanted in expected.items():
        chosen = settings("sdar", gate=gate, gate_beta=2.0, sdar_coef=1.0)
        output = objective.recipe("sdar").loss(signals, chosen)
        np.testing.assert_array_equal(output.metrics["gate"][0], wanted)
        np.testing.assert_allclose(
            output.terms["distillation"],
            s.skilled[:, None] * wanted * (s.teacher - s.student),
            rtol=1e-6,
        )


def test_dual_clip_zero_is_off(signals):
    old = signals.student - 3 * signals.mask  # ratio e³
    down = dataclasses.replace(signals, old=old, advantage=-signals.mask)
    for dual_clip, loss in ((3.0, 3.0), (0.0, np.exp(3))):
        chosen = settings("grpo", dual_clip=dual_clip)
        output = objective.recipe("grpo").loss(down, chosen)
        np.testing.assert_allclose(
            output.terms["policy"], loss * signals.mask, rtol=1e-5
        )
        assert ("dual_clip_fraction" in output.metrics) == (dual_clip > 0)


def test_metrics_average_over_their_own_tokens(signals):
    metrics = objective.recipe("sdar").loss(signals, settings("sdar")).metrics
    figures = {n: np.sum(v * w) / np.sum(w) for n, (v, w) in metrics.items()}
    own = signals.mask > 0
    skilled = own & (signals.skilled[:, None] > 0)
    gap = (signals.teacher - signals.student)[skilled]
    ratio = np.exp(signals.student - signals.old)[own]
    sign = np.sign(signals.advantage[own])
    gate = 1 / (1 + np.exp(-5 * gap))
    expected = {
        "gap": gap.mean(),
        "gap_squared": (gap**2).mean(),
        "gate": gate.mean(),
        "gate_above_half": (gap > 0).mean(),
        "ratio": ratio.mean(),
        "entropy": signals.entropy[own].mean(),
        "clip_fraction": np.where(sign > 0, ratio > 1.2, ratio < 0.8).mean(),
        "dual_clip_fraction": ((sign < 0) & (ratio > 3)).mean(),
    }
    assert figures.keys() == expected.keys()
    assert 0 < expected["clip_fraction"] < 1
    for name, value in expected.items():
        np.testing.assert_allclose(figures[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_metrics_carry_no_gradient(name, signals):
    def figures(student):
        moved = dataclasses.replace(signals, student=student, entropy=-student)
        chosen = settings(name, kl_coefficient=0.1)
        metrics = objective.recipe(name).loss(moved, chosen).metrics
        return sum((v * w).sum() for v, w in metrics.values())

    assert not jax.grad(figures)(signals.student).any()


@pytest.mark.parametrize("name", NAMES)
def test_objectives_trace_and_take_bfloat16(name, signals):
    chosen = settings(name, kl_coefficient=0.1)
    value = total(signals, chosen)
    np.testing.assert_allclose(
        jax.jit(lambda s: total(s, chosen))(signals), value, rtol=1e-5
    )
    halves = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), signals)
    output = objective.recipe(name).loss(halves, chosen)
    exact = objective.recipe(name).loss(
        jax.tree.map(lambda x: x.astype(jnp.float32), halves), chosen
    )
    jax.tree.map(np.testing.assert_array_equal, output, exact)
    assert {x.dtype for x in jax.tree.leaves(output)} == {np.dtype("float32")}


@pytest.mark.parametrize(
    "name, missing", [("skill_sd", "teacher"), ("sdar", "teacher"), ("grpo", "entropy")]
)
def test_a_missing_signal_is_named(name, missing, signals):
    assert missing in objective.recipe(name).required(settings(name))
    without = dataclasses.replace(signals, **{missing: None})
    with pytest.raises(ValueError, match=f"the signal '{missing}', which came as"):
        objective.recipe(name).loss(without, settings(name))


def test_the_reference_is_needed_where_it_has_a_coefficient(signals):
    grpo, pulled = objective.recipe("grpo"), settings("grpo", kl_coefficient=0.1)
    without = dataclasses.replace(signals, reference=None)
    assert "reference" not in grpo.required(settings("grpo"))
    assert grpo.loss(without, settings("grpo")).terms.keys() == {"policy"}
    assert "reference" in grpo.required(pulled)
    with pytest.raises(ValueError, match="needs the signal 'reference'"):
        grpo.loss(without, pulled)


def test_statistics_choose_what_is_counted():
    # Episode 0 has three rows and won, episode 1 has one; episode 2 is alone.
    reward = np.array([1, 1, 1, 0, 5, 9], np.float32)
    group = np.array([0, 0, 0, 0, 1, 0])
    trajectory = np.array([0, 0, 0, 1, 2, -1])
    by_episode = objective.group_advantage(reward, group, trajectory, settings())
    h = 0.5**0.5
    np.testing.assert_allclose(by_episode, [h, h, h, -h, 0, 0], rtol=1e-5)
    by_row = objective.group_advantage(
        reward, group, trajectory, settings(statistics="row", normalize_std=False)
    )
    np.testing.assert_allclose(by_row, [0.25, 0.25, 0.25, -0.75, 5, 0], rtol=1e-5)


def test_a_new_method_is_a_term_and_an_entry(signals):
    def plain_k2(signals, objective_settings):
        loss = distillation.k2(signals.student, signals.teacher)
        return objective.Output({"distillation": loss}, {})

    twice = objective.Recipe("k2, twice", terms=(plain_k2, plain_k2))
    terms = twice.loss(signals, settings()).terms
    expected = (signals.student - signals.teacher) ** 2
    np.testing.assert_allclose(terms["distillation"], expected, rtol=1e-5)


def test_unknown_names_are_refused_with_the_known_ones(signals):
    with pytest.raises(ValueError) as error:
        objective.recipe("ppo")
    lines = str(error.value).splitlines()
    assert "'ppo' is unknown" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:]] == NAMES
    with pytest.raises(ValueError, match="gate='or' is unknown; choose gap, entropy, "):
        total(signals, settings("sdar", gate="or"))
    with pytest.raises(ValueError, match="statistics='all' is unknown; choose traj"):
        objective.group_advantage(
            np.ones(1), np.zeros(1, int), np.zeros(1, int), settings(statistics="all")
        )
