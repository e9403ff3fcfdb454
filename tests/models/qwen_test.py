"""The decoder against a plain numpy one, its cache, and Hugging Face where it is."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax.models import huggingface, kv_cache, lora, qwen, rope

QWEN3 = qwen.ModelConfig(
    vocab=37,
    width=24,
    layers=3,
    heads=6,
    kv_heads=2,
    head_size=8,
    hidden=40,
    rope_theta=5_000.0,
    norm_eps=1e-5,
)
QWEN2 = dataclasses.replace(
    QWEN3, qkv_bias=True, qk_norm=False, tie_embeddings=False, kv_heads=6
)
# Texts of the tests are longer than the window and than the first training.
WINDOWED = dataclasses.replace(QWEN3, window=4, window_layers=(0, 2))
LINEAR = dataclasses.replace(QWEN3, scaling=rope.Scaling("linear", 3.0))
YARN = dataclasses.replace(QWEN2, scaling=rope.Scaling("yarn", 4.0, 8, 4.0, 1.0))
CONFIGS = {
    "qwen3": QWEN3,
    "qwen2": QWEN2,
    "windowed": WINDOWED,
    "linear": LINEAR,
    "yarn": YARN,
}

apply = jax.jit(qwen.apply, static_argnums=0)
hidden = jax.jit(qwen.hidden, static_argnums=0)
extend = jax.jit(qwen.extend, static_argnums=0)


@functools.cache
def make(config):
    """Parameters with every norm away from 1 and every bias away from 0."""
    leaves, tree = jax.tree.flatten(qwen.init(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    leaves = [leaf + 0.1 * rng.standard_normal(leaf.shape) for leaf in leaves]
    return jax.tree.unflatten(tree, [leaf.astype(jnp.float32) for leaf in leaves])


def some_tokens(config, rows, length, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, config.vocab, (rows, length)).astype(np.int32)


def frequency(config, i):
    """Radians per position of pair i; the bounds of YaRN's pairs found by search."""
    plain = config.rope_theta ** (-2 * i / config.head_size)
    scaling = config.scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor

    def pair(turns):  # θ^(−2x/E) · length = 2π · turns
        wanted = 2 * np.pi * turns / scaling.original_length
        return -np.log(wanted) / np.log(config.rope_theta) * config.head_size / 2

    low = max(np.floor(pair(scaling.beta_fast)), 0)
    high = min(np.ceil(pair(scaling.beta_slow)), config.head_size - 1)
    slowed = np.clip((i - low) / (high - low), 0, 1)
    return plain / scaling.factor * slowed + plain * (1 - slowed)


def plain_logits(config, params, ids):
    """One row, in float64, loops where the module has einsums."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * scale

    def rotate(x):  # [L, E]
        half = config.head_size // 2
        out = np.empty_like(x)
        for t in range(len(x)):
            for i in range(half):
                angle = t * frequency(config, i)
                a, b = x[t, i], x[t, i + half]
                out[t, i] = a * np.cos(angle) - b * np.sin(angle)
                out[t, i + half] = b * np.cos(angle) + a * np.sin(angle)
        yarn = config.scaling is not None and config.scaling.kind == "yarn"
        return out * (0.1 * np.log(config.scaling.factor) + 1 if yarn else 1)

    x = p["embed"][ids]
    for n in range(config.layers):
        w = jax.tree.map(operator.itemgetter(n), p["layers"])
        h, a = norm(x, w["attention_norm"]["scale"]), w["attention"]
        q, k, v = (
            h @ a[name]["kernel"] + a[name].get("bias", 0)
            for name in ("query", "key", "value")
        )
        mixed = []
        for head in range(config.heads):
            shared = head // (config.heads // config.kv_heads)
            size = config.head_size
            qh = q[:, head * size : (head + 1) * size]
            kh, vh = (z[:, shared * size : (shared + 1) * size] for z in (k, v))
            if config.qk_norm:
                qh = norm(qh, a["query_norm"]["scale"])
                kh = norm(kh, a["key_norm"]["scale"])
            qh, kh = rotate(qh), rotate(kh)
            for t in range(len(ids)):
                slides = n in (config.window_layers or ())
                near = slice(max(0, t + 1 - config.window) if slides else 0, t + 1)
                score = np.exp(kh[near] @ qh[t] / np.sqrt(size))
                mixed.append((t, head, score @ vh[near] / score.sum()))
        out = np.zeros((len(ids), config.heads, config.head_size))
        for t, head, value in mixed:
            out[t, head] = value
        x = x + out.reshape(len(ids), -1) @ a["output"]["kernel"]
        h, m = norm(x, w["mlp_norm"]["scale"]), w["mlp"]
        gate = h @ m["gate"]["kernel"]
        gated = gate / (1 + np.exp(-gate)) * (h @ m["up"]["kernel"])
        x = x + gated @ m["down"]["kernel"]
    head = p["embed"] if config.tie_embeddings else p["head"]
    return norm(x, p["norm"]) @ head.T


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_a_plain_implementation(config):
    params, tokens = make(config), some_tokens(config, 2, 11)
    logits = apply(config, params, tokens)
    for row, ids in zip(logits, tokens):
        expected = plain_logits(config, params, ids)
        np.testing.assert_allclose(row, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["Qwen3", "Qwen2"])
def test_logits_equal_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    config = QWEN3 if name == "Qwen3" else QWEN2
    params, tokens = make(config), some_tokens(config, 3, 17)
    huggingface.save(tmp_path, config, params)
    model = getattr(transformers, f"{name}ForCausalLM").from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    logits = apply(config, params, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_ragged_extension_equals_one_forward(config, turned):
    params, rows, total = make(config), 4, 20
    tokens = some_tokens(config, rows, total)
    rng = np.random.default_rng(1)
    cache = kv_cache.empty(config, rows, kv_cache.MANY if turned else total)
    assert cache.turned == turned
    done = np.zeros(rows, int)
    seen = np.zeros((rows, total, config.width))
    for width in (6, 1, 5, 4, 6, 6, 6):
        length = np.minimum(rng.integers(0, width + 1, rows), total - done)
        new = np.full((rows, width), 3, np.int32)  # whatever stands behind: not read
        for b in range(rows):
            new[b, : length[b]] = tokens[b, done[b] : done[b] + length[b]]
        states, cache = extend(config, params, cache, new, length.astype(np.int32))
        for b in range(rows):
            seen[b, done[b] : done[b] + length[b]] = states[b, : length[b]]
        done += length
        np.testing.assert_array_equal(cache.length, done)
    assert done.min() >= 15 and len(set(done)) > 1
    expected = np.asarray(hidden(config, params, tokens))
    for b in range(rows):
        np.testing.assert_allclose(
            seen[b, : done[b]], expected[b, : done[b]], atol=1e-4
        )


def test_no_token_sees_a_later_one():
    params, tokens = make(QWEN3), some_tokens(QWEN3, 2, 12)
    changed = tokens.copy()
    changed[:, 7:] = (changed[:, 7:] + 1) % QWEN3.vocab
    before, after = (apply(QWEN3, params, t) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 1e-3


@pytest.mark.parametrize("config", [QWEN3, QWEN2], ids=["qwen3", "qwen2"])
def test_gradient_equals_differences(config):
    """The hand-written gradients of matmul and attention, along a random direction.

    Float32 central differences of a loss of order 1 are good to about 1e-3 here.
    """
    params, tokens = make(config), some_tokens(config, 3, 9)
    rng = np.random.default_rng(3)
    target = rng.standard_normal((3, 9, config.width)).astype(np.float32)

    @jax.jit
    def loss(params):
        return jnp.mean(hidden(config, params, tokens) * target)

    gradient = jax.jit(jax.grad(loss))(params)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    for index, (path, slope) in enumerate(leaves):
        if path[0].key == "head":  # not part of the hidden states
            continue
        way = rng.standard_normal(slope.shape)
        way = (way / np.linalg.norm(way)).astype(np.float32)

        def moved(step, index=index, way=way):
            flat, tree = jax.tree.flatten(params)
            flat[index] = flat[index] + step * way
            return loss(jax.tree.unflatten(tree, flat))

        difference = (moved(1e-2) - moved(-1e-2)) / 2e-2
        exact = jnp.sum(slope * way)
        np.testing.assert_allclose(exact, difference, atol=2e-4, err_msg=str(path))
        assert np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_rubbish_behind_a_row_has_no_gradient():
    params, tokens = make(QWEN3), some_tokens(QWEN3, 1, 8)

    def loss(embed):
        states = hidden(QWEN3, {**params, "embed": embed}, tokens)
        return jnp.sum(states[:, :4] ** 2)

    slope = jax.jit(jax.grad(loss))(params["embed"])
    later = set(tokens[0, 4:].tolist()) - set(tokens[0, :4].tolist())
    assert later and all((slope[token] == 0).all() for token in later)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_ends():
    config = dataclasses.replace(QWEN3, dtype="bfloat16")
    params, tokens = make(config), some_tokens(config, 2, 10)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    states = hidden(config, params, tokens)
    assert states.dtype == jnp.bfloat16
    assert kv_cache.empty(config, 2, 4).keys[0].dtype == jnp.bfloat16
    logits = qwen.head(config, params, states)
    assert logits.dtype == jnp.float32
    exact = apply(QWEN3, params, tokens)
    assert 1e-4 < np.abs(logits - exact).max() < 0.15 * np.abs(exact).max()
    slope = jax.jit(jax.grad(lambda p: hidden(config, p, tokens).sum()))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(slope)} == {jnp.dtype("float32")}


def test_layers_are_stacked_and_start_different():
    params = qwen.init(QWEN3, jax.random.key(0))
    for leaf in jax.tree.leaves(params["layers"]):
        assert leaf.shape[0] == QWEN3.layers
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).min() > 0
    assert "head" not in params and "head" in qwen.init(QWEN2, jax.random.key(0))


@pytest.mark.parametrize("remat", ["nothing", "everything"])
def test_what_is_kept_of_a_layer_changes_no_gradient(remat):
    params, tokens = make(QWEN3), some_tokens(QWEN3, 2, 9)

    def slope(config):
        def loss(params):
            return jnp.sum(hidden(config, params, tokens) ** 3)

        return jax.jit(jax.grad(loss))(params)

    wanted, found = slope(QWEN3), slope(dataclasses.replace(QWEN3, remat=remat))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_attention_of_another_name_says_the_same():
    params, tokens = make(WINDOWED), some_tokens(WINDOWED, 2, 12)
    other = dataclasses.replace(WINDOWED, attention="xla")
    wanted = apply(WINDOWED, params, tokens)
    np.testing.assert_allclose(apply(other, params, tokens), wanted, atol=1e-4)


def test_an_adapter_adds_its_scaled_product_where_its_name_matches():
    adapted = lora.Lora(rank=2, alpha=6.0, targets="query|mlp/down")
    config = dataclasses.replace(QWEN3, lora=adapted)
    fresh, tokens = qwen.init(config, jax.random.key(0)), some_tokens(config, 2, 7)
    base = qwen.init(QWEN3, jax.random.key(0))
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(fresh)
        if path[-1].key.startswith("lora")
    ]
    assert {name.rpartition("/")[0] for name in names} == {
        "layers/attention/query",
        "layers/mlp/down",
    }
    params = make(config)  # no adapter is zero
    merged = jax.tree.map(lambda leaf: leaf, params)
    for part, name in (("attention", "query"), ("mlp", "down")):
        leaf = merged["layers"][part][name]
        update = 3.0 * (leaf.pop("lora_down") @ leaf.pop("lora_up"))
        leaf["kernel"] = leaf["kernel"] + update
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    wanted = apply(QWEN3, merged, tokens)
    np.testing.assert_allclose(apply(config, params, tokens), wanted, atol=1e-4)


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="window=4 and window_layers=None go"):
        dataclasses.replace(QWEN3, window=4)
    with pytest.raises(ValueError, match="type 'longrope' is not known"):
        rope.Scaling("longrope", 2.0)
    with pytest.raises(ValueError, match="original_length=0"):
        rope.Scaling("yarn", 2.0)
    with pytest.raises(ValueError, match="factor=0.5"):
        rope.Scaling("linear", 0.5)
    with pytest.raises(ValueError, match="kv_heads=4 must divide heads=6"):
        dataclasses.replace(QWEN3, kv_heads=4)
    with pytest.raises(ValueError, match="head_size=7"):
        dataclasses.replace(QWEN3, head_size=7)


def test_keys_are_turned_for_many_slots_on_a_cpu_alone(monkeypatch):
    many = kv_cache.MANY
    assert [kv_cache.empty(QWEN3, 2, n).turned for n in (many - 1, many)] == [0, 1]
    grown = kv_cache.grow(kv_cache.empty(QWEN3, 2, many), many + 7)
    assert grown.turned and grown.slots == grown.keys[0].shape[3] == many + 7
    late = kv_cache.grow(kv_cache.empty(QWEN3, 2, many - 1), many)
    assert not late.turned and late.keys[0].shape == late.values[0].shape
    monkeypatch.setattr(kv_cache.jax, "default_backend", lambda: "gpu")
    assert not kv_cache.empty(QWEN3, 2, many).turned


def test_gathered_rows_continue_as_themselves():
    params, tokens = make(QWEN3), some_tokens(QWEN3, 3, 6)
    length = np.array([6, 4, 5], np.int32)
    cache = kv_cache.empty(QWEN3, 3, 8)
    _, cache = extend(QWEN3, params, cache, tokens, length)
    more = some_tokens(QWEN3, 3, 1, seed=2)
    one = np.ones(3, np.int32)
    states, _ = extend(QWEN3, params, cache, more, one)
    index = np.array([2, 2, 0, 1])
    picked = jax.tree.map(lambda x: x[index], cache)
    again, _ = extend(QWEN3, params, picked, more[index], np.ones(4, np.int32))
    np.testing.assert_allclose(again, states[index], atol=1e-5)
