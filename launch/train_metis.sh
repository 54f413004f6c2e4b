#!/usr/bin/env bash
# HDPO on 1..N nodes with the reference's environment variables. Run the same line on every node:
#   MODEL_PATH=... TRAIN_DATA="[rl.parquet]" JUDGE_BASE_URL=http://judge:8000/v1 NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 \
#       launch/train_metis.sh [W_TOOL] [--set key=value ...]
# A tool server is started on each node unless REMOTE_TOOL_SERVER_URL names one.
set -euo pipefail
cd "$(dirname "$0")/.."
w_tool=0.15
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then w_tool="$1"; shift; fi
: "${MODEL_PATH:?set MODEL_PATH to the folder of the SFT checkpoint}"
nodes="${NNODES:-1}" node="${NODE_RANK:-0}" address="${MASTER_ADDR:-127.0.0.1}" port="${MASTER_PORT:-29500}"
gpus="${GPUS_PER_NODE:-$(nvidia-smi -L 2>/dev/null | wc -l)}"
if [ "$gpus" -lt 1 ]; then echo "train_metis.sh: no GPU found; set GPUS_PER_NODE, or try 'make demo' on a CPU" >&2; exit 2; fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
name="${RUN_NAME:-hdpo_$(basename "$MODEL_PATH")_wtool$w_tool}"
exec "${ACCELERATE:-accelerate}" launch --config_file launch/accelerate/zero3.yaml \
    --num_machines "$nodes" --machine_rank "$node" --main_process_ip "$address" --main_process_port "$port" \
    --num_processes "$((nodes * gpus))" \
    launch/train_rl.py --config "${CONFIG:-launch/configs/metis_8b_rl.yaml}" \
    --set "hdpo.w_tool=$w_tool" --set "run.name=$name" \
    ${n:+--set "rollout.group_size=$n"} "$@"
