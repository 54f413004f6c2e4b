#!/usr/bin/env bash
# Start a tool server in the background and print its URL, as the reference's script does.
# Usage: launch/start_tool_server.sh [PORT] [WORKERS]      PORT 0 takes a free one; WORKERS are cells running at once
# Keys and SEARCH_PROVIDER come from the environment; further options in TOOL_SERVER_ARGS. Clients need HDPO_TOOL_SERVER_TOKEN;
# without it a token is made that clients of the same user on this machine find. TOOL_SERVER_ARGS=--no-token asks for none.
# The log is TOOL_SERVER_LOG, or tool_server.log in RUN_FOLDER/RUN_NAME (runs/).
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
port="${1:-0}" workers="${2:-0}"
case "$port$workers" in *[!0-9]*) echo "usage: launch/start_tool_server.sh [PORT] [WORKERS]" >&2; exit 2;; esac
log="${TOOL_SERVER_LOG:-${RUN_FOLDER:-runs}${RUN_NAME:+/$RUN_NAME}/tool_server.log}"
if ! mkdir -p "$(dirname "$log")" || ! : >>"$log"; then
    echo "start_tool_server.sh: $log can't be written; set TOOL_SERVER_LOG" >&2; exit 2
fi 2>/dev/null
urls="$(mktemp)"
trap 'rm -f "$urls"' EXIT
# shellcheck disable=SC2086
nohup "$python" -P -m hdpo.toolserver.app --host "${TOOL_SERVER_HOST:-127.0.0.1}" --port "$port" \
    --workers "$workers" ${TOOL_SERVER_ARGS:-} >"$urls" 2>"$log" </dev/null &
server=$!
for _ in $(seq 1200); do
    if [ -s "$urls" ]; then cat "$urls"; exit 0; fi
    if ! kill -0 "$server" 2>/dev/null; then tail -n 5 "$log" >&2; exit 1; fi
    sleep 0.1
done
kill "$server"; echo "start_tool_server.sh: not ready within 120 s, see $log" >&2; exit 1
