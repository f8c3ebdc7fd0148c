#!/bin/sh
# Install into a virtual environment: install.sh PYTHON VENV ARGUMENT...
# uv takes about 80 s for what takes pip 350 s; where uv cannot be had, pip does the same.
# Debian's Python lacks what puts pip into an environment unless the package python3.11-venv is there; then the
# pip or the uv of the system installs into the environment from outside.
set -eu
python=$1 venv=$2
shift 2
command -v "$python" >/dev/null || python=python3

say() { echo "install.sh: $*" >&2; }
has_pip() { "$1" -m pip --version >/dev/null 2>&1; }
pip() {
    if has_pip "$venv/bin/python"; then
        "$venv/bin/python" -m pip --disable-pip-version-check "$@"
    else
        "$python" -m pip --disable-pip-version-check --python "$venv/bin/python" "$@"
    fi
}

if [ ! -x "$venv/bin/python" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
        say "$("$python" --version) found, Python 3.11 needed; name it with make PYTHON=/path/to/python3.11"
        exit 1
    }
    echo "Making $venv ..."
    trap 'rm -rf "$venv"' EXIT # never leave half an environment
    trap 'exit 1' INT TERM
    "$python" -m venv "$venv" >/dev/null 2>&1 || {
        rm -rf "$venv"
        has_pip "$python" || command -v uv >/dev/null || {
            say "$python can make no environment; on Debian and Ubuntu: apt-get install python3.11-venv"
            exit 1
        }
        "$python" -m venv --without-pip "$venv"
    }
    trap - EXIT INT TERM
fi
uv=$venv/bin/uv
if [ ! -x "$uv" ]; then
    pip install --quiet uv || say "uv cannot be installed"
    [ -x "$uv" ] || uv=$(command -v uv) || uv=
fi
if [ -n "$uv" ]; then
    "$uv" pip install --python "$venv/bin/python" "$@"
else
    say "pip installs instead of uv (slower)"
    pip install "$@"
fi
