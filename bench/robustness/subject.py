"""A server under test, and what is told of its answers."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

STOCK, OURS = "stock", "samloop"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One of the two servers, running.

    Args:
        name: `STOCK` or `OURS`.
        url: Its address.
        pid: Its process.
        studies: Its folder of images; for a DICOMweb server a folder of this server's own.
        outside: The folder around it, in which nothing may appear.
        model: A model that answers for `prompt`.
        prompt: Its parameters.
        trainer: A trainer that goes on for long.
        patience: Seconds after which an answer is not waited for.
    """

    name: str
    url: str
    pid: int
    studies: Path
    outside: Path
    model: str
    prompt: dict[str, Any]
    trainer: str
    patience: float = 300.0

    def send(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        """One request, answered with whatever status."""
        return requests.request(method, self.url + path, **{"timeout": self.patience, **kwargs})

    def infer(self, query: str, params: object = None, **files: tuple[str, bytes]) -> requests.Response:
        """An inference; ``params`` as JSON, or a text as it is."""
        text = params if isinstance(params, str) else json.dumps(self.prompt if params is None else params)
        form = {"params": text}
        return self.send("POST", f"/infer/{self.model}?{query}", data=form, files=files or None)

    def save(self, query: str, name: str, content: bytes, params: dict[str, Any] | None = None) -> Any:
        """Submit a label."""
        form = {"params": json.dumps(params or {})}
        return self.send("PUT", f"/datastore/label?{query}", data=form, files={"label": (name, content)})

    def appeared(self, act: Callable[[], Any]) -> tuple[Any, list[str]]:
        """What ``act`` gives, and the files around the store that are there only since."""
        before = self._around()
        given = act()
        return given, sorted(self._around() - before)

    def _around(self) -> set[str]:
        own = self.outside.resolve()
        within = self.studies.resolve()
        found = (path for path in own.rglob("*") if within not in path.resolve().parents)
        return {str(path.relative_to(own)) for path in found if path.is_file()}


def told(reply: requests.Response) -> str:
    """Status and what is said with it, in a few words."""
    try:
        said = reply.json() if "json" in reply.headers.get("content-type", "") else reply.text
    except ValueError:
        said = ""
    if reply.status_code < 300:
        return str(reply.status_code)
    detail = said.get("detail", "") if isinstance(said, dict) else said
    return f"{reply.status_code} {short(detail) or 'without a word'}"


def short(said: object, length: int = 90) -> str:
    """A text that fits into a table."""
    text = re.sub(r"/\S*elsewhere\S*", "/path/of/a/file", re.sub(r"\s+", " ", str(said)))
    text = text.replace("|", "/").strip("+ ")
    text = text.replace("<", "&lt;").replace("*", "\\*")
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " ..."


def last_error(log: str) -> str:
    """The last line of a log that names an error."""
    lines = [line for line in log.splitlines() if "Error" in line and not line.startswith("[")]
    return short(lines[-1]) if lines else "nothing said"


@contextmanager
def watched(subject: Subject) -> Iterator[list[float]]:
    """Seconds that each `GET /info/` took within, asked one after the other."""
    waits: list[float] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            waits.append(timed(lambda: subject.send("GET", "/info/"))[1])
            over.wait(0.02)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    try:
        yield waits
    finally:
        over.set()
        thread.join()


def timed(act: Callable[[], requests.Response]) -> tuple[str, float]:
    """What is answered, and after how many seconds."""
    start = time.perf_counter()
    try:
        said = told(act())
    except requests.RequestException as error:
        said = "no answer" if isinstance(error, requests.Timeout) else f"cut off ({type(error).__name__})"
    return said, time.perf_counter() - start
