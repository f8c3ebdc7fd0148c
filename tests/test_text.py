"""What is said about a label, where it comes from, and how it becomes numbers."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from sam_infer.errors import InputError
from sam_infer.text.descriptions import describe, shipped, spoken
from sam_infer.text.encoders import ClipTextEncoder, HashedTextEncoder
from sam_infer.text.endpoint import EndpointDescriptions, EndpointSettings
from sam_infer.text.labeltexts import LabelTexts, TextSettings

# Descriptions


def test_every_shipped_description_keeps_the_rules():
    texts = shipped().texts
    assert len(texts) >= 60
    for name, text in texts.items():
        for side in ("", "left "):
            said = text.replace("{side}", side)
            assert re.fullmatch(r"[A-Z][A-Za-z ,\-]{60,219}\.", said), (
                name
            )  # one sentence, no digits, no braces
            assert 12 <= len(said.split()) <= 40, name
        assert not re.search(r"\b(patient|treat|therap|surgery|dose|cm|mm|year)", text), name
    assert len(set(texts.values())) == len(texts)


def test_common_labels_are_described():
    for label in [
        "liver",
        "spleen",
        "kidney",
        "kidney_left",
        "pancreas",
        "aorta",
        "lungs",
        "heart",
        "left_atrium",
        "pulmonary_artery",
        "vertebrae_L3",
        "urinary_bladder",
        "prostate",
        "stomach",
        "gallbladder",
        "adrenal_gland_right",
        "esophagus",
        "trachea",
        "brain_tumor",
        "liver_lesion",
        "breast_lesion",
        "lung_nodule",
        "sarcoma_mass",
        "tooth",
        "thyroid_nodule",
        "polyp",
        "optic_disc",
        "skin_lesion",
        "postcava",
        "duodenum",
        "lung_upper_lobe_left",
        "rib_right_4",
        "hip_left",
    ]:
        assert describe(label), label


def test_case_order_spelling_plural_and_numbers_make_no_difference():
    for same in ("brain_tumor", "Brain Tumour", "tumor-brain", "brainTumor", "brain_tumors", "brain tumor 2"):
        assert describe(same) == shipped().texts["brain tumour"], same
    assert describe("portal_vein_and_splenic_vein") == describe("splenic vein and portal vein") is not None


def test_sides_are_named_and_told_apart_from_names():
    assert describe("kidney_left").startswith("The left kidney is")
    assert describe("Right Kidney").startswith("The right kidney is")
    assert describe("kidneys").startswith("The kidney is")
    assert describe("kidney_left_and_right") == describe("kidney")
    assert describe("ovarian cyst").startswith("An ovarian") and describe("rt ovarian cyst").startswith(
        "A right"
    )
    assert describe("atrium_left_heart") == shipped().texts["left atrium"] != shipped().texts["right atrium"]


@pytest.mark.parametrize("label", ["", "thing", "liver machine", "left", "7"])
def test_what_is_not_known_has_no_description(label):
    assert describe(label) is None


def test_labels_are_said_as_one_says_them():
    assert spoken("kidney_left") == "left kidney"
    assert spoken("Liver  lesion") == "Liver lesion"
    assert spoken("_") == "_"


# Encoders


def test_hashed_embeddings_are_near_for_texts_that_share_words():
    encoder = HashedTextEncoder()
    rows = encoder.encode(["a round dark cyst", "round dark cysts", "a long bony shaft", "a round dark cyst"])
    assert rows.shape == (4, encoder.width) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    assert rows[0] @ rows[1] > 0.5 > 0.3 > rows[0] @ rows[2]
    assert np.array_equal(rows[0], rows[3])


def test_hashed_embeddings_tell_all_shipped_descriptions_apart():
    said = [text.replace("{side}", side) for text in shipped().texts.values() for side in ("left ", "right ")]
    rows = HashedTextEncoder().encode(list(dict.fromkeys(said)))
    near = rows @ rows.T - 2 * np.eye(len(rows))
    assert near.max() < 0.999


def test_hashed_embeddings_are_the_same_in_another_process():
    code = (
        "import sys; from sam_infer.text.encoders import HashedTextEncoder as E;"
        "sys.stdout.buffer.write(E().encode(['the left kidney']).tobytes())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert out.stdout == HashedTextEncoder().encode(["the left kidney"]).tobytes()


@pytest.mark.parametrize("texts", [[""], ["liver", " "], "liver", [3]])
def test_encoders_refuse_what_is_not_a_list_of_texts(texts):
    with pytest.raises(ValueError, match="texts must be"):
        HashedTextEncoder().encode(texts)


class FakeClip:
    fingerprint = "abc"

    def __init__(self, rows):
        self.rows = np.array(rows, np.float32)

    def text(self, texts):
        return self.rows[: len(texts)]


def test_clip_embeddings_are_made_unit_length():
    encoder = ClipTextEncoder(FakeClip([[3, 4, 0], [0, 0, 2]]))
    np.testing.assert_allclose(encoder.encode(["a", "b"]), [[0.6, 0.8, 0], [0, 0, 1]], rtol=1e-6)
    assert (encoder.width, encoder.fingerprint) == (3, "abc")


@pytest.mark.parametrize("rows", [[[0, 0]], [[np.nan, 1]], [1, 2]])
def test_clip_embeddings_that_are_none_are_refused(rows):
    with pytest.raises(ValueError, match="embeddings must be"):
        ClipTextEncoder(FakeClip(rows)).encode(["a"])


# The endpoint

SENTENCE = "A thing is a round grey mass with soft margins."


@pytest.fixture
def endpoint():
    """A chat endpoint; gives its url and a namespace with what arrived, and what to answer."""

    class State:
        seen: list[dict]
        status = 200
        body: object = {"choices": [{"message": {"content": f' "{SENTENCE}"\n'}}]}

    state = State()
    state.seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            sent = self.rfile.read(int(self.headers["Content-Length"])).decode()
            state.seen.append({"path": self.path, "headers": dict(self.headers), "body": sent})
            reply = state.body if isinstance(state.body, bytes) else json.dumps(state.body).encode()
            self.send_response(state.status)
            self.send_header("Content-Length", str(len(reply)))
            self.send_header("Location", "/v1/elsewhere")
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", state
    server.shutdown()
    server.server_close()
    thread.join()


def from_endpoint(url, **more):
    return TextSettings(source="endpoint", endpoint=EndpointSettings(url=url, model="small", **more))


class Shouts:
    """An answerer that counts."""

    name = fingerprint = "shouts"

    def __init__(self, said="it is round"):
        self.said, self.asked = said, []

    def answer(self, image, question):
        self.asked.append(question)
        return f"{self.said} {image.shape[1]}" if self.said else ""


def test_an_endpoint_gets_the_label_name_and_nothing_else(endpoint, tmp_path, monkeypatch, caplog):
    url, state = endpoint
    monkeypatch.setenv("MY_KEY", "secret")
    folder = tmp_path / "patient-4711"
    texts = LabelTexts(
        from_endpoint(url, key_variable="MY_KEY"),
        encoder=HashedTextEncoder(),
        folder=folder,
        answerer=Shouts(),
    )
    assert state.seen == []
    with caplog.at_level(logging.INFO, logger="sam_infer.text.endpoint"):
        said = texts.text("thing_left", np.full((3, 5), 0.123456, np.float32))
    assert said == f"it is round 5 {SENTENCE}"
    (seen,) = state.seen
    assert seen["path"] == "/v1/chat/completions" and seen["headers"]["Authorization"] == "Bearer secret"
    body = json.loads(seen["body"])
    assert set(body) == {"model", "messages"} and body["model"] == "small"
    (message,) = body["messages"]
    # Word for word what another label gets, but for the name: so nothing of image or case can be in it.
    texts.text("otherthing")
    other = json.loads(state.seen[1]["body"])["messages"][0]
    assert message["content"].replace("left thing", "otherthing") == other["content"]
    assert message["role"] == "user" and message["content"].count("left thing") == 1
    everything = str(seen)
    assert not any(word in everything for word in ("4711", "round", "0.12"))
    (line,) = [record.getMessage() for record in caplog.records]
    assert url in line and "left thing" in line and "secret" not in line
    assert "secret" not in (folder / "descriptions.json").read_text()


def test_an_endpoint_is_asked_once_for_a_label_and_a_model(endpoint, tmp_path):
    url, state = endpoint
    cache = tmp_path / "made" / "kept.json"
    settings = EndpointSettings(url=url, model="small")
    threads = [
        threading.Thread(target=EndpointDescriptions(settings, cache=cache).describe, args=["thing"])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(state.seen) == 1
    state.status = 500
    assert EndpointDescriptions(settings, cache=cache).describe("thing") == SENTENCE
    assert "Authorization" not in state.seen[0]["headers"]
    (kept,) = json.loads(cache.read_text()).values()
    assert (kept["label"], kept["model"], kept["text"]) == ("thing", "small", SENTENCE)
    with pytest.raises(InputError):
        EndpointDescriptions(EndpointSettings(url=url, model="large"), cache=cache).describe("thing")
    assert len(state.seen) == 2 and len(json.loads(cache.read_text())) == 1


def test_a_netrc_file_is_not_sent(endpoint, tmp_path, monkeypatch):
    url, state = endpoint
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    EndpointDescriptions(EndpointSettings(url=url, model="m"), cache=tmp_path / "kept.json").describe("thing")
    assert "Authorization" not in state.seen[0]["headers"]


def test_nothing_is_sent_without_the_source(endpoint, tmp_path):
    url, state = endpoint
    settings = TextSettings(endpoint=EndpointSettings(url=url, model="small"))
    texts = LabelTexts(settings, encoder=HashedTextEncoder(), folder=tmp_path)
    assert texts.text("liver") == describe("liver")
    with pytest.raises(InputError, match=r"label = 'thing'.*descriptions:"):
        texts.text("thing")
    assert state.seen == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (500, {}, "HTTP 500"),
        (401, {}, "HTTP 401"),
        (307, {}, "HTTP 307"),
        (200, b"<html>", "chat endpoint"),
        (200, {"choices": []}, "chat endpoint"),
        (200, {"choices": [{"message": {"content": None}}]}, "0 characters"),
        (200, {"choices": [{"message": {"content": "long " * 200}}]}, "999 characters"),
    ],
)
def test_an_endpoint_that_fails_says_so_and_leaves_no_answer(endpoint, tmp_path, status, body, message):
    url, state = endpoint
    state.status, state.body = status, body
    cache = tmp_path / "kept.json"
    with pytest.raises(InputError, match=message) as raised:
        EndpointDescriptions(EndpointSettings(url=url, model="m"), cache=cache).describe("thing")
    assert raised.value.status == 424 and "descriptions:" in str(raised.value)
    assert len(state.seen) == 1 and not cache.exists()


def test_an_endpoint_that_is_not_there_says_so(tmp_path, monkeypatch):
    gone = EndpointSettings(url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(InputError, match="does not answer") as raised:
        EndpointDescriptions(gone, cache=tmp_path / "kept.json").describe("thing")
    assert raised.value.status == 424
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    keyless = EndpointSettings(url="https://127.0.0.1:9/v1", model="m", key_variable="NO_SUCH_KEY")
    with pytest.raises(InputError, match="set this environment variable") as raised:
        EndpointDescriptions(keyless, cache=tmp_path / "kept.json").describe("thing")
    assert raised.value.status == 409


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"a": {}}', b'{"a": "text"}'])
def test_kept_answers_that_cannot_be_read_are_not_asked_for_again(endpoint, tmp_path, content):
    url, state = endpoint
    (tmp_path / "kept.json").write_bytes(content)
    with pytest.raises(InputError, match="kept answers") as raised:
        EndpointDescriptions(EndpointSettings(url=url, model="m"), cache=tmp_path / "kept.json").describe(
            "thing"
        )
    assert raised.value.status == 409 and state.seen == []
    assert (tmp_path / "kept.json").read_bytes() == content


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"url": "ftp://host"}, "https://host/v1"),
        ({"url": None}, "https://host/v1"),
        ({"url": "http://[host"}, "https://host/v1"),
        ({"url": "https://me:mine@host/v1"}, "key_variable"),
        ({"url": "https://host/v1?key=1"}, "key_variable"),
        ({"model": " "}, "name the model"),
        ({"key_variable": "sk-123"}, "not the key"),
        ({"url": "http://host/v1", "key_variable": "KEY"}, "https only"),
    ],
)
def test_endpoint_settings_are_checked(values, message):
    with pytest.raises(InputError, match=message) as raised:
        EndpointSettings(**{"url": "https://host/v1", "model": "m", **values})
    assert not any(secret in str(raised.value) for secret in ("mine", "sk-123", "key=1"))


# All together


def test_a_projects_own_sentence_goes_first(endpoint, tmp_path):
    url, state = endpoint
    settings = from_endpoint(url)
    own = TextSettings(descriptions={"liver": "Our  liver."}, source="endpoint", endpoint=settings.endpoint)
    texts = LabelTexts(own, encoder=HashedTextEncoder(), folder=tmp_path)
    assert texts.text("liver") == "Our liver." and state.seen == []
    assert texts.text("spleen") == SENTENCE and len(state.seen) == 1


def test_answers_come_before_the_description_and_are_asked_for_once(tmp_path):
    answerer = Shouts()
    settings = TextSettings(questions=("shape", "Is {label} dark?"))
    texts = LabelTexts(settings, encoder=HashedTextEncoder(), folder=tmp_path, answerer=answerer)
    image = np.zeros((4, 6), np.float32)
    said = texts.text("kidney_left", image)
    assert said == f"it is round 6 it is round 6 {describe('kidney_left')}"
    assert answerer.asked == ["What is the shape of the left kidney?", "Is left kidney dark?"]
    vector = texts.embedding("kidney_left", image)
    assert np.array_equal(vector, HashedTextEncoder().encode([said])[0]) and len(answerer.asked) == 2
    texts.text("kidney_left", image + 0.5)
    assert len(answerer.asked) == 4
    assert np.array_equal(
        texts.embedding("kidney_left"), HashedTextEncoder().encode([describe("kidney_left")])[0]
    )


def test_an_answerer_with_nothing_to_say_leaves_the_description(tmp_path):
    texts = LabelTexts(TextSettings(), encoder=HashedTextEncoder(), folder=tmp_path, answerer=Shouts(said=""))
    assert texts.text("liver", np.zeros((4, 4), np.float32)) == describe("liver")


def test_embeddings_are_kept_by_label_where_no_image_is_looked_at(tmp_path):
    texts = LabelTexts(TextSettings(), encoder=HashedTextEncoder(), folder=tmp_path)
    first = texts.embedding("liver", np.zeros((4, 4), np.float32))
    assert texts.embedding("liver") is first and not first.flags.writeable
    assert first.shape == (512,) and not np.array_equal(first, texts.embedding("spleen"))


def test_the_record_says_what_embeddings_depend_on(tmp_path):
    texts = LabelTexts(TextSettings(), encoder=HashedTextEncoder(), folder=tmp_path)
    assert texts.record(["liver"]) == {
        "encoder": HashedTextEncoder.fingerprint,
        "answerer": None,
        "questions": [],
        "descriptions": {"liver": describe("liver")},
    }
    answering = LabelTexts(TextSettings(), encoder=HashedTextEncoder(), folder=tmp_path, answerer=Shouts())
    record = answering.record([])
    assert record["answerer"] == "shouts" and "{label}" in record["questions"][0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"descriptions": ["liver"]}, "give a mapping"),
        ({"descriptions": {"liver": " "}}, "descriptions.liver"),
        ({"source": "cloud"}, "shipped, endpoint"),
        ({"source": "endpoint"}, "name the endpoint"),
        ({"questions": ()}, "one or more"),
        ({"questions": "shape"}, "one or more"),
        ({"questions": ("Is it dark?",)}, r"\{label\}"),
    ],
)
def test_text_settings_are_checked(values, message):
    with pytest.raises(InputError, match=message):
        TextSettings(**values)
