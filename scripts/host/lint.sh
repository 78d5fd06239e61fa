#!/usr/bin/env bash
# Run every linter over what git knows, and fail once, at the end. Runs: host, needs .venv.
#   scripts/host/lint.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH=$PWD/.venv/bin:$PATH

mapfile -t shell < <(git ls-files --cached --others --exclude-standard '*.sh' .ci/run)
mapfile -t yaml < <(git ls-files --cached --others --exclude-standard '*.yaml' '*.yml')

failed=()
ruff check scripts tests || failed+=(ruff)
shellcheck --external-sources "${shell[@]}" || failed+=(shellcheck)
yamllint --strict --config-data '{extends: default, rules: {line-length: {max: 120}, document-start: disable}}' \
    "${yaml[@]}" || failed+=(yamllint)
lint-imports --no-cache || failed+=(import-linter)
hadolint Containerfile || failed+=(hadolint)
[[ ${#failed[@]} == 0 ]] || { echo "bridge: failed: ${failed[*]}" >&2 && exit 1; }
