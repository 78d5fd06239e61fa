# shellcheck shell=bash disable=SC2034,SC2154 # submit.sh and this one use each other's
# What is asked of Slurm for a stage, and what cannot be asked. Runs: host, sourced by submit.sh.
#   source scripts/host/slurm.sh; prepare sft; "${command[@]}"

problems=()
signal=${SBATCH_SIGNAL:-B:USR1@300}
# Of the stages that train or generate, and of an interactive shell.
gpu_settings=(GPUS GPUS_PER_NODE GPUS_PER_TASK GPUS_PER_SOCKET GRES CPUS_PER_GPU MEM_PER_GPU CPUS_PER_TASK EXCLUSIVE)

uses_gpus() { [[ $1 == @(sft|ppo|accept|bench|eval|eval:*) || ($1 == @(shell|check) && -n ${GPUS:-}) ]]; }

seconds() { # LIMIT: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S, as Slurm writes a time limit; fails where it is none
    [[ $1 =~ ^(([0-9]+)-)?([0-9]+)(:([0-9]+))?(:([0-9]+))?$ ]] || return 1
    local days=${BASH_REMATCH[2]} a=${BASH_REMATCH[3]} b=${BASH_REMATCH[5]} c=${BASH_REMATCH[7]}
    # With days or with two colons the first number is hours, else minutes. 10#: a leading zero is no octal number.
    [[ -n $days$c ]] || { c=$b b=$a a=0; }
    echo $((10#0$days * 86400 + 10#0$a * 3600 + 10#0$b * 60 + 10#0$c))
}

check_limit() { # a training has to start, and to save
    local before limit
    [[ $signal =~ ^(B:|BR:|RB:)(SIG)?USR1@([0-9]+)$ ]] || {
        problems+=("SBATCH_SIGNAL=$signal: the job waits for B:USR1@SECONDS, such as B:USR1@300.") && return
    }
    before=$((10#${BASH_REMATCH[3]}))
    [[ -n ${SBATCH_TIMELIMIT:-} && $SBATCH_TIMELIMIT != @(INFINITE|UNLIMITED|-1) ]] || return 0
    if ! limit=$(seconds "$SBATCH_TIMELIMIT"); then
        problems+=("SBATCH_TIMELIMIT=$SBATCH_TIMELIMIT is no time limit of Slurm's: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.")
    elif ((limit < before + 120)); then
        problems+=("SBATCH_TIMELIMIT=$SBATCH_TIMELIMIT is $limit s: too short for a start (120 s) and for saving $before s before the end." \
            "Give more time, or a smaller N in SBATCH_SIGNAL=B:USR1@N if a save takes less.")
    fi
}

share_of() { # GPUS [PARTITION]: that share of a node's cores (4 for no GPU; the least of all nodes); the most GPUs of a node; nodes; MiB
    sinfo -h -N ${2:+-p "$2"} -o '%P %c %G %m' | awk -v gpus="$1" -v named="${2:-}" 'named != "" || $1 ~ /\*$/ {
        gsub(/\([^)]*\)/, "", $3); has = 0; if (!nodes++ || $4 + 0 < memory) memory = $4 + 0
        for (i = split($3, gres, ","); i; i--) if (gres[i] ~ /^gpu:/) { n = split(gres[i], word, ":"); has += word[n] }
        if (has > most) most = has
        if (has < gpus) next
        cores = gpus ? int($2 * gpus / has) : $2 < 4 ? $2 : 4
        if (!least || cores < least) least = cores
    } END { print least + 0, most + 0, nodes + 0, memory + 0 }'
}

limit_of() { # PARTITIONS: the time limit of a job that asks for none, of each (of the default one)
    sinfo -h ${1:+-p "$1"} -o '%P %L %l' | awk -v named="$1" 'named != "" || $1 ~ /\*$/ {
        printf "%s%s (%s)", between, $2 ~ /^[0-9]|infinite/ ? $2 : $3, $1; between = ", " }'
}

ask_for() { # STAGE: fills options (of sbatch and srun) and drop (names that the job's call must not have), adds to problems
    local stage=$1 partition=${SBATCH_PARTITION:-} gpus=0 asked='' share most nodes memory name count=1
    ! is_training "$stage" && [[ $stage != check ]] || count=${NODES:-1}
    options=(--nodes="$count" --ntasks-per-node=1) drop=()
    [[ -n ${SBATCH_JOB_NAME:-} ]] || options+=(--job-name="bridge-$stage")
    if needs_internet "$stage"; then partition=$NET_PARTITION && options+=(--partition="$partition") && drop+=(-u SBATCH_PARTITION); fi
    # sbatch does not read these two from its environment.
    [[ -z ${SBATCH_NODELIST:-} ]] || needs_internet "$stage" || options+=(--nodelist="$SBATCH_NODELIST")
    if uses_gpus "$stage"; then
        asked=${SBATCH_GPUS_PER_NODE:-${SBATCH_GRES:-}}
        gpus=${GPUS:-${asked##*:}}
        if [[ ! $gpus =~ ^[1-9][0-9]*$ ]]; then
            problems+=("$stage needs GPUs, and GPUS=${GPUS:-} is no number of them: make submit STAGE=$stage GPUS=8")
            return
        fi
        [[ -n $asked ]] || options+=(--gpus-per-node="$gpus")
    else
        for name in "${gpu_settings[@]}"; do [[ ! -v SBATCH_$name ]] || drop+=(-u "SBATCH_$name"); done
    fi
    read -r share most nodes memory < <(share_of "$gpus" "$partition")
    [[ $nodes == 0 || $nodes -ge $count ]] || problems+=("NODES=$count: ${partition:-the default partition} has $nodes (sinfo -o '%P %D').")
    [[ $nodes == 0 || -n $asked || $most -ge $gpus ]] ||
        problems+=("GPUS=$gpus: a node of ${partition:-the default partition} has $most, says Slurm (sinfo -o '%P %N %G').")
    if [[ $gpus != 0 && -n ${SBATCH_CPUS_PER_TASK:-} ]]; then
        options+=(--cpus-per-task="$SBATCH_CPUS_PER_TASK")
    elif [[ $share != 0 && ($gpus == 0 || -z ${SBATCH_CPUS_PER_GPU:-}) ]]; then
        options+=(--cpus-per-task="$share")
    fi
    # Where memory goes by the core, this would be too little: a model of 1 B parameters takes 10 GB.
    [[ $stage != merge:* || -n ${SBATCH_MEM_PER_NODE:-}${SBATCH_MEM_PER_CPU:-} || $memory -lt 16384 ]] || options+=(--mem=16G)
}

prepare() { # STAGE [OPTION...]: fills command, the whole call of sbatch; give, the job's own settings; job, its stage
    give=() job=("${1%:*}")
    [[ $1 != *:* ]] || give+=("STAGE=${1#*:}")
    ! is_training "$1" || [[ -z ${NODES:-} ]] || give+=("NODES=$NODES")
    [[ $1 != ppo || -z $from${INIT:-} ]] || give+=("INIT=${from:-$INIT}")
    if [[ -z $chain ]] || is_training "$1"; then job+=("${arguments[@]}"); fi
    ask_for "$1"
    ! is_training "$1" || [[ -n ${SBATCH_SIGNAL:-} ]] || options+=(--signal="$signal")
    if [[ ${REQUEUE:-10} == 0 ]]; then options+=(--no-requeue); else options+=(--requeue); fi
    local IFS=,
    command=(env "${drop[@]}" "${give[@]}" sbatch "${options[@]}" --export="${names[*]}${give[*]:+,${give[*]%%=*}}"
        --open-mode=append --output="$WORK_DIR/jobs/%j.log" "${@:2}" "$checkout/scripts/host/job.sh" "$checkout" "${job[@]}")
}
