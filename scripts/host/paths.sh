# shellcheck shell=bash
# Make the settings that name files absolute, and find existing logins. Runs: host, sourced (with read_env.sh).
#   source scripts/host/paths.sh; resolve_paths
# Paths are meant from where the user is, and are the same inside and outside a container.

# shellcheck source=scripts/host/read_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/read_env.sh"

# HOME is not set in some job systems; ~ is then what the system says of the user.
home=${HOME:-~}

absolute() { realpath -ms -- "${1/#\~\//$home/}"; }

# As in scripts/bridge/settings.py: a folder is written with /, ./, ../ or ~, all else is a name on the hub.
is_local() { [[ $1 == [/~]* || $1 == ./* || $1 == ../* ]]; }

resolve_paths() {
    local login above name
    WORK_DIR=$(absolute "${WORK_DIR:-work}")
    above=${WORK_DIR%/*}/
    [[ -d $above ]] || fail "WORK_DIR=$WORK_DIR: there is no folder $above. Make it, or correct WORK_DIR."
    [[ -d $WORK_DIR || ! -e $WORK_DIR ]] || fail "WORK_DIR=$WORK_DIR is not a folder."
    [[ -e $WORK_DIR || ! -L $WORK_DIR ]] || fail "WORK_DIR=$WORK_DIR is a symbolic link to what is not there. Mend it."
    export WORK_DIR
    for name in CKPT SSL_CERT_FILE REQUESTS_CA_BUNDLE; do
        [[ -z ${!name:-} ]] || printf -v "$name" %s "$(absolute "${!name}")"
    done
    ! is_local "${MODEL:-}" || MODEL=$(absolute "$MODEL")
    [[ -z ${REWARD:-} ]] || REWARD=$(absolute "$REWARD")
    [[ ${DATA_SOURCE:-} == @(|hub|builtin) || ! -e $DATA_SOURCE ]] || DATA_SOURCE=$(absolute "$DATA_SOURCE")
    # An existing login is as good as HF_TOKEN and WANDB_API_KEY.
    login=${HF_TOKEN_PATH:-${HF_HOME:-${XDG_CACHE_HOME:-$home/.cache}/huggingface}/token}
    [[ ! -f $login ]] || export HF_TOKEN_PATH=$login
    [[ ! -f ${NETRC:=$home/.netrc} ]] || export NETRC
}
