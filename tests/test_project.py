"""The project file: what of the caches can be set, and what cannot."""

from pathlib import Path

import pytest

from apps.samloop.project import load_project, override
from sam_infer.errors import InputError
from sam_infer.text.endpoint import EndpointSettings


def load(tmp_path, text):
    (tmp_path / "project.yaml").write_text(text)
    return load_project(tmp_path / "project.yaml")


def test_embeddings_can_be_kept_off_the_disk_and_not_be_encoded_ahead(tmp_path):
    project = load(tmp_path, "limits: {embeddings_disk_mb: 0}\nencode_ahead: false\n")
    assert project.embeddings_disk_mb == 0
    assert not project.encode_ahead
    assert load_project().encode_ahead
    assert load_project().embeddings_disk_mb == 4096


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "limits: {embeddings_disk_mb: -1}",
            r"limits.embeddings_disk_mb = -1: give a whole number, 0 or more",
        ),
        ("limits: {embeddings_mb: 0}", r"limits.embeddings_mb = 0: give a whole number, 1 or more"),
        ("encode_ahead: 'no'", "encode_ahead = 'no': give true or false"),
    ],
)
def test_bad_values_are_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, text)


def test_the_table_of_image_labels_lies_beside_the_project_file(tmp_path):
    assert load_project().image_labels is None
    assert load(tmp_path, "image_labels: tables/a.csv\n").image_labels == tmp_path / "tables" / "a.csv"
    assert load(tmp_path, "image_labels: /tables/a.csv\n").image_labels == Path("/tables/a.csv")
    with pytest.raises(InputError, match="image_labels = 5: give the path of a CSV file, or null"):
        load(tmp_path, "image_labels: 5\n")


def test_the_sam_that_learns_is_the_engine_where_that_is_one(tmp_path):
    assert load_project().engine == "bundled" and load_project().tuned == "sam_tiny"
    text = "engine: {name: sam_vit_b, weights: /weights, device: cpu}\ntuning: {weights: w}\n"
    project = load(tmp_path, text)
    assert project.tuned == "sam_vit_b" and project.tuned_options == project.engine_options
    assert project.tuned_options["weights"] == Path("/weights")
    aside = load(tmp_path, "tuning: {engine: sam_vit_b, weights: w}\nengine: {device: cpu}\n")
    assert aside.tuned == "sam_vit_b"
    assert aside.tuned_options == {"weights": tmp_path / "w", "device": "cpu"}


def test_the_command_lines_engine_learns_where_it_can(tmp_path):
    text = "engine: {name: medsam, device: cpu}\ntuning: {engine: sam_tiny, weights: null}\n"
    project = load(tmp_path, text)
    assert project.tuned == "medsam"
    assert override(project, engine="sam_vit_b").tuned == "sam_vit_b"
    other = override(project, engine="bundled")
    assert (other.engine, other.tuned) == ("bundled", "sam_tiny"), "as the project file says"
    assert override(other, engine="medsam") == project


def test_texts_and_descriptions_are_taken(tmp_path):
    assert load_project().texts.descriptions == {} and load_project().text_encoder == "hashed"
    project = load(
        tmp_path,
        "labels: [liver, halo]\ndescriptions: {halo: a dark ring}\nclip: {weights: models/clip}\n"
        "texts:\n  encoder: clip\n  source: endpoint\n  answers: models/vqa\n"
        "  endpoint: {url: 'http://localhost:8000/v1', model: small}\n"
        "  questions: ['Where is the {label}?']\n",
    )
    assert project.texts.descriptions == {"halo": "a dark ring"} and project.text_encoder == "clip"
    assert project.texts.endpoint == EndpointSettings(url="http://localhost:8000/v1", model="small")
    assert project.texts.questions == ("Where is the {label}?",) and project.texts.source == "endpoint"
    assert (project.clip, project.texts.answers) == (tmp_path / "models/clip", tmp_path / "models/vqa")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tuning: {engine: bundled}", r"tuning.engine = 'bundled': choose one of .*sam_tiny"),
        ("tuning: {engine: [sam_tiny]}", r"tuning.engine = \['sam_tiny'\]: choose one of"),
        ("tuning: {name: sam_tiny}", r"project.yaml: tuning.name = 'sam_tiny': known keys: engine, weights"),
        ("tuning: sam_tiny", r"project.yaml: tuning = 'sam_tiny': give a mapping of engine, weights"),
        ("tuning: {weights: 5}", r"tuning.weights = 5: give the path of a checkpoint file or a folder"),
        ("clip: folder", r"project.yaml: clip = 'folder': give a mapping of weights"),
        ("clip: {weights: 5}", r"clip.weights = 5: give the path of a folder"),
        ("descriptions: {lung: dark}", r"descriptions = 'lung': choose one of liver, spleen"),
        ("descriptions: {liver: ''}", r"descriptions.liver = '': give a sentence about the label"),
        ("descriptions: [dark]", r"descriptions = \['dark'\]: give a mapping of labels to sentences"),
        ("texts: {encoder: bert}", r"texts.encoder = 'bert': choose one of hashed, clip"),
        ("texts: {source: web}", r"source = 'web': choose one of shipped, endpoint"),
        ("texts: {source: endpoint}", r"source = 'endpoint': name the endpoint too"),
        ("texts: {endpoint: {url: 'https://a/v1'}}", r"texts.endpoint = .*: give \{url: ..., model: ..."),
        ("texts: {endpoint: {url: 'https://a', model: m, key: k}}", r"texts.endpoint = .*: give \{url: "),
        ("texts: {endpoint: 'https://a/v1'}", r"texts.endpoint = 'https://a/v1': give \{url: "),
        ("texts: {endpoint: {url: ftp://a, model: m}}", r"endpoint.url = 'ftp://a': give an address"),
        ("texts: {questions: 'Where?'}", r"questions = 'Where\?': give a list of questions"),
        ("texts: {answers: 3}", r"texts.answers = 3: give the path of a model's folder, or null"),
        ("window: null", r"project.yaml: window = None: give a mapping of ct, other"),
    ],
)
def test_bad_values_of_what_learns_are_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, text)
