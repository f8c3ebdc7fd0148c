"""The datastore of a PACS: its series are the images, DICOM SEGs the accepted labels, the rest is here.

A working copy on this computer holds what was fetched and all that was saved; an accepted label is safe there
before the PACS is told of it. So what is fetched can be used, and labels can be accepted, while the PACS is
down.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.exception import LabelNotFoundException, MONAILabelException

from apps.samloop.pacs.accepted import NOTE, Accepted, Note, note_of
from apps.samloop.pacs.client import PacsClient
from apps.samloop.pacs.counted import CountedCases
from apps.samloop.pacs.dicomweb import Dicomweb
from apps.samloop.pacs.files import SeriesFiles
from apps.samloop.pacs.holdings import Holdings, Local
from apps.samloop.pacs.images import FINAL, FetchedImages, check_info, described
from apps.samloop.pacs.labelnames import LabelNames
from apps.samloop.pacs.outbox import Outbox
from apps.samloop.pacs.refusals import Refusals
from apps.samloop.pacs.segfiles import SegFiles, labelled, load_writer
from apps.samloop.pacs.segs import sent_facts
from apps.samloop.pacs.volumes import Volumes
from sam_infer.errors import InputError, UnavailableError
from sam_infer.volumes import Image, read_image, read_labelmap

logger = logging.getLogger(__name__)
#: What is told of the DICOM SEG of an accepted label.
WAITING, STORED = "waiting", "stored"


class DicomDatastore(FetchedImages):
    """A PACS as MONAI Label's datastore; see the module, `apps.samloop.pacs.accepted` and docs/dicomweb.md.

    An image's id is its SeriesInstanceUID.

    Args:
        folder: The working copy; it is made.
        labels: Label name -> index of the project.
        client: The PACS's.
        search: What is asked for, as in {"Modality": "CT"}; empty = all series of images.
        read_only: Do not reconcile the index with the files.
        read: Path to image; one that caches spares reading a volume that was just looked at.
    """

    def __init__(
        self,
        folder: str,
        *,
        labels: dict[str, int],
        client: PacsClient,
        search: Mapping[str, str] | None = None,
        read_only: bool = False,
        read: Callable[[Path], Image] = read_image,
    ) -> None:
        work = Path(folder, "pacs")
        self.client = client
        pacs, refusals = Dicomweb(client), Refusals(work / "refused.json")
        names, files = LabelNames(labels), SeriesFiles(pacs, work / "series")
        self._outbox = Outbox(Path(folder, "outbox"), make=self._seg_of, send=pacs.store, sent=self._was_sent)
        self._sends = False
        super().__init__(
            folder,
            labels=labels,
            holdings=Holdings(
                pacs, refusals, search=search or {}, folder=work, known=names.knows, local=self._local
            ),
            files=files,
            volumes=Volumes(pacs, refusals, files),
            segs=SegFiles(pacs, refusals, work / "segs", names),
            read_only=read_only,
            read=read,
        )

    # Life

    def start(self) -> None:
        """Begin to send what waits; for the process that serves."""
        waiting = self._outbox.waiting()
        for image_id, (info, _) in self._local().items():
            note = note_of(info)
            if note is not None and note.series is None and image_id not in waiting:
                self._outbox.put(image_id)  # killed between accepting it and putting it there
        self._sends = True
        self._outbox.start()
        threading.Thread(target=load_writer, name="pacs-writer", daemon=True).start()

    def stop(self) -> None:
        """Send nothing any more; what waits is sent after the next start."""
        self._sends = False
        self._outbox.stop()

    def close(self) -> None:
        """As the base class; nothing is sent any more."""
        self.stop()
        super().close()

    def name(self) -> str:
        """The PACS's URL."""
        return self.client.address.url

    def state(self) -> dict[str, Any]:
        """``reachable``, ``reason`` where it is not, ``waiting``: labels to be sent there. Never blocks."""
        self._holdings.touch()
        reason = self._trouble()
        return {"reachable": reason is None, "reason": reason, "waiting": len(self._outbox.waiting())}

    def status(self) -> dict[str, Any]:
        """As stock, of what the PACS holds now or held when it answered last.

        Beside it ``waiting``, accepted labels that the PACS has not got yet; ``refused``, series that cannot
        be used; ``unavailable``, why the PACS does not answer, where it does not.
        """
        try:
            images, accepted = self._holdings.accepted()
        except UnavailableError:
            images, accepted = {}, {}
        tags: dict[str, int] = {FINAL: len(accepted)} if accepted else {}
        for image_id in images:
            for tag in self._tags(image_id):
                tags[tag] = tags.get(tag, 0) + 1
        last, reason = self._holdings.last, self._trouble()
        return {
            "total": len(images),
            "completed": len(accepted),
            "label_tags": tags,
            "waiting": len(self._outbox.waiting()),
            "refused": len(last.images) - len(images) if last is not None else 0,
            **({"unavailable": reason} if reason is not None else {}),
        }

    def json(self) -> dict[str, Any]:
        """The index as MONAI Label writes it, of all images; ``refused`` says why some series are none."""
        images, accepted = self._holdings.accepted()
        found = super().json()
        objects = {}
        for image_id, entry in images.items():
            known = found["objects"].get(image_id, {"image": {"ext": ".nii", "info": {}}, "labels": {}})
            labels = {tag: label for tag, label in known["labels"].items() if tag != FINAL}
            if image_id in accepted:
                ext = self._final_path(image_id, accepted[image_id]).name[len(image_id) :]
                labels[FINAL] = {"ext": ext, "info": self._final_info(image_id, accepted[image_id])}
            image = {**known["image"], "info": {**known["image"].get("info", {}), **described(entry)}}
            objects[image_id] = {"image": image, "labels": labels}
        last, reason = self._holdings.last, self._trouble()
        refused = self._holdings.refused(last) if last is not None else {}
        told = {"unavailable": reason} if reason is not None else {}
        return {**found, "objects": objects, "refused": refused, **told}

    # Images

    def list_images(self) -> list[str]:
        """Series of images that can be used, as far as is known.

        Raises:
            UnavailableError: When the PACS has never answered.
        """
        return list(self._holdings.images())

    def get_unlabeled_images(
        self, label_tag: str | None = None, labels: list[str] | None = None
    ) -> list[str]:
        """Those of `list_images` without an accepted label."""
        images, accepted = self._holdings.accepted()
        return [image_id for image_id in images if image_id not in accepted]

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Those of `list_images` with an accepted label."""
        return list(self._holdings.accepted()[1])

    # Labels

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        """The labels of an image: tag -> id, which is the image's."""
        tags = self._tags(image_id)
        if self._holdings.entry(image_id) is not None and self._holdings.accepted_of(image_id) is not None:
            tags.append(FINAL)
        return dict.fromkeys(tags, image_id)

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """The file of a label; "" where there is none.

        Args:
            label_id: The image's id; for the accepted label also the SeriesInstanceUID of a DICOM SEG in the
                PACS, of this server or not.
            label_tag: Its tag.

        Raises:
            NoVolumeError: When the DICOM SEG cannot be used.
            UnavailableError: When the PACS is needed and does not answer.
        """
        if label_tag != FINAL:
            return super().get_label_uri(label_id, label_tag)
        found = self._final(label_id)
        return str(self._final_file(*found)) if found is not None else ""

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        """What is known of a label, fetched or not; see `get_label_uri`.

        Of an accepted one ``dicom_seg``: ``state`` ("stored" in the PACS or "waiting"), ``series``,
        ``reason`` why it waits. Of one of the PACS ``segments``, and ``unknown``: those that are no label of
        the project.

        Raises:
            LabelNotFoundException: When there is no such label.
        """
        if label_tag != FINAL:
            return super().get_label_info(label_id, label_tag)
        found = self._final(label_id)
        if found is None:
            raise LabelNotFoundException(f"Label {label_id} of tag {label_tag} not found")
        return self._final_info(*found)

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]
    ) -> str:
        """Save a label; an accepted one (final) is sent to the PACS too, now or when it answers again.

        Raises:
            ImageNotFoundException: When there is no such image.
            InputError: As `SafeDatastore.save_label`.
            UnavailableError: When the image is not here and the PACS does not answer.
        """
        self._fetched(image_id)
        if label_tag != FINAL:
            with self._in_copy():
                return super().save_label(image_id, label_filename, label_tag, label_info)
        with self._series_files.locked(f"{image_id}.label"):
            known = tuple(facts.seg for facts in self._holdings.segs_of(image_id))
            noted = {**label_info, NOTE: Note(known=known).record()}
            with self._in_copy():
                super().save_label(image_id, label_filename, label_tag, noted)
            self._outbox.put(image_id, self._try_seg_of(image_id))
        if self._sends:
            self._outbox.deliver(image_id)
        return image_id

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Take a label out; an accepted one only while the PACS has not got it.

        Raises:
            InputError: (409) When the label is a DICOM SEG in the PACS.
            LabelNotFoundException: When there is no such label.
        """
        if label_tag == FINAL:
            found = self._final(label_id)
            told = self._final_info(*found)["dicom_seg"] if found is not None else {}
            if told.get("state") == STORED:
                remedy = (
                    f"its DICOM SEG is in the PACS: delete series {told['series']} there ({self.name()}), or "
                    "accept another label"
                )
                raise InputError("label", label_id, remedy, status=409)
            self._outbox.drop(label_id)
        super().remove_label(label_id, label_tag)

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Merge ``info`` into a label's info.

        Raises:
            InputError: (409) When the label is one that others stored in the PACS.
        """
        check_info(info)
        found = self._final(label_id) if label_tag == FINAL else None
        if found is not None and found[1].seg is not None:
            remedy = "it was stored in the PACS by others; accept it here to note something with it"
            raise InputError("label", label_id, remedy, status=409)
        super().update_label_info(found[0] if found else label_id, label_tag, info)

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """The accepted cases with image and label, fetched where they are not here; see the base class.

        A case that cannot be had is left out, with a warning.
        """
        images, accepted = self._holdings.accepted(wait=True)
        cases = []
        for image_id, label in accepted.items():
            try:
                files = Path(self._image_of(images[image_id])), self._final_file(image_id, label)
            except (InputError, UnavailableError, MONAILabelException, OSError) as error:
                logger.warning("Case %s is left out: %s", image_id, error)
                continue
            image, file = (path if full_path else path.relative_to(self._root) for path in files)
            cases.append({"image": str(image), "label": str(file)})
        return cases

    def seg_file(
        self, image_id: str, label: Path, *, names: Mapping[int, str], info: Mapping[str, Any]
    ) -> bytes:
        """A label map of an image as DICOM SEG; nothing is stored.

        Args:
            image_id: The image, which was fetched.
            label: The label map.
            names: Value -> label name.
            info: Who made it, ``user``, and with what, ``model``.

        Raises:
            InputError: When the label map is not the image's.
            UnavailableError: When the PACS is needed and does not answer.
        """
        with self._in_copy():
            image = self._read(Path(self.get_image_uri(image_id)))
        return labelled(read_labelmap(label, image), self._series_of(image_id), names, info)

    def counted(self) -> CountedCases:
        """The cases as they can be counted without fetching any."""
        images, accepted = self._holdings.accepted(wait=True)
        paths = {name: str(self._final_path(name, label)) for name, label in accepted.items()}
        return CountedCases(accepted=paths, unlabelled=tuple(name for name in images if name not in accepted))

    # Which label counts

    def _trouble(self) -> str | None:
        reason = self._holdings.trouble()
        return f"{self.client.what}: {reason}" if reason is not None else None

    def _local(self) -> Local:
        waiting = self._outbox.waiting()
        return {
            image_id: (case.labels[FINAL].info, image_id in waiting)
            for image_id, case in self._objects.items()
            if FINAL in case.labels
        }

    def _tags(self, image_id: str) -> list[str]:
        case = self._objects.get(image_id)
        return [tag for tag in case.labels if tag != FINAL] if case is not None else []

    def _final(self, label_id: str) -> tuple[str, Accepted] | None:
        """Image and accepted label of an id, which is the image's or that of a DICOM SEG."""
        facts = self._holdings.seg(label_id)
        if facts is None:
            known = self._holdings.entry(label_id) is not None
            label = self._holdings.accepted_of(label_id) if known else None
            return (label_id, label) if label is not None else None
        if facts.image is None or self._holdings.entry(facts.image) is None:
            return None
        info, waiting = self._local().get(facts.image, ({}, False))
        note = note_of(info)
        own = note is not None and note.series == label_id and not waiting
        return facts.image, Accepted(seg=None if own else facts)

    def _final_path(self, image_id: str, label: Accepted) -> Path:
        if label.seg is None:
            return Path(super().get_label_uri(image_id, FINAL))
        return self._seg_files.path(image_id, label.seg)

    def _final_file(self, image_id: str, label: Accepted) -> Path:
        if label.seg is not None:
            self._fetched(image_id)
            self._seg_files.fetch(image_id, label.seg, lambda: self._series_of(image_id))
        return self._final_path(image_id, label)

    def _final_info(self, image_id: str, label: Accepted) -> dict[str, Any]:
        if label.seg is not None:
            told = {"state": STORED, "series": label.seg.seg, "reason": None}
            return {"ts": int(label.seg.made), "dicom_seg": told, **self._seg_files.info(label.seg)}
        info = super().get_label_info(image_id, FINAL)
        series = (note_of(info) or Note()).series
        told = {"state": STORED, "series": series, "reason": None}
        if series is None or image_id in self._outbox.waiting():
            reason = self._outbox.reason(image_id) or "it is about to be sent"
            told = {"state": WAITING, "series": None, "reason": reason}
        return {**{key: value for key, value in info.items() if key != NOTE}, "dicom_seg": told}

    # What is sent

    def _try_seg_of(self, image_id: str) -> bytes:
        try:
            return self._seg_of(image_id)
        except (InputError, UnavailableError) as error:
            logger.warning("The DICOM SEG of %s is to be made later: %s", image_id, error)
            return b""

    def _seg_of(self, image_id: str) -> bytes:
        """The accepted label of an image as DICOM SEG."""
        names = {index: name for name, index in self._label_indices.items()}
        info = super().get_label_info(image_id, FINAL)
        return self.seg_file(image_id, Path(super().get_label_uri(image_id, FINAL)), names=names, info=info)

    def _was_sent(self, image_id: str, content: bytes) -> None:
        facts = sent_facts(content)
        self._holdings.sent(facts)
        case = self._objects.get(image_id)
        if case is not None and FINAL in case.labels:
            known = (note_of(case.labels[FINAL].info) or Note()).known
            note = Note(series=facts.seg, known=known)
            super().update_label_info(image_id, FINAL, {NOTE: note.record()})
