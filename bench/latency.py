"""Click latency over REST: first click on a slice, repeated click, and /info/ while many click.

python -m bench latency --server http://localhost:8000 --image big_ct
python -m bench big-ct SOURCE.nii.gz studies/big_ct.nii.gz     # 512 x 512 x 200, upsampled
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import requests
from scipy import ndimage

SHAPE = (512, 512, 200)


def add_parsers(commands: Any) -> None:
    """Add ``latency`` and ``big-ct`` to the command line."""
    latency = commands.add_parser("latency", help="click latency of a running server")
    latency.add_argument("--server", default="http://127.0.0.1:8000")
    latency.add_argument("--image", required=True, help="image id of a volume in the server's datastore")
    latency.add_argument("--model", default="sam_click_2d")
    latency.add_argument("--clicks", type=int, default=20)
    latency.add_argument("--clients", type=int, default=8)
    latency.add_argument("--out", type=Path, help="JSON file for the figures")
    latency.set_defaults(func=run)
    big = commands.add_parser("big-ct", help="upsample a CT to 512 x 512 x 200, int16")
    big.add_argument("source", type=Path)
    big.add_argument("target", type=Path)
    big.set_defaults(func=lambda args: big_ct(args.source, args.target))


def big_ct(source: Path, target: Path) -> int:
    """Upsample a volume linearly to `SHAPE` and write it as int16 NIfTI."""
    image = nib.Nifti1Image.from_filename(source)
    array = np.asanyarray(image.dataobj).astype(np.float32)
    factors = [n / o for n, o in zip(SHAPE, array.shape, strict=True)]
    upsampled = ndimage.zoom(array, factors, order=1).astype(np.int16)
    affine = image.affine @ np.diag([*(1 / f for f in factors), 1.0])
    nib.save(nib.Nifti1Image(upsampled, affine), target)
    return 0


class Clicker:
    """Clicks on one image of a server and keeps the seconds of each reply."""

    def __init__(self, server: str, image: str, model: str) -> None:
        self.url = f"{server.rstrip('/')}/infer/{model}"
        self.image = image
        self.http = requests.Session()

    def click(self, point: list[int], *, compress: bool = True) -> tuple[float, dict[str, Any]]:
        """Seconds until the whole reply has arrived, and its JSON's latencies."""
        params = {"foreground": [point], "result_extension": ".nrrd", "result_compress": compress}
        start = time.perf_counter()
        reply = self.http.post(
            self.url, params={"image": self.image}, data={"params": json.dumps(params)}, timeout=120
        )
        seconds = time.perf_counter() - start
        reply.raise_for_status()
        head = reply.content[: reply.content.index(b"\r\n--", 2)]
        return seconds, json.loads(head[head.index(b"{") :])["latencies"]


def run(args: argparse.Namespace) -> int:
    """Measure and print the table."""
    clicker = Clicker(args.server, args.image, args.model)
    rng = np.random.default_rng(0)
    rows: dict[str, list[float]] = {}

    def point(k: int) -> list[int]:
        return [int(rng.integers(180, 330)), int(rng.integers(180, 330)), k]

    opened, _ = clicker.click(point(1))
    slices = rng.permutation(np.arange(10, SHAPE[2] - 10))[: args.clicks].tolist()
    rows["first click on a slice, gzip"] = [clicker.click(point(k))[0] for k in slices]
    rows["repeated click, gzip"] = [clicker.click(point(slices[0]))[0] for _ in range(args.clicks)]
    rows["repeated click, raw"] = [
        clicker.click(point(slices[0]), compress=False)[0] for _ in range(args.clicks)
    ]
    stages = clicker.click(point(slices[0]))[1]
    rows[f"/info/ while {args.clients} clients click"], clicks = _crowd(args, slices)
    rows[f"click of one of {args.clients} clients at once"] = clicks

    print(f"volume opened by the first click of all: {opened:.3f} s")
    print("| what | n | p50 s | p95 s | max s |\n|---|---|---|---|---|")
    for name, seconds in rows.items():
        p50, p95 = np.percentile(seconds, [50, 95])
        print(f"| {name} | {len(seconds)} | {p50:.3f} | {p95:.3f} | {max(seconds):.3f} |")
    print(f"stages of one repeated click on the server: {stages}")
    if args.out:
        args.out.write_text(json.dumps({"opened": opened, "stages": stages, "seconds": rows}, indent=1))
    return 0


def _crowd(args: argparse.Namespace, slices: list[int]) -> tuple[list[float], list[float]]:
    """Seconds of /info/, polled while clients click at once; and seconds of their clicks."""
    clicks: list[float] = []

    def client(number: int) -> None:
        clicker = Clicker(args.server, args.image, args.model)
        for step in range(4):
            k = slices[(number + step) % len(slices)]
            clicks.append(clicker.click([200 + 5 * number, 250, k])[0])

    threads = [threading.Thread(target=client, args=(n,)) for n in range(args.clients)]
    for thread in threads:
        thread.start()
    polls = []
    with requests.Session() as http:
        while any(thread.is_alive() for thread in threads):
            start = time.perf_counter()
            http.get(f"{args.server.rstrip('/')}/info/", timeout=60).raise_for_status()
            polls.append(time.perf_counter() - start)
            time.sleep(0.02)
    return polls, clicks
