#!/usr/bin/env bash
# [GPU] Do both profiles learn alike, and how much? SFT and PPO of SmolLM2-135M on GSM8K with each profile and two orders of the
# data, side by side on one GPU; then the accuracy of base, SFT and PPO of the run tuned-1.
#   DATA_SOURCE=/folder WORK_DIR=/folder tests/gpu/learning.sh [STEPS OF PPO, 40]
# A log for each run in WORK_DIR/learning. The curves, later and elsewhere:
#   make plot STAGE=sft ARGS='tutorial-1 tuned-1 tutorial-2 tuned-2'      make plot ARGS='tutorial-1 ... --mean=5'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
ppo_steps=${1:-40}
export MODEL=smollm2 GPUS=1 SHARE_GPU=1
logs=$WORK_DIR/learning
mkdir -p "$logs"

stage() { # RUN STAGE ARGUMENTS...: one stage, its output in a log of its own
    RUN=$1 scripts/host/container.sh "${@:2}" > "$logs/$1-$2.log" 2>&1 ||
        { echo "$1 $2: exit status $?, see $logs/$1-$2.log" >&2; return 1; }
}
wait_for() { # PID...: all of them; fails if one failed
    local status=0 pid
    for pid; do wait "$pid" || status=1; done
    return $status
}

stage tuned-1 data
stage tuned-1 model
# The trainers take the rows of SFT in one order always: a second order is a second file.
second_order=$WORK_DIR/data/gsm8k/second_order.parquet
scripts/host/container.sh shell -c 'python -' > "$logs/second_order.log" 2>&1 << 'END'
import os

import numpy
import pyarrow.parquet as parquet

folder = os.environ["WORK_DIR"] + "/data/gsm8k"
rows = parquet.read_table(f"{folder}/train.parquet")
parquet.write_table(rows.take(numpy.random.default_rng(2).permutation(len(rows))), f"{folder}/second_order.parquet")
END
# Should this end early, what it started ends too.
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
pids=()
PROFILE=tuned stage tuned-1 sft & first=$!
PROFILE=tutorial stage tutorial-1 sft & pids+=($!)
for profile in tutorial tuned; do
    PROFILE=$profile stage "$profile-2" sft data.train_files="$second_order" & pids+=($!)
done
# PPO starts from this one; the tutorial's take several times as long and go on beside it.
wait "$first"
STAGE=sft stage tuned-1 merge

# Memory for all at once, the SFT runs that still go on among them. vLLM's newer engine, the tutorial's, takes other processes'
# memory for its own when it works out the size of its cache: that is given instead, in blocks of 16 tokens, and the engine's
# share of the GPU is then no limit. No engine may give memory back while another measures: all stay awake, and `tuned`, whose
# trainers give nothing back either, goes first.
rollout=actor_rollout_ref.rollout
common=("trainer.total_training_steps=$ppo_steps" trainer.test_freq=-1 "$rollout.free_cache_engine=false"
    "+$rollout.engine_kwargs.vllm.num_gpu_blocks_override=8192")
for profile in tuned tutorial; do
    own=("$rollout.gpu_memory_utilization=0.9")
    if [[ $profile == tuned ]]; then
        own=("$rollout.gpu_memory_utilization=0.5")
        for budget in actor_rollout_ref.actor.ppo critic.ppo "$rollout.log_prob" critic.forward; do
            own+=("${budget}_max_token_len_per_gpu=4096")
        done
    fi
    for seed in 1 2; do
        # All start from the same weights; the run that is evaluated calls them its own SFT, and saves what it becomes.
        from=("MODEL=$WORK_DIR/runs/tuned-1/sft/merged") save=-1
        if [[ $profile-$seed == tuned-1 ]]; then from=(INIT=sft) save=$ppo_steps; fi
        (export PROFILE="$profile" "${from[@]}"
            stage "$profile-$seed" ppo "${common[@]}" "${own[@]}" trainer.save_freq="$save" +data.seed="$seed") & last=$!
        if [[ $profile-$seed == tuned-1 ]]; then first=$last; else pids+=("$last"); fi
        # Each looks how much memory is free when it starts.
        sleep 8
    done
done
wait "$first"
STAGE=ppo stage tuned-1 merge
# The evaluation takes most of the GPU's memory: it waits for the others, and a run that failed does not stop it.
status=0
wait_for "${pids[@]}" || status=1
stage tuned-1 eval
exit "$status"
