"""`/ohif/`: the viewer that MONAI Label bundles, as it has to be served, and the accept button in it.

Stock serves the page in place of every file in a sub-folder and of every file that does not exist, and names
no content type for some. Here a file is a key of the bundle's listing, so no path can leave the folder; what
looks like a file and is none is a 404, and everything else is a route of the viewer, which is the page.

What is changed in the bundle: fonts are not fetched from the internet, the panel connects to the server the
page came from (stock: port 8000), and the page loads `viewer/accept.js` where the project wants that.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from functools import lru_cache
from pathlib import Path

import monailabel
from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, Response
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.utils.app import app_instance

from sam_infer.errors import InputError

router = APIRouter(prefix="/ohif", tags=["Others"])

BUNDLE = Path(monailabel.__file__).parent / "endpoints" / "static" / "ohif"
OWN = Path(__file__).parents[1] / "viewer"
PAGE = "index.html"
#: The folder of our own files below /ohif/, and the one that the page loads.
FOLDER, SCRIPT = "samloop", "accept.js"
#: By extension, since the computer's own table may lack some, and browsers refuse scripts and WebAssembly of
#: another type.
TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".ico": "image/x-icon",
    ".js": "text/javascript",
    ".json": "application/json",
    ".map": "application/json",
    ".mjs": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".wasm": "application/wasm",
    ".xml": "application/xml",
}
#: What is sent compressed: the bundle's 51 MB become 10.
PACKED = {".css", ".html", ".js", ".json", ".map", ".mjs", ".svg", ".txt", ".wasm", ".xml"}
#: Files of the bundle that are not served as they are.
_EDITED = {PAGE, "app-config.js", "app.bundle.css", "manifest.json"}
_HASHED = re.compile(r"(^|\.)[0-9a-f]{20}\.(js|wasm)$")
_WEB_FONT = re.compile(r'@import url\(https://fonts\.[^)]*\);|<link [^>]*href="https://fonts\.[^>]*>')
#: The panel reads its server's address from this cookie, and asks port 8000 of the page's host without it.
_ADDRESS = "\ndocument.cookie = 'MONAILABEL_SERVER_URL=' + escape(location.origin + '/') + ';path=/ohif';\n"


@router.get("/{path:path}", include_in_schema=False)
def viewer(
    path: str, request: Request, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))
) -> Response:
    """A file of the viewer, or its page for the viewer's own routes."""
    if path not in _files():
        if "." in path.rpartition("/")[2]:
            raise InputError("path", path, "the viewer has no such file", status=404)
        path = PAGE
    file = _files()[path]
    stat = file.stat()
    version = f"{stat.st_mtime_ns:x}-{stat.st_size:x}"
    edited = None
    if path in _EDITED:
        edited = _edit(path, file.read_text("utf-8"), accept=app_instance().project.accept_button).encode()
        version = hashlib.sha256(edited).hexdigest()[:20]
    packed = file.suffix in PACKED and "gzip" in request.headers.get("accept-encoding", "")
    tag = f'"{version}-gzip"' if packed else f'"{version}"'
    headers = {
        "cache-control": "max-age=31536000, immutable" if _HASHED.search(path) else "no-cache",
        "etag": tag,
        "vary": "accept-encoding",
    }
    kind = TYPES.get(file.suffix, "application/octet-stream")
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if packed:
        headers["content-encoding"] = "gzip"
        return Response(
            _pack(path, version) if edited is None else gzip.compress(edited, 6), 200, headers, kind
        )
    if edited is not None:
        return Response(edited, 200, headers, kind)
    return FileResponse(file, 200, headers, kind, stat_result=stat)


@lru_cache(maxsize=1)
def _files() -> dict[str, Path]:
    """Every file of the viewer by its path below /ohif/."""
    found = {file.relative_to(BUNDLE).as_posix(): file for file in BUNDLE.rglob("*") if file.is_file()}
    return {**found, **{f"{FOLDER}/{file.name}": file for file in OWN.iterdir()}}


def _edit(path: str, text: str, *, accept: bool) -> str:
    """A file of the bundle as it is served here."""
    text = _WEB_FONT.sub("", text)
    if path == PAGE and accept:
        text = text.replace(
            "</head>", f'<script type="module" src="/ohif/{FOLDER}/{SCRIPT}"></script></head>', 1
        )
    if path == "manifest.json":
        text = text.replace('"/assets/', '"/ohif/assets/')
    return text + _ADDRESS if path == "app-config.js" else text


@lru_cache(maxsize=256)
def _pack(path: str, version: str) -> bytes:
    """A file, compressed; kept, since the largest takes half a second (all of them are 10 MB)."""
    return gzip.compress(_files()[path].read_bytes(), 6)
