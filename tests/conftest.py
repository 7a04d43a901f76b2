"""Tests run on one thread each, without a network, and treat warnings as errors (pyproject.toml)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)
