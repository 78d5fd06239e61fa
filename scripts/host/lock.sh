#!/usr/bin/env bash
# Renew the locks from requirements.in and requirements-dev.in, and say what changed. Runs: host, with internet.
#   scripts/host/lock.sh
# requirements.lock is what training runs with: nothing newer than the day on which this set of versions was tried.
# requirements-dev.lock is what tests and linters need beside it; requirements-uv.lock is the installer itself.
set -euo pipefail
# shellcheck source=scripts/host/uv.sh
source "$(dirname "${BASH_SOURCE[0]}")/uv.sh"

# Resolved in a folder of its own: the result depends on the inputs alone, and a failure leaves the locks as they were.
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
cp "$checkout"/requirements*.in "$checkout/requirements.override" "$new"
cd "$new"

compile() { # INPUT LOCK NEWEST_DAY [option...]
    "$uv" pip compile --quiet --no-header --generate-hashes --no-emit-index-url --exclude-newer "$3" \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 "${@:4}" "$1" -o "$2"
}
compile requirements.in requirements.lock 2025-09-15 --override requirements.override
compile requirements-dev.in requirements-dev.lock 2026-11-01
compile - requirements-uv.lock 2026-11-01 <<< uv

versions() { sed -nE 's/^([A-Za-z0-9._-]+==[^ ]+).*/\1/p' "$1" | sort; }
for lock in *.lock; do
    touch "$checkout/$lock"
    echo "$lock: $(versions "$lock" | wc -l) packages; changed against the last lock:"
    # diff ends with 1 where something changed, which is no failure here.
    { diff <(versions "$checkout/$lock") <(versions "$lock") || true; } |
        sed -nE 's/^</-/p; s/^>/+/p' | sort -k 2 | sed 's/^/    /' | grep . || echo "    nothing"
    cat "$lock" > "$checkout/$lock"
done
