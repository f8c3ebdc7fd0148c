"""`samloop serve`: the server in the foreground."""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from apps.samloop import access
from apps.samloop.home import add_data_argument, is_remote, use_data
from apps.samloop.pacs.address import address_of
from apps.samloop.project import add_engine_arguments
from sam_infer.errors import InputError
from sam_infer.volumes import extension

SAMPLES = 12
#: Parameters of glibc's mallopt: 2 arenas (M_ARENA_MAX, -8); what is larger than 32 MB in pages of its own
#: (M_MMAP_THRESHOLD, -3); 64 MB freed at an arena's end are returned (M_TRIM_THRESHOLD, -1).
MALLOPT = {-8: 2, -3: 32 << 20, -1: 64 << 20}


def add_parser(commands: Any) -> None:
    """Add ``serve`` to the command line."""
    parser = commands.add_parser("serve", help="start the server", description=__doc__)
    parser.add_argument("--studies", required=True, help="folder of images, or the URL of a DICOMweb server")
    parser.add_argument("--project", type=Path, help="project file (default: the one of this package)")
    parser.add_argument("--labels", help="names in the order of their indices from 1, as in liver,kidney")
    add_engine_arguments(parser)
    add_data_argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000)")
    parser.add_argument(
        "--samples",
        action="store_true",
        help="write CT phantoms with their ground truth into --studies if it holds no image",
    )
    parser.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="of the log, on standard error"
    )
    access.add_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Start the server; returns when it has ended."""
    give_back_memory()
    remote = is_remote(args.studies)
    studies = args.studies if remote else str(Path(args.studies).expanduser().resolve())
    if not remote:
        _prepare(Path(studies), samples=args.samples)
    check_address(args.host, args.port)
    conf = {
        key: str(value)
        for key, value in {
            "project": args.project.expanduser().resolve() if args.project else None,
            "labels": args.labels,
            "engine": args.engine,
            "weights": args.weights,
            "runtime": args.runtime,
        }.items()
        if value
    }
    use_data(args.data)
    os.environ.update(settings_of(studies=studies, conf=conf, port=args.port))
    prepend("PYTHONPATH", Path(__file__).resolve().parents[2])

    import uvicorn
    from monailabel.config import settings

    from apps.samloop import lifecycle, observe
    from apps.samloop.scratch import scratch
    from apps.samloop.server import create_app

    allowed = access.access_of(args, os.environ, openid=settings.MONAI_LABEL_AUTH_ENABLE)
    observe.configure(args.log_format)
    # The stock session cleaner tells its life to the console; a filter outlives the stock logging set-up.
    logging.getLogger("timeloop").addFilter(lambda record: record.levelno >= logging.WARNING)
    with scratch():
        app = create_app(allowed)
        config = uvicorn.Config(
            app,
            host=args.host,
            port=args.port,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=lifecycle.GRACE,
            ssl_certfile=args.certfile,
            ssl_keyfile=args.keyfile,
        )
        _greet(args.host, args.port, studies, scheme="https" if args.certfile else "http")
        server = lifecycle.GracefulServer(config, lifecycle=app.state.lifecycle)
        server.run()
        lifecycle.kill(os.getpid(), itself=False)
    if app.state.lifecycle.failure is not None and server.told is None:
        raise app.state.lifecycle.failure
    return 130 if server.told == signal.SIGINT else 0


def give_back_memory() -> None:
    """Have glibc return what is freed, instead of keeping it for each thread; without effect elsewhere.

    Its own choice lets a server that has answered large label maps keep hundreds of megabytes. Smaller
    thresholds than these cost an image encoder a quarter of its speed. Call it before threads are started.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in MALLOPT.items():
            mallopt(parameter, value)


def check_address(host: str, port: int) -> None:
    """Refuse an address on which nobody can listen, or somebody does, before anything is loaded.

    Raises:
        InputError: When it is taken, or none of this computer.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        remedy = f"cannot listen there ({error}); choose another --port, or another --host"
        raise InputError("--host, --port", f"{host}:{port}", remedy) from None


def prepend(variable: str, folder: Path) -> None:
    """Put a folder first in a search path of the environment, which child processes inherit."""
    given = os.environ.get(variable)
    os.environ[variable] = f"{folder}{os.pathsep}{given}" if given else str(folder)


def _prepare(studies: Path, *, samples: bool) -> None:
    if not studies.is_dir() and not samples:
        raise InputError("--studies", str(studies), "no such folder; create it and put images into it")
    studies.mkdir(parents=True, exist_ok=True)
    if samples and not any(extension(p) for p in studies.iterdir() if p.is_file()):
        from trainers.phantoms import write_phantoms

        print(
            f"No images in {studies}: writing {SAMPLES} CT phantoms, ground truth in truth/ ...", flush=True
        )
        write_phantoms(studies, count=SAMPLES)


def settings_of(*, studies: str, conf: dict[str, str], port: int) -> dict[str, str]:
    """MONAI Label's settings, as environment variables: it reads them there, as its child processes do."""
    return {
        "MONAI_LABEL_APP_DIR": str(Path(__file__).parent),
        "MONAI_LABEL_STUDIES": studies,
        "MONAI_LABEL_APP_CONF": json.dumps(conf),
        "MONAI_LABEL_SERVER_PORT": str(port),
        "MONAI_LABEL_TRACKING_ENABLED": "false",
        "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
    }


def _greet(host: str, port: int, studies: str, *, scheme: str) -> None:
    from monailabel.interfaces.utils.app import app_instance

    instance = app_instance()
    url = f"{scheme}://{'localhost' if host in ('127.0.0.1', '0.0.0.0', '::') else host}:{port}"
    studies = address_of(studies).url if is_remote(studies) else studies  # without a password
    known = instance.datastore().status()
    count = known["total"]
    labels = ", ".join(f"{index} {name}" for name, index in instance.project.labels.items())
    engine = instance.encoder.engine
    stats = list(instance.info()["train_stats"].values())
    trained = stats[0].get("best_metric") if stats else None
    ohif = f"\n  OHIF       {url}/ohif/" if is_remote(studies) else ""
    data = f"\n  data       {instance.home}" if is_remote(studies) else ""
    down = f"\n  PACS       {known['unavailable']}" if "unavailable" in known else ""
    print(
        f"""samloop serves {count} images from {studies}
  labels     {labels}{data}{down}
  engine     {engine.name} on {instance.project.device}, weights {engine.fingerprint[:12]}
  unet       {f"trained, Dice {trained:.3f} on held-out cases" if trained else "not trained yet"}
  browser    {url}/{ohif}
  3D Slicer  module MONAI Label, server address {url}/
Ctrl-C stops it.""",
        flush=True,
    )
