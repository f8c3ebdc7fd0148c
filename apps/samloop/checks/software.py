"""Versions, and the parts of the installation that are no Python."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from pathlib import Path

from apps.samloop.checks.finding import Finding, Subject, fail, ok, warn

#: Named in the line that says that all is as pinned.
TOLD = ("samloop", "monailabel", "monai", "torch", "pydicom", "numpy")
_AGAIN = "run `make setup`, or install samloop again into an environment of its own"


def versions(_: Subject) -> list[Finding]:
    """Python, and every package against its pin."""
    python = f"Python {platform.python_version()} in {sys.prefix}"
    found = [ok("python", python)]
    if sys.version_info[:2] != (3, 11):
        found = [fail("python", python, "samloop is made for Python 3.11: set it up with one")]
    wrong = []
    for name, pin in sorted(pins().items()):
        version = installed(name)
        if version is None:
            wrong.append(fail("versions", f"{name} {pin} is not installed", _AGAIN))
        elif version.partition("+")[0] != pin:
            wrong.append(warn("versions", f"{name} is {version}, tested is {pin}", _AGAIN))
    told = ", ".join(f"{name} {installed(name) or '?'}" for name in TOLD)
    return [*found, *(wrong or [ok("versions", f"as pinned: {told}")])]


def pins() -> dict[str, str]:
    """Package -> version: of the checkout's requirements.txt, or what the installed package says it needs."""
    file = Path(__file__).resolve().parents[3] / "requirements.txt"
    if file.is_file():
        lines = [line.partition("#")[0] for line in file.read_text("utf-8").splitlines()]
    else:
        lines = [line for line in importlib.metadata.requires("samloop") or () if "extra ==" not in line]
    pairs = [line.partition(";")[0].strip().partition("==") for line in lines]
    return {name.strip(): pin.strip() for name, _, pin in pairs if pin}


def installed(name: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def viewer(_: Subject) -> list[Finding]:
    """The OHIF viewer, and what tests it."""
    spec = importlib.util.find_spec("monailabel")
    origin = Path(spec.origin).parent if spec is not None and spec.origin else None
    page = origin / "endpoints" / "static" / "ohif" / "index.html" if origin else None
    if page is not None and page.is_file():
        found = ok("viewer", "OHIF comes with monailabel and is here; it is served at /ohif/")
    else:
        found = warn("viewer", "OHIF's files are not in monailabel; /ohif/ will not open", _AGAIN)
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    text = f"{browser} is here" if browser else "no Chromium here, which only the browser tests need"
    return [found, ok("browser", text)]
