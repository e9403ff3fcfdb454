"""Folders written by hand, read back; and what is refused."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from skillsd_jax.models import huggingface, qwen, tensor_files, tokenizer
from skillsd_jax.models.lora import Lora
from skillsd_jax.models.rope import Scaling
from tests.models import folders

QWEN3 = qwen.ModelConfig(
    vocab=19,
    width=8,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=6,
    hidden=10,
    rope_theta=5e6,
    norm_eps=1e-5,
)
QWEN2 = dataclasses.replace(QWEN3, qkv_bias=True, qk_norm=False, tie_embeddings=False)


def written(folder, config, **changes):
    """A folder as transformers 4 writes it, by hand; returns its tensors."""
    rng = np.random.default_rng(0)
    heads, keys = config.heads * config.head_size, config.kv_heads * config.head_size
    shapes = {
        "model.embed_tokens.weight": (config.vocab, config.width),
        "model.norm.weight": (config.width,),
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab, config.width)
    for n in range(config.layers):
        layer = {
            "input_layernorm.weight": (config.width,),
            "post_attention_layernorm.weight": (config.width,),
            "self_attn.q_proj.weight": (heads, config.width),
            "self_attn.k_proj.weight": (keys, config.width),
            "self_attn.v_proj.weight": (keys, config.width),
            "self_attn.o_proj.weight": (config.width, heads),
            "mlp.gate_proj.weight": (config.hidden, config.width),
            "mlp.up_proj.weight": (config.hidden, config.width),
            "mlp.down_proj.weight": (config.width, config.hidden),
        }
        if config.qk_norm:
            layer["self_attn.q_norm.weight"] = (config.head_size,)
            layer["self_attn.k_norm.weight"] = (config.head_size,)
        if config.qkv_bias:
            layer["self_attn.q_proj.bias"] = (heads,)
            layer["self_attn.k_proj.bias"] = (keys,)
            layer["self_attn.v_proj.bias"] = (keys,)
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    kind = "Qwen3" if config.qk_norm else "Qwen2"
    text = {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.hidden,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
    } | changes
    (folder / "config.json").write_text(json.dumps(text))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return tensors


def same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("config", [QWEN3, QWEN2], ids=["qwen3", "qwen2"])
def test_every_tensor_lands_in_its_place(config, tmp_path):
    tensors = written(tmp_path, config)
    read, params = huggingface.load(tmp_path)
    assert read == config
    fresh = qwen.init(config, jax.random.key(0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, fresh)
    np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"])
    layer = params["layers"]
    for n in range(config.layers):
        of = {k.removeprefix(f"model.layers.{n}."): v for k, v in tensors.items()}
        for ours, theirs in {
            "query": "q_proj",
            "key": "k_proj",
            "value": "v_proj",
            "output": "o_proj",
        }.items():
            kernel = layer["attention"][ours]["kernel"][n]
            np.testing.assert_array_equal(kernel, of[f"self_attn.{theirs}.weight"].T)
        for name in ("gate", "up", "down"):
            kernel = layer["mlp"][name]["kernel"][n]
            np.testing.assert_array_equal(kernel, of[f"mlp.{name}_proj.weight"].T)
        scale = layer["mlp_norm"]["scale"][n]
        np.testing.assert_array_equal(scale, of["post_attention_layernorm.weight"])
        if config.qkv_bias:
            bias = layer["attention"]["key"]["bias"][n]
            np.testing.assert_array_equal(bias, of["self_attn.k_proj.bias"])
        else:
            scale = layer["attention"]["query_norm"]["scale"][n]
            np.testing.assert_array_equal(scale, of["self_attn.q_norm.weight"])


@pytest.mark.parametrize("config", [QWEN3, QWEN2], ids=["qwen3", "qwen2"])
def test_what_is_saved_is_what_was_loaded(config, tmp_path):
    tensors = written(tmp_path, config)
    read, params = huggingface.load(tmp_path)
    out = tmp_path / "out"
    huggingface.save(out, read, params)
    back = safetensors.numpy.load_file(out / "model.safetensors")
    assert back.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(back[name], tensors[name])
    again, params_again = huggingface.load(out)
    assert again == config
    same(params, params_again)


def test_transformers_reads_the_same_shape(tmp_path):
    transformers = pytest.importorskip("transformers")
    huggingface.save(tmp_path, QWEN3, qwen.init(QWEN3, jax.random.key(0)))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["rope_theta"] == QWEN3.rope_theta
    assert config.head_dim == QWEN3.head_size
    assert config.tie_word_embeddings is True


def test_rope_theta_is_read_from_both_styles(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 123.0}
    written(tmp_path, QWEN3, rope_parameters=rope, rope_theta=None)
    assert huggingface.load(tmp_path)[0].rope_theta == 123.0
    written(tmp_path, QWEN3, rope_theta=77.0)
    assert huggingface.load(tmp_path)[0].rope_theta == 77.0


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_sharded_half_precision_is_read_as_it_is_and_as_float32(dtype, tmp_path):
    tensors = written(tmp_path, QWEN3)
    (tmp_path / "model.safetensors").unlink()
    half = {name: array.astype(dtype) for name, array in tensors.items()}
    names = sorted(half)
    where = {}
    for shard, part in enumerate((names[::2], names[1::2])):
        file = f"model-{shard + 1:05}-of-00002.safetensors"
        safetensors.numpy.save_file({n: half[n] for n in part}, tmp_path / file)
        where |= dict.fromkeys(part, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    config, kept = huggingface.load(tmp_path)
    assert config.dtype == "float32"
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {np.dtype(dtype)}
    np.testing.assert_array_equal(kept["embed"], half["model.embed_tokens.weight"])
    _, params = huggingface.load(tmp_path, dtype="float32")
    expected = half["model.embed_tokens.weight"].astype(np.float32)
    assert params["embed"].dtype == np.float32
    np.testing.assert_array_equal(params["embed"], expected)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        huggingface.load(tmp_path)


def test_a_tied_head_is_left_out_unless_it_is_another(monkeypatch, tmp_path):
    """Compared two rows at a time, so that its last row counts."""
    monkeypatch.setattr(huggingface, "_COMPARED_ROWS", 2)
    tensors = written(tmp_path, QWEN3)
    head = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"] = head
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    config, params = huggingface.load(tmp_path)
    assert config.tie_embeddings and "head" not in params
    head[-1, -1] += 1
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"ties lm_head.weight to .*another lm_head"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"architectures": ["LlamaForCausalLM"]}, "Qwen2ForCausalLM, Qwen3ForCausalLM"),
        ({"model_type": "qwen2"}, "Qwen3ForCausalLM of type qwen2"),
        ({"model_type": None, "architectures": None}, "none of type None is not known"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"intermediate_size": 11}, r"mlp.*proj.weight has shape"),
        ({"num_hidden_layers": 3}, r"missing model.layers.2.*and 7 more"),
        ({"num_hidden_layers": 1}, r"not expected model.layers.1.*and 7 more"),
        ({"tie_word_embeddings": False}, "missing lm_head.weight"),
    ],
)
def test_what_would_be_wrong_is_refused(changes, named, tmp_path):
    written(tmp_path, QWEN3, **changes)
    with pytest.raises(ValueError, match=named):
        huggingface.load(tmp_path)


def test_fp8_is_refused_by_name(tmp_path):
    tensors = written(tmp_path, QWEN3)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is F8_E4M3"):
        huggingface.load(tmp_path)


def test_damaged_files_are_named(tmp_path):
    written(tmp_path, QWEN3)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged or cut short"):
        huggingface.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3')
    with pytest.raises(ValueError, match="config.json is not JSON"):
        huggingface.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        huggingface.load(tmp_path)


def test_check_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        huggingface.check(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        huggingface.check(tmp_path)
    tokenizer.train(["some text"], []).save(tmp_path)
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        huggingface.check(tmp_path)
    config = dataclasses.replace(QWEN3, vocab=300)
    written(tmp_path, config)
    huggingface.check(tmp_path)
    written(tmp_path, config, intermediate_size=11)
    with pytest.raises(ValueError, match="config.json asks for"):
        huggingface.check(tmp_path)
    written(tmp_path, config)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="tokenizer.json is not JSON"):
        huggingface.check(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(whole)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        huggingface.check(tmp_path)


def test_every_id_of_the_tokenizer_needs_a_row_and_rows_may_be_left(tmp_path):
    words = tokenizer.train(["some text"], [])
    words.save(tmp_path)
    assert words.max_id == words.vocab_size - 1
    for vocab in (words.vocab_size, words.vocab_size + 5):
        written(tmp_path, dataclasses.replace(QWEN3, vocab=vocab))
        huggingface.check(tmp_path)
    written(tmp_path, dataclasses.replace(QWEN3, vocab=words.max_id))
    named = (
        f"tokenizer.json has ids up to {words.max_id}, but model.embed_tokens.weight"
    )
    with pytest.raises(ValueError, match=f"{named} has {words.max_id} rows"):
        huggingface.check(tmp_path)


def test_check_reads_the_chat_template(folder):
    for template, how, fault in (
        (folders.POLITE, "list", None),
        (folders.THINKER, "file", "opens a thought before every reply"),
        (None, "nothing", "has no chat template"),
    ):
        path = folder("bpe", template, how)
        written(path, dataclasses.replace(QWEN3, vocab=400))
        if fault is None:
            huggingface.check(path)
            continue
        with pytest.raises(ValueError, match=fault):
            huggingface.check(path)


def test_a_mixture_of_the_families_is_not_written(tmp_path):
    config = dataclasses.replace(QWEN3, qkv_bias=True)
    with pytest.raises(ValueError, match="neither Qwen2"):
        huggingface.save(tmp_path, config, {})


# Types, and what transformers reads silently but we cannot compute.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"hidden_size": "8"}, "hidden_size='8' must be a whole number ≥ 1"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers=2.0 must be a whole number"),
        ({"vocab_size": True}, "vocab_size=True must be a whole number"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' must be a number > 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures=.* a list of strings"),
        ({"layer_types": [1, 2]}, "layer_types=.* must be a list of strings"),
        ({"rope_scaling": 4.0}, "rope_scaling=4.0 must be an object"),
        ({"num_key_value_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"is_causal": False}, "is_causal"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": None}, "lacks rope_theta, at the top and in rope_parameters"),
        ({"rope_theta": float("inf")}, "rope_theta=inf must be a number > 1"),
        ({"rope_theta": 0.5}, "rope_theta=0.5 must be a number > 1"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "contradict each other"),
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 5e6}},
            "rope_scaling and rope_parameters contradict each other",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope type 'llama3'"),
        ({"rope_scaling": YARN | {"type": "linear"}}, "rope type 'linear' and 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "lacks rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 must be ≥ 1"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "rope_scaling.factor='4' must be a"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn lacks original_max"),
        ({"rope_scaling": YARN | {"factor": None}}, "yarn lacks factor and max_pos"),
        ({"rope_scaling": YARN | {"truncate": None}}, "truncate=None must be true or"),
        ({"rope_parameters": {"full_attention": {}}}, "by layer type: full_attention"),
        ({"layer_types": ["full_attention", "chunked"]}, r"layer types \['chunked'\]"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, num_hidden"),
        (
            {"use_sliding_window": True, "sliding_window": "4"},
            "sliding_window='4' must be a whole number",
        ),
    ],
)
def test_a_wrong_field_is_refused_by_file_and_name(changes, named, tmp_path):
    written(tmp_path, QWEN3, **changes)
    with pytest.raises(ValueError, match=f"config.json: .*{named}"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize("text", ["[1, 2]", '"Qwen3"', "null"])
def test_config_that_is_no_object_is_refused(text, tmp_path):
    written(tmp_path, QWEN3)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json holds a .*, not an object"):
        huggingface.load(tmp_path)


# What transformers makes of the same fields is compared in parity_test.py.
@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({}, None),
        ({"rope_scaling": {"type": "default"}}, None),
        ({"rope_scaling": {"type": "linear", "factor": 3}}, Scaling("linear", 3.0)),
        ({"rope_scaling": YARN}, Scaling("yarn", 4.0, 16)),
        # 48 / 16 tokens
        (
            {
                "rope_scaling": YARN | {"factor": None},
                "max_position_embeddings": 48,
            },
            Scaling("yarn", 3.0, 16),
        ),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": 2.0},
                "max_position_embeddings": 48,
            },
            Scaling("yarn", 2.0, 48),
        ),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 24},
            Scaling("yarn", 4.0, 24),
        ),
        (
            {
                "rope_scaling": YARN
                | {"beta_fast": 8, "beta_slow": 0.5, "truncate": False}
                | {"attention_factor": 1.25, "mscale": 3.0, "mscale_all_dim": 2.0},
            },
            Scaling("yarn", 4.0, 16, 8.0, 0.5, 1.25, False),
        ),
        # (0.1 · 3 · 1 + 1) / (0.1 · 1 · 1 + 1) at a factor of e
        (
            {
                "rope_scaling": YARN
                | {"factor": np.e, "mscale": 3.0, "mscale_all_dim": 1.0},
            },
            Scaling("yarn", float(np.e), 16, attention_factor=1.3 / 1.1),
        ),
        # one of the two alone counts for nothing
        ({"rope_scaling": YARN | {"mscale": 3.0}}, Scaling("yarn", 4.0, 16)),
    ],
)
def test_scaling_is_read_as_transformers_fills_it_in(changes, wanted, tmp_path):
    written(tmp_path, QWEN3, **changes)
    assert huggingface.load(tmp_path)[0].scaling == wanted


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({"sliding_window": 4, "max_window_layers": 0}, (None, None)),
        (
            {"use_sliding_window": True, "sliding_window": None}
            | {"max_window_layers": 0},
            (None, None),
        ),
        ({"use_sliding_window": True, "sliding_window": 4}, (None, None)),  # from 28 on
        (
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            (4, (1,)),
        ),
        ({"use_sliding_window": True, "max_window_layers": 0}, (4096, (0, 1))),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 3,
                "max_window_layers": 1,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (3, (0,)),
        ),
    ],
)
def test_windows_are_read_as_transformers_reads_them(changes, wanted, tmp_path):
    written(tmp_path, QWEN3, **changes)
    config, _ = huggingface.load(tmp_path)
    assert (config.window, config.window_layers) == wanted


def test_a_head_size_left_out_is_the_classes_own(tmp_path):
    """128 for Qwen3; width / heads, here 8 / 4, for Qwen2."""
    for config, size in ((QWEN3, 128), (QWEN2, 2)):
        written(tmp_path, dataclasses.replace(config, head_size=size))
        text = json.loads((tmp_path / "config.json").read_text())
        del text["head_dim"]
        (tmp_path / "config.json").write_text(json.dumps(text))
        assert huggingface.load(tmp_path)[0].head_size == size


def test_where_the_file_is_silent_the_head_decides_on_tying(tmp_path):
    for config in (QWEN3, QWEN2):
        written(tmp_path, config)
        text = json.loads((tmp_path / "config.json").read_text())
        del text["tie_word_embeddings"]
        (tmp_path / "config.json").write_text(json.dumps(text))
        assert huggingface.load(tmp_path)[0] == config


def sharded(folder, tensors):
    """Two shards and their index, in place of the single file."""
    (folder / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for part, file in ((names[::2], "a.safetensors"), (names[1::2], "b.safetensors")):
        safetensors.numpy.save_file({n: tensors[n] for n in part}, folder / file)
        where |= dict.fromkeys(part, file)
    return where


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda text: text[:-5], "index.json is not JSON"),
        (lambda text: "[]", "index.json holds a list, not an object"),
        (lambda text: "{}", "index.json has no weight_map"),
        (
            lambda text: text.replace('"a.', '"../a.'),
            r"is in '../a.safetensors', which",
        ),
        (
            lambda text: text.replace('"a.safetensors"', "7"),
            "is in 7, which is no file",
        ),
        (
            lambda text: text.replace('norm.weight": "b.', 'norm.weight": "a.'),
            r"index.json says that \S+norm.weight is in a.safetensors, which lacks it",
        ),
    ],
)
def test_a_damaged_index_is_refused(damage, named, tmp_path):
    where = sharded(tmp_path, written(tmp_path, QWEN3))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    huggingface.load(tmp_path)
    index.write_text(damage(index.read_text()))
    with pytest.raises(ValueError, match=named):
        huggingface.load(tmp_path)


def test_layers_of_different_dtypes_are_stacked_in_one_that_holds_both(tmp_path):
    tensors = written(tmp_path, QWEN3)
    for name in tensors:
        half = ml_dtypes.bfloat16 if "layers.0" in name else np.float16
        tensors[name] = tensors[name].astype(half)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    _, params = huggingface.load(tmp_path)
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert (kernel.dtype, params["embed"].dtype) == (np.float32, np.float16)
    for n in range(2):
        up = tensors[f"model.layers.{n}.mlp.up_proj.weight"]
        np.testing.assert_array_equal(kernel[n], up.astype(np.float32).T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_is_written_and_read(dtype, tmp_path):
    params = qwen.init(QWEN2, jax.random.key(1))
    huggingface.save(tmp_path, QWEN2, params, dtype)
    config, read = huggingface.load(tmp_path)
    assert config == QWEN2
    same(read, jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    text = json.loads((tmp_path / "config.json").read_text())
    assert (text["torch_dtype"], text["dtype"]) == (dtype, dtype)


def test_what_float16_cannot_hold_is_not_written(tmp_path):
    params = qwen.init(QWEN3, jax.random.key(1))
    params["norm"] = params["norm"].at[2].set(7e4)
    with pytest.raises(ValueError, match="model.norm.weight has values beyond float16"):
        huggingface.save(tmp_path, QWEN3, params, "float16")
    with pytest.raises(ValueError, match="dtype='int8' is not written: float32, "):
        huggingface.save(tmp_path, QWEN3, params, "int8")


def test_shards_hold_what_they_may_and_replace_what_was_there(tmp_path):
    written(tmp_path, QWEN2)
    params = qwen.init(QWEN2, jax.random.key(1))
    huggingface.save(tmp_path, QWEN2, params, shard_bytes=2000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files][::5] == [
        f"model-{n:05}-of-{len(files):05}.safetensors"
        for n in range(1, len(files) + 1, 5)
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == total
    filled, last = 0, files[0].name
    for name, file in index["weight_map"].items():
        size = safetensors.numpy.load_file(tmp_path / file)[name].nbytes
        full = filled + size > 2000
        assert (file != last) is full  # a file is left only when it is full
        filled, last = size + filled * (not full), file
    assert last == files[-1].name
    same(huggingface.load(tmp_path)[1], params)
    huggingface.save(tmp_path, QWEN2, params, shard_bytes=total)
    assert [f.name for f in sorted(tmp_path.iterdir())] == [
        "config.json",
        "model.safetensors",
    ]
    same(huggingface.load(tmp_path)[1], params)


def test_one_shard_at_a_time_is_made(tmp_path):
    """Tensors are asked for shard by shard, after the one before is written."""
    asked = []

    def read(name):
        asked.append((name, len(list(tmp_path.glob("*.safetensors")))))
        return np.zeros(4, np.float32)

    sizes = dict.fromkeys("abcde", 16)
    tensor_files.write(tmp_path, sizes, read, 32)
    assert asked == [("a", 0), ("b", 0), ("c", 1), ("d", 1), ("e", 2)]


def test_adapters_are_merged_before_they_are_written(tmp_path):
    adapted = dataclasses.replace(QWEN3, lora=Lora(2, 4.0, "mlp"))
    params = qwen.init(QWEN3, jax.random.key(0))
    with pytest.raises(ValueError, match="merge first"):  # told by the shape
        huggingface.save(tmp_path / "out", adapted, params)
    params["layers"]["mlp"]["up"]["lora_up"] = np.zeros((2, 2, 10), np.float32)
    with pytest.raises(ValueError, match="merge first"):  # by the leaves
        huggingface.save(tmp_path / "out", QWEN3, params)
    assert not (tmp_path / "out").exists()


def test_ids_are_written_beside_the_shape(tmp_path):
    params = qwen.init(QWEN3, jax.random.key(0))
    ids = {"eos_token_id": [5, 6], "pad_token_id": 7}
    huggingface.save(tmp_path, QWEN3, params, tokens=ids)
    text = json.loads((tmp_path / "config.json").read_text())
    assert (text["eos_token_id"], text["pad_token_id"]) == ([5, 6], 7)


def test_a_leaf_is_handed_over_without_a_copy_and_survives_donation(tmp_path):
    written(tmp_path, QWEN3)
    _, params = huggingface.load(tmp_path)
    array = tensor_files.aligned((3, 5), np.dtype("float32"))
    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data
    before = np.array(params["embed"])
    moved = jax.jit(lambda x: x + 1, donate_argnums=0)(params["embed"])
    np.testing.assert_array_equal(moved, before + 1)


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from skillsd_jax.models import huggingface, tensor_files
folder = sys.argv[1]
config, whole = huggingface.load(folder)
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
def place(path, leaf):
    spec = {1: P("a"), 2: P("b", None), 3: P(None, "a", "b")}[leaf.ndim]
    return NamedSharding(mesh, P() if path[0].key == "norm" else spec)
sharding = jax.tree_util.tree_map_with_path(place, whole)
read, original = {}, tensor_files.Tensors.read
def watched(self, name, part=(slice(None),)):
    array = original(self, name, part)
    read.setdefault(name, []).append(array.size)
    return array
tensor_files.Tensors.read = watched
_, params = huggingface.load(folder, sharding=sharding)
for a, b, where in zip(*map(jax.tree.leaves, (whole, params, sharding)), strict=True):
    assert b.sharding == where
    np.testing.assert_array_equal(a, b)
up = read["model.layers.1.mlp.up_proj.weight"]
assert up == [20] * 4, up  # 8 x 10 on four devices: a quarter each
embed = read["model.embed_tokens.weight"]
assert embed == [80] * 2, embed  # 20 x 8 in two parts, each once
assert read["model.norm.weight"] == [8]
"""


def test_a_shard_reads_its_part_of_the_file_and_nothing_else(tmp_path):
    """Four devices in a process of their own: what each asks for, and what it gets."""
    written(tmp_path, dataclasses.replace(QWEN3, vocab=20))
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


def test_both_styles_of_rotary_fields_and_of_windows_are_written(tmp_path):
    scaling = Scaling("yarn", 4.0, 16, 8.0, 0.5, 1.25, False)
    config = dataclasses.replace(QWEN3, scaling=scaling, window=3, window_layers=(1,))
    huggingface.save(tmp_path, config, qwen.init(config, jax.random.key(0)))
    text = json.loads((tmp_path / "config.json").read_text())
    assert text["rope_parameters"] == text["rope_scaling"] | {"rope_theta": 5e6}
    assert (text["rope_theta"], text["max_position_embeddings"]) == (5e6, 64)
    assert text["layer_types"] == ["full_attention", "sliding_attention"]
    assert text["max_window_layers"] == 1
    for style in (("rope_theta", "rope_scaling"), ("rope_parameters",)):
        other = {name: v for name, v in text.items() if not name.startswith("rope")}
        other |= {name: text[name] for name in style}
        del other["layer_types"]
        (tmp_path / "config.json").write_text(json.dumps(other))
        assert huggingface.load(tmp_path)[0] == config


def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path):
    tensors = written(tmp_path, QWEN3)
    where = sharded(tmp_path, {k: v + 1 for k, v in tensors.items()})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    written(tmp_path, QWEN3)
    _, params = huggingface.load(tmp_path)
    np.testing.assert_array_equal(params["norm"], tensors["model.norm.weight"])
