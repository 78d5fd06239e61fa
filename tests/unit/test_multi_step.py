"""Turns of vLLM's multi-step decoding taken as a whole, against vLLM's own bookkeeping: its scheduler, runner and engine, without
the model, whose tokens are drawn by chance."""

import json

from door import run_python

# Both ways run the same loop. Beside each answer: why it ended, and how many turns the whole batch took.
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

EOS, STOP, STEPS, MODEL_LENGTH = 0, 1, 16, 120
ready = SimpleNamespace(synchronize=lambda: None, query=lambda: True)

def engine_with(params, rows):
    cache = CacheConfig(block_size=16, gpu_memory_utilization=1, swap_space=0, cache_dtype="auto")
    cache.num_gpu_blocks, cache.num_cpu_blocks = 64 * rows, 0
    engine = object.__new__(LLMEngine)
    engine.scheduler_config = SchedulerConfig("generate", max_num_batched_tokens=64 * rows,
                                              max_num_seqs=rows, max_model_len=MODEL_LENGTH, num_lookahead_slots=STEPS - 1,
                                              num_scheduler_steps=STEPS)
    engine.scheduler = [Scheduler(engine.scheduler_config, cache, None)]
    engine.model_config, engine.speculative_config = SimpleNamespace(runner_type="generate"), None
    engine.seq_id_to_seq_group, engine.use_cached_outputs, engine.process_request_outputs_callback = {}, False, None
    engine.log_stats, engine.tracer = False, None
    tokenizer = lambda _seq: SimpleNamespace(eos_token_id=EOS)
    engine.output_processor = MultiStepOutputProcessor(None, engine.scheduler, None, tokenizer,
                                                       StopChecker(MODEL_LENGTH, tokenizer))
    for row in range(rows):
        sequence = Sequence(row, {"type": "token", "prompt_token_ids": list(range(2, 4 + row % 50))}, 16, eos_token_id=EOS)
        engine.scheduler[0].add_seq_group(SequenceGroup(str(row), [sequence], 0.0, sampling_params=params.clone()))
    runner = object.__new__(MultiStepModelRunner)
    runner._copy_stream, runner.pythonization_cache = None, PythonizationCache()
    runner.pinned_sampled_token_ids = torch.zeros(rows, 1, dtype=torch.long)
    return engine, runner

def decode(params, rows=40, vocabulary=60):
    engine, runner = engine_with(params, rows)
    found, turns = {}, 0
    streams = {str(row): random.Random(row) for row in range(rows)}
    while engine.scheduler[0].has_unfinished_seqs():
        metadata, scheduled, _ = engine.scheduler[0].schedule()
        steps = scheduled.num_lookahead_slots + 1
        prompts = sum(group.is_prompt for group in metadata)
        groups = [SimpleNamespace(sampling_params=group.sampling_params, is_prompt=group.is_prompt, seq_ids=list(group.seq_data),
                                  sample_indices=[number]) for number, group in enumerate(metadata)]
        sampling = SimpleNamespace(seq_groups=groups, skip_sampler_cpu_output=True)
        tokens = torch.tensor([[streams[group.request_id].randrange(vocabulary) for _ in range(steps)] for group in metadata])
        turn = StatefulModelInput(frozen_model_input=SimpleNamespace(async_callback=None, sampling_metadata=sampling),
                                  num_queries=len(metadata), num_single_step_prefills=prompts)
        turn.cached_outputs = [ModelOutput(SamplerOutput([]), ready, tokens[:, step:step + 1].clone(), False, torch.zeros(1),
                                           runner.pythonization_cache) for step in range(steps)]
        # What the runner does after each step but the last, and then at the end.
        for output in turn.cached_outputs[:-1]:
            output.maybe_pythonize(turn, None, runner.pinned_sampled_token_ids)
        held = sum(output.logprobs is not None for output in turn.cached_outputs[:-1])
        assert not held, held
        outputs = runner._final_process_outputs(turn, None)
        context = SchedulerContext()
        context.append_output(outputs, metadata, scheduled, is_async=False, is_last_step=True, is_first_step_output=steps == 1)
        engine._process_model_outputs(ctx=context)
        runner.pythonization_cache.reset()
        assert not context.output_queue
        turns += 1
        for output in context.request_outputs:
            if output.finished:
                answer = output.outputs[0]
                found[output.request_id] = [list(answer.token_ids), answer.finish_reason, answer.stop_reason]
    free = engine.scheduler[0].block_manager.get_num_free_gpu_blocks()
    return {"answers": found, "turns": turns, "blocks freed": free == 64 * rows}
"""

TWICE = DECODE + """
from bridge import multi_step

def both(**options):
    return decode(SamplingParams(temperature=1.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **options))

CASES = {"lengths": dict(max_tokens=50), "stops": dict(max_tokens=50, stop_token_ids=[STOP]),
         "no end of sequence": dict(max_tokens=50, ignore_eos=True), "the model's length": dict(max_tokens=500, ignore_eos=True),
         "at once": dict(max_tokens=1), "a least number": dict(max_tokens=50, min_tokens=20)}
vllms = {name: both(**options) for name, options in CASES.items()}
turns = []
multi_step.apply()
process_turn = multi_step.process_turn
multi_step.process_turn = lambda *arguments: (turns.append(name), process_turn(*arguments))
ours = {}
for name, options in CASES.items():
    ours[name] = both(**options)
print(json.dumps([vllms, ours, sorted(set(turns))]))
"""


def test_answers_their_ends_and_the_number_of_turns_are_vllms():
    vllms, ours, taken_whole = json.loads(run_python(TWICE))
    assert ours == vllms
    # A case that goes vllm's own way would prove nothing, and one is meant to; a single token comes with the prompt.
    assert taken_whole == ["lengths", "no end of sequence", "stops", "the model's length"]
    ends = {name: {tuple(answer[1:]) for answer in case["answers"].values()} for name, case in vllms.items()}
    assert ends["stops"] == {("stop", None), ("stop", 1), ("length", None)}
    assert ends["the model's length"] == {("length", None)}
    assert len({len(answer[0]) for answer in vllms["the model's length"]["answers"].values()}) == 40
    assert all(len(case["answers"]) == 40 and case["blocks freed"] for case in vllms.values())
