#!/usr/bin/env bash
# Train on 8 H100s: ./run_8xh100.sh [env file] [KEY=value ...]     the env file is the experiment, KEY=value changes it.
# Another number of GPUs: NPROC_PER_NODE=4. Several nodes: NNODES=2 NODE_RANK=0 MASTER_ADDR=... MASTER_PORT=... on each.
set -euo pipefail
cd "$(dirname "$0")"

env_file=records/baseline/env
if [[ $# -gt 0 && $1 != *=* ]]; then env_file=$1; shift; fi
[ -f "$env_file" ] || { echo "no such env file: $env_file" >&2; exit 2; }
for pair in "$@"; do [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || { echo "want KEY=value, got: $pair" >&2; exit 2; }; done

set -a; source "$(realpath "$env_file")"; set +a
for pair in "$@"; do export "$pair"; done
nodes=(--standalone)
if [ "${NNODES:-1}" -gt 1 ]; then
    nodes=(--nnodes="$NNODES" --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT")
fi
torchrun=.venv/bin/torchrun; [ -x "$torchrun" ] || torchrun=torchrun
exec "$torchrun" "${nodes[@]}" --nproc_per_node="${NPROC_PER_NODE:-8}" train_gpt.py
