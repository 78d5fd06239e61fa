# A menu: every target is one command, and what it does is in scripts/. Settings are in .env, or `make ppo GPUS=8`.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# The stages of one call follow each other.
.NOTPARALLEL:

# Make takes any NAME=value without a word: scripts/host/read_env.sh refuses those that .env.example does not know.
export MAKE_NAMES := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))

##@ Environment
image: ## Build bridge.sif, the image for Apptainer
	@scripts/host/build.sh sif
oci: ## Build the same image for Podman and Docker
	@scripts/host/build.sh oci
pull: ## Fetch a prebuilt image by digest: IMAGE=oras://...@sha256:... or docker://...
	@scripts/host/pull.sh
check: ## Test this environment and site: versions, GPUs, network, folders
shell: ## Open a shell in the image

##@ Training, in this order. ARGS='key=value ...' goes to sft and ppo; ARGS=--dry-run (data to upload) only shows
data: ## Fetch GSM8K and prepare it
model: ## Fetch the base model
sft: ## Supervised fine-tuning
ppo: ## Reinforcement learning with PPO
merge: ## Turn the newest checkpoint into a Hugging Face model
eval: ## Accuracy on GSM8K of the base, the SFT and the PPO model
follow: ## Watch a training, also of another node: RUN=, STAGE=
upload: ## Publish the merged model, privately unless PUBLIC=1
rehearse: ## The whole chain in small, without a GPU
bench: ## Measure how fast the profiles are; CASES=name,name picks some
accept: ## Try out this node with all its GPUs: a page and a JSON
report: ## How runs went, on one page: RUN=a,b

submit: ## Hand a stage to Slurm: STAGE=ppo GPUS=8, or CHAIN=sft,merge:sft,ppo. make shell SLURM=1: a shell on a node
	@scripts/host/submit.sh submit $(ARGS)

##@ Development
venv: ## Make .venv from the locks
	@scripts/host/venv.sh
lock: ## Renew the locks from requirements*.in
	@.ci/lock
test: venv ## Run the tests; ARGS goes to pytest
	.venv/bin/python -m pytest $(ARGS)
lint: venv ## Run the linters
	@.ci/lint
help: ## Show this menu
	@awk -F ':.*## ' '/^##@/ {print "\n" substr($$0, 5)} /^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

STAGES := check shell data model sft ppo merge eval upload rehearse bench accept follow report
ONE_NODE = $(if $(and $(filter shell,$@),$(filter-out 1,$(NODES))),echo "bridge: NODES=$$NODES: a shell is on one node" >&2; )
$(STAGES):
	@$(ONE_NODE)scripts/host/$(if $(filter shell1,$@$(SLURM))$(filter-out check,$(filter check%,$@$(NODES))),submit.sh,container.sh) $@ $(ARGS)

.PHONY: $(STAGES) submit image oci pull venv lock test lint help
