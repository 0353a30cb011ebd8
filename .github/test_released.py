"""Run with: python -m pytest -q .github/test_released.py"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import released

import fid
import rar
import tokenizer
from test_rar import cheap, patch, workplace  # fixtures: fid.py without Inception, and more


def test_released(cheap, patch, capsys):
    """From files on a hub to a verdict, with tiny weights. What is there is not fetched again."""
    def run(command, **_):
        code = {"rar.py": rar.main, "fid.py": fid.main}[command[1]](command[2:])
        return subprocess.CompletedProcess([], code or 0, capsys.readouterr().out)

    patch.setattr(released.subprocess, "run", run)
    config = rar.Config(width=32, depth=1, heads=2, num_classes=2)
    torch.save(rar.RAR(config).state_dict(), "rar_b.bin")
    torch.save(tokenizer.PatchTokenizer(16, 2, 1024).state_dict(), tokenizer.RELEASED)
    os.renames("b.npz", "hub/b.npz")
    call = f"RAR-B --reference file:{Path.cwd()}/hub/b.npz --count".split()
    released.main([*call, "5"])

    shutil.rmtree("hub")
    os.rename("runs/RAR-B-5.npz", "runs/RAR-B-50000.npz")
    scores = json.loads(Path("runs/RAR-B-5.json").read_text()).values()
    for published, code in (([0, *scores], 0), ([9] * 6, "5 of 5 are off")):
        patch.setitem(released.PUBLISHED, "RAR-B", published)
        with pytest.raises(SystemExit) as ending:
            released.main([*call, "50000"])
        assert ending.value.code == code
