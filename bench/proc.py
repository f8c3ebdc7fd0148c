"""What /proc tells of processes and the machine (Linux)."""

from __future__ import annotations

from pathlib import Path


def peak_memory(pid: int | str = "self") -> int:
    """Greatest resident memory that a process has had, in bytes."""
    return _status(pid, "VmHWM")


def resident_memory(pid: int | str = "self") -> int:
    """Resident memory of a process now, in bytes."""
    return _status(pid, "VmRSS")


def cpu_name() -> str:
    """The processor's name, with what it has for bfloat16."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in info.split("\n\n", 1)[0].splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [
        flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in named.get("flags", "").split()
    ]
    return f"{named.get('model name', 'unknown processor')} ({', '.join(flags) or 'no avx512'})"


def _status(pid: int | str, key: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/{pid}/status holds no {key}")
