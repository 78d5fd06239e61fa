# shellcheck shell=bash
# Find uv, or fetch it into .uv. Runs: host, sourced.
#   source scripts/host/uv.sh; "$uv" --version

# shellcheck source=scripts/host/read_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/read_env.sh"

# Trust the certificates that the system trusts: sites with a TLS-inspecting proxy have their own. The second is its older name.
export UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1

uv=$(command -v uv) || uv=$checkout/.uv/bin/uv
if [[ ! -x $uv ]]; then
    echo "bridge: no uv on PATH: fetching the one of requirements-uv.lock into .uv" >&2
    python3 -m venv "$checkout/.uv" ||
        fail "python3 -m venv failed. Install Python's venv module (Debian: python3-venv), or put uv on PATH."
    # The hashes decide what is installed; other places to look would only slow pip down.
    env -u PIP_EXTRA_INDEX_URL -u PIP_FIND_LINKS \
        "$checkout/.uv/bin/pip" install --quiet --no-deps --require-hashes -r "$checkout/requirements-uv.lock" ||
        fail "pip could not fetch uv (see above). Put uv on PATH, or call this where a package registry can be reached."
fi
