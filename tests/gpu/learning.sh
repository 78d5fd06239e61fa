#!/usr/bin/env bash
# [GPU] How much does a model learn, and do both profiles learn alike? SmolLM2-135M on GSM8K.
#   DATA_SOURCE=/folder WORK_DIR=/folder tests/gpu/learning.sh                all of it: chain, prepare, curves, SFT's curves
#   ... tests/gpu/learning.sh chain [STEPS]             SFT, PPO from it and eval: the run `learned`
#   ... tests/gpu/learning.sh prepare                   what runs to compare start from: the run `prepared`
#   ... tests/gpu/learning.sh curves [STEPS]            PPO with both profiles and two seeds, side by side on one GPU, once that is done
#   ... tests/gpu/learning.sh ppo PROFILE-SEED [STEPS]  one of them, where there are more GPUs (CUDA_VISIBLE_DEVICES gives it one)
#   ... tests/gpu/learning.sh sft PROFILE-SEED          SFT to compare the profiles with, likewise: two orders of the rows
#   MINUTES=20 ... tests/gpu/learning.sh gain           does PPO, and GRPO, add to its SFT? Three seeds; in WORK_DIR/gain (gain.py)
# A log for each in WORK_DIR/learning. The curves, later and elsewhere:
#   WORK_DIR=/folder make report RUN=tutorial-1,tutorial-2,tuned-1,tuned-2
#
# The chain's epochs and learning rates are larger than the tutorial's, which are made for a model ten times as large: with
# those one answer of 500 is right after SFT, and PPO has next to nothing to learn from. The critic has four steps to find out
# what an answer is worth before the actor follows it.
#
# PPO to compare with starts from an SFT with the tutorial's numbers and differs from the tutorial's PPO, so that there is
# something to see in the minutes of a dozen steps: batches of 64 in mini batches of 16, actor's learning rate 1e-5, and half
# a point for an answer that gives a number where it should. All else is the profiles', but for vLLM's cache
# (shared_gpu.py), since several share a GPU: their curves count, not their speed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export MODEL=${MODEL:-smollm2} GPUS=1 PROFILE=${PROFILE:-tuned} SHARE_GPU=1
logs=${WORK_DIR:?has to name a folder}/learning weights=$WORK_DIR/runs/prepared/sft/merged
mkdir -p "$logs"

stage() { # RUN STAGE ARGUMENTS...: one stage, its output in a log of its own
    local log=$logs/$1-$2${STAGE:+-$STAGE}.log
    RUN=$1 ../../scripts/host/container.sh "${@:2}" > "$log" 2>&1 || { echo "$1 $2: exit status $?, see $log" >&2; return 1; }
}

# Others may use the GPU, too. What the profile changes in the trainer is named with the critic, which is built first.
run_ppo() { # RUN PROFILE ARGUMENTS...
    local own=(memory/ppo=80gb critic.model.external_lib=bridge.trainers.speedups)
    [[ $2 != tutorial ]] || own=(critic.model.external_lib=null)
    PROFILE=$2 stage "$1" ppo "${own[@]}" actor_rollout_ref.model.external_lib=shared_gpu "${@:3}"
}

run_python() { # LOG ARGUMENTS...: a script from standard input, in the container
    ../../scripts/host/container.sh shell -c 'python - "$@"' - "${@:2}" > "$logs/$1.log" 2>&1 ||
        { echo "$1: exit status $?, see $logs/$1.log" >&2; return 1; }
}

chain() { # [STEPS OF PPO]
    stage learned data
    stage learned model
    stage learned sft trainer.total_epochs=5 optim.lr=3e-4
    STAGE=sft stage learned merge
    INIT=sft run_ppo learned "$PROFILE" actor_rollout_ref.actor.optim.lr=1e-5 trainer.critic_warmup=5 \
        trainer.test_freq=-1 "trainer.total_training_steps=${1:-58}" "trainer.save_freq=${1:-58}"
    STAGE=ppo stage learned merge
    stage learned eval
}

prepare() {
    rm -f "$logs/prepared"
    stage prepared data
    stage prepared model
    stage prepared sft
    STAGE=sft stage prepared merge
    # Runs of one seed start from the same value head, which verl draws anew for each run: the critic's loss is a matter of
    # that draw for a dozen steps.
    run_python critics "$weights" "$logs" << 'END'
import sys

import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

weights, folder = sys.argv[1:]
for seed in (1, 2):
    torch.manual_seed(seed)
    critic = AutoModelForTokenClassification.from_pretrained(weights, num_labels=1)
    critic.save_pretrained(f"{folder}/critic-{seed}")
    AutoTokenizer.from_pretrained(weights).save_pretrained(f"{folder}/critic-{seed}")
END
    cat > "$logs/reward.py" << 'END'
from verl.utils.reward_score import gsm8k


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return gsm8k.compute_score(solution_str, ground_truth, format_score=0.5)
END
    # The trainers take the rows of SFT in one order always: a second order is a second file.
    run_python second_order "$WORK_DIR/data/gsm8k/train.parquet" "$logs/second_order.parquet" << 'END'
import sys

import numpy
import pyarrow.parquet as parquet

rows = parquet.read_table(sys.argv[1])
parquet.write_table(rows.take(numpy.random.default_rng(2).permutation(len(rows))), sys.argv[2])
END
    touch "$logs/prepared"
}

ppo() { # PROFILE-SEED [STEPS]
    MODEL=$weights run_ppo "$1" "${1%-*}" trainer.test_freq=-1 trainer.save_freq=-1 "+data.seed=${1#*-}" \
        "critic.model.path=$logs/critic-${1#*-}" "custom_reward_function.path=$logs/reward.py" \
        data.train_batch_size=64 actor_rollout_ref.actor.ppo_mini_batch_size=16 actor_rollout_ref.actor.optim.lr=1e-5 \
        "trainer.total_training_steps=${2:-16}"
}

curves() { # [STEPS]: a run that fails does not keep the others from theirs
    local run status=0 running=()
    for run in tutorial-1 tuned-1 tutorial-2 tuned-2; do
        ppo $run "$@" &
        running+=($!)
    done
    for run in "${running[@]}"; do wait "$run" || status=1; done
    return $status
}

sft() { # PROFILE-SEED
    local order=()
    [[ $1 == *-1 ]] || order=(data.train_files="$logs/second_order.parquet")
    PROFILE=${1%-*} stage "$1" sft "${order[@]}"
}

gain() {
    exec ../../scripts/host/container.sh shell -c 'exec python gain.py "$@"' gain "${MINUTES:-20}"
}

case ${1:-} in
chain | prepare | gain) "$@" ;;
curves | ppo | sft)
    [[ -f $logs/prepared ]] || { echo "$logs/prepared is not there: run $0 prepare first." >&2; exit 2; }
    "$@"
    ;;
'')
    chain 58
    prepare
    status=0
    curves 16 || status=1
    for run in tutorial-1 tuned-1 tutorial-2 tuned-2; do sft $run || status=1; done
    exit $status
    ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
