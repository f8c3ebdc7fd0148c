"""Probes of a server over a folder of images: one bad request each, and what is answered."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import requests

from bench.proc import peak_memory, resident_memory
from bench.robustness.subject import OURS, STOCK, Subject, short, told, watched

Probe = Callable[[Subject], str]
CASE, BIG = "phantom_000", "big"
ELSEWHERE = (7, 6, 5)
JSON = {"content-type": "application/json"}
GARBAGE = bytes(range(256)) * 40
USERS = 8


def _truth(subject: Subject) -> bytes:
    return (subject.studies / "truth" / f"{CASE}.nii.gz").read_bytes()


def crowd(image: str) -> Probe:
    """Users who ask for the same inference at once, and what `GET /info/` waits meanwhile."""

    def run(subject: Subject) -> str:
        i, j, k = (n // 2 for n in _loaded(subject, image).shape)

        def ask(user: int) -> requests.Response:
            click = [i + user, j, k - USERS // 2 + user]
            return subject.infer(f"image={image}&output=image", {**subject.prompt, "foreground": [click]})

        ask(USERS)  # the first of all loads libraries
        start = time.perf_counter()
        with watched(subject) as waits, ThreadPoolExecutor(USERS) as users:
            replies = list(users.map(ask, range(USERS)))
            seconds = time.perf_counter() - start
        kinds = sorted({reply.status_code for reply in replies})
        took = f"{seconds:.1f} s until all are answered ({', '.join(map(str, kinds))})"
        return f"{took}; slowest /info/ {max(waits):.2f} s"

    return run


def _request(method: str, path: str, **kwargs: Any) -> Probe:
    return lambda subject: told(subject.send(method, path.replace("TRAINER", subject.trainer), **kwargs))


def _infer(query: str, params: object = None, **files: tuple[str, bytes]) -> Probe:
    return lambda subject: told(subject.infer(query, params, **files))


@contextmanager
def _elsewhere(subject: Subject) -> Iterator[Path]:
    """An image that is none of the store, of a shape that no other has."""
    path = subject.outside / "elsewhere.nii.gz"
    nib.save(nib.Nifti1Image(np.full(ELSEWHERE, 200, np.int16), np.eye(4)), path)
    try:
        yield path
    finally:
        path.unlink()


def _reached(reply: requests.Response) -> str:
    """What is answered, and whether it is about that image."""
    if not reply.ok:
        return told(reply)
    with tempfile.NamedTemporaryFile(suffix=".nii.gz") as file:
        file.write(reply.content)
        file.flush()
        shape = nib.Nifti1Image.from_filename(file.name).shape
    return f"{told(reply)}; " + (
        "**the file was read**" if shape == ELSEWHERE else "the key is not looked at"
    )


def _outside_image(subject: Subject) -> str:
    with _elsewhere(subject) as path:
        params = {**subject.prompt, "foreground": [[3, 3, 2]], "result_extension": ".nii.gz"}
        return _reached(subject.infer(f"image={path}&output=image", params))


def _outside_params(subject: Subject) -> str:
    with _elsewhere(subject) as path:
        params = {**subject.prompt, "image": str(path), "result_extension": ".nii.gz"}
        return _reached(subject.infer(f"image={CASE}&output=image", params))


def _session_outside(subject: Subject) -> str:
    content = (subject.studies / f"{CASE}.nii.gz").read_bytes()
    session = subject.send("PUT", "/session/", files={"files": ("a.nii.gz", content)}).json()
    sessions = Path(session["session_info"]["path"]).parent
    victim = sessions.parent / "victim"
    victim.mkdir(exist_ok=True)
    with _elsewhere(subject) as path:
        (victim / "meta.info").write_text(json.dumps({"name": "v", "path": str(victim), "image": str(path)}))
        params = {**subject.prompt, "foreground": [[3, 3, 2]], "result_extension": ".nii.gz"}
        return _reached(subject.infer("image=&session_id=../victim&output=image", params))


def _tag_outside(subject: Subject) -> str:
    return _wrote(subject, lambda: subject.save(f"image={CASE}&tag=../../pwn", "l.nii.gz", _truth(subject)))


def _id_outside(subject: Subject) -> str:
    content = (subject.studies / f"{CASE}.nii.gz").read_bytes()

    def put() -> Any:
        files = {"file": ("a.nii.gz", content)}
        return subject.send("PUT", "/datastore/image?image=../pwn", files=files)

    return _wrote(subject, put)


def _wrote(subject: Subject, act: Callable[[], Any]) -> str:
    reply, files = subject.appeared(act)
    return f"{told(reply)}; **wrote outside the store**: {', '.join(files)}" if files else told(reply)


def _label(name: str, content: Callable[[Subject], bytes]) -> Probe:
    def run(subject: Subject) -> str:
        reply = subject.save(f"image={CASE}&tag=probe", name, content(subject))
        stored = subject.send("GET", f"/datastore/label?label={CASE}&tag=probe").ok
        subject.send("DELETE", f"/datastore/label?id={CASE}&tag=probe")
        return f"{told(reply)}; stored as it is" if stored else told(reply)

    return run


def _filled(shape: tuple[int, ...], affine: np.ndarray, value: int) -> bytes:
    return nib.Nifti1Image(np.full(shape, value, np.uint8), affine).to_bytes()


def _accept(subject: Subject, count: int) -> None:
    for n in range(count):
        path = subject.studies / "truth" / f"phantom_{n:03d}.nii.gz"
        subject.save(f"image=phantom_{n:03d}", path.name, path.read_bytes()).raise_for_status()


def _train_empty(subject: Subject) -> str:
    reply = subject.send("POST", f"/train/{subject.trainer}", json={})
    return f"{told(reply)}{_later(subject)}" if reply.ok else told(reply)


def _train_unknown(subject: Subject) -> str:
    reply = subject.send("POST", "/train/nothing", json={})
    return f"{told(reply)}{_later(subject)}" if reply.ok else told(reply)


def _later(subject: Subject) -> str:
    """What becomes of the training that was taken on."""
    start = time.perf_counter()
    while (task := subject.send("GET", "/train/").json())["status"] in ("SUBMITTED", "RUNNING"):
        time.sleep(0.5)
    return f" SUBMITTED; {time.perf_counter() - start:.0f} s later {task['status']}, why is in the log"


def _trainings(subject: Subject) -> str:
    _accept(subject, 6)
    body = {"seconds": 600} if subject.name == STOCK else {"iterations": 100_000}
    first = subject.send("POST", f"/train/{subject.trainer}", json=body)
    second = subject.send("POST", f"/train/{subject.trainer}", json=body)
    while not subject.send("GET", "/train/?check_if_running=true").ok:
        time.sleep(0.1)
    start = time.perf_counter()
    stopped = subject.send("DELETE", "/train/")
    seconds = time.perf_counter() - start
    again = subject.send("DELETE", "/train/")
    return (
        f"first {told(first)}; second {told(second)}; stop {told(stopped)} {stopped.json()['status']} in "
        f"{seconds:.2f} s; stop with none running {told(again)} {short(again.text)}"
    )


def _emptied(subject: Subject) -> str:
    index = subject.studies / "datastore_v2.json"
    index.write_bytes(b"")
    listed = subject.send("GET", "/datastore/?output=all")
    saved = subject.save(f"image={CASE}", "l.nii.gz", _truth(subject))
    until = time.monotonic() + 30
    while len(index.read_bytes()) < 100 and time.monotonic() < until:
        time.sleep(0.1)
    state = "written anew" if len(index.read_bytes()) > 100 else "left empty"
    known = subject.send("GET", "/info/").json()["datastore"]
    counts = f"{known['total']} cases, {known['completed']} accepted"
    return f"list {told(listed)}; save {told(saved)}; {counts}; index {state}"


def _memory(subject: Subject) -> str:
    gigabytes = (resident_memory(subject.pid) / 1e9, peak_memory(subject.pid) / 1e9)
    return f"{gigabytes[0]:.2f} GB, {gigabytes[1]:.2f} GB at most so far"


def _batch(subject: Subject) -> str:
    model = "unet" if subject.name == OURS else subject.model
    reply = subject.send("POST", f"/batch/infer/{model}?images=all", json={"multi_gpu": True})
    if not reply.ok:
        return told(reply)
    while subject.send("GET", "/batch/infer?check_if_running=true").ok:
        time.sleep(0.5)
    task = subject.send("GET", "/batch/infer").json()
    reason = next((line for line in reversed(task["details"]) if "Error" in line), "")
    return f"{told(reply)}, then {task['status']} {short(reason)}".strip()


#: Everything that is asked of a server over a folder, in this order.
PROBES: dict[str, Probe] = {
    f"{USERS} inferences at once, small CT": crowd(CASE),
    f"{USERS} inferences at once, large CT": crowd(BIG),
    "infer: unknown image": _infer("image=nothing"),
    "infer: no image, file or session": _infer(""),
    "infer: cut-off NIfTI uploaded": lambda s: told(
        s.infer("", file=("a.nii.gz", (s.studies / f"{CASE}.nii.gz").read_bytes()[:3000]))
    ),
    "infer: garbage uploaded": _infer("", file=("a.nii.gz", GARBAGE)),
    "infer: params are no JSON": _infer(f"image={CASE}", "{foreground"),
    "infer: a parameter of a wrong type": _infer(
        f"image={CASE}", {"foreground": "x", "result_extension": 7, "device": [1]}
    ),
    "infer: unknown model": _request("POST", f"/infer/nothing?image={CASE}", data={"params": "{}"}),
    "next case: unknown strategy": _request("POST", "/activelearning/nothing", json={}),
    "infer: a click outside the volume": _infer(f"image={CASE}", {"foreground": [[9999, 0, 0]]}),
    "infer: no click": _infer(f"image={CASE}", {"foreground": []}),
    "infer: image=/path/of/a/file": _outside_image,
    'infer: params {"image": "/path/of/a/file"}': _outside_params,
    "infer: session_id=../victim": _session_outside,
    "save: tag=../../pwn": _tag_outside,
    "upload: image=../pwn": _id_outside,
    "download: image=../../etc/passwd": _request("GET", "/datastore/image?image=../../etc/passwd"),
    "save: garbage": _label("l.nii.gz", lambda _: GARBAGE),
    "save: a label of another shape": _label("l.nii", lambda _: _filled((5, 4, 3), np.eye(4), 1)),
    "save: a value that is no label": _label(
        "l.nii", lambda s: _filled(_loaded(s, CASE).shape, _loaded(s, CASE).affine, 99)
    ),
    "save: x.sh": _label("x.sh", lambda _: b"#!/bin/sh\n"),
    "delete: unknown image": _request("DELETE", "/datastore/image?id=nothing"),
    "delete: unknown label": _request("DELETE", "/datastore/label?id=nothing&tag=final"),
    "scoring: unknown method": _request("POST", "/scoring/nothing", json={}),
    "train: unknown trainer": _train_unknown,
    "train: body is no JSON": _request("POST", "/train/TRAINER", data="{", headers=JSON),
    "train: no label yet": _train_empty,
    "train: twice, stop, stop again": _trainings,
    "batch on a machine without a GPU": _batch,
    "index emptied while running, then a save": _emptied,
    "memory after all this": _memory,
}


def _loaded(subject: Subject, name: str) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_filename(subject.studies / f"{name}.nii.gz")
