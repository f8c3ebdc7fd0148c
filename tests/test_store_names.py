"""What clients and folders can be called, and that nothing reaches beyond the studies folder."""

import gzip
import unicodedata
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as PilImage

from sam_infer.errors import InputError
from tests.store_data import SHAPE, digest, make_folder, open_store, tree, values, write

IMAGE = nib.Nifti1Image(np.zeros((24, 20, 6), np.int16), np.diag([1, 1, 2, 1])).to_bytes()
LABEL = nib.Nifti1Image(np.ones((24, 20, 6), np.uint8), np.diag([1, 1, 2, 1])).to_bytes()
SHA256 = "0" * 64
#: Ids that would lie elsewhere, be another file, or be no file at all on some computer.
IDS = [
    "../pwn", "../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "..", ".", ".hidden", "a\0b", "a\nb",
    "a\x85b", "a:b", "CON", "nul.nii", "com1", "x" * 181, "case.seg", "\u202eexe", " a", "a ", "C:\\x",
    "%2e%2e%2fpwn/",
]  # fmt: skip
TAGS = [
    "../../pwn_tag",
    "/abs",
    "a/b",
    "..",
    ".x",
    "a b",
    "ä",
    "x" * 65,
    "Final",
    "ORIGINAL",
    "con",
    "x.",
    "\0",
]


def requests_with(where):
    """The requests that name an id or a tag: method, path, query, what is sent along."""
    label = {"files": {"label": ("l.nii", LABEL)}}
    image = {"files": {"file": ("i.nii", IMAGE)}}
    noted = {"data": {"info": "{}"}}
    if where == "tag":
        return [
            ("PUT", "/datastore/label", {"image": "ct", "tag": ...}, label),
            ("GET", "/datastore/label", {"label": "ct", "tag": ...}, {}),
            ("HEAD", "/datastore/label", {"image": "ct", "tag": ...}, {}),
            ("DELETE", "/datastore/label", {"id": "ct", "tag": ...}, {}),
            ("GET", "/datastore/label/info", {"label": "ct", "tag": ...}, {}),
            ("PUT", "/datastore/label/info", {"label": "ct", "tag": ...}, noted),
            ("PUT", "/datastore/updatelabelinfo", {"label": "ct", "tag": ...}, {"data": {"params": "{}"}}),
            ("GET", "/datastore/label/history", {"image": "ct", "tag": ...}, {}),
            ("GET", "/datastore/label/version", {"image": "ct", "tag": ..., "sha256": SHA256}, {}),
            ("PUT", "/datastore/label/restore", {"image": "ct", "tag": ..., "sha256": SHA256}, {}),
        ]
    return [
        ("PUT", "/datastore/image", {"image": ...}, image),
        ("PUT", "/datastore/", {"image": ...}, image),
        ("GET", "/datastore/image", {"image": ...}, {}),
        ("HEAD", "/datastore/image", {"image": ...}, {}),
        ("DELETE", "/datastore/image", {"id": ...}, {}),
        ("DELETE", "/datastore/", {"id": ...}, {}),
        ("GET", "/datastore/image/info", {"image": ...}, {}),
        ("PUT", "/datastore/image/info", {"image": ...}, noted),
        ("PUT", "/datastore/label", {"image": ...}, label),
        ("GET", "/datastore/label", {"label": ..., "tag": "final"}, {}),
        ("HEAD", "/datastore/label", {"image": ..., "tag": "final"}, {}),
        ("DELETE", "/datastore/label", {"id": ..., "tag": "final"}, {}),
        ("GET", "/datastore/label/info", {"label": ..., "tag": "final"}, {}),
        ("PUT", "/datastore/label/info", {"label": ..., "tag": "final"}, noted),
        ("PUT", "/datastore/updatelabelinfo", {"label": ..., "tag": "final"}, {"data": {"params": "{}"}}),
        ("GET", "/datastore/label/history", {"image": ...}, {}),
        ("GET", "/datastore/label/version", {"image": ..., "sha256": SHA256}, {}),
        ("PUT", "/datastore/label/restore", {"image": ..., "sha256": SHA256}, {}),
        ("POST", "/infer/sam_click_2d", {"image": ...}, {"data": {"params": '{"foreground": [[6, 6, 2]]}'}}),
    ]


def everything(studies):
    """The store, but for the index file, which is written some time later; and what lies beside it."""
    return tree(studies, without={"embeddings", "datastore_v2.json"}), sorted(studies.parent.iterdir())


@pytest.mark.parametrize("where", ["id", "tag"])
def test_no_name_reaches_beyond_the_store_or_changes_it(served, where):
    client, studies, _ = served
    before = everything(studies)
    for name in TAGS if where == "tag" else IDS:
        for method, path, query, sent in requests_with(where):
            asked = {key: name if value is ... else value for key, value in query.items()}
            reply = client.request(method, path, params=asked, **sent)
            assert reply.status_code == 400, (method, path, name, reply.text)
    assert everything(studies) == before


def test_other_ways_out_are_closed(served):
    """Paths and sessions where an id belongs, and the names of uploads."""
    client, studies, _ = served
    before = everything(studies)
    click = {"params": '{"foreground": [[6, 6, 2]], "image": "/etc/passwd"}'}
    probes = [
        (client.post("/infer/sam_click_2d?image=", data=click), 400),
        (client.post("/infer/sam_click_2d?image=ct&session_id=../victim", data=click), 400),
        (client.get("/session/..%2Fvictim"), 404),
        (client.get("/session/a..b"), 400),
        (client.delete("/datastore/image?id=missing"), 404),
        (client.delete("/datastore/label?id=missing&tag=final"), 404),
        (client.delete("/datastore/label?id=ct&tag=missing"), 404),
        (client.get("/datastore/image?image=missing"), 404),
        (client.get("/datastore/image/info?image=missing"), 404),
        (client.get("/datastore/label/info?label=ct&tag=missing"), 404),
        (client.get("/datastore/label/history?image=missing"), 404),
        (client.get("/datastore/label/version", params={"image": "ct", "sha256": "../x"}), 400),
        (client.put("/datastore/label?image=ct", files={"label": ("x.sh", b"#!/bin/sh")}), 415),
        (client.put("/datastore/label?image=ct", files={"label": ("x.nii.gz", b"garbage")}), 422),
        (client.put("/datastore/label?image=missing", files={"label": ("x.nii", LABEL)}), 404),
        (client.put("/datastore/image?image=x", files={"file": ("x.sh", b"#!/bin/sh")}), 415),
    ]
    assert [(reply.status_code, reply.text) for reply, status in probes if reply.status_code != status] == []
    assert everything(studies) == before


def test_an_uploads_own_path_is_only_a_name(served):
    client, studies, _ = served
    before = sorted(studies.parent.iterdir())
    reply = client.put("/datastore/image", files={"file": ("../../up/load.nii", IMAGE)})
    assert reply.json() == {"image": "load"}
    assert sorted(studies.parent.iterdir()) == before and (studies / "load.nii").is_file()
    client.delete("/datastore/image?id=load")


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "studies")


@pytest.fixture
def store(folder):
    return open_store(folder)


@pytest.mark.parametrize(
    ("there", "new"), [("a", "A"), ("Sch\u00e4del", "Scha\u0308del"), ("STRASSE", "straße")]
)
def test_an_id_that_some_disk_takes_for_another_is_refused(tmp_path, there, new):
    store = open_store(make_folder(tmp_path / "studies", names=(there,)))
    image = write(tmp_path / "i.nii.gz", 1)
    with pytest.raises(InputError, match="choose another id") as caught:
        store.add_image(new, image, {})
    assert caught.value.status == 409
    store.add_image(there, image, {})
    assert store.list_images() == [there]


def test_names_that_are_there_already_are_served_as_they_are(tmp_path):
    """On a disk that tells them apart, both are: nothing that somebody put there is left out."""
    names = ["a", "A", "e\u0301", "\u00e9"]
    folder = make_folder(tmp_path / "studies", names=names)
    assert len(list(folder.iterdir())) == 4
    store = open_store(folder)
    assert sorted(store.list_images()) == sorted(names)
    assert all(unicodedata.normalize("NFC", n) for n in store.list_images())


def test_linked_images_are_read_and_never_written_through(tmp_path, folder):
    """Studies folders are often links to images elsewhere."""
    scan = Path(write(tmp_path / "scan_0001.nii.gz", 7, dtype=np.int16))
    before = digest(scan)
    (folder / "linked.nii.gz").symlink_to(scan)
    store = open_store(folder)
    assert store.get_image_uri("linked") == str(folder / "linked.nii.gz")
    store.save_label("linked", write(tmp_path / "l.nii.gz", 1), "final", {})
    assert [Path(case["image"]).name for case in store.datalist()] == ["linked.nii.gz"]
    store.add_image("linked", write(tmp_path / "new.nii.gz", 3, dtype=np.int16), {})
    assert digest(scan) == before
    assert not (folder / "linked.nii.gz").is_symlink()
    (folder / "linked.nii.gz").unlink()
    (folder / "linked.nii.gz").symlink_to(scan)
    store.remove_image("linked")
    assert digest(scan) == before
    assert not (folder / "linked.nii.gz").is_symlink()


@pytest.mark.parametrize("place", ["labels", "labels/final", "labels/new"])
def test_no_label_is_written_through_a_link(tmp_path, folder, place):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "final").mkdir(parents=True)
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).symlink_to(elsewhere)
    label = write(tmp_path / "l.nii.gz", 1)
    before = tree(elsewhere)
    with pytest.raises(InputError, match="out of the studies folder"):
        open_store(folder).save_label("a", label, "new" if place.endswith("new") else "final", {})
    assert tree(elsewhere) == before


def test_a_label_that_is_a_link_out_of_the_folder_is_not_served(tmp_path, folder, caplog):
    secret = Path(write(tmp_path / "secret.nii.gz", 1))
    (folder / "labels" / "final").mkdir(parents=True)
    (folder / "labels" / "final" / "a.nii.gz").symlink_to(secret)
    store = open_store(folder)
    assert store.get_labeled_images() == []
    assert "a link that leads out" in caplog.text
    before = digest(secret)
    store.save_label("a", write(tmp_path / "l.nii.gz", 2), "final", {})
    assert digest(secret) == before and values(store, "a") == [2]


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.zeros((*SHAPE, 2), np.uint8), "one channel"),
        (np.zeros((*SHAPE, 3), np.uint8), "one channel"),
        (np.zeros((*SHAPE[::-1],), np.uint8), "image's shape"),
        (np.zeros((*SHAPE[:2], 1), np.uint8), "image's shape"),
        (np.full(SHAPE, 0.5, np.float32), "whole numbers"),
        (np.full(SHAPE, np.nan, np.float32), "whole numbers"),
        (np.full(SHAPE, np.inf, np.float32), "label values must be"),
        (np.full(SHAPE, -1, np.int16), "label = -1"),
        (np.full(SHAPE, 2**40, np.float64), "label values must be"),
        (np.full(SHAPE, 3, np.uint8), "1 = liver, 2 = spleen"),
        (np.full(SHAPE, 1 + 1j, np.complex64), "label"),
    ],
)
def test_labels_that_are_none_of_the_image_are_refused(folder, store, tmp_path, array, text):
    before = tree(folder)
    path = write(tmp_path / "l.nii", array)
    with pytest.raises(InputError, match=text) as caught:
        store.save_label("a", path, "final", {})
    assert caught.value.status == 422
    assert tree(folder) == before


def test_colour_pictures_are_no_labels(tmp_path):
    folder = tmp_path / "studies"
    folder.mkdir()
    PilImage.fromarray(np.zeros((5, 6), np.uint8)).save(folder / "p.png")
    store = open_store(folder)
    for channels in (3, 4):
        array = np.broadcast_to(np.arange(channels, dtype=np.uint8), (5, 6, channels))
        PilImage.fromarray(array.copy()).save(tmp_path / "colour.png")
        with pytest.raises(InputError) as caught:
            store.save_label("p", str(tmp_path / "colour.png"), "final", {})
        assert caught.value.status == 422
    PilImage.fromarray(np.ones((5, 6), np.uint8)).save(tmp_path / "l.png")
    store.save_label("p", str(tmp_path / "l.png"), "final", {})


def test_a_few_bytes_that_unpack_to_gigabytes_take_no_memory(store, tmp_path):
    """As nii.gz, with the image's shape in the header, and with its own."""
    import tracemalloc

    header = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4)).to_bytes()
    huge = nib.Nifti1Header(header[:348])
    huge.set_data_shape((4000, 4000, 100))
    for name, start in (("lies", header), ("huge", huge.binaryblock + header[348:352])):
        path = tmp_path / f"{name}.nii.gz"
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(start)
            for _ in range(256):
                file.write(bytes(1 << 20))
        tracemalloc.start()
        if name == "huge":
            with pytest.raises(InputError):
                store.save_label("a", str(path), "final", {})
        else:
            store.save_label("a", str(path), "final", {})
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 64 << 20
