"""The image's files: what can be said of them without Docker; `make docker-check` runs all their steps."""

import fnmatch
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import yaml

from tests.dockerfile import expand, parse

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docker"
ENTRYPOINT = FOLDER / "entrypoint.sh"
FILE = parse((FOLDER / "Dockerfile").read_text())
FINAL = FILE.stages[-1]


def test_dockerfile_has_no_step_that_hadolint_warns_of():
    tool = Path(sys.executable).with_name("hadolint")
    if not tool.is_file():
        pytest.skip("hadolint is not installed: make .venv/.dev")
    done = subprocess.run([tool, FOLDER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_images_are_pinned_by_a_tag_that_does_not_move_to_another_release():
    outside = {stage.base for stage in FILE.stages if FILE.stage(stage.base) is None}
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    outside |= {service["image"] for service in compose.values() if "build" not in service}
    assert len(outside) == 2
    for image in outside:
        name, _, tag = image.partition(":")
        assert re.match(r"\d+\.\d+", tag), image
        assert "." not in name.split("/")[0], f"{image} names a registry"


def test_what_runs_is_not_root_and_is_told_of_signals():
    user, group = FINAL.last("USER").text.split(":")
    assert int(user) >= 10000 and int(group) >= 10000
    assert FINAL.last("ENTRYPOINT").argv, "the shell form would keep signals from the server"
    last = ENTRYPOINT.read_text().rstrip().splitlines()[-1]
    assert last.startswith("exec samloop serve")
    health = FINAL.last("HEALTHCHECK")
    assert "/health" in health.text and health.flag("start-period")
    assert {"/data", "/weights"} <= set(FINAL.last("VOLUME").argv)


def test_the_final_stage_has_no_installer():
    assert not [
        step for step in FINAL.steps if step.name == "RUN" and re.search(r"\b(pip|uv|apt)", step.text)
    ]
    copied = [step.text.split()[0] for step in FINAL.steps if step.name == "COPY" and step.flag("from")]
    assert copied == ["/opt/samloop", "/opt/app"]


def test_what_is_copied_is_there_and_is_let_through_to_the_builder():
    ignored = [
        line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and not line.startswith("#")
    ]
    assert ignored[0] == "*"
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    for stage in FILE.stages:
        for step in (step for step in stage.steps if step.name == "COPY" and not step.flag("from")):
            for source in step.text.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), source
    needed = re.findall(r'file = \["(.*?)"\]', (ROOT / "pyproject.toml").read_text())
    given = {source for stage in FILE.stages for step in stage.steps for source in step.text.split()}
    assert needed and set(needed) <= given, "the package cannot be built without what it reads"


def test_torch_is_installed_at_its_pin_from_the_index_that_was_asked_for():
    """The command that picks the pins, run by itself."""
    stage = FILE.stage("libraries")
    step = next(step for step in stage.steps if step.name == "RUN" and "TORCH_INDEX" in step.text)
    picks = re.search(r"grep -E '[^']*' requirements.txt", step.text)[0]
    lines = subprocess.run(picks, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"torch==\S+\ntorchvision==\S+\n", lines)
    default = next(step.text for step in stage.steps if step.text.startswith("TORCH_INDEX="))
    assert default.endswith("/cpu")


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.cuda.yaml"]])
def test_compose_files_are_valid(files):
    command = next(
        (c for c in (["docker", "compose"], ["docker-compose"]) if _answers([*c, "version"])), None
    )
    if command is None:
        pytest.skip("neither docker compose nor docker-compose is installed: apt-get install docker-compose")
    named = [word for file in files for word in ("-f", str(FOLDER / file))]
    done = subprocess.run([*command, *named, "config"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    samloop = yaml.safe_load(done.stdout)["services"]["samloop"]
    assert samloop["image"] == ("samloop:cuda" if len(files) == 2 else "samloop:cpu")
    assert samloop["read_only"] and samloop["init"]


def _answers(command):
    return (
        shutil.which(command[0]) and not subprocess.run(command, capture_output=True, check=False).returncode
    )


def test_nothing_is_published_beyond_this_computer_and_no_secret_is_in_the_files():
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    assert "ports" not in services["orthanc"]
    assert services["samloop"]["ports"] == ["${SAMLOOP_LISTEN:-127.0.0.1:8000}:8000"]
    secret_files = yaml.safe_load((FOLDER / "compose.yaml").read_text())["secrets"]
    for service in services.values():
        for entry in service["secrets"]:
            assert (entry["source"] if isinstance(entry, dict) else entry) in secret_files
    assert "/docker/secrets/" in (ROOT / ".gitignore").read_text().split()
    environment = services["samloop"]["environment"]
    for name in ("SAMLOOP_TOKEN_FILE", "SAMLOOP_DICOMWEB_PASSWORD_FILE"):
        assert environment[name].removeprefix("/run/secrets/") in services["samloop"]["secrets"]


def test_the_reader_refuses_what_it_would_get_wrong():
    for text in ("FROM a\nADD x y", "# syntax=docker/dockerfile:1\nFROM a", "FROM a\nRUN <<EOF\nx\nEOF"):
        with pytest.raises(ValueError, match="does not know"):
            parse(text)
    with pytest.raises(ValueError, match="does not know"):
        expand("${A:-b}", {})
    stage = parse(
        'FROM a AS b\nENV A=1 \\\n  # no\n  B="x y"\nRUN --mount=type=cache,target=/c ls \\\n -l'
    ).stages[0]
    assert stage.steps[0].pairs == {"A": "1", "B": "x y"}
    assert (stage.steps[1].text, stage.steps[1].flag("mount")) == ("ls  -l", "type=cache,target=/c")


@pytest.fixture
def container(tmp_path):
    """A function that starts the entry point with an environment of its own, as in the image."""
    data = tmp_path / "data"
    data.mkdir()
    started = []

    def start(*arguments, **environment):
        env = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "SAMLOOP_STUDIES": str(data),
            **environment,
        }
        process = subprocess.Popen(
            [ENTRYPOINT, *arguments], env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        started.append(process)
        return process, data

    yield start
    for process in started:
        process.kill()
        process.wait()


def _refused(process):
    told = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 2, told
    return told


def test_it_does_not_start_without_a_token(container, tmp_path):
    assert "SAMLOOP_OPEN=1" in _refused(container()[0])
    told = _refused(container(SAMLOOP_TOKEN_FILE=str(tmp_path / "none"))[0])
    assert f"uid {os.getuid()} cannot read SAMLOOP_TOKEN_FILE={tmp_path / 'none'}" in told
    told = _refused(container(SAMLOOP_OPEN="1", SAMLOOP_DICOMWEB_PASSWORD_FILE="/none")[0])
    assert "SAMLOOP_DICOMWEB_PASSWORD_FILE=/none" in told


def test_it_does_not_start_where_it_cannot_write(container, tmp_path):
    told = _refused(container(SAMLOOP_OPEN="1", SAMLOOP_STUDIES="/proc")[0])
    assert f"/proc cannot be written by uid {os.getuid()}" in told and "chown" in told
    told = _refused(container(SAMLOOP_OPEN="1", SAMLOOP_STUDIES=str(tmp_path / "none"))[0])
    assert "no folder" in told
    remote = {"SAMLOOP_STUDIES": "http://pacs.example/dicom-web", "SAMLOOP_DATA_DIR": "/proc"}
    assert "/proc cannot be written" in _refused(container(SAMLOOP_OPEN="1", **remote)[0])


def test_any_other_command_is_passed_on_with_the_password(container, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "samloop").write_text('#!/bin/sh\necho "$@" "$MONAI_LABEL_DICOMWEB_PASSWORD"\n')
    (tools / "samloop").chmod(0o755)
    (tmp_path / "password").write_text("sesame street\n")
    secret = {"SAMLOOP_DICOMWEB_PASSWORD_FILE": str(tmp_path / "password"), "PATH": f"{tools}:/usr/bin:/bin"}
    for words in (["doctor", "--json"], ["weights", "list"]):
        process, _ = container(*words, **secret)
        assert process.communicate(timeout=60)[0].decode() == f"{' '.join(words)} sesame street\n"
    process, data = container("--engine", "sam_tiny", SAMLOOP_OPEN="1", SAMLOOP_PROJECT="my.yaml", **secret)
    told = process.communicate(timeout=60)[0].decode()
    for words in (
        f"--studies {data}",
        "--host 0.0.0.0 --port 8000",
        "--project my.yaml",
        "--open --engine sam_tiny",
    ):
        assert words in told
    process, _ = container(MONAI_LABEL_AUTH_ENABLE="true", **secret)
    assert "--open" not in process.communicate(timeout=60)[0].decode() and process.returncode == 0
    assert list(data.iterdir()) == [], "what tried whether the folder can be written is gone"


def test_it_serves_with_its_token_and_ends_when_it_is_told_to(container, tmp_path):
    token = secrets.token_urlsafe(24)
    (tmp_path / "token").write_text(token + "\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = container(SAMLOOP_TOKEN_FILE=str(tmp_path / "token"), SAMLOOP_PORT=str(port))[0]
    url = f"http://127.0.0.1:{port}"
    health = FINAL.last("HEALTHCHECK").text.partition("CMD ")[2]
    check = [sys.executable, *json.loads(health)[1:]]
    while subprocess.run(check, env={"SAMLOOP_PORT": str(port)}, capture_output=True, check=False).returncode:
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.5)
    assert requests.get(f"{url}/health", timeout=30).status_code == 200
    assert requests.get(f"{url}/info/", timeout=30).status_code == 401
    shown = {"Authorization": f"Bearer {token}"}
    assert requests.get(f"{url}/info/", headers=shown, timeout=30).status_code == 200
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0, told
    assert token not in told
