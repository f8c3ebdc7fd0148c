"""`samloop doctor` on stores with each kind of damage, made for real."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from apps.samloop.checks import store
from apps.samloop.checks.finding import Subject
from apps.samloop.home import home_of
from apps.samloop.journal import HOME, NAME, encoded, line
from tests.conftest import save_png
from tests.findings import only, told


@pytest.fixture
def studies(tmp_path):
    """Two images, an accepted label, an index and a journal that agree."""
    folder = tmp_path / "studies"
    (folder / "labels" / "final").mkdir(parents=True)
    for name in ("one", "two"):
        save_png(folder / f"{name}.png", np.arange(300, dtype=np.uint8).reshape(15, 20))
    label = save_png(folder / "labels" / "final" / "one.png", np.ones((15, 20), np.uint8))
    content = label.read_bytes()
    entry = {"ext": ".png", "info": {}, "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    image = {"ext": ".png", "info": {}}
    journal = encoded([line("saved", "one", "final", **entry)])
    (folder / HOME).mkdir()
    (folder / HOME / NAME).write_bytes(journal)
    index = {
        "objects": {
            "one": {"image": image, "labels": {"final": entry}},
            "two": {"image": image, "labels": {}},
        },
        "journal": len(journal),
    }
    (folder / "datastore_v2.json").write_text(json.dumps(index))
    return folder


def look(folder):
    return store.store(Subject(studies=str(folder), home=home_of(str(folder))))


def test_a_store_in_order_has_nothing_to_tell(studies):
    found = look(studies)
    assert {f.status for f in found} == {"ok"} or told(found, "warn") == [
        text for text in told(found) if text.startswith("disk")
    ]
    assert any("2 images, labels: 1 of tag final" in text for text in told(found))
    assert any("1 labels compared by their SHA-256" in text for text in told(found))
    assert any("2 of 2 were read through" in text for text in told(found))


def test_what_the_store_itself_writes_is_in_order(tmp_path):
    """Its index is older than its journal here, as after a kill."""
    from apps.samloop.store import SafeDatastore

    folder = tmp_path / "studies"
    folder.mkdir()
    for name in ("one", "two"):
        save_png(folder / f"{name}.png", np.arange(300, dtype=np.uint8).reshape(15, 20))
    datastore = SafeDatastore(str(folder), labels={"liver": 1}, auto_reload=False)
    for name in ("one", "two"):
        for value in (0, 1):
            mask = save_png(tmp_path / "mask.png", np.full((15, 20), value, np.uint8))
            datastore.save_label(name, str(mask), "final", {})
    datastore.remove_label("two", "final")
    found = no_disk(look(folder))
    assert told(found, "warn") == told(found, "fail") == []
    assert any("labels: 1 of tag final" in text for text in told(found))
    assert any("1 labels compared by their SHA-256" in text for text in told(found))


def no_disk(findings):
    return [f for f in findings if f.check != "disk"]


def test_looking_changes_nothing(studies):
    (studies / "datastore_v2.json").write_text("{ damaged")
    before = {path: path.stat().st_mtime_ns for path in studies.rglob("*")}
    look(studies)
    assert {path: path.stat().st_mtime_ns for path in studies.rglob("*")} == before


def test_a_missing_folder_fails(tmp_path):
    only(look(tmp_path / "none"), "fail", "there is no folder")


@pytest.mark.parametrize("damage", ['{"objects": ', '{"objects": [1]}', "[]", '{"objects": {"one": {}}}'])
def test_a_damaged_index_is_named(studies, damage):
    (studies / "datastore_v2.json").write_text(damage)
    only(no_disk(look(studies)), "warn", "index", "datastore_v2.json is damaged")


def test_a_damaged_index_that_was_set_aside_is_named(studies):
    (studies / HOME / "datastore_v2.17.damaged.json").write_text("{")
    only(no_disk(look(studies)), "warn", "datastore_v2.17.damaged.json")


def test_a_label_that_was_changed_behind_the_store_is_found_at_the_same_size(studies):
    path = studies / "labels" / "final" / "one.png"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    only(no_disk(look(studies)), "warn", "1 labels are not as they were saved: final/one")


def test_files_that_are_recorded_and_gone_are_found(studies):
    (studies / "labels" / "final" / "one.png").unlink()
    (studies / "two.png").unlink()
    only(
        no_disk(look(studies)), "warn", "2 files that are recorded are not there", "final/one.png", "two.png"
    )


def test_lines_of_the_journal_beyond_the_index_count(studies):
    """The index file may be older than the store."""
    with (studies / HOME / NAME).open("ab") as file:
        file.write(encoded([line("removed", "one", "final")]))
    (studies / "labels" / "final" / "one.png").unlink()
    found = no_disk(look(studies))
    assert told(found, "warn") == []
    with (studies / HOME / NAME).open("ab") as file:
        file.write(encoded([line("saved", "two", "final", ext=".nrrd", info={}, size=5, sha256="0")]))
    only(no_disk(look(studies)), "warn", "final/two.nrrd")


def test_a_damaged_journal_is_named_and_the_rest_is_read(studies):
    path = studies / HOME / NAME
    path.write_bytes(b"no json\n" + path.read_bytes())
    found = no_disk(look(studies))
    warnings = told(found, "warn")
    assert any("journal" in text and "is damaged" in text for text in warnings), warnings


def test_a_journal_of_another_store_is_named(studies):
    (studies / HOME / NAME).write_bytes(b"{}\n")
    assert any("does not hold the place" in text for text in told(look(studies), "warn"))


def test_a_torn_last_line_is_no_damage(studies):
    with (studies / HOME / NAME).open("ab") as file:
        file.write(b'{"event": "sav')
    found = no_disk(look(studies))
    assert told(found, "warn") == []
    assert any("last line is unfinished" in text for text in told(found, "ok"))


def test_a_damaged_image_is_named(studies):
    path = studies / "two.png"
    path.write_bytes(path.read_bytes()[:60])
    only(no_disk(look(studies)), "warn", "two.png", "cannot be read")


def test_ids_that_clash_and_names_that_cannot_be_ids_are_named(studies):
    shutil.copy(studies / "one.png", studies / "ONE.png")
    shutil.copy(studies / "one.png", studies / "two.bmp")
    shutil.copy(studies / "one.png", studies / "con.png")
    shutil.copy(studies / "one.png", studies / "labels" / "final" / "stray.png")
    warnings = told(no_disk(look(studies)), "warn")
    assert any("differ in capitals only: ONE, one" in text for text in warnings), warnings
    assert any("two.png (two.bmp has the same id and is newer)" in text for text in warnings)
    assert any("con.png" in text and "cannot be an id" in text for text in warnings)
    assert any("labels have no image: final/stray" in text for text in warnings)
    assert len(warnings) == 4, warnings


def test_images_from_the_future_and_left_temporary_files_are_told(studies):
    left = studies / ".one.png.1.1.tmp"
    left.touch()
    os.utime(left, (time.time() - 7200,) * 2)
    os.utime(studies / "one.png", (time.time() + 86400,) * 2)
    found = no_disk(look(studies))
    only(found, "warn", "clock", "from the future: one.png")
    assert any("1 temporary files" in text for text in told(found, "ok"))


def test_a_store_that_cannot_be_written_fails(studies, monkeypatch):
    """As root everything may be written, so the answer of the system is played."""
    closed = studies / "labels" / "final"
    monkeypatch.setattr(store.os, "access", lambda path, mode: Path(path) != closed)
    only(no_disk(look(studies)), "fail", "no right to read and write", str(closed))


def test_a_read_only_disk_fails(studies, monkeypatch):
    monkeypatch.setattr(store.os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    only(store._rights(studies), "fail", "read-only")


def test_an_empty_store_is_told_unless_images_are_fetched_into_it(tmp_path):
    only(no_disk(look(tmp_path)), "warn", "0 images")
    working_copy = Subject(studies="http://pacs.example/dicom-web", home=tmp_path)
    assert told(no_disk(store.store(working_copy)), "warn") == []
