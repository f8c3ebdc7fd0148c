"""Names, JSON and files as clients send them."""

import io
import tempfile

import pytest
from fastapi import UploadFile

from apps.samloop.incoming import check_id, check_tag, check_task, parse_object, received
from sam_infer.errors import InputError


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/b",
        "",
        "..",
        ".x",
        "x\\y",
        "x\x00",
        " x",
        "a" * 181,
        "ä" * 91,
        "case.seg",
        "case.SEG",
        "\ud800",
    ],
)
def test_ids_cannot_leave_the_store(name):
    with pytest.raises(InputError, match="image"):
        check_id("image", name)


@pytest.mark.parametrize("name", ["case 1", "1.2.840.113619.2", "Schädel_Ä", "case(2)"])
def test_usual_ids_are_fine(name):
    assert check_id("image", name) == name


@pytest.mark.parametrize("tag", ["../../x", "a/b", "", ".", "..", ".hidden", "a" * 65, "x\x00", "x y"])
def test_tags_cannot_leave_the_store(tag):
    with pytest.raises(InputError, match="tag"):
        check_tag(tag)


@pytest.mark.parametrize(
    "text",
    [
        "{bad",
        "[1]",
        '"x"',
        "5",
        "null",
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": "\\ud800"}',
        '{"a": ' + "[" * 100_000,
        '{"a": ' + "[" * 40 + "]" * 40 + "}",
        '{"a": ' + "9" * 5000 + "}",
        b"\xff",
    ],
)
def test_json_that_could_not_be_stored_is_refused(text):
    with pytest.raises(InputError, match="params"):
        parse_object("params", text)


@pytest.mark.parametrize(("text", "value"), [("", {}), ('{"ä": [1, {"b": 2.5}]}', {"ä": [1, {"b": 2.5}]})])
def test_json_objects_are_read(text, value):
    assert parse_object("params", text) == value


def test_a_task_fits_on_a_command_line():
    assert check_task({"iterations": 5}) == {"iterations": 5}
    with pytest.raises(InputError, match="10000 at most"):
        check_task({"iterations": "0" * 20_000})


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        ("../../x.png", "x.png"),
        ("..", None),
        ("a.exe", None),
        (".hid.nii.gz", "upload.nii.gz"),
        ("ä" * 99 + ".PNG", "upload.png"),
    ],
)
def test_uploads_keep_a_harmless_name_and_leave_nothing(tmp_path, monkeypatch, sent, name):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    upload = UploadFile(io.BytesIO(b"content"), filename=sent)
    if name is None:
        with pytest.raises(InputError, match="name the file"), received("file", upload):
            pass
    else:
        with received("file", upload) as path:
            assert path.name == name
            assert path.parent.parent == tmp_path
            assert path.read_bytes() == b"content"
    assert list(tmp_path.iterdir()) == []
