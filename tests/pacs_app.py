"""The application in this process over a DICOMweb server, with an engine that is right by eye."""

from __future__ import annotations

import gzip
import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from requests_toolbelt.multipart import decoder

from sam_infer.dicom.seg import write_seg
from sam_infer.dicom.series import read_series
from tests.dicom_data import write_series

LABELS = {"liver": 1, "spleen": 2, "aorta": 3}
#: What is bright in the volumes of `scan`.
BLOCK = np.zeros((24, 20, 6), bool)
BLOCK[4:10, 5:9, 1:5] = True


@contextmanager
def application(url: str, data: Path, **settings: Any) -> Iterator[Any]:
    """A client of the application.

    Args:
        url: The studies.
        data: Where working copies are kept, and sessions.
        **settings: Of MONAI Label, without its prefix.
    """
    from fastapi.testclient import TestClient
    from monailabel import config
    from monailabel.interfaces.utils.app import clear_cache

    import sam_infer.engines.registry as registry
    from apps.samloop import home, serve
    from tests.fakes import ThresholdEngine

    with pytest.MonkeyPatch.context() as patch:
        create, engine = registry.create_engine, ThresholdEngine()
        patch.setattr(
            registry,
            "create_engine",
            lambda name, **how: engine if name == "bundled" else create(name, **how),
        )
        conf = {"labels": ",".join(LABELS)}
        patch.setenv(home.DATA_DIR, str(data))
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
        for name, value in serve.settings_of(studies=url, conf=conf, port=8000).items():
            patch.setenv(name, value)
        known = config.Settings(**{f"MONAI_LABEL_{name}": value for name, value in settings.items()})
        known.MONAI_LABEL_SESSION_PATH = str(data / "sessions")
        for name, value in known.model_dump().items():
            patch.setattr(config.settings, name, value)
        patch.setattr(config.settings, "__pydantic_fields_set__", set(known.model_fields_set))
        clear_cache()
        from apps.samloop.server import create_app

        with TestClient(create_app(), raise_server_exceptions=False) as client:
            while client.get("/ready").json()["checks"]["engine"] != "ok":
                time.sleep(0.02)
            yield client
        clear_cache()


def store() -> Any:
    """The datastore of the application that runs."""
    from monailabel.interfaces.utils.app import app_instance

    return app_instance().datastore()


def pacs_store(url: str, folder: Path, **options: Any) -> Any:
    """The datastore over a DICOMweb server, as a process that does not serve has it."""
    from apps.samloop.pacs.address import address_of
    from apps.samloop.pacs.client import PacsClient
    from apps.samloop.pacs.store import DicomDatastore

    return DicomDatastore(str(folder), labels=LABELS, client=PacsClient(address_of(url)), **options)


def until(client: Any, wanted: Any, *keys: str) -> dict[str, Any]:
    """GET /datastore/ again and again until it tells something; fails after some time.

    Args:
        client: Of the application.
        wanted: What is waited for.
        *keys: Where it is told.
    """
    for _ in range(300):
        found = client.get("/datastore/").json()
        if [found.get(key) for key in keys] == (wanted if len(keys) > 1 else [wanted]):
            return found
        time.sleep(0.05)
    pytest.fail(f"{keys} never became {wanted}: {found}")


def accept(client: Any, image: str, labelmap: np.ndarray, affine: np.ndarray, **params: Any) -> Any:
    """PUT a label map (I, J, K) as the accepted label of an image; the reply."""
    content = nib.Nifti1Image(labelmap.astype(np.uint8), affine).to_bytes()
    files = {"label": ("label.nii", content)}
    return client.put(
        "/datastore/label", params={"image": image}, data={"params": json.dumps(params)}, files=files
    )


def downloaded(reply: Any) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine of a NIfTI reply."""
    assert reply.status_code == 200, reply.text
    content = reply.content
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    image = nib.Nifti1Image.from_bytes(content)
    return np.asarray(image.dataobj), image.affine


def clicked(client: Any, image: str, point: list[int], label: str = "liver", **params: Any) -> Any:
    """What a click finds: (JSON, voxels, affine)."""
    asked = {"foreground": [point], "label": label, "result_extension": ".nii", **params}
    reply = client.post(
        "/infer/sam_click_3d", params={"image": image, "output": "all"}, data={"params": json.dumps(asked)}
    )
    assert reply.status_code == 200, reply.text
    parts = decoder.MultipartDecoder(reply.content, reply.headers["content-type"]).parts
    found = nib.Nifti1Image.from_bytes(parts[1].content)
    return json.loads(parts[0].text), np.asarray(found.dataobj), found.affine


def scan(folder, values=None, **options):
    """Files of a volume with a bright block, and its SeriesInstanceUID."""
    values = np.where(BLOCK, 200, -1000) if values is None else values
    files = write_series(folder, values.astype(np.int16), **options)
    return files, str(pydicom.dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID)


def foreign(folder, labelmap, names, *, date="20200101", creator="somebody"):
    """A DICOM SEG of the series in a folder, as another program would store it; and its SeriesInstanceUID."""
    content = write_seg(
        np.asfortranarray(labelmap, np.uint8),
        read_series(folder),
        names=names,
        description="elsewhere",
        creator=creator,
        algorithm=None,
    )
    data = pydicom.dcmread(io.BytesIO(content))
    data.ContentDate, data.ContentTime = date, "120000"
    buffer = io.BytesIO()
    data.save_as(buffer, write_like_original=False)
    return buffer.getvalue(), str(data.SeriesInstanceUID)


def accepted(client, uid):
    """Voxels of the accepted label of an id."""
    return downloaded(client.get("/datastore/label", params={"label": uid, "tag": "final"}))[0]


def accepted_info(client, uid):
    """What is told of it."""
    return client.get("/datastore/label/info", params={"label": uid, "tag": "final"}).json()
