"""The bundled engine behind the click tasks, on real images."""

import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as PilImage

from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.bundled import BundledEngine
from sam_infer.library import ImageLibrary
from sam_infer.tasks.click import ClickInfer

pytestmark = pytest.mark.real_data


def click(dimension):
    encoder = SliceEncoder(engine=BundledEngine())
    return ClickInfer(encoder=encoder, library=ImageLibrary(limit=1 << 30), dimension=dimension)


def box(truth, k):
    """The roi of the object on slice ``k`` of (I, J, K) bool: [i0, i1, j0, j1, k, k]."""
    i, j = np.nonzero(truth[:, :, k])
    return [int(i.min()), int(i.max()), int(j.min()), int(j.max()), k, k]


def dice(mask, truth):
    return 2 * (mask & truth).sum() / (mask.sum() + truth.sum())


def test_livers_by_a_box_on_a_slice(real_set):
    folder, task, found = real_set("ct_abdomen_curvas"), click(2), []
    for path in sorted((folder / "labels").iterdir())[:12]:
        truth = (np.asarray(PilImage.open(path)).T == 3)[:, :, None]
        if truth.sum() < 50:
            continue
        image = str(folder / "images" / path.name)
        file, reply = task({"image": image, "roi": box(truth, 0), "label": "liver"})
        assert reply["label_names"] == {"liver": 1}
        found.append(dice(np.asarray(PilImage.open(file)).T[:, :, None] > 0, truth))
    assert len(found) > 5
    assert np.mean(found) > 0.85


def test_a_spleen_by_one_box_through_the_volume(real_set):
    folder, name = real_set("ct_totalseg_examples"), "ts_example_ct_full"
    names = json.loads((folder / "labels.json").read_text())[name]
    (value,) = [int(v) for v, (organ, _) in names.items() if organ == "spleen"]
    truth = np.asarray(nib.load(folder / "labels" / f"{name}.nii.gz").dataobj) == value
    roi = box(truth, int(truth.sum(axis=(0, 1)).argmax()))
    file, reply = click(3)(
        {"image": str(folder / "images" / f"{name}.nii.gz"), "roi": roi, "label": "spleen"}
    )
    mask = np.asarray(nib.load(file).dataobj) > 0
    assert dice(mask, truth) > 0.7
    assert len(reply["propagation"]) == 2, "it ended in both directions"
