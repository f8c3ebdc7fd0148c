"""The project's labels under the names that segments have in a PACS."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class LabelNames:
    """Finds labels by name: as written, else without regard to capitals and spaces around.

    Args:
        labels: Label name -> index of the project.
    """

    def __init__(self, labels: Mapping[str, int]) -> None:
        self._exact = dict(labels)
        folded: dict[str, set[int]] = {}
        for name, index in labels.items():
            folded.setdefault(_folded(name), set()).add(index)
        self._folded = {name: found.pop() for name, found in folded.items() if len(found) == 1}

    def index(self, name: str) -> int | None:
        """The index of a segment's label; None where the project has none of that name."""
        return self._exact.get(name) or self._folded.get(_folded(name))

    def knows(self, name: str) -> bool:
        """Whether the project has a label of that name."""
        return self.index(name) is not None

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Those of some names that the project has not."""
        return [name for name in names if not self.knows(name)]


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())
