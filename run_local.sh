#!/usr/bin/env bash
# Try it without a GPU: ./run_local.sh [KEY=value ...]      a few documents, three minutes of training, a score.
# A KEY=value given here wins over an exported variable, and that over the small model below.
# ./run_local.sh --setup [requirements file ...]            only makes .venv and installs what the files list.
set -euo pipefail
cd "$(dirname "$0")"

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }
setup() (  # a subshell that holds the lock: a second start waits here, then finds everything in place
    exec 9<requirements.txt; if command -v flock >/dev/null; then flock 9; fi
    if ! supported .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        for python in python3 python3.12 python3.11 none; do supported "$python" && break; done
        [ "$python" != none ] || { echo "Python 3.11 or 3.12 is needed; python3 is $(python3 -V 2>&1)" >&2; exit 2; }
        echo "making .venv with $("$python" -V)"; "$python" -m venv --clear .venv
    fi
    for file in "$@"; do
        list=$(cat "$file") stamp=.venv/installed-${file//\//-}
        [ "$file" != requirements.txt ] || [ -e /dev/nvidia0 ] || command -v nvidia-smi >/dev/null || list=$(grep -v ^triton "$file")
        [ "$(.venv/bin/python -V) $list" != "$(cat "$stamp" 2>/dev/null)" ] || continue
        [ "$list" = "$(cat "$file")" ] || echo "no NVIDIA driver found: a CPU build of torch will do, without triton"
        echo "installing $file into .venv"; rm -f "$stamp"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r <(echo "$list")
        echo "$(.venv/bin/python -V) $list" >"$stamp"  # last: an interrupted installation is done again
    done
)
if [ "${1-}" = --setup ]; then shift; setup requirements.txt "$@"; exit; fi
for pair in "$@"; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || { echo "want KEY=value, got: $pair" >&2; exit 2; }; export "$pair"
done
data=data/datasets/python_sp1024
for pair in DATA_PATH=$data TOKENIZER_PATH=$data/tokenizer.model VOCAB_SIZE=1024 NUM_LAYERS=4 MODEL_DIM=256 \
    NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=2 TRAIN_SEQ_LEN=512 TRAIN_BATCH_TOKENS=8192 GRAD_ACCUM_STEPS=1 \
    VAL_BATCH_TOKENS=16384 MAX_WALLCLOCK_SECONDS=180 VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=50 WARMUP_STEPS=2 WARMDOWN_FRAC=0.5; do
    key=${pair%%=*}; [ -n "${!key+set}" ] || export "$pair"
done
setup requirements.txt
[ "$DATA_PATH" != "$data" ] || .venv/bin/python data/prepare.py --docs python --train-tokenizer 1024 --out "$data"
echo "training for $MAX_WALLCLOCK_SECONDS s: $NUM_LAYERS layers of width $MODEL_DIM; then the model is packed and scored"
exec .venv/bin/python train_gpt.py
