"""The journal: whole lines, each of them on the disk, whatever becomes of who writes it."""

import json
import os

import pytest

from apps.samloop.journal import Journal, acting, encoded, line, made_by, said_by


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "home" / "journal.jsonl")


def images(journal, start=0):
    return [entry["image"] for entry, _ in journal.read(start)]


def put(journal, *names):
    return journal.append(encoded([line("saved", name) for name in names]))


def test_lines_are_read_from_any_lines_end(journal):
    assert images(journal) == [] and journal.size() == 0
    first = put(journal, "a")
    end = put(journal, "b", "ä")
    assert journal.size() == end
    assert images(journal) == ["a", "b", "ä"]
    assert images(journal, first) == ["b", "ä"]
    assert [place for _, place in journal.read()][-1] == end


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_line_that_was_cut_off_by_a_crash_is_no_line_and_the_next_is_whole(journal, cut):
    whole = put(journal, "a")
    end = put(journal, "b")
    with journal.path.open("rb+") as file:
        file.truncate(end - cut)
    assert images(journal) == ["a"]
    put(journal, "c")
    assert images(journal) == ["a", "c"]
    assert images(journal, whole) == ["c"]


def test_a_first_line_that_was_cut_off_leaves_nothing(journal):
    end = put(journal, "a")
    os.truncate(journal.path, end - 5)
    assert journal.mend() == 0
    put(journal, "b")
    assert images(journal) == ["b"]


@pytest.mark.parametrize(
    "damage", [b"\0" * 30 + b"\n", b"{\n", b"[1]\n", b'{"event": 1, "image": "a"}\n', b"\xff\n"]
)
def test_a_damaged_line_is_named_and_left_out(journal, damage, caplog):
    put(journal, "a")
    with journal.path.open("ab") as file:
        file.write(damage)
    put(journal, "b")
    assert images(journal) == ["a", "b"]
    assert "damaged" in caplog.text


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_what_cannot_be_written_whole_is_not_there_at_all(journal, monkeypatch, failing):
    put(journal, "a")
    before = journal.path.read_bytes()

    def half(file, content):
        file.write(content[:10])
        raise OSError(28, "No space left on device")

    def fail(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if failing == "write":
            patch.setattr("apps.samloop.journal._write", half)
        else:
            patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            put(journal, "b")
    assert journal.path.read_bytes() == before
    put(journal, "c")
    assert images(journal) == ["a", "c"]


def test_only_lines_that_tell_of_a_name_are_looked_at(journal):
    put(journal, "a", 'b"', "ab")
    assert [entry["image"] for entry, _ in journal.read(holding="a")] == ["a"]
    assert [entry["image"] for entry, _ in journal.read(holding='b"')] == ['b"']


def test_places_between_lines_are_told_from_others(journal):
    end = put(journal, "a")
    assert journal.is_end(0) and journal.is_end(end)
    assert not journal.is_end(end - 1) and not journal.is_end(end + 1)


def test_a_line_break_in_a_name_does_not_break_the_line(journal):
    journal.append(encoded([line("info", "a", info={"note": "one\ntwo\u2028three\r"})]))
    ((entry, _),) = journal.read()
    assert entry["info"]["note"] == "one\ntwo\u2028three\r"


def test_what_json_has_no_word_for_is_not_written(journal):
    for value in (float("nan"), "\ud800"):
        with pytest.raises(ValueError):
            journal.append(encoded([line("info", "a", info={"x": value})]))
    assert journal.size() == 0


def test_who_it_was(journal):
    assert said_by({}) == {"who": None, "client": None}
    assert said_by({"client_id": "slicer"}) == {"who": "slicer", "client": "slicer"}
    assert said_by({"client_id": "slicer", "user": "ann"})["who"] == "ann"
    with acting("bob"):
        assert said_by({"client_id": "slicer"}) == {"who": "bob", "client": "slicer"}
        assert said_by({"user": "ann"})["who"] == "bob"
    with acting(""):
        assert said_by({"client_id": "slicer", "user": "admin"})["who"] == "slicer"
        assert said_by({"user": "admin"})["who"] is None
    assert said_by({})["who"] is None


@pytest.mark.parametrize(
    ("info", "made"),
    [
        ({}, {}),
        ({"model": "unet"}, {"model": "unet"}),
        (
            {"model": "unet", "params": {"model": {"round": 3, "fingerprint": "ab"}}},
            {"model": "unet", "round": 3, "fingerprint": "ab"},
        ),
        ({"provenance": {"fingerprint": "cd", "key": 1}}, {"fingerprint": "cd"}),
        ({"model": "x", "params": "odd", "provenance": ["odd"]}, {"model": "x"}),
    ],
)
def test_which_model_it_was(info, made):
    assert made_by(info) == made


def test_times_are_utc(journal):
    put(journal, "a")
    ((entry, _),) = journal.read()
    assert entry["time"].endswith("+00:00")
    assert json.loads(journal.path.read_text()) == entry
