"""[image, GPU] Several small trainings on one GPU: vLLM's cache has a size of its own, and the GPU is not measured for it.

    cd tests/gpu; SHARE_GPU=1 ../../scripts/host/container.sh ppo actor_rollout_ref.model.external_lib=shared_gpu \\
        critic.model.external_lib=...

vLLM finds the size by watching how much memory the whole GPU has free while it tries the model out. What others take meanwhile it
counts as its own, and where they give some back it stops. verl loads this module before it opens vLLM; `critic`'s is what the
profile has (bridge.trainers.speedups or null): it is loaded first, in the same process. Called in this folder, since Ray's
workers find modules where the trainer was started. On a machine without a GPU it changes nothing.
"""

import torch

# Bytes: the answers of a batch of 256 prompts for a model of a few hundred million parameters.
CACHE = 6 << 30


def apply() -> None:
    """Let the workers of both of vLLM's engines answer so."""
    from vllm.v1.worker.gpu_worker import Worker as NewerWorker
    from vllm.worker.worker import Worker

    NewerWorker.determine_available_memory = lambda worker: CACHE
    # Blocks on the GPU, and on the host.
    Worker.determine_num_available_blocks = lambda worker: (CACHE // worker.get_cache_block_size_bytes(), 0)


if torch.cuda.is_available():
    apply()
