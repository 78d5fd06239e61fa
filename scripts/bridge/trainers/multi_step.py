"""[image] vLLM's multi-step decoding with the tokens of a turn taken together. Part of bridge.trainers.speedups.

vLLM 0.8.5 decodes several steps between two turns of its scheduler, but makes Python objects of every token of every step, and
looks at each by itself. Only a fast processor does that beside the GPU's work: on one H100's host generation took 3.0 s with
it and 1.7 s without (docs/benchmarks.md). Here the tokens of a turn are copied once, and each answer gets its own in one
piece. Which tokens there are, where an answer ends and why is vLLM's.

Needs `disable_async_output_proc`: with it vLLM does its bookkeeping at the end of a turn. Requests that ask for more than the
tokens of a whole answer (log-probabilities, text, stop strings, a least number of tokens) and turns with prompts in them go
vLLM's own way. What the sampler itself takes from the tokens before (penalties, a least number) it knows up to the turn only.
"""

import time
from dataclasses import dataclass

import torch


@dataclass
class Turn:
    """What a turn has sampled: tokens [answers][steps]."""

    tokens: list[list[int]]


def asks_for_tokens_only(params) -> bool:
    """Whether nothing but the tokens of a whole answer, its greatest length and its last token matters."""
    from vllm.sampling_params import RequestOutputKind

    return (params.output_kind == RequestOutputKind.FINAL_ONLY and params.logprobs is None and params.prompt_logprobs is None
            and not params.detokenize and not params.stop and not params.min_tokens and not params.logits_processors
            and params.max_tokens is not None)


def kept_length(tokens: list[int], seq, params, max_model_len: int) -> int:
    """How many of a turn's tokens belong to the answer: none after its end."""
    stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else {seq.eos_token_id})
    ended = next((number for number, token in enumerate(tokens, 1) if token in stops), len(tokens))
    # vLLM ends a sequence with the first token that is one too many for the model.
    return min(ended, params.max_tokens - seq.get_output_len(), max_model_len + 1 - seq.get_len())


def append(tokens: list[int], seq, params, stop_checker) -> None:
    """Give a sequence its tokens of a turn, and let vLLM say whether it has ended."""
    taken = tokens[:kept_length(tokens, seq, params, stop_checker._get_max_model_len(None))]
    data = seq.data
    for ids in (data._output_token_ids, data._new_appended_tokens, data._cached_all_token_ids):
        ids.extend(taken)
    data.update_num_computed_tokens(len(taken))
    # Only the last one taken can be an end.
    stop_checker.maybe_stop_sequence(seq, 0, params)


def process_turn(engine, ctx) -> None:
    """What vLLM's LLMEngine._process_model_outputs does, for a whole turn."""
    from vllm.outputs import RequestOutputFactory

    turn = ctx.output_queue.popleft()
    now, done = time.time(), []
    for tokens, scheduled in zip(turn.outputs[0].tokens, turn.scheduler_outputs.scheduled_seq_groups, strict=True):
        group = scheduled.seq_group
        if group.is_finished():
            continue
        append(tokens, group.first_seq, group.sampling_params, engine.output_processor.stop_checker)
        if group.is_finished():
            group.maybe_set_first_token_time(now)
            group.set_last_token_time(now)
            done.append(group)
    for group in [*done, *turn.scheduler_outputs.ignored_seq_groups]:
        if output := RequestOutputFactory.create(group, engine.seq_id_to_seq_group, use_cache=engine.use_cached_outputs):
            ctx.request_outputs.append(output)
    if done:
        for scheduler in engine.scheduler:
            scheduler.free_finished_seq_groups()


def apply() -> None:
    """Let vLLM's multi-step runner and engine work so where they can."""
    from vllm.engine.llm_engine import LLMEngine
    from vllm.worker.multi_step_model_runner import ModelOutput, MultiStepModelRunner

    vllms_maybe_pythonize = ModelOutput.maybe_pythonize
    vllms_final, vllms_process = MultiStepModelRunner._final_process_outputs, LLMEngine._process_model_outputs

    def batched(turn) -> bool:
        # Asked at each step, and the same for all of a turn.
        if not hasattr(turn, "batched"):
            frozen = turn.frozen_model_input
            turn.batched = (
                frozen.async_callback is None and not turn.num_single_step_prefills and
                all(asks_for_tokens_only(group.sampling_params) for group in frozen.sampling_metadata.seq_groups))
        return turn.batched

    def maybe_pythonize(output, model_input, *rest):
        if not batched(model_input):
            vllms_maybe_pythonize(output, model_input, *rest)
        else:
            # Those of the whole vocabulary, which nobody asks for: 131 MB a step for 256 answers of Llama.
            output.logprobs = None

    def final_process_outputs(runner, model_input, callback):
        if not batched(model_input):
            return vllms_final(runner, model_input, callback)
        # Waits until the GPU is done.
        return [Turn(torch.cat([output.sampled_token_ids for output in model_input.cached_outputs], dim=1).tolist())]

    def process_model_outputs(engine, ctx, request_id=None):
        if ctx.output_queue and any(isinstance(output, Turn) for output in ctx.output_queue[0].outputs):
            process_turn(engine, ctx)
        else:
            vllms_process(engine, ctx, request_id)

    ModelOutput.maybe_pythonize = maybe_pythonize
    MultiStepModelRunner._final_process_outputs = final_process_outputs
    LLMEngine._process_model_outputs = process_model_outputs
