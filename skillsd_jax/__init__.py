"""Skill-conditioned self-distillation for multi-turn language agents, in JAX."""

__version__ = "0.1.0"
