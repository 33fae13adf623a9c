#!/bin/sh
# Full-parameter finetuning: language model, resampler and vision tower.
#   edit the variables, or set them:  MODEL=/models/MiniCPM-V-2 DATA=my/train.json sh finetune_ds.sh --num_train_epochs 2
# Flags behind the command win over the settings below.

MODEL="${MODEL:-openbmb/MiniCPM-Llama3-V-2_5}" # or openbmb/MiniCPM-V-2, or a folder
DATA="${DATA:-path/to/training_data.json}"
EVAL_DATA="${EVAL_DATA:-}"                     # empty: no evaluation
LLM_TYPE="${LLM_TYPE:-}"                       # llama3 or minicpm; empty: found from the checkpoint
OUTPUT_DIR="${OUTPUT_DIR:-output/minicpmv_full}"

GPUS_PER_NODE="${GPUS_PER_NODE:-}"             # empty: all that are visible
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
MASTER_ADDR="${MASTER_ADDR:-localhost}"
MASTER_PORT="${MASTER_PORT:-}"                 # empty: a free one, or 6001 on several nodes

HERE="$(cd "$(dirname "$0")" && pwd)"
DS_CONFIG="${DS_CONFIG-$HERE/ds_config_zero3.json}" # set to nothing: without DeepSpeed

SAVE_STEPS="${SAVE_STEPS:-500}"
# --model_max_length: 2048 tokens, or what the model takes, if that is less; another value behind the command.
SETTINGS="
  --tune_llm true --tune_vision true
  --num_train_epochs 1
  --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 1
  --learning_rate 5e-6 --weight_decay 0.1 --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine
  --gradient_checkpointing true
  --logging_steps 10 --logging_first_step true --report_to tensorboard
  --save_strategy steps --save_steps $SAVE_STEPS --save_total_limit 3
"

. "$HERE/launch.sh"
