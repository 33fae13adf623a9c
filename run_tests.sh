#!/bin/sh
# Installs what the tests need into .venv and runs linter and tests. Flags are passed to pytest.
set -eu
cd "$(dirname "$0")"
export PYTHONDONTWRITEBYTECODE= # without .pyc files each of the tests' programs would compile torch anew, for 15 s
[ -x .venv/bin/python ] || "$(command -v python3 || command -v python)" -m venv .venv
.venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements-dev.txt
. .venv/bin/activate
ruff check .
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
  -m "not slow and not gpu" "$@"
