"""The cases of a PACS for whom their number and names matter alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CountedCases:
    """Cases before they are fetched, as `trainers` ask a datastore for them.

    Args:
        accepted: Id -> where the accepted label is, or will be.
        unlabelled: Ids of the cases without one.
    """

    accepted: Mapping[str, str]
    unlabelled: tuple[str, ...]

    def datalist(self) -> list[dict[str, str]]:
        """As the datastore's; the files may not be there."""
        return [{"image": f"{name}.nii", "label": path} for name, path in self.accepted.items()]

    def get_unlabeled_images(self) -> list[str]:
        """As the datastore's."""
        return list(self.unlabelled)
