"""Who may use the server: options, tokens, cookies, foreign pages."""

import argparse
import base64
import hashlib
import re
import time

import pytest
from fastapi.testclient import TestClient

from apps.samloop import access, tokens
from apps.samloop.access import Access
from sam_infer.errors import InputError
from tests.test_server import labelmap, save

TOKEN = "correct-horse-battery"
BEARER = {"authorization": f"Bearer {TOKEN}"}


def options(*given):
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    access.add_arguments(parser)
    return parser.parse_args(given)


def allowed(*given, openid=False, **environ):
    return access.access_of(options(*given), environ, openid=openid)


# Options


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "samloop.example", ""])
def test_other_computers_are_served_only_where_that_was_said(host):
    with pytest.raises(InputError, match=r"--host.*nobody is asked who they are.*--token-file.*--open"):
        allowed("--host", host)
    assert allowed("--host", host, "--open").token is None
    assert allowed("--host", host, SAMLOOP_OPEN="1").token is None
    assert allowed("--host", host, SAMLOOP_TOKEN=TOKEN).token == TOKEN
    assert allowed("--host", host, openid=True).token is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_computer_needs_no_token(host):
    assert allowed("--host", host) == Access(hosts=allowed("--host", host).hosts)


@pytest.mark.parametrize(
    ("given", "openid", "text"),
    [
        (["--open"], False, "--open"),
        ([], True, "turn one of them off"),
        (["--certfile", "a.pem"], False, "give both or none"),
        (["--max-upload-mb", "0"], False, "--max-upload-mb = 0"),
        (["--max-requests-per-minute", "-1"], False, "--max-requests-per-minute = -1"),
    ],
)
def test_contradictions_are_refused(given, openid, text):
    with pytest.raises(InputError, match=text):
        allowed(*given, openid=openid, SAMLOOP_TOKEN=TOKEN)


def test_the_token_comes_from_a_file_and_leaves_the_environment(tmp_path):
    file, other = tmp_path / "token", tmp_path / "other"
    file.write_text(f"{TOKEN}\n")
    other.write_text("x" * 40)
    assert allowed("--token-file", str(file), SAMLOOP_TOKEN_FILE=str(other)).token == TOKEN
    assert allowed(SAMLOOP_TOKEN_FILE=str(file), SAMLOOP_TOKEN="y" * 40).token == TOKEN
    environ = {"SAMLOOP_TOKEN": TOKEN}
    found = access.access_of(options(), environ, openid=False)
    assert found.token == TOKEN and TOKEN not in repr(found)
    assert environ == {}, "child processes would inherit it"


@pytest.mark.parametrize("text", ["", "short", "x" * 15, "two words here 1234", "ümlaut" * 4, "a\x00b" * 9])
def test_a_weak_token_is_refused_and_not_shown(tmp_path, text):
    file = tmp_path / "token"
    file.write_text(text, "utf-8")
    with pytest.raises(InputError) as refused:
        allowed("--token-file", str(file))
    assert not text or text not in str(refused.value)
    with pytest.raises(InputError, match="cannot be read"):
        allowed("--token-file", str(tmp_path / "none"))


# Tokens


def test_an_issued_token_carries_a_name_and_only_as_long_as_it_is_good(monkeypatch):
    own = tokens.ApiToken(TOKEN)
    issued = own.issue("Änne O'Hara")
    assert own.name_of(issued) == "Änne O'Hara"
    assert tokens.ApiToken(TOKEN).name_of(issued) == "Änne O'Hara", "after a restart too"
    assert tokens.ApiToken(TOKEN + "2").name_of(issued) is None
    head, _, signature = issued.rpartition(".")
    forged = own.issue("somebody").rpartition(".")[0]
    for other in (
        f"{forged}.{signature}",
        head,
        f"{head}.",
        "sl1.",
        "sl1...",
        f"{head[:-1]}9.{signature}",
        "sl1.ü",
    ):
        assert own.name_of(other) is None
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + tokens.LIFETIME + 1)
    assert own.name_of(issued) is None
    assert own.matches(TOKEN) and not own.matches(TOKEN + "x") and not own.matches("\udcff")


def test_our_own_client_shows_the_token_that_the_environment_names(tmp_path, monkeypatch):
    from apps.samloop.client import Client

    file = tmp_path / "token"
    file.write_text(TOKEN)
    assert "authorization" not in Client("http://localhost:1")._session.headers
    monkeypatch.setenv("SAMLOOP_TOKEN_FILE", str(file))
    assert Client("http://localhost:1")._session.headers["authorization"] == f"Bearer {TOKEN}"


# The door


def test_every_route_but_a_few_needs_the_token(entered):
    client = entered(token=TOKEN)
    routes = client.get("/openapi.json", headers=BEARER).json()["paths"]
    assert len(routes) > 25
    for path, methods in routes.items():
        for method in methods:
            answer = client.request(method, path.replace("{", "").replace("}", ""))
            if path in ("/health", "/ready"):
                assert answer.status_code in (200, 503)
            elif path == "/auth/":
                assert answer.json()["enabled"] is True
            else:
                assert answer.status_code == 401, (method, path)
                assert answer.headers.get("www-authenticate") == "Bearer"
    for path in (
        "/",
        "/ohif/",
        "/ohif/app-config.js",
        "/openapi.json",
        "/metrics",
        "/nothing",
        "/auth/token/valid",
    ):
        assert client.get(path).status_code == 401
        assert client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.get(path, headers={"authorization": f"Basic {TOKEN}"}).status_code == 401
    assert client.get("/info/", headers=BEARER).status_code == 200
    assert client.get("/info/", headers={"authorization": f"bearer  {TOKEN}"}).status_code == 200
    assert client.get(f"/info/?token={TOKEN}").status_code == 401


def test_slicers_calls_and_who_accepted_is_in_the_label(entered, served, tmp_path):
    client, mask = entered(token=TOKEN), labelmap(tmp_path, 1)
    assert client.post("/auth/token", data={"username": "ann", "password": "wrong"}).status_code == 401
    form = {"username": " Ann Lee ", "password": TOKEN, "grant_type": "password"}
    given = client.post("/auth/token", data=form).json()
    assert given["token_type"] == "bearer" and TOKEN not in given["access_token"]
    headers = {"authorization": f"{given['token_type']} {given['access_token']}"}
    assert client.get("/auth/token/valid", headers=headers).json()["username"] == "Ann Lee"
    wrong = {"authorization": headers["authorization"][:-2] + "AA"}
    assert client.get("/auth/token/valid", headers=wrong).status_code == 401
    client.headers.update(headers)
    assert save(client, "ct", content=mask).status_code == 200
    found = client.get("/datastore/label/info?label=ct&tag=final").json()
    assert found["user"] == "Ann Lee"
    client.headers.update(BEARER)
    assert save(client, "ct", content=mask).status_code == 200
    assert client.get("/datastore/label/info?label=ct&tag=final").json()["user"] == "api"
    nobody = served[0]
    assert save(nobody, "ct", content=mask).status_code == 200
    assert nobody.get("/datastore/label/info?label=ct&tag=final").json()["user"] == "admin"
    assert nobody.get("/auth/").status_code == 404, "3D Slicer then asks nobody"


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 65, "\u202egnp"])
def test_a_name_must_be_one(entered, name):
    client = entered(token=TOKEN)
    answer = client.post("/auth/token", data={"username": name, "password": TOKEN})
    assert answer.status_code == 400 and "username" in answer.json()["detail"]


def test_the_token_is_no_name(entered):
    answer = entered(token=TOKEN).post("/auth/token", data={"username": TOKEN, "password": TOKEN})
    assert answer.status_code == 401 and TOKEN not in answer.text


def test_a_browser_logs_in_and_out(entered):
    client = entered(token=TOKEN)
    page = {"accept": "text/html,*/*"}
    asked = "/ohif/viewer?StudyInstanceUIDs=1.2.3&x=%26"
    sent = client.get(asked, headers=page)
    assert sent.status_code == 303 and sent.headers["location"].startswith("/login?next=/ohif/viewer%3F")
    form = client.get(sent.headers["location"], headers=page)
    assert form.status_code == 200 and "http" not in form.text.replace("<!doctype html>", "")
    assert "<script" not in form.text and "1.2.3&amp;x=%26" in form.text
    fields = {"username": "ann", "password": TOKEN, "next": asked}
    wrong = client.post("/login", data={**fields, "password": "wrong"})
    assert wrong.status_code == 401 and "set-cookie" not in wrong.headers and 'role="alert"' in wrong.text
    right = client.post("/login", data=fields)
    assert (right.status_code, right.headers["location"]) == (303, asked)
    cookie = right.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "secure" not in cookie
    assert TOKEN not in right.headers["set-cookie"]
    home = client.get("/", headers=page)
    assert home.status_code == 200 and "ann" in home.text and "/logout" in home.text
    assert client.get("/info/", headers={"authorization": "Bearer wrong"}).status_code == 200, (
        "the cookie will do"
    )
    assert client.post("/logout").headers["location"] == "/login"
    assert client.get("/", headers=page).status_code == 303
    secure = TestClient(client.app, base_url="https://testserver", follow_redirects=False)
    assert "secure" in secure.post("/login", data=fields).headers["set-cookie"].lower()


@pytest.mark.parametrize(
    "elsewhere",
    [
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "\\\\evil",
        "javascript:x",
        "",
        "/a\r\nb: c",
        "/ü",
    ],
)
def test_logging_in_leads_nowhere_else(entered, elsewhere):
    fields = {"username": "ann", "password": TOKEN, "next": elsewhere}
    assert entered(token=TOKEN).post("/login", data=fields).headers["location"] == "/"


def test_guessing_is_stopped_and_who_is_in_stays_in(entered):
    client = entered(token=TOKEN)
    issued = client.post("/auth/token", data={"username": "ann", "password": TOKEN}).json()["access_token"]
    statuses = [
        client.get("/info/", headers={"authorization": f"Bearer guess-{n}"}).status_code for n in range(12)
    ]
    assert statuses == [401] * 10 + [429] * 2
    limited = client.post("/login", data={"username": "ann", "password": "guess"})
    assert limited.status_code == 429 and int(limited.headers["retry-after"]) > 0
    assert client.get("/info/", headers={"authorization": f"Bearer {issued}"}).status_code == 200
    assert client.get("/info/", headers=BEARER).status_code == 200, "it worked from here before"
    other = TestClient(client.app, client=("10.9.9.9", 1))
    for n in range(11):
        assert other.get("/info/", headers={"authorization": f"Bearer guess-{n}"}).status_code in (401, 429)
    assert other.get("/info/", headers=BEARER).status_code == 429, (
        "a right guess is not told from a wrong one"
    )
    third = TestClient(client.app, client=("10.9.9.8", 1))
    assert third.get("/info/", headers=BEARER).status_code == 200


def test_old_cookies_are_no_guesses(entered):
    client = entered(token=TOKEN)
    old = tokens.ApiToken("another-token-of-before").issue("ann")
    for _ in range(30):
        assert client.get("/info/", headers={"authorization": f"Bearer {old}"}).status_code == 401


# Foreign pages


@pytest.mark.parametrize("rules", [{}, {"token": TOKEN}])
def test_a_foreign_page_changes_nothing(entered, rules):
    client = entered(**rules)
    headers = BEARER if rules else {}
    for origin in (
        "https://evil.example",
        "null",
        "http://testserver:81",
        "http://testserver.evil.example",
        "http://[",
    ):
        answer = client.post("/activelearning/first", json={}, headers={**headers, "origin": origin})
        assert answer.status_code == 403, origin
        assert client.get("/info/", headers={**headers, "origin": origin}).status_code == 200
    for origin in ("http://testserver", "https://testserver", "http://testserver:80"):
        answer = client.post("/activelearning/first", json={}, headers={**headers, "origin": origin})
        assert answer.status_code == 200, origin
    if rules:
        login = {"username": "ann", "password": TOKEN}
        assert (
            client.post("/login", data=login, headers={"origin": "https://evil.example"}).status_code == 403
        )


def test_a_page_that_calls_this_computer_by_another_name_reads_nothing(entered):
    client = entered(hosts=allowed("--allow-host", "Samloop.Example.").hosts)

    def called(host):
        return client.get("/info/", headers={"host": host}).status_code

    for host in (
        "localhost",
        "localhost:8000",
        "127.0.0.1:8000",
        "[::1]:8000",
        "10.0.0.7",
        "samloop.example:80",
        "a.localhost",
    ):
        assert called(host) == 200, host
    for host in (
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "",
        "127.0.0.1.nip.io",
        "a@b",
    ):
        assert called(host) == 421, host
    assert allowed(SAMLOOP_TOKEN=TOKEN).hosts is None
    assert "only.example" in allowed("--allow-host", "only.example", SAMLOOP_TOKEN=TOKEN).hosts


def test_named_origins_may_call_and_read_refusals(entered, monkeypatch):
    from monailabel.config import Settings, settings

    monkeypatch.setattr(settings, "MONAI_LABEL_CORS_ORIGINS", ["https://viewer.example/"])
    client = entered(token=TOKEN)
    origin = {"origin": "https://viewer.example"}
    asks = {
        **origin,
        "access-control-request-method": "PUT",
        "access-control-request-headers": "authorization",
    }
    preflight = client.options("/datastore/label", headers=asks)
    assert preflight.status_code == 200
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    assert client.get("/info/", headers=origin).headers["access-control-allow-origin"] == origin["origin"]
    answer = client.post("/activelearning/first", json={}, headers={**BEARER, **origin})
    assert answer.status_code == 200
    assert "access-control-allow-credentials" not in answer.headers, "a cookie is for our own pages"
    with pytest.raises(ValueError, match="CORS_ORIGINS"):
        Settings(MONAI_LABEL_CORS_ORIGINS=["*"])


def test_browsers_are_told_what_they_may_do(entered):
    client = entered(token=TOKEN)
    for path, status in (("/info/", 200), ("/nothing", 404), ("/datastore/image?image=none", 404)):
        headers = client.get(path, headers=BEARER).headers
        assert client.get(path, headers=BEARER).status_code == status
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "same-origin"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'self'" in headers["content-security-policy"]
    assert "x-frame-options" in client.get("/info/").headers, "also of a refusal"
    page = client.get("/ohif/", headers=BEARER)
    viewer = page.headers
    inline = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in inline]
    assert inline and all(f"'sha256-{digest}'" in viewer["content-security-policy"] for digest in digests)
    assert "'unsafe-inline'" not in viewer["content-security-policy"].split("style-src")[0]
    assert "worker-src 'self' blob:" in viewer["content-security-policy"]
    assert "strict-transport-security" not in viewer
    https = TestClient(client.app, base_url="https://testserver", client=("10.1.2.3", 5))
    assert "strict-transport-security" in https.get("/health").headers
