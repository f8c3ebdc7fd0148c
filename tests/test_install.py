"""`install.sh` with a Python that cannot put pip into an environment, as Debian's without python3.11-venv."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "install.sh"
#: `-m venv` leaves half an environment and fails; `-m pip` is there where HAS_PIP is set.
PYTHON = f"""#!/bin/sh
case "$*" in
"-m venv --without-pip "*) ;;
"-m venv "*) {sys.executable} -m venv --without-pip "$3"; exit 1 ;;
"-m pip "*) [ -n "$HAS_PIP" ] || exit 1 ;;
esac
exec {sys.executable} "$@"
"""


@pytest.fixture
def install(tmp_path):
    """A function that installs a wheel of one module, offline; gives the finished process and the folder."""
    python = tmp_path / "python3.11"
    python.write_text(PYTHON)
    python.chmod(0o755)
    tools = tmp_path / "bin"  # all that is on PATH: no uv
    tools.mkdir()
    (tools / "rm").symlink_to(shutil.which("rm"))
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny.py", "")
        info = "tiny-1.0.dist-info"
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"tiny.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")

    def run(has_pip):
        env = {
            "PATH": str(tools),
            "HAS_PIP": has_pip,
            "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": "/dev/null",
        }
        argv = ["/bin/sh", str(SCRIPT), str(python), str(tmp_path / "venv"), str(wheel)]
        done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
        return done, tmp_path / "venv"

    return run


def test_without_any_installer_it_says_what_to_install_and_leaves_nothing(install):
    for _ in range(2):
        done, venv = install(has_pip="")
        assert done.returncode == 1 and "apt-get install python3.11-venv" in done.stderr
        assert not venv.exists()


def test_the_pip_of_the_system_serves(install):
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip to play the system's")
    for _ in range(2):
        done, venv = install(has_pip="yes")
        assert done.returncode == 0, done.stderr
        assert not (venv / "bin" / "pip").exists()
        subprocess.run([venv / "bin" / "python", "-c", "import tiny"], check=True)
