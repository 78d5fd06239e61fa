#!/usr/bin/env bash
# Run one bridge command in the image, or in .venv where ENGINE=none. Runs: host.
#   scripts/host/container.sh ppo trainer.total_epochs=1
#   scripts/host/container.sh shell
# Settings come from the environment, then from .env; .env.example explains each.
set -euo pipefail
# shellcheck source=scripts/host/read_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/read_env.sh"

absolute() { realpath -ms -- "${1/#\~\//$HOME/}"; }
is_local() { [[ $1 == [/~]* || $1 == ./* || $1 == ../* ]]; } # as in scripts/bridge/settings.py
has_gpu() { [[ -e /dev/nvidiactl || -d /proc/driver/nvidia ]] || command -v nvidia-smi > /dev/null; }
has_image() {
    case $ENGINE in
    podman | docker) "$ENGINE" image inspect "$IMAGE" > /dev/null 2>&1 ;;
    *) [[ -f $IMAGE || $IMAGE == *://* ]] ;;
    esac
}
# The engines agree on --mount, which is CSV: a path may hold a comma, a colon or a quote.
bind() { # SOURCE DESTINATION [ro]
    command+=(--mount "type=bind,\"source=${1//\"/\"\"}\",\"destination=${2//\"/\"\"}\"${3:+,$3}")
}

read_settings
[[ $# -gt 0 ]] || set -- --help

# Paths are meant from where the user is, and are the same inside and outside.
WORK_DIR=$(absolute "${WORK_DIR:-work}")
[[ -d ${WORK_DIR%/*}/ ]] || fail "WORK_DIR=$WORK_DIR: the folder above it does not exist. Make it, or correct WORK_DIR."
[[ -d $WORK_DIR || ! -e $WORK_DIR ]] || fail "WORK_DIR=$WORK_DIR is not a folder."
[[ -z ${CKPT:-} ]] || CKPT=$(absolute "$CKPT")
! is_local "${MODEL:-}" || MODEL=$(absolute "$MODEL")
! is_local "${DATA_SOURCE:-}" || DATA_SOURCE=$(absolute "$DATA_SOURCE")
# An existing login is as good as HF_TOKEN and WANDB_API_KEY.
login=${HF_TOKEN_PATH:-${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}/token}
[[ ! -f $login ]] || export HF_TOKEN_PATH=$login
[[ ! -f ${NETRC:=$HOME/.netrc} ]] || export NETRC
USER=${USER:-$(id -un 2> /dev/null || id -u)}
BRIDGE_COMMIT=$(git -C "$checkout" describe --always --dirty --abbrev=40 --exclude '*' 2> /dev/null) || BRIDGE_COMMIT=
export WORK_DIR USER BRIDGE_COMMIT

asked=${ENGINE:-}
for ENGINE in ${asked:-apptainer singularity podman docker}; do
    command -v "$ENGINE" > /dev/null && break
done
case $ENGINE in
apptainer | singularity) IMAGE=${IMAGE:-$checkout/bridge.sif} command=("$ENGINE" run --cleanenv) ;;
podman | docker) IMAGE=${IMAGE:-localhost/bridge:latest} command=("$ENGINE" run --rm --network host --ipc host) ;;
none) command=("$checkout/.venv/bin/bridge" "$@") ;;
*) fail "ENGINE=$ENGINE is none of apptainer, singularity, podman, docker, none." ;;
esac
if [[ $ENGINE != none ]] && ! has_image; then
    [[ -z $asked && $1 == rehearse ]] || fail "there is no image $IMAGE for $ENGINE. One of these helps:" \
        "    make image (for podman and docker: make oci); IMAGE=... where it is elsewhere; ENGINE=... for another engine;" \
        "    for what needs no GPU: make venv, then ENGINE=none"
    echo "bridge: no image here: the rehearsal runs in .venv" >&2
    "$checkout/scripts/host/venv.sh"
    ENGINE=none command=("$checkout/.venv/bin/bridge" "$@")
fi

if [[ $ENGINE == none ]]; then
    [[ -x ${command[0]} ]] || fail "ENGINE=none needs .venv, which is not there. make venv makes it."
    [[ $1 != shell ]] || command=(env "PATH=$checkout/.venv/bin:$PATH" bash "${@:2}")
    unset PYTHONPATH PYTHONHOME
    export PYTHONNOUSERSITE=1
else
    [[ -d $WORK_DIR ]] || mkdir -- "$WORK_DIR"
    bind "$WORK_DIR" "$WORK_DIR"
    bind "$checkout/configs" /opt/bridge/configs ro
    [[ ! -d ${TMPDIR:-} ]] || bind "$TMPDIR" "$TMPDIR"
    for name in MODEL DATA_SOURCE CKPT HF_TOKEN_PATH NETRC SSL_CERT_FILE REQUESTS_CA_BUNDLE; do
        path=${!name:-}
        # What is in WORK_DIR is there already, and no mount of its own may stand in the way of a rename.
        [[ $path != /* || ! -e $path || $path == "$WORK_DIR"/* ]] || bind "$path" "$path" ro
    done
    names=()
    for name in $(compgen -e); do
        case $name in SLURM_* | MASTER_* | TERM | USER | TMPDIR | NETRC | BRIDGE_COMMIT) ;; *) is_known "$name" || continue ;; esac
        names+=("$name")
    done
fi

case $ENGINE in
apptainer | singularity)
    ! has_gpu || command+=(--nv)
    for name in "${names[@]}"; do export "${ENGINE^^}ENV_$name=${!name}"; done
    # Values are values, not shell; older versions do not know the option --no-eval.
    export "${ENGINE^^}_NO_EVAL=1"
    [[ $1 != shell ]] || { command[1]=exec && shift && set -- bash "$@"; }
    command+=("$IMAGE" "$@")
    ;;
podman | docker)
    [[ ! -t 0 || ! -t 1 ]] || command+=(--interactive --tty)
    [[ ! -d /dev/infiniband ]] || command+=(--device /dev/infiniband --ulimit memlock=-1)
    if [[ $ENGINE == docker ]]; then
        ! has_gpu || command+=(--gpus all)
    else
        # Without a label SELinux would refuse the folders bound. Root needs no keep-id, and may not have it.
        command+=(--security-opt label=disable)
        ! has_gpu || command+=(--device nvidia.com/gpu=all)
        [[ $EUID == 0 ]] || command+=(--userns keep-id)
    fi
    command+=(--user "$(id -u):$(id -g)" --workdir "$WORK_DIR" --env "HOME=$WORK_DIR/cache/home")
    # By name: the values, secrets among them, are not in the process list.
    for name in "${names[@]}"; do command+=(--env "$name"); done
    [[ $1 != shell ]] || { command+=(--entrypoint bash) && shift; }
    command+=("$IMAGE" "$@")
    ;;
esac

printf '+' >&2
printf ' %q' "${command[@]}" >&2
printf '\n' >&2
exec "${command[@]}"
