"""Which label counts as an image's accepted one: the one saved here, or a segmentation of the PACS.

The newest, by the time at which it was made. A segmentation that was in the PACS when a label was accepted
here was seen, or could be, by whoever accepted: it never comes before that label, whatever time it tells.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apps.samloop.pacs.segs import SegFacts

#: The key of an image's or a label's info under which it is noted what the PACS has of it.
NOTE = "pacs"


@dataclass(frozen=True, kw_only=True)
class Note:
    """What is noted with a label that was accepted here.

    Args:
        series: SeriesInstanceUID of its DICOM SEG; None while it has not been sent.
        known: Segmentations of the image that the PACS had when it was accepted.
    """

    series: str | None = None
    known: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"series": self.series, "known": list(self.known)}


def note_of(info: Mapping[str, Any]) -> Note | None:
    """What is noted in a label's info; None where nothing is, or nothing that can be read."""
    found = info.get(NOTE)
    if not isinstance(found, Mapping):
        return None
    series, known = found.get("series"), found.get("known")
    return Note(
        series=series if isinstance(series, str) else None,
        known=tuple(map(str, known)) if isinstance(known, list) else (),
    )


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """The label that counts.

    Args:
        seg: The segmentation of the PACS; None = the file that was saved here.
    """

    seg: SegFacts | None


def accepted_label(
    local: Mapping[str, Any] | None,
    segs: Sequence[SegFacts],
    *,
    waiting: bool,
    listed: Collection[str],
) -> Accepted | None:
    """Choose the label that counts.

    Args:
        local: Info of the label that was saved here; None where none was.
        segs: The image's segmentations that the PACS lists and that hold a label of the project.
        waiting: Whether the label saved here is still to be sent.
        listed: Series of all segmentations that the PACS holds.

    Returns:
        None where the image has no accepted label.
    """
    newest = max(segs, key=lambda facts: (facts.made, facts.seg), default=None)
    note = note_of(local) if local is not None else None
    if local is None or note is None or not (waiting or note.series in listed):
        return Accepted(seg=newest) if newest is not None else None
    own = next((facts.made for facts in segs if facts.seg == note.series and not waiting), 0.0)
    made = own or float(local.get("ts") or 0.0)
    later = [
        facts
        for facts in segs
        if facts.seg != note.series and facts.seg not in note.known and facts.made > made
    ]
    return Accepted(seg=max(later, key=lambda facts: (facts.made, facts.seg), default=None))
