"""What is asked of a PACS, in DICOMweb's words: lists of series, a series' files, storing a file.

`dicomweb_client` is not used for these: it has no timeouts, does not tell that a list goes on (the Warning
header), takes an answer that broke off for a whole one, and holds a series in memory.
"""

from __future__ import annotations

import io
import json
import logging
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydicom
from pydicom.errors import InvalidDicomError

from apps.samloop.pacs.client import PacsClient, RefusedError
from apps.samloop.pacs.multipart import BrokenError, boundary_of, multipart_body, save_parts

JSON = "application/dicom+json"
#: As the PACS has them stored: one that cannot decode what it holds would otherwise answer an error.
FILES = 'multipart/related; type="application/dicom"; transfer-syntax=*'
ANY_FILES = 'multipart/related; type="application/dicom"'
#: What a list of series is asked for, beside what belongs to it anyway.
_FIELDS = ("00080020", "00080021", "00080030", "00080031", "0008103E", "00100020", "00201209")
#: A list this long may go on although no header says so.
_PAGE = 100
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
logger = logging.getLogger(__name__)
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SeriesEntry:
    """A series as a list of the PACS tells of it; what it does not tell is "" or None.

    Args:
        uid: SeriesInstanceUID.
        study: StudyInstanceUID.
        modality: As in DICOM.
        count: Number of instances.
        patient: PatientID.
        date: StudyDate.
        time: StudyTime.
        description: SeriesDescription.
    """

    uid: str
    study: str
    modality: str
    count: int | None = None
    patient: str = ""
    date: str = ""
    time: str = ""
    description: str = ""

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def is_uid(value: object) -> bool:
    """Whether a value is a DICOM UID: it can be a file's name."""
    return isinstance(value, str) and len(value) <= 64 and bool(_UID.fullmatch(value))


class Dicomweb:
    """The services of a PACS.

    Args:
        client: Its connection.
    """

    def __init__(self, client: PacsClient) -> None:
        self.client = client

    def series(self, filters: Mapping[str, str]) -> list[SeriesEntry]:
        """All series that match; for a thread that nobody waits for.

        Raises:
            UnavailableError: When the PACS does not answer, or with something else than a list.
        """
        found: dict[str, SeriesEntry] = {}
        rows: list[Row] = []
        more = True
        while more:
            page, told = self._rows("series", [*filters.items(), *_paged(len(rows))], patient=True)
            known = len(found)
            for entry in filter(None, map(_series, page)):
                found.setdefault(entry.uid, entry)
            rows += page
            # A PACS that does not know offset sends the same again.
            more = len(found) > known and (told or len(page) >= _PAGE)
        return list(found.values())

    def find(self, uid: str) -> SeriesEntry | None:
        """One series; None where there is none.

        Raises:
            UnavailableError: See `series`.
        """
        rows, _ = self._rows("series", [("SeriesInstanceUID", uid), *_paged(0)])
        return next((entry for entry in filter(None, map(_series, rows)) if entry.uid == uid), None)

    def instances(self, entry: SeriesEntry) -> set[str]:
        """SOPInstanceUIDs of a series; empty where the PACS has no such series.

        Raises:
            UnavailableError: See `series`.
        """
        path = f"studies/{entry.study}/series/{entry.uid}/instances"
        found: set[str] = set()
        asked, more = 0, True
        while more:
            page, told = self._rows(path, [("offset", str(asked))] if asked else [])
            uids = {_text(row, "00080018") for row in page}
            more = not uids <= found and (told or len(page) >= _PAGE)
            found |= {uid for uid in uids if is_uid(uid)}
            asked += len(page)
        return found

    def metadata(self, entry: SeriesEntry) -> list[pydicom.Dataset]:
        """The headers of a series' instances.

        Raises:
            UnavailableError: See `series`.
        """
        path = f"studies/{entry.study}/series/{entry.uid}/metadata"
        rows = self._json(self.client.get("wado", path, accept=JSON), path)
        try:
            return [pydicom.Dataset.from_json(_small(row)) for row in rows]
        except Exception as error:  # whatever pydicom makes of damaged values
            raise self.client.unavailable(f"it sent damaged headers ({error})") from error

    def download(self, entry: SeriesEntry, folder: Path, *, instance: str = "") -> list[Path]:
        """Fetch the files of a series as they are stored, named by SOPInstanceUID.

        Args:
            entry: The series.
            folder: Where to, an empty one.
            instance: Only this one.

        Raises:
            RefusedError: When the PACS answers with an error.
            UnavailableError: When it does not answer, or with what are not whole files of the series.
        """
        path = f"studies/{entry.study}/series/{entry.uid}" + (f"/instances/{instance}" if instance else "")
        try:
            response = self.client.get("wado", path, accept=FILES)
        except RefusedError as error:
            if error.status not in (400, 406):
                raise
            response = self.client.get("wado", path, accept=ANY_FILES)
        pieces = self.client.pieces(response)
        try:
            boundary = boundary_of(response.headers.get("content-type", ""))
            if boundary is not None:
                parts = save_parts(pieces, boundary, folder)
            else:
                parts = [folder / "part-0"]
                with parts[0].open("wb") as file:
                    file.writelines(pieces)
            return [_named(part, entry.uid) for part in parts]
        except BrokenError as error:
            raise self.client.unavailable(f"its answer to {path} is damaged ({error})") from error
        finally:
            response.close()

    def store(self, content: bytes) -> None:
        """Store a DICOM file; returns when the PACS has said that it holds it.

        Raises:
            RefusedError: When the PACS does not take it.
            UnavailableError: When it does not answer.
        """
        header = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
        # What is sent to a PACS that hangs may be taken when it wakes; so nothing is, before it answers.
        self.client.content(self.client.get("qido", "studies", accept=JSON, params=[("limit", "1")]))
        body, kind = multipart_body(content, uuid.uuid4().hex)
        headers = {"Accept": JSON, "Content-Type": kind}
        response = self.client.send("POST", "stow", "studies", headers=headers, body=body)
        status = response.status_code
        if status != 409:
            self.client.checked(response, "studies")
        told = self.client.content(response)
        reason = _failure(told)
        if reason is None and status != 409:
            if str(header.SOPInstanceUID).encode() in told:
                return
            entry = SeriesEntry(
                uid=str(header.SeriesInstanceUID), study=str(header.StudyInstanceUID), modality="SEG"
            )
            if str(header.SOPInstanceUID) in self.instances(entry):
                return
        text = f"it did not store the file ({reason or 'and does not say why'})"
        raise RefusedError(self.client.what, text, "look into its log", status=status)

    def _rows(
        self, path: str, params: list[tuple[str, str]], *, patient: bool = False
    ) -> tuple[list[Row], bool]:
        """A page of a search, and whether its header says that there is more."""
        response = self.client.get("qido", path, accept=JSON, params=params, patient=patient)
        warning = response.headers.get("warning", "")
        return self._json(response, path), warning.startswith("299") and "additional" in warning.lower()

    def _json(self, response: Any, path: str) -> list[Row]:
        """A list of datasets in DICOM's JSON."""
        content = self.client.content(response)
        try:
            rows = json.loads(content) if content.strip() else []
        except (ValueError, RecursionError) as error:
            kind = response.headers.get("content-type", "nothing known")
            raise self.client.unavailable(f"its answer to {path} is not JSON but {kind}") from error
        rows = [rows] if isinstance(rows, dict) else rows
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise self.client.unavailable(f"its answer to {path} is not a list of datasets")
        return rows


def _paged(offset: int) -> Iterator[tuple[str, str]]:
    for field in _FIELDS:
        yield "includefield", field
    if offset:
        yield "offset", str(offset)


def _failure(answer: bytes) -> str | None:
    """Why a PACS says that it did not store what it was sent; None where it says nothing of the kind."""
    try:
        told = json.loads(answer)
        told = told[0] if isinstance(told, list) else told
        failed = told.get("00081198", {}).get("Value") or []
    except (ValueError, AttributeError, IndexError):
        return None
    codes = sorted({str(_value(item, "00081197")) for item in failed})
    return f"failure reason {', '.join(codes)}" if codes else None


def _small(row: Row) -> dict[str, Any]:
    """A dataset without what would have to be fetched by itself: pixels and the like."""
    return {tag: element for tag, element in row.items() if "BulkDataURI" not in element}


def _named(part: Path, series: str) -> Path:
    """A part under its SOPInstanceUID, if it is a file of the series."""
    try:
        header = pydicom.dcmread(part, stop_before_pixels=True)
        own, found = str(header.SOPInstanceUID), str(header.SeriesInstanceUID)
    except (InvalidDicomError, AttributeError, ValueError, KeyError, EOFError, OSError) as error:
        raise BrokenError(f"a part is no DICOM file: {error}") from error
    if found != series or not is_uid(own):
        raise BrokenError(f"a part belongs to series {found}")
    return part.rename(part.with_name(f"{own}.dcm"))


def _series(row: Row) -> SeriesEntry | None:
    uid, study = _text(row, "0020000E"), _text(row, "0020000D")
    if not is_uid(uid) or not is_uid(study):
        logger.warning("Not served: the PACS lists series %r of study %r, which are no UIDs", uid, study)
        return None
    count = _value(row, "00201209")
    return SeriesEntry(
        uid=uid,
        study=study,
        modality=_text(row, "00080060"),
        count=int(count) if str(count).isdigit() else None,
        patient=_text(row, "00100020"),
        date=_text(row, "00080020") or _text(row, "00080021"),
        time=_text(row, "00080030") or _text(row, "00080031"),
        description=_text(row, "0008103E"),
    )


def _value(row: Row, tag: str) -> Any:
    """The first value of a tag; None where there is none, or the row is damaged."""
    element = row.get(tag) if isinstance(row, Mapping) else None
    values = element.get("Value") if isinstance(element, Mapping) else None
    return values[0] if isinstance(values, list) and values else None


def _text(row: Row, tag: str) -> str:
    value = _value(row, tag)
    return str(value) if isinstance(value, str | int | float) else ""
