"""The server against its own description: whatever fits it, or nearly does, is no reason for a 5xx.

Schemathesis makes the requests from the OpenAPI document; many hold something that the server knows, so that
they get past the checks of names.
"""

import io
import json
from collections import defaultdict

import nibabel as nib
import numpy as np
import pytest
import requests
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks.utils import background_tasks
from PIL import Image as PilImage
from schemathesis.generation.modes import GenerationMode

from tests.unets import constant_unet


def _png(grey):
    buffer = io.BytesIO()
    PilImage.fromarray(np.full((18, 30), grey, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE, PICTURE_LABEL = _png(20), _png(1)
VOLUME = nib.Nifti1Image(np.full((24, 20, 6), -1000, np.int16), np.diag([1, 1, 2, 1])).to_bytes()
LABEL = nib.Nifti1Image(np.ones((24, 20, 6), np.uint8), np.diag([1, 1, 2, 1])).to_bytes()
CLICK = {"foreground": [[6, 6, 2]], "liver": [[6, 6, 2]], "label": "liver", "save_label": True}
#: What the server knows, by the name of a parameter or of a form's field; the first ones go together.
KNOWN = {
    "image": ["ct", "photo", "new"],
    "label": ["ct", "photo"],
    "id": ["ct", "photo"],
    "tag": ["final", "original"],
    "check_sum": [""],
    "model": ["unet", "sam_click_2d", "sam_multi", "weak_box", "sam_finetune"],
    "strategy": ["first", "random"],
    "name": ["unet"],
    "output": ["json", "image", "all", "train", "stats"],
    "params": [json.dumps(CLICK), "{}"],
    "info": ['{"note": "seen"}'],
    "limit_cases": ["1"],
}
FILES = {"file": [("new.png", PICTURE), ("a.nii", VOLUME)], "label": [("l.nii", LABEL)]}
FILES["files"] = FILES["file"]
FORMS = ("multipart/", "application/x-www-form")
CANDIDATES = {"image": "ct", "label": "liver", "slice": 2, "box": [3, 4, 10, 9]}
#: Bodies that fit, by the beginning of a path.
BODIES = {
    "/datastore/boxes": {"boxes": {"liver": [[4, 9, 5, 8, 1, 4]]}},
    "/preference/candidates": CANDIDATES,
    "/train": {"iterations": 1},
    "/batch": {"max_batch_size": 1},
    "/activelearning": {"seed": 1},
}


class Visits:
    """Which operations were asked, and what they answered.

    Args:
        client: Reaches the application.
        document: Its OpenAPI document.
    """

    def __init__(self, client, document):
        self.client = client
        self.operations = [
            found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()
        ]
        self.answers = defaultdict(set)
        self.names = {}

    def seed(self):
        """What requests before may have removed is there again."""
        put = self.client.put
        assert put("/datastore/image?image=ct", files={"file": ("ct.nii", VOLUME)}).status_code == 200
        for tag in ("final", "original"):
            files = {"label": ("l.nii", LABEL)}
            assert put(f"/datastore/label?image=ct&tag={tag}", files=files).status_code == 200
        for n in range(6):  # enough to train on
            put(f"/datastore/image?image=case_{n}", files={"file": ("c.png", PICTURE)})
            sent = put(f"/datastore/label?image=case_{n}", files={"label": ("c.png", PICTURE_LABEL)})
            assert sent.status_code == 200, sent.text
        assert put("/datastore/boxes?image=ct", json=BODIES["/datastore/boxes"]).status_code == 200
        asked = self.client.post("/preference/candidates", json=CANDIDATES).json()["candidates"]
        self.client.post("/batch/infer/unet?run_sync=true", json=BODIES["/batch"])
        rated = {"candidates": asked, "ranking": [0, 1, 2, 3]}
        session = put("/session/", files={"files": ("ct.nii", VOLUME)}).json()["session_id"]
        history = self.client.get("/datastore/label/history?image=ct&tag=final").json()["versions"]
        version = next(one["sha256"] for one in reversed(history) if one.get("sha256"))
        self.names = {
            "session_id": [session], "candidates_id": [asked], "rated": rated, "sha256": [version],
        }  # fmt: skip

    def send(self, case, draw, known):
        """Send one request: as it was made, or with something that the server knows in it, or only that.

        Args:
            case: Schemathesis's.
            draw: Hypothesis's.
            known: "nothing", "something" or "all".
        """
        choices = {**KNOWN, **self.names}

        def taken(name, values):
            return draw(st.sampled_from(values)) if known == "something" else values[0]

        def chosen():
            return known == "all" or (known == "something" and draw(st.booleans()))

        for values in (case.path_parameters, case.query):
            for name in list(values):
                if chosen() and name in choices:
                    values[name] = taken(name, choices[name])
                elif known == "all" and values is case.query:
                    del values[name]
        kwargs = case.as_transport_kwargs(base_url="http://testserver")
        body, kind = case.body, case.media_type or ""
        if kind == "application/json" and chosen():
            path = case.operation.path
            kwargs["json"] = next((b for start, b in BODIES.items() if path.startswith(start)), {})
            if path == "/preference/":
                kwargs["json"] = self.names["rated"]
        elif (
            kind.startswith(("multipart/", "application/x-www-form")) and isinstance(body, dict) and chosen()
        ):
            fields = {name: taken(name, KNOWN[name]) for name in body if name in KNOWN and name not in FILES}
            files = [(name, taken(name, FILES[name])) for name in body if name in FILES]
            kwargs |= {"data": fields, "files": files}
            kwargs["headers"].pop("Content-Type", None)
        request = requests.Request(**kwargs).prepare()
        reply = self.client.request(
            request.method,
            request.url,
            content=request.body,
            headers={name: value for name, value in request.headers.items() if name != "Cookie"},
            follow_redirects=False,
        )
        self.answers[f"{case.method} {case.operation.path}"].add(reply.status_code)
        return reply


@pytest.fixture(scope="module")
def visits(served):
    """The application as this computer sees it: how often it asks is not limited. No training really runs."""
    client, _, _ = served
    local = TestClient(client.app, client=("127.0.0.1", 50000), raise_server_exceptions=False)
    local.portal = client.portal
    patch = pytest.MonkeyPatch()
    instance = app_instance()
    constant_unet(instance.home / "models" / "unet.safetensors", instance.project.labels)
    done = {"status": "DONE", "id": "1", "request": {"model": "unet"}}
    patch.setattr(instance, "train", lambda request: done)
    patch.setattr("monailabel.utils.async_tasks.task.run_background_task", lambda *_, **__: done)
    for method in ("train", "batch_infer"):
        patch.setitem(background_tasks, method, [done])
    yield Visits(local, local.get("/openapi.json").json())
    patch.undo()


def _explore(visits, operation, examples):
    @given(data=st.data())
    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(data):
        known = data.draw(st.sampled_from(["nothing", "something", "all"]))
        mode = GenerationMode.POSITIVE if known == "all" else data.draw(st.sampled_from(list(GenerationMode)))
        reply = visits.send(data.draw(operation.as_strategy(generation_mode=mode)), data.draw, known)
        # 503 says that something is missing or down; whether it is, is for other tests.
        sent = f"{reply.request.method} {reply.request.url} {reply.request.content[:2000]!r}"
        assert reply.status_code < 500 or reply.status_code == 503, (sent, reply.text)
        if 400 <= reply.status_code < 500 and reply.request.method != "HEAD":
            assert reply.json()["detail"], reply.text

    visits.seed()
    ask()


def _explore_all(visits, examples):
    """Ask each operation; gives those that never succeeded, and fails with all that went wrong."""
    failures = {}
    for operation in visits.operations:
        try:
            _explore(visits, operation, examples)
        except AssertionError as error:
            failures[operation.label] = str(error)
    assert not failures, json.dumps(failures, indent=1)
    assert set(visits.answers) == {operation.label for operation in visits.operations}
    return {name for name, told in visits.answers.items() if not any(status < 300 for status in told)}


#: Operations that cannot succeed here, and why.
IN_VAIN = {
    "GET /logs/": "the log file is written where MONAI Label's own command starts the server",
    "GET /logs/gpu": "there is no GPU",
    "GET /scoring/": "the project has no scoring method",
    "POST /scoring/{method}": "the project has no scoring method",
    "DELETE /scoring/": "the project has no scoring method",
    "POST /published/{name}/rollback": "nothing was published before",
}


def test_no_request_is_a_servers_error(visits):
    never = _explore_all(visits, 12)
    for name in sorted(never):
        print(f"never 2xx: {name} {sorted(visits.answers[name])}")
    assert never <= set(IN_VAIN)


@pytest.mark.slow
def test_no_request_of_many_is_a_servers_error(visits):
    _explore_all(visits, 300)
