#!/usr/bin/env bash
# Run one bridge command in the image, or in .venv where ENGINE=none. Runs: host.
#   scripts/host/container.sh ppo trainer.total_epochs=1
#   scripts/host/container.sh shell
# Settings come from the environment, then from .env; .env.example explains each.
set -euo pipefail
# shellcheck source=scripts/host/engine.sh
source "$(dirname "${BASH_SOURCE[0]}")/engine.sh"
[[ $# -gt 0 ]] || set -- --help
# The rehearsal and the benchmark are the same for all: of .env they take only what this machine needs.
machine='WORK_DIR|ENGINE|IMAGE|CUDA_VISIBLE_DEVICES|NCCL_.*|.*_(proxy|PROXY)|SSL_CERT_FILE|REQUESTS_CA_BUNDLE'
if [[ $1 == rehearse || $1 == bench ]]; then read_settings "$machine"; else read_settings; fi
resolve_paths
choose_engine "$1"
# shellcheck source=scripts/host/site.sh
[[ $1 != @(check|accept|shell) ]] || source "$checkout/scripts/host/site.sh"
USER=${USER:-$(id -un 2> /dev/null || id -u)}
export USER
# For run.json, which is written where there is no checkout. Without git it says what the image was built from.
! commit=$(git -C "$checkout" describe --always --dirty --abbrev=40 2> /dev/null) || export BRIDGE_COMMIT=$commit

# What goes into the container: files at the same path as outside, and named variables.
# The engines agree on --mount, which is CSV: a path may hold a comma, a colon or a quote.
options=() names=()
field() { if [[ $1 == *[,\"]* ]]; then echo "\"${1//\"/\"\"}\""; else echo "$1"; fi; }
bind() { # PATH DESTINATION [ro]
    local mount
    mount="type=bind,$(field "source=$1"),$(field "destination=$2")${3:+,$3}"
    [[ "${options[*]+${options[*]}} " == *"$mount "* ]] || options+=(--mount "$mount")
}
if [[ $ENGINE != none ]]; then
    if [[ ! -d $WORK_DIR ]]; then
        mkdir -- "$WORK_DIR"
        # A refused command leaves nothing behind: what follows holds this open to its end, then an empty folder goes.
        # shellcheck disable=SC2034 # it only has to be open
        exec {made}> >(trap '' HUP INT TERM; read -r || rmdir -- "$WORK_DIR" 2> /dev/null)
    fi
    bind "$WORK_DIR" "$WORK_DIR"
    bind "$checkout/configs" /opt/bridge/configs ro
    for path in "${TMPDIR:-}" "${RAY_TMPDIR:-}"; do [[ ! -d $path ]] || bind "$path" "$path"; done
    for name in MODEL DATA_SOURCE REWARD CKPT HF_TOKEN_PATH NETRC SSL_CERT_FILE REQUESTS_CA_BUNDLE; do
        path=${!name:-}; [[ $name != REWARD ]] || path=${path%:*}
        # What is in WORK_DIR is there already, and a mount of its own would stand in the way of a rename.
        [[ $path == /* && -e $path && $path != "$WORK_DIR"/* ]] || continue
        bind "$path" "$path" ro
    done
    for name in $(compgen -e); do
        [[ $name =~ ^(SLURM_.*|MASTER_.*|TERM|USER|TMPDIR|NETRC|BRIDGE_.*)$ ]] || is_known "$name" || continue
        names+=("$name")
    done
fi
has_gpu() { [[ -e /dev/nvidiactl || -d /proc/driver/nvidia ]] || command -v nvidia-smi > /dev/null; }

stage=$1
[[ $stage != shell ]] || shift
case $ENGINE in
apptainer | singularity)
    ! has_gpu || options+=(--nv)
    for name in "${names[@]}"; do export "${ENGINE^^}ENV_$name=${!name}"; done
    # Values are values, not shell. Older versions ignore this, but would refuse the option --no-eval.
    export "${ENGINE^^}_NO_EVAL=1"
    command=("$ENGINE" run --cleanenv "${options[@]}" "$IMAGE")
    [[ $stage != shell ]] || command=("$ENGINE" exec --cleanenv "${options[@]}" "$IMAGE" bash)
    ;;
podman | docker)
    options+=(--rm --network host --ipc host --user "$(id -u):$(id -g)" --workdir "$WORK_DIR")
    # A shell reads its commands from a pipe or a file, too, as it does with Apptainer.
    if [[ -t 0 && -t 1 ]]; then options+=(--interactive --tty); elif [[ $stage == shell ]]; then options+=(--interactive); fi
    [[ ! -d /dev/infiniband ]] || options+=(--device /dev/infiniband --ulimit memlock=-1)
    if [[ $ENGINE == docker ]]; then
        ! has_gpu || options+=(--gpus all)
    else
        ! has_gpu || options+=(--device nvidia.com/gpu=all)
        # SELinux would refuse the bound folders. Root needs no keep-id, and may not have it.
        options+=(--security-opt label=disable)
        [[ $EUID == 0 ]] || options+=(--userns keep-id)
    fi
    # By name: values, secrets among them, stay out of the process list.
    for name in "${names[@]}"; do options+=(--env "$name"); done
    [[ $stage != shell ]] || options+=(--entrypoint bash)
    command=("$ENGINE" run "${options[@]}" --env "HOME=$WORK_DIR/cache/home" "$IMAGE")
    ;;
none)
    unset PYTHONPATH PYTHONHOME
    export PYTHONNOUSERSITE=1 PATH="$checkout/.venv/bin:$PATH"
    command=("$checkout/.venv/bin/bridge")
    [[ $stage != shell ]] || command=(bash)
    ;;
esac

{ printf '+' && printf ' %q' "${command[@]}" "$@" && echo; } >&2
exec "${command[@]}" "$@"
