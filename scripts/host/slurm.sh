# shellcheck shell=bash disable=SC2034,SC2154 # submit.sh and this one use each other's
# What is asked of Slurm for a stage or a chain, and what cannot be asked. Runs: host, sourced by submit.sh.
#   source scripts/host/slurm.sh; read_chain sft,merge:sft; prepare sft; "${command[@]}"
# Each finding goes to `problems`, so that all are named at once.

problems=()
signal=${SBATCH_SIGNAL:-B:USR1@300}
# Of the stages that train or generate, and of an interactive shell.
gpu_settings=(GPUS GPUS_PER_NODE GPUS_PER_TASK GPUS_PER_SOCKET GRES CPUS_PER_GPU MEM_PER_GPU CPUS_PER_TASK EXCLUSIVE)

uses_gpus() { [[ $1 == @(sft|ppo|eval|eval:*) || ($1 == shell && -n ${GPUS:-}) ]]; }
is_training() { [[ $1 == @(sft|ppo) ]]; }
needs_internet() { [[ $1 == @(data|model|upload|upload:*) ]]; }

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

# Of each node of the partition (Slurm's default where none is set): its cores, and how many GPUs Slurm knows.
nodes_of() { # [PARTITION]
    sinfo -h -N ${1:+-p "$1"} -o '%P %c %G' |
        awk -v named="${1:-}" '{ gsub(/\([^)]*\)/, "", $3); count = split($3, gres, ","); gpus = 0
            for (i = 1; i <= count; i++) if (gres[i] ~ /^gpu:/) { n = split(gres[i], word, ":"); gpus += word[n] }
            if (named != "" || $1 ~ /\*$/) print $2 + 0, gpus }'
}

ask_for() { # STAGE: fills options (of sbatch and srun) and drop (names that the job's call must not have), adds to problems
    local stage=$1 partition=${SBATCH_PARTITION:-} gpus=0 cores most=0 share='' node_cores node_gpus asked name
    options=(--nodes=1 --ntasks-per-node=1) drop=()
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
    while read -r node_cores node_gpus; do
        ((most >= node_gpus)) || most=$node_gpus
        if [[ $gpus == 0 ]]; then cores=$((node_cores < 4 ? node_cores : 4))
        elif ((node_gpus >= gpus)); then cores=$((node_cores * gpus / node_gpus))
        else continue; fi
        [[ -n $share ]] && ((share <= cores)) || share=$cores
    done < <(nodes_of "$partition")
    if [[ $gpus != 0 && -z ${asked:-} && -n $(nodes_of "$partition") && -z $share ]]; then
        problems+=("GPUS=$gpus: a node of ${partition:-the default partition} has $most, says Slurm (sinfo -o '%P %N %G').")
    fi
    if [[ $gpus != 0 && -n ${SBATCH_CPUS_PER_TASK:-} ]]; then
        options+=(--cpus-per-task="$SBATCH_CPUS_PER_TASK")
    elif [[ -n $share && ($gpus == 0 || -z ${SBATCH_CPUS_PER_GPU:-}) ]]; then
        options+=(--cpus-per-task="$share")
    fi
}

read_chain() { # STAGE[,STAGE...]: fills jobs, here (stages for this machine), later (left out), from (what PPO's INIT is)
    local order=' data model sft merge:sft ppo merge:ppo ' stage before last=0 previous='' seen=, unmerged='' names
    jobs=() here=() later='' from=''
    IFS=, read -ra names <<< "$1"
    for stage in "${names[@]}"; do
        if [[ ! $stage =~ ^(data|model|sft|ppo|merge:(sft|ppo)|eval(:(base|sft|ppo))?|upload(:(sft|ppo))?)$ ]]; then
            [[ -z $stage ]] || problems+=("$stage is no stage:${order}eval upload")
            continue
        fi
        [[ $seen != *,$stage,* ]] || problems+=("$stage is twice in the chain.")
        seen+=$stage,
        before=${order%%" $stage "*}
        if [[ $stage == @(eval|upload)* ]]; then
            [[ -z $unmerged ]] || problems+=("$stage takes merged models: put merge:$unmerged before it.")
        elif ((${#before} < last)); then
            problems+=("$stage cannot come after $previous. The order:$order")
        else
            last=${#before} previous=$stage
        fi
        if is_training "$stage"; then unmerged=$stage; elif [[ $stage == "merge:$unmerged" ]]; then unmerged=''; fi
        [[ $stage != ppo || $seen != *,sft,*merge:sft,* ]] || from=${INIT:-sft}
        # Where no node reaches the internet, this machine has to.
        if ! needs_internet "$stage" || [[ -n ${NET_PARTITION:-} ]]; then jobs+=("$stage")
        elif [[ $stage == upload* ]]; then later=${stage/:/ STAGE=}
        else here+=("$stage"); fi
    done
    [[ " ${jobs[*]} " != *\ @(sft|ppo)\ * ]] || check_limit
}

prepare() { # STAGE [OPTION...]: fills command, the whole call of sbatch; give, the job's own settings; job, its stage
    give=() job=("${1%:*}")
    [[ $1 != *:* ]] || give+=("STAGE=${1#*:}")
    [[ $1 != ppo || -z $from${INIT:-} ]] || give+=("INIT=${from:-$INIT}")
    if [[ -z $chain ]] || is_training "$1"; then job+=("${arguments[@]}"); fi
    ask_for "$1"
    ! is_training "$1" || [[ -n ${SBATCH_SIGNAL:-} ]] || options+=(--signal="$signal")
    if [[ ${REQUEUE:-10} == 0 ]]; then options+=(--no-requeue); else options+=(--requeue); fi
    local IFS=,
    command=(env "${drop[@]}" "${give[@]}" sbatch "${options[@]}" --export="${names[*]}${give[*]:+,${give[*]%%=*}}"
        --open-mode=append --output="$WORK_DIR/jobs/%j.log" "${@:2}" "$checkout/scripts/host/job.sh" "$checkout" "${job[@]}")
}
