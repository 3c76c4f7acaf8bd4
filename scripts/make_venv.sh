#!/usr/bin/env bash
# Creates a virtual environment with Python 3.12, wherever one can be found.
# Usage: scripts/make_venv.sh [DIR]
set -euo pipefail

venv=${1:-.venv}

is_312() {
  "$1" -c 'import sys, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' \
    >/dev/null 2>&1
}

if [[ -x $venv/bin/python ]] && is_312 "$venv/bin/python"; then
  exit 0
fi

# In this order: what the user names, what is on PATH, what pyenv keeps, uv.
candidates=("${PYTHON:-}" python3.12 python3 python)
for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
  candidates+=("$path")
done
for python in "${candidates[@]}"; do
  if [[ -n $python ]] && is_312 "$python"; then
    echo "Creating $venv with $("$python" --version)"
    exec "$python" -m venv --clear "$venv"
  fi
done
if command -v uv >/dev/null; then
  echo "Creating $venv with uv"
  exec uv venv --quiet --clear --seed --python 3.12 "$venv"
fi

cat >&2 <<'MESSAGE'
angeljax needs Python 3.12, and none was found. Install one, then run make again:
  uv:      pip install uv            (it fetches Python 3.12 by itself)
  pyenv:   pyenv install 3.12
  Debian:  apt-get install python3.12 python3.12-venv
  or name one: make venv PYTHON=/path/to/python3.12
MESSAGE
exit 1
