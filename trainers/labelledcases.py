"""Which cases a project's image-level labels speak of: accepted masks, and a table beside them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from trainers.basis import Basis, Parts
from trainers.data import Datastore, accepted_cases, unlabelled_cases
from trainers.imagelabels import ImageLabels, check_images, read_image_labels, slice_labels
from trainers.presence import LabelledCase


@dataclass(frozen=True, kw_only=True)
class LabelledCases:
    """Cases with image-level labels: what is accepted, and the images of a table without an accepted mask.

    Where an image has both, the mask is believed.

    Args:
        basis: What the trainer stands on.
        csv: A table of image-level labels (`trainers.imagelabels`); None = accepted masks alone.
    """

    basis: Basis
    csv: Path | None = None

    def check(self, datastore: Datastore) -> None:
        """Whether the table speaks of images that are there.

        Raises:
            InputError: (422) When it cannot be used.
        """
        if self.csv is not None:
            known = {case.case_id for case in accepted_cases(datastore)}
            check_images(self._table(), known | set(datastore.get_unlabeled_images()), path=self.csv)

    def options(self) -> dict[str, str]:
        """What of a plan follows from the table: a killed round goes on only where it is as it was."""
        return {} if self.csv is None else {"csv": hashlib.sha256(repr(self._table()).encode()).hexdigest()}

    def told(self, parts: Parts) -> set[str]:
        """Ids of the images that only the table speaks of."""
        return set(self._table()) & set(parts.unlabelled)

    def find(self, parts: Parts, datastore: Datastore) -> list[LabelledCase]:
        """The cases to train on, with what is known of those without an accepted mask."""
        found = [LabelledCase(case=case) for case in parts.training]
        if self.csv is None:
            return found
        table = self._table()
        for case in unlabelled_cases(datastore, [name for name in parts.unlabelled if name in table]):
            depth = self.basis.read(case.image).shape[2]
            slices, every = slice_labels(table[case.case_id], depth=depth, path=self.csv)
            if slices:
                named = replace(case, slices=tuple(sorted(slices)))
                found.append(LabelledCase(case=named, slices=slices))
            if every:
                found.append(LabelledCase(case=case, slices=slices, every=every))
        return found

    def _table(self) -> dict[str, ImageLabels]:
        return {} if self.csv is None else read_image_labels(self.csv, labels=self.basis.labels)


def count_told(cases: list[LabelledCase]) -> int:
    """Images among cases of which a table alone says what is on them."""
    return len({one.case.case_id for one in cases if one.case.label is None})
