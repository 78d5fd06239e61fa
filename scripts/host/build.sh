#!/usr/bin/env bash
# Build the image: bridge.sif with Apptainer, or the same for Podman and Docker. Runs: host.
#   scripts/host/build.sh sif
#   IMAGE=bridge.oci.tar scripts/host/build.sh oci      also as an archive, to be carried elsewhere
# BASE=, BOOTSTRAP= and FLASH_ATTN_WHEEL= are for sites that do not reach the usual places: see .env.example.
set -euo pipefail
# shellcheck source=scripts/host/read_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/read_env.sh"
read_settings
what=${1:-}
name=localhost/bridge:latest
need_space() { # GIB FOLDER CURE
    local free
    free=$(($(df --output=avail -k "$2" | tail -n 1) / 1024 / 1024))
    ((free >= $1)) || fail "$2 has $free GiB free, and the build needs about $1 GiB there. $3"
}
name_and_sum() { # FILE: its name and its content, as the manifest has it
    echo "$(basename -- "$1")@sha256:$(sha256sum < "$1" | cut -d ' ' -f 1)"
}
first_of() { # TOOL...: the first that is on PATH, or nothing
    local tool
    for tool in "$@"; do ! command -v "$tool" > /dev/null || { echo "$tool" && break; }; done
}

# Minutes of all cores and gigabytes of disk.
if [[ -z ${SLURM_JOB_ID:-} ]] && command -v sbatch > /dev/null; then
    echo "bridge: this looks like a login node, where building is often forbidden. Rather in a job: srun --pty make image" >&2
fi

case $what in
sif)
    tool=$(first_of apptainer singularity)
    [[ -n $tool ]] || fail "no apptainer on PATH. Load its module (docs/cluster.md), or install it, or make oci with Podman or Docker."
    image=$(realpath -ms -- "${IMAGE:-$checkout/bridge.sif}")
    need_space 18 "${APPTAINER_TMPDIR:-${TMPDIR:-/tmp}}" "export APPTAINER_TMPDIR= with a folder that has more, on a local disk."
    need_space 5 "$(dirname "$image")" "Make room, or set IMAGE to a file elsewhere."
    ;;
oci)
    tool=$(first_of buildah podman docker)
    [[ -n $tool ]] || fail "no buildah, podman or docker on PATH. Install one, or make image with Apptainer."
    image=${IMAGE:-$name}
    # 21.9 GiB were seen, while it takes the larger layer. Docker's store may be on another machine.
    store=''
    [[ $tool != buildah ]] || store=$(buildah info --format '{{index .store "GraphRoot"}}')
    [[ $tool != podman ]] || store=$(podman info --format '{{.Store.GraphRoot}}')
    [[ ! -d $store ]] || need_space 23 "$store" "Remove what you do not need ($tool images --all), or move the store to a larger disk."
    [[ $image == "$name" || $image == *.tar ]] || fail "IMAGE=$image: the build is called $name; IMAGE=FILE.tar stores it too."
    ;;
*) fail "build.sh takes sif or oci, not '$what'." ;;
esac
# The manifest says what the base was where its name does not: an archive's sum, or the id by which the store knows it.
base=${BASE:-}
if [[ -f $base ]]; then
    BASE=$(realpath -- "$base") base=$(name_and_sum "$base")
    [[ $what == sif ]] || BASE=oci-archive:$BASE
elif [[ $what == oci && -n $base && $base != *@* ]]; then
    id=$("$tool" images --no-trunc --format '{{.ID}}' "$base" 2> /dev/null | head -n 1) || id=''
    base+=${id:+@$id}
fi
wheel=${FLASH_ATTN_WHEEL:-}
[[ ! -d $wheel ]] || wheel=$(find "$wheel" -name 'flash_attn-*.whl' | sort | head -n 1)
[[ -z ${FLASH_ATTN_WHEEL:-} || -f $wheel ]] || fail "FLASH_ATTN_WHEEL=$FLASH_ATTN_WHEEL is no wheel, and no folder with one."
# For the build alone, never in the image: the certificates that this host trusts, and a wheel of flash-attn.
inputs=$checkout/scripts/image/inputs partial='' certificates=''
mkdir "$inputs" 2> /dev/null || fail "$inputs is there: another build is running, or one was killed. Then remove it."
trap 'rm -rf "$inputs" "$partial"' EXIT
for bundle in "${SSL_CERT_FILE:-}" /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/ca-bundle.pem; do
    [[ ! -f $bundle ]] || { certificates=$bundle && break; }
done
[[ -z $wheel ]] || cp -pL "$wheel" "$inputs"
cd "$checkout"
commit=$(git describe --always --dirty --abbrev=40 2> /dev/null) || commit=''
arguments=(--build-arg "COMMIT=$commit")
[[ -z $base ]] || arguments+=(--build-arg "BASE=$BASE" --build-arg "BASE_NAME=$base")
[[ -z $wheel ]] || arguments+=(--build-arg "FLASH_ATTN_WHEEL=$(name_and_sum "$wheel")")
SECONDS=0
if [[ $what == sif ]]; then
    [[ -z ${BOOTSTRAP:-} ]] || arguments+=(--build-arg "BOOTSTRAP=$BOOTSTRAP")
    # Large blocks save more than high levels, and start no slower: docs/image.md. Older versions have no choice.
    [[ $("$tool" build --help) != *--mksquashfs-args* ]] ||
        arguments+=(--mksquashfs-args "-comp zstd -Xcompression-level 6 -b 1M")
    [[ -z $certificates ]] || cp -L "$certificates" "$inputs/certificates.crt"
    # Under another name until it is whole.
    partial=$image.partial
    "$tool" build --force --bind "$checkout/scripts/image:/mnt" "${arguments[@]}" "$partial" apptainer.def
    mv -f "$partial" "$image"
    size=$(du -h --apparent-size "$image" | cut -f 1)
else
    # Not a part of the context: a layer would be made anew for each other bundle. Docker keeps layers anyway.
    [[ -z $certificates ]] || arguments+=(--secret "id=certificates.crt,src=$certificates")
    [[ $tool == docker ]] || arguments+=(--layers)
    "$tool" build --file Containerfile --tag "$name" "${arguments[@]}" .
    size=$("$tool" images --format '{{.Size}}' "$name")
    [[ $image == "$name" ]] || case $tool in
    buildah) buildah push "$name" "oci-archive:$image:bridge" ;;
    podman) podman save --format oci-archive --output "$image" "$name" ;;
    docker) docker save --output "$image" "$name" ;;
    esac
fi
echo "bridge: built $image: $size in $((SECONDS / 60)) min $((SECONDS % 60)) s"
