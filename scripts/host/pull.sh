#!/usr/bin/env bash
# Fetch a prebuilt image, by digest, to where make image or make oci would have put it. Runs: host, with internet.
#   IMAGE=oras://registry.example/team/bridge@sha256:...    scripts/host/pull.sh    a SIF (Apptainer)
#   IMAGE=docker://registry.example/team/bridge@sha256:...  scripts/host/pull.sh    an OCI image (any engine; ENGINE= chooses)
set -euo pipefail
# shellcheck source=scripts/host/read_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/read_env.sh"
read_settings
source=${IMAGE:-}
cure="Give it as IMAGE=oras://HOST/NAME@sha256:... or IMAGE=docker://HOST/NAME@sha256:..."
[[ $source == @(oras|docker)://?* ]] || fail "IMAGE=$source is no image in a registry. $cure"
# A tag may be another image tomorrow, and nothing would tell.
[[ $source =~ @sha256:[0-9a-f]{64}$ ]] ||
    fail "IMAGE=$source names no digest, so what it fetches may change. $cure" \
        "The one who pushed it was told the digest; skopeo inspect, crane digest or the registry's page tell it too."
name=${source#*://}
name=${name%@*}
[[ ${name##*/} != *:* ]] || fail "IMAGE=$source has a tag and a digest: take the :${name##*:} out, the digest says all."

for engine in ${ENGINE:-apptainer singularity podman docker buildah none}; do
    ! command -v "$engine" > /dev/null || break
done
case $engine in
apptainer | singularity)
    image=$checkout/bridge.sif partial=$checkout/bridge.sif.partial
    trap 'rm -f "$partial"' EXIT
    # Under another name until it is whole.
    "$engine" pull --force "$partial" "$source"
    mv -f "$partial" "$image"
    ;;
podman | docker | buildah)
    [[ $source == docker://* ]] || fail "IMAGE=$source is a SIF, which only Apptainer runs. Load its module, or pull docker://..."
    image=localhost/bridge:latest
    "$engine" pull "${source#docker://}"
    "$engine" tag "${source#docker://}" "$image"
    ;;
*) fail "no apptainer, podman or docker on PATH. Load the module of one, or set ENGINE." ;;
esac
echo "bridge: $image is $source"
