#!/bin/sh
# From nothing to a finetuned model on a machine without weights, in minutes: installs into .venv, writes a tiny random
# checkpoint and a task of drawn pictures, trains it with finetune_lora.sh and scores it before and after.
# Everything is written to quickstart/, anew each time.
set -eu
cd "$(dirname "$0")"
export PYTHONDONTWRITEBYTECODE= # without .pyc files each step would compile torch anew, for 15 s
say() { printf '\n== %s\n' "$*"; }

say "1/5 Python environment .venv (a few minutes the first time: PyTorch is large)"
[ -x .venv/bin/python ] || "$(command -v python3 || command -v python)" -m venv .venv
.venv/bin/python -m pip install --no-compile --disable-pip-version-check --progress-bar on -r requirements.txt |
  grep -v '^Requirement already satisfied' || true
. .venv/bin/activate
python -c 'import torch, transformers, deepspeed, peft, timm' # a failed installation ends here
export HF_HUB_OFFLINE=1

say "2/5 sample task and tiny checkpoint in quickstart/"
rm -rf quickstart
mkdir quickstart
python finetune/sample_task.py --output quickstart/task
python -m finetune.minicpmv.tiny --model minicpm-llama3-v-2_5 --output quickstart/tiny

say "3/5 accuracy before training (guessing gives 0.25)"
python finetune/sample_task.py --output quickstart/task --score quickstart/tiny

say "4/5 LoRA training with finetune_lora.sh"
# A model this small learns at a rate that would break a real one, and DeepSpeed has nothing to save here.
MODEL=quickstart/tiny DATA=quickstart/task/train.json OUTPUT_DIR=quickstart/lora DS_CONFIG='' \
  sh finetune/finetune_lora.sh --batch_size 16 --max_steps 500 --learning_rate 3e-3 --dataloader_num_workers 0 \
  --gradient_checkpointing false --logging_steps 50

say "5/5 accuracy after training, adapter loaded by the README's snippet"
python finetune/sample_task.py --output quickstart/task --score quickstart/lora --at_least 0.9

say "done: adapter and loss.png in quickstart/lora"
