"""Descriptions of classes from a language model behind a chat endpoint, where a project asks for that.

This is off unless the project file names an endpoint. What is sent is the name of the label, inside a fixed
request, to the address in the project file, once per label and model; the answer is kept in a file and read
from there ever after. No image, no case, no patient and nothing else of the project is sent; each request is
logged. A hospital that wants nothing sent at all leaves the endpoint out, or runs one on a machine of its
own.

Konwer et al. (arXiv 2503.04639) use GPT-4; their request is not known. This one is worded here, after what a
re-implementation asks for: one sentence on shape, margins and texture, without measurements, treatment or
patients.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from filelock import FileLock

from sam_infer.errors import InputError
from sam_infer.files import write_atomic
from sam_infer.text.descriptions import spoken

logger = logging.getLogger(__name__)

#: What is asked; {name} is all that differs from one request to the next.
REQUEST = (
    "In one plain sentence, say how this looks on medical images: {name}. Name its shape, its margins, its "
    "texture or density, and where in the body it lies. Give no measurements and no treatment, and mention "
    "no patient. Answer with the sentence alone."
)
#: Seconds to wait for a connection, and for the answer.
TIMEOUT = (10.0, 60.0)
#: Characters of an answer at most: more is not a sentence.
LONGEST = 500
#: An answer depends on something else that failed.
_FAILED = 424
_OWN = "or write the description yourself under `descriptions:` in the project file"


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """Where descriptions are asked for.

    Args:
        url: The address before ``/chat/completions``, as OpenAI-compatible servers have it, such as
            "http://localhost:8000/v1".
        model: The model's name there.
        key_variable: The environment variable that holds the key, never the key itself; None = no key is
            sent.

    Raises:
        InputError: When a value cannot be used.
    """

    url: str
    model: str
    key_variable: str | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        except (TypeError, ValueError, AttributeError):
            usable = False
        if not isinstance(self.url, str) or not usable:
            raise InputError("endpoint.url", self.url, "give an address such as https://host/v1")
        if parts.username or parts.password or parts.query:
            shown = f"{parts.scheme}://{parts.hostname}{parts.path}"
            raise InputError("endpoint.url", shown, "leave names, keys and queries out; see key_variable")
        if not isinstance(self.model, str) or not self.model.strip():
            raise InputError("endpoint.model", self.model, "name the model that shall answer")
        if self.key_variable is None:
            return
        if not isinstance(self.key_variable, str) or not self.key_variable.isidentifier():
            raise InputError(
                "endpoint.key_variable",
                "(not shown)",
                "name the environment variable that holds the key, not the key",
            )
        if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise InputError("endpoint.url", self.url, "a key is sent over https only, or to this machine")


class EndpointDescriptions:
    """Asks for a description of each label once, and keeps the answers in a file.

    Safe to call from several threads and processes. It does nothing until it is asked.

    Args:
        settings: Where it asks.
        cache: The JSON file of answers; deleting it lets it ask again.
    """

    def __init__(self, settings: EndpointSettings, *, cache: Path) -> None:
        self._settings = settings
        self._cache = cache

    def describe(self, label: str) -> str:
        """One sentence about a label.

        Args:
            label: The label's name; it is sent, as `sam_infer.text.descriptions.spoken` says it.

        Raises:
            InputError: Status 424 where no usable answer comes, 409 where the key or the file of answers is
                not in order.
        """
        name = spoken(label)
        asked = {"model": self._settings.model, "request": REQUEST.format(name=name)}
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._cache.with_name(f".{self._cache.name}.lock")):
            kept = self._kept()
            if key not in kept:
                text = self._ask(name, asked["request"])
                kept[key] = {"label": name, "url": self._settings.url, **asked, "text": text}
                write_atomic(self._cache, json.dumps(kept, indent=1, ensure_ascii=False).encode())
            return kept[key]["text"]

    def _kept(self) -> dict[str, dict[str, str]]:
        if not self._cache.is_file():
            return {}
        try:
            kept = json.loads(self._cache.read_text("utf-8"))
            if all(isinstance(one["text"], str) for one in kept.values()):
                return kept
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass
        raise InputError(
            "descriptions",
            str(self._cache),
            "the kept answers cannot be read; restore the file, or delete it to ask again",
            status=409,
        )

    def _ask(self, name: str, request: str) -> str:
        key = self._key()
        address = f"{self._settings.url.rstrip('/')}/chat/completions"
        logger.info(
            "Asking %s (model %s) to describe a label: its name %r is sent, nothing else of the project",
            address,
            self._settings.model,
            name,
        )
        body = {"model": self._settings.model, "messages": [{"role": "user", "content": request}]}
        try:
            # Its own `auth` keeps requests from adding what a .netrc file holds.
            reply = requests.post(
                address, json=body, auth=_Bearer(key), timeout=TIMEOUT, allow_redirects=False
            )
        except requests.RequestException as error:
            raise _failed(address, f"does not answer ({type(error).__name__}); see that it runs") from error
        if reply.status_code != 200:
            raise _failed(address, f"answers HTTP {reply.status_code}; check its url, model and key")
        return _sentence(address, reply)

    def _key(self) -> str | None:
        variable = self._settings.key_variable
        if variable is None:
            return None
        key = os.environ.get(variable, "").strip()
        if not key:
            raise InputError(
                "endpoint.key_variable",
                variable,
                "set this environment variable to the endpoint's key where the server starts",
                status=409,
            )
        return key


class _Bearer(requests.auth.AuthBase):
    """Sends a key, or none, and nothing else."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: Any) -> Any:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _sentence(address: str, reply: requests.Response) -> str:
    """The answer in a chat completion, on one line."""
    try:
        content = reply.json()["choices"][0]["message"]["content"]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise _failed(address, "does not answer as a chat endpoint does; check its url") from error
    text = " ".join(content.split()).strip('"') if isinstance(content, str) else ""
    if not text or len(text) > LONGEST:
        raise _failed(address, f"answers with {len(text)} characters, not with a sentence; try another model")
    return text


def _failed(address: str, reason: str) -> InputError:
    return InputError("endpoint", address, f"{reason}, {_OWN}", status=_FAILED)
