"""Turns of vLLM's multi-step decoding taken as a whole, against vLLM's own bookkeeping: its scheduler, runner and engine, without
the model. Its tokens are drawn by chance, each by its request and its place, so that both ways see the same."""

import json

from door import run_python

# Both ways run the same loop, and tell what every sequence is after each turn.
DECODE = """
import json, random, torch
from types import SimpleNamespace
from vllm.config import CacheConfig, SchedulerConfig
from vllm.core.scheduler import Scheduler
from vllm.engine.llm_engine import LLMEngine, SchedulerContext
from vllm.engine.output_processor.multi_step import MultiStepOutputProcessor
from vllm.engine.output_processor.stop_checker import StopChecker
from vllm.model_executor.layers.sampler import SamplerOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.sequence import Sequence, SequenceGroup
from vllm.worker.multi_step_model_runner import ModelOutput, MultiStepModelRunner, PythonizationCache, StatefulModelInput

EOS, STOP, STEPS, MODEL_LENGTH, VOCABULARY = 0, 1, 16, 120, 60
ready = SimpleNamespace(synchronize=lambda: None, query=lambda: True)

def engine_with(params, rows, at_once, blocks, too_long, late):
    cache = CacheConfig(block_size=16, gpu_memory_utilization=1, swap_space=0, cache_dtype="auto")
    cache.num_gpu_blocks, cache.num_cpu_blocks = blocks, 0
    engine = object.__new__(LLMEngine)
    engine.scheduler_config = SchedulerConfig("generate", max_num_batched_tokens=64 * rows, max_num_seqs=at_once,
                                              max_model_len=MODEL_LENGTH, num_lookahead_slots=STEPS - 1,
                                              num_scheduler_steps=STEPS)
    engine.scheduler = [Scheduler(engine.scheduler_config, cache, None)]
    engine.model_config, engine.speculative_config = SimpleNamespace(runner_type="generate"), None
    engine.seq_id_to_seq_group, engine.use_cached_outputs, engine.process_request_outputs_callback = {}, False, None
    engine.log_stats, engine.tracer = False, None
    tokenizer = lambda _seq: SimpleNamespace(eos_token_id=EOS)
    engine.output_processor = MultiStepOutputProcessor(None, engine.scheduler, None, tokenizer,
                                                       StopChecker(MODEL_LENGTH, tokenizer))
    groups = []
    for row in range(rows):
        length = MODEL_LENGTH + 1 if row in too_long else 2 + row % 50
        sequence = Sequence(row, {"type": "token", "prompt_token_ids": list(range(2, 2 + length))}, 16, eos_token_id=EOS)
        groups.append(SequenceGroup(str(row), [sequence], 0.0, sampling_params=params.clone()))
        if row not in late:
            engine.scheduler[0].add_seq_group(groups[-1])
    runner = object.__new__(MultiStepModelRunner)
    runner._copy_stream, runner.pythonization_cache = None, PythonizationCache()
    runner.pinned_sampled_token_ids = torch.zeros(rows, 1, dtype=torch.long)
    return engine, runner, groups

def sampled(group, steps):
    begin = next(iter(group.seq_data.values())).get_output_len()
    return [random.Random(int(group.request_id) * 1000 + begin + step).randrange(VOCABULARY) for step in range(steps)]

def state(group):
    sequence = group.first_seq
    data = sequence.data
    return [list(data.get_token_ids()), list(data._output_token_ids), list(data._new_appended_tokens),
            data.get_num_computed_tokens(), data.stage.name, sequence.status.name, sequence.stop_reason,
            group.is_finished() and group.metrics.first_token_time is not None]

def decode(params, rows=40, at_once=40, blocks=2560, too_long=(), aborted=(), late=()):
    engine, runner, groups = engine_with(params, rows, at_once, blocks, too_long, late)
    scheduler = engine.scheduler[0]
    found, after, preempted = {}, [], 0
    while scheduler.has_unfinished_seqs():
        if len(after) == 2:
            for row in late:
                scheduler.add_seq_group(groups[row])
        metadata, scheduled, _ = scheduler.schedule()
        preempted += scheduled.preempted
        steps = scheduled.num_lookahead_slots + 1
        prompts = sum(group.is_prompt for group in metadata)
        asked = [SimpleNamespace(sampling_params=group.sampling_params, is_prompt=group.is_prompt, seq_ids=list(group.seq_data),
                                 sample_indices=[number]) for number, group in enumerate(metadata)]
        sampling = SimpleNamespace(seq_groups=asked, skip_sampler_cpu_output=True)
        tokens = torch.tensor([sampled(group, steps) for group in metadata])
        turn = StatefulModelInput(frozen_model_input=SimpleNamespace(async_callback=None, sampling_metadata=sampling),
                                  num_queries=len(metadata), num_single_step_prefills=prompts)
        for step in range(steps):
            turn.cached_outputs.append(ModelOutput(SamplerOutput([]), ready, tokens[:, step:step + 1].clone(), False,
                                                   torch.zeros(1), runner.pythonization_cache))
            # What the runner does after each step.
            for output in turn.cached_outputs:
                output.maybe_pythonize(turn, None, runner.pinned_sampled_token_ids)
        # A gigabyte and more on a GPU.
        assert all(output.logprobs is None for output in turn.cached_outputs)
        if len(after) == 3:
            for request in aborted:
                scheduler.abort_seq_group(request)
        outputs = runner._final_process_outputs(turn, None)
        context = SchedulerContext()
        context.append_output(outputs, metadata, scheduled, is_async=False, is_last_step=True, is_first_step_output=steps == 1)
        engine._process_model_outputs(ctx=context)
        runner.pythonization_cache.reset()
        assert not context.output_queue
        for output in context.request_outputs:
            answer = output.outputs[0]
            found.setdefault(output.request_id, []).append([list(answer.token_ids), answer.finish_reason, answer.stop_reason])
        after.append([state(group) for group in groups])
    return {"answers": found, "after each turn": after, "preempted": preempted,
            "blocks freed": scheduler.block_manager.get_num_free_gpu_blocks() == blocks}
"""

TWICE = DECODE + """
from bridge.trainers import multi_step

def asking(**options):
    return SamplingParams(**{"temperature": 1.0, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY, **options})

CASES = {
    "lengths": (dict(max_tokens=50), {}),
    "stops": (dict(max_tokens=50, stop_token_ids=[STOP]), {}),
    "no end of sequence": (dict(max_tokens=50, ignore_eos=True), {}),
    "the model's length": (dict(max_tokens=500, ignore_eos=True), {}),
    "few at once, too long prompts": (dict(max_tokens=50), {"at_once": 7, "too_long": (0, 20, 39)}),
    "a too long prompt while others decode": (dict(max_tokens=90, ignore_eos=True), {"too_long": (39,), "late": (39,)}),
    "few blocks": (dict(max_tokens=90, ignore_eos=True), {"blocks": 120}),
    "aborted": (dict(max_tokens=90, ignore_eos=True), {"aborted": ("3", "17")}),
    # These go vLLM's own way: a single token comes with the prompt, the others ask for more.
    "at once": (dict(max_tokens=1), {}),
    "a least number": (dict(max_tokens=50, min_tokens=20), {}),
    "as it goes": (dict(max_tokens=50, output_kind=RequestOutputKind.CUMULATIVE), {}),
}
vllms = {name: decode(asking(**options), **how) for name, (options, how) in CASES.items()}
whole = []
multi_step.apply()
process_turn = multi_step.process_turn
multi_step.process_turn = lambda *arguments: (whole.append(name), process_turn(*arguments))
ours = {}
for name, (options, how) in CASES.items():
    ours[name] = decode(asking(**options), **how)
print(json.dumps([vllms, ours, sorted(set(whole))]))
"""


def test_after_each_turn_everything_is_as_vllm_has_it():
    vllms, ours, taken_whole = json.loads(run_python(TWICE))
    for name, case in vllms.items():
        assert ours[name] == case, name
    assert taken_whole == sorted(set(vllms) - {"at once", "a least number", "as it goes"})
    # The cases are what they are called.
    ends = {name: {tuple(answers[-1][1:]) for answers in case["answers"].values()} for name, case in vllms.items()}
    assert ends["stops"] == {("stop", None), ("stop", 1), ("length", None)}
    assert ends["the model's length"] == {("length", None)}
    assert [answers[-1][0] for row, answers in vllms["few at once, too long prompts"]["answers"].items()
            if row in ("0", "20", "39")] == [[], [], []]
    assert vllms["few blocks"]["preempted"] > 0
    assert not {"3", "17"} & vllms["aborted"]["answers"].keys()
    assert max(len(answers) for answers in vllms["as it goes"]["answers"].values()) > 1
    assert all(len(case["answers"]) == (38 if name == "aborted" else 40) and case["blocks freed"]
               for name, case in vllms.items())


def test_what_asks_for_more_than_an_answers_tokens_goes_vllms_own_way():
    assert run_python(DECODE + """
from bridge.trainers.multi_step import apply, asks_for_tokens_only
plain = dict(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, max_tokens=9)
more = [dict(logprobs=0), dict(prompt_logprobs=0), dict(detokenize=True), dict(detokenize=True, stop=["."]), dict(min_tokens=1),
        dict(max_tokens=None), dict(logits_processors=[len]), dict(output_kind=RequestOutputKind.CUMULATIVE)]
asked = [asks_for_tokens_only(SamplingParams(**{**plain, **options})) for options in ({}, *more)]
# And a turn in which vLLM looks at each step by itself.
apply()
group = SimpleNamespace(sampling_params=SamplingParams(**plain), is_prompt=False, seq_ids=[0], sample_indices=[0])
sampling = SimpleNamespace(seq_groups=[group], skip_sampler_cpu_output=True)
frozen = SimpleNamespace(async_callback=print, sampling_metadata=sampling)
turn = StatefulModelInput(frozen_model_input=frozen, num_queries=1, num_single_step_prefills=0)
output = ModelOutput(SamplerOutput([]), ready, torch.tensor([[7]]), False, None, PythonizationCache())
output.maybe_pythonize(turn, None, torch.zeros(1, 1, dtype=torch.long))
print(asked, output.pythonized)
""") == f"{[True] + [False] * 8} True"
