#!/usr/bin/env bash
# From a fresh clone to a served W4A8 model: quantize, serve, evaluate, ask. Takes another model: quickstart.sh MODEL
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

model=${1:-tiny}
out=runs/quickstart
server=

stop_server() {
    if [ -n "$server" ]; then kill -TERM "$server" 2>/dev/null && wait "$server" || true; fi
    server=
}
trap stop_server EXIT
step() { say ""; say "== $*"; }

make_environment
mkdir -p "$out"

step "quantizing $model to W4A8"
qtoolkit quantize "$model" -o "$out/checkpoint" --w4a8 --samples 32 --length 256 --fresh || fail "the model was not quantized."

step "starting vLLM (about a minute)"
qtoolkit serve "$out/checkpoint" --port 0 --json >"$out/server.json" 2>"$out/server.log" &
server=$!
for _ in $(seq 600); do
    [ -s "$out/server.json" ] && break
    kill -0 "$server" 2>/dev/null || { tail -n 5 "$out/server.log" >&2; fail "the server did not start; all it said is in $out/server.log."; }
    sleep 1
done
read -r url name <<<"$(python -c 'import json, sys; ready = json.load(open(sys.argv[1])); print(ready["url"], ready["model"])' "$out/server.json")" ||
    fail "the server gave no address within ten minutes; see $out/server.log."

step "asking $url"
python scripts/ask.py "$url" "$name" || fail "the endpoint did not answer."

step "evaluating float, W4A8, and W4A8 as served, on the same text"
qtoolkit eval "$out/checkpoint" --reference "$model" --endpoint "$url" -o "$out/report" || fail "the evaluation failed."

stop_server
step "done; the report is $PWD/$out/report/report.html"
