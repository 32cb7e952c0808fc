"""How much memory a checkpoint takes, as the kernel counts it in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_saving_holds_a_tensor_and_in_the_background_one_copy(tmp_path: Path) -> None:
    """The state is three models large (weights and two moments); the largest tensor here a sixth of a model."""
    command = [sys.executable, "-m", "tests.integration.support.checkpoint_memory", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["model_mib"] > 40
    assert found["foreground"] < 0.3, found
    assert found["model"] < 0.3, found
    assert 2.5 < found["background"] < 3.4, found
    assert found["loading"] < 1.3, found
