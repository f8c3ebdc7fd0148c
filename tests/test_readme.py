"""The README's example is run as it stands."""

import json
import re
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np

from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.bundled import BundledEngine
from sam_infer.library import ImageLibrary
from sam_infer.tasks.click import ClickInfer
from trainers.phantoms import LABELS, write_phantoms

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_click_of_the_readme_finds_what_it_names(served, tmp_path, monkeypatch):
    """Most of the answer on the first phantom, as `make serve` writes it, is what the example asks for."""
    from monailabel.interfaces.utils.app import app_instance

    command = re.search(r"^curl -X POST (?:.*\\\n)*.*$", README.read_text(), re.MULTILINE)[0]
    words = shlex.split(command)
    url = next(word for word in words if word.startswith("http://localhost:8000/"))
    form = dict([words[words.index("-F") + 1].split("=", 1)])
    client, _, _ = served
    encoder = SliceEncoder(engine=BundledEngine())
    click = ClickInfer(encoder=encoder, library=ImageLibrary(limit=1 << 30), dimension=2)
    monkeypatch.setitem(app_instance()._infers, "sam_click_2d", click)
    write_phantoms(tmp_path, count=1)
    with (tmp_path / "phantom_000.nii.gz").open("rb") as file:
        assert client.put("/datastore/?image=phantom_000", files={"file": file}).is_success

    path = url.removeprefix("http://localhost:8000")
    answer = client.post(path, data=form)
    assert answer.status_code == 200, answer.text
    name = json.loads(form["params"])["label"]
    assert answer.json()["label_names"] == {name: 1}
    answer = client.post(path.replace("output=json", "output=image"), data=form)
    (tmp_path / "mask.nii.gz").write_bytes(answer.content)
    mask = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj) > 0
    truth = np.asarray(nib.load(tmp_path / "truth" / "phantom_000.nii.gz").dataobj) == LABELS[name]
    truth &= mask.any(axis=(0, 1))  # the slice of the click
    assert (mask & truth).sum() > 0.6 * mask.sum()
    assert 2 * (mask & truth).sum() > 0.5 * (mask.sum() + truth.sum())
