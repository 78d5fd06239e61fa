#!/usr/bin/env bash
# Hand stages to Slurm as jobs, or open a shell or check the environment on its nodes. Runs: host (where sbatch and srun are).
#   STAGE=ppo GPUS=8 scripts/host/submit.sh submit [ARGUMENT...]        one job; --dry-run only shows
#   CHAIN=sft,merge:sft,ppo GPUS=8 scripts/host/submit.sh submit       a job a stage, each after the one before
set -euo pipefail
# shellcheck source=scripts/host/engine.sh
source "$(dirname "${BASH_SOURCE[0]}")/engine.sh"

# What a job gets of this shell: what a login has, where Apptainer mounts and caches, and settings. All else it reads from .env.
names=(HOME PATH) secrets=() apptainers=({APPTAINER,SINGULARITY}_{BIND,BINDPATH,MOUNT,CACHEDIR,CONFIGDIR,TMPDIR})
for name in USER LANG TMPDIR MODULEPATH LOADEDMODULES ENV_FILE "${apptainers[@]}"; do [[ ! -v $name ]] || names+=("$name"); done
for name in $(compgen -e); do
    is_known "$name" && [[ $name != @(STAGE|CHAIN|NODES|SLURM|NET_PARTITION|SBATCH_*|CUDA_VISIBLE_DEVICES|INIT) ]] || continue
    if [[ $name =~ TOKEN|KEY|PASSWORD|SECRET && $name != *_PATH || $name =~ _(proxy|PROXY)$ && ${!name} == *@* ]]; then
        grep -Eqs "^[[:space:]]*(export[[:space:]]+)?$name=" "${ENV_FILE:-$checkout/.env}" || secrets+=("$name")
    else
        names+=("$name")
    fi
done
# These two name the stages, whatever .env says of merge's STAGE.
stage=${STAGE:-} chain=${CHAIN:-}
read_settings 'WORK_DIR|GPUS|INIT|NODES|REQUEUE|NET_PARTITION|ENGINE|IMAGE|SBATCH_.*'
unset STAGE CHAIN
resolve_paths
# shellcheck source=scripts/host/chain.sh
source "$checkout/scripts/host/chain.sh"
# shellcheck source=scripts/host/slurm.sh
source "$checkout/scripts/host/slurm.sh"

what=$1 && shift
slurm=$(command -v sbatch srun sinfo) || problems+=("no Slurm here: sbatch is not on PATH. Log in where jobs are submitted.")
# Which names it reads sbatch itself tells, unless it is a site's script around it. slurm.sh reads two more.
[[ -z $slurm ]] || ! grep -qa SBATCH_PARTITION "${slurm%%$'\n'*}" || for name in $(compgen -e SBATCH_); do
    [[ $name == SBATCH_@(CPUS_PER_TASK|NODELIST) ]] || grep -qaP "$name\x00" "${slurm%%$'\n'*}" || problems+=(
        "$name=${!name}: sbatch reads no such name. Its own are in man sbatch: SBATCH_TIMELIMIT=4:00:00, SBATCH_MEM_PER_NODE=100G, ...")
done
[[ ${NODES:-1} =~ ^[1-9][0-9]*$ ]] || problems+=("NODES=$NODES is no number of nodes. Use NODES=1 or more.")
[[ ${REQUEUE:-10} =~ ^[0-9]+$ ]] || problems+=("REQUEUE=$REQUEUE is no number: how often at most a job is put back, 0 for never.")

if [[ $what != submit ]]; then
    [[ -z $slurm ]] || ask_for "$what"
    [[ ${#problems[@]} == 0 ]] || fail "${problems[@]}"
    # The same settings under the names that srun reads.
    for name in $(compgen -e SBATCH_); do [[ " ${drop[*]} " == *" $name "* ]] || export "SLURM_${name#SBATCH_}=${!name}"; done
    unset SLURM_SIGNAL SLURM_REQUEUE
    exec srun "${options[@]}" "$([[ $what == shell ]] && echo --pty || echo --label)" "$checkout/scripts/host/container.sh" "$what" "$@"
fi

dry='' arguments=() ids=()
for argument; do if [[ $argument == --dry-run ]]; then dry=1; else arguments+=("$argument"); fi; done
[[ -z $stage || -z $chain ]] || problems+=("STAGE=$stage and CHAIN=$chain: give one of them.")
[[ -n $stage$chain ]] || problems+=("Which stage? make submit STAGE=ppo GPUS=8, or CHAIN=sft,merge:sft,ppo,merge:ppo")
[[ ,$chain, != *,,* || -z $chain ]] || problems+=("CHAIN=$chain has an empty item.")
read_chain "${chain:-$stage}"
[[ " ${jobs[*]} " != *\ @(sft|ppo)\ * ]] || check_limit
[[ -z $slurm ]] || for stage in "${jobs[@]}"; do prepare "$stage"; done
# What Slurm would not take, in its own words.
[[ ${#problems[@]} != 0 ]] || for stage in "${jobs[@]}"; do
    prepare "$stage" --test-only
    words=$("${command[@]}" 2>&1) || problems+=("$stage: Slurm does not take it: ${words//$'\n'/ }" \
        "Its partitions: $(sinfo -h -o %R | sort -u | tr '\n' ' ')(SBATCH_PARTITION, NET_PARTITION; SBATCH_TIMELIMIT, SBATCH_ACCOUNT, ...)")
done
[[ ${#problems[@]} == 0 ]] || fail "${problems[@]}"

[[ ${#secrets[@]} == 0 ]] || echo "bridge: set here and not in .env: ${secrets[*]}. Jobs do not get it: put it into .env." >&2
[[ $WORK_DIR/ != @(/tmp|/var/tmp|/dev/shm)/* ]] ||
    echo "bridge: warning: WORK_DIR=$WORK_DIR is each machine's own at most sites. The nodes have to see this very folder." >&2
[[ ${#here[@]} == 0 ]] || echo "bridge: on this machine, as no NET_PARTITION is set: ${here[*]}" >&2
[[ -z $later ]] || echo "bridge: $later needs internet and no NET_PARTITION is set: left out. When the jobs have ended: make $later" >&2
[[ -z $from ]] || echo "bridge: INIT=$from: PPO starts from ${from/#sft/"the SFT model of this chain"}" >&2
[[ -n $dry ]] || for stage in "${here[@]}"; do "$checkout/scripts/host/container.sh" "$stage"; done
[[ ${#jobs[@]} != 0 ]] || exit 0

# What the first stage itself would refuse. Later ones, and what was not fetched in a dry run, have nothing to start from yet.
prepare "${jobs[0]}"
if [[ -n $dry && ${#here[@]} != 0 || ${jobs[0]} == @(accept|bench) ]]; then
    : # a tool has no dry run
elif ! (choose_engine "${jobs[0]%:*}") 2> /dev/null; then
    echo "bridge: no image can be started here: what ${jobs[0]} would refuse is seen in the job only" >&2
elif ! said=$(env "${give[@]}" "$checkout/scripts/host/container.sh" "${job[@]}" --dry-run 2>&1); then
    fail "$said" "${jobs[0]} would end so: nothing was submitted."
else # a dry run shows it all
    grep -E "^bridge: (.* is finished \(|another run works in )${dry:+|}" <<< "$said" || true
fi
[[ -n $dry ]] || mkdir -p "$WORK_DIR/jobs"
for name in $(compgen -e SBATCH_); do echo "bridge: sbatch also reads $name=${!name}"; done
[[ -n ${SBATCH_TIMELIMIT:-} ]] || echo "bridge: SBATCH_TIMELIMIT is not set, so the time limit is the partition's: $(limit_of "${SBATCH_PARTITION:-}")"
for stage in "${jobs[@]}"; do
    after=(--parsable)
    [[ ${#ids[@]} == 0 ]] || after+=("--dependency=afterok:${ids[-1]}" --kill-on-invalid-dep=yes)
    prepare "$stage" "${after[@]}"
    printf '+' && printf ' %q' "${command[@]}" && echo
    [[ -z $dry ]] || { ids+=(JOBID) && continue; }
    if ! id=$("${command[@]}"); then
        [[ ${#ids[@]} == 0 ]] || scancel "${ids[@]}"
        fail "$stage was not taken (see above). ${ids[*]+Cancelled: ${ids[*]}}"
    fi
    ids+=("${id%%;*}")
    echo "bridge: $stage is job ${ids[-1]}. Follow it: make follow RUN=${RUN:-default}, or tail -F $WORK_DIR/jobs/${ids[-1]}{,.0}.log; squeue -j ${ids[-1]}; end it: scancel ${ids[-1]}"
done
