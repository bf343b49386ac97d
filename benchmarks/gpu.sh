#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that only a GPU can tell, in one run: LLaVA-3D-7B's and Qwen3-VL-2B's shapes with random weights through
# `adatoken3d benchmark` (bf16, int4; eager and graph), prefills of every policy, decode steps in one piece against
# growing caches, and the tests. Figures are written to a folder, one JSON a step; a step that fails does not stop the
# others, and the end says which did.
#
#   benchmarks/gpu.sh OUT [--device cuda|cpu] [--small] [--python PYTHON]
#
# --small: tiny checkpoints in place of the real shapes, eager but for the model in the package; with --device cpu it
# shows that the script runs.
set -u
usage() { echo "usage: $0 OUT [--device cuda|cpu] [--small] [--python PYTHON]" >&2; exit 2; }
[ $# -ge 1 ] || usage
out=$1; shift
device=cuda small=0 python=python3
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=${2:?--device needs cuda or cpu}; shift 2 ;;
        --small) small=1; shift ;;
        --python) python=${2:?--python needs a program}; shift 2 ;;
        *) usage ;;
    esac
done
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
failed=()

step() { # NAME COMMAND...: runs it, keeps what it says, goes on if it fails
    local name=$1 began=$SECONDS
    shift
    echo "== $name"
    "$@" >"$out/$name.log" 2>&1 || { failed+=("$name"); tail -n 3 "$out/$name.log"; }
    echo "   $((SECONDS - began)) s"
}

write_model() { # NAME FOLDER: a checkpoint of random weights
    if [ "$small" = 1 ]; then
        "$python" -c "import sys; from tests.architectures import write_tiny; from pathlib import Path
write_tiny(sys.argv[1], Path(sys.argv[2]))" "$3" "$2"
    else
        "$python" -m benchmarks.real_size --model "$1" --write "$2"
    fi
}

bench() { # NAME MODEL OPTIONS...
    local name=$1 model=$2
    shift 2
    step "$name" "$python" -m adatoken3d_ros.cli.main benchmark --model "$model" --device "$device" \
        --json "$out/$name.json" --html "$out/$name.html" "$@"
}

graph=graph dtype=bfloat16 views=20 sizes=(--layers 32 --heads 32 --hidden 4096 --intermediate 11008) onboard=(--questions 200)
tests=(tests/decoder tests/pruning tests/lmm/quantized)
if [ "$small" = 1 ]; then
    graph=eager views=2 sizes=(--layers 4 --heads 2 --hidden 64 --intermediate 128 --scene-tokens 64 --repeats 1)
    onboard=(--questions 4 --repeats 4 --gate-repeats 1 --quantised-questions 0) tests=(tests/decoder/test_decode.py)
fi
[ "$device" = cuda ] && step driver nvidia-smi
step cuda-here "$python" -c "import torch, sys; print(torch.__version__, torch.cuda.is_available())
sys.exit('$device' == 'cuda' and not torch.cuda.is_available())"
for model in llava-3d-7b:llava3d qwen3-vl-2b:qwen3vl; do
    name=${model%%:*}
    step "write-$name" write_model "$name" "$scratch/$name" "${model##*:}"
    bench "$name-bf16" "$scratch/$name" --dtype $dtype --views $views --decoding $graph
    bench "$name-bf16-eager" "$scratch/$name" --dtype $dtype --views $views --decoding eager
    bench "$name-int4" "$scratch/$name" --dtype $dtype --views $views --decoding $graph --quantization int4
    rm -rf "${scratch:?}/$name"
done
step prefill "$python" -m benchmarks.prefill --device "$device" --dtype $dtype "${sizes[@]}" --json "$out/prefill.json"
step onboard "$python" -m benchmarks.onboard --device "$device" "${onboard[@]}" --json "$out/onboard.json"
step tests "$python" -m pytest -q "${tests[@]}"
echo
grep -h "^On this machine" "$out"/*.log
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
