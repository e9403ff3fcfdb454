"""Qwen2, Qwen2.5 and Qwen3 folders of safetensors: read, check, write."""

import json
import pathlib

import jax
import ml_dtypes  # noqa: F401  numpy learns bfloat16 from it
import numpy as np
import safetensors
import safetensors.numpy

from skillsd_jax.models.qwen import ModelConfig, Params

_ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
_DTYPES = ("BF16", "F16", "F32")
_HEAD = "lm_head.weight"
