"""What verl's trainers need where there is no GPU, one patch at a time; that the whole trains is in tests/rehearsal."""

import os

from door import TRAINER, run_python

OFFLOADED = """
import torch
from torch.distributed import device_mesh, fsdp, init_process_group
from bridge.trainers import on_cpu

on_cpu.fill_torch_cpu()
on_cpu.use_plain_float32()
init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model = torch.nn.Linear(4, 4)
# As verl shards the reference model of a KL loss.
fsdp.fully_shard(model, mesh=device_mesh.init_device_mesh("cpu", (1,)), offload_policy=fsdp.CPUOffloadPolicy(pin_memory=True))
with torch.no_grad():
    print(tuple(model(torch.ones(2, 4)).shape))
"""


def test_a_model_whose_weights_are_offloaded_computes_without_a_gpu():
    assert run_python(OFFLOADED) == "(2, 4)"


ANSWERED = """
import torch
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM
from verl import DataProto
from verl.workers.rollout import HFRollout
from bridge.trainers import on_cpu

on_cpu.fill_torch_cpu()
on_cpu.answer_once()
small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **small))
config = OmegaConf.create({"n": 5, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "response_length": 4})
# As verl's trainer hands them over: each prompt as often as it wants answers.
ids = torch.tensor([[1, 2, 3]]).repeat(5, 1)
rows = DataProto.from_dict({"input_ids": ids, "attention_mask": ids * 0 + 1, "position_ids": (ids * 0 + 1).cumsum(1) - 1},
                           meta_info={"eos_token_id": 15, "pad_token_id": 0})
print(tuple(HFRollout(model, config).generate_sequences(rows).batch["responses"].shape), config.n)
"""


def test_each_row_is_answered_once_though_several_answers_to_a_prompt_are_wanted():
    assert run_python(ANSWERED) == "(5, 4) 5"


def test_a_seed_gives_each_rank_its_own_numbers_and_without_one_nothing_changes():
    drawn = {}
    for env in ({}, {"BRIDGE_SEED": "7"}, {"BRIDGE_SEED": "7", "RANK": "1"}, {"BRIDGE_SEED": "8", "RANK": "3"}):
        script = ("import torch\nfrom bridge.trainers import loopback\nplain = torch.cuda.manual_seed\nloopback.seed()\n"
                  "print(torch.initial_seed(), torch.cuda.manual_seed is plain)")
        result = TRAINER.run("-c", script, env={**os.environ, **env})
        assert result.returncode == 0, result.stderr
        drawn[tuple(env.values())] = result.stdout.split()
    default, *own = drawn.values()
    assert default[1] == "True" and int(default[0]) > 100
    assert own == [[str(7 << 20), "False"], [str((7 << 20) + 1), "False"], [str((8 << 20) + 3), "False"]]
