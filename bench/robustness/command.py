"""What stock MONAI Label and samloop answer to the same bad requests, damaged stores and absent PACS.

python -m bench robustness --out results

Both run over copies of the same phantoms, then each over an Orthanc of its own. Stock runs an application
that is a threshold, so that what is seen is MONAI Label itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from bench import servers
from bench.latency import write_volume
from bench.proc import cpu_name
from bench.robustness import local, stockapp, stores
from bench.robustness.subject import OURS, STOCK, Subject, last_error, short
from bench.table import markdown

Rows = dict[str, dict[str, str]]


def add_parser(commands: Any) -> None:
    """Add ``robustness`` to the command line."""
    parser = commands.add_parser("robustness", help="stock MONAI Label and samloop under bad conditions")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for robustness.md and logs; what was found before is kept",
    )
    parser.add_argument("--parts", default="local,stores,dicom", help="which tables")
    parser.add_argument("--servers", default=f"{STOCK},{OURS}", help="which servers")
    parser.add_argument("--only", default="", help="probes whose name holds this text")
    parser.add_argument("--large", default="512x512x200", help="the large CT, in voxels")
    parser.add_argument("--kills", type=int, default=40, help="kills of a store that saves")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write them."""
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[..., None]] = {"local": _local, "stores": _stores, "dicom": _dicom}
    noted = args.out / "robustness.json"
    tables: dict[str, Rows] = json.loads(noted.read_text()) if noted.exists() else {}
    for part in args.parts.split(","):
        for name in args.servers.split(","):
            with tempfile.TemporaryDirectory(prefix=f"robustness-{name}-") as folder:
                parts[part](name, Path(folder), args, tables.setdefault(part, {}))
            noted.write_text(json.dumps(tables, indent=1))
    text = ""
    for part, rows in tables.items():
        cells = [[probe, found.get(STOCK, ""), found.get(OURS, "")] for probe, found in rows.items()]
        text += f"## {part}\n\n{markdown(['', STOCK, OURS], cells)}\n"
    text += f"{cpu_name()}\n"
    print(text)
    (args.out / "robustness.md").write_text(text)
    return 0


def _note(rows: Rows, probe: str, name: str, act: Callable[[], str], only: str) -> None:
    """Run a probe; one that fails says so in its cell, and the others go on."""
    if only not in probe:
        return
    try:
        said = act()
    except requests.Timeout:
        said = "no answer"
    except Exception as error:
        said = f"? {type(error).__name__} {short(error)}"
    rows.setdefault(probe, {})[name] = said
    print(f"{name}: {probe}: {said}", flush=True)


@contextmanager
def _subject(name: str, studies: str, folder: Path, log: Path, *, tools: bool = True) -> Iterator[Subject]:
    """One of the two servers over some studies."""
    own = folder / "studies"
    if name == STOCK:
        starting = stockapp.serving(studies, folder, log, tools=tools)
        what: dict[str, Any] = {"model": stockapp.MODEL, "prompt": {}, "trainer": stockapp.TRAINER}
    else:
        starting = servers.samloop(studies, log, ["--data", str(folder / "data")])
        prompt = {"foreground": [[32, 32, 8]], "label": "liver"}
        what = {"model": "sam_click_2d", "prompt": prompt, "trainer": "unet"}
    with starting as server:
        yield Subject(name=name, url=server.url, pid=server.pid, studies=own, outside=folder, **what)


def _phantoms(folder: Path, count: int) -> None:
    from trainers.phantoms import write_phantoms

    folder.mkdir(parents=True)
    write_phantoms(folder, count=count, shape=(64, 64, 16))


def _plant_unet(studies: Path) -> None:
    """A published U-Net that answers one label everywhere, so that there is a model that needs no prompt."""
    from apps.samloop.home import home_of
    from apps.samloop.project import load_project
    from tests.unets import constant_unet

    path = home_of(str(studies)) / "models" / "unet.safetensors"
    path.parent.mkdir(parents=True)
    constant_unet(path, load_project().labels)


def _local(name: str, folder: Path, args: argparse.Namespace, rows: Rows) -> None:
    studies = folder / "studies"
    _phantoms(studies, 8)
    i, j, k = map(int, args.large.split("x"))
    write_volume(None, (i, j, k), studies / f"{local.BIG}.nii.gz")
    if name == OURS:
        _plant_unet(studies)
    with _subject(name, str(studies), folder, args.out / f"{name}-local.log") as subject:
        for probe, act in local.PROBES.items():
            _note(rows, probe, name, lambda act=act: act(subject), args.only)  # type: ignore[misc]


def _stores(name: str, folder: Path, args: argparse.Namespace, rows: Rows) -> None:
    _note(
        rows,
        "killed while it saves",
        name,
        lambda: stores.killed(name, folder / "kills", args.kills),
        args.only,
    )
    studies, log = folder / "studies", args.out / f"{name}-stores.log"
    _phantoms(studies, 3)

    @contextmanager
    def start() -> Iterator[Subject]:
        with _subject(name, str(studies), folder, log) as subject:
            yield subject

    with start() as subject:
        content = (studies / "truth" / f"{local.CASE}.nii.gz").read_bytes()
        subject.save(f"image={local.CASE}", "l.nii.gz", content).raise_for_status()
    damages: dict[str, Callable[[bytes], bytes]] = {
        "empty index at start": lambda whole: b"",
        "truncated index at start": lambda whole: whole[: len(whole) // 2],
    }
    for probe, damage in damages.items():
        act = lambda damage=damage: stores.damaged_index(start, studies, log, damage)  # noqa: E731
        _note(rows, probe, name, act, args.only)


def _dicom(name: str, folder: Path, args: argparse.Namespace, rows: Rows) -> None:
    from bench.robustness import dicom
    from tests.orthanc import running_orthanc

    with running_orthanc(folder / "orthanc") as orthanc:
        first, second, mr = dicom.fill(orthanc, folder / "slices")

        def start(own: str, *, tools: bool = True) -> Any:
            (folder / own).mkdir()
            log = args.out / f"{name}-dicom-{own}.log"
            return _subject(name, orthanc.url, folder / own, log, tools=tools)

        def without_tools() -> str:
            try:
                with start("bare", tools=False):
                    return "starts"
            except RuntimeError:
                log = args.out / f"{name}-dicom-bare.log"
                return f"**does not start**: {last_error(log.read_text(errors='replace'))}"

        _note(rows, "start without dcmqi's programs on the PATH", name, without_tools, args.only)
        with start("own") as subject:
            place = dicom.Place(subject=subject, orthanc=orthanc, ct=(first, second), mr=mr, fresh=start)
            for probe, act in dicom.PROBES.items():
                _note(rows, probe, name, lambda act=act: act(place), args.only)  # type: ignore[misc]
        shutil.rmtree(folder / "slices")
