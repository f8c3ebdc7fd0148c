"""What the image must do once it is built: asked of the real entry point, in `tests.dockersteps`."""

from __future__ import annotations

import os
import secrets
import socket
import time
from pathlib import Path

import requests

from tests.dockerfile import Stage
from tests.dockersteps import Container, Root

UID = 10001
#: A click in the liver of the first phantom that `samloop serve --samples` writes.
CLICK = '{"foreground": [[48, 66, 24]], "label": "liver"}'


def prove(root: Root, stage: Stage, work: Path) -> None:
    """Raises AssertionError, with what was seen, where the image does not do what docs/docker.md says."""
    volumes = {work / "volumes" / name: f"/{name}" for name in ("data", "weights")}
    token = work / "volumes" / "token"
    for folder in volumes:
        folder.mkdir(parents=True)
    token.write_text(secrets.token_urlsafe(24))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def container(**env: str) -> Container:
        mounts = {**volumes, token: "/run/secrets/samloop_token"}
        env = {"SAMLOOP_PORT": str(port), **env}
        return Container(root, stage, volumes=mounts, env=env)

    done = container().run()
    assert done.returncode == 2 and "no token" in done.stderr, done
    _say("without a token", done.stderr.strip())
    guarded = container(SAMLOOP_TOKEN_FILE="/run/secrets/samloop_token")
    token.chmod(0o400)
    done = guarded.run()
    assert done.returncode == 2 and f"uid {UID} cannot read" in done.stderr, done
    _say("with a token of root's", done.stderr.strip())
    os.chown(token, UID, UID)
    done = guarded.run()
    assert done.returncode == 2 and f"cannot be written by uid {UID}" in done.stderr, done
    _say("with a folder of root's", done.stderr.strip())
    for folder in volumes:
        os.chown(folder, UID, UID)

    url, log = f"http://127.0.0.1:{port}", work / "server.log"
    shown = {"Authorization": f"Bearer {token.read_text()}"}
    start = time.monotonic()
    with guarded.serving("--samples", log=log) as process:
        _say("ready after", f"{time.monotonic() - start:.0f} s, phantoms written; user {_owner(process.pid)}")
        assert _owner(process.pid) == UID
        for path in ("/health", "/ready"):
            answer = requests.get(url + path, timeout=30)
            _say(f"GET {path}", f"{answer.status_code} {answer.text.strip()[:100]}")
            assert answer.status_code == 200
        answer = requests.get(f"{url}/info/", timeout=30)
        _say("GET /info/ without the token", f"{answer.status_code} {answer.text[:100]}")
        assert answer.status_code == 401
        click = f"{url}/infer/sam_click_2d?image=phantom_000&output=image"
        begin = time.monotonic()
        answer = requests.post(click, data={"params": CLICK}, headers=shown, timeout=120)
        took = time.monotonic() - begin
        assert answer.status_code == 200, answer.text
        _say("a click", f"200, {len(answer.content)} bytes, {took:.1f} s")
        mask = {"label": ("mask.nii.gz", answer.content)}
        names = {"params": '{"label_info": [{"name": "liver", "idx": 1}]}'}
        label = f"{url}/datastore/label?image=phantom_000"
        answer = requests.put(label, files=mask, data=names, headers=shown, timeout=120)
        assert answer.status_code == 200, answer.text
        _say("PUT the mask as an accepted label", f"200 {answer.text.strip()[:100]}")
        begin = time.monotonic()
        status = guarded.stop(process)
        _say("SIGTERM", f"exit status {status} after {time.monotonic() - begin:.1f} s")
        assert status == 0, log.read_text()
    for line in log.read_text().splitlines()[:12]:
        print(f"    {line[:160]}")
    with guarded.serving(log=log) as process:
        answer = requests.get(f"{label.replace('?image', '?label')}&tag=final", headers=shown, timeout=120)
        assert answer.status_code == 200, answer.text
        _say("GET the label after a new start", f"200, {len(answer.content)} bytes")
        assert guarded.stop(process) == 0
    done = guarded.run("doctor", "--studies", "/data")
    print("".join(f"    {line}\n" for line in (done.stdout + done.stderr).splitlines()))
    _say("samloop doctor", f"exit status {done.returncode}")
    assert done.returncode == 0


def _say(what: str, found: str) -> None:
    print(f"  {what}: {found}", flush=True)


def _owner(pid: int) -> int:
    first = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    return Path(f"/proc/{first}").stat().st_uid
