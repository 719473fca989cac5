#!/usr/bin/env bash
# What a CUDA machine can tell in 25 minutes, in parts of less than 10: build, check, tests, tuning, bench, verdict, plots.
#   bench/gpu.sh [--device cuda] [--out build/gpu] [--minutes 25] [--part N] [--quick] [--dry-run]
# A part that ended has its JSON in the folder and is not done again; remove the file to repeat it. A part that failed or
# ran out of time has none, only its log: the same command goes on there, a bench part with what it had. No part begins
# after --minutes, or goes on (0: no limit). The bench launches what the tuning found, out/launch.json.
# --part N does that part alone; --quick uses tiny shapes, to try the script out (also with --device cpu); --dry-run
# prints the parts and their commands.
# PYTHON=... is used as it is; else the environment of `make` is made.
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda out=build/gpu minutes=25 only= quick= dry=
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --minutes) minutes=$2; shift 2 ;;
        --part) only=$2; shift 2 ;;
        --quick) quick=yes; shift ;;
        --dry-run) dry=yes; shift ;;
        *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done
[ -n "$dry" ] || mkdir -p "$out"
python=${PYTHON:-.venv/bin/python}
export SSD_CORE_LAUNCH=$PWD/$out/launch.json
case $out in /*) SSD_CORE_LAUNCH=$out/launch.json ;; esac
budget=${BUDGET:-$((60 * minutes))}     # seconds; 0: no limit
failed=0 results=()

# Sets how many seconds the next part may take; fails if there are none.
in_time() {
    limit=${LIMIT:-570}
    if [ "$budget" != 0 ] && [ $((budget - SECONDS)) -lt "$limit" ]; then limit=$((budget - SECONDS)); fi
    if [ "$limit" -le 0 ]; then echo "-- $1: no time left"; failed=1; return 1; fi
}

chosen() { [ -z "$only" ] || [ "$only" = "$1" ]; }
done_already() { [ -f "$out/$1.json" ] && echo "-- $1: done already"; }

# part NUMBER NAME ENDS COMMAND...: ENDS lists the exit codes that are a result (1: tests failed), not an accident
part() {
    local number=$1 name; name=$(printf '%02d-%s' "$1" "$2"); local ends=$3; shift 3
    chosen "$number" || return 0
    if [ -n "$dry" ]; then echo "$name: $*"; return; fi
    done_already "$name" && return 0
    in_time "$name" || return 0
    echo "-- $name"
    local start=$SECONDS code=0
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    tail -n 3 "$out/$name.log"
    if [[ " $ends " == *" $code "* ]]; then
        printf '{"part": "%s", "exit_code": %d, "seconds": %d}\n' "$name" $code $((SECONDS - start)) >"$out/$name.json"
    fi
    [ $code = 0 ] || { echo "-- $name: exit code $code, see $out/$name.log"; failed=1; }
}

# bench NUMBER NAME COMMAND...: of the bench; the file is whole when the part has ended
bench() {
    local number=$1 name command=$3; name=$(printf '%02d-%s' "$1" "$2"); shift 3
    if [ -n "$dry" ]; then ! chosen "$number" || echo "$name: ssd_core.bench.run $command $*"; return; fi
    if chosen "$number" && ! done_already "$name" && in_time "$name"; then
        echo "-- $name"
        if timeout "$limit" "$python" -P -m ssd_core.bench.run "$command" --devices "$device" "${common[@]}" "$@" \
            --out "$out/$name.unfinished" --resume >"$out/$name.log" 2>&1
        then mv "$out/$name.unfinished" "$out/$name.json"
        else echo "-- $name: exit code $?, see $out/$name.log"; failed=1
        fi
    fi
    [ ! -f "$out/$name.json" ] || results+=("$out/$name.json")
}

if [ -n "$quick" ]; then
    common=(--dtypes float32 --samples 2 --no-memory --peers "eager,ssd-core,HF") check=(--dtypes float32)
    tokens=64 batch=8 heads=(512x64 1024x32) filter=512x64 ops_case=512x64 sample_case=512x64 short_rows=300x64
    sizes=(--case 512x32 --tokens 64 --values-n 32,64 --values-v 512,1024 --values-d 16,32)
    tests=(tests/test_presets.py) tuning=(--help) more_tests=(tests/data) tiled_tests=(tests/data)
else
    common=(--dtypes bfloat16 --samples 20 --budget 60) check=()
    tokens=8192 batch=256 heads=(llama-3-8b qwen2.5-7b gemma-2-2b gemma-3-1b) filter=smollm2@4096 ops_case=llama-3-8b
    sample_case=qwen3-0.6b short_rows=smollm2
    sizes=(--case 128256x4096 --tokens 2048 --values-n 1024,2048,4096,8192,16384,32768
           --values-v 32768,65536,131072,262144 --values-d 1024,2048,4096,8192)
    # the ops' tests, their calls moved to the device; Triton compiles for each process, and keeps it for the next
    tests=(tests/ops -k triton) more_tests=(tests --ignore=tests/ops)
    tiled_tests=(tests/ops -k "triton and linear and not grad_filter")
    tuning=(--device "$device" --minutes 4)
fi

part 1 build "0" sh -c 'sh .ci/setup "$1" .venv && sh .ci/peers "$1" .venv' - "${PYTHON:-}"
part 2 check "0 1" "$python" -P -m ssd_core.bench.gpu_check --device "$device" "${check[@]}" --out "$out/check.json"
part 3 tests "0 1" env SSD_CORE_TEST_DEVICE="$device" "$python" -P -m pytest -m "not all" -n 8 "${tests[@]}"
part 4 tuning "0" "$python" -P -m ssd_core.bench.run tune "${tuning[@]}"
number=5
for head in "${heads[@]}"; do
    bench $number "cross-entropy-$head" run --ops linear_cross_entropy --cases "$head" --tokens $tokens
    number=$((number + 1))
done
bench 9 filter run --ops linear_cross_entropy --cases $filter --tokens $tokens
bench 10 filter-frozen run --ops linear_cross_entropy --cases $filter --tokens $tokens --frozen
bench 11 head-ops run --ops linear_cross_entropy,linear_distill,linear_distill_hidden,linear_logprob \
    --cases $ops_case --tokens $tokens
bench 12 row-ops run --ops softmax,log_softmax,cross_entropy,distill --cases $ops_case,$short_rows --tokens $tokens
bench 13 sample run --ops sample --cases $sample_case --batch $batch
bench 14 growth scale "${sizes[@]}" --budget 10
part 15 tiled-tests "0 1" env SSD_CORE_TEST_DEVICE="$device" SSD_CORE_ROUTE=tiled "$python" -P -m pytest \
    -m "not all" -n 8 "${tiled_tests[@]}"
part 16 more-tests "0 1" "$python" -P -m pytest -m "not all" -n auto "${more_tests[@]}"

if [ ${#results[@]} -gt 0 ]; then
    "$python" -P -m ssd_core.bench.run table "${results[@]}" >"$out/table.md" || failed=1
    "$python" -P -m ssd_core.bench.run plots "${results[@]}" --out "$out/plots" >/dev/null || failed=1
    "$python" -P -m ssd_core.bench.run verdict "${results[@]}" --out "$out/verdict.json" || true
    echo "-- $out: table.md, plots/index.html, verdict.json"
fi
exit $failed
