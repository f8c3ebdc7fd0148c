import json
import os
import pathlib
import threading

import nibabel as nib
import numpy as np
import pytest
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException

from apps.samloop.store import HOME, SafeDatastore
from sam_infer.errors import InputError

LABELS = {"liver": 1, "spleen": 2}
SHAPE = (6, 5, 4)


def write(path, values, shape=SHAPE):
    nib.save(nib.Nifti1Image(np.full(shape, values, np.uint8), np.eye(4)), path)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    studies = tmp_path / "studies"
    studies.mkdir()
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4)), studies / f"{name}.nii.gz")
    return studies


@pytest.fixture
def store(folder):
    return SafeDatastore(str(folder), labels=LABELS, auto_reload=False)


@pytest.fixture
def label(tmp_path):
    return write(tmp_path / "label.nii.gz", 1)


def test_images_are_found_and_truth_folders_are_not(folder, store):
    assert sorted(store.list_images()) == ["a", "b"]
    (folder / "truth").mkdir()
    write(folder / "truth" / "a.nii.gz", 1)
    store.refresh()
    assert sorted(store.list_images()) == ["a", "b"]


def test_accepted_label_is_found_by_a_new_start(folder, store, label):
    store.save_label("a", label, "final", {"model": "x"})
    again = SafeDatastore(str(folder), labels=LABELS, auto_reload=False)
    assert again.get_labeled_images() == ["a"]
    assert again.get_label_info("a", "final")["model"] == "x"
    assert [os.path.basename(d["label"]) for d in again.datalist()] == ["a.nii.gz"]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"objects": {"a": 3}}', b"\x00" * 50])
def test_damaged_index_is_rebuilt_from_the_files(folder, store, label, damage):
    store.save_label("a", label, "final", {})
    (folder / "datastore_v2.json").write_bytes(damage)
    again = SafeDatastore(str(folder), labels=LABELS, auto_reload=False)
    assert again.get_labeled_images() == ["a"]
    assert sorted(again.list_images()) == ["a", "b"]
    assert json.loads((folder / "datastore_v2.json").read_text())["objects"]["a"]["labels"]["final"]
    assert [p.read_bytes() for p in (folder / HOME).glob("*.damaged.json")] == [damage]


def test_replaced_label_goes_to_the_history(folder, store, label, tmp_path):
    store.save_label("a", label, "final", {})
    store.save_label("a", write(tmp_path / "second.nii.gz", 2), "final", {})
    kept = list((folder / HOME / "history" / "final").glob("a.*.nii.gz"))
    assert len(kept) == 1
    assert np.asarray(nib.load(kept[0]).dataobj).max() == 1
    assert np.asarray(nib.load(store.get_label_uri("a", "final")).dataobj).max() == 2


def test_label_in_another_format_leaves_one_file(folder, store, label, tmp_path):
    store.save_label("a", label, "final", {})
    store.save_label("a", write(tmp_path / "second.nii", 2), "final", {})
    assert [p.name for p in (folder / "labels" / "final").iterdir()] == ["a.nii"]


def test_removed_label_goes_to_the_history(folder, store, label):
    store.save_label("a", label, "final", {})
    store.remove_label("a", "final")
    assert store.get_labeled_images() == []
    assert len(list((folder / HOME / "history" / "final").iterdir())) == 1


def test_removed_image_takes_its_files_to_the_history(folder, store, label):
    store.save_label("a", label, "final", {})
    store.remove_image("a")
    assert store.list_images() == ["b"]
    assert len(list((folder / HOME / "history").rglob("a.*"))) == 2
    with pytest.raises(ImageNotFoundException):
        store.remove_image("a")


def test_uploading_an_image_again_keeps_its_labels(folder, store, label, tmp_path):
    store.save_label("a", label, "final", {})
    store.add_image("a", write(tmp_path / "again.nii.gz", 9), {})
    assert store.get_labeled_images() == ["a"]
    with pytest.raises(InputError, match="choose another id") as caught:
        store.add_image("a", write(tmp_path / "other.nii.gz", 9, (9, 9, 9)), {})
    assert caught.value.status == 409


@pytest.mark.parametrize(
    ("values", "shape", "message"),
    [(3, SHAPE, "label = 3: .*1 = liver, 2 = spleen"), (1, (5, 6, 4), "image's shape")],
)
def test_labels_that_do_not_fit_are_refused(store, tmp_path, values, shape, message):
    with pytest.raises(InputError, match=message):
        store.save_label("a", write(tmp_path / "l.nii.gz", values, shape), "final", {})
    assert store.get_labeled_images() == []


def test_garbage_is_no_label(store, tmp_path):
    (tmp_path / "x.sh").write_text("#!/bin/sh")
    (tmp_path / "x.nii.gz").write_text("garbage")
    for name in ("x.sh", "x.nii.gz"):
        with pytest.raises(InputError):
            store.save_label("a", str(tmp_path / name), "final", {})


def test_unknown_image_is_not_found(store, label):
    with pytest.raises(ImageNotFoundException):
        store.save_label("c", label, "final", {})


def test_a_label_written_half_is_never_seen(store, label, monkeypatch):
    """The disk fails in the middle: the label before it is still there, whole."""
    store.save_label("a", label, "final", {})
    before = pathlib.Path(store.get_label_uri("a", "final")).read_bytes()

    def fail(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        store.save_label("a", label, "final", {})
    assert pathlib.Path(store.get_label_uri("a", "final")).read_bytes() == before
    folder = os.path.dirname(store.get_label_uri("a", "final"))
    assert os.listdir(folder) == ["a.nii.gz"]


def test_tags_cannot_leave_the_store(store, label):
    with pytest.raises(InputError, match="tag"):
        store.save_label("a", label, "../../x", {})


def test_a_failing_replacement_in_another_format_keeps_the_label(store, label, tmp_path, monkeypatch):
    store.save_label("a", label, "final", {"model": "x"})
    second = write(tmp_path / "second.nii", 2)

    def fail(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        store.save_label("a", second, "final", {})
    monkeypatch.undo()
    store.refresh()
    assert store.get_labeled_images() == ["a"]
    assert np.asarray(nib.load(store.get_label_uri("a", "final")).dataobj).max() == 1
    assert store.get_label_info("a", "final")["model"] == "x"


def test_two_processes_writing_the_index_lose_nothing_of_each_other(folder, store, label):
    """The server and batch inference, each with an index of its own in memory."""
    other = SafeDatastore(str(folder), labels=LABELS, auto_reload=False)
    store.save_label("a", label, "final", {"client_id": "server"})
    other.save_label("a", label, "original", {"model": "batch"})
    store.save_label("b", label, "final", {"client_id": "server"})
    other.update_image_info("b", {"seen": 1})
    again = SafeDatastore(str(folder), labels=LABELS, auto_reload=False)
    assert again.get_label_info("a", "final")["client_id"] == "server"
    assert again.get_label_info("a", "original")["model"] == "batch"
    assert again.get_label_info("b", "final")["client_id"] == "server"
    assert again.get_image_info("b")["seen"] == 1


def test_readers_never_see_a_half_made_index(store, label, monkeypatch):
    """While a change is written, another reader still sees the index from before, and does not wait."""
    seen = []
    append = store._journal.append

    def watched(content):
        end = append(content)
        reader = threading.Thread(target=lambda: seen.append(store.list_images()))
        reader.start()
        reader.join(60)
        return end

    monkeypatch.setattr(store._journal, "append", watched)
    pathlib.Path(store.get_image_uri("b")).unlink()
    store.refresh()
    assert seen == [["a", "b"]]
    assert store.list_images() == ["a"]


def test_file_names_in_capitals_are_served_and_impossible_ones_are_named(folder, caplog):
    for name in ("SCAN.NII.GZ", "what?.nii.gz", "a.nii"):
        (folder / name).write_bytes((folder / "a.nii.gz").read_bytes())
    os.utime(folder / "a.nii", (1, 1))
    store = SafeDatastore(str(folder), labels=LABELS, auto_reload=False)
    assert sorted(store.list_images()) == ["SCAN", "a", "b"]
    assert store.get_image_uri("SCAN").endswith("SCAN.NII.GZ")
    assert store.get_image_uri("a").endswith("a.nii.gz")
    assert "what?.nii.gz" in caplog.text
    assert "a.nii (a.nii.gz has the same id and is newer)" in caplog.text


def test_an_image_uploaded_over_another_goes_to_the_history(folder, store, tmp_path):
    before = (folder / "a.nii.gz").read_bytes()
    store.add_image("a", write(tmp_path / "again.nii.gz", 9), {})
    assert [p.read_bytes() for p in (folder / HOME / "history" / "images").iterdir()] == [before]
    store.add_image("a", write(tmp_path / "again.nii", 8), {})
    assert store.get_image_uri("a").endswith("a.nii")
    assert not (folder / "a.nii.gz").exists()
    assert len(list((folder / HOME / "history" / "images").iterdir())) == 2


def test_leftovers_of_killed_writers_are_swept(folder, store):
    old, young = folder / "labels" / "final" / ".a.nii.gz.1.2.tmp", folder / ".b.nii.gz.1.2.tmp"
    for file in (old, young):
        file.write_bytes(b"half")
    own = folder / ".scanner.tmp"
    (own / "kept").mkdir(parents=True)
    for path in (old, own):
        os.utime(path, (1, 1))
    SafeDatastore(str(folder), labels=LABELS, auto_reload=False)
    assert not old.exists()
    assert young.exists()
    assert (own / "kept").is_dir(), "no writer makes folders here"


def test_what_is_not_there_is_not_found(store, label):
    store.save_label("a", label, "final", {})
    for call in (
        lambda: store.get_image_info("c"),
        lambda: store.get_label_info("b", "final"),
        lambda: store.remove_label("b", "final"),
    ):
        with pytest.raises((ImageNotFoundException, LabelNotFoundException)):
            call()


def test_slicers_segment_order_is_stored_as_the_projects_indices(store, label):
    store.save_label(
        "a", label, "final", {"label_info": [{"name": "spleen", "idx": 1}, {"name": "liver", "idx": 2}]}
    )
    saved = np.asarray(nib.load(store.get_label_uri("a", "final")).dataobj)
    assert np.unique(saved).tolist() == [2]


def test_a_label_turned_by_its_client_is_stored_on_the_image(store, tmp_path):
    """As nibabel's as_closest_canonical writes it: other axes, the same place."""
    truth = np.zeros(SHAPE, np.uint8)
    truth[0, 1, 2] = 1
    turned = np.diag([-1.0, 1, 1, 1])
    turned[0, 3] = SHAPE[0] - 1
    nib.save(nib.Nifti1Image(truth[::-1], turned), tmp_path / "turned.nii.gz")
    store.save_label("a", str(tmp_path / "turned.nii.gz"), "final", {})
    saved = nib.load(store.get_label_uri("a", "final"))
    np.testing.assert_array_equal(np.asarray(saved.dataobj), truth)
    np.testing.assert_allclose(saved.affine, np.eye(4))


def test_huge_label_values_need_no_memory(store, tmp_path):
    path = tmp_path / "l.nii.gz"
    nib.save(nib.Nifti1Image(np.full(SHAPE, 2_000_000_000, np.int32), np.eye(4)), path)
    info = {"label_info": [{"name": "spleen", "value": 2_000_000_000}]}
    store.save_label("a", str(path), "final", info)
    assert np.unique(np.asarray(nib.load(store.get_label_uri("a", "final")).dataobj)).tolist() == [2]
