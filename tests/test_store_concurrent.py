"""Many writers at once: threads, processes, whoever copies files, and images that are replaced meanwhile."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from monailabel.interfaces.exception import ImageNotFoundException

from apps.samloop.history import History
from apps.samloop.watch import SETTLE, Later
from sam_infer.errors import InputError
from tests.store_data import digest, lines, make_folder, open_store, tree, values, write


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "studies")


@pytest.fixture
def store(folder):
    return open_store(folder)


def until(condition, seconds=60.0):
    """Wait for something that another thread brings about."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def in_threads(*calls):
    """Run calls at once; the errors they ended with."""
    errors = []

    def run(call):
        try:
            call()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return errors


def test_threads_that_save_the_same_label_leave_every_version(folder, store, tmp_path):
    labels = [write(tmp_path / f"{n}.nii.gz", n, dtype=np.uint8) for n in range(3)]
    saved = {digest(path) for path in labels}

    def save(n):
        for round_ in range(6):
            store.save_label("a", labels[(n + round_) % 3], "final", {"client_id": f"{n}.{round_}"})
            store.update_image_info("b", {f"seen{n}": round_})

    assert in_threads(*(lambda n=n: save(n) for n in range(6))) == []
    told = [v for v in store.label_history("a") if v["event"] == "saved"]
    assert len(told) == 36 and len({v["client"] for v in told}) == 36
    assert {v["sha256"] for v in told} == saved and all(v["available"] for v in told)
    assert store.get_label_info("a", "final")["client_id"] == told[-1]["client"]
    assert digest(store.get_label_uri("a", "final")) == told[-1]["sha256"]
    assert {f"seen{n}": store.get_image_info("b")[f"seen{n}"] for n in range(6)} == {
        f"seen{n}": 5 for n in range(6)
    }
    assert open_store(folder).json()["objects"] == store.json()["objects"]
    assert not list(folder.rglob("*.tmp"))


WRITER = """
import sys
from tests.store_data import open_store, write
from pathlib import Path
folder, number = Path(sys.argv[1]), sys.argv[2]
store = open_store(folder)
label = write(folder.parent / f"{number}.nii.gz", int(number) % 3)
print("ready", flush=True)
sys.stdin.readline()
for n in range(25):
    store.save_label("ab"[n % 2], label, "final", {"client_id": f"{number}.{n}"})
    store.save_label("ab"[n % 2], label, f"own{number}", {"client_id": f"{number}.{n}"})
"""


@pytest.mark.slow
def test_processes_that_save_at_once_lose_nothing_of_each_other(folder, store):
    """The server, batch inference, a training: each with its own memory of the index."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(n)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for n in range(2)
    ]
    try:
        assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
        for writer in writers:
            writer.stdin.write("\n")
            writer.stdin.flush()
        seen = 0
        while any(writer.poll() is None for writer in writers):
            now = store.status()["label_tags"].get("final", 0)
            assert now >= seen, "what was there is there for who reads at the same time"
            seen = now
        assert [writer.wait(60) for writer in writers] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    told = [entry["client"] for entry in lines(folder) if entry.get("tag") == "final"]
    assert sorted(told) == sorted(f"{w}.{n}" for w in range(2) for n in range(25))
    assert store.status() == {"total": 2, "completed": 2, "label_tags": {"final": 2, "own0": 2, "own1": 2}}
    for name in "ab":
        assert all(v["available"] for v in store.label_history(name))
    assert open_store(folder).json()["objects"] == store.json()["objects"]


def test_an_image_that_is_replaced_while_its_label_is_saved_refuses_the_label(
    folder, store, tmp_path, monkeypatch
):
    """Also where the new image has the same shape: the label was not drawn on it."""
    label, new = write(tmp_path / "l.nii.gz", 1), write(tmp_path / "new.nii.gz", 5)
    fit = store._fit

    def slow(*arguments):
        found = fit(*arguments)
        store.add_image("a", new, {})
        return found

    before = store.label_history("b")
    monkeypatch.setattr(store, "_fit", slow)
    with pytest.raises(InputError, match="was replaced while its label was being saved") as caught:
        store.save_label("a", label, "final", {})
    assert caught.value.status == 409
    assert store.get_labeled_images() == [] and list((folder / "labels" / "final").iterdir()) == []
    monkeypatch.undo()
    store.save_label("a", label, "final", {})
    assert before == store.label_history("b")


def test_an_image_that_is_removed_while_its_label_is_saved_leaves_no_label(
    folder, store, tmp_path, monkeypatch
):
    label, fit = write(tmp_path / "l.nii.gz", 1), store._fit

    def slow(*arguments):
        found = fit(*arguments)
        store.remove_image("a")
        return found

    monkeypatch.setattr(store, "_fit", slow)
    with pytest.raises(ImageNotFoundException):
        store.save_label("a", label, "final", {})
    assert list((folder / "labels" / "final").iterdir()) == []


def test_a_label_that_is_saved_while_its_image_is_replaced_is_asked_about_its_shape(
    folder, store, tmp_path, monkeypatch
):
    """The image's shape was compared while there was no label yet."""
    label, other = write(tmp_path / "l.nii.gz", 1), write(tmp_path / "other.nii.gz", 1, (9, 9, 9))
    check, asked = store._check_shape, []

    def late(*arguments, **how):
        found = check(*arguments, **how)
        if not asked:
            asked.append(1)
            store.save_label("a", label, "final", {})
        return found

    monkeypatch.setattr(store, "_check_shape", late)
    with pytest.raises(InputError, match="has labels of shape"):
        store.add_image("a", other, {})
    assert values(store, "a") == [1]


def test_thousands_of_files_are_noticed_and_looked_at_a_few_times(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "studies")
    store = open_store(folder, auto_reload=True)
    looks = []
    refresh = store.refresh
    monkeypatch.setattr(store, "refresh", lambda: (looks.append(1), refresh()))
    try:
        content = (folder / "a.nii.gz").read_bytes()
        began = time.monotonic()
        for n in range(1000):
            (folder / f"case_{n:04d}.nii.gz").write_bytes(content)
        assert until(lambda: len(store.list_images()) == 1002)
        seconds = time.monotonic() - began
        assert len(looks) <= 2 + seconds / SETTLE
        for n in range(1000):
            (folder / f"case_{n:04d}.nii.gz").unlink()
        write(folder / "labels" / "final" / "a.nii.gz", 1)
        (folder / "labels" / "reader_2").mkdir()
        shutil.copy(folder / "labels" / "final" / "a.nii.gz", folder / "labels" / "reader_2")
        assert until(lambda: store.status()["label_tags"] == {"final": 1, "reader_2": 1})
        assert until(lambda: sorted(store.list_images()) == ["a", "b"])
    finally:
        store.close()


def test_what_the_store_writes_itself_needs_no_look_at_the_folders(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "studies")
    store = open_store(folder, auto_reload=True)
    seen, looks = [], []
    known = store._is_known
    monkeypatch.setattr(store, "_is_known", lambda path: (seen.append(path.name), known(path))[1])
    monkeypatch.setattr(store, "refresh", lambda: looks.append(1))
    try:
        store.save_label("a", write(tmp_path / "l.nii.gz", 1), "final", {})
        store.save_label("a", write(tmp_path / "l.nii", 1), "final", {})
        store.add_image("c", write(tmp_path / "c.nii.gz", 1), {})
        store.save_label("c", write(tmp_path / "l.nii.gz", 2), "final", {})
        store.remove_label("a", "final")
        store.remove_image("c")
        store.add_image("last", write(tmp_path / "c.nii.gz", 1), {})
        assert until(lambda: "last.nii.gz" in seen)
        assert looks == []
        (folder / "last.nii.gz").unlink()
        assert until(lambda: looks)
    finally:
        store.close()


def test_what_is_asked_for_often_is_done_once_and_errors_do_not_end_it():
    done = []

    def call():
        done.append(1)
        raise OSError("full")

    later = Later(call, seconds=0.05)
    for _ in range(100):
        later.ask()
    assert until(lambda: done)
    later.ask()
    later.now()
    later.now()
    assert len(done) == 2


def test_files_on_a_disk_without_hard_links_are_copied(folder, store, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    for n in (1, 2):
        store.save_label("a", write(tmp_path / "l.nii.gz", n), "final", {})
    assert [v["available"] for v in store.label_history("a")] == [True, True]
    assert isinstance(store._history, History)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_done_in_whatever_order_is_as_it_should_be(tmp_path, seed):
    """Two stores over a folder, and new ones now and then, beside a plain account of what they were told."""
    rng = random.Random(seed)
    folder = make_folder(tmp_path / "studies", names="abc")
    stores = [open_store(folder), open_store(folder)]
    labels, versions, images = {}, set(), {name: digest(folder / f"{name}.nii.gz") for name in "abc"}
    for step in range(60):
        store, name, tag = rng.choice(stores), rng.choice("abc"), rng.choice(["final", "original"])
        key, act = (name, tag), rng.random()
        if act < 0.45 and name in images:
            path = write(tmp_path / f"l{rng.choice(['.nii', '.nii.gz'])}", rng.randrange(3))
            store.save_label(name, path, tag, {"n": step})
            labels[key] = (digest(path), step)
            versions.add((*key, digest(path)))
        elif act < 0.55 and key in labels:
            store.remove_label(name, tag)
            del labels[key]
        elif act < 0.65 and name in images and (kept := [v for v in versions if v[:2] == key]):
            sha256 = rng.choice(sorted(kept))[2]
            store.restore_label(name, tag, sha256, {"n": step})
            labels[key] = (sha256, step)
        elif act < 0.75 and key in labels:
            store.update_label_info(name, tag, {"n": step})
            labels[key] = (labels[key][0], step)
        elif act < 0.8 and name in images:
            store.remove_image(name)
            del images[name]
            labels = {k: v for k, v in labels.items() if k[0] != name}
        elif act < 0.9:
            path = write(tmp_path / f"i{rng.choice(['.nii', '.nii.gz'])}", step, dtype=np.int16)
            store.add_image(name, path, {})
            images[name] = digest(path)
        elif act < 0.95:
            store.refresh()
        else:
            if rng.random() < 0.5:
                store.close()
            if rng.random() < 0.3:
                (folder / "datastore_v2.json").unlink(missing_ok=True)
            stores[stores.index(store)] = open_store(folder)
        for store in stores:
            assert {n: digest(store.get_image_uri(n)) for n in store.list_images()} == images
            found = {
                (n, t): (digest(store.get_label_uri(n, t)), store.get_label_info(n, t)["n"])
                for n in images
                for t in store.get_labels_by_image_id(n)
            }
            assert found == labels
    for name, tag, sha256 in versions:
        assert digest(stores[0].label_version(name, tag, sha256)) == sha256
    files = {f"labels/{t}/{Path(stores[0].get_label_uri(n, t)).name}" for n, t in labels}
    assert {f for f, held in tree(folder).items() if f.startswith("labels/") and held} == files
    assert json.loads(json.dumps(stores[0].json())) == stores[1].json()
