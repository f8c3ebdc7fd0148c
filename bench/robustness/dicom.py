"""Probes of a server over a PACS: Orthanc with two CT series and one MR series."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import requests

from bench.robustness.subject import Subject, short, timed, told, watched
from sam_infer.volumes import read_image
from tests.dicom_data import write_series
from tests.orthanc import Orthanc
from trainers.phantoms import make_phantom

LABEL_INFO = [{"name": "liver", "idx": 1}, {"name": "kidney_right", "idx": 3}]
#: Seconds after which a PACS that is back must be noticed.
RECOVERY = 60.0
#: Seconds after which an answer of a server whose PACS is down is not waited for.
DOWN_PATIENCE = 45.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """A server over an Orthanc of its own.

    Args:
        subject: The server.
        orthanc: Its PACS.
        ct: SeriesInstanceUIDs of the two CT series.
        mr: That of the MR series.
        fresh: Starts another server over the same PACS, with a folder of its own of that name.
    """

    subject: Subject
    orthanc: Orthanc
    ct: tuple[str, str]
    mr: str
    fresh: Callable[[str], AbstractContextManager[Subject]]


def fill(orthanc: Orthanc, folder: Path) -> tuple[str, ...]:
    """Store the three series; their SeriesInstanceUIDs."""
    uids = []
    for n, modality in enumerate(("CT", "CT", "MR")):
        array, _, _ = make_phantom(n, (64, 64, 16))
        patient = f"P{n}"
        files = write_series(folder / patient, array.astype(np.int16), modality=modality, patient=patient)
        orthanc.stow(files)
        uids.append(str(pydicom.dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID))
    return tuple(uids)


def _label(place: Place, series: str, values: tuple[int, ...]) -> bytes:
    """A label map with a block of each value, on the image as the server serves it."""
    reply = place.subject.send("GET", f"/datastore/image?image={series}")
    reply.raise_for_status()
    image = _read(reply.content)
    labels = np.zeros(image.shape[:3], np.uint8)
    for n, value in enumerate(values):
        labels[4 + 10 * n : 12 + 10 * n, 10:20, 2:8] = value
    return nib.Nifti1Image(labels, image.affine).to_bytes()


def _read(content: bytes) -> Any:
    with tempfile.NamedTemporaryFile(suffix=".nii.gz" if content[:2] == b"\x1f\x8b" else ".nii") as file:
        file.write(content)
        file.flush()
        image = nib.Nifti1Image.from_filename(file.name)
        return nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine)


def _values(reply: requests.Response) -> str:
    if not reply.ok:
        return told(reply)
    found = sorted(set(np.unique(np.asanyarray(_read(reply.content).dataobj)).tolist()) - {0})
    return f"{reply.status_code}, values {found}"


def _counts(place: Place) -> str:
    found = place.subject.send("GET", "/info/").json()["datastore"]
    return f"total {found['total']}, completed {found['completed']}"


def _segs(place: Place) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(BytesIO(place.orthanc.file(uid))) for uid in place.orthanc.uids(Modality="SEG")]


def _listed(place: Place) -> str:
    objects = place.subject.send("GET", "/datastore/?output=all").json()["objects"]
    return f"{_counts(place)}; MR series {'listed' if place.mr in objects else 'not listed'}"


def _infer(place: Place) -> str:
    said, seconds = timed(lambda: place.subject.infer(f"image={place.ct[0]}&output=image"))
    again = timed(lambda: place.subject.infer(f"image={place.ct[0]}&output=image"))
    return f"{said}, {seconds:.1f} s, then {again[0]}, {again[1]:.1f} s"


def _saved(place: Place) -> str:
    content = _label(place, place.ct[0], (1, 3))
    said = []
    for _ in range(2):
        reply = place.subject.save(f"image={place.ct[0]}", "l.nii", content, {"label_info": LABEL_INFO})
        said.append(f"{told(reply)}: {_counts(place)}")
    return f"first {said[0]}; the same case again {said[1]}"


def _final(place: Place) -> str:
    by_image = place.subject.send("GET", f"/datastore/label?label={place.ct[0]}&tag=final")
    uid = next(iter(place.orthanc.uids(Modality="SEG")), "none")
    by_seg = place.subject.send("GET", f"/datastore/label?label={uid}&tag=final")
    return f"by the image's id {_values(by_image)}; by the SEG's UID {_values(by_seg)}"


def _rebuilt(place: Place) -> str:
    with place.fresh("new") as subject:
        subject.send("GET", "/datastore/?output=train")
        reply = subject.send("GET", f"/datastore/label?label={place.ct[0]}&tag=final")
        if reply.ok:
            return _values(reply)
        found: set[int] = set()
        for path in subject.outside.rglob("labels/final/*.nrrd"):
            found |= set(np.unique(read_image(path).array).tolist())
        return f"{told(reply)}; the file in its cache has values {sorted(found - {0})}"


def _unnamed(place: Place) -> str:
    before = set(place.orthanc.uids(Modality="SEG"))
    content = _label(place, place.ct[0], (1, 3))
    reply = place.subject.save(f"image={place.ct[0]}", "l.nii", content)
    new = [one for one in _segs(place) if one.SeriesInstanceUID not in before]
    names = [str(item.SegmentLabel) for one in new for item in one.SegmentSequence]
    return f"{told(reply)}; segments {', '.join(names) or 'none'}"


def _empty(place: Place) -> str:
    content = _label(place, place.ct[1], ())
    return told(place.subject.save(f"image={place.ct[1]}", "l.nii", content, {"label_info": LABEL_INFO}))


def _unknown(place: Place) -> str:
    content = _label(place, place.ct[0], (1,))
    infer = told(place.subject.infer("image=1.2.3.4"))
    save = told(place.subject.save("image=1.2.3.4", "l.nii", content, {"label_info": LABEL_INFO}))
    return f"infer {infer}; save {save}"


def _none_left(place: Place) -> str:
    subject = place.subject
    for series in (*place.ct, place.mr):
        reply = subject.send("GET", f"/datastore/image?image={series}")
        if reply.ok:
            content = _label(place, series, (1,))
            subject.save(f"image={series}", "l.nii", content, {"label_info": LABEL_INFO[:1]})
    reply = subject.send("POST", f"/activelearning/{_strategy(subject)}", json={})
    return f"{told(reply)} {short(reply.text)}"


def _strategy(subject: Subject) -> str:
    return next(iter(subject.send("GET", "/info/").json()["strategies"]))


def _proxy(place: Place) -> str:
    """Whether the proxy passes on a filter, and what kind of answer is wanted."""
    ask = place.subject.send
    found = ask("GET", "/proxy/dicom/qido/studies?PatientID=NOPE")
    count = len(found.json()) if found.ok and found.content else 0
    (one, *_) = requests.get(f"{place.orthanc.url}/instances", {"SeriesInstanceUID": place.ct[0]}).json()
    study, series, instance = (one[tag]["Value"][0] for tag in ("0020000D", "0020000E", "00080018"))
    path = f"/proxy/dicom/wado/studies/{study}/series/{series}/instances/{instance}/rendered"
    kind = ask("GET", path, headers={"accept": "image/png"}).headers.get("content-type", "")
    return f"?PatientID=NOPE: {told(found)}, {count} studies; Accept: image/png is answered with {kind}"


def _available(place: Place) -> None:
    """Wait until the server uses the PACS."""
    until = time.monotonic() + RECOVERY
    while not place.subject.send("GET", "/proxy/dicom/qido/studies").ok and time.monotonic() < until:
        time.sleep(0.1)


def _down(*, silent: bool) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        _available(place)
        if silent:
            with place.orthanc.silent():
                return _while_down(place.subject)
        place.orthanc.stop()
        try:
            return _while_down(place.subject)
        finally:
            place.orthanc.start()

    return run


def _started_down(place: Place) -> str:
    place.orthanc.stop()
    try:
        with place.fresh("down") as subject:
            return _while_down(subject)
    except RuntimeError:
        return "**does not start**"
    finally:
        place.orthanc.start()


def _while_down(subject: Subject) -> str:
    """Status and seconds of requests, and what the first that fails says."""
    subject = replace(subject, patience=DOWN_PATIENCE)
    acts: dict[str, Callable[[], requests.Response]] = {
        "/info/": lambda: subject.send("GET", "/info/"),
        "list": lambda: subject.send("GET", "/datastore/?output=all"),
        "next case": lambda: subject.send("POST", "/activelearning/random", json={}),
        "infer on a case that is not cached": lambda: subject.infer("image=1.2.3.5"),
        "proxy": lambda: subject.send("GET", "/proxy/dicom/qido/studies"),
    }
    found, reasons = [], []
    for name, act in acts.items():
        said, seconds = timed(act)
        status, _, reason = said.partition(" ") if said[:1].isdigit() else (said, "", "")
        found.append(f"{name} {status} ({seconds:.1f} s)")
        reasons.append(re.sub(r"http://[^ ]*:\d+[^ :]*", "URL", reason))
    reason = next((f"; says: {reason}" for reason in reasons if reason), "")
    return "; ".join(found) + reason


def _blocked(place: Place) -> str:
    """What others wait while one request meets a PACS that is down."""
    _available(place)
    place.orthanc.stop()
    try:
        with watched(place.subject) as waits:
            timed(lambda: place.subject.infer("image=1.2.3.6"))
        return f"slowest /info/ {max(waits):.1f} s"
    finally:
        place.orthanc.start()


def _save_down(place: Place) -> str:
    content = _label(place, place.ct[0], (1, 3))
    before = len(place.orthanc.uids(Modality="SEG"))
    _available(place)
    place.orthanc.stop()
    try:
        said, seconds = timed(
            lambda: place.subject.save(f"image={place.ct[0]}", "l.nii", content, {"label_info": LABEL_INFO})
        )
    finally:
        place.orthanc.start()
    start = time.perf_counter()
    while time.perf_counter() - start < RECOVERY and len(place.orthanc.uids(Modality="SEG")) <= before:
        time.sleep(0.5)
    came = len(place.orthanc.uids(Modality="SEG")) > before
    waited = time.perf_counter() - start
    after = f"sent by itself {waited:.0f} s after the PACS is back" if came else "never sent"
    return f"{short(said, 60)} ({seconds:.1f} s); {after}"


def _back(place: Place) -> str:
    place.orthanc.stop()
    timed(lambda: place.subject.send("GET", "/datastore/?output=all"))
    place.orthanc.start()
    start = time.perf_counter()
    while time.perf_counter() - start < RECOVERY:
        if place.subject.send("GET", "/proxy/dicom/qido/studies").ok:
            return f"answers {time.perf_counter() - start:.1f} s after the PACS is back"
        time.sleep(0.1)
    return f"not within {RECOVERY:.0f} s"


#: Everything that is asked of a server over a PACS, in this order.
PROBES: dict[str, Callable[[Place], str]] = {
    "list: two CT series and an MR series": _listed,
    "infer on a series, the first time and again": _infer,
    "save a label, twice": _saved,
    "get the label back (it was saved with values 1 and 3)": _final,
    "read that label again from the PACS, by a server that has nothing yet": _rebuilt,
    "save without label_info": _unnamed,
    "save an empty label": _empty,
    "infer on, and save for, a series that is not there": _unknown,
    "next case when all are labelled": _none_left,
    "proxy: a filter, and an Accept header": _proxy,
    "PACS down, the lists in the cache": _down(silent=False),
    "PACS takes connections and is silent": _down(silent=True),
    "PACS down: what others wait for /info/ meanwhile": _blocked,
    "PACS down: save an accepted label": _save_down,
    "PACS is back": _back,
    "server started while the PACS is down": _started_down,
}
