"""MONAI Label's OpenID in front of the real server: a realm that signs tokens, and roles."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jwt
import nibabel as nib
import numpy as np
import pytest
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.conftest import server_process

KEY, OTHER = (rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2))
PEM = KEY.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)


def signed(roles, key=KEY, algorithm="RS256", seconds=600, **claims):
    payload = {
        "preferred_username": "ann",
        "realm_access": {"roles": [f"monailabel-{role}" for role in roles]},
        "exp": int(time.time()) + seconds,
        **claims,
    }
    return jwt.encode(payload, key, algorithm=algorithm)


class Realm(BaseHTTPRequestHandler):
    """As Keycloak: its public key, where tokens are had, and a token for one password."""

    up = False

    def do_GET(self):
        endpoint = f"http://127.0.0.1:{self.server.server_port}/realm/token"
        key = "".join(PEM.decode().splitlines()[1:-1])
        self._answer(200 if Realm.up else 502, {"public_key": key, "token_endpoint": endpoint})

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["content-length"])).decode()
        right = "password=right" in sent
        self._answer(200 if right else 401, {"access_token": signed(["user"]), "token_type": "Bearer"})

    def _answer(self, status, content):
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """(url) of a server that asks a realm, which is down at first."""
    realm = ThreadingHTTPServer(("127.0.0.1", 0), Realm)
    threading.Thread(target=realm.serve_forever, daemon=True).start()
    studies, elsewhere = tmp_path_factory.mktemp("studies"), tmp_path_factory.mktemp("elsewhere")
    nib.save(nib.Nifti1Image(np.zeros((24, 20, 6), np.int16), np.eye(4)), studies / "ct.nii.gz")
    nib.save(nib.Nifti1Image(np.ones((24, 20, 6), np.uint8), np.eye(4)), elsewhere / "l.nii.gz")
    env = {
        "MONAI_LABEL_AUTH_ENABLE": "true",
        "MONAI_LABEL_AUTH_REALM_URI": f"http://127.0.0.1:{realm.server_port}/realm",
    }
    with server_process(studies, elsewhere, env=env) as (url, _):
        yield url, elsewhere
    realm.shutdown()
    realm.server_close()


def get(url, token=None, method="GET", **sent):
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return requests.request(method, url, headers=headers, timeout=60, **sent)


def test_roles_and_the_name_of_who_accepts(guarded):
    """In one test, since the realm's key is asked for once."""
    url, folder = guarded
    down = get(f"{url}/info/", signed(["user"]))
    assert down.status_code == 503 and "OpenID realm" in down.json()["detail"] and down.headers["retry-after"]
    Realm.up = True
    assert get(f"{url}/info/").status_code == 401
    assert get(f"{url}/openapi.json").status_code == 401
    assert get(f"{url}/health").status_code == 200
    assert get(f"{url}/auth/").json()["enabled"] is True
    user = signed(["user"])
    assert get(f"{url}/info/", user).status_code == 200
    assert get(f"{url}/auth/token/valid", user).json()["username"] == "ann"
    assert get(f"{url}/metrics", user).status_code == 200
    for refused in (
        signed(["user"], key=OTHER),
        signed(["user"], seconds=-60),
        signed(["user"], key=None, algorithm="none"),
        user[:-4] + "AAAA",
        "nonsense",
    ):
        assert get(f"{url}/info/", refused).status_code == 401
    for roles in ([], ["other"]):
        assert get(f"{url}/info/", signed(roles)).status_code == 403
    assert get(f"{url}/info/", signed([], realm_access="user")).status_code == 403
    assert get(f"{url}/train/unet", user, "POST", json={}).status_code == 403
    label = {"label": ("l.nii.gz", (folder / "l.nii.gz").read_bytes())}
    assert get(f"{url}/datastore/label?image=ct", user, "PUT", files=label).status_code == 403
    annotator = signed(["user", "annotator"])
    assert get(f"{url}/datastore/label?image=ct", annotator, "PUT", files=label).status_code == 200
    found = get(f"{url}/datastore/label/info?label=ct&tag=final", user).json()
    assert found["user"] == "ann"
    form = {"username": "ann", "grant_type": "password"}
    given = get(f"{url}/auth/token", None, "POST", data={**form, "password": "right"})
    assert get(f"{url}/info/", given.json()["access_token"]).status_code == 200
    assert get(f"{url}/auth/token", None, "POST", data={**form, "password": "wrong"}).status_code == 401


def test_a_key_that_everybody_has_signs_nothing(guarded):
    """The public key as the secret of an HMAC: whoever accepts that algorithm accepts anybody's token."""
    import base64
    import hashlib
    import hmac

    def part(content):
        return base64.urlsafe_b64encode(content).rstrip(b"=")

    url, _ = guarded
    Realm.up = True
    claims = {"preferred_username": "eve", "realm_access": {"roles": ["monailabel-admin", "monailabel-user"]}}
    head = part(b'{"alg":"HS256","typ":"JWT"}') + b"." + part(json.dumps(claims).encode())
    token = head + b"." + part(hmac.new(PEM.strip(), head, hashlib.sha256).digest())
    assert get(f"{url}/info/", token.decode()).status_code == 401
