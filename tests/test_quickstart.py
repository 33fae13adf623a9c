"""quickstart.sh, shortened: what a newcomer reads has no warning in it that is not theirs to act on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from safetensors.torch import load_file

SHORTER = {
    "--output quickstart/task\n": "--output quickstart/task --train 24 --held_out 4\n",
    "--max_steps 500": "--max_steps 3",
    " --at_least 0.9": "",
}
NOISE = re.compile(r"warn|deprecat|unset, we set|was specified in|differ from", re.IGNORECASE)


def shortened(folder: Path) -> str:
    """Its steps behind the installation, in a folder of their own."""
    text = (ROOT / "quickstart.sh").read_text()
    installation = re.compile(r'say "1/5.*?(?=export HF_HUB_OFFLINE)', re.DOTALL)
    assert len(installation.findall(text)) == 1
    text = installation.sub("", text)
    for long, short in SHORTER.items():
        assert text.count(long) == 1
        text = text.replace(long, short)
    return text.replace("quickstart/", f"{folder}/").replace("rm -rf quickstart\nmkdir quickstart\n", "")


def test_nothing_in_it_is_noise(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DS_", "OMP_", "PYTHONW"))}
    result = subprocess.run(
        ["sh", "-e", "-c", shortened(tmp_path), ROOT / "quickstart.sh"],
        cwd=ROOT,
        env=environment | {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert [line for line in re.split(r"[\r\n]+", result.stdout) if NOISE.search(line)] == []
    assert len(re.findall(r"^accuracy \d", result.stdout, re.MULTILINE)) == 2 and "saved to" in result.stdout
    assert load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert json.loads((tmp_path / "lora" / "tokenizer_config.json").read_text())["pad_token"] == "!"
