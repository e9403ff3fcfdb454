"""How alike two texts are, and which text held so far is most like a new one."""

import collections

GRAM = 3  # words


def grams(text: str) -> frozenset[tuple[str, ...]]:
    """Its runs of three words, in whatever case; of a shorter text the whole of it."""
    words = text.casefold().split()
    last = max(len(words) - GRAM, 0)
    return frozenset(tuple(words[i : i + GRAM]) for i in range(last + 1))


def jaccard(a: str, b: str) -> float:
    """|A ∩ B| / |A ∪ B| of the word trigrams of two texts, in [0, 1]."""
    one, other = grams(a), grams(b)
    return len(one & other) / len(one | other)


class Likeness:
    """Texts of one shelf by their trigrams: a new one meets only those it shares with."""

    def __init__(self):
        self._grams: dict[str, frozenset[tuple[str, ...]]] = {}
        self._ages: dict[str, int] = {}  # in the order they came
        self._came = 0
        self._holders: dict[tuple[str, ...], dict[str, None]] = {}

    def add(self, id: str, text: str) -> None:
        self._grams[id] = found = grams(text)
        self._ages[id] = self._came = self._came + 1
        for gram in found:
            self._holders.setdefault(gram, {})[id] = None

    def remove(self, id: str) -> None:
        del self._ages[id]
        for gram in self._grams.pop(id):
            holders = self._holders[gram]
            del holders[id]
            if not holders:
                del self._holders[gram]

    def nearest(self, text: str, least: float) -> str | None:
        """Id of the text of the greatest Jaccard index, the oldest of equal ones.

        Returns:
          None if none reaches `least`, which is above 0.
        """
        new = grams(text)
        shared: collections.Counter[str] = collections.Counter()
        for gram in new:
            shared.update(self._holders.get(gram, {}).keys())
        indices = {
            id: count / (len(new) + len(self._grams[id]) - count)
            for id, count in shared.items()
        }
        alike = [id for id, index in indices.items() if index >= least]
        return max(alike, key=lambda id: (indices[id], -self._ages[id]), default=None)
