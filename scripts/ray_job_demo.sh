#!/usr/bin/env bash
# Jobs on a standing Ray cluster: a batch file through two pipelines, then a standing pipeline actor
# called from a Python client.
#
#   scripts/ray_job_demo.sh [FOLDER]      # where results go; a temporary folder by default
#
# With RAY_ADDRESS and RAY_API_SERVER_ADDRESS set it uses that cluster, from one of its nodes; otherwise
# a head node on loopback, which goes at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(realpath "${1:-$(mktemp -d)}")
mkdir -p "$folder"
PATH=${PYTHON_BIN:-$PWD/.venv/bin}:$PATH
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0

if [[ -z ${RAY_API_SERVER_ADDRESS:-} ]]; then
    RAY_AUTH_TOKEN=$(openssl rand -hex 32) # who holds it may run code: on a real cluster, ~/.ray/auth_token
    export RAY_AUTH_TOKEN RAY_ADDRESS=127.0.0.1:${RAY_PORT:-6399} RAY_API_SERVER_ADDRESS=http://127.0.0.1:${RAY_DASHBOARD_PORT:-8299}
    temporary=$(mktemp -d /tmp/ssd-ray-XXXX)
    # --block in a session of its own: the cluster goes as a whole, and no other one does.
    setsid ray start --head --block --num-cpus "${RAY_CPUS:-4}" --node-ip-address 127.0.0.1 --port "${RAY_ADDRESS##*:}" \
        --dashboard-host 127.0.0.1 --dashboard-port "${RAY_API_SERVER_ADDRESS##*:}" --temp-dir "$temporary" >"$folder/ray.log" 2>&1 &
    head=$!
    trap 'kill -TERM -- -$head 2>/dev/null; wait $head 2>/dev/null || true; rm -rf "$temporary"' EXIT
    until grep --quiet "Ray runtime started" "$folder/ray.log"; do
        kill -0 $head 2>/dev/null || { cat "$folder/ray.log"; exit 1; }
        sleep 1
    done
fi

submit() {
    echo "\$ ray job submit --working-dir . --runtime-env launch/runtime_env.yaml -- $*"
    ray job submit --address "$RAY_API_SERVER_ADDRESS" --working-dir . --runtime-env launch/runtime_env.yaml -- "$@"
}

for n in $(seq "${REQUESTS:-24}"); do
    printf '{"id": "r%d", "prompt": "def add_%d(a, b):\\n", "max_tokens": 24}\n' "$n" "$n"
done >"$folder/in.jsonl"
eager="--set target.compile=false --set draft.compile=false" # starts in seconds; this shows jobs, not speed
# shellcheck disable=SC2086
submit python launch/ray_job.py --replicas 2 batch "$folder/in.jsonl" "$folder/out.jsonl" --set engine.max_batch=2 $eager
echo "\$ head -n 1 out.jsonl"
head -n 1 "$folder/out.jsonl"

# shellcheck disable=SC2086
submit python launch/ray_actor.py start demo $eager
cat >"$folder/client.py" <<'PYTHON'
from ssd import SamplingParams
from ssd.cluster import PipelineClient, connect

connect("auto")
with PipelineClient.attach("demo") as client:
    print(repr(client.generate("class Stack:\n", SamplingParams(max_tokens=24))[0].text))
    for event in client.stream("import os\n", SamplingParams(max_tokens=24)):
        print(event.text, end="", flush=True)
    print()
PYTHON
echo "\$ python client.py"
PYTHONPATH=$PWD python "$folder/client.py"
submit python launch/ray_actor.py stop demo
