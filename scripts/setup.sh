#!/usr/bin/env bash
# Makes .venv with Python 3.12 and the project in it, at the versions of constraints.txt. Quick when nothing changed.
# Needs git, make and some Python with pip.
# PYTHON=/path/to/python3.12 picks the interpreter; EXTRAS=dev,docs,hf,te picks the extras.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

WANTED=3.12
EXTRAS=${EXTRAS:-dev,docs,hf}
NEEDED_GIB=8
STAMP=.venv/.setup-stamp
# CUDA wheels have hundreds of MB: uv's limit of 30 s without data is too short for a slow connection.
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300}

say() { printf 'setup: %s\n' "$*"; }
fail() {
  printf 'setup: FAILED: %s\n' "$1" >&2
  shift
  for line in "$@"; do printf '       %s\n' "$line" >&2; done
  exit 1
}

# Prints the real interpreter of $1 if it runs and has the wanted version.
# A pyenv shim of a version that is not selected does not run.
real_python() {
  "$1" -c "import sys; '%d.%d' % sys.version_info[:2] == '$WANTED' or sys.exit(1); print(sys.executable)" 2>/dev/null
}

candidates() {
  local root
  command -v "python$WANTED" python3 python || true
  for root in "${PYENV_ROOT:-$HOME/.pyenv}" "$HOME/.pyenv" "$(pyenv root 2>/dev/null || true)"; do
    [ -d "$root/versions" ] && find "$root/versions" -maxdepth 3 -path "*/versions/$WANTED*/bin/python3" | sort -rV
  done
  return 0
}

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    real_python "$PYTHON"
    return
  fi
  while read -r candidate; do
    real_python "$candidate" && return 0
  done < <(candidates)
  return 1
}

# Any Python can install uv; the wanted one is tried first.
find_bootstrap_python() {
  local candidate
  for candidate in "$@" python3 python /usr/bin/python3 /usr/local/bin/python3 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python3; do
    [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null &&
      echo "$candidate" && return 0
  done
  return 1
}

find_uv() {
  local candidate
  for candidate in uv "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv" .uv/bin/uv; do
    "$candidate" --version >/dev/null 2>&1 && command -v "$candidate" && return 0
  done
  return 1
}

# Into .uv: a private venv, or a plain folder where the venv module is missing (Debian without python3-venv).
install_uv() {
  local python
  python=$(find_bootstrap_python "${1:-}") || fail "there is no Python to install uv with." \
    "Install Python (Debian, Ubuntu: apt install python3-pip python3-venv), or install uv yourself." \
    "Then run make setup again."
  rm -rf .uv
  if "$python" -m venv .uv >/dev/null 2>&1 &&
    .uv/bin/python -m pip install --quiet --disable-pip-version-check uv >&2; then
    return 0
  fi
  rm -rf .uv
  "$python" -m pip install --quiet --disable-pip-version-check --target .uv uv >&2 ||
    fail "uv could not be installed with $python." \
      "pip's message is above. Without pip: apt install python3-pip python3-venv." \
      "Without a network: put a uv binary on PATH."
}

fingerprint() { { cat pyproject.toml constraints.txt scripts/setup.sh; echo "$EXTRAS" "${PYTHON:-}" "$PWD"; } | cksum; }

check_disk() {
  local free_gib
  free_gib=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1024 / 1024))
  [ "$free_gib" -ge "$NEEDED_GIB" ] ||
    fail "the disk of $PWD has $free_gib GiB free; torch with its CUDA libraries needs about $NEEDED_GIB." \
      "Free some space, or clone the project to a larger disk."
}

is_up_to_date() { [ "$(cat "$STAMP" 2>/dev/null)" = "$(fingerprint)" ] && .venv/bin/python -c '' 2>/dev/null; }

if is_up_to_date; then
  say ".venv is up to date"
  exit 0
fi

command -v git >/dev/null || fail "git is missing." "Install it (Debian, Ubuntu: apt install git)."
[ -d .venv ] || check_disk

python=$(find_python) || python=
[ -n "$python" ] || [ -z "${PYTHON:-}" ] ||
  fail "PYTHON=$PYTHON is not a working Python $WANTED." "Name another one, or omit PYTHON and let setup look for it."
uv=$(find_uv) || { say "installing uv into .uv" && install_uv "$python" && uv=$(find_uv); } ||
  fail "uv was installed but does not run."

if [ -z "$python" ]; then
  say "no Python $WANTED on PATH or in pyenv; asking uv"
  python=$("$uv" python find --system --no-python-downloads "$WANTED" 2>/dev/null) ||
    { "$uv" python install "$WANTED" && python=$("$uv" python find --system --no-python-downloads "$WANTED"); } ||
    fail "Python $WANTED is missing, and uv could not download it." \
      "Install it in one of these ways, then run make setup again:" \
      "  pyenv install $WANTED" \
      "  uv python install $WANTED" \
      "  the system's package manager (for example apt install python$WANTED python$WANTED-venv)" \
      "or name one: make setup PYTHON=/path/to/python$WANTED"
fi

say "Python: $python"
say "uv:     $uv"
# An environment of another Python, or a half-made one, is replaced.
real_python .venv/bin/python >/dev/null || { rm -rf .venv && "$uv" venv --quiet --python "$python" .venv; } ||
  fail "the environment .venv could not be made with $python." "uv's message is above."

say "installing the project with [$EXTRAS] (the first time downloads about 3 GB)"
rm -f "$STAMP"
"$uv" pip install --python .venv/bin/python -c constraints.txt -b constraints.txt --editable ".[$EXTRAS]" ||
  fail "the packages could not be installed." "uv's message is above." \
    "After a network failure, run make setup again; downloads are kept."

say "trying the imports, and keeping their bytecode: the first time takes a while"
TRY='from megatron_mtp.observe.logs import silence_noise; silence_noise(); import torch, megatron.core'
PYTHONDONTWRITEBYTECODE= .venv/bin/python -c "$TRY" ||
  fail "the packages are installed, but torch, Megatron-Core or the project does not import." "The traceback is above."
fingerprint >"$STAMP"
say "done. Try: make demo, or .venv/bin/megatron-mtp --help"
