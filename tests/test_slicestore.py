"""Training slices: which are chosen, how they are kept, and how often each is drawn."""

import os
from pathlib import Path

import numpy as np
import pytest

from sam_infer.intensity import Window
from sam_infer.volumes import read_image
from tests.loop_data import Folder, disc, window_for
from trainers.data import Case, Slices, sampling_weights
from trainers.slicestore import SliceStore, choose_slices

LABELS = {"disc": 5}


def taken(store, case):
    slices = store.load([case])
    return slices.take(np.arange(len(slices)))


def test_slices_with_labels_come_first_and_some_without_are_kept():
    filled = np.zeros(200, bool)
    filled[50:150] = True
    chosen = choose_slices(filled, limit=40, empty_share=0.25)
    assert len(chosen) == 40 and sum(filled[chosen]) == 30 and chosen == sorted(set(chosen))
    assert min(chosen) == 0 and max(chosen) == 199
    assert choose_slices(np.array([False]), limit=4, empty_share=0.25) == [0]
    assert choose_slices(np.array([True]), limit=4, empty_share=0.25) == [0]


def test_rare_labels_and_small_cases_are_drawn_as_often_as_others():
    labels = np.zeros((10, 4, 4), np.uint8)
    labels[:9, 0, 0] = 1
    labels[0, 1, 1] = 2
    cases = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1])
    drawn = sampling_weights(Slices(images=labels, labels=labels, cases=cases), classes=2)
    assert drawn.sum() == pytest.approx(1)
    assert drawn[8] == pytest.approx(8 * drawn[1])
    assert drawn[0] == pytest.approx(1 / 3 + drawn[1]) and drawn[9] == pytest.approx(1 / 3)


def test_prepared_slices_are_reused_and_a_changed_label_never_meets_an_old_entry(tmp_path):
    store = Folder(tmp_path)
    store.add_disc("a", 0, value=5, width=60, height=40)
    reads = []

    def read(path):
        reads.append(path)
        return read_image(path)

    prepared = SliceStore(folder=tmp_path / "cache", labels=LABELS, size=48, window_for=window_for, read=read)
    paths = store.datalist()[0]
    case = Case(case_id="a", image=Path(paths["image"]), label=Path(paths["label"]))
    images, labels = taken(prepared, case)
    assert images.shape == (1, 48, 48) and set(np.unique(labels)) == {0, 1}
    assert labels[0, 32:].max() == 0, "rows below a 60 x 40 slice are padding"
    taken(prepared, case)
    assert len(reads) == 1
    other = Window(level=100, width=50)
    narrow = SliceStore(
        folder=tmp_path / "cache", labels=LABELS, size=48, window_for=lambda image, request: other, read=read
    )
    assert taken(narrow, case)[0].max() == 255 and len(reads) == 2
    store.add("a", disc(0, width=60, height=40)[0], np.zeros((40, 60)))
    os.utime(case.label, ns=(1, 1))
    assert taken(prepared, case)[1].max() == 0


def test_prepared_slices_stay_under_the_limit_of_the_disk(tmp_path):
    store = Folder(tmp_path)
    for seed in range(5):
        store.add_disc(f"c{seed}", seed, value=5)
    prepared = SliceStore(
        folder=tmp_path / "cache", labels=LABELS, size=48, window_for=window_for, disk_limit=12_000
    )
    cases = [
        Case(case_id=str(i), image=Path(e["image"]), label=Path(e["label"]))
        for i, e in enumerate(store.datalist())
    ]
    slices = prepared.load(cases)
    assert len(slices) == 5
    assert sum(f.stat().st_size for f in (tmp_path / "cache").iterdir()) <= 12_000
    images, _ = slices.take(np.arange(5))
    for image, entry in zip(images, store.datalist(), strict=True):
        assert np.array_equal(image, read_image(entry["image"]).array[:, :, 0].T), "prepared anew"


def volume_case(tmp_path, **kwargs):
    import nibabel as nib

    image, label = np.zeros((40, 32, 20), np.int16), np.zeros((40, 32, 20), np.uint8)
    for k in range(20):
        image[:, :, k] = k * 10
    label[5:20, 5:20, 6:12], label[25:30, 5:20, 10] = 5, 9
    for name, array in (("image", image), ("label", label)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
    paths = {"image": tmp_path / "image.nii.gz", "label": tmp_path / "label.nii.gz"}
    return Case(case_id="v", **{**paths, **kwargs})


def test_slices_are_read_one_by_one_and_know_their_labels(tmp_path):
    case = volume_case(tmp_path)
    labels = {"block": 5, "bar": 9, "nowhere": 11}
    store = SliceStore(folder=tmp_path / "cache", labels=labels, size=48, window_for=window_for)
    slices = store.load([case, case])
    present = slices.present(3)
    assert len(slices) == 2 * (6 + 2) and present[:, 0].sum() == 12 and present[:, 1].sum() == 2
    assert not present[:, 2].any() and (~present.any(axis=1)).sum() == 4
    order = np.array([9, 0, 15, 9])
    images, found = slices.take(order)
    assert images.shape == found.shape == (4, 48, 48)
    assert np.array_equal(images[0], images[3]) and np.array_equal(found[0], found[3])
    single = [slices.take(np.array([i])) for i in order]
    assert all(np.array_equal(images[n], one[0][0]) for n, one in enumerate(single))
    held = Slices(images=found, labels=found, cases=np.arange(4))
    assert np.array_equal(held.present(3), present[order])


def test_only_the_slices_that_a_label_speaks_of_are_prepared(tmp_path):
    case = volume_case(tmp_path, slices=(10, 9, 8, 3))
    store = SliceStore(folder=tmp_path / "cache", labels={"block": 5}, size=48, window_for=window_for)
    images, labels = store.load([case]).take(np.arange(4))
    assert sorted(images.max(axis=(1, 2)).tolist()) == [30, 80, 90, 100]
    assert [bool(one.any()) for one in labels] == [image.max() > 30 for image in images]


def test_a_case_without_a_label_is_all_background(tmp_path):
    case = volume_case(tmp_path, label=None)
    store = SliceStore(folder=tmp_path / "cache", labels={"block": 5}, size=48, window_for=window_for)
    slices = store.load([case])
    assert len(slices) == 20 and not slices.take(np.arange(20))[1].any() and not slices.present(1).any()
