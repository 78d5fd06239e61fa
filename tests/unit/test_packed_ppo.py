"""The actor's and the critic's packed forwards against verl's padded ones, in float32."""

from door import run_python

# Rows as verl's rollout makes them: prompts padded on the left, answers on the right; one of each has no padding.
AGAINST_VERL = """
import torch
from types import SimpleNamespace
from bridge.trainers import on_cpu, packed_ppo
on_cpu.setup()
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification
from verl.utils.torch_functional import entropy_from_logits
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.critic.dp_critic import DataParallelPPOCritic
verls_updates = DataParallelPPOActor.update_policy, DataParallelPPOCritic.update_critic
packed_ppo.apply()
torch.manual_seed(0)
llama = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    vocab_size=50, num_labels=1, classifier_dropout=0.0, attn_implementation="sdpa")
PROMPT, ANSWER = 6, 5
mask = torch.tensor([[0] * (PROMPT - prompt) + [1] * (prompt + answer) + [0] * (ANSWER - answer)
                     for prompt, answer in ((2, 5), (6, 1), (6, 5), (3, 2), (4, 0))])
ids = torch.randint(50, mask.shape)
rows = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "responses": ids[:, PROMPT:]}
answered = mask[:, PROMPT:].bool()
weights = torch.randn(answered.shape)

def equal(ours, verls, rtol=1e-4):
    torch.testing.assert_close(ours, verls, rtol=rtol, atol=rtol / 10)

def forward_and_gradients(worker, model, usual, compute):
    worker.use_remove_padding = usual
    model.zero_grad()
    results = compute()
    sum((result * weights)[answered].sum() for result in results if result is not None).backward()
    return results, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
"""

ACTOR = AGAINST_VERL + """
model = LlamaForCausalLM(llama)
# Log-probabilities that differ, as a trained model's do.
model.lm_head.weight.data *= 30
computed = []
model.register_forward_hook(lambda module, inputs, output: computed.append(output.logits.numel() // 50))
actor = SimpleNamespace(actor_module=model, device_name="cpu", config=SimpleNamespace(entropy_checkpointing=False),
                        ulysses_sequence_parallel_size=1, use_ulysses_sp=False, use_fused_kernels=False,
                        compute_entropy_from_logits=entropy_from_logits)
for temperature, calculate_entropy in ((1.0, False), (1.0, True), (0.7, True)):
    ((entropy, log_probs), gradients), ((verls_entropy, verls_log_probs), verls_gradients) = (forward_and_gradients(
        actor, model, usual, lambda: DataParallelPPOActor._forward_micro_batch(
            actor, rows, temperature, calculate_entropy=calculate_entropy)) for usual in (True, False))
    assert log_probs[answered].std() > 1 and not log_probs[~answered].any()
    equal(log_probs[answered], verls_log_probs[answered])
    assert (entropy is None) == (not calculate_entropy) == (verls_entropy is None)
    if calculate_entropy:
        equal(entropy[answered], verls_entropy[answered])
    equal(gradients, verls_gradients, rtol=1e-3)  # sums in another order
print(computed)
"""

CRITIC = AGAINST_VERL + """
model = LlamaForTokenClassification(llama)
model.score.weight.data *= 30
bounds = []
model.base_model.layers[0].self_attn.register_forward_pre_hook(
    lambda module, args, options: bounds.append(options.get("cu_seq_lens_q")), with_kwargs=True)
critic = SimpleNamespace(critic_module=model, device_name="cpu", ulysses_sequence_parallel_size=1)
for checkpointing in (False, True):
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    bounds.clear()
    ((values,), gradients), ((verls_values,), verls_gradients) = (forward_and_gradients(
        critic, model, usual, lambda: [DataParallelPPOCritic._forward_micro_batch(critic, rows)]) for usual in (True, False))
    assert values[answered].std() > 1 and not values[~answered].any()
    equal(values[answered], verls_values[answered])
    equal(gradients, verls_gradients, rtol=1e-3)  # sums in another order
    # Where activations are not kept, the layer is run again for its gradient.
    told = [None if each is None else each.tolist() for each in bounds]
    assert told == [told[0]] * (1 + checkpointing) + [None] * (1 + checkpointing)
print(told[0])
"""


def test_the_actor_computes_what_verls_does_from_the_answers_logits_alone():
    # 13 answer tokens; 5 rows of 11 positions.
    assert run_python(ACTOR) == "[13, 55, 13, 55, 13, 55]"


def test_the_critic_computes_what_verls_does_told_where_rows_begin():
    assert run_python(CRITIC) == "[0, 7, 14, 25, 30, 34]"


FALLBACKS = """
from types import SimpleNamespace
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.critic.dp_critic import DataParallelPPOCritic
from bridge.trainers import packed_ppo
for worker in (DataParallelPPOActor, DataParallelPPOCritic):
    worker._forward_micro_batch = lambda *arguments: "verl's"
packed_ppo.apply()
packed_ppo.forward_answers = packed_ppo.forward_values = lambda *arguments: "ours"

def used(model=None, rows=None, entropy_checkpointing=False, **settings):
    model = SimpleNamespace(**{"_supports_attention_backend": True, **(model or {})})
    settings = {"use_remove_padding": True, "ulysses_sequence_parallel_size": 1, "use_fused_kernels": False, **settings}
    worker = SimpleNamespace(actor_module=model, critic_module=model, **settings,
                             config=SimpleNamespace(entropy_checkpointing=entropy_checkpointing))
    return (DataParallelPPOActor._forward_micro_batch(worker, rows or {}, 1.0),
            DataParallelPPOCritic._forward_micro_batch(worker, rows or {}))

assert used() == ("ours", "ours")
for unusual in (dict(use_remove_padding=False), dict(ulysses_sequence_parallel_size=2), dict(rows={"multi_modal_inputs": 1}),
                dict(model={"_supports_attention_backend": False})):
    assert used(**unusual) == ("verl's", "verl's"), unusual
for actors in (dict(use_fused_kernels=True), dict(entropy_checkpointing=True)):
    assert used(**actors) == ("verl's", "ours"), actors
for critics in (dict(model={"peft_config": 1}), dict(model={"v_head": 1})):
    assert used(**critics) == ("ours", "verl's"), critics
print("as expected")
"""


def test_unusual_models_and_settings_are_left_to_verl():
    assert run_python(FALLBACKS) == "as expected"


# Answers of very different lengths in groups of two rows, the last of one row; two mini batches. Counted in tokens, a long row is
# computed together with a short one of another group.
UPDATES = AGAINST_VERL + """
import copy
import torch.distributed
from omegaconf import OmegaConf
from verl import DataProto
from bridge.compose import compose
torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())

PROMPT, ANSWER = 2, 20
mask = torch.tensor([[1] * (PROMPT + answer) + [0] * (ANSWER - answer) for answer in (20, 18, 1, 3, 2)])
ids, answered = torch.randint(50, mask.shape), mask[:, PROMPT:]
old, advantages = torch.full(answered.shape, -4.0), torch.randn(answered.shape)
names = dict.fromkeys(("WORK_DIR", "BRIDGE_MODEL_DIR", "BRIDGE_STAGE_DIR", "BRIDGE_RUN_NAME", "WANDB_PROJECT"), "")
config = compose("ppo", ["profile/ppo=tuned", "memory/ppo=80gb"], names)

def parameters(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

def updated(part, start, worker, update, use_dynamic_bsz, loss_agg_mode="token-mean"):
    model = copy.deepcopy(start)
    # A step as long as the gradient, which is not clipped.
    settings = OmegaConf.create({**part, "ppo_mini_batch_size": 4, "ppo_micro_batch_size_per_gpu": 2, "grad_clip": 1e9,
                                 "ppo_max_token_len_per_gpu": 30, "use_dynamic_bsz": use_dynamic_bsz,
                                 "loss_agg_mode": loss_agg_mode, "use_remove_padding": True, "use_torch_compile": False})
    worker = worker(settings, model, torch.optim.SGD(model.parameters(), lr=1e-2))
    data = DataProto.from_dict({
        "input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(1) - 1, "responses": ids[:, PROMPT:],
        "response_mask": answered, "old_log_probs": old, "advantages": advantages, "values": torch.zeros_like(advantages),
        "returns": advantages}, meta_info={"temperature": 1.0})
    update(worker, data)
    assert torch.equal(data.batch["response_mask"], answered) and worker.config.loss_agg_mode == loss_agg_mode
    return parameters(model)

for part, model, worker, ours, verls in (
        (config["actor_rollout_ref"]["actor"], LlamaForCausalLM(llama), DataParallelPPOActor, DataParallelPPOActor.update_policy,
         verls_updates[0]),
        (config["critic"], LlamaForTokenClassification(llama), DataParallelPPOCritic, DataParallelPPOCritic.update_critic,
         verls_updates[1])):
    by_rows = updated(part, model, worker, verls, use_dynamic_bsz=False)
    moved = (by_rows - parameters(model)).norm()
    assert moved > 1e-3
    assert torch.equal(updated(part, model, worker, ours, use_dynamic_bsz=False), by_rows)
    assert (updated(part, model, worker, ours, use_dynamic_bsz=True) - by_rows).norm() < 1e-4 * moved
    # verl's own loss, where tokens are counted, is another.
    assert (updated(part, model, worker, verls, use_dynamic_bsz=True) - by_rows).norm() > 0.05 * moved
    # A loss that is no mean over tokens knows no groups.
    asked = dict(use_dynamic_bsz=True, loss_agg_mode="seq-mean-token-sum")
    assert torch.equal(updated(part, model, worker, ours, **asked), updated(part, model, worker, verls, **asked))
# Nor does one that counts tokens for more than its mean.
part = {**config["actor_rollout_ref"]["actor"], "policy_loss": {
    "loss_mode": "clip_cov", "clip_cov_ratio": 0.5, "clip_cov_lb": -9, "clip_cov_ub": 9}}
clipped = []
for update in DataParallelPPOActor.update_policy, verls_updates[0]:
    torch.manual_seed(1)
    clipped.append(updated(part, LlamaForCausalLM(llama), DataParallelPPOActor, update, use_dynamic_bsz=True))
assert torch.equal(*clipped)
print("equal")
"""


def test_an_update_that_counts_tokens_is_that_of_the_groups_of_rows():
    assert run_python(UPDATES) == "equal"
