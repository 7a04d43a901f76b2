"""Tests run on one thread each, without a network; shapes are checked, warnings are errors (pyproject.toml)."""

import gc
import os

import pytest
import torch
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
# what torch.empty gives is filled with NaN, so that scratch which is read before it is written shows
torch.use_deterministic_algorithms(True)
assert torch.utils.deterministic.fill_uninitialized_memory

# shapes and types of these are checked while tests run; what torch.compile traces is left as it is
CHECKED = ["regard.methods.caches", "regard.ops.budget", "regard.ops.topk", "regard.ops.view"]
install_import_hook(CHECKED, "beartype.beartype")


def pytest_collection_finish() -> None:
    """What is loaded once stays: garbage collection does not walk through it again and again."""
    gc.collect()
    gc.freeze()


# tests of these files share nothing and take long together: each goes to the process that is free
SPREAD = {f"test_{name}.py" for name in ("attach", "compare", "every_page", "executors", "explain", "layers")}


def pytest_collection_modifyitems(items) -> None:
    """With several processes (`--dist loadgroup`) a file is one process's: its fixtures are made, its caches filled once."""
    for item in items:
        if item.path.name not in SPREAD and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
