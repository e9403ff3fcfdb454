import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax import config
from skillsd_jax.losses import (
    distillation,
    divergence,
    gates,
    masking,
    mismatch,
    objective,
    policy_gradient,
)
from skillsd_jax.losses.objective import terms, weights

B, R = 6, 4
NAMES = [name for name, recipe in objective.OBJECTIVES.items() if recipe.terms]
DISTILLED = {  # name → coefficient of its distillation
    "skill_sd": "sdl_lambda",
    "sdar": "sdar_coef",
    "grpo_opsd": "sdl_lambda",
    "grpo_opsd_released": "sdar_coef",
}


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
        divergence=-draw(),
        segment=(rng.integers(0, 3, (B, R)) * mask).astype(np.int32),
        turn=np.where(mask > 0, rng.integers(0, 2, (B, R)), -1).astype(np.int32),
        group_success=np.array([0, 0, 0, 0.5, 0.5, 1], np.float32),
        step=np.int32(3),
        stalled=np.int32(0),
        vocabulary=np.int32(50),
        token_count=mask.sum(),
        skilled_count=mask[::2].sum(),
    )


def rows_of(signals, rows):
    """A micro-batch: its rows, and the figures of the whole batch."""
    return jax.tree.map(lambda x: x[rows] if np.ndim(x) else x, signals)


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
    zero = settings(name, **{DISTILLED[name]: 0.0})
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


DISTILLING = [
    (name, estimator)
    for name in NAMES
    for term in objective.recipe(name).terms
    if isinstance(term, terms.Distil)
    for estimator in (terms.ESTIMATORS if term.open else ("",))
]


@pytest.mark.parametrize("name, estimator", DISTILLING)
def test_a_row_without_a_skill_adds_exactly_nothing_to_what_is_distilled(
    name, estimator, signals
):
    """Neither to the value nor to any gradient, whatever the teacher's view says."""
    recipe = objective.recipe(name)
    if name == "sad":  # its teacher reads the plain view: no row is without
        assert recipe.shown == "plain"
        signals = dataclasses.replace(signals, skilled=np.ones(B, np.float32))
    chosen = settings(name, estimator=estimator)
    bare = signals.skilled == 0

    def distilled(student, divergence, entropy, teacher=signals.teacher):
        changed = dataclasses.replace(
            signals,
            student=student,
            divergence=divergence,
            entropy=entropy,
            teacher=teacher,
        )
        return recipe.loss(changed, chosen).terms["distillation"]

    moved = signals.student, signals.divergence, signals.entropy
    value = np.asarray(distilled(*moved))
    assert not value[bare].any() and value[~bare].any()
    other = np.where(bare[:, None], -50.0, signals.teacher).astype(np.float32)
    for teacher in (signals.teacher, other):
        slopes = jax.grad(
            lambda *xs, read=teacher: distilled(*xs, read).sum(), (0, 1, 2)
        )(*moved)
        assert all(not np.asarray(slope)[bare].any() for slope in slopes)
        assert any(np.asarray(slope)[~bare].any() for slope in slopes)
        np.testing.assert_array_equal(distilled(*moved, teacher), value)


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
        part = rows_of(signals, rows)
        each = jax.value_and_grad(loss_of(part, chosen, count))(part.student)
        value, gradients = value + each[0], [*gradients, each[1]]
    np.testing.assert_allclose(value, whole[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        np.concatenate(gradients), whole[1], rtol=1e-5, atol=1e-7
    )


def expected(words, name, sampler, teacher, **changes):
    """Exact expected gradient of a method without rewards: each word is a row."""
    chosen = settings(name, **changes)

    def loss(logits):
        column = jax.nn.log_softmax(logits)[:, None]
        wide = objective.recipe(name).wide(chosen)
        one = None if wide is None else wide(logits, teacher)
        signals = objective.Signals(
            student=column,
            old=sampler[:, None],
            teacher=teacher[:, None],
            entropy=np.zeros((5, 1)),
            divergence=None if one is None else jnp.full((5, 1), one),
            advantage=np.zeros((5, 1)),
            mask=np.ones((5, 1)),
            segment=np.ones((5, 1), int),
            step=np.int32(0),
            token_count=np.float64(5),
            skilled_count=np.float64(5),
        )
        terms = objective.recipe(name).loss(signals, chosen).terms
        return (np.exp(sampler)[:, None] * sum(terms.values())).sum()

    with jax.enable_x64(True):
        return np.asarray(jax.grad(loss)(words.logits))


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize(
    "name, scale", [("skill_sd", 0.1), ("grpo_opsd", 0.1), ("opsd", 1), ("opd", 1)]
)
def test_a_method_of_the_reverse_kl_follows_it(words, name, scale, on_policy):
    sampler = words.student if on_policy else words.old
    gradient = expected(words, name, sampler, words.teacher)
    np.testing.assert_allclose(gradient, scale * words.reverse_kl_gradient(), atol=1e-7)


def test_sad_follows_the_forward_kl(words):
    gradient = expected(words, "sad", words.student, words.teacher)
    np.testing.assert_allclose(gradient, words.forward_kl_gradient(), atol=1e-7)


def test_the_released_grpo_opsd_has_no_signal_in_expectation(words):
    gradient = expected(words, "grpo_opsd_released", words.student, words.teacher)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


@pytest.mark.parametrize("name", ["sdar", "opsd_released"])
def test_for_small_gaps_sdar_follows_the_reverse_kl(words, name):
    teacher = words.log_softmax(words.student + 1e-3 * words.teacher)
    gradient = expected(words, name, words.student, teacher)
    wanted = 0.1 * 5 / 4 * words.reverse_kl_gradient(teacher)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-8)


def test_sdpo_keeps_the_likeliest_words_of_the_student_apart(words):
    two = dataclasses.replace(
        objective.recipe("sdpo"), settings={"topk_select": "student"}
    )
    chosen = settings("sdpo", topk=2, topk_kind="jsd")
    student, teacher = words.logits, words.teacher[::-1]
    wanted = divergence.topk_tail(student, teacher, 2, "jsd", select="student")
    other = divergence.topk_tail(student, teacher, 2, "jsd", select="teacher")
    assert abs(wanted - other) > 1e-3
    np.testing.assert_allclose(two.wide(chosen)(student, teacher), wanted)
    named = objective.recipe("sdpo").wide(settings("sdpo")).keywords
    assert named == {"k": 100, "kind": "jsd", "select": "student"}


# What a name means besides its equation: shown, teacher, data, estimator.
MEANINGS = {
    "grpo": ("", "", "rollouts", None),
    "skill_grpo": ("", "", "rollouts", None),
    "skill_sd": ("skill", "", "rollouts", "iw_k3"),
    "sdar": ("skill", "", "rollouts", "gated"),
    "opsd": ("expert", "frozen", "rollouts", "iw_k3"),
    "grpo_opsd": ("expert", "frozen", "rollouts", "iw_k3"),
    "opsd_released": ("skill", "", "rollouts", "gated"),
    "grpo_opsd_released": ("skill", "", "rollouts", "gated"),
    "opd": ("plain", "external", "rollouts", "k1_reward"),
    "rlsd": ("skill", "", "rollouts", None),
    "sdpo": ("sibling", "ema", "rollouts", "topk_tail"),
    "hdpo": ("rescued", "", "rollouts", "full_jsd"),
    "tcod": ("plain", "external", "rollouts", None),
    "opid": ("skill", "live", "rollouts", None),
    "grsd": ("skill", "live", "rollouts", None),
    "agent_opsd": ("skill", "live", "rollouts", None),
    "gigpo": ("", "", "rollouts", None),
    "sad": ("plain", "external", "expert", "full_forward_kl"),
}
REWARDED = set(NAMES) - {"opsd", "opsd_released", "opd", "sdpo", "tcod", "sad"}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_what_it_means(name):
    recipe = objective.recipe(name)
    distils = [t.estimator for t in recipe.terms if isinstance(t, terms.Distil)]
    found = (recipe.shown, recipe.teacher, recipe.data, *(distils or [None]))
    assert found == MEANINGS[name]
    assert recipe.student_skill == (name == "skill_grpo")
    assert recipe.rewarded == (name in REWARDED)
    assert (terms.policy in recipe.terms) == (name in REWARDED | {"tcod"})


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("skill_sd", {"estimator": "k3"}, "objective.estimator: it has its own"),
        ("grpo_opsd_released", {"gate_beta": 7.0}, "gate_beta: the name means 0.0"),
        ("sdpo", {"loss_agg_mode": "seq-mean-token-sum"}, "per_skilled_token without"),
        ("grpo", {"schedules": "entropy_coefficient=plateau:5"}, "a plateau schedule"),
    ],
)
def test_what_would_have_no_effect_is_named(name, changes, message):
    recipe = objective.recipe(name)
    assert message in recipe.ignored(settings(name, **changes))
    assert recipe.ignored(settings(name)) == ""


def test_a_method_schedules_what_it_reads_and_nothing_else():
    grpo, sdar = objective.recipe("grpo"), objective.recipe("sdar")
    with pytest.raises(ValueError, match="no coefficient 'sdar_coef'; choose action"):
        grpo.scheduled(settings("grpo", schedules="sdar_coef=linear:9"))
    assert {"sdar_coef", "gate_beta", "kl_coefficient"} <= sdar.tunable
    assert "rlsd_mix" in objective.recipe("rlsd").tunable
    assert "turn_mix" in objective.recipe("grsd").tunable


def test_a_scheduled_coefficient_of_zero_stays_off(signals):
    chosen = settings("grpo", schedules="kl_coefficient=linear:9")
    bare = dataclasses.replace(signals, reference=None)
    assert "reference" not in objective.recipe("grpo").required(chosen)
    assert objective.recipe("grpo").loss(bare, chosen).terms.keys() == {"policy"}


@pytest.mark.parametrize("name", ["skill_sd", "sdar", "opsd"])
def test_a_teacher_of_anything_on_rows_without_a_skill_reaches_nothing(name, signals):
    unskilled = signals.skilled[:, None] == 0
    chosen = settings(name, estimator="k3" if name == "opsd" else "")
    clean = jax.value_and_grad(loss_of(signals, chosen))(signals.student)
    for bad in (np.nan, np.inf, -np.inf, 1e4):
        spoilt = np.where(unskilled, bad, signals.teacher).astype(np.float32)
        spoilt = dataclasses.replace(signals, teacher=spoilt)
        found = jax.value_and_grad(loss_of(spoilt, chosen))(signals.student)
        np.testing.assert_array_equal(found[0], clean[0])
        np.testing.assert_array_equal(found[1], clean[1])


@pytest.mark.parametrize("name", NAMES)
def test_only_the_student_is_moved(name, signals):
    chosen = settings(name, kl_coefficient=0.1, gate="soft_or")
    signals = dataclasses.replace(signals, correction=0.5 * signals.mask)
    gradients = jax.grad(total, allow_int=True)(signals, chosen)
    for field in ("old", "correction", "teacher", "reference", "entropy", "advantage"):
        assert not getattr(gradients, field).any(), field
    assert gradients.student.any() or gradients.divergence.any()


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
        taught = s.skilled > 0
        found, _ = output.metrics["gate"]
        np.testing.assert_array_equal(found[taught], wanted[taught])
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


@pytest.mark.parametrize("name", NAMES)
def test_a_correction_weighs_the_policy_gradient_alone(name, signals):
    chosen = settings(name, kl_coefficient=0.1, entropy_coefficient=0.1)
    recipe = objective.recipe(name)
    plain = recipe.loss(signals, chosen)
    weight = np.linspace(0.1, 3, B * R, dtype=np.float32).reshape(B, R)
    weighed = recipe.loss(dataclasses.replace(signals, correction=weight), chosen)
    for key, term in plain.terms.items():
        wanted = weight * term if key == "policy" else term
        np.testing.assert_allclose(weighed.terms[key], wanted, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, weighed.metrics, plain.metrics)


@pytest.mark.parametrize("name", ["grpo", "tcod", "gigpo"])
def test_a_corrected_policy_gradient_is_exact_for_any_sampler(words, name):
    advantage = np.array([1.0, -0.5, 0.3, 2.0, -1.2])

    def loss(logs, correction):
        signals = objective.Signals(
            student=logs[:, None],
            old=words.student[:, None],
            correction=correction,
            advantage=advantage[:, None],
            entropy=np.zeros((5, 1)),
            mask=np.ones((5, 1)),
        )
        return (
            objective.recipe(name).loss(signals, settings(name)).terms["policy"][:, 0]
        )

    # ∇ −Σ p A by the logits: −p (A − Σ p A), whoever sampled.
    p = np.exp(words.student)
    wanted = -p * (advantage - np.sum(p * advantage))

    def found(cap):
        with jax.enable_x64(True):
            weight = mismatch.correction(words.student, words.old, cap)[:, None]
        return words.expected_gradient(lambda logs: loss(logs, weight), words.old)

    highest = np.exp(words.student - words.old).max()
    np.testing.assert_allclose(found(1.01 * highest), wanted, atol=1e-7)
    assert np.abs(found(0.9 * highest) - wanted).max() > 1e-3
    plain = words.expected_gradient(lambda logs: loss(logs, None), words.old)
    assert np.abs(plain - wanted).max() > 0.1


def places(signals):
    """Tokens by segment, and by spans of turns counted from 1."""
    turn = signals.turn + 1
    spans = {"1": (1, 1), "2": (2, 2), "3_4": (3, 4), "5_8": (5, 8), "9_16": (9, 16)}
    spans |= {"17_32": (17, 32), "33_on": (33, 10**6)}
    found = {f"turn_{n}": (turn >= a) & (turn <= b) for n, (a, b) in spans.items()}
    return found | {"reason": signals.segment == 1, "action": signals.segment == 2}


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
    for name, where in places(signals).items():
        inside = skilled & where
        if inside.any():
            own_gap = (signals.teacher - signals.student)[inside]
            expected[f"gap_{name}"] = own_gap.mean()
        else:
            assert np.isnan(figures.pop(f"gap_{name}"))
    assert figures.keys() == expected.keys()
    assert {"gap_reason", "gap_action", "gap_turn_1"} <= expected.keys()
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


def episodes(reward, group, trajectory, length=1, **more):
    """Rows of `length` tokens."""
    shape = (len(reward), length)
    return objective.Episodes(
        reward=np.array(reward, np.float32),
        group=np.array(group),
        trajectory=np.array(trajectory),
        **{
            "success": (np.array(reward) > 0).astype(np.float32),
            "skilled": np.ones(shape[0], np.float32),
            "turn": np.zeros(shape, np.int32),
            "anchor": np.zeros(shape, np.int32),
            "returns": np.zeros(shape, np.float32),
            "mask": np.ones(shape, np.float32) * (np.array(trajectory) >= 0)[:, None],
            "old": np.zeros(shape, np.float32),
            **more,
        },
    )


def test_statistics_choose_what_is_counted():
    # Episode 0 has three rows and won, episode 1 has one; episode 2 is alone.
    played = episodes([1, 1, 1, 0, 5, 9], [0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 2, -1])
    by_episode = objective.recipe("grpo").advantage(played, settings())[:, 0]
    h = 0.5**0.5
    np.testing.assert_allclose(by_episode, [h, h, h, -h, 0, 0], rtol=1e-5)
    chosen = settings(statistics="row", normalize_std=False)
    by_row = objective.recipe("grpo").advantage(played, chosen)[:, 0]
    np.testing.assert_allclose(by_row, [0.25, 0.25, 0.25, -0.75, 5, 0], rtol=1e-5)


def test_credits_count_on_skilled_rows_alone():
    # Two episodes of two tokens, the second without a skill.
    gap = np.array([[0.1, -0.3], [0.5, 0.5]], np.float32)
    old = np.full((2, 2), -0.7, np.float32)
    played = episodes(
        [1, 0],
        [0, 0],
        [0, 1],
        2,
        skilled=np.array([1.0, 0]),
        old=old,
        teacher=old + gap,
        step=8,
    )
    plain = objective.recipe("grpo").advantage(played, settings())
    h = 0.5**0.5
    expected = {
        # l = ½ (1 − 8/100): A [(1 − l) + l clip(e^Δ, 0.8, 1.2)]
        "rlsd": h * (1 - 0.46 + 0.46 * np.array([np.exp(0.1), 0.8])),
        "opid": h + 0.001 * gap[0],
        # δ = −0.1, e / |e| = −1, held at −0.2; the row without a skill does not count.
        "grsd": h * (1 + 0.5 * -0.2) * np.ones(2),
        # One turn: it has nothing to be compared with.
        "agent_opsd": h * np.ones(2),
    }
    for name, wanted in expected.items():
        shaped = objective.recipe(name).advantage(played, settings(name))
        np.testing.assert_allclose(shaped[0], wanted, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(shaped[1], plain[1], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_no_credit_depends_on_a_teacher_of_rows_without_a_skill(name):
    rng = np.random.default_rng(0)
    skilled = np.array([1, 0, 1, 0], np.float32)
    teacher = rng.normal(size=(4, 3)).astype(np.float32)
    found = []
    for bare in (0.0, 5.0, -50.0):
        read = np.where(skilled[:, None] > 0, teacher, np.float32(bare))
        more = {"teacher": read, "skilled": skilled, "step": np.int32(2)}
        played = episodes([1, 0, 1, 0], [0] * 4, [0, 1, 2, 3], 3, **more)
        found.append(objective.recipe(name).advantage(played, settings(name)))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_agent_opsd_weighs_turns_by_how_they_move_the_belief():
    # Two episodes of two turns; the first turn of each raises the belief, the second
    # leaves it: ΔB standardised is 1 and −1, and 1 ± 0.2 in the won one, 1 ∓ 0.2 in
    # the lost one, of which half counts.
    gap, turn = np.array([[0.8], [0], [0.8], [0]]), np.array([[0], [1], [0], [1]])
    played = episodes([1, 1, 0, 0], [0] * 4, [0, 0, 1, 1], turn=turn, teacher=gap)
    value = objective.recipe("agent_opsd").advantage(played, settings("agent_opsd"))
    h = 0.5**0.5
    wanted = [1.1 * h, 0.9 * h, -0.9 * h, -1.1 * h]
    np.testing.assert_allclose(value[:, 0], wanted, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_an_advantage_is_detached_and_zero_outside_the_mask(name):
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], np.float32)
    played = episodes(
        [1, 0, 1, 0],
        [0, 0, 0, 0],
        [0, 1, 2, -1],
        3,
        mask=mask,
        teacher=rng.normal(size=(4, 3)).astype(np.float32),
        returns=rng.random((4, 3)).astype(np.float32),
        step=np.int32(2),
    )
    value = np.asarray(objective.recipe(name).advantage(played, settings(name)))
    np.testing.assert_array_equal(value[mask == 0], 0)
    np.testing.assert_array_equal(np.asarray(played.gap)[mask == 0], 0)
    assert np.isfinite(value).all()

    def summed(teacher, old):
        changed = dataclasses.replace(played, teacher=teacher, old=old)
        return objective.recipe(name).advantage(changed, settings(name)).sum()

    for slope in jax.grad(summed, (0, 1))(played.teacher, played.old):
        assert not slope.any()


def test_a_recipe_has_one_vocabulary_wide_divergence_at_most():
    grpo = objective.recipe("grpo")
    names = "full_jsd", "full_reverse_kl"
    many = dataclasses.replace(grpo, terms=[terms.Distil(n, 1.0) for n in names])
    with pytest.raises(ValueError, match="one vocabulary-wide estimator at most"):
        many.wide(settings("grpo"))


def test_hdpo_means_the_symmetric_jsd_whatever_is_set():
    student, teacher = np.random.default_rng(0).normal(size=(2, 7))
    wide = objective.recipe("hdpo").wide(settings("hdpo", jsd_alpha=0.2))
    wanted = divergence.jsd(student, teacher, 0.5)
    np.testing.assert_allclose(wide(student, teacher), wanted, rtol=1e-6)


def test_the_window_of_tcod_grows_by_a_turn():
    gap = np.array([[0.1, -0.3, 0.5]], np.float32)
    for step, wanted in ((0, [0.1, 0, 0]), (5, [0.1, -0.3, 0]), (99, gap[0])):
        played = episodes(
            [1], [0], [0], 3, turn=np.array([[0, 1, 2]]), teacher=gap, step=step
        )
        value = objective.recipe("tcod").advantage(played, settings("tcod"))
        np.testing.assert_allclose(value[0], wanted, rtol=1e-6)


def test_grsd_leaves_groups_of_one_ending_alone():
    played = episodes([1, 1], [0, 0], [0, 1], teacher=np.array([[0.4], [0.1]]))
    won = episodes([2, 1], [0, 0], [0, 1], teacher=np.array([[0.4], [0.1]]))
    for each in (played, won):
        shaped = objective.recipe("grsd").advantage(each, settings("grsd"))
        plain = objective.recipe("grpo").advantage(each, settings())
        np.testing.assert_array_equal(shaped, plain)


def test_gigpo_adds_what_a_turn_did_better_from_the_same_screen():
    # Two episodes of two turns from one screen (7); the first won. G = ½, 1 and 0, 0.
    turn, anchor = np.array([[0], [1], [0], [1]]), np.array([[7], [8], [7], [9]])
    returns = np.array([[0.5], [1], [0], [0]])
    played = episodes(
        [1, 1, 0, 0], [0] * 4, [0, 0, 1, 1], turn=turn, anchor=anchor, returns=returns
    )
    chosen = settings("gigpo", normalize_std=False, step_weight=2.0)
    value = objective.recipe("gigpo").advantage(played, chosen)[:, 0]
    # A_S at screen 7: ½ − ¼ and 0 − ¼; screens 8 and 9 were met once: 0.
    np.testing.assert_allclose(value, [0.5 + 0.5, 0.5, -0.5 - 0.5, -0.5], rtol=1e-6)


@pytest.mark.parametrize(
    "name", [n for n, r in objective.OBJECTIVES.items() if r.credits]
)
def test_a_credit_without_a_teacher_is_refused(name):
    with pytest.raises(ValueError, match="needs the teacher's log-probs, which came"):
        objective.recipe(name).advantage(
            episodes([1], [0], [0], step=0), settings(name)
        )


def test_a_group_is_solved_by_its_episodes_not_by_its_rows():
    played = episodes([1, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 2, -1])
    share = played.mean_of_group(played.success)[:, 0]
    np.testing.assert_allclose(share[:5], [0.5, 0.5, 0.5, 0.5, 0], rtol=1e-6)


def test_segments_weigh_every_term_or_the_distillation_alone(signals):
    plain = objective.recipe("skill_sd").loss(signals, settings()).terms
    by = np.select([signals.segment == 1, signals.segment == 2], [2.0, 3.0], 1.0)
    every = settings(reason_weight=2.0, action_weight=3.0)
    for name, term in objective.recipe("skill_sd").loss(signals, every).terms.items():
        np.testing.assert_allclose(term, by * plain[name], rtol=1e-6)
    distilled = settings(distill_reason_weight=2.0, distill_action_weight=3.0)
    found = objective.recipe("skill_sd").loss(signals, distilled).terms
    np.testing.assert_array_equal(found["policy"], plain["policy"])
    np.testing.assert_allclose(
        found["distillation"], by * plain["distillation"], rtol=1e-6
    )


def test_sad_counts_reasoning_and_action_alone(signals):
    chosen = settings("sad", distill_reason_weight=2.0, distill_action_weight=0.5)
    found = objective.recipe("sad").loss(signals, chosen).terms
    weight = np.select([signals.segment == 1, signals.segment == 2], [2.0, 0.5], 0.0)
    assert found.keys() == {"distillation"}
    np.testing.assert_allclose(found["distillation"], weight * signals.divergence)


def test_sdpo_cuts_the_importance_weight_at_two(signals):
    old = signals.student - np.linspace(-2, 2, B * R, dtype=np.float32).reshape(B, R)
    signals = dataclasses.replace(signals, old=old * signals.mask)
    found = objective.recipe("sdpo").loss(signals, settings("sdpo")).terms
    rho = np.minimum(np.exp(signals.student - signals.old), 2.0)
    share = signals.token_count / signals.skilled_count
    wanted = share * signals.skilled[:, None] * rho * signals.divergence * signals.mask
    np.testing.assert_allclose(found["distillation"], wanted, rtol=1e-5)
    skilled = (signals.skilled[:, None] * signals.mask) > 0
    assert (np.exp(signals.student - signals.old)[skilled] > 2.1).any()


def test_weights_of_failed_groups_and_of_missing_signals(signals):
    failed = weights.on_failed_groups(signals, settings())
    np.testing.assert_array_equal(failed[:, 0], [1, 1, 1, 0, 0, 0])
    bare = dataclasses.replace(signals, segment=None)
    np.testing.assert_array_equal(weights.by_segment(bare, 2.0, 3.0), [[1]])


def test_the_sequence_ratio_is_one_figure_a_row(signals):
    chosen = settings("grpo", ratio="sequence", clip_low=0.05, clip_high=0.05)
    found = objective.recipe("grpo").loss(signals, chosen).terms["policy"]
    log_ratio = policy_gradient.sequence_log_ratio(
        signals.student, signals.old, signals.mask
    )[:, None]
    wanted = policy_gradient.clipped_surrogate(
        log_ratio, 0.0, signals.advantage, 0.05, 0.05, 3.0
    )
    np.testing.assert_allclose(found, wanted * signals.mask, rtol=1e-5)


def test_schedules_change_coefficients_and_are_logged(signals):
    chosen = settings(
        "sdar",
        schedules="sdar_coef=linear:4,gate_beta=growing:6,entropy_coefficient=constant",
    )
    output = objective.recipe("sdar").loss(signals, chosen)
    now = settings("sdar", sdar_coef=0.1 / 4, gate_beta=2.5)
    wanted = objective.recipe("sdar").loss(signals, now)
    np.testing.assert_allclose(
        output.terms["distillation"], wanted.terms["distillation"], rtol=1e-6
    )
    for name, value in (("sdar_coef", 0.025), ("gate_beta", 2.5)):
        logged, weight = output.metrics[f"coefficient_{name}"]
        np.testing.assert_allclose(logged, value, rtol=1e-6)
        np.testing.assert_array_equal(weight, signals.mask)


def test_a_retired_coefficient_is_zero(signals):
    chosen = settings("sdar", schedules="sdar_coef=plateau:3")
    for stalled, zero in ((2, False), (3, True)):
        now = dataclasses.replace(signals, stalled=np.int32(stalled))
        found = objective.recipe("sdar").loss(now, chosen).terms["distillation"]
        assert bool((found == 0).all()) == zero


def test_what_a_name_means_cannot_be_set_otherwise(signals):
    name = "grpo_opsd_released"
    metrics = (
        objective.recipe(name).loss(signals, settings(name, gate_beta=7.0)).metrics
    )
    np.testing.assert_array_equal(metrics["gate"][0], 0.5)


@pytest.mark.parametrize("estimator", terms.ESTIMATORS)
def test_an_open_method_takes_any_estimator(estimator, signals):
    chosen = settings("opsd", estimator=estimator)
    recipe = objective.recipe("opsd")
    assert ("divergence" in recipe.required(chosen)) == (estimator in terms.WIDE)
    found = recipe.loss(signals, chosen).terms["distillation"]
    assert found[0].all() and not found[1].any()


def test_the_entropy_of_a_gate_may_be_divided_by_log_v(signals):
    chosen = settings("sdar", gate="entropy", gate_entropy="normalised", gate_beta=2.0)
    gate, _ = objective.recipe("sdar").loss(signals, chosen).metrics["gate"]
    wanted = gates.entropy_gate(signals.entropy / np.log(50), 2.0)
    np.testing.assert_allclose(gate, wanted, rtol=1e-6)


def test_distillation_may_be_divided_by_skilled_tokens(signals):
    chosen = settings(per_skilled_token=True, loss_agg_mode="token-mean")
    found = objective.recipe("skill_sd").loss(signals, chosen).terms["distillation"]
    values = distillation.weighted_reverse_kl(
        signals.student, signals.teacher, signals.old, 10.0, 20.0
    )
    only = signals.mask * signals.skilled[:, None]
    np.testing.assert_allclose(
        masking.token_mean(found, signals.mask),
        0.1 * masking.token_mean(values, only),
        rtol=1e-5,
    )


@pytest.mark.parametrize("count", [0, 1])
def test_few_skilled_tokens_are_divided_by_their_count(signals, count):
    mask = np.zeros((B, R), np.float32)
    mask[4, :2] = 1  # of a skilled row
    few = dataclasses.replace(
        signals,
        mask=mask,
        skilled=np.float32(np.arange(B) == 4) * count,
        token_count=mask.sum(),
        skilled_count=np.float32(count),
    )
    chosen = settings(per_skilled_token=True)
    found = objective.recipe("skill_sd").loss(few, chosen).terms["distillation"]
    value = distillation.weighted_reverse_kl(
        few.student, few.teacher, few.old, 10.0, 20.0
    )
    np.testing.assert_allclose(found, 0.1 * 2 * count * value * mask, rtol=1e-5)


def test_the_entropy_bonus_is_off_unless_it_is_set(signals):
    off = objective.recipe("grpo").loss(signals, settings("grpo")).terms
    chosen = settings("grpo", entropy_coefficient=0.1)
    on = objective.recipe("grpo").loss(signals, chosen).terms
    assert "entropy_bonus" not in off
    np.testing.assert_allclose(on["entropy_bonus"], -0.1 * signals.entropy, rtol=1e-6)


def test_a_row_without_a_skill_has_the_student_for_its_teacher_detached(signals):
    def teacher(student):
        return dataclasses.replace(signals, student=student).inside().teacher

    plain = signals.skilled == 0
    np.testing.assert_array_equal(
        teacher(signals.student)[plain], signals.student[plain]
    )
    assert not jax.grad(lambda s: teacher(s).sum())(signals.student).any()


def test_what_a_term_says_outside_the_mask_is_dropped(signals):
    recipe = objective.Recipe(
        "all ones", "ours", (lambda s, o: terms.Output({"one": 1.0 + 0 * s.mask}, {}),)
    )
    found = recipe.loss(signals, settings("grpo")).terms["one"]
    np.testing.assert_array_equal(found, signals.mask)


def test_a_new_method_is_a_term_and_an_entry(signals):
    def plain_k2(signals, objective_settings):
        loss = distillation.k2(signals.student, signals.teacher)
        return objective.Output({"distillation": loss}, {})

    twice = objective.Recipe("k2, twice", source="ours", terms=(plain_k2, plain_k2))
    terms = twice.loss(signals, settings()).terms
    expected = (signals.student - signals.teacher) ** 2 * signals.skilled[:, None]
    np.testing.assert_allclose(terms["distillation"], expected, rtol=1e-5)


def test_unknown_names_are_refused_with_the_known_ones(signals):
    with pytest.raises(ValueError) as error:
        objective.recipe("ppo")
    lines = str(error.value).splitlines()
    assert "'ppo' is unknown" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == list(objective.OBJECTIVES)
    with pytest.raises(ValueError, match="gate='or' is unknown; choose gap, entropy, "):
        total(signals, settings("sdar", gate="or"))
    with pytest.raises(ValueError, match="statistics='all' is unknown; choose traj"):
        objective.recipe("grpo").advantage(
            episodes([1], [0], [0]), settings(statistics="all")
        )
    with pytest.raises(ValueError, match="estimator='k9' is unknown; choose k1, "):
        objective.recipe("opd").required(settings("opd", estimator="k9"))


def test_rollouts_are_hinted_by_the_methods_that_say_so():
    hinted = {name for name in NAMES if objective.recipe(name).hinted}
    assert hinted == {"skill_grpo", "hdpo"}


def test_prompting_with_skills_alone_learns_nothing():
    recipe = objective.recipe("skill_prompt")
    assert recipe.student_skill and not recipe.terms and not recipe.rewarded
