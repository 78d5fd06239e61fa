"""The actor's and the critic's packed forwards against verl's padded ones, in float32."""

from door import run_python

# Rows as verl's rollout makes them: prompts padded on the left, answers on the right; one of each has no padding.
AGAINST_VERL = """
import torch
from types import SimpleNamespace
from bridge import on_cpu, packed_ppo
on_cpu.setup()
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification
from verl.utils.torch_functional import entropy_from_logits
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.critic.dp_critic import DataParallelPPOCritic
packed_ppo.apply()
torch.manual_seed(0)
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
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
model = LlamaForCausalLM(config)
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
model = LlamaForTokenClassification(config)
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
from bridge import packed_ppo
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
