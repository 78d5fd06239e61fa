# shellcheck shell=bash disable=SC2034 # submit.sh reads what is filled
# Which stages become jobs, and whether they can follow each other. Runs: host, sourced by submit.sh.
#   source scripts/host/chain.sh; read_chain sft,merge:sft,ppo
# Each finding goes to `problems`, so that all are named at once.

is_training() { [[ $1 == @(sft|ppo) ]]; }
needs_internet() { [[ $1 == @(data|model|upload|upload:*) ]]; }

read_chain() { # STAGE[,STAGE...]: fills jobs, here (stages for this machine), later (left out), from (what PPO's INIT is)
    local order=' data model sft merge:sft ppo merge:ppo ' stage before last=0 previous='' seen=, unmerged='' names
    jobs=() here=() later='' from=''
    IFS=, read -ra names <<< "$1"
    for stage in "${names[@]}"; do
        if [[ ! $stage =~ ^(data|model|sft|ppo|accept|bench|merge:(sft|ppo)|eval(:(base|sft|ppo))?|upload(:(sft|ppo))?)$ ]]; then
            [[ -z $stage ]] || problems+=("$stage is no stage:${order}eval upload (of one: eval:sft, upload:sft); by themselves: accept, bench")
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
        [[ $stage != ppo || $seen != *,merge:sft,* ]] || from=${INIT:-sft}
        # Where no node reaches the internet, this machine has to.
        if ! needs_internet "$stage" || [[ -n ${NET_PARTITION:-} ]]; then jobs+=("$stage")
        elif [[ $stage == upload* ]]; then later=${stage/:/ STAGE=}
        else here+=("$stage"); fi
    done
}
