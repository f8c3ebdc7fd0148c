"""Runtimes of SAM's image encoder beside segment-anything's own predictor: time, agreement, memory.

python -m bench encoder --engine sam_vit_b --weights sam_vit_b_01ec64.pth --data DATA --out results

Each runtime lives in a process of its own; all encode the same images in turn, so that what else the machine
does falls on all alike. Without --weights the parameters are random, which changes no time; masks are then
cut at the median of the reference's logits instead of at zero, where random ones have no edge.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.int8 import INT8, QuantizedEncoder
from bench.proc import cpu_name, peak_memory
from bench.table import markdown
from sam_infer.engines.framing import SAM
from sam_infer.engines.registry import NAMES, entry_of
from sam_infer.engines.runtime import AUTO, RUNTIMES
from sam_infer.geometry import slice_image, tight_box
from sam_infer.intensity import Window
from sam_infer.prompts.simulated import next_click
from sam_infer.types import FloatArray, Prompts

HEAD = (
    *("runtime", "s p50", "s p95", "times faster", "CPU s", "logits: greatest difference"),
    *("mask Dice mean", "least", "peak memory GB", "ready after s"),
)
#: `SamPredictor.set_image` and nothing of ours.
UPSTREAM = "upstream"
#: Images from which a quantized encoder's ranges are taken.
_CALIBRATION = 12


def add_parser(commands: Any) -> None:
    """Add ``encoder`` to the command line."""
    parser = commands.add_parser("encoder", help="runtimes of SAM's image encoder: time and agreement")
    plain = [name for name in NAMES if (e := entry_of(name)).family == "sam" and e.framing == SAM]
    parser.add_argument("--engine", default="sam_vit_b", choices=plain)
    parser.add_argument("--weights", type=Path, help="checkpoint file; random parameters without it")
    parser.add_argument("--data", type=Path, help="folder of labelled sets; phantoms without it")
    parser.add_argument("--images", type=int, default=8, help="images to encode")
    served = ",".join(r for r in RUNTIMES if r != AUTO)
    parser.add_argument(
        "--runtimes",
        default=served,
        help=f"default: {served}; {INT8} is measured too, where nncf is installed",
    )
    parser.add_argument("--threads", type=int, help="threads of each runtime (default: its own choice)")
    parser.add_argument("--out", type=Path, required=True, help="folder for encoder.json and encoder.md")
    parser.set_defaults(func=run)


@dataclass
class Row:
    """What was measured of one runtime; differences and Dice are to the upstream's of the same image."""

    start: float
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    difference: list[float] = field(default_factory=list)
    dice: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write it."""
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights or _random_weights(args.engine, Path(folder) / "random.pth")
        images = list(_images(args.data, args.images))
        names = [UPSTREAM, *args.runtimes.split(",")]
        rows = measure(names, args.engine, weights, images, args.threads, random=args.weights is None)
    text = table(rows)
    what = "random parameters" if args.weights is None else args.weights.name
    text += f"\n{args.engine}, {what}, {len(images)} images; {cpu_name()}, {_threads(args.threads)} threads\n"
    print(text, end="")
    (args.out / "encoder.md").write_text(text)
    (args.out / "encoder.json").write_text(json.dumps({n: vars(row) for n, row in rows.items()}, indent=1))
    return 0


def table(rows: dict[str, Row]) -> str:
    """The measurements as a markdown table."""
    base = float(np.median(rows[UPSTREAM].seconds))
    return markdown(
        HEAD,
        [
            [
                name,
                f"{np.median(row.seconds):.2f}",
                f"{np.percentile(row.seconds, 95):.2f}",
                f"{base / np.median(row.seconds):.2f}",
                f"{np.median(row.cpu_seconds):.2f}",
                f"{max(row.difference):.1e}",
                f"{np.mean(row.dice):.4f}",
                f"{min(row.dice):.4f}",
                f"{row.peak_bytes / 1e9:.2f}",
                f"{row.start:.0f}",
            ]
            for name, row in rows.items()
        ],
    )


def measure(
    names: list[str],
    engine: str,
    weights: Path,
    images: list[tuple[FloatArray, list[Prompts]]],
    threads: int | None,
    *,
    random: bool,
) -> dict[str, Row]:
    """Encode every image with every runtime in turn, and decode its prompts."""
    context = multiprocessing.get_context("spawn")
    workers: dict[str, Connection] = {}
    rows: dict[str, Row] = {}
    processes = []
    try:
        for name in names:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, name, engine, weights, threads), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            rows[name] = Row(start=_ask(ours, name, images[0]))
            workers[name] = ours
            print(f"{name}: ready after {rows[name].start:.0f} s", flush=True)
        for number, image in enumerate(images):
            reference: NDArray[np.float32] | None = None
            for name, worker in workers.items():
                seconds, cpu, logits, peak = _ask(worker, name, image)
                reference = logits if reference is None else reference
                row = rows[name]
                row.seconds.append(seconds)
                row.cpu_seconds.append(cpu)
                row.difference.append(float(np.abs(logits - reference).max()))
                row.dice += mask_dice(logits, reference, random=random)
                row.peak_bytes = peak
            print(f"image {number + 1} of {len(images)}", flush=True)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return rows


def _ask(worker: Connection, name: str, image: tuple[FloatArray, list[Prompts]]) -> Any:
    worker.send(image)
    try:
        answer = worker.recv()
    except EOFError:
        raise RuntimeError(f"the process of {name} ended") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _work(asked: Connection, name: str, engine: str, weights: Path, threads: int | None) -> None:
    """Encode what is asked; the first answer is the seconds of the first image with all that had to load."""
    import torch

    from sam_infer.engines.base import Embedding
    from sam_infer.engines.registry import create_engine

    if threads:
        torch.set_num_threads(threads)
    start: float | None = time.perf_counter()
    encode: Any = None
    while True:
        image, prompts = asked.recv()
        try:
            if encode is None:
                upstream = name in (UPSTREAM, INT8)
                ours: Any = create_engine(engine, weights=weights, runtime="eager" if upstream else name)
                if name == INT8:
                    unseen = [scan for scan, _ in _phantoms(range(1000, 1000 + _CALIBRATION))]
                    ours.model.image_encoder = QuantizedEncoder(ours.model, unseen)
                encode = _upstream(ours.model) if upstream else ours.encode
            wall, cpu = time.perf_counter(), time.process_time()
            embedding: Embedding = encode(image)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            logits = np.concatenate([found.logits for found in ours.decode(embedding, prompts)])
        except Exception as error:
            asked.send(error)
            return
        if start is None:
            asked.send((wall, cpu, logits, peak_memory()))
        else:
            asked.send(time.perf_counter() - start)
            start = None


def _upstream(sam: Any) -> Any:
    from segment_anything import SamPredictor

    from sam_infer.engines.base import Embedding

    predictor = SamPredictor(sam)

    def encode(image: FloatArray) -> Embedding:
        rgb = np.repeat(np.rint(image * 255).astype(np.uint8)[..., None], 3, axis=-1)
        predictor.set_image(rgb)
        height, width = image.shape
        return Embedding(image_size=(height, width), features={"image": predictor.get_image_embedding()})

    return encode


def mask_dice(logits: FloatArray, reference: FloatArray, *, random: bool) -> list[float]:
    """Dice of each (N, H, W) logits' mask with the reference's; at its median where parameters are random."""
    found = []
    for one, other in zip(logits, reference, strict=True):
        cut = float(np.median(other)) if random else 0.0
        a, b = one > cut, other > cut
        found.append(float(2 * (a & b).sum() / max(1, a.sum() + b.sum())) if a.any() or b.any() else 1.0)
    return found


def _images(data: Path | None, count: int) -> Iterator[tuple[FloatArray, list[Prompts]]]:
    """(H, W) images in 0..1, each with a tight box and a click in the middle of its object."""
    for image, truth in _labelled(data, count):
        box, click = tight_box(truth), next_click(truth, np.zeros_like(truth))
        assert box is not None and click is not None
        point = Prompts(points=np.array([click[:2]], np.float32), point_labels=np.array([1]))
        yield image, [Prompts(box=box), point]


def _labelled(data: Path | None, count: int) -> Iterator[tuple[FloatArray, NDArray[np.bool_]]]:
    if data is not None:
        from trainers.pretrain.cases import benchmark_cases

        cases = list(benchmark_cases(data, 1 + count // 5, 0))
        for number in np.linspace(0, len(cases) - 1, min(count, len(cases))).round().astype(int):
            yield cases[number].image, cases[number].truth
        return
    yield from _phantoms(range(count))


def _phantoms(seeds: Iterable[int]) -> Iterator[tuple[FloatArray, NDArray[np.bool_]]]:
    """CT slices through the liver, each with the liver's mask."""
    from trainers.phantoms import LABELS, make_phantom

    for seed in seeds:
        image, label, _ = make_phantom(seed)
        truth = label == LABELS["liver"]
        k = int(np.argmax(truth.sum(axis=(0, 1))))
        yield Window(level=40, width=400).apply(slice_image(image, k)), slice_image(truth, k)


def _random_weights(engine: str, path: Path) -> Path:
    """A checkpoint of random parameters in which positions matter, as they do in a trained one."""
    import torch

    torch.manual_seed(0)
    architecture = entry_of(engine).architecture
    assert architecture is not None and architecture.build is not None
    state = architecture.build().state_dict()
    for name, value in state.items():
        if "rel_pos" in name or "pos_embed" in name:
            value.normal_(std=0.1)
    torch.save(state, path)
    return path


def _threads(given: int | None) -> int:
    import torch

    return given or torch.get_num_threads()
