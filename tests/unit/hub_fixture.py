"""A small chat model's files, and a way to run a stage's program against the stand-in hub."""

import json
import os
import struct
import subprocess
import sys

from door import DOOR, Preloaded

# The beginning of Llama 3.2's chat template, which is what depends on the day.
LLAMA_TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- for message in messages %}{{- message['role'] + ': ' + message['content'] }}{%- endfor %}"""


def safetensors(shapes: dict[str, list[int]]) -> bytes:
    """A file of zeros in bf16."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def model_files(template: str = "{{ messages }}") -> dict[str, bytes]:
    """A model in two parts: 8 x 4 embeddings, tied, and one projection of 4 x 4. 48 parameters."""
    parts = {"model-00001-of-00002.safetensors": {"model.embed_tokens.weight": [8, 4], "lm_head.weight": [8, 4]},
             "model-00002-of-00002.safetensors": {"model.layers.0.q.weight": [4, 4]}}
    weight_map = {name: part for part, shapes in parts.items() for name in shapes}
    return {
        "config.json": json.dumps({"model_type": "llama", "num_attention_heads": 4, "tie_word_embeddings": True}).encode(),
        "tokenizer.json": b"{}",
        "tokenizer_config.json": json.dumps({"chat_template": template, "bos_token": "<s>"}).encode(),
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        **{part: safetensors(shapes) for part, shapes in parts.items()},
    }


def write_files(folder, files: dict[str, bytes]):
    """Write files into a new folder; return it."""
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def run_module(module: str, *arguments, env: dict[str, str], preloaded: Preloaded | None = DOOR) -> subprocess.CompletedProcess:
    """Run a stage's module with nothing of this machine's logins in its environment."""
    return run_program("-m", f"bridge.stages.{module}", *map(str, arguments), env=env, preloaded=preloaded)


def run_program(*arguments: str, env: dict[str, str], preloaded: Preloaded | None = DOOR) -> subprocess.CompletedProcess:
    """Run Python likewise; a new one where nothing may have been imported, or PYTHONPATH says from where."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env = {**ours, "HF_TOKEN_PATH": "/nonexistent/token", **env}
    if preloaded:
        return preloaded.run(*arguments, env=env, timeout=120)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False, env=env)
