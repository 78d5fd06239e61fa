"""What is in this folder needs a GPU, and is skipped, by name, where there is none."""

import os

import pytest

from bridge import hardware


def pytest_collection_modifyitems(items):
    if not hardware.visible_gpus(os.environ):
        for item in items:
            if "tests/gpu/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="no GPU visible"))
