"""What the tuned profile changes inside the trainer's processes. The kernels need a GPU; that they are put in place does not."""

from door import run_python


def test_without_a_gpu_nothing_is_changed():
    script = "import torch; before = torch.optim.AdamW; import bridge.trainers.speedups; print(torch.optim.AdamW is before)"
    assert run_python(script) == "True"


# Llamas in FSDP1 as verl's critic has them. Without Inductor's kernels, which take a minute of C++ here: what Dynamo and autograd
# make of the layers is the same.
WRAPPED = """
import functools, tempfile, torch
from torch._dynamo.utils import counters
from torch.distributed import FileStore, HashStore, all_reduce, init_process_group
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from bridge.trainers import speedups

config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)

def wrapped(kind, **options):
    torch.manual_seed(1)
    wrap = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    return FullyShardedDataParallel(kind(config), auto_wrap_policy=wrap, use_orig_params=False, device_id=torch.device("cpu"),
                                    **options)

def compile_layers():
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    speedups.compile_layers(config)
"""


def test_layers_are_compiled_once_for_actor_and_critic_and_compute_the_same():
    assert run_python(WRAPPED + """
init_process_group("gloo", rank=0, world_size=1, store=HashStore())

def computed():
    found = []
    for kind in LlamaForCausalLM, LlamaForTokenClassification:
        model = wrapped(kind)
        for tokens in 7, 9, 11:
            ids = torch.arange(tokens)[None]
            with torch.no_grad():
                found.append(model(input_ids=ids, use_cache=False).logits)
            logits = model(input_ids=ids, use_cache=False).logits
            logits.square().sum().backward()
            found += [logits.detach(), *(part.grad.clone() for part in model.parameters())]
            model.zero_grad()
    return found

before = computed()
compile_layers()
for one, other in zip(before, computed(), strict=True):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
print(counters["stats"]["unique_graphs"] <= 4, dict(counters["graph_break"]), len(before))
""") == "True {} 30"


def test_layers_whose_weights_come_and_go_compute_the_same():
    # Two ranks, each with half of every weight: gathered for a forward, given back, and gathered again for the backward.
    assert run_python(WRAPPED + """
def train(rank, compiled, folder):
    init_process_group("gloo", rank=rank, world_size=2, store=FileStore(f"{folder}/store-{compiled}", 2))

    def reduce_scatter(output, whole, **_options):
        # gloo has none.
        all_reduce(whole)
        output.copy_(whole.chunk(2)[rank])

    torch.distributed.reduce_scatter_tensor = reduce_scatter
    if compiled:
        compile_layers()
    model, found = wrapped(LlamaForCausalLM), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for tokens in 7, 9, 11:
        ids = torch.arange(tokens)[None] + rank
        with torch.no_grad():
            found.append(model(input_ids=ids, use_cache=False).logits)
        for micro_batch in ids, ids.roll(1):
            model(input_ids=micro_batch, use_cache=False).logits.square().sum().backward()
        found += [model.clip_grad_norm_(1.0), *(part.grad.clone() for part in model.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    assert not compiled or counters["stats"]["unique_graphs"] and not counters["graph_break"]
    torch.save(found, f"{folder}/{rank}-{compiled}.pt")

with tempfile.TemporaryDirectory() as folder:
    for compiled in False, True:
        torch.multiprocessing.start_processes(train, (compiled, folder), nprocs=2, start_method="fork")
    for rank in 0, 1:
        plain, found = (torch.load(f"{folder}/{rank}-{compiled}.pt") for compiled in (False, True))
        for one, other in zip(plain, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
print(len(plain))
""") == "15"


def test_a_layer_can_be_compiled_anew_between_micro_batches():
    # In bfloat16: FSDP's gradient of the micro batch before is float32 then, and the weights in a forward are not.
    assert run_python(WRAPPED + """
init_process_group("gloo", rank=0, world_size=1, store=HashStore())
compile_layers()
model, norms = wrapped(LlamaForCausalLM, mixed_precision=MixedPrecision(torch.bfloat16, torch.float32, torch.float32)), []
for tokens in 7, 9, 11:
    model(input_ids=torch.arange(tokens)[None], use_cache=False).logits.float().square().sum().backward()
    norms.append(model.model.layers[0]._flat_param.grad.norm().item())
print(norms == sorted(set(norms)), model.model.layers[0]._flat_param.grad.dtype)
""") == "True torch.float32"


def test_a_model_that_is_not_of_transformers_is_not_compiled_and_that_is_said():
    assert run_python("""
import contextlib, io, torch
from transformers import PretrainedConfig
from bridge.trainers import speedups
torch.compile = None
with contextlib.redirect_stderr(io.StringIO()) as said:
    speedups.compile_layers(type("Own", (PretrainedConfig,), {"model_type": "own"})())
print(said.getvalue().strip())
""") == "bridge: own: no language model of transformers' own: its layers are not compiled"


def test_layers_that_are_another_modules_are_left_as_they_are():
    assert run_python("""
import torch
from transformers import Gemma3TextConfig
from transformers.models.gemma3 import modeling_gemma3
from bridge.trainers import speedups
compiled = []
torch.compile = lambda function: compiled.append(function) or function
speedups.compile_layers(Gemma3TextConfig())
print(compiled == [modeling_gemma3.Gemma3DecoderLayer.forward])
""") == "True"


def test_adamw_is_fused_unless_the_caller_chooses():
    assert run_python("""
import torch
from bridge.trainers import speedups
speedups.fuse_adamw()
layer = torch.nn.Linear(2, 2)
print([torch.optim.AdamW(layer.parameters(), lr=1, **given).defaults["fused"] for given in ({}, {"fused": False})])
""") == "[True, False]"


def test_verl_reaches_the_weights_behind_vllms_multi_step_runner():
    assert run_python("""
from types import SimpleNamespace
from bridge.trainers import speedups
speedups.replace_engine()
from vllm.worker.multi_step_model_runner import MultiStepModelRunner
runner = object.__new__(MultiStepModelRunner)
runner._base_model_runner = SimpleNamespace(model="weights")
print(runner.model)
""") == "weights"


def test_verl_gets_a_vllm_that_keeps_no_prompts_of_the_weights_before():
    # The engine itself needs a GPU.
    assert run_python("""
import gc, torch, vllm
from bridge.trainers import speedups
from verl.workers.rollout.vllm_rollout import vllm_rollout_spmd
# Frozen before it is opened, too: PyTorch collects before it records each CUDA graph.
vllm.LLM = lambda **options: {**options, "frozen": gc.get_freeze_count() > 10000}
before = torch.cuda.empty_cache
speedups.replace_engine()
asleep = vllm_rollout_spmd.LLM(seed=3, enable_prefix_caching=True, enable_sleep_mode=True)
kept = torch.cuda.empty_cache is before
awake = vllm_rollout_spmd.LLM(enable_prefix_caching=True, enable_sleep_mode=False)
print(asleep, awake["enable_prefix_caching"], kept, torch.cuda.empty_cache is before, gc.get_freeze_count() > 10000)
""") == "{'seed': 3, 'enable_prefix_caching': False, 'enable_sleep_mode': True, 'frozen': True} False True False True"


def test_vllm_decodes_with_the_flash_attention_that_is_fastest_at_it_unless_the_user_chooses():
    assert run_python("""
import json, os, tempfile, vllm
from pathlib import Path
from bridge.trainers import speedups
folder = tempfile.TemporaryDirectory()
os.environ["BRIDGE_MODEL_DIR"] = folder.name
def model(**config):
    Path(folder.name, "config.json").write_text(json.dumps({"model_type": "llama", **config}))
model(hidden_size=2048, num_attention_heads=32)
# Which flash attention vLLM would take on a GPU that has both.
vllm.LLM = lambda **options: vllm.envs.VLLM_FLASH_ATTN_VERSION
seen = []
for options in {}, {"num_scheduler_steps": 16}:
    os.environ.pop("VLLM_FLASH_ATTN_VERSION", None)
    seen.append(speedups.make_engine(enable_sleep_mode=True, **options))
os.environ["VLLM_FLASH_ATTN_VERSION"] = "3"
seen.append(speedups.make_engine(enable_sleep_mode=True, num_scheduler_steps=16))
del os.environ["VLLM_FLASH_ATTN_VERSION"]
for config in {"hidden_size": 2048, "num_attention_heads": 32, "head_dim": 128}, {"model_type": "gpt2", "n_head": 6}:
    model(**config)
    seen.append(speedups.make_engine(enable_sleep_mode=True, num_scheduler_steps=16))
print(seen)
""") == "[None, 2, 3, None, None]"


def test_vllm_sees_the_same_of_a_model_without_a_second_python():
    assert run_python("""
import subprocess
from bridge.trainers import speedups
from vllm.model_executor.models import registry
llama = registry.ModelRegistry.models["LlamaForCausalLM"]
seen_by_another = llama.inspect_model_cls()
speedups.inspect_models_in_process()
def started(*_args, **_options):
    raise AssertionError("a process was started")
subprocess.run = subprocess.Popen = started
print(llama.inspect_model_cls() == seen_by_another)
""") == "True"
