"""The served application: routes, errors, what a client can and cannot reach, and that nothing blocks."""

import json
import tempfile
import threading
import time
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest

WINDOW = {"window_level": 100, "window_width": 200}


def infer(client, model="sam_click_2d", image="ct", output=None, files=None, session=None, **params):
    query = {"image": image, "output": output, "session_id": session}
    return client.post(
        f"/infer/{model}",
        params={k: v for k, v in query.items() if v is not None},
        data={"params": json.dumps(params)},
        files=files,
    )


def parts(reply):
    """The named parts of a multipart reply, as requests_toolbelt reads them."""
    from requests_toolbelt import MultipartDecoder

    found = {}
    for part in MultipartDecoder(reply.content, reply.headers["content-type"]).parts:
        disposition = part.headers[b"Content-Disposition"].decode()
        found[disposition.split('name="')[1].split('"')[0]] = part.content
    return found


def test_info_lists_what_the_viewers_show(served):
    client, _, _ = served
    info = client.get("/info/").json()
    assert info["labels"] == ["liver", "spleen", "aorta", "background"]
    assert {"sam_click_2d", "sam_click_3d", "unet"} <= set(info["models"])
    assert info["models"]["sam_click_2d"]["type"] == "deepgrow"
    assert info["models"]["sam_click_2d"]["dimension"] == 2
    for name in ("unet", "sam_auto_net", "pseudo_label"):
        assert info["models"][name]["labels"] in ([], {}), "3D Slicer would run an untrained model by itself"
    assert set(info["strategies"]) == {"first", "random", "uncertainty", "disagreement", "diverse"}
    assert next(iter(info["trainers"])) == next(iter(info["train_stats"])) == "unet", "viewers show the first"
    assert {"pseudo_label", "self_training", "mean_teacher", "weak_box"} < set(info["trainers"])
    assert "config" not in info
    assert info["datastore"]["total"] == 2


def test_click_is_answered_with_json_and_file(served, tmp_path):
    client, _, _ = served
    reply = infer(client, foreground=[[6, 6, 2]], label="liver", result_extension=".nrrd", **WINDOW)
    assert reply.status_code == 200
    found = parts(reply)
    assert json.loads(found["params"])["label_names"] == {"liver": 1}
    (tmp_path / "r.nrrd").write_bytes(found["image"])
    mask = nrrd.read(str(tmp_path / "r.nrrd"))[0]
    assert mask.shape == (24, 20, 6)
    assert mask[4:10, 5:9, 2].all()
    assert mask.sum() == 24


def test_ohif_gets_raw_nrrd_alone(served):
    client, _, _ = served
    reply = infer(
        client,
        output="image",
        foreground=[[6, 6, 2]],
        result_extension=".nrrd",
        result_compress=False,
        **WINDOW,
    )
    assert reply.headers["content-type"] != "application/json"
    assert b"encoding: raw" in reply.content[:400]
    assert reply.content.endswith(b"\0" * 100)
    assert len(reply.content) - reply.content.index(b"\n\n") - 2 == 24 * 20 * 6


def test_region_alone_and_no_file_where_nothing_is_found(served, tmp_path):
    client, _, _ = served
    sent = dict(result_extension=".nrrd", result_region=True, **WINDOW)
    found = parts(infer(client, foreground=[[6, 6, 2]], **sent))
    assert json.loads(found["params"])["region"] == {"low": [4, 5, 2], "high": [9, 8, 2]}
    (tmp_path / "r.nrrd").write_bytes(found["image"])
    assert nrrd.read(str(tmp_path / "r.nrrd"))[0].shape == (6, 4, 1)
    nothing = infer(client, foreground=[[1, 1, 2]], **sent)
    assert nothing.headers["content-type"] == "application/json"
    assert nothing.json()["empty"]
    assert nothing.json()["region"] is None
    assert infer(client, foreground=[[1, 1, 2]], result_region="x", **WINDOW).status_code == 400


def test_what_is_stored_is_never_a_region(served, tmp_path):
    client, _, _ = served
    sent = dict(label="spleen", save_label=True, label_tag="proposal", result_region=True, **WINDOW)
    assert infer(client, output="json", foreground=[[6, 6, 2]], **sent).status_code == 200
    stored = client.get("/datastore/label?label=ct&tag=proposal")
    (tmp_path / "stored.nii.gz").write_bytes(stored.content)
    assert nib.load(tmp_path / "stored.nii.gz").shape == (24, 20, 6)


@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_file_that_goes_while_it_is_sent_arrives_whole(served, monkeypatch, kind):
    """What another client removes meanwhile is sent to its end, and is a 404 from then on."""
    from apps.samloop.routes import datastore

    client, studies, _ = served
    content = (studies / "ct.nii.gz").read_bytes()
    client.put("/datastore/image?image=leaving", files={"file": ("a.nii.gz", content)})
    mask = nib.Nifti1Image(np.ones((24, 20, 6), np.uint8), np.diag([1, 1, 2, 1])).to_bytes()
    client.put("/datastore/label?image=leaving", files={"label": ("m.nii", mask)})

    def gone(path):
        client.delete("/datastore/image?id=leaving")
        assert not Path(path).exists()
        return "application/octet-stream"

    monkeypatch.setattr(datastore, "get_mime_type", gone)
    where = {"image": "/datastore/image?image=leaving", "label": "/datastore/label?label=leaving&tag=final"}
    reply = client.get(where[kind])
    assert reply.content == {"image": content, "label": mask}[kind]
    kinds = {"image": "leaving.nii.gz", "label": "leaving.nii"}
    assert reply.headers["content-disposition"] == f'attachment; filename="{kinds[kind]}"'
    missing = client.get(where[kind])
    assert missing.status_code == 404
    assert f"{kind} = 'leaving'" in missing.json()["detail"]


def test_a_reply_larger_than_a_piece_arrives_whole(served, monkeypatch):
    from apps.samloop import parts as pieces

    client, _, _ = served
    monkeypatch.setattr(pieces, "CHUNK", 1000)
    sent = dict(foreground=[[6, 6, 2]], result_extension=".nrrd", result_compress=False, **WINDOW)
    reply = infer(client, output="image", **sent)
    assert int(reply.headers["content-length"]) == len(reply.content)
    voxels = np.frombuffer(reply.content[-24 * 20 * 6 :], np.uint8).reshape((24, 20, 6), order="F")
    assert voxels[4:10, 5:9, 2].all()
    assert voxels.sum() == 24


def test_json_alone(served):
    client, _, _ = served
    assert infer(client, output="json", foreground=[[6, 6, 2]], **WINDOW).json()["slice"] == 2


def test_uploaded_image_needs_no_datastore(served):
    client, studies, _ = served
    files = {"file": ("any.png", (studies / "photo.png").read_bytes())}
    reply = infer(client, image="", files=files, output="json", foreground=[[22, 5]])
    assert reply.status_code == 200
    assert not reply.json()["empty"]


def test_existing_mask_travels_as_label(served):
    client, studies, _ = served
    from PIL import Image as PilImage

    part = np.zeros((18, 30), np.uint8)
    part[4, 21] = 1
    PilImage.fromarray(part).save(studies.parent / "part.png")
    files = {"label": ("part.png", (studies.parent / "part.png").read_bytes())}
    params = json.loads(parts(infer(client, image="photo", files=files, background=[[1, 1]]))["params"])
    assert params["prompts"]["existing_mask"]
    assert not params["empty"]


def test_session(served):
    client, studies, _ = served
    files = [("files", ("mine.nii.gz", (studies / "ct.nii.gz").read_bytes()))]
    session = client.put("/session/", files=files).json()["session_id"]
    assert client.get(f"/session/{session}").status_code == 200
    reply = infer(client, image="", session=session, output="json", foreground=[[6, 6, 2]], **WINDOW)
    assert reply.json()["slice"] == 2
    assert client.delete(f"/session/{session}").status_code == 200
    gone = infer(client, image="", session=session, foreground=[[6, 6, 2]])
    assert gone.status_code == 404
    assert "session_id" in gone.json()["detail"]


BAD = {
    "unknown image": ("POST", "/infer/sam_click_2d?image=nope", 404, "image = 'nope'"),
    "no image": ("POST", "/infer/sam_click_2d", 400, "image = ''"),
    "unknown model": ("POST", "/infer/nope?image=ct", 404, "choose one of sam_click_2d"),
    "image outside": ("POST", "/infer/sam_click_2d?image=/etc/passwd", 400, "image = '/etc/passwd'"),
    "session outside": ("POST", "/infer/sam_click_2d?session_id=../victim", 400, "session_id"),
    "bad output": ("POST", "/infer/sam_click_2d?image=ct&output=exe", 422, "output"),
    "unknown strategy": ("POST", "/activelearning/nope", 404, "choose one of first"),
    "unknown trainer": ("POST", "/train/nope", 404, "choose one of unet"),
    "too few labels": ("POST", "/train/unet", 409, "accepted"),
    "too few labels, all trainers": ("POST", "/train/", 409, "accepted"),
    "unknown scoring": ("POST", "/scoring/nope", 404, "this server has none"),
    "unknown batch model": ("POST", "/batch/infer/nope", 404, "choose one of"),
    "delete outside": ("DELETE", "/datastore/image?id=../../x", 400, "id = '../../x'"),
    "delete unknown": ("DELETE", "/datastore/image?id=zzz", 404, "zzz"),
    "label outside": ("GET", "/datastore/label?label=../../x&tag=final", 400, "label"),
    "tag outside": ("GET", "/datastore/label?label=ct&tag=../..", 400, "tag"),
    "no such label": ("GET", "/datastore/label?label=ct&tag=none", 404, ""),
    "no archive yet": ("GET", "/datastore/dataset", 404, "no case has been accepted"),
    "weights cannot be replaced": ("PUT", "/model/unet", 405, ""),
    "weights cannot be deleted": ("DELETE", "/model/unet", 405, ""),
    "checksum": ("HEAD", "/datastore/image?image=ct&check_sum=MD9:00", 400, ""),
    "no GPU's log": ("GET", "/logs/gpu", 404, "GPU"),
    "no DICOM to pass on": ("GET", "/proxy/dicom/wado/x", 404, ""),
    "info of an unknown label": ("GET", "/datastore/label/info?label=ct&tag=none", 404, "ct"),
    "label to delete": ("DELETE", "/datastore/label?id=ct&tag=none", 404, "ct"),
    "untrained model": ("POST", "/infer/unet?image=ct", 409, "unet"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_get_a_4xx_that_says_what_to_do(served, case):
    client, _, _ = served
    method, path, status, text = BAD[case]
    reply = client.request(method, path)
    assert reply.status_code == status, reply.text
    assert text in reply.text


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ("{bad", "not JSON"),
        ("[1]", "JSON object"),
        ('{"foreground": [[99, 1, 1]]}', "foreground = [99.0, 1.0, 1.0]"),
    ],
)
def test_bad_params_are_named(served, params, text):
    client, _, _ = served
    reply = client.post("/infer/sam_click_2d?image=ct", data={"params": params})
    assert reply.status_code == 400
    assert text in reply.json()["detail"]


@pytest.mark.parametrize("key", ["image", "image_path", "label_file", "model"])
def test_params_cannot_name_a_file_of_the_server(served, key):
    client, _, _ = served
    params = {"foreground": [[6, 6, 2]], key: "/etc/passwd", **WINDOW}
    reply = client.post("/infer/sam_click_2d?image=ct&output=json", data={"params": json.dumps(params)})
    assert reply.status_code == 200, "the key is not heeded"
    assert reply.json()["slice"] == 2
    assert not reply.json()["prompts"]["existing_mask"]


def test_damaged_upload_is_422(served):
    client, _, _ = served
    reply = infer(client, image="", files={"file": ("x.nii.gz", b"garbage")}, foreground=[[1, 1, 1]])
    assert reply.status_code == 422
    assert "cannot be read" in reply.json()["detail"]
    reply = infer(client, image="", files={"file": ("x.sh", b"#!/bin/sh")}, foreground=[[1, 1, 1]])
    assert reply.status_code == 415


def save(client, image, tag=None, content=None, name="l.nii.gz", params="{}"):
    query = {"image": image, **({"tag": tag} if tag else {})}
    return client.put(
        "/datastore/label", params=query, files={"label": (name, content)}, data={"params": params}
    )


def labelmap(tmp_path, value, shape=(24, 20, 6)):
    nib.save(nib.Nifti1Image(np.full(shape, value, np.uint8), np.eye(4)), tmp_path / "l.nii.gz")
    return (tmp_path / "l.nii.gz").read_bytes()


def test_what_is_saved_must_be_a_label_of_the_image_inside_the_store(served, tmp_path):
    client, studies, _ = served
    fine = labelmap(tmp_path, 1)
    outside = sorted(p.name for p in studies.parent.iterdir())
    cases = [
        (dict(image="ct", tag="../../pwn", content=fine), 400),
        (dict(image="../ct", content=fine), 400),
        (dict(image="nope", content=fine), 404),
        (dict(image="ct", content=b"garbage"), 422),
        (dict(image="ct", content=fine, name="x.sh"), 415),
        (dict(image="ct", content=labelmap(tmp_path, 9)), 422),
        (dict(image="ct", content=labelmap(tmp_path, 1, (3, 3, 3))), 422),
        (dict(image="ct", content=fine, params="{"), 400),
    ]
    for arguments, status in cases:
        reply = save(client, **arguments)
        assert reply.status_code == status, (arguments, reply.text)
        assert reply.json()["detail"]
    assert sorted(p.name for p in studies.parent.iterdir()) == outside
    assert client.get("/info/").json()["datastore"]["completed"] == 0


def test_uploaded_image_id_cannot_leave_the_store(served):
    client, studies, _ = served
    content = (studies / "photo.png").read_bytes()
    reply = client.put("/datastore/?image=../pwn", files={"file": ("a.png", content)})
    assert reply.status_code == 400
    assert not list(studies.parent.glob("pwn*"))


def test_accept_then_next_sample_then_nothing_left(served, tmp_path):
    client, _, _ = served
    first = client.post("/activelearning/first", json={"client_id": "me"}).json()
    assert first["id"] == "ct"
    assert first["path"].endswith("ct.nii.gz")
    assert save(client, "ct", content=labelmap(tmp_path, 2)).status_code == 200
    info = client.get("/info/").json()["datastore"]
    assert info["completed"] == 1
    assert client.post("/activelearning/random", json={"seed": 1}).json()["id"] == "photo"
    back = client.get("/datastore/label?label=ct&tag=final")
    assert back.status_code == 200
    everything = client.get("/datastore/?output=all").json()["objects"]
    assert everything["ct"]["labels"]["final"]
    assert client.get("/datastore/dataset").status_code == 200
    client.delete("/datastore/label?id=ct&tag=final")
    assert client.get("/info/").json()["datastore"]["completed"] == 0


def test_result_can_be_saved_as_original_but_never_as_accepted(served, tmp_path):
    client, _, _ = served
    request = dict(output="json", foreground=[[6, 6, 2]], label="spleen", save_label=True, **WINDOW)
    reply = infer(client, label_tag="final", **request)
    assert reply.status_code == 400
    assert infer(client, **request).status_code == 200
    stored = client.get("/datastore/label?label=ct&tag=original")
    (tmp_path / "stored.nii.gz").write_bytes(stored.content)
    assert set(np.unique(nib.load(tmp_path / "stored.nii.gz").dataobj)) == {0, 2}, (
        "spleen, not the first label"
    )
    assert client.get("/info/").json()["datastore"]["completed"] == 0
    assert infer(client, **{**request, "label": "tumour"}).status_code == 400


def test_info_answers_while_inference_runs(served, monkeypatch):
    """One inference is held inside the engine; every other route must still answer."""
    client, _, engine = served
    inside, release = threading.Event(), threading.Event()
    decode = engine.decode

    def held(*arguments):
        inside.set()
        assert release.wait(60)
        return decode(*arguments)

    monkeypatch.setattr(engine, "decode", held)
    replies = []
    thread = threading.Thread(target=lambda: replies.append(infer(client, foreground=[[7, 7, 3]], **WINDOW)))
    thread.start()
    try:
        assert inside.wait(60)
        assert client.get("/info/").status_code == 200
        assert client.get("/datastore/").status_code == 200
        assert client.post("/activelearning/first", json={}).status_code == 200
        assert not replies
    finally:
        release.set()
        thread.join()
    assert replies[0].status_code == 200


def test_slices_of_a_case_in_use_are_encoded_ahead_and_inside_the_studies_folder(served, monkeypatch):
    from sam_infer.engines.base import Encoding

    client, studies, engine = served
    monkeypatch.setattr(engine, "encoding", Encoding(side=64, cheap=False, device="cpu"))
    outside = sorted(p.name for p in studies.parent.iterdir())
    sent = dict(output="json", window_level=90, window_width=210)
    for _ in range(200):
        reply = infer(client, foreground=[[6, 6, 3]], **sent).json()
        if reply["embedding_progress"] == {"done": 6, "of": 6}:
            break
        time.sleep(0.7)
    encoded = engine.encoded
    assert infer(client, foreground=[[6, 6, 1]], **sent).json()["embedding_cached"]
    assert engine.encoded == encoded
    kept = sorted((studies / ".samloop" / "embeddings").rglob("*.safetensors"))
    assert len(kept) == 2, "slices 1 to 4 have the same pixels"
    assert sorted(p.name for p in studies.parent.iterdir()) == outside
    files = {"file": ("mine.nii.gz", (studies / "ct.nii.gz").read_bytes())}
    reply = infer(client, image="", files=files, foreground=[[6, 6, 2]], window_level=1, window_width=2)
    assert reply.status_code == 200
    assert sorted((studies / ".samloop" / "embeddings").rglob("*.safetensors")) == kept


def test_a_slice_along_another_axis_is_not_where_slices_are_encoded_ahead(served, monkeypatch):
    from monailabel.interfaces.utils.app import app_instance

    client, _, _ = served
    opened = []
    monkeypatch.setattr(app_instance().ahead, "open", lambda *_, k, **__: opened.append(k))
    for axis in (2, 0):
        sent = dict(model="sam_click_3d", foreground=[[8, 7, 3]], axis=axis, **WINDOW)
        assert infer(client, **sent).status_code == 200
    assert opened == [3, None]


def test_a_case_is_opened_when_it_is_given_out(served, monkeypatch):
    from monailabel.interfaces.utils.app import app_instance

    client, studies, _ = served
    opened = []
    monkeypatch.setattr(app_instance().ahead, "open", opened.append)
    assert client.post("/activelearning/first", json={"client_id": "me"}).json()["id"] == "ct"
    assert opened == [str(studies / "ct.nii.gz")]


def test_unexpected_errors_name_a_log_entry_and_no_inner_detail(served, monkeypatch):
    client, _, engine = served

    def broken(*_):
        raise RuntimeError("secret path /home/x")

    monkeypatch.setattr(engine, "decode", broken)
    reply = infer(client, foreground=[[8, 8, 4]], **WINDOW)
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert "log" in reply.json()["detail"]
    assert client.get("/info/").status_code == 200


def test_no_temporary_file_is_left(served, tmp_path, monkeypatch):
    client, studies, _ = served
    picture = (studies / "photo.png").read_bytes()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = {"file": ("a.png", picture)}
    assert infer(client, image="", files=files, foreground=[[22, 5]]).status_code == 200
    assert infer(client, image="", files=files, foreground=[[220, 5]]).status_code == 400
    assert infer(client, foreground=[[6, 6, 2]], save_label=True, label="tumour", **WINDOW).status_code == 400
    assert save(client, "ct", content=picture, name="l.png").status_code == 422
    assert client.put("/datastore/image", files={"file": ("a.png", b"garbage")}).status_code == 422
    assert client.put("/session/", files=[("files", ("a.exe", b"MZ"))]).status_code == 415
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("query", "names", "text"),
    [
        ("?uncompress=true", ["a.png"], "uncompress = True"),
        ("", ["a.png", "b.png"], "files = 2"),
        ("", ["a.tar"], "a.tar"),
    ],
)
def test_sessions_hold_one_image_and_unpack_nothing(served, query, names, text):
    client, studies, _ = served
    content = (studies / "photo.png").read_bytes()
    reply = client.put(f"/session/{query}", files=[("files", (name, content)) for name in names])
    assert 400 <= reply.status_code < 500
    assert text in reply.json()["detail"]


def test_a_training_gets_its_own_settings_and_nothing_else(served, monkeypatch):
    """``bundle_path`` would be put on the training process's module path, ``gpus`` into its environment."""
    from monailabel.interfaces.utils.app import app_instance
    from monailabel.utils.async_tasks import task

    client, _, _ = served
    started = []
    trainer = app_instance()._trainers["unet"]
    monkeypatch.setattr(trainer, "precheck", lambda _: None)
    monkeypatch.setattr(task, "run_background_task", lambda request, method: started.append(request) or {})
    body = {"iterations": 7, "bundle_path": "/tmp", "gpus": 5, "model": "x", "local_rank": 1}
    assert client.post("/train/unet", json=body).status_code == 200
    assert client.post("/train/", json={"unet": body}).status_code == 200
    monkeypatch.setattr(app_instance()._infers["unet"], "fingerprint", lambda: "f1")
    assert client.post("/batch/infer/unet", json={**body, "max_batch_size": 1}).status_code == 200
    assert started[0] == {"model": "unet", "iterations": 7}
    for request in started:
        assert not {"bundle_path", "gpus", "local_rank"} & set(request)
    assert client.post("/train/unet", json={"iterations": "abc"}).status_code == 400
    assert client.post("/train/", json={"unet": "abc"}).status_code == 400
    assert len(started) == 3
    monkeypatch.setattr(app_instance()._trainers["mean_teacher"], "precheck", lambda _: None)
    for sent, model in (({}, "unet"), ({"mean_teacher": {}}, "mean_teacher")):
        assert list(client.post("/train/", json=sent).json()) == [model]
        assert started[-1]["model"] == model
    both = {"unet": {}, "mean_teacher": {}}
    assert list(client.post("/train/", json=both).json()) == ["unet"], "each would replace the other's model"


@pytest.mark.parametrize("info", [[1], "x", None, 5, {"strategy": "x"}, {"id": "photo"}, {"n": float("nan")}])
def test_the_index_takes_only_objects_that_json_can_hold(served, info):
    client, _, _ = served
    reply = client.put("/datastore/image/info?image=ct", data={"info": json.dumps(info)})
    assert reply.status_code == 400
    assert client.get("/datastore/?output=all").status_code == 200
    assert client.post("/activelearning/first", json={"client_id": "me"}).status_code == 200


@pytest.mark.parametrize("kind", ["Application/X-WWW-form-urlencoded", "MULTIPART/form-data; boundary=bb"])
def test_a_content_type_in_capitals_is_checked_too(served, kind):
    client, _, _ = served
    body = 'info={"n": NaN}'
    if "boundary" in kind:
        body = '--bb\r\nContent-Disposition: form-data; name="info"\r\n\r\n{"n": NaN}\r\n--bb--\r\n'
    reply = client.put("/datastore/image/info?image=ct", content=body, headers={"content-type": kind})
    assert reply.status_code == 400, reply.text
    assert client.get("/datastore/?output=all").status_code == 200


@pytest.mark.parametrize("kind", ["application/json", "application/JSON", "application/vnd.x+json"])
def test_half_a_character_does_not_reach_the_index(served, kind):
    client, _, _ = served
    headers = {"content-type": kind}
    body = '{"client_id": "\\ud800"}'
    assert client.post("/activelearning/first", content=body, headers=headers).status_code == 400
    assert client.get("/datastore/?output=all").status_code == 200


def test_bodies_held_in_memory_are_bounded(served):
    from apps.samloop.bodies import MAX_BODY

    client, _, _ = served
    body = b'{"a": "' + b"x" * MAX_BODY + b'"}'
    headers = {"content-type": "application/json"}
    assert client.post("/train/unet", content=body, headers=headers).status_code == 413
    assert client.post("/train/unet", content=iter([b"{", b"}"]), headers=headers).status_code == 413
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post("/train/unet", content=iter([b"--x", b"--"]), headers=form).status_code == 413
    wrong = client.post("/train/unet?run_sync=secret", content=b"{}", headers=headers)
    assert wrong.status_code == 422
    assert "run_sync" in wrong.json()["detail"]
    assert "secret" not in wrong.text


def test_viewers_show_the_training_that_counts(served, monkeypatch):
    """They show the first statistics: of what runs, else of the last round of the first trainer's model."""
    from monailabel.interfaces.utils.app import app_instance

    client, _, _ = served
    trainers = app_instance()._trainers

    def first(**stats):
        for name in trainers:
            monkeypatch.setattr(trainers[name], "stats", lambda name=name: stats.get(name, {}))
        return next(iter(client.get("/info/").json()["train_stats"]))

    assert first() == "unet"
    assert first(unet={"round": 1}, mean_teacher={"round": 2}, cam_classifier={"round": 9}) == "mean_teacher"
    assert first(unet={"round": 3}, mean_teacher={"round": 2}) == "unet"
    assert first(unet={"round": 3}, cam_classifier={"running": 1}) == "cam_classifier"


def test_one_training_is_started_however_many_ask(served, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from monailabel.interfaces.utils.app import app_instance
    from monailabel.utils.async_tasks import task

    from apps.samloop.routes import learn

    client, _, _ = served
    started = []
    monkeypatch.setattr(app_instance()._trainers["unet"], "precheck", lambda _: None)
    monkeypatch.setattr(learn, "tasks", lambda _: started)
    monkeypatch.setattr(
        task,
        "run_background_task",
        lambda *_: started.append({"status": "SUBMITTED"}) or {"status": "SUBMITTED"},
    )
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: client.post("/train/unet", json={}).status_code, range(4)))
    assert sorted(replies) == [200, 429, 429, 429]
    assert client.post("/train/", json={}).status_code == 429
    started.clear()
    monkeypatch.setattr(app_instance()._trainers["unet"], "stats", lambda: {"running": 3})
    assert client.post("/train/unet", json={}).status_code == 429


def test_the_first_page_works_without_internet(served):
    client, _, _ = served
    text = client.get("/").text
    assert "sam_click_3d" in text
    assert "POST /infer/{model}" in text
    assert "http" not in text.replace("<!doctype html>", "")


def test_other_origins_need_the_hospitals_word(served, monkeypatch):
    from fastapi.testclient import TestClient
    from monailabel.config import settings

    from apps.samloop.server import create_app

    client, _, _ = served
    asked = {"origin": "https://viewer.example"}
    assert "access-control-allow-origin" not in client.get("/info/", headers=asked).headers
    monkeypatch.setattr(settings, "MONAI_LABEL_CORS_ORIGINS", ["https://viewer.example/"])
    allowed = TestClient(create_app()).get("/info/", headers=asked).headers
    assert allowed["access-control-allow-origin"] == "https://viewer.example"
