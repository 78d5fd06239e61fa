"""verl's trainers, which save and end after a step when asked to:  python -m bridge.trainers.stoppable MODULE OVERRIDES...
MODULE is verl.trainer.fsdp_sft_trainer or verl.trainer.main_ppo; trainers.packed_sft does it by itself. If a step finds the
file `stop-requested` in the stage's folder, the trainer saves, leaves `stopped` (by which the door knows), and ends.
"""

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing import popen_fork
from pathlib import Path
from typing import Any

from bridge.errors import Tolerance

# In the folder of the stage: asked by whoever may write there, answered by the trainer.
REQUEST, ANSWER = "stop-requested", "stopped"
# In the same folder: PPO's answers at each validation, in verl's form; to how many problems, and how much it may become.
SAMPLES, SAMPLED, SAMPLES_BYTES = "samples", 20, 200 * 10**6
# Asks a process where it is.
STACKS = signal.SIGUSR2


def stage_dir() -> Path:
    """Where both files are, as the door tells its trainers."""
    return Path(os.environ["BRIDGE_STAGE_DIR"])


def write_stacks_when_asked() -> None:
    """From now on the signal makes this process of a trainer write where its Python threads are, whatever they wait for.

    To the stage's log itself: Ray, through which a worker's output comes, leaves out what two workers say alike.
    """
    if "BRIDGE_STAGE_DIR" in os.environ:
        faulthandler.register(STACKS, open(stage_dir() / "log.txt", "a"))  # noqa: SIM115 - for the process's life


def is_requested() -> bool:
    """Whether the trainer is asked to stop. What a file system refuses to say is no request."""
    return os.path.exists(stage_dir() / REQUEST)


def is_answered(answer: Path) -> bool:
    """Whether the trainer has ended because it was asked to. That it cannot be seen is said."""
    seen: list[bool] = []
    Tolerance("looking for the trainer's answer").at_last(lambda: seen.append(answer.exists()))
    return any(seen)


def stoppable_sft(trainer: type) -> type:
    """A class of verl's SFT trainer that can be asked to stop."""
    import torch

    if "BRIDGE_NODE" in os.environ:
        # SIGTERM is blocked there (tools.join): a rank that fails would wait for the processes that load its data for ever.
        popen_fork.Popen.terminate = popen_fork.Popen.kill
    write_stacks_when_asked()

    class StoppableSFTTrainer(trainer):
        steps, stopping = 0, False

        def _build_dataloader(self, train_dataset, val_dataset) -> None:
            super()._build_dataloader(train_dataset, val_dataset)
            if "BRIDGE_SEED" in os.environ:
                # verl leaves it at 0 whatever trainer.seed is, which SEED= sets.
                self.train_sampler.seed = self.config.trainer.seed

        def fit(self) -> None:
            super().fit()
            # Without a path: what is written in the background is waited for.
            self.checkpoint_manager.save_checkpoint(None)
            # On all nodes: they end with the first.
            torch.distributed.barrier()

        def training_step(self, batch) -> dict[str, float]:
            began = time.perf_counter()
            metrics = super().training_step(batch)
            seconds, ranks = time.perf_counter() - began, torch.distributed.get_world_size()
            self.steps += 1
            # One rank looks for all: others might see the file a step later, and wait for each other.
            asked = torch.distributed.get_rank() == 0 and is_requested()
            gathered = torch.tensor([int(batch["attention_mask"].sum()), int(asked)], device=self.config.trainer.device)
            torch.distributed.all_reduce(gathered)
            tokens, asked = gathered.tolist()
            # Such ranks share their rows.
            tokens //= self.config.ulysses_sequence_parallel_size
            # As verl's PPO calls them; its SFT tells neither.
            metrics |= {"perf/total_num_tokens": tokens, "perf/time_per_step": seconds,
                        "perf/throughput": tokens / seconds / ranks}
            if torch.cuda.is_available():
                metrics["perf/max_memory_reserved_gb"] = torch.cuda.max_memory_reserved() / 2**30
            if asked and (step := self.resume_global_step + self.steps) < self.total_training_steps:
                # First, since verl validates before it saves, and who asks may not have the time.
                self.save_checkpoint(step)
                # What verl's fit compares the step with next: then it ends.
                self.total_training_steps, self.stopping = 0, True
            return metrics

        def save_checkpoint(self, step: int) -> None:
            if not self.stopping:
                super().save_checkpoint(step)
            elif torch.distributed.get_rank() == 0:
                (stage_dir() / ANSWER).touch()

    return StoppableSFTTrainer


class UntilAsked:
    """The batches of a PPO trainer of verl's: none after the step in which it was asked to stop; after a resume, those to come.

    The loader's state lacks verl's generator of the order of rows: the first epoch's would come again, and rows be left out.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.loader = trainer, trainer.train_dataloader
        self.state, self.begun, self.ended = None, False, False

    def __iter__(self) -> Iterator[dict]:
        if not self.begun:
            self.begun = True
            self.go_on()
            if is_requested():
                # While it started: there is nothing new to save.
                self.end()
        # verl begins its next epoch all the same.
        if self.ended:
            return
        for batch in self.loader:
            yield batch
            # Now the step is over and logged.
            if is_requested():
                self.save()
                self.end()
                return

    def load_state_dict(self, state: dict) -> None:
        """Keep what a checkpoint holds of the loader till the steps before are known."""
        self.state = state

    def go_on(self) -> None:
        """Bring the loader where it was at the end of the last step."""
        from torch.utils.data import RandomSampler

        # verl counts the step that comes.
        done, per_epoch = self.trainer.global_steps - 1, len(self.loader)
        epochs = done // per_epoch if self.state is None else max(done - 1, 0) // per_epoch
        for _ in range(epochs if isinstance(self.loader.sampler, RandomSampler) else 0):
            list(self.loader.sampler)
        if self.state is not None:
            self.loader.load_state_dict(self.state)

    def end(self) -> None:
        """Yield no more, and say why."""
        self.ended = True
        (stage_dir() / ANSWER).touch()

    def save(self) -> None:
        """Save the step that is over, unless verl has: it has counted on already."""
        self.trainer.global_steps -= 1
        if not os.path.exists(f"{self.trainer.config.trainer.default_local_dir}/global_step_{self.trainer.global_steps}"):
            self.trainer._save_checkpoint()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def stoppable_ppo(trainer: type) -> type:
    """A class of verl's PPO trainer that can be asked to stop."""

    class StoppablePPOTrainer(trainer):
        def fit(self) -> None:
            self.train_dataloader = UntilAsked(self)
            super().fit()
            for group in (self.actor_rollout_wg, *([self.critic_wg] if self.use_critic else [])):
                group.save_checkpoint(None)

        def _dump_generations(self, inputs, outputs, scores, reward_extra_infos_dict, dump_path) -> None:
            """The same problems of each validation in the stage's own folder; all in one that the user has named."""
            dump, folder = super()._dump_generations, Path(dump_path)
            if folder != stage_dir() / SAMPLES:
                return dump(inputs, outputs, scores, reward_extra_infos_dict, dump_path)

            def dump_some() -> None:
                if sum(file.stat().st_size for file in folder.glob("*")) <= SAMPLES_BYTES:
                    # What else a reward of one's own says may be no JSON.
                    dump(inputs[:SAMPLED], outputs[:SAMPLED], scores[:SAMPLED], {}, dump_path)

            # A full disk ends no training.
            Tolerance("writing samples")(dump_some)

    return StoppablePPOTrainer


def run_ppo() -> None:
    """verl's own entry; the actor in which its trainer runs exchanges the class."""
    import ray
    from verl.trainer import main_ppo

    # On the first node, where it is seen and where W&B's login is looked for.
    @ray.remote(num_cpus=1, resources={"node:__internal_head__": 0.001})
    class TaskRunner:
        def run(self, config) -> None:
            from bridge.trainers.stoppable import stoppable_ppo

            main_ppo.RayPPOTrainer = stoppable_ppo(main_ppo.RayPPOTrainer)
            main_ppo.TaskRunner.__ray_metadata__.modified_class().run(config)

    main_ppo.TaskRunner = TaskRunner
    main_ppo.main()


def main() -> None:
    """Become the module (sys.argv[1]) with the rest of the arguments."""
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "verl.trainer.main_ppo":
        return run_ppo()
    from verl.trainer import fsdp_sft_trainer

    fsdp_sft_trainer.FSDPSFTTrainer = stoppable_sft(fsdp_sft_trainer.FSDPSFTTrainer)
    fsdp_sft_trainer.main()


if __name__ == "__main__":
    main()
