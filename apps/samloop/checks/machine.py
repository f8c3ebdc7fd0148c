"""The computer: processors, memory, disks, clock."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from apps.samloop.checks.finding import Finding, Subject, existing, fail, gigabytes, ok, room, warn
from sam_infer.engines.catalog import CATALOG

#: Bytes that a server takes beside its caches; below it none starts.
_SERVER = 2 << 30
#: A moment before which no computer can run this.
_EARLIEST = time.mktime((2026, 1, 1, 0, 0, 0, 0, 0, 0))


def gpu(subject: Subject) -> list[Finding]:
    """CUDA, and what to expect without it."""
    import torch

    driver = _driver()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        text = f"{torch.cuda.get_device_name()}, {gigabytes(free)} of {gigabytes(total)} free, "
        return [ok("gpu", f"{text}CUDA {torch.version.cuda}, driver {driver or 'unknown'}")]
    if driver and torch.version.cuda is None:
        remedy = "install the CUDA builds of torch and torchvision (docs/docker.md: TORCH_INDEX)"
        return [warn("gpu", f"there is an NVIDIA GPU (driver {driver}), but torch is a CPU build", remedy)]
    if driver:
        remedy = f"the driver may be too old for CUDA {torch.version.cuda}, or the GPU is not passed on"
        return [warn("gpu", f"there is an NVIDIA GPU (driver {driver}), which torch cannot use", remedy)]
    return [ok("gpu", f"none; {_expected(subject)}")]


def _expected(subject: Subject) -> str:
    entry = CATALOG[subject.project.engine] if subject.project is not None else None
    if entry is None or entry.packaged:
        return "the packaged engines answer a click in a tenth of a second on two cores"
    amx = "amx_bf16" in _read(Path("/proc/cpuinfo"))
    hint = "; this processor has AMX: --runtime bf16 is several times faster" if amx else ""
    return f"{entry.name} takes seconds for a slice's first click on a CPU (docs/engines.md){hint}"


def _driver() -> str:
    """Version of the NVIDIA driver; "" without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def cores(subject: Subject) -> list[Finding]:
    """Processor cores, as far as this process may use them."""
    usable, allowed = len(os.sched_getaffinity(0)), _quota()
    text = f"{usable} cores"
    if allowed is not None and allowed < usable:
        remedy = f"give the container whole cores (--cpuset-cpus), else {usable} threads wait for each other"
        return [warn("cores", f"{text}, of which the container may use {allowed:g}", remedy)]
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdigit() and int(threads) < usable:
        text += f"; OMP_NUM_THREADS keeps libraries to {threads}"
    workers = subject.project.infer_workers if subject.project is not None else 1
    if workers > usable:
        remedy = f"set limits.infer_workers to {usable} in the project file"
        return [warn("cores", f"{text}, and {workers} inferences at once", remedy)]
    return [ok("cores", text)]


def _quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Cores' worth of time that a container may use; None = all."""
    limit, _, period = _read(path).strip().partition(" ")
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() else None


def memory(subject: Subject) -> list[Finding]:
    """Memory that is to be had, against the project's limits."""
    told = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    free = int(told["MemAvailable"].split()[0]) << 10
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    if limit.isdigit():
        used = _read(Path("/sys/fs/cgroup/memory.current")).strip()
        free = min(free, int(limit) - int(used or 0))
    project = subject.project
    caches = (project.volumes_mb + project.embeddings_mb) << 20 if project is not None else 0
    text = f"{gigabytes(free)} to be had; the server takes {gigabytes(_SERVER)}, its caches up to "
    text += gigabytes(caches)
    if free < _SERVER:
        return [fail("memory", text, "end other programs, or give the container more")]
    if free < _SERVER + caches:
        return [warn("memory", text, "lower limits.volumes_mb and limits.embeddings_mb in the project file")]
    return [ok("memory", text)]


def disks(subject: Subject) -> list[Finding]:
    """Room for what is temporary, and for what is learned."""
    folder = Path(tempfile.gettempdir())
    if not os.access(folder, os.W_OK | os.X_OK):
        found = [fail("temporary files", f"{folder} cannot be written", "name another folder in TMPDIR")]
    else:
        found = [room("temporary files", folder, "uploads and answers")]
    if subject.home is not None:
        found.append(room("models", subject.home, "models and embeddings"))
        place = existing(subject.home)
        if not os.access(place, os.W_OK | os.X_OK):
            remedy = "give this user the right to write there"
            found.append(fail("models", f"{place} cannot be written", remedy))
    return found


def clock(_: Subject) -> list[Finding]:
    """Whether the time can be right: labels are ordered by it."""
    now = time.time()
    text = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now))
    newest = Path(__file__).stat().st_mtime
    if now < max(_EARLIEST, newest - 86400):
        return [fail("clock", f"{text}: samloop's own files are newer", "set this computer's clock")]
    return [ok("clock", text)]


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
