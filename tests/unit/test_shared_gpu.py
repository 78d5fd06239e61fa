"""Several trainings on one GPU. vLLM's workers cannot be imported without a driver, so stand-ins are exchanged here; that vLLM's
own have these methods is read."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from door import DOOR, ROOT, run_python

HERE = ROOT / "tests" / "gpu"


@pytest.mark.parametrize("module, method, answer", [
    ("v1/worker/gpu_worker.py", "determine_available_memory", "int"),
    ("worker/worker.py", "determine_num_available_blocks", "Tuple[int, int]"),
    ("worker/worker.py", "get_cache_block_size_bytes", "int"),
])
def test_vllms_workers_are_asked_so(module, method, answer):
    tree = ast.parse((Path(find_spec("vllm").origin).parent / module).read_text())
    worker = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Worker")
    asked = next(node for node in worker.body if isinstance(node, ast.FunctionDef) and node.name == method)
    assert ([argument.arg for argument in asked.args.args], ast.unparse(asked.returns)) == (["self"], answer)


def test_the_cache_has_its_own_size_in_both_engines():
    assert run_python("""
import sys
from types import ModuleType
def stand_in(name, **methods):
    sys.modules[name] = ModuleType(name)
    sys.modules[name].Worker = type("Worker", (), methods)
    return sys.modules[name].Worker
newer = stand_in("vllm.v1.worker.gpu_worker")
older = stand_in("vllm.worker.worker", get_cache_block_size_bytes=lambda worker: 1 << 20)
import shared_gpu
shared_gpu.apply()
print(newer().determine_available_memory(), older().determine_num_available_blocks())
""", HERE, preloaded=DOOR) == f"{6 << 30} ({6 << 10}, 0)"


def test_without_a_gpu_nothing_is_changed():
    # In a Python that has imported nothing yet.
    found = subprocess.run([sys.executable, "-c", "import sys, shared_gpu; print('vllm' in sys.modules)"], cwd=HERE, check=True,
                           env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}, capture_output=True, text=True)
    assert found.stdout == "False\n"
