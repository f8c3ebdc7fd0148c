"""The datastore of a PACS as MONAI Label's settings describe it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from monailabel.config import settings

from apps.samloop.pacs.address import configured_address
from apps.samloop.pacs.client import PacsClient
from apps.samloop.pacs.store import DicomDatastore
from sam_infer.volumes import Image

_FILTER = "MONAI_LABEL_DICOMWEB_SEARCH_FILTER"


def dicom_datastore(
    url: str, folder: Path, labels: dict[str, int], read: Callable[[Path], Image]
) -> DicomDatastore:
    """The datastore over a DICOMweb server; the server need not answer.

    Args:
        url: The DICOMweb root.
        folder: The working copy.
        labels: Label name -> index of the project.
        read: Path to image.
    """
    return DicomDatastore(
        str(folder),
        labels=labels,
        client=PacsClient(configured_address(url)),
        # Stock's own is {"Modality": "CT"}; here nothing is left out that nobody asked to be.
        search=getattr(settings, _FILTER) if _FILTER in settings.model_fields_set else {},
        read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        read=read,
    )
