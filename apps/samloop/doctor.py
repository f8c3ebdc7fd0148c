"""`samloop doctor`: looks at this installation and at what it is to serve, and says what to do.

It changes nothing, and does not need the server, which may be running or not. Its exit status is 1 where
something fails, else 0.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apps.samloop.checks.finding import Finding, Subject, fail, ok
from apps.samloop.home import add_data_argument, home_of, use_data
from apps.samloop.project import DEFAULT, Project, add_engine_arguments, load_project, override
from sam_infer.errors import InputError

#: Seconds that all checks have together; they run side by side.
SECONDS = 8.0
Check = Callable[[Subject], list[Finding]]


def add_parser(commands: Any) -> None:
    """Add ``doctor`` to the command line."""
    parser = commands.add_parser(
        "doctor", help="look for what is wrong, and say what to do about it", description=__doc__
    )
    add = parser.add_argument
    add(
        "--studies",
        default=os.environ.get("SAMLOOP_STUDIES"),
        metavar="DIR|URL",
        help="as for `samloop serve` (default: SAMLOOP_STUDIES, or nothing is said of studies)",
    )
    add("--project", type=Path, help="project file (default: the one of this package)")
    add_engine_arguments(parser)
    add_data_argument(parser)
    add("--token-file", type=Path, help="as for `samloop serve`")
    port = os.environ.get("SAMLOOP_PORT", "")
    add("--port", type=int, default=int(port) if port.isdigit() else 8000, help="as for `samloop serve`")
    add("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Look, print, and return the exit status."""
    from apps.samloop.checks import machine, network, software, store, weights

    # What checks say, they say in their lines.
    logging.disable(logging.CRITICAL)
    try:
        project, first = _project(args)
        use_data(args.data)
        home = home_of(args.studies) if args.studies is not None else None
        subject = Subject(
            project=project, studies=args.studies, home=home, token_file=args.token_file, port=args.port
        )
        checks: list[Check] = [
            *(software.versions, software.viewer, weights.packaged, weights.engine, weights.caches),
            *(store.store, network.pacs, network.outbox, network.token, network.port),
            *(machine.gpu, machine.cores, machine.memory, machine.disks, machine.clock),
        ]
        findings = [first, *examine(checks, subject)]
    finally:
        logging.disable(logging.NOTSET)
    failed = any(finding.status == "fail" for finding in findings)
    if args.json:
        told = {"ok": not failed, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(told, indent=1, ensure_ascii=False))
    else:
        for finding in findings:
            print(f"{finding.status:5} {finding.check}: {finding.text}")
            if finding.remedy:
                print(f"{'':5} -> {finding.remedy}")
    return 1 if failed else 0


def examine(checks: Sequence[Check], subject: Subject, *, seconds: float = SECONDS) -> list[Finding]:
    """Run checks side by side, each on its own: one that breaks or hangs is a finding like any other.

    Args:
        checks: What to look at; findings come in this order.
        subject: What is looked at.
        seconds: After which those that still run are given up.
    """
    findings: list[list[Finding] | None] = [None] * len(checks)

    def look(place: int, check: Check) -> None:
        try:
            findings[place] = check(subject)
        except Exception as error:
            text = f"the check itself broke: {type(error).__name__}: {error}"
            findings[place] = [fail(check.__name__, text, "report this, with the line above")]

    threads = [
        threading.Thread(target=look, args=(place, check), daemon=True) for place, check in enumerate(checks)
    ]
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    told: list[Finding] = []
    for check, found in zip(checks, findings, strict=True):
        late = fail(check.__name__, f"no result within {seconds:g} s", "is a disk or a server slow or gone?")
        told += [late] if found is None else found
    return told


def _project(args: argparse.Namespace) -> tuple[Project | None, Finding]:
    try:
        project = override(
            load_project(args.project), engine=args.engine, weights=args.weights, runtime=args.runtime
        )
    except (InputError, OSError, TypeError, ValueError, KeyError) as error:
        return None, fail("project", str(error), "mend the project file, or serve without --project")
    text = f"{args.project or DEFAULT}: {len(project.labels)} labels, engine {project.engine}"
    return project, ok("project", f"{text} on {project.device}")
