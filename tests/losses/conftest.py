"""The authors' figures, and a world of five words where expectations are sums."""

import pathlib
from collections.abc import Callable

import jax
import numpy as np
import pytest

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"


class Words:
    """Log-probs over five words of a student, a teacher, and whoever sampled."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.logits, self.teacher, self.old = rng.normal(size=(3, 5))
        self.student, self.teacher, self.old = map(
            self.log_softmax, (self.logits, self.teacher, self.old)
        )

    @staticmethod
    def log_softmax(logits: np.ndarray) -> np.ndarray:
        return logits - np.log(np.sum(np.exp(logits)))

    def expected_gradient(self, loss: Callable, sampler: np.ndarray) -> np.ndarray:
        """Σ_y q(y) d loss(log π_θ)[y] / d logits, in float64; q does not move."""

        def expectation(logits):
            return (np.exp(sampler) * loss(jax.nn.log_softmax(logits))).sum()

        with jax.enable_x64(True):
            return np.asarray(jax.grad(expectation)(self.logits))

    # d KL(S‖T) / d logits_v = p_v (log p_v − log t_v − KL); of KL(T‖S): p_v − t_v.
    def reverse_kl_gradient(self, teacher: np.ndarray | None = None) -> np.ndarray:
        p = np.exp(self.student)
        ell = self.student - (self.teacher if teacher is None else teacher)
        return p * (ell - np.sum(p * ell))

    def forward_kl_gradient(self) -> np.ndarray:
        return np.exp(self.student) - np.exp(self.teacher)


@pytest.fixture
def words() -> Words:
    return Words()


@pytest.fixture
def released() -> Callable[[str], dict[str, np.ndarray]]:
    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(REFERENCE / f"{name}.npz") as file:
            return dict(file)

    return load


@pytest.fixture
def close() -> Callable:
    """|a − b| ≤ 2e-4 |b| + 1e-6."""

    def check(a, b):
        np.testing.assert_allclose(np.asarray(a), b, rtol=2e-4, atol=1e-6)

    return check
