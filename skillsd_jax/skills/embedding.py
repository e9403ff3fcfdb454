"""Texts as vectors: EMBEDDINGS by name, and how near those of a bank are to a task."""

import collections
import functools
import importlib.util
import math
import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from skillsd_jax.skills.bank import Bank

SIZE = 256  # dimensions of the hashed embedding
BUCKETS = 1 << 16  # words and character trigrams are told apart by so many numbers
PART = 1 / 3  # weight of a character trigram next to a whole word
MODEL = "sentence-transformers:"
DIGITS = 5  # of a cosine: what the order of summation may change is left out
_MISSING = (
    "sentence-transformers is not installed: pip install 'skillsd_jax[embeddings]'"
)
_WORD = re.compile(r"\w+")

Embedding = Callable[[list[str]], np.ndarray]


def words(text: str) -> list[str]:
    """In whatever case."""
    return _WORD.findall(text.casefold())


def hashed(texts: list[str], weights: np.ndarray | None = None) -> np.ndarray:
    """Words and their character trigrams, counted and hashed into a few dimensions.

    v_d = Σ_f sign(f) weight(f) (1 + ln count(f)) over the features f hashed to d. The
    hash is a checksum, so that a text has the same vector in every process. Signs let
    features that meet in a dimension cancel out on average.

    Args:
      texts: n of them.
      weights: of each bucket; those of features that tell texts apart are greater.

    Returns:
      [n, SIZE].

    Source: feature hashing, Weinberger et al. 2009, arXiv:0902.2206.
    """
    return _sums([features(text) for text in texts], weights)


def features(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of a text's words and character trigrams, and their damped counts."""
    found: collections.Counter[int] = collections.Counter()
    parts: dict[int, float] = {}
    for word, count in collections.Counter(words(text)).items():
        for bucket, weight in _hashes(word):
            found[bucket] += count
            parts[bucket] = weight
    buckets = np.array(sorted(found), np.int64)
    counts = [parts[b] * (1 + math.log(found[b])) for b in buckets.tolist()]
    return buckets, np.array(counts)


# Name → callable: list of n texts → floats [n, d], one vector per text whatever the
# others are. Add one here and choose it by `skills.embedding`.
EMBEDDINGS: dict[str, Embedding] = {"hashed": hashed}


def check(name: str) -> None:
    """Raises ValueError for an embedding that there is none of, or not here."""
    if name.startswith(MODEL) and name != MODEL:
        if importlib.util.find_spec("sentence_transformers") is None:
            raise ValueError(f"skills.embedding={name!r}: {_MISSING}")
    elif name not in EMBEDDINGS:
        raise ValueError(
            f"unknown skills.embedding={name!r}; known: {', '.join(EMBEDDINGS)}, "
            f"{MODEL}MODEL"
        )


def load(name: str) -> Embedding:
    """The embedding of this name; a model is in memory, and stays for the next call.

    Raises:
      ValueError: there is none, or its model cannot be loaded.
    """
    check(name)
    return EMBEDDINGS[name] if name in EMBEDDINGS else _model(name)


class Vectors:
    """Unit vectors of a bank's skills, each computed once: bank.indices keeps it.

    With the hashed embedding a feature of the question weighs ln(1 + N / n), where n
    of N skills have it, and one that none has weighs nothing. Skills are not weighed:
    their vectors stay when others come and go (lnc.ltc in the notation of SMART).
    """

    def __init__(self, name: str):
        self._hashed, self._embed = name == "hashed", load(name)
        self._room = np.zeros((0, 0), np.float32)
        self._alive = np.zeros(0, bool)  # rows whose features are counted
        self._features: dict[int, np.ndarray] = {}  # row → buckets, if hashed
        self._counts = np.zeros(BUCKETS)  # skills that have the bucket
        self._ask = functools.lru_cache(1024)(self._asked)

    def cosine(self, bank: Bank, rows: np.ndarray, text: str) -> np.ndarray:
        """[n] in [−1, 1], of the text and each of the rows."""
        self._follow(bank)
        vectors, question = self._room, self._question(text)
        # A product over all rows is faster than a copy of many.
        if 4 * len(rows) > len(self._alive):
            found = (vectors[: len(self._alive)] @ question)[rows]
        else:
            found = vectors[rows] @ question
        return np.round(found, DIGITS)

    def keep(self, rows: np.ndarray) -> None:
        """See bank.Index."""
        known = rows[rows < len(self._alive)]
        live = np.zeros(len(self._alive), bool)
        live[known] = True
        self._forget(live)
        self._room, self._alive = self._room[known], self._alive[known]
        new = {row: number for number, row in enumerate(known.tolist())}
        held = self._features.items()
        self._features = {new[row]: found for row, found in held if row in new}

    def _asked(self, text: str) -> np.ndarray:
        return _unit(_checked(self._embed([text]), 1))[0]

    def _question(self, text: str) -> np.ndarray:
        if not self._hashed:
            return self._ask(text)
        buckets, _ = features(text)
        weights = np.zeros(BUCKETS)
        counts = self._counts[buckets]
        weights[buckets] = np.log1p(self._alive.sum() / np.maximum(counts, 1))
        weights[buckets[counts == 0]] = 0
        return _unit(hashed([text], weights))[0]

    def _follow(self, bank: Bank) -> None:
        """Takes in the rows that came and counts out those that went."""
        old, live = len(self._alive), bank.columns.alive
        self._forget(live[:old])
        if old == len(live):
            return
        new = np.arange(old, len(live))
        fresh = new[live[old:]]
        texts = [skill.text for skill in bank.skills(fresh)]
        vectors = self._vectors(texts, fresh) if texts else self._room[:0]
        if len(live) > len(self._room):
            room = np.zeros((2 * len(live), vectors.shape[1]), np.float32)
            if old:
                room[:old] = self._room[:old]
            self._room = room
        self._room[new] = 0
        self._room[fresh] = vectors
        self._alive = live.copy()

    def _forget(self, live: np.ndarray) -> None:
        """Rows that are not live count no more."""
        gone = np.flatnonzero(self._alive & ~live)
        self._alive[gone] = False
        if self._hashed:
            for row in gone.tolist():
                self._counts[self._features.pop(row)] -= 1

    def _vectors(self, texts: list[str], rows: np.ndarray) -> np.ndarray:
        """Unit vectors; of the hashed embedding the features are counted as well."""
        if not self._hashed:
            return _unit(_checked(self._embed(texts), len(texts)))
        found = [features(text) for text in texts]
        for row, (buckets, _) in zip(rows.tolist(), found):
            self._features[row] = buckets.astype(np.uint16)
            self._counts[buckets] += 1
        return _unit(_sums(found))


def _sums(
    found: Sequence[tuple[np.ndarray, np.ndarray]], weights: np.ndarray | None = None
) -> np.ndarray:
    out = np.zeros((len(found), SIZE))
    for vector, (buckets, counts) in zip(out, found):
        if weights is not None:
            counts = counts * weights[buckets]
        signs = 1.0 - 2.0 * (buckets // SIZE % 2)
        vector += np.bincount(buckets % SIZE, signs * counts, minlength=SIZE)
    return out


def _checked(vectors, count: int) -> np.ndarray:
    made = np.asarray(vectors, np.float64)
    if made.ndim != 2 or len(made) != count or not np.isfinite(made).all():
        raise ValueError(
            f"an embedding of {count} texts must be finite floats [{count}, d], not "
            f"{made.shape}"
        )
    return made


@functools.lru_cache(1 << 16)
def _hashes(word: str) -> tuple[tuple[int, float], ...]:
    """Buckets of a word and of its trigrams, the spaces around it included."""
    around = f" {word} "
    parts = {around[i : i + 3] for i in range(len(around) - 2)}
    found = {_bucket("part " + part): PART for part in parts}
    return tuple((found | {_bucket("word " + word): 1.0}).items())


def _bucket(feature: str) -> int:
    return zlib.crc32(feature.encode("utf-8", "replace")) % BUCKETS


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms, norms, 1)).astype(np.float32)


@functools.lru_cache(1)
def _model(name: str) -> Embedding:
    try:
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(name.removeprefix(MODEL)).encode
    except (ImportError, OSError, RuntimeError, ValueError) as fault:
        raise ValueError(
            f"skills.embedding={name!r} cannot be loaded: {fault!s:.400}; name a folder, "
            "or a model of the hub that can be reached from here"
        ) from fault
