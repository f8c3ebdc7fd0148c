"""What a PACS holds: series of images, segmentations of them, and which label counts for an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from apps.samloop.pacs.accepted import Accepted, accepted_label
from apps.samloop.pacs.dicomweb import Dicomweb, SeriesEntry, is_uid
from apps.samloop.pacs.listing import WAIT, Listing, Snapshot
from apps.samloop.pacs.refusals import Refusals
from apps.samloop.pacs.segs import SegFacts, SegIndex

#: Modalities of series that are no images: segmentations, plans, reports, presentations, measurements.
NO_IMAGES = frozenset(
    (
        *("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "RTRECORD", "RTINTENT", "RTSEGANN", "RTRAD"),
        *(
            "SR",
            "PR",
            "KO",
            "REG",
            "DOC",
            "AU",
            "ECG",
            "EPS",
            "HD",
            "RESP",
            "EMG",
            "EOG",
            "EEG",
            "RWV",
            "FID",
        ),
        *("PLAN", "STAIN", "SMR", "M3D", "TEXTUREMAP", "ANN", "ASMT", "CTPROTOCOL", "XAPROTOCOL", "POS"),
        *("IOL", "KER", "LEN", "VA", "SRF"),
    )
)
#: By image, the labels that were saved here: info, and whether it is still to be sent.
Local = Mapping[str, tuple[Mapping[str, Any], bool]]


class Holdings:
    """What a PACS holds, now or when it answered last.

    Args:
        pacs: Its services.
        refusals: Series that cannot be used.
        search: What is asked for, as in {"Modality": "CT"}; empty = all series.
        folder: Where what was learned survives a restart.
        known: Names that labels of the project have; a segmentation with none of them is no label here.
        local: Gives the labels that were saved here.
    """

    def __init__(
        self,
        pacs: Dicomweb,
        refusals: Refusals,
        *,
        search: Mapping[str, str],
        folder: Path,
        known: Callable[[str], bool],
        local: Callable[[], Local],
    ) -> None:
        self._pacs = pacs
        self._refusals = refusals
        self._search = dict(search)
        self._known = known
        self._local = local
        self._grouped: tuple[object, object, dict[str, list[SegFacts]]] | None = None
        self.segs = SegIndex(pacs.metadata, path=folder / "segs.jsonl")
        self._listing = Listing(self._fetch, path=folder / "series.json", client=pacs.client)

    @property
    def last(self) -> Snapshot | None:
        """What the PACS listed last, however old; None where it never has."""
        return self._listing.last

    def touch(self) -> None:
        """Have the PACS asked again where that is due; does not wait."""
        self._listing.touch()

    def trouble(self) -> str | None:
        """Why what is known may be old; None while the PACS answers."""
        return self._pacs.client.down or self._listing.trouble()

    def usable(self, snapshot: Snapshot) -> dict[str, SeriesEntry]:
        """Series of images that can be used, as far as is known."""
        refused = self.refused(snapshot)
        return {uid: entry for uid, entry in snapshot.images.items() if uid not in refused}

    def refused(self, snapshot: Snapshot) -> dict[str, str]:
        """Series of images that cannot be used, and why."""
        return self._refusals.reasons(snapshot.images.values())

    def images(self) -> dict[str, SeriesEntry]:
        """Series of images that can be used.

        Raises:
            UnavailableError: When the PACS has never answered.
        """
        return self.usable(self._listing.current())

    def entry(self, image_id: str) -> SeriesEntry | None:
        """A series of images; None where there is none.

        Raises:
            UnavailableError: When that cannot be known.
        """
        last = self._listing.last
        if last is not None and image_id in last.images:
            self._listing.touch()
            return last.images[image_id]
        if not is_uid(image_id):
            return None
        found = self._listing.current().images.get(image_id)
        reason = self._listing.trouble()
        if found is None and reason is not None:  # it may have come since the PACS answered last
            raise self._pacs.client.unavailable(reason)
        return found

    def seg(self, seg: str) -> SegFacts | None:
        """What is known of a segmentation's series; None where there is none."""
        last = self._listing.last
        if last is not None and seg in last.images:
            return None
        entry = self._segs_learned().segs.get(seg)
        return self.segs.get(entry) if entry is not None else None

    def sent(self, facts: SegFacts) -> None:
        """A segmentation was sent to the PACS: it is there, whenever the PACS lists it."""
        self.segs.add(facts)
        self._listing.sent(facts.entry)

    def segs_of(self, image_id: str) -> list[SegFacts]:
        """Segmentations of an image, as far as is known without asking."""
        last = self._listing.last
        return self._by_image(last).get(image_id, []) if last is not None else []

    def accepted(self, *, wait: bool = False) -> tuple[dict[str, SeriesEntry], dict[str, Accepted]]:
        """Series of images that can be used, and the label that counts of those that have one.

        Args:
            wait: For the PACS's list, and until all segmentations are known; else for a moment.

        Raises:
            UnavailableError: When the PACS has never answered.
        """
        snapshot = self._segs_learned(patient=wait)
        images, local = self.usable(snapshot), self._local()
        having = [name for name in images if name in local or name in self._by_image(snapshot)]
        labels = {name: self._accepted(name, snapshot, local) for name in having}
        return images, {name: label for name, label in labels.items() if label is not None}

    def accepted_of(self, image_id: str) -> Accepted | None:
        """The label that counts for an image; None where it has none.

        Raises:
            UnavailableError: When the PACS has never answered.
        """
        return self._accepted(image_id, self._segs_learned(), self._local())

    def _accepted(self, image_id: str, snapshot: Snapshot, local: Local) -> Accepted | None:
        info, waiting = local.get(image_id, (None, False))
        segs = self._by_image(snapshot).get(image_id, ())
        return accepted_label(info, segs, waiting=waiting, listed=snapshot.segs)

    def _segs_learned(self, *, patient: bool = False) -> Snapshot:
        snapshot = self._listing.current(patient=patient)
        self.segs.learn(snapshot.segs, seconds=None if patient else WAIT)
        return snapshot

    def _by_image(self, snapshot: Snapshot) -> dict[str, list[SegFacts]]:
        """Segmentations that hold a label of the project, by the image that they belong to."""
        mark = (self.segs.version, self._refusals.version)
        if self._grouped is not None and self._grouped[0] is snapshot.segs and self._grouped[1] == mark:
            return self._grouped[2]
        refused = self._refusals.reasons(snapshot.segs.values())
        found: dict[str, list[SegFacts]] = {}
        for facts in filter(None, map(self.segs.get, snapshot.segs.values())):
            if facts.image is not None and facts.seg not in refused and any(map(self._known, facts.names)):
                found.setdefault(facts.image, []).append(facts)
        self._grouped = snapshot.segs, mark, found
        return found

    def _fetch(self) -> tuple[list[SeriesEntry], list[SeriesEntry]]:
        found = self._pacs.series(self._search)
        images = [entry for entry in found if entry.modality not in NO_IMAGES]
        segs = self._pacs.series({"Modality": "SEG"}) if self._search else found
        return images, [entry for entry in segs if entry.modality == "SEG"]
