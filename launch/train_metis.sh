#!/usr/bin/env bash
# HDPO on 1..N nodes with the reference's environment variables. Run the same line on every node, each with its NODE_RANK:
#   MODEL_PATH=... TRAIN_DATA="[rl.parquet]" JUDGE_BASE_URL=http://judge:8000/v1 NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 \
#       launch/train_metis.sh [W_TOOL] [--set key=value ...]
# Relative paths start where you stand. The run's folder (RUN_FOLDER) must be one that all nodes share. A tool server is started on each node unless
# REMOTE_TOOL_SERVER_URL names one. The README lists all variables.
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
w_tool=0.15
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then w_tool="$1"; shift; fi
: "${MODEL_PATH:?set MODEL_PATH to the folder of the SFT checkpoint}"
nodes="${NNODES:-1}" node="${NODE_RANK:-0}" address="${MASTER_ADDR:-127.0.0.1}" port="${MASTER_PORT:-29500}"
gpus="${GPUS_PER_NODE:-$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)}" restarts="${MAX_RESTARTS:-0}"
for pair in "NNODES=$nodes" "NODE_RANK=$node" "MASTER_PORT=$port" "GPUS_PER_NODE=$gpus" "MAX_RESTARTS=$restarts"; do
    case "${pair#*=}" in *[!0-9]*|'') echo "train_metis.sh: $pair is not a number" >&2; exit 2;; esac
done
if [ "$gpus" -lt 1 ]; then echo "train_metis.sh: no GPU found; set GPUS_PER_NODE, or try \`hdpo demo\` on a CPU" >&2; exit 2; fi
if [ "$node" -ge "$nodes" ]; then
    echo "train_metis.sh: NODE_RANK=$node: nodes are counted from 0 to NNODES-1, and NNODES=$nodes" >&2; exit 2
fi
if [ "$nodes" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
    echo "train_metis.sh: NNODES=$nodes needs MASTER_ADDR, the address of the machine with NODE_RANK=0" >&2; exit 2
fi
name="${RUN_NAME:-hdpo_$(basename "$MODEL_PATH")_wtool$w_tool}"
exec "$python" -P -m hdpo.adapters.launcher --config_file "${ACCELERATE_CONFIG:-$launch/accelerate/zero3.yaml}" \
    --num_machines "$nodes" --machine_rank "$node" --main_process_ip "$address" --main_process_port "$port" \
    --num_processes "$((nodes * gpus))" --max_restarts "$restarts" \
    "$launch/train_rl.py" --config "${CONFIG:-$launch/configs/metis_8b_rl.yaml}" \
    --set "hdpo.w_tool=$w_tool" --set "run.name=$name" ${RUN_FOLDER:+--set "run.folder=$RUN_FOLDER"} \
    ${n:+--set "rollout.group_size=$n"} ${WANDB_API_KEY:+--set log.wandb=true} "$@"
