"""[image, GPU] What bounds generation: seconds a batch, how much of them the GPU works, and which Python takes the rest.

One way of running vLLM a call, opened as the tuned profile opens it, on prompts of GSM8K:
    python tests/gpu/profile_generation.py MODEL_FOLDER .../data/gsm8k/train.parquet out.json [--steps 16] [--logprobs] [--plain]
--steps above 1 takes vLLM's older engine (V0), the only one with multi-step scheduling. Prints a table, writes the same as JSON.
"""

import argparse
import cProfile
import json
import os
import pstats
import time
from pathlib import Path

ROWS, TOKENS, REPEATS = 256, 256, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=1, help="decoding steps between two turns of the scheduler")
    parser.add_argument("--logprobs", action="store_true", help="collect the sampled tokens' log-probabilities, as verl does")
    parser.add_argument("--plain", action="store_true",
                        help="opened as verl opens it: prefix cache, no gc.freeze, tokens looked at step by step")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs, as the tutorial")
    arguments = parser.parse_args()
    # What torchrun or Ray would say to the only process.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29555",
                      BRIDGE_MODEL_DIR=str(arguments.model))
    import pyarrow.parquet
    import torch
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    from bridge.trainers import speedups

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = pyarrow.parquet.read_table(arguments.data, columns=["prompt"]).slice(0, ROWS).to_pylist()
    prompts = [{"prompt_token_ids": tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)} for row in rows]
    extra = {"num_scheduler_steps": arguments.steps, "multi_step_stream_outputs": False} if arguments.steps > 1 else {}
    if not arguments.eager:
        extra["compilation_config"] = {"cudagraph_capture_sizes": [8, 16, 32, 64, 128, 192, 256]}
    started = time.perf_counter()
    engine = (LLM if arguments.plain else speedups.open_vllm)(
        model=str(arguments.model), enable_sleep_mode=True, distributed_executor_backend="external_launcher",
        dtype="bfloat16", enforce_eager=arguments.eager, gpu_memory_utilization=0.3, max_model_len=768,
        max_num_batched_tokens=8192, enable_chunked_prefill=arguments.steps == 1, enable_prefix_caching=True,
        disable_custom_all_reduce=True, disable_log_stats=True, seed=0, **extra)
    result = {"start_seconds": time.perf_counter() - started, "steps": arguments.steps, "logprobs": arguments.logprobs,
              "plain": arguments.plain, "eager": arguments.eager, "gpu": torch.cuda.get_device_name(), "rows": ROWS}
    sampling = SamplingParams(max_tokens=TOKENS, temperature=1.0, detokenize=False,
                              logprobs=0 if arguments.logprobs else None)

    def generate() -> tuple[float, int]:
        """Seconds and tokens of one batch; from a fresh prefix cache, as after every update of the weights."""
        engine.sleep(level=1)
        engine.wake_up()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begun, sum(len(output.outputs[0].token_ids) for output in outputs)

    def greedy() -> list[list[int]]:
        outputs = engine.generate(prompts[:32], SamplingParams(max_tokens=32, temperature=0.0, detokenize=False), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    # Sleeping empties the cache of prompts' keys and values: an answer made from what was left of it would be another one.
    before = greedy()
    generate()
    result["same_after_sleeping"] = sum(one == other for one, other in zip(before, greedy(), strict=True)) / len(before)
    timed = [generate() for _ in range(REPEATS)]
    result["seconds"], result["tokens"] = [seconds for seconds, _ in timed], [tokens for _, tokens in timed]
    begun = time.perf_counter()
    engine.sleep(level=1)
    engine.wake_up()
    torch.cuda.synchronize()
    result["sleep_and_wake_seconds"] = time.perf_counter() - begun

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        result["seconds_traced"], _ = generate()
    kernels = sorted(((event.self_device_time_total / 1e6, event.count, event.key) for event in trace.key_averages()),
                     reverse=True)
    result["gpu_busy_seconds"] = sum(seconds for seconds, _, _ in kernels)
    result["kernels"] = kernels[:20]
    profile = cProfile.Profile()
    profile.enable()
    result["seconds_profiled"], _ = generate()
    profile.disable()
    functions = sorted(((spent, calls, f"{Path(file).name}:{line} {name}") for (file, line, name), (_, calls, spent, _, _)
                        in pstats.Stats(profile).stats.items()), reverse=True)
    result["python"] = functions[:30]

    arguments.output.write_text(json.dumps(result, indent=1))
    for key in ("start_seconds", "seconds", "tokens", "same_after_sleeping", "sleep_and_wake_seconds", "gpu_busy_seconds",
                "seconds_traced"):
        print(f"{key:<24}{result[key]}")
    for title in ("kernels", "python"):
        print(title)
        for seconds, count, name in result[title]:
            print(f"  {seconds:8.3f} s {count:>8} x {name[:110]}")


if __name__ == "__main__":
    main()
