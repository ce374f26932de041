#!/usr/bin/env bash
# What a vendor does with examples/eager-backend, away from this tree: install, run, verify, serve. Needs an environment that
# has what the packages depend on (`make .venv/tested`, or PYTHON=...), so that torch is not fetched again.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
base=${PYTHON:-$root/.venv/bin/python}
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$work"' EXIT
before=$(git -C "$root" status --porcelain)
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
unset PYTHONPATH

# Copies, so that nothing is built in the tree, and nothing is imported from it.
cp -r "$root/core" "$root/conformance" "$root/examples/eager-backend" "$work"
cd "$work"
lines=$(git -C "$root" ls-files -z examples/eager-backend | (cd "$root" && xargs -0 cat) | wc -l)
[ "$lines" -lt 500 ] || { echo "the example has $lines lines; expected under 500"; exit 1; }

SECONDS=0
"$base" -m venv venv
site=$("$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$site')" > "$(venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
venv/bin/pip install -q ./core ./conformance ./eager-backend
venv/bin/conform run --backend eager --profile dense -o report.json
venv/bin/conform verify report.json
echo "example: $lines lines, $SECONDS s from nothing to a verified report"

venv/bin/polyradix serve --model demo --device eager --port 0 2> server.log &
server=$!
for _ in $(seq 120); do
  url=$(sed -n 's/.*ready at \(http[^ ]*\): demo on.*/\1/p' server.log)
  [ -z "$url" ] || break
  kill -0 "$server" || { cat server.log; exit 1; }
  sleep 1
done
answer=$(venv/bin/python - "$url" <<'PY'
import json, sys, urllib.request

body = {"model": "demo", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
request = urllib.request.Request(f"{sys.argv[1]}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
print(json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["text"])
PY
)
[[ $answer == *Paris* ]] || { echo "served: '$answer'; expected Paris in it"; exit 1; }
echo "served with --device eager: The capital of France is$answer"

after=$(git -C "$root" status --porcelain)
[ "$after" = "$before" ] || { diff <(echo "$before") <(echo "$after"); echo "the tree has changed"; exit 1; }
