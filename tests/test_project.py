"""The project file: what of the caches can be set, and what cannot."""

from pathlib import Path

import pytest

from apps.samloop.project import load_project
from sam_infer.errors import InputError


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
