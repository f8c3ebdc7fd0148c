"""The measurement of what kill -9 leaves: that it sees what is lost, and that nothing is."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench.crash.book import TROUBLES, Book, look
from bench.crash.command import table
from bench.store import LABELS, fill
from tests.store_data import digest

SAVED = ("case_0001", "final")


@pytest.fixture
def killed(tmp_path):
    """A folder of 6 images, and the book of one label that was saved twice there and noted once."""
    from apps.samloop.store import SafeDatastore

    folder = tmp_path / "studies"
    fill(folder, 6)
    store = SafeDatastore(str(folder), labels=LABELS, auto_reload=False)
    book = Book()
    source = store.get_label_uri("case_0001", "original")
    for note in (None, 5):
        store.save_label(SAVED[0], source, SAVED[1], {"note": note})
        told = {"image": SAVED[0], "tag": SAVED[1]}
        book.take(told)
        book.take({**told, "done": "saved", "sha256": digest(store.get_label_uri(*SAVED))})
    store.update_label_info(*SAVED, {"note": 7})
    book.take({"image": SAVED[0], "tag": SAVED[1], "done": "noted", "note": 7})
    store.close()
    return folder, store, book


def troubles(folder, book, images=6):
    found, _ = look(folder, book, images)
    return {kind: count for kind, count in found.items() if count}


def test_what_is_all_there_is_no_trouble(killed):
    folder, _, book = killed
    assert (len(book.fresh), book.answered, book.doing) == (2, 3, set())
    assert troubles(folder, book) == {}
    assert troubles(folder, book, images=7) == {"images lost": 1}


def test_each_loss_is_counted(killed):
    folder, store, book = killed
    book.fresh.append((*SAVED, "0" * 64))
    assert troubles(folder, book) == {"versions lost": 1, "journal lines missing": 1}
    book.fresh.pop()
    book.notes[SAVED] = 8
    assert troubles(folder, book) == {"notes lost": 1}
    book.notes[SAVED] = 7
    Path(store.get_label_uri(*SAVED)).write_bytes(b"half")
    found = troubles(folder, book)
    assert found["labels lost"] == 1
    book.doing.add(SAVED)
    assert "labels lost" not in troubles(folder, book), "an unanswered save may have changed it"


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
def test_a_damaged_index_is_counted_though_the_store_starts(killed, content):
    folder, _, book = killed
    (folder / "datastore_v2.json").write_bytes(content)
    assert troubles(folder, book)["indexes damaged"] == 2, "by itself, and as the one that was set aside"


def test_damaged_lines_and_files_that_stay_are_counted(killed):
    folder, _, book = killed
    with (folder / ".samloop" / "journal.jsonl").open("ab") as journal:
        journal.write(b"half a li\n")
    stray = folder / "labels" / "final" / "deeper" / ".x.tmp"
    stray.parent.mkdir()
    stray.write_bytes(b"")
    assert troubles(folder, book) == {"journal lines damaged": 1, "temporary files left": 1}


def test_the_table_has_a_column_for_each_trouble():
    found = {"saving, 20 cases": Counter({"kills": 3, "labels lost": 1, "saves answered": 9})}
    head, _, row = table(found).splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert set(TROUBLES) <= set(cells)
    assert (cells["kills"], cells["labels lost"], cells["saves answered"]) == ("3", "1", "9")


@pytest.mark.slow
@pytest.mark.parametrize(("way", "kills"), [("saving", 10), ("training", 5), ("serving", 2)])
def test_nothing_is_lost_when_it_is_killed(tmp_path, way, kills):
    command = [sys.executable, "-m", "bench", "crash", "--out", str(tmp_path), "--ways", way]
    done = subprocess.run(
        [*command, "--kills", str(kills), "--cases", "20"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "crash.json").read_text())[f"{way}, 20 cases"]
    assert found["kills"] == kills
    assert not any(found.get(trouble) for trouble in TROUBLES)
    assert found.get("saves answered", 0) or found.get("rounds in the ledger", 0)
