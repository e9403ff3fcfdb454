"""Published shapes of Qwen2.5 and Qwen3, by the name of the model.

Source: config.json of the folders Qwen/Qwen2.5-*-Instruct and Qwen/Qwen3-*.
"""

from skillsd_jax.models.qwen import ModelConfig

_QWEN25 = {
    "vocab": 151_936,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "qkv_bias": True,
    "qk_norm": False,
}
_QWEN3 = _QWEN25 | {"qkv_bias": False, "qk_norm": True, "kv_heads": 8}
_QWEN3 |= {"head_size": 128}

SHAPES: dict[str, ModelConfig] = {
    "qwen2.5-0.5b": ModelConfig(
        width=896,
        layers=24,
        heads=14,
        kv_heads=2,
        head_size=64,
        hidden=4864,
        **_QWEN25,
    ),
    "qwen2.5-1.5b": ModelConfig(
        width=1536,
        layers=28,
        heads=12,
        kv_heads=2,
        head_size=128,
        hidden=8960,
        **_QWEN25,
    ),
    "qwen2.5-3b": ModelConfig(
        width=2048,
        layers=36,
        heads=16,
        kv_heads=2,
        head_size=128,
        hidden=11_008,
        **_QWEN25,
    ),
    "qwen2.5-7b": ModelConfig(
        width=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head_size=128,
        hidden=18_944,
        tie_embeddings=False,
        **_QWEN25 | {"vocab": 152_064},
    ),
    "qwen3-0.6b": ModelConfig(width=1024, layers=28, heads=16, hidden=3072, **_QWEN3),
    "qwen3-1.7b": ModelConfig(width=2048, layers=28, heads=16, hidden=6144, **_QWEN3),
    # Qwen3-4B-Instruct-2507 has rope_theta 5e6.
    "qwen3-4b": ModelConfig(width=2560, layers=36, heads=32, hidden=9728, **_QWEN3),
    "qwen3-8b": ModelConfig(
        width=4096,
        layers=36,
        heads=32,
        hidden=12_288,
        tie_embeddings=False,
        **_QWEN3,
    ),
}
