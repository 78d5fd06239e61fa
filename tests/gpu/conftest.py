"""What is in this folder needs a GPU, and is skipped, by name, where there is none.

It runs in the image alone, which has flash-attn, and which has no pytest. On the GPU node, in the checkout, with Apptainer:

    python3.11 -m pip install --no-deps --require-hashes --target work/pytest -r requirements-dev.lock
    scripts/host/container.sh shell -c 'PYTHONPATH=work/pytest python -m pytest tests/gpu --none-skipped'
"""

import os

import pytest

from bridge import hardware


def pytest_collection_modifyitems(items):
    if not hardware.visible_gpus(os.environ):
        for item in items:
            if "tests/gpu/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="no GPU visible"))
