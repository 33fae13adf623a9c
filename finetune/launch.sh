# Shared by finetune_ds.sh and finetune_lora.sh, which set the variables and then read this file. POSIX sh.
# Finds Python and the GPUs, starts one process per GPU with torchrun, and ends with the status of the training.

if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
  PYTHON="$VIRTUAL_ENV/bin/python"
else
  PYTHON="$(command -v python || command -v python3)" || { echo "$0: no python found" >&2; exit 1; }
fi

if [ -z "$GPUS_PER_NODE" ] || [ -z "${DS_ACCELERATOR:-}" ]; then # asking takes seconds, so only where it matters
  VISIBLE_GPUS="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')" || exit 1
  if [ "$VISIBLE_GPUS" -eq 0 ]; then
    echo "$0: no GPU found, training on the CPU" >&2
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    VISIBLE_GPUS=1
  fi
  GPUS_PER_NODE="${GPUS_PER_NODE:-$VISIBLE_GPUS}"
  if [ "${DS_ACCELERATOR:-}" != cpu ] && [ "$GPUS_PER_NODE" -gt "$VISIBLE_GPUS" ]; then
    echo "$0: GPUS_PER_NODE is $GPUS_PER_NODE, but $VISIBLE_GPUS can be seen here; lower it, or leave it empty for all" >&2
    exit 1
  fi
fi

if [ "$NNODES" -eq 1 ] && [ -z "$MASTER_PORT" ]; then
  RENDEZVOUS="--standalone" # a free port is found
else
  RENDEZVOUS="--node_rank $NODE_RANK --master_addr $MASTER_ADDR --master_port ${MASTER_PORT:-6001}"
fi

# Settings of the launcher, then the variables, then the user's flags: of a flag given twice the last one wins.
# DATA and EVAL_DATA may name several files, with spaces or as a pattern, unless the whole is the name of one.
# shellcheck disable=SC2086
if [ -e "$DATA" ]; then
  set -- --data_path "$DATA" "$@"
else
  set -- --data_path $DATA "$@"
fi
set -- --model_name_or_path "$MODEL" --output_dir "$OUTPUT_DIR" "$@"
if [ -n "$LLM_TYPE" ]; then
  set -- --llm_type "$LLM_TYPE" "$@"
fi
if [ -n "$EVAL_DATA" ]; then
  set -- --eval_strategy steps --eval_steps "$SAVE_STEPS" "$@"
  # shellcheck disable=SC2086
  if [ -e "$EVAL_DATA" ]; then
    set -- --eval_data_path "$EVAL_DATA" "$@"
  else
    set -- --eval_data_path $EVAL_DATA "$@"
  fi
fi
if [ -n "$DS_CONFIG" ]; then
  if [ ! -f "$DS_CONFIG" ] && [ -f "$HERE/$DS_CONFIG" ]; then
    DS_CONFIG="$HERE/$DS_CONFIG"
  fi
  set -- --deepspeed "$DS_CONFIG" "$@"
fi

# shellcheck disable=SC2086 # RENDEZVOUS and SETTINGS are lists of words
exec "$PYTHON" "$HERE/launch.py" --nnodes "$NNODES" --nproc_per_node "$GPUS_PER_NODE" $RENDEZVOUS \
  "$HERE/finetune.py" $SETTINGS "$@"
