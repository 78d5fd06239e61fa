"""Several trainings on one GPU. vLLM's workers cannot be imported without a driver, but what is exchanged in them can be read."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from door import run_python


@pytest.mark.parametrize("module, method, answer", [
    ("v1/worker/gpu_worker.py", "determine_available_memory", "int"),
    ("worker/worker.py", "determine_num_available_blocks", "Tuple[int, int]"),
])
def test_what_is_exchanged_is_what_vllm_asks_its_workers(module, method, answer):
    tree = ast.parse((Path(find_spec("vllm").origin).parent / module).read_text())
    worker = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Worker")
    asked = next(node for node in worker.body if isinstance(node, ast.FunctionDef) and node.name == method)
    assert ([argument.arg for argument in asked.args.args], ast.unparse(asked.returns)) == (["self"], answer)


def test_without_a_gpu_nothing_is_changed():
    assert run_python("import sys, bridge.shared_gpu; print('vllm' in sys.modules)") == "False"
