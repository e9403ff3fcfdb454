"""Claims about which texts are alike."""

import random

import pytest

from skillsd_jax.skills.similarity import Likeness, jaccard


@pytest.mark.parametrize(
    "a, b, index",
    [
        ("a b c d", "a b c e", 1 / 3),  # abc of abc, bcd, bce
        ("a b c d", "A  B\nc d", 1.0),
        ("a b", "a b", 1.0),  # too short for a trigram: the whole of it
        ("a b", "a c", 0.0),
        ("a b", "a b c", 0.0),
        ("", " ", 1.0),
        ("", "a", 0.0),
    ],
)
def test_the_index_is_that_of_word_trigrams(a, b, index):
    assert jaccard(a, b) == jaccard(b, a) == pytest.approx(index)


def test_the_nearest_is_the_oldest_of_the_greatest_index():
    draw = random.Random(0)
    found = 0
    for _ in range(100):
        texts = {str(i): " ".join(draw.choices("abc", k=6)) for i in range(20)}
        likeness = Likeness()
        for id, text in texts.items():
            likeness.add(id, text)
        for id in draw.sample(sorted(texts), 5):
            likeness.remove(id)
            del texts[id]
        new = " ".join(draw.choices("abc", k=6))
        indices = {id: jaccard(text, new) for id, text in texts.items()}
        best = max(indices, key=indices.get)
        expected = best if indices[best] >= 0.4 else None
        assert likeness.nearest(new, 0.4) == expected
        found += expected is not None
    assert 20 < found < 100
