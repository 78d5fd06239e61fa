#!/usr/bin/env bash
# A job of Slurm: one stage. Before the job's end, and at a preemption, it asks a training to save and end; then it begins again.
# Runs: host (the job's first node), where sbatch copies it to:
#   sbatch [OPTION...] CHECKOUT/scripts/host/job.sh CHECKOUT STAGE [ARGUMENT...]
# The stage is a child of this script and no step of Slurm's, whose signals would kill what they are to save.
set -euo pipefail
# shellcheck source=scripts/host/engine.sh
source "$1/scripts/host/engine.sh"
# No secret: only container.sh has those.
read_settings 'WORK_DIR|RUN|REQUEUE|ENGINE|IMAGE'
resolve_paths
stage=$2 attempt=${SLURM_RESTART_COUNT:-0} most=${REQUEUE:-10}
say() { echo "bridge: $(date '+%F %T') $*"; }

log=$WORK_DIR/jobs/$SLURM_JOB_ID.$attempt.log
request=$WORK_DIR/runs/${RUN:-default}/$stage/stop-requested
say "$stage on $(hostname), attempt $attempt: $log"
# From here all is in the attempt's own log; the job's log says only how it ended.
exec {job}>&1 >> "$log" 2>&1
# A log that cannot be written ends nothing.
tell() { say "$*" | tee -a "/dev/fd/$job" || true; }
# SLURM_RESTART_COUNT knows of node failures, too.
put_back=$(grep -c "put back into the queue" "$WORK_DIR/jobs/$SLURM_JOB_ID.log" || true)

stage_pid='' ending=''
if [[ $stage == sft || $stage == ppo ]]; then
    # One that was left over is for no run; and one may be made before the stage has made its folder.
    mkdir -p -- "${request%/*}" && rm -f -- "$request"
    # Slurm tells a job's steps of a preemption, not its script: so there is a small step, without what the job asked for.
    # shellcheck disable=SC2016 # the step expands it
    exec {watch}> >(env -u SLURM_GPUS -u SLURM_GPUS_PER_NODE -u SLURM_CPUS_PER_GPU -u SLURM_MEM_PER_CPU -u SLURM_MEM_PER_GPU \
        srun --overlap --export=ALL --nodes=1 --ntasks=1 --cpus-per-task=1 --gres=none --mem=0 --immediate=60 --unbuffered \
        bash -c 'trap "echo bridge: preempted; touch -- \"\$1\"" TERM; read -r || true' _ "$request" ||
        say "no step can watch for a preemption (see above); the time limit is watched all the same")
else
    exec {watch}> >(:)
fi
# shellcheck disable=SC2329 # by a trap
ask() {
    touch -- "$request" || true
    tell "the time limit is near: $stage is asked to save and to end ($request)"
}
# shellcheck disable=SC2329 # by a trap
cancel() {
    ending=cancelled
    [[ -z $stage_pid ]] || kill -TERM "$stage_pid" 2> /dev/null || true
}
trap ask USR1
trap cancel TERM

others=$((${SLURM_JOB_NUM_NODES:-1} - 1)) others_pid=''
if ((others)); then
    choose_engine "$stage"
    # Where the nodes meet. It holds a key.
    export BRIDGE_NODES_DIR=$WORK_DIR/jobs/$SLURM_JOB_ID.$attempt.nodes
    mkdir -m 700 -- "$BRIDGE_NODES_DIR"
fi
# For what is shown of a training; it runs without.
ends=$(SLURM_TIME_FORMAT=%s timeout 10 squeue -h -j "$SLURM_JOB_ID" -o %e) || true
[[ ! $ends =~ ^[0-9]+$ ]] || export BRIDGE_JOB_END=$ends
"$checkout/scripts/host/container.sh" "${@:2}" {watch}>&- {job}>&- &
stage_pid=$!
[[ -z $ending ]] || kill -TERM "$stage_pid"
if ((others)); then
    # A node that fails ends the others and, by its message to the first, the stage.
    (env -u SLURM_GPUS srun --overlap --export=ALL --relative=1 --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --unbuffered --label \
        "$checkout/scripts/host/node.sh" "$stage" "$(image_id)" < /dev/null {watch}>&- ||
        { [[ ! -d $BRIDGE_NODES_DIR ]] || { tell "another node's part of $stage has failed (see $log): all end" &&
            kill -TERM "$stage_pid"; }; }) &
    others_pid=$!
fi
# wait returns at each signal, too; the status of what has ended it knows at any time.
while kill -0 "$stage_pid" 2> /dev/null; do wait "$stage_pid" || true; done
status=0
wait "$stage_pid" || status=$?
exec {watch}>&-
if ((others)); then
    # Now they end. A node that is lost does not.
    rm -rf -- "$BRIDGE_NODES_DIR" || true
    for _ in {1..60}; do if kill -0 "$others_pid" 2> /dev/null; then sleep 1; fi; done
fi

# A preemption may end a node that has only begun to start, and with it the stage.
[[ $status != 143 || -n $ending || ! -e $request ]] || status=75
if [[ $status == 75 && -z $ending && $put_back -lt $most ]]; then
    tell "$stage was asked to stop and did: the job is put back into the queue"
    # This ends the script, too: what it says is no preemption.
    trap '' TERM
    scontrol requeue "$SLURM_JOB_ID" >> "$log" 2>&1 || tell "Slurm does not put it back (see $log): make submit continues it"
elif [[ $status == 75 && -z $ending ]]; then
    tell "$stage was asked to stop and did. It was put back $put_back times (REQUEUE=$most): make submit continues it"
else
    tell "$stage ended with $status${ending:+, $ending}; its last word: $(grep '^bridge: ' "$log" | tail -n 1)"
fi
exit "$status"
