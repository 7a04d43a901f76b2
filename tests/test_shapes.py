"""The shapes and types that signatures of methods and ops state hold on every page, each asked in every pattern."""

import subprocess
import sys
from pathlib import Path


def test_shapes_of_every_page():
    script = Path(__file__).with_name("shapes_checked.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "shapes are checked" in run.stdout
