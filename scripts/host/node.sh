#!/usr/bin/env bash
# Another node of a job: its part in a training. Runs: host (every node but the first, by job.sh's srun).
#   BRIDGE_NODES_DIR=FOLDER scripts/host/node.sh STAGE IMAGE_ID
set -euo pipefail
# shellcheck source=scripts/host/engine.sh
source "$(dirname "${BASH_SOURCE[0]}")/engine.sh"
read_settings 'WORK_DIR|ENGINE|IMAGE'
# The first node has made it.
[[ -d $BRIDGE_NODES_DIR ]] || fail "$(hostname) does not see $BRIDGE_NODES_DIR of the first node: WORK_DIR has to be the same folder on all."
resolve_paths
choose_engine join
[[ $(image_id) == "$2" ]] ||
    fail "$(hostname): IMAGE=$IMAGE is another image than on the first node. Put it where all nodes see one file, or copy it anew."
exec "$checkout/scripts/host/container.sh" join "$1"
