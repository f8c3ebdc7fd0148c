"""The OHIF viewer as it is served, and the pure parts of the script in it."""

import gzip
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from monailabel.interfaces.utils.app import app_instance

from apps.samloop.project import load_project
from apps.samloop.routes.ohif import BUNDLE, OWN
from sam_infer.errors import InputError

PLAIN = {"accept-encoding": "identity"}
SCRIPT = "/ohif/samloop/accept.js"


@pytest.fixture
def get(served):
    client, _, _ = served
    return lambda path, **headers: client.get(f"/ohif/{path}", headers={**PLAIN, **headers})


@pytest.mark.parametrize(
    "path", ["", "viewer", "monai-label?StudyInstanceUIDs=1.2.3", "viewer/dicomweb", "local"]
)
def test_routes_of_the_viewer_are_its_page(get, path):
    answer = get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert '<div id="root"></div>' in answer.text
    (bundle,) = re.findall(r'src="/ohif/(app\.bundle\.[0-9a-f]+\.js)"', answer.text)
    assert (BUNDLE / bundle).is_file()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("assets/favicon.ico", "image/x-icon"),
        ("assets/android-chrome-144x144.png", "image/png"),
        ("ohif-logo.svg", "image/svg+xml"),
        ("dicom-microscopy-viewer/dicomMicroscopyViewer.min.js", "text/javascript; charset=utf-8"),
        ("17dd54813d5acc10bf8f.wasm", "application/wasm"),
        ("1266.css", "text/css; charset=utf-8"),
        ("samloop/labelmap.mjs", "text/javascript; charset=utf-8"),
    ],
)
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_files_come_whole_and_say_what_they_are(get, path, kind, encoding):
    answer = get(path, **{"accept-encoding": encoding})
    file = OWN / path.removeprefix("samloop/") if path.startswith("samloop/") else BUNDLE / path
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
    assert answer.content == file.read_bytes()
    text = not kind.startswith("image/") or "svg" in kind
    assert answer.headers.get("content-encoding") == ("gzip" if encoding == "gzip" and text else None)


def test_only_files_whose_names_hold_a_hash_are_kept_without_asking(get):
    hashed = next(BUNDLE.glob("app.bundle.*.js")).name
    assert "immutable" in get(hashed, **{"accept-encoding": "gzip"}).headers["cache-control"]
    for path in ("app-config.js", "app.bundle.css", "1266.css", "samloop/accept.js", "assets/favicon.ico"):
        answer = get(path)
        assert answer.headers["cache-control"] == "no-cache", path
        again = get(path, **{"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        packed = get(path, **{"if-none-match": answer.headers["etag"], "accept-encoding": "gzip"})
        assert packed.status_code == (304 if path.startswith("assets/") else 200), (
            "another encoding, another tag"
        )


@pytest.mark.parametrize(
    "path",
    [
        "%2e%2e/%2e%2e/ohif.py",
        "..%2f..%2fohif.py",
        "%2fetc%2fpasswd",
        "assets/%2e%2e/%2e%2e/%2e%2e/ohif.py",
        "samloop/%2e%2e/page.py",
        "..%5c..%5cohif.py",
        "assets%00.png",
        "nope.js",
        "assets/nope.png",
        "w3.css",
    ],
)
def test_what_is_no_file_of_the_viewer_is_not_found(get, path):
    answer = get(path)
    if answer.status_code == 200:  # a path without a dot at its end is one of the viewer's own
        assert answer.text == get("").text
    else:
        assert answer.status_code == 404
        assert "the viewer has no such file" in answer.json()["detail"]


def test_nothing_is_fetched_from_the_internet(get):
    for path in ("", "app-config.js", "manifest.json", *(file.name for file in BUNDLE.glob("*.css"))):
        assert not re.search(r"""(?:url\(|src=|href=)["']?(?:https?:)?//""", get(path).text), path
    css = BUNDLE / "app.bundle.css"
    assert len(get("app.bundle.css").text) > css.stat().st_size - 300, "only the imports of fonts go"
    for icon in json.loads(get("manifest.json").text)["icons"]:
        assert get(icon["src"].removeprefix("/ohif/")).headers["content-type"] == "image/png"


def test_the_panel_asks_the_server_that_the_page_came_from(get):
    text = get("app-config.js").text
    assert text.startswith((BUNDLE / "app-config.js").read_text())
    assert "document.cookie = 'MONAILABEL_SERVER_URL=' + escape(location.origin + '/')" in text


def test_the_button_is_there_unless_the_project_says_no(get, monkeypatch):
    page = get("")
    tag = f'<script type="module" src="{SCRIPT}"></script></head>'
    assert page.text.count(tag) == 1
    assert get(SCRIPT.removeprefix("/ohif/")).status_code == 200
    instance = app_instance()
    monkeypatch.setattr(instance, "project", replace(instance.project, accept_button=False))
    plain = get("")
    assert plain.text == page.text.replace(tag, "</head>")
    assert plain.headers["etag"] != page.headers["etag"]
    packed = get("", **{"accept-encoding": "gzip"})
    assert packed.text == plain.text


def test_a_project_file_says_whether_there_is_a_button(tmp_path):
    def load(text):
        (tmp_path / "mine.yaml").write_text(text)
        return load_project(tmp_path / "mine.yaml")

    assert load("name: mine").accept_button
    assert not load("viewer: {accept_button: false}").accept_button
    with pytest.raises(InputError, match=r"viewer\.accept_button = 'no': give true or false"):
        load("viewer: {accept_button: 'no'}")
    with pytest.raises(InputError, match="known keys: accept_button"):
        load("viewer: {button: true}")


def test_a_packed_file_is_packed_once(get, monkeypatch):
    hashed = next(BUNDLE.glob("213.bundle.*.js")).name
    packed = []
    compress = gzip.compress
    monkeypatch.setattr(gzip, "compress", lambda *args: packed.append(args) or compress(*args))
    first = get(hashed, **{"accept-encoding": "gzip"})
    assert (
        get(hashed, **{"accept-encoding": "gzip"}).content == first.content == (BUNDLE / hashed).read_bytes()
    )
    assert len(packed) <= 1


def run_node(code: str) -> bytes:
    """What a module prints that may use what labelmap.mjs exports."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed: apt-get install nodejs")
    module = f"import * as labelmap from '{OWN / 'labelmap.mjs'}';\n{code}"
    done = subprocess.run(
        [node, "--input-type=module", "-e", module], check=False, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_a_label_map_is_written_where_it_lies(tmp_path):
    turn = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, -1.0]])  # columns: unit vectors of i, j, k
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    volume = {
        "dimensions": [2, 3, 4],
        "spacing": [0.7, 0.7000000001, 2.5],
        "direction": turn.T.ravel().tolist(),
        "origin": [-120.5, 1e-7, 33.25],
    }
    content = run_node(
        f"process.stdout.write(Buffer.concat([Buffer.from(labelmap.nrrdHeader({json.dumps(volume)})),"
        f"Buffer.from({values.ravel(order='F').tolist()})]));"
    )
    path = tmp_path / "label.nrrd"
    path.write_bytes(content)
    image = sitk.ReadImage(str(path))
    assert image.GetSize() == (2, 3, 4)
    assert np.allclose(image.GetSpacing(), volume["spacing"])
    assert np.allclose(image.GetOrigin(), volume["origin"])
    assert np.allclose(np.reshape(image.GetDirection(), (3, 3)), turn)
    assert np.array_equal(sitk.GetArrayFromImage(image).T, values)


def test_labels_are_told_by_name():
    found = json.loads(
        run_node("""
          const names = { 1: 'aorta', 2: 'background', 3: 'liver', 4: 'tumour', 5: 'spleen' };
          const voxels = Uint8Array.from([0, 1, 1, 2, 3, 4, 4, 9, 0]);
          const { kept, ...rest } = labelmap.readLabels(voxels, names, ['liver', 'spleen', 'aorta']);
          const said = [labelmap.describe(rest.labels, [1, 1, 500]), labelmap.describe([], [1, 1, 1])];
          console.log(JSON.stringify({ ...rest, kept: Array.from(kept), sent: Array.from(voxels), said }));
        """)
    )
    assert found["labels"] == [
        {"name": "liver", "value": 3, "voxels": 1},
        {"name": "aorta", "value": 1, "voxels": 2},
    ], "in the project's order, absent ones left out"
    assert (found["foreign"], found["nameless"]) == (["tumour"], 1)
    assert found["kept"] == [0, 1, 1, 0, 3, 0, 0, 0, 0]
    assert found["sent"] == [0, 1, 1, 2, 3, 4, 4, 9, 0], "the viewer's own label map is not touched"
    assert found["said"] == ["liver 1 voxels (0.5 ml), aorta 2 voxels (1.0 ml)", "no label at all"]


def test_a_model_that_learns_later_keeps_the_names_of_its_labels(served):
    client, _, _ = served
    info = client.get("/info/").json()
    assert info["models"]["unet"]["labels"] == [] and not info["train_stats"]["unet"]
    panel = json.loads(run_node(f"console.log(JSON.stringify(labelmap.infoForPanel({json.dumps(info)})));"))
    assert panel["models"]["unet"]["labels"] == ["liver", "spleen", "aorta"], "value n is the n-th name"
    assert panel["models"]["sam_multi"] == info["models"]["sam_multi"]
    assert panel["models"]["sam_click_2d"]["labels"] == [], "clicks are about the label that is chosen"
    assert panel["train_stats"] == {}
    assert {**panel, "models": info["models"], "train_stats": info["train_stats"]} == info
