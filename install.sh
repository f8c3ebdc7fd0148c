#!/bin/sh
# Install into a virtual environment: install.sh PYTHON VENV ARGUMENT...
# uv takes about 80 s for what takes pip 350 s; where uv cannot be had, pip does the same.
set -eu
python=$1 venv=$2
shift 2

if [ ! -x "$venv/bin/python" ]; then
    command -v "$python" >/dev/null || python=python3
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
        echo "install.sh: $("$python" --version) found, Python 3.11 needed; name it with make PYTHON=/path/to/python3.11" >&2
        exit 1
    }
    echo "Making $venv ..."
    "$python" -m venv "$venv" || {
        echo "install.sh: no environment could be made; on Debian, install the package python3-venv" >&2
        exit 1
    }
fi
if [ ! -x "$venv/bin/uv" ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv ||
        echo "install.sh: uv cannot be had, pip installs instead (slower)" >&2
fi
if [ -x "$venv/bin/uv" ]; then
    "$venv/bin/uv" pip install --python "$venv/bin/python" "$@"
else
    "$venv/bin/python" -m pip install --disable-pip-version-check "$@"
fi
