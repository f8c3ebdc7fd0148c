"""Who reaches the server, and what the server reaches."""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from collections import Counter
from email.utils import parsedate_to_datetime
from pathlib import Path

from apps.samloop.checks.finding import Finding, Subject, fail, few, ok, warn
from apps.samloop.pacs.address import configured_address
from apps.samloop.pacs.client import PacsClient, RefusedError
from apps.samloop.pacs.dicomweb import JSON, Dicomweb
from apps.samloop.tokens import read_token
from sam_infer.errors import InputError, UnavailableError

#: Seconds that a PACS may take for a small question, and by which its clock may differ.
_SLOW, _SKEW = 1.0, 120
#: Answers to an empty request to store that say that storing is not allowed, or not there.
_NO_STORING = {401, 403, 404, 405, 501}


def token(subject: Subject) -> list[Finding]:
    """The API token, without showing it."""
    try:
        known = read_token(subject.token_file, os.environ)
    except InputError as error:
        return [fail("token", str(error).partition(";")[0], "see docs/operations.md for how to make one")]
    if known is None:
        return [ok("token", "none: only this computer can be served, unless with --open")]
    named = os.environ.get("SAMLOOP_TOKEN_FILE")
    file = subject.token_file or (Path(named) if named else None)
    if file is None:
        return [ok("token", f"in SAMLOOP_TOKEN, {len(known)} characters")]
    mode = file.expanduser().stat().st_mode & 0o777
    if mode & 0o077:
        return [warn("token", f"others can read or change {file} (mode {mode:o})", f"chmod 600 {file}")]
    return [ok("token", f"{file}, {len(known)} characters, readable by its owner only")]


def port(subject: Subject) -> list[Finding]:
    """Whether the port is free, or samloop's."""
    try:
        socket.create_server(("127.0.0.1", subject.port)).close()
    except (OSError, OverflowError) as error:
        if _is_samloop(subject.port):
            return [ok("port", f"a server answers on {subject.port} as samloop does")]
        text = f"{subject.port} cannot be listened on ({error})"
        return [warn("port", text, "end the program that has it, or choose another --port")]
    return [ok("port", f"{subject.port} is free")]


def _is_samloop(number: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", number, timeout=2)
    try:
        connection.request("GET", "/health")
        return json.loads(connection.getresponse().read(1024)) == {"status": "ok"}
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()


def pacs(subject: Subject) -> list[Finding]:
    """Whether the PACS answers, lists, and would take a segmentation; nothing is stored there."""
    if not subject.remote:
        return []
    address = configured_address(str(subject.studies))
    client = PacsClient(address)
    user = f"as {address.user}" if address.user else "without a user"
    start = time.monotonic()
    try:
        answer = client.get("qido", "studies", accept=JSON, params=[("limit", "1")])
        client.content(answer)
        took = time.monotonic() - start
        series = Dicomweb(client).series({})
    except RefusedError as error:
        remedy = str(error).rpartition("; ")[2]
        return [fail("pacs", f"{address.url} does not serve {user}: {error.reason}", remedy)]
    except UnavailableError as error:
        remedy = "is it running, is its URL right, does a firewall lie between?"
        return [fail("pacs", f"{address.url} does not answer: {error.reason}", remedy)]
    text = f"{address.url} answers {user}, {took:.2f} s for a small question"
    slow = warn("pacs", text, "find out what makes it slow: each case that is opened asks it")
    found = [slow if took > _SLOW else ok("pacs", text)]
    kinds = Counter(entry.modality or "unknown" for entry in series)
    told = few([f"{count} {kind}" for kind, count in kinds.most_common()], most=6)
    text = f"{len(series)} series ({told})" if series else "no series"
    found.append(ok("pacs", text) if series else warn("pacs", text, "send it some studies"))
    skew = _skew(answer.headers.get("date"))
    if skew > _SKEW:
        found.append(warn("clock", f"{skew:.0f} s apart from the PACS's", "set both by the same time server"))
    return [*found, _storing(client)]


def _skew(date: str | None) -> float:
    """Seconds between its clock and this one's; 0 where it does not tell the time."""
    try:
        return abs(parsedate_to_datetime(date).timestamp() - time.time()) if date else 0.0
    except ValueError:
        return 0.0


def _storing(client: PacsClient) -> Finding:
    """What it says to a request to store no file at all."""
    headers = {"Accept": JSON, "Content-Type": 'multipart/related; type="application/dicom"; boundary=none'}
    try:
        with client.send("POST", "stow", "studies", headers=headers, body=b"--none--\r\n") as answer:
            status = answer.status_code
    except UnavailableError as error:
        return warn("pacs storing", error.reason, "labels are kept here until it takes them")
    text = f"it answers {status} to a request to store nothing"
    if status in _NO_STORING:
        remedy = "let the user store DICOM SEG; until then accepted labels are kept here"
        return warn("pacs storing", text, remedy)
    return ok("pacs storing", f"{text}: it can be asked to store segmentations")


def outbox(subject: Subject) -> list[Finding]:
    """Accepted labels that the PACS has not taken yet."""
    if not subject.remote or subject.home is None:
        return []
    waiting = sorted(
        path.name.rpartition("@")[0] for path in (subject.home / "pacs" / "outbox").glob("[!.]*@*")
    )
    if not waiting:
        return [ok("outbox", "no accepted label waits for the PACS")]
    text = f"{len(waiting)} accepted labels wait for the PACS: {few(waiting)}"
    return [warn("outbox", text, "they are sent when the server runs and the PACS takes them; see its log")]
