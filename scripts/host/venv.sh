#!/usr/bin/env bash
# Make .venv: everything of requirements.lock and requirements-dev.lock, and bridge itself, editable. Runs: host.
#   scripts/host/venv.sh
# Does nothing where .venv is up to date. flash-attn is not among it: training on a GPU is the image's work.
set -euo pipefail
checkout=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$checkout"

# Written last: an install that was interrupted is not taken for whole. The path, because scripts of a .venv hold it.
stamp=.venv/installed
wanted=$({ pwd; cat requirements.lock requirements-dev.lock pyproject.toml; } | sha256sum)
if [[ -x .venv/bin/bridge && -f $stamp && $(< "$stamp") == "$wanted" ]]; then
    exit 0
fi
rm -f "$stamp"

# shellcheck source=scripts/host/uv.sh
source scripts/host/uv.sh
if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2> /dev/null ||
    ! grep -qsF "$checkout/.venv" .venv/bin/activate; then
    "$uv" venv --quiet --clear --python 3.11 .venv || fail \
        "no Python 3.11 for .venv. One of these brings it, then call make venv again:" \
        "    $uv python install 3.11          (needs internet; no root)" \
        "    module load python/3.11          (your site's own name for it: module avail python)" \
        "    conda create -n py311 python=3.11 && conda activate py311"
fi

echo "bridge: installing the locks into .venv (8 GB; minutes the first time)" >&2
# One package of the lock is source, in plain Python: what builds it is pinned too.
"$uv" pip install --quiet --python .venv/bin/python --no-deps --require-hashes --build-constraints requirements.lock \
    -r requirements.lock -r requirements-dev.lock
# The locks hold the setuptools that builds it.
"$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
printf '%s\n' "$wanted" > "$stamp"
