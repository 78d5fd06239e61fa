# shellcheck shell=bash
# Choose the container engine and its image. Runs: host, sourced (with paths.sh and read_env.sh).
#   source scripts/host/engine.sh; choose_engine ppo
# Sets ENGINE (not given: the first on PATH) and IMAGE; ends the script with 2 where there is no image. Only the
# rehearsal, which needs no GPU, then makes a .venv by itself and runs there.

# shellcheck source=scripts/host/paths.sh
source "$(dirname "${BASH_SOURCE[0]}")/paths.sh"

image_id() { # what tells this image from another: its size and, in a SIF's header, its UUID
    [[ ! -f ${IMAGE:-} ]] || { stat -Lc %s -- "$IMAGE" && head -c 4096 -- "$IMAGE" | sha256sum; } | tr -dc '0-9a-f'
}

choose_engine() { # STAGE
    local asked=${ENGINE:-} there=1 build cure="For what needs no GPU there is also: make venv, then ENGINE=none."
    for ENGINE in ${asked:-apptainer singularity podman docker none}; do
        ! command -v "$ENGINE" > /dev/null || break
    done
    case $ENGINE in
    apptainer | singularity)
        IMAGE=${IMAGE:-$checkout/bridge.sif} build=image
        [[ -e $IMAGE || $IMAGE == *://* ]] || there=0
        ;;
    podman | docker)
        IMAGE=${IMAGE:-localhost/bridge:latest} build=oci
        # run.json records it; Apptainer tells by itself.
        BRIDGE_IMAGE="$IMAGE $("$ENGINE" image inspect --format '{{.Id}}' "$IMAGE" 2> /dev/null)" || there=0
        export BRIDGE_IMAGE
        ;;
    none) [[ -n $asked ]] || there=0 ;;
    *) fail "ENGINE=$ENGINE is none of apptainer, singularity, podman, docker, none." ;;
    esac
    [[ $ENGINE == none ]] || command -v "$ENGINE" > /dev/null ||
        fail "ENGINE=$ENGINE is not on PATH. Load its module, or choose another engine."
    if [[ $there == 0 && -z $asked && $1 == rehearse ]]; then
        echo "bridge: no image here: the rehearsal runs in .venv" >&2
        "$checkout/scripts/host/venv.sh"
        ENGINE=none
        # A GPU would need flash-attn, which .venv has not.
        export CUDA_VISIBLE_DEVICES=
    elif [[ $there == 0 && $ENGINE == none ]]; then
        fail "no apptainer, singularity, podman or docker on PATH. Load the module of one, or install one. $cure"
    elif [[ $there == 0 && $ENGINE == @(docker|podman) ]] && ! "$ENGINE" info > /dev/null 2>&1; then
        fail "$ENGINE is on PATH but does not answer. On a cluster: module load apptainer. Else start it (see: $ENGINE info). $cure"
    elif [[ $there == 0 ]]; then
        fail "there is no image $IMAGE for $ENGINE. make $build builds it; IMAGE= names another. $cure"
    fi
    [[ $ENGINE != none || -x $checkout/.venv/bin/bridge ]] ||
        fail "ENGINE=none needs .venv, which is not there. make venv makes it."
}
