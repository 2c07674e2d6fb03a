#!/usr/bin/env bash
cd "$(dirname "$0")" && exec ../../run_8xh100.sh records/t74/env "$@"
