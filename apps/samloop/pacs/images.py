"""A datastore whose images are the series of a PACS, fetched when they are needed first."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.exception import ImageNotFoundException

from apps.samloop.pacs.accepted import NOTE
from apps.samloop.pacs.dicomweb import SeriesEntry
from apps.samloop.pacs.files import SeriesFiles
from apps.samloop.pacs.holdings import Holdings
from apps.samloop.pacs.segfiles import SegFiles
from apps.samloop.pacs.volumes import Volumes
from apps.samloop.store import SafeDatastore
from sam_infer.dicom.series import Series, save_volume
from sam_infer.errors import InputError
from sam_infer.volumes import Image, read_image

logger = logging.getLogger(__name__)
FINAL = DefaultLabelTag.FINAL.value
_HELD = "the PACS has other instances now; this is what its accepted label was drawn on"


class FetchedImages(SafeDatastore):
    """Images of a PACS in a working copy; see `apps.samloop.pacs.store.DicomDatastore`.

    Args:
        folder: The working copy; it is made.
        labels: Label name -> index of the project.
        holdings: What the PACS holds.
        files: The files of series.
        volumes: Reads series.
        segs: The label maps made from what the PACS holds.
        read_only: Do not reconcile the index with the files.
        read: Path to image; one that caches spares reading a volume that was just looked at.
    """

    def __init__(
        self,
        folder: str,
        *,
        labels: dict[str, int],
        holdings: Holdings,
        files: SeriesFiles,
        volumes: Volumes,
        segs: SegFiles,
        read_only: bool = False,
        read: Callable[[Path], Image] = read_image,
    ) -> None:
        self._holdings = holdings
        self._series_files = files
        self._volumes = volumes
        self._seg_files = segs
        self._inside = threading.local()
        super().__init__(folder, labels=labels, auto_reload=False, read_only=read_only, read=read)

    @contextmanager
    def _in_copy(self) -> Iterator[None]:
        """Within this an image is the file of the working copy: the base class asks for it while it saves."""
        self._inside.copy = True
        try:
            yield
        finally:
            self._inside.copy = False

    def get_image_uri(self, image_id: str) -> str:
        """The file of an image, fetched and converted where it is not here, or has changed in the PACS.

        Returns:
            "" where the PACS has no such series.

        Raises:
            NoVolumeError: When the series is no volume.
            UnavailableError: When the PACS is needed and does not answer.
        """
        if getattr(self._inside, "copy", False):
            return super().get_image_uri(image_id)
        entry = self._holdings.entry(image_id)
        return self._image_of(entry) if entry is not None else ""

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """What is known of an image, fetched or not.

        Raises:
            ImageNotFoundException: When there is no such image.
            UnavailableError: When that cannot be known.
        """
        entry = self._holdings.entry(image_id)
        if entry is None:
            raise ImageNotFoundException(f"Image {image_id} not found")
        known = super().get_image_info(image_id) if image_id in self._objects else {}
        return {**known, **described(entry)}

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Merge ``info`` into an image's info; it is fetched for that."""
        check_info(info)
        self._fetched(image_id)
        super().update_image_info(image_id, info)

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Refused: images come from the PACS.

        Raises:
            InputError: (409) Always.
        """
        remedy = f"images come from the PACS: store the DICOM series there ({self.name()}), it appears here"
        raise InputError("image", image_id, remedy, status=409)

    def remove_image(self, image_id: str) -> None:
        """Refused: nothing is ever deleted in the PACS from here.

        Raises:
            InputError: (409) Always.
        """
        remedy = f"images are the PACS's: delete the series there ({self.name()}), it disappears here"
        raise InputError("image", image_id, remedy, status=409)

    def _fetched(self, image_id: str) -> None:
        if not self.get_image_uri(image_id):
            raise ImageNotFoundException(f"Image {image_id} not found")

    def _image_of(self, entry: SeriesEntry) -> str:
        """The file of an image; see `get_image_uri`."""
        self._volumes.check(entry)
        if self._is_due(entry):
            with self._series_files.locked(entry.uid):
                if self._is_due(entry):  # nobody fetched it meanwhile
                    self._fetch(entry)
        return super().get_image_uri(entry.uid)

    def _is_due(self, entry: SeriesEntry) -> bool:
        """Whether an image is to be fetched: it is not here, or the PACS has another one.

        One with an accepted label stays as it is: the label was drawn on it.
        """
        case, last = self._objects.get(entry.uid), self._holdings.last
        if case is None or not Path(super().get_image_uri(entry.uid)).is_file():
            return True
        note, held = case.image.info.get(NOTE) or {}, FINAL in case.labels
        if "changed" in note and held:
            return False
        changed = self._volumes.changed(entry, note, told=last.told if last else time.time())
        if changed and held:
            logger.warning("Image %s: %s", entry.uid, _HELD)
            super().update_image_info(entry.uid, {NOTE: {**note, "changed": _HELD}})
        return changed and not held

    def _fetch(self, entry: SeriesEntry) -> None:
        """Fetch an image, alone with it; where it has changed, its labels go to the history."""
        series, fetched = self._volumes.fetch(entry)
        with self._series_files.scratch(f"{entry.uid}.nii") as scratch, self._in_copy():
            path = scratch / f"{entry.uid}.nii"
            save_volume(series, path)
            case = self._objects.get(entry.uid)
            if case is not None and not fetched.same(case.image.info.get(NOTE) or {}):
                self._seg_files.forget(entry.uid)
                super().remove_image(entry.uid)
            super().add_image(entry.uid, str(path), {**described(entry), NOTE: fetched.record()})
        if any(self._labels.glob(f"*/{entry.uid}.*")):
            self.refresh()  # labels of an image that was removed by hand count again

    def _series_of(self, image_id: str) -> Series:
        """The series that an image was made from."""
        entry = self._holdings.entry(image_id)
        if entry is None:
            raise ImageNotFoundException(f"Image {image_id} not found")
        return self._volumes.series(entry)


def check_info(info: Mapping[str, Any]) -> None:
    """Refuse an info that says what the PACS has.

    Raises:
        InputError: When it does.
    """
    if NOTE in info:
        raise InputError(NOTE, info[NOTE], "the server keeps this itself; leave it out")


def described(entry: SeriesEntry) -> dict[str, Any]:
    """What stock tells of a series in an image's info."""
    return {
        "SeriesInstanceUID": entry.uid,
        "StudyInstanceUID": entry.study,
        "Modality": entry.modality or "UNK",
        "PatientID": entry.patient or "UNK",
        "StudyDate": entry.date or "UNK",
        "StudyTime": entry.time or "UNK",
        "SeriesDescription": entry.description,
    }
