"""A thin client of the server's REST interface, for scripts that play a viewer."""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

import requests
from numpy.typing import NDArray
from requests_toolbelt.multipart.decoder import ImproperBodyPartContentException, MultipartDecoder

from apps.samloop.tokens import read_token
from sam_infer.geometry import Region
from sam_infer.volumes import Image, extension, read_image

CONNECT_SECONDS = 5.0


class ServerError(RuntimeError):
    """The server refused, failed, or did not answer.

    Args:
        request: Method and path.
        status: HTTP status; None where no answer came.
        detail: The server's own text.
    """

    def __init__(self, request: str, status: int | None, detail: str) -> None:
        super().__init__(f"{request}: {f'HTTP {status}: ' if status else ''}{detail}")
        self.status = status
        self.detail = detail

    @property
    def refused(self) -> bool:
        """True for a 4xx: the request cannot be served as it is."""
        return self.status is not None and 400 <= self.status < 500


@dataclass(frozen=True, kw_only=True)
class InferReply:
    """The two parts of an inference reply.

    Args:
        params: The JSON part.
        content: Bytes of the label map file, b"" where none was sent.
        filename: Its name, from which the format is known.
    """

    params: dict[str, Any]
    content: bytes
    filename: str

    def labelmap(self) -> Image:
        """The label map, (I, J, K) in the image's voxel order; a 2D image is (W, H, 1)."""
        return read_bytes(self.content, self.filename)

    def onto(self, base: NDArray) -> NDArray:
        """The whole label map, also where only the region that changed was sent.

        Args:
            base: (I, J, K), what was sent along as ``label``, or zeros; returned where nothing changed.

        Raises:
            ServerError: When the reply holds no label map that fits.
        """
        region = self.params.get("region")
        if "region" in self.params and region is None:
            return base
        if not self.content:
            raise ServerError("POST /infer", None, "the reply holds no image part")
        found, whole = self.labelmap().array, base.copy()
        part = whole
        if region is not None:
            low, high = tuple(region["low"]), tuple(region["high"])
            part = Region(low=low, high=high).cut(whole)
        if found.shape != part.shape:
            text = f"the reply's label map has shape {found.shape}, not {part.shape}"
            raise ServerError("POST /infer", None, text)
        part[...] = found
        return whole


def read_bytes(content: bytes, filename: str) -> Image:
    """Read an image file held in memory.

    Args:
        content: The file's bytes.
        filename: Its name; only the extension matters.

    Raises:
        InputError: When it is not a readable image.
    """
    with tempfile.TemporaryDirectory(prefix="samloop-") as folder:
        path = Path(folder) / f"file{extension(filename) or Path(filename).suffix}"
        path.write_bytes(content)
        return read_image(path, argument=filename)


class Client:
    """The routes that a viewer uses. Every method raises `ServerError` when the server does not serve it.

    Shows the token that the environment names (``SAMLOOP_TOKEN_FILE``, ``SAMLOOP_TOKEN``), where it does.

    Args:
        server: Address, such as http://127.0.0.1:8000.
        client_id: How the server's records name this client.
        timeout: Seconds to wait for an answer.
    """

    def __init__(self, server: str, *, client_id: str = "samloop", timeout: float = 600.0) -> None:
        self.server = server.rstrip("/")
        self.client_id = client_id
        self._timeout = (min(CONNECT_SECONDS, timeout), timeout)
        self._session = requests.Session()
        token = read_token(None, os.environ)
        if token is not None:
            self._session.headers["authorization"] = f"Bearer {token}"

    def info(self) -> dict[str, Any]:
        """What the server offers: labels, models, trainers, strategies, train_stats, datastore."""
        return self._json("GET", "/info/")

    def next_sample(self, strategy: str, **params: Any) -> dict[str, Any]:
        """The next case (``id``, ``path``, ``name``...), or {} when none is left."""
        body = {"client_id": self.client_id, **params}
        return self._json("POST", f"/activelearning/{strategy}", json=body)

    def image(self, image_id: str) -> tuple[bytes, str]:
        """An image file and its name."""
        answer = self._send("GET", "/datastore/image", params={"image": image_id})
        name = _disposition(answer.headers.get("content-disposition", ""), "filename")
        return answer.content, name or image_id

    def infer(
        self,
        model: str,
        image_id: str,
        params: dict[str, Any] | None = None,
        *,
        label: tuple[str, bytes] | None = None,
    ) -> InferReply:
        """Run a model on an image.

        Args:
            model: Name among ``info()["models"]``.
            image_id: Id of the datastore.
            params: The model's parameters.
            label: File name and content of a mask to correct, or None.
        """
        request = f"/infer/{model}"
        body = {"client_id": self.client_id, **(params or {})}
        answer = self._send(
            "POST", request, params={"image": image_id, "output": "all"}, files=_form(body, label)
        )
        kind = answer.headers.get("content-type", "")
        if not kind.startswith("multipart/"):
            return InferReply(params=self._decode(answer, request), content=b"", filename="")
        try:
            parts = {_part_name(p.headers): p for p in MultipartDecoder(answer.content, kind).parts}
            found = json.loads(parts["params"].content)
        except (KeyError, ValueError, ImproperBodyPartContentException) as error:
            raise ServerError(f"POST {request}", None, f"unreadable multipart reply ({error!r})") from error
        image = parts.get("image")
        if image is None:
            return InferReply(params=found, content=b"", filename="")
        return InferReply(params=found, content=image.content, filename=_part_name(image.headers, "filename"))

    def save_label(
        self, image_id: str, filename: str, content: bytes, params: dict[str, Any], *, tag: str = "final"
    ) -> dict[str, Any]:
        """Store a label map; with the tag ``final`` the case is accepted."""
        body = {"client_id": self.client_id, **params}
        return self._json(
            "PUT",
            "/datastore/label",
            params={"image": image_id, "tag": tag},
            files=_form(body, (filename, content)),
        )

    def train(self, trainer: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Start a training; returns its task record."""
        return self._json("POST", f"/train/{trainer}", json=params or {})

    def train_status(self) -> dict[str, Any]:
        """The task record of the latest training: ``status``, ``details``..."""
        return self._json("GET", "/train/")

    def _json(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        return self._decode(self._send(method, path, **kwargs), f"{method} {path}")

    def _decode(self, answer: requests.Response, request: str) -> dict[str, Any]:
        try:
            found = answer.json()
        except ValueError:
            raise ServerError(request, None, f"the reply is not JSON: {answer.text[:200]!r}") from None
        if not isinstance(found, dict):
            found = {} if found is None else {"result": found}
        return found

    def _send(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        request = f"{method} {path}"
        try:
            answer = self._session.request(method, self.server + path, timeout=self._timeout, **kwargs)
        except requests.Timeout:
            raise ServerError(request, None, f"{self.server} did not answer in time") from None
        except (requests.RequestException, ValueError) as error:
            reason = f"{self.server} cannot be reached ({type(error).__name__}); is the server running?"
            raise ServerError(request, None, reason) from error
        if answer.status_code >= 400:
            raise ServerError(request, answer.status_code, _detail(answer))
        return answer


def _form(params: dict[str, Any], label: tuple[str, bytes] | None) -> dict[str, tuple]:
    form: dict[str, tuple] = {"params": (None, json.dumps(params))}
    if label is not None:
        form["label"] = (label[0], label[1], "application/octet-stream")
    return form


def _detail(answer: requests.Response) -> str:
    try:
        found = answer.json()
    except ValueError:
        found = answer.text
    detail = found.get("detail", found) if isinstance(found, dict) else found
    return re.sub(r"\s+", " ", str(detail)).strip()[:500] or str(answer.reason)


def _part_name(headers: Any, parameter: str = "name") -> str:
    return _disposition(headers.get(b"content-disposition", b"").decode("utf-8", "replace"), parameter)


def _disposition(value: str, parameter: str) -> str:
    message = Message()
    message["content-disposition"] = value
    found = message.get_param(parameter, "", "content-disposition")
    return str(found[2] if isinstance(found, tuple) else found)
