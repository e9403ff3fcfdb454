"""Which episodes wrote the texts that a bank holds."""

from collections.abc import Iterable


class Ownership:
    """Authors of each text by its id; a text with one source is the own of its episodes.

    A comparison's source is several episodes, joined by '+': it is the own of each.
    """

    def __init__(self):
        self._authors: dict[str, tuple[str, ...]] = {}
        self._only: dict[str, set[str]] = {}  # episode → ids of texts no other wrote

    def add(self, id: str, sources: Iterable[str]) -> None:
        """These wrote the text, beside those that are known."""
        known = self._authors.get(id, ())
        self._disown(id)
        self._authors[id] = tuple(dict.fromkeys([*known, *sources]))
        for episode in self._alone(id):
            self._only.setdefault(episode, set()).add(id)

    def remove(self, id: str) -> None:
        """Forgets a text."""
        self._disown(id)
        del self._authors[id]

    def of(self, id: str) -> tuple[str, ...]:
        """Sources of the text, in the order they came."""
        return self._authors[id]

    def only(self, episode: str) -> frozenset[str]:
        """Ids of the texts that no other episode wrote."""
        return frozenset(self._only.get(episode, ()))

    def _alone(self, id: str) -> list[str]:
        """Episodes whose own the text is."""
        authors = self._authors.get(id, ())
        return authors[0].split("+") if len(authors) == 1 else []

    def _disown(self, id: str) -> None:
        for episode in self._alone(id):
            ids = self._only[episode]
            ids.discard(id)
            if not ids:
                del self._only[episode]
