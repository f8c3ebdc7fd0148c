"""What a crash, a full disk or another program leaves: nothing is lost, and the server starts."""

import errno
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from monailabel.datastore.local import LocalDatastore

from apps.samloop.journal import HOME, NAME
from apps.samloop.store import SafeDatastore
from sam_infer.errors import InputError, StorageError
from tests.store_data import LABELS, digest, lines, make_folder, open_store, tree, values, write


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "studies")


@pytest.fixture
def store(folder):
    return open_store(folder)


@pytest.fixture
def label(tmp_path):
    return write(tmp_path / "label.nii.gz", 1)


def index_of(folder):
    return json.loads((folder / "datastore_v2.json").read_text())


def test_what_the_index_file_does_not_say_yet_the_journal_does(folder, store, label):
    store.save_label("a", label, "final", {"client_id": "slicer"})
    store.update_image_info("b", {"seen": 1})
    store.update_label_info("a", "final", {"note": 2})
    assert "final" not in index_of(folder)["objects"]["a"]["labels"], "the file is written later"
    again = open_store(folder)
    assert again.get_label_info("a", "final")["client_id"] == "slicer"
    assert again.get_label_info("a", "final")["note"] == 2
    assert again.get_image_info("b")["seen"] == 1
    assert index_of(folder)["objects"]["a"]["labels"]["final"]["info"]["note"] == 2


def test_closing_writes_the_index_and_other_programs_read_it(folder, store, label):
    store.save_label("a", label, "final", {"client_id": "slicer"})
    store.close()
    stock = LocalDatastore(str(folder), extensions=("*.nii.gz",))
    assert stock.get_labeled_images() == ["a"]
    assert stock.get_label_info("a", "final")["client_id"] == "slicer"
    assert sorted(stock.list_images()) == ["a", "b"]


def test_a_lost_index_comes_back_with_all_it_said(folder, store, label):
    store.save_label("a", label, "final", {"client_id": "slicer", "model": "unet"})
    store.update_image_info("b", {"seen": 1})
    before = store.json()["objects"]
    (folder / "datastore_v2.json").unlink()
    assert open_store(folder).json()["objects"] == before


def test_a_lost_index_and_labels_that_were_changed_meanwhile(folder, store, label, tmp_path):
    """Info comes back where the content is one that the journal knows, in whatever place."""
    store.save_label("a", label, "final", {"client_id": "first"})
    first = Path(store.get_label_uri("a", "final")).read_bytes()
    store.save_label("a", write(tmp_path / "x.nii.gz", 2), "final", {"client_id": "second"})
    store.save_label("b", label, "final", {"client_id": "other"})
    (folder / "datastore_v2.json").write_text("{")
    (folder / "labels" / "final" / "a.nii.gz").write_bytes(first)
    write(folder / "labels" / "final" / "b.nii.gz", 0)
    again = open_store(folder)
    assert again.get_label_info("a", "final")["client_id"] == "first"
    assert "client_id" not in again.get_label_info("b", "final"), "nobody knows whose this one is"
    assert [line["event"] for line in lines(folder)][-2:] == ["found", "found"]


def test_copied_files_with_other_times_are_known_by_their_content(folder, store, label, tmp_path):
    """A folder that was restored from a backup."""
    store.save_label("a", label, "final", {"client_id": "slicer"})
    store.close()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    count = len(lines(copy))
    again = open_store(copy)
    assert again.get_label_info("a", "final")["client_id"] == "slicer"
    assert len(lines(copy)) == count


def test_an_index_of_another_program_is_taken_as_it_is(folder, store, label, tmp_path):
    """Stock MONAI Label, or an older release, which knew of no journal."""
    store.save_label("a", label, "final", {"client_id": "slicer"})
    store.close()
    shutil.rmtree(folder / HOME)
    index = index_of(folder)
    del index["journal"]
    for case in index["objects"].values():
        case["image"] = {"ext": ".nii.gz", "info": {"seen": 3}}
        for tag, entry in case["labels"].items():
            case["labels"][tag] = {"ext": entry["ext"], "info": {**entry["info"], "theirs": 1}}
    (folder / "datastore_v2.json").write_text(json.dumps(index, indent=2))
    again = open_store(folder)
    info = again.get_label_info("a", "final")
    assert (info["client_id"], info["theirs"], again.get_image_info("b")["seen"]) == ("slicer", 1, 3)
    (told,) = again.label_history("a")
    assert (told["event"], told["who"], told["current"]) == ("found", "slicer", True)
    (folder / "datastore_v2.json").unlink()
    again = open_store(folder)
    assert again.get_label_info("a", "final")["theirs"] == 1
    assert again.get_image_info("b")["seen"] == 3


def test_an_index_that_stock_wrote_over_ours_gets_back_what_the_journal_knows(folder, store, label):
    store.save_label("a", label, "final", {"client_id": "slicer"})
    stock = LocalDatastore(str(folder), extensions=("*.nii.gz",))
    assert "client_id" not in stock.get_label_info("a", "final"), "the index file was older than the save"
    again = open_store(folder)
    assert again.get_label_info("a", "final")["client_id"] == "slicer"


@pytest.mark.parametrize("left", ["nothing", "half", "another"])
def test_a_lost_journal_is_begun_anew(folder, store, label, tmp_path, left):
    first = digest(write(tmp_path / "first.nii.gz", 2))
    store.save_label("a", str(tmp_path / "first.nii.gz"), "final", {"client_id": "slicer"})
    store.save_label("a", label, "final", {"client_id": "slicer"})
    store.close()
    path = folder / HOME / NAME
    content = path.read_bytes()
    path.write_bytes({"nothing": b"", "half": content[: len(content) // 2], "another": b"x" * 10_000}[left])
    again = open_store(folder)
    assert again.get_label_info("a", "final")["client_id"] == "slicer"
    told = again.label_history("a")
    assert told[-1]["current"] and all(version["available"] for version in told)
    assert {version["sha256"] for version in told} == {first, digest(label)}
    again.save_label("b", label, "final", {})
    assert open_store(folder).label_history("b")[-1]["event"] == "saved"


@pytest.mark.parametrize(
    "index",
    [
        {"objects": {"../b": {"image": {"ext": ".nii.gz"}}}},
        {"objects": {"a": {"image": {"ext": "/../../secret.nii.gz"}}}},
        {"objects": {"a": {"image": {"ext": ".nii.gz"}, "labels": {"../..": {"ext": ".nii.gz"}}}}},
        {"objects": {"a": {"image": {"ext": ".nii.gz"}, "labels": {"final": {"ext": "/../x.nii.gz"}}}}},
    ],
)
def test_an_index_cannot_name_files_outside(folder, index):
    write(folder.parent / "secret.nii.gz", 1)
    (folder / "datastore_v2.json").write_text(json.dumps({"name": "n", "description": "d", **index}))
    for how in ({}, {"read_only": True}):
        store = open_store(folder, **how)
        assert set(store.list_images()) <= {"a", "b"}
        for name in store.list_images():
            assert Path(store.get_image_uri(name)).parent == folder
            assert not store.get_labels_by_image_id(name)


@pytest.mark.parametrize("key", ["images_dir", "labels_dir"])
def test_an_index_cannot_move_the_store_elsewhere(folder, key):
    index = {"name": "n", "description": "d", "objects": {}, key: "../elsewhere"}
    (folder / "datastore_v2.json").write_text(json.dumps(index))
    before = tree(folder.parent)
    with pytest.raises(InputError, match="out of the studies folder"):
        open_store(folder)
    assert tree(folder.parent, without={".lock"}) == before


def test_a_label_whose_save_was_cut_short_is_found_and_what_it_replaced_is_kept(
    folder, store, label, tmp_path, monkeypatch
):
    """Killed between the file and its line."""
    store.save_label("a", label, "final", {"client_id": "slicer"})
    first = digest(store.get_label_uri("a", "final"))

    def killed(_):
        raise SystemExit

    monkeypatch.setattr(store, "_record", killed)
    monkeypatch.setattr(store._history, "put_back", lambda *_: None)
    with pytest.raises(SystemExit):
        store.save_label("a", write(tmp_path / "x.nii.gz", 2), "final", {})
    again = open_store(folder)
    assert values(again, "a") == [2]
    assert [v["event"] for v in again.label_history("a")] == ["saved", "found"]
    assert digest(again.label_version("a", "final", first)) == first


def test_a_second_file_of_a_label_is_put_aside(folder, store, label, tmp_path):
    """Killed before the file of another extension was removed that the new one replaces."""
    store.save_label("a", label, "final", {})
    write(folder / "labels" / "final" / "a.nii", 2)
    again = open_store(folder)
    assert values(again, "a") == [1]
    assert [p.name for p in (folder / "labels" / "final").iterdir()] == ["a.nii.gz"]
    other = again.label_history("a")[-1]
    assert (other["event"], other["available"]) == ("earlier", True)


def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where", ["apps.samloop.store.synced_writer", "apps.samloop.journal._write", "os.fsync"]
)
@pytest.mark.parametrize("kind", [".nii.gz", ".nii"])
def test_a_full_disk_changes_nothing(folder, store, label, tmp_path, monkeypatch, where, kind):
    store.save_label("a", label, "final", {"client_id": "slicer"})
    left_out = {"history", "datastore_v2.json"}
    before, told = tree(folder, without=left_out), store.json()
    second = write(tmp_path / f"x{kind}", 2)
    with monkeypatch.context() as patch:
        patch.setattr(where, (lambda *_: full(_)))
        with pytest.raises(StorageError, match=r"label final of a was not saved \(No space left"):
            store.save_label("a", second, "final", {})
        for change in (
            lambda: store.save_label("b", second, "final", {}),
            lambda: store.save_label("b", second, "new", {}),
            lambda: store.add_image("a", write(tmp_path / "i.nii.gz", 3), {}),
            lambda: store.add_image("new", write(tmp_path / "i.nii.gz", 3), {}),
        ):
            with pytest.raises(StorageError):
                change()
        if where != "apps.samloop.store.synced_writer":
            for change in (
                lambda: store.remove_label("a", "final"),
                lambda: store.remove_image("a"),
                lambda: store.update_image_info("a", {"x": 1}),
                lambda: store.update_label_info("a", "final", {"x": 1}),
            ):
                with pytest.raises(StorageError):
                    change()
        if where == "apps.samloop.journal._write":
            store.refresh()
            open_store(folder)
    assert store.json() == told
    left = tree(folder, without=left_out)
    left.pop("labels/new", None)
    assert left == before
    store.save_label("a", second, "final", {})
    assert values(open_store(folder), "a") == [2]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB of its own."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], check=False, capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("this user cannot mount a small file system")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full(small_disk, tmp_path):
    """Labels are saved until it is."""
    folder = make_folder(small_disk / "studies")
    store = open_store(folder)
    saved = {}
    with pytest.raises(StorageError, match="No space left"):
        for n in range(10_000):
            name = "ab"[n % 2]
            store.save_label(name, write(tmp_path / "l.nii.gz", n % 3), "final", {"n": n})
            saved[name] = n
    assert saved
    for again in (store, open_store(folder)):
        for name, n in saved.items():
            assert again.get_label_info(name, "final")["n"] == n
            assert values(again, name) == [n % 3]
    assert not list(small_disk.rglob("*.tmp"))


@pytest.mark.slow
def test_a_disk_that_becomes_read_only(small_disk, tmp_path):
    """As Linux makes one that fails."""
    folder = make_folder(small_disk / "studies")
    store = open_store(folder)
    label = write(tmp_path / "l.nii.gz", 1)
    store.save_label("a", label, "final", {"n": 1})
    before = tree(folder)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for change in (
        lambda: store.save_label("a", label, "final", {}),
        lambda: store.update_label_info("a", "final", {"n": 2}),
        lambda: store.remove_image("a"),
    ):
        with pytest.raises(StorageError, match="Read-only file system"):
            change()
    store.refresh()
    assert store.get_label_info("a", "final")["n"] == 1 and values(store, "a") == [1]
    with pytest.raises(InputError, match="cannot write there"):
        open_store(folder)
    assert tree(folder) == before


def test_a_folder_that_cannot_be_written_is_named_at_the_start(folder, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))
    with pytest.raises(InputError, match="cannot write there"):
        open_store(folder)


def test_a_folder_that_is_gone_does_not_empty_the_index(folder, store, label, tmp_path):
    """A network drive that was not there for a while."""
    store.save_label("a", label, "final", {"client_id": "slicer"})
    away = folder.rename(tmp_path / "away")
    (folder / "labels").mkdir(parents=True)
    store.refresh()
    assert store.get_labeled_images() == ["a"]
    shutil.rmtree(folder)
    away.rename(folder)
    store.refresh()
    assert store.get_label_info("a", "final")["client_id"] == "slicer"
    assert len(store.list_images()) == 2


def test_images_that_come_back_have_their_infos_again(folder, store, label, tmp_path):
    store.save_label("a", label, "final", {"client_id": "slicer"})
    store.update_image_info("a", {"seen": 1})
    (folder / "a.nii.gz").rename(tmp_path / "a.nii.gz")
    store.refresh()
    assert store.list_images() == ["b"]
    (tmp_path / "a.nii.gz").rename(folder / "a.nii.gz")
    store.refresh()
    assert store.get_image_info("a")["seen"] == 1
    assert store.get_label_info("a", "final")["client_id"] == "slicer"


def test_leftovers_of_killed_writers_are_swept_where_models_and_history_are_too(folder, store):
    places = [folder / HOME / name for name in (".", "history/final", "models", "models/slices")]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        for name, age in ((".old.1.2.tmp", 7200), (".young.1.2.tmp", 60)):
            (place / name).write_bytes(b"half")
            os.utime(place / name, (time.time() - age,) * 2)
    open_store(folder)
    left = [path.name for place in places for path in place.glob(".*.tmp")]
    assert left == [".young.1.2.tmp"] * len(places)


def test_a_store_without_reconciling_reads_what_is_known(folder, store, label):
    store.save_label("a", label, "final", {})
    (folder / "b.nii.gz").unlink()
    before = tree(folder)
    again = SafeDatastore(str(folder), labels=LABELS, auto_reload=False, read_only=True)
    assert sorted(again.list_images()) == ["a", "b"] and again.get_labeled_images() == ["a"]
    assert tree(folder) == before
