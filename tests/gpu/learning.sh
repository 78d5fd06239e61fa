#!/usr/bin/env bash
# [GPU] How much does a model learn, and do both profiles learn alike? SFT, PPO and eval of SmolLM2-135M on GSM8K (the run
# tuned-1), then the same PPO and SFT with each profile and two orders of the data, one after another, so that each has
# the GPU whole.
#   DATA_SOURCE=/folder WORK_DIR=/folder tests/gpu/learning.sh [STEPS OF PPO, 29] [STEPS OF THE PPO TO COMPARE WITH, 12]
# A log for each run in WORK_DIR/learning. The curves, later and elsewhere:
#   make plot ARGS='tutorial-1 tuned-1 tutorial-2 tuned-2'      make plot STAGE=sft ARGS='tutorial-1 tuned-1 tutorial-2 tuned-2'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
steps=${1:-29} compared_steps=${2:-12}
export MODEL=smollm2 GPUS=1
logs=$WORK_DIR/learning weights=$WORK_DIR/runs/tuned-1/sft/merged
mkdir -p "$logs"

stage() { # RUN STAGE ARGUMENTS...: one stage, its output in a log of its own
    RUN=$1 scripts/host/container.sh "${@:2}" > "$logs/$1-$2.log" 2>&1 ||
        { echo "$1 $2: exit status $?, see $logs/$1-$2.log" >&2; return 1; }
}

stage tuned-1 data
stage tuned-1 model
PROFILE=tuned stage tuned-1 sft
STAGE=sft stage tuned-1 merge
# All start from these weights, and runs of one seed from the same new value head, which verl draws anew for each run: the
# critic's loss is a matter of that draw for a dozen steps.
run_python() { # LOG ARGUMENTS...: a script from standard input, in the container
    scripts/host/container.sh shell -c 'python - "$@"' - "${@:2}" > "$logs/$1.log" 2>&1 ||
        { echo "$1: exit status $?, see $logs/$1.log" >&2; return 1; }
}
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
ppo() { # RUN STEPS SAVE_EVERY
    PROFILE=${1%-*} stage "$1" ppo trainer.test_freq=-1 "+data.seed=${1#*-}" "critic.model.path=$logs/critic-${1#*-}" \
        "trainer.total_training_steps=$2" "trainer.save_freq=$3"
}
# A run that fails does not keep the others from theirs.
status=0
INIT=sft ppo tuned-1 "$steps" "$steps" && STAGE=ppo stage tuned-1 merge && stage tuned-1 eval || status=1
for run in tutorial-1 tuned-2 tutorial-2; do
    MODEL=$weights ppo $run "$compared_steps" -1 || status=1
done

# The trainers take the rows of SFT in one order always: a second order is a second file.
second_order=$WORK_DIR/data/gsm8k/second_order.parquet
run_python second_order "$WORK_DIR/data/gsm8k/train.parquet" "$second_order" << 'END'
import sys

import numpy
import pyarrow.parquet as parquet

rows = parquet.read_table(sys.argv[1])
parquet.write_table(rows.take(numpy.random.default_rng(2).permutation(len(rows))), sys.argv[2])
END
for run in tutorial-1 tuned-2 tutorial-2; do
    order=()
    [[ $run == *-1 ]] || order=(data.train_files="$second_order")
    PROFILE=${run%-*} stage $run sft "${order[@]}" || status=1
done
exit $status
