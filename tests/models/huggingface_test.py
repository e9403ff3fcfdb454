"""Folders written by hand, read back; and what is refused."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from skillsd_jax.models import huggingface, qwen, tokenizer
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
def test_sharded_half_precision_is_read_as_float32(dtype, tmp_path):
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
    _, params = huggingface.load(tmp_path)
    expected = half["model.embed_tokens.weight"].astype(np.float32)
    assert params["embed"].dtype == np.float32
    np.testing.assert_array_equal(params["embed"], expected)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        huggingface.load(tmp_path)


def test_a_tied_head_is_never_read(tmp_path):
    tensors = written(tmp_path, QWEN3)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    config, params = huggingface.load(tmp_path)
    assert config.tie_embeddings and "head" not in params


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"architectures": ["LlamaForCausalLM"]}, "Qwen2ForCausalLM, Qwen3ForCausalLM"),
        ({"model_type": "qwen2"}, "Qwen3ForCausalLM of type qwen2"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"use_sliding_window": True}, "sliding window"),
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
    written(tmp_path, QWEN3)
    huggingface.check(tmp_path)
    written(tmp_path, QWEN3, intermediate_size=11)
    with pytest.raises(ValueError, match="config.json asks for"):
        huggingface.check(tmp_path)


def test_check_reads_the_chat_template(folder):
    for template, how, fault in (
        (folders.POLITE, "list", None),
        (folders.THINKER, "file", "opens a thought before every reply"),
        (None, "nothing", "has no chat template"),
    ):
        path = folder("bpe", template, how)
        written(path, QWEN3)
        if fault is None:
            huggingface.check(path)
            continue
        with pytest.raises(ValueError, match=fault):
            huggingface.check(path)


def test_a_mixture_of_the_families_is_not_written(tmp_path):
    config = dataclasses.replace(QWEN3, qkv_bias=True)
    with pytest.raises(ValueError, match="neither Qwen2"):
        huggingface.save(tmp_path, config, {})
