# A menu. Every target is one command; what it does is in scripts/. Settings: .env, or `make ppo GPUS=8`.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Make takes any NAME=value without a word: the scripts refuse names that .env.example does not know.
export MAKE_NAMES := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))

##@ Environment
check: ## Test this environment: versions, GPUs, disk
image: ## Build bridge.sif (Apptainer)
	scripts/image/build.sh sif
oci: ## Build the same image for Podman and Docker
	scripts/image/build.sh oci
shell: ## Open a shell in the image

##@ Training, in this order; ARGS='key=value ...' goes to the stage, DRY=1 shows
data: ## Fetch GSM8K and prepare it
model: ## Fetch the base model
sft: ## Supervised fine-tuning
ppo: ## Reinforcement learning with PPO
merge: ## Turn a checkpoint into a Hugging Face model
upload: ## Publish the merged model (private unless PUBLIC=1)
rehearse: ## The whole chain, small, without a GPU

##@ Development
venv: ## Make .venv from the locks
	@scripts/host/venv.sh
lock: ## Renew the locks from requirements*.in
	scripts/host/lock.sh
test: venv ## Run the tests; ARGS goes to pytest
	.venv/bin/python -m pytest $(ARGS)
lint: venv ## Run the linters
	.venv/bin/ruff check scripts tests
help: ## Show this menu
	@awk -f scripts/host/help.awk $(MAKEFILE_LIST)

STAGES := check shell data model sft ppo merge upload rehearse
$(STAGES):
	@scripts/host/container.sh $@ $(ARGS)

.PHONY: $(STAGES) image oci venv lock test lint help
