"""What the project promises, tested.  python -m pytest -q"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orpo import closed_form, log_odds, odds_ratio_loss

HERE = Path(__file__).resolve().parent


def test_gradient_check_passes():
    done = subprocess.run([sys.executable, HERE / "orpo.py"], capture_output=True, text=True)
    assert done.returncode == 0 and "All as it should be" in done.stdout, done.stdout


@pytest.mark.parametrize("x", [-1e4, -100.0, -1.0, -0.69, -1e-3, -1e-7, -1e-12, -1e-30, 0.0])
def test_log_odds_is_finite_and_right(x):
    logps = torch.tensor(x, requires_grad=True)
    value = log_odds(logps)
    value.backward()
    exact = torch.tensor(min(x, -1e-30), dtype=torch.float64)
    torch.testing.assert_close(value.double(), exact - torch.log(-torch.expm1(exact)), rtol=1e-6, atol=1e-6)
    assert logps.grad.isfinite()
