#!/usr/bin/env bash
# The 8-GPU experiment on 2 GPUs: ./run_2gpu_proxy.sh [env file] [KEY=value ...]
# Gradient accumulation times 4 keeps the tokens of a step, the wall clock times 4 keeps the number of steps.
# A good proxy for the loss at equal steps, bytes and scores. No proxy for throughput: communication, memory per GPU
# and the share of fixed costs (compile, export, scoring) differ, so the steps that 8 GPUs reach must be measured there.
set -euo pipefail
cd "$(dirname "$0")"

env_file=records/baseline/env
if [[ $# -gt 0 && $1 != *=* ]]; then env_file=$1; shift; fi
[ -f "$env_file" ] || { echo "no such env file: $env_file" >&2; exit 2; }
set -a; source "$(realpath "$env_file")"; set +a
exec ./run_8xh100.sh "$env_file" NPROC_PER_NODE=2 GRAD_ACCUM_STEPS=$((4 * ${GRAD_ACCUM_STEPS:-1})) \
    MAX_WALLCLOCK_SECONDS="$(awk "BEGIN { print 4 * ${MAX_WALLCLOCK_SECONDS:-600} }")" "$@"
