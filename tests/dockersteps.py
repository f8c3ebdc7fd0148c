"""Runs what docker/Dockerfile says without Docker, then what the image would run. Needs root and debootstrap.

    python -m tests.dockersteps --work DIR [--build-arg NAME=VALUE] [--keep]

Each stage gets a root of its own, a copy of a clean Debian of the base image's release, whose python3.11
stands in for the base image's; the steps run in it by chroot, in order, with namespaces of their own. Then
the entry point is started as the image's user, as process 1, on a read-only root, as docker/compose.yaml
has it, and is asked to serve: health, a click on a phantom, an accepted label, SIGTERM, and all of it still
there at the next start.

Not shown by this: the base image itself, Docker's builder and its cache, and its networks.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.dockerfile import Dockerfile, Instruction, Stage, expand, parse

REPOSITORY = Path(__file__).resolve().parents[1]
#: What stands in for `python:3.11-slim-bookworm`: the same release, and what of that image the steps use.
DEBIAN = "bookworm"
PACKAGES = "ca-certificates,python3.11,python3.11-venv,python3-distutils"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Settings of this computer's network, which builders are given too: certificates, proxies, mirrors.
NETWORK = {
    *("SSL_CERT_FILE", "PIP_CERT", "PIP_INDEX_URL", "UV_DEFAULT_INDEX"),
    *(f"{kind}_proxy" for kind in ("http", "https", "no")),
    *(f"{kind}_PROXY" for kind in ("HTTP", "HTTPS", "NO")),
}


@dataclass(kw_only=True)
class Root:
    """The file system of a stage, and what its next step inherits."""

    path: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH, "HOME": "/root"})
    args: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    folder: str = "/"

    def command(
        self,
        argv: Sequence[str],
        *,
        binds: Mapping[Path, str],
        env: Mapping[str, str],
        read_only: bool = False,
    ) -> list[str]:
        """The command that runs ``argv`` inside, as process 1 of its own namespace."""
        root = shlex.quote(str(self.path))
        lines = ["set -e", f"mount --bind {root} {root}", f"cd {root}"]
        for source, target in binds.items():
            place = shlex.quote(f".{target}")
            make = f"mkdir -p {place}" if source.is_dir() else f"mkdir -p $(dirname {place}); touch {place}"
            lines.append(f"[ -e {place} ] || {{ {make}; }}")
        if read_only:
            lines.append("mount -o remount,bind,ro .")
            lines.append("mount -t tmpfs -o mode=1777 tmpfs ./tmp")
        for source, target in binds.items():
            lines.append(f"mount --bind {shlex.quote(str(source))} .{shlex.quote(target)}")
        lines += ["mount -t proc proc ./proc", "mount --rbind /dev ./dev"]
        inside = f"cd {shlex.quote(self.folder)} && exec {shlex.join(argv)}"
        pairs = [f"{key}={value}" for key, value in {**self.env, **env}.items()]
        run = [
            "chroot",
            f"--userspec={self.user}",
            ".",
            "/usr/bin/env",
            "-i",
            *pairs,
            "/bin/sh",
            "-c",
            inside,
        ]
        lines.append(f"exec {shlex.join(run)}")
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
        return [*unshare, "/bin/sh", "-c", "\n".join(lines)]


class Builder:
    """Runs the steps of stages.

    Args:
        work: Where roots are made; gigabytes.
        file: The Dockerfile.
        build_args: As ``docker build --build-arg``.
        cache: What cache mounts share; as Docker keeps one between builds.
    """

    def __init__(self, *, work: Path, file: Dockerfile, build_args: Mapping[str, str], cache: Path) -> None:
        self.work, self.file, self.build_args, self.cache = work, file, build_args, cache
        self.roots: dict[str, Root] = {}
        passed = {name: os.environ[name] for name in sorted(NETWORK) if os.environ.get(name)}
        self.network = passed
        self.binds = {Path(value): value for value in passed.values() if Path(value).is_file()}
        self.binds[Path("/etc/resolv.conf")] = "/etc/resolv.conf"

    def base(self) -> Path:
        path = self.work / "base"
        if not path.is_dir():
            making = self.work / "base.part"
            shutil.rmtree(making, ignore_errors=True)
            with _timed(f"debootstrap {DEBIAN}"):
                command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", DEBIAN, str(making)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            making.rename(path)
        return path

    def build(self, stage: Stage) -> Root:
        if stage.name in self.roots:
            return self.roots[stage.name]
        path = self.work / stage.name
        assert not path.exists(), f"{path} is left from an earlier run"
        parent = self.file.stage(stage.base)
        print(f"FROM {stage.base} AS {stage.name}", flush=True)
        if parent is not None:
            before = self.build(parent)
            root = Root(path=path, env=dict(before.env), user=before.user, folder=before.folder)
            _duplicate(before.path, path, linked=True)
        else:
            root = Root(path=path)
            _duplicate(self.base(), path, linked=False)
        for step in stage.steps:
            getattr(self, f"_{step.name.lower()}")(root, step)
        self.roots[stage.name] = root
        return root

    def _arg(self, root: Root, step: Instruction) -> None:
        key, _, value = step.text.partition("=")
        root.args[key] = self.build_args.get(key, value)

    def _env(self, root: Root, step: Instruction) -> None:
        values = {**root.args, **root.env}
        root.env |= {key: expand(value, values) for key, value in step.pairs.items()}

    def _workdir(self, root: Root, step: Instruction) -> None:
        root.folder = expand(step.text, root.env)
        _inside(root, root.folder).mkdir(parents=True, exist_ok=True)

    def _user(self, root: Root, step: Instruction) -> None:
        root.user = step.text

    def _run(self, root: Root, step: Instruction) -> None:
        binds = dict(self.binds)
        for kind, value in step.flags:
            options = dict(part.split("=", 1) for part in value.split(","))
            assert kind == "mount" and set(options) == {"type", "target"} and options["type"] == "cache"
            binds[self.cache] = options["target"]
            _inside(root, options["target"]).mkdir(parents=True, exist_ok=True)
        command = root.command(["/bin/sh", "-c", step.text], binds=binds, env={**root.args, **self.network})
        with _timed(f"RUN {step.text}"):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{done.stdout}{done.stderr}\nexit status {done.returncode}")
        print("".join(f"    {line}\n" for line in done.stderr.splitlines()[-3:]), end="", flush=True)

    def _copy(self, root: Root, step: Instruction) -> None:
        *sources, target = step.text.split()
        stage = self.file.stage(step.flag("from") or "")
        into = _inside(root, os.path.join(root.folder, target))
        with _timed(f"COPY {' '.join(f'--{k}={v}' for k, v in step.flags)} {step.text}"):
            for source in sources:
                path = _inside(self.build(stage), source) if stage else REPOSITORY / source
                to = into / path.name if target.endswith("/") else into
                to.parent.mkdir(parents=True, exist_ok=True)
                if stage is None and path.is_dir():
                    shutil.copytree(path, to, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
                else:
                    _duplicate(path, to, linked=stage is not None)
                if mode := step.flag("chmod"):
                    to.chmod(int(mode, 8))
        assert not {flag for flag, _ in step.flags} - {"from", "chmod"}, step

    def _volume(self, root: Root, step: Instruction) -> None:
        for folder in step.argv or ():
            assert _inside(root, folder).is_dir(), f"{folder} is not made before it is a volume"

    def _expose(self, root: Root, step: Instruction) -> None:
        pass

    _label = _healthcheck = _entrypoint = _cmd = _expose


class Container:
    """What ``docker run --read-only`` would start.

    Args:
        root: The image.
        stage: Its stage, for the entry point and the health check.
        volumes: Folders and files of this computer -> their place inside.
        env: As ``docker run --env``.
    """

    def __init__(
        self, root: Root, stage: Stage, *, volumes: Mapping[Path, str], env: Mapping[str, str]
    ) -> None:
        entry, health = stage.last("ENTRYPOINT"), stage.last("HEALTHCHECK")
        assert entry is not None and entry.argv and health is not None
        self.root, self.volumes, self.env, self.entry = root, volumes, env, entry.argv
        self.health = Instruction(name="CMD", flags=(), text=health.text.removeprefix("CMD").strip()).argv

    def _command(self, argv: Sequence[str]) -> list[str]:
        return self.root.command(argv, binds=self.volumes, env=self.env, read_only=True)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        command = self._command([*self.entry, *arguments])
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    def healthy(self) -> bool:
        """What HEALTHCHECK says."""
        return (
            subprocess.run(self._command(self.health or []), capture_output=True, check=False).returncode == 0
        )

    @contextmanager
    def serving(self, *arguments: str, log: Path) -> Iterator[subprocess.Popen]:
        with log.open("w") as file:
            command = self._command([*self.entry, *arguments])
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            try:
                while not self.healthy():
                    if process.poll() is not None:
                        sys.exit(f"the entry point ended with {process.returncode}:\n{log.read_text()}")
                    time.sleep(1)
                yield process
            finally:
                process.kill()
                process.wait()

    @staticmethod
    def stop(process: subprocess.Popen, *, seconds: float = 60) -> int:
        """As ``docker stop``: SIGTERM to process 1 of the container; returns its exit status."""
        first = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
        os.kill(int(first), signal.SIGTERM)
        return process.wait(seconds)


def _inside(root: Root, path: str) -> Path:
    return root.path / path.lstrip("/")


def _duplicate(source: Path, target: Path, *, linked: bool) -> None:
    """Copy a file, or what a folder holds; ``linked`` shares the content of files that nobody changes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    kind = ["-a", "--link"] if linked else ["-a"]
    subprocess.run(["cp", *kind, "--no-target-directory", str(source), str(target)], check=True)


@contextmanager
def _timed(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"  {time.monotonic() - start:6.1f} s  {' '.join(what.split())[:110]}", flush=True)


def size(path: Path) -> int:
    """Bytes on disk."""
    told = subprocess.run(
        ["du", "-sx", "--block-size=1", str(path)], capture_output=True, text=True, check=True
    )
    return int(told.stdout.split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.dockersteps", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder with 20 GB to spare")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "uv", help="uv's cache")
    parser.add_argument("--keep", action="store_true", help="leave the roots there")
    args = parser.parse_args()
    for tool in ("debootstrap", "unshare", "chroot"):
        if shutil.which(tool) is None or os.geteuid():
            sys.exit(f"this needs root and {tool}: apt-get install debootstrap util-linux coreutils")
    from tests.dockerproof import prove

    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    file = parse((REPOSITORY / "docker" / "Dockerfile").read_text())
    given = dict(one.split("=", 1) for one in args.build_arg)
    builder = Builder(work=work, file=file, build_args=given, cache=args.cache)
    start = time.monotonic()
    try:
        root = builder.build(file.stages[-1])
        print(f"built in {time.monotonic() - start:.0f} s")
        for name, path in (("libraries", "opt/samloop"), ("samloop", "opt/app"), ("base", "")):
            print(f"  {size((work / 'base') if not path else root.path / path) / 1e9:6.2f} GB  {name}")
        prove(root, file.stages[-1], work)
    finally:
        if not args.keep:
            for name in [*(stage.name for stage in file.stages), "volumes"]:
                shutil.rmtree(work / name, ignore_errors=True)


if __name__ == "__main__":
    main()
