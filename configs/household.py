"""The miniature household: ALFWorld's task families in its words, pure Python.

Command: python -m skillsd_jax.main --config=configs/household.py
Hardware: a laptop's CPU; two and a half minutes on two cores. Success on held-out
levels at T = 0.4, seeds 0 to 4: 46 → 76, 47 → 80, 46 → 80, 53 → 77, 50 → 84 %.

The settings are the defaults of skillsd_jax/config.py.
"""

from skillsd_jax import presets
from skillsd_jax.config import Config

PRESETS = {
    "": "small model from scratch on the miniature household; needs no engine",
    "smoke": "the same, cut to about a minute: shows that it runs",
}


def get_config(preset: str = "") -> Config:
    presets.known(preset, PRESETS)
    config = Config()
    return presets.smoke(config) if preset == "smoke" else config
