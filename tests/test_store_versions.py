"""Every version of a label: who saved it after which model, and its file, now and later."""

import os

import numpy as np
import pytest
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException

from apps.samloop.journal import HOME, acting
from sam_infer.errors import InputError
from tests.store_data import LABELS, digest, lines, make_folder, open_store, values, write


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "studies")


@pytest.fixture
def store(folder):
    return open_store(folder)


def saved(folder):
    return [entry for entry in lines(folder) if "tag" in entry]


def test_a_save_is_a_line_that_says_all(folder, store, tmp_path):
    store.add_image("c", write(tmp_path / "c.nii.gz", 0), {"user": "pacs"})
    info = {"params": {"model": {"round": 7, "fingerprint": "f00"}}, "model": "unet", "client_id": "batch"}
    store.save_label("c", write(tmp_path / "l.nii.gz", 1), "original", info)
    store.save_label("c", write(tmp_path / "m.nii.gz", 2), "final", {"client_id": "slicer", "model": "unet"})
    first, second = saved(folder)
    assert first["proposed"] == {"model": "unet", "round": 7, "fingerprint": "f00"}
    assert (first["who"], first["client"], first["tag"]) == ("batch", "batch", "original")
    assert "replaced" not in first
    path = store.get_label_uri("c", "final")
    assert second["sha256"] == digest(path)
    assert second["size"] == os.path.getsize(path)
    assert second["image_sha256"] == digest(store.get_image_uri("c"))
    assert second["proposed"] == first["proposed"] and second["model"] == "unet"
    assert second["info"]["client_id"] == "slicer"
    assert lines(folder)[-3]["who"] == "pacs"


def test_every_version_is_there_and_can_be_put_back(folder, store, tmp_path):
    hashes = []
    for n, who in ((1, "ann"), (2, "bob"), (0, "eve")):
        store.save_label("a", write(tmp_path / "l.nii.gz", n), "final", {"user": who})
        hashes.append(digest(store.get_label_uri("a", "final")))
    told = store.label_history("a", "final")
    assert [(v["who"], v["sha256"], v["current"], v["available"]) for v in told] == [
        ("ann", hashes[0], False, True),
        ("bob", hashes[1], False, True),
        ("eve", hashes[2], True, True),
    ]
    assert [digest(store.label_version("a", "final", h)) for h in hashes] == hashes
    store.restore_label("a", "final", hashes[0], {"user": "ann"})
    assert values(store, "a") == [1]
    last = store.label_history("a")[-1]
    assert (last["who"], last["restored"], last["sha256"]) == ("ann", hashes[0], hashes[0])
    assert [digest(store.label_version("a", "final", h)) for h in hashes] == hashes
    assert store.get_label_info("a", "final")["restored"] == hashes[0]


def test_a_restored_version_keeps_its_meaning_and_its_model(store, tmp_path):
    """Slicer's numbers were turned into the project's when it was saved; they are not turned again."""
    names = [{"name": "spleen", "idx": 1, "color": "red"}, {"name": "liver", "idx": 2}]
    info = {"label_info": names, "model": "unet", "client_id": "slicer"}
    store.save_label("a", write(tmp_path / "l.nii.gz", 1), "final", info)
    stored = store.get_label_info("a", "final")["label_info"]
    assert stored == [
        {"name": "spleen", "idx": 2, "value": 2, "color": "red"},
        {"name": "liver", "idx": 1, "value": 1},
    ]
    first = store.label_history("a")[-1]["sha256"]
    store.save_label("a", write(tmp_path / "m.nii.gz", 1), "final", {})
    store.restore_label("a", "final", first, {})
    assert values(store, "a") == [LABELS["spleen"]]
    info = store.get_label_info("a", "final")
    assert info["model"] == "unet" and "client_id" not in info


def test_what_was_removed_is_there_and_can_be_put_back(folder, store, tmp_path):
    store.save_label("a", write(tmp_path / "l.nii.gz", 2), "final", {})
    sha256 = digest(store.get_label_uri("a", "final"))
    with acting("admin"):
        store.remove_label("a", "final")
    told = store.label_history("a", "final")
    assert [(v["event"], v.get("who"), v.get("available")) for v in told] == [
        ("saved", None, True),
        ("removed", "admin", None),
    ]
    store.restore_label("a", "final", sha256, {})
    assert values(store, "a") == [2]
    store.remove_image("a")
    assert [v["event"] for v in store.label_history("a")] == ["saved", "removed", "saved", "removed"]
    assert digest(store.label_version("a", "final", sha256)) == sha256
    with pytest.raises(ImageNotFoundException):
        store.restore_label("a", "final", sha256, {})
    with pytest.raises(ImageNotFoundException):
        store.label_history("never")


def test_a_damaged_version_is_not_handed_out(folder, store, tmp_path):
    store.save_label("a", write(tmp_path / "l.nii.gz", 1), "final", {})
    first = digest(store.get_label_uri("a", "final"))
    store.save_label("a", write(tmp_path / "l.nii.gz", 2), "final", {})
    path = store.label_version("a", "final", first)
    path.unlink()
    path.write_bytes(b"rotten")
    with pytest.raises(InputError, match="gone or damaged") as caught:
        store.label_version("a", "final", first)
    assert caught.value.status == 410
    with pytest.raises(InputError) as caught:
        store.label_version("a", "final", "0" * 64)
    assert caught.value.status == 404
    path.unlink()
    assert [v["available"] for v in store.label_history("a")] == [False, True]


def test_saving_the_same_again_keeps_one_file_and_both_lines(folder, store, tmp_path):
    label = write(tmp_path / "l.nii.gz", 1)
    for _ in range(3):
        store.save_label("a", label, "final", {})
    assert len(list((folder / HOME / "history" / "final").iterdir())) == 1
    assert [v["available"] for v in store.label_history("a")] == [True] * 3


def test_a_link_in_the_labels_folder_does_not_take_its_target_along(folder, store, tmp_path):
    """What the history keeps is the content: the file that a link leads to may change."""
    target = folder / "labels" / "elsewhere.nii.gz"
    write(target, 1)
    (folder / "labels" / "final" / "a.nii.gz").symlink_to(target)
    store.refresh()
    before = digest(target)
    store.save_label("a", write(tmp_path / "l.nii.gz", 2), "final", {})
    assert digest(target) == before
    (kept,) = (folder / HOME / "history" / "final").iterdir()
    assert not kept.is_symlink() and digest(kept) == before


def test_what_came_by_hand_and_went_by_hand_is_told(folder, store, tmp_path):
    path = folder / "labels" / "final" / "a.nii.gz"
    write(path, 1)
    store.refresh()
    first = digest(path)
    write(path, 2)
    os.utime(path, ns=(1, 1))
    store.refresh()
    path.unlink()
    store.refresh()
    told = store.label_history("a")
    assert [v["event"] for v in told] == ["found", "found", "lost"]
    assert told[0]["sha256"] == first
    assert [v.get("available") for v in told] == [False, False, None], "the store never had it in its hands"


def test_notes_are_told(store, tmp_path):
    """As 3D Slicer's reviewer sends them."""
    store.save_label("a", write(tmp_path / "l.nii.gz", 1), "final", {})
    store.update_label_info("a", "final", {"segmentationMeta": {"status": "approved"}, "user": "chief"})
    last = store.label_history("a", "final")[-1]
    assert (last["event"], last["who"]) == ("info", "chief")
    assert last["info"]["segmentationMeta"] == {"status": "approved"}
    assert store.get_label_info("a", "final")["segmentationMeta"] == {"status": "approved"}
    with pytest.raises(LabelNotFoundException):
        store.update_label_info("b", "final", {})


def test_versions_from_before_there_was_a_journal_are_listed(folder, store, tmp_path):
    """The history of a folder that an older release kept."""
    old = folder / HOME / "history"
    for tag, name in (("final", "a.1700000000000000000.nii.gz"), ("images", "b.1700000000000000001.nii.gz")):
        (old / tag).mkdir(parents=True, exist_ok=True)
        write(old / tag / name, 1)
    (folder / HOME / "journal.jsonl").unlink()
    (folder / "datastore_v2.json").unlink()
    again = open_store(folder)
    (told,) = again.label_history("a")
    assert (told["event"], told["available"], told["tag"]) == ("earlier", True, "final")
    assert told["time"].startswith("2023-11-14")
    again.restore_label("a", "final", told["sha256"], {})
    assert values(again, "a") == [1]
    assert again.label_history("b") == []


def test_infos_are_the_askers_own(store, tmp_path):
    store.save_label("a", write(tmp_path / "l.nii.gz", 1), "final", {"params": {"x": [1]}})
    store.update_image_info("a", {"strategy": {"first": {"ts": 1}}})
    store.get_label_info("a", "final")["params"]["x"].append(2)
    store.get_image_info("a")["strategy"]["first"]["ts"] = 2
    assert store.get_label_info("a", "final")["params"] == {"x": [1]}
    assert store.get_image_info("a")["strategy"] == {"first": {"ts": 1}}


def test_what_json_knows_otherwise_is_kept_as_json_says_it(store, tmp_path):
    """Tasks note numbers of numpy; memory, journal and index say the same."""
    info = {"score": np.float32(0.5), "where": ("a", 1), "none": None}
    store.save_label("a", write(tmp_path / "l.nii.gz", 1), "original", info)
    told = store.get_label_info("a", "original")
    again = open_store(store._datastore_path).get_label_info("a", "original")
    assert told == again
    assert (told["where"], told["none"]) == (["a", 1], None)
    with pytest.raises(ValueError):
        store.save_label("b", write(tmp_path / "l.nii.gz", 1), "original", {"score": float("nan")})
    assert not list((store._labels / "original").glob("*b*"))
