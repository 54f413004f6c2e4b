#!/usr/bin/env bash
# Build the sandbox image.     Usage: sandbox/build.sh [IMAGE]
#   BASE   base image with Python 3.11; default python:3.11-slim, and where no registry answers one made of Debian packages
#   PIP    how to call pip; wheels are fetched by this machine's pip, with its settings, so the build itself needs no network
set -euo pipefail
cd "$(dirname "$0")"
image="${1:-hdpo-sandbox:latest}"
pip="${PIP:-${PYTHON:-python3} -m pip}"
base="${BASE:-}"
if [ -z "$base" ]; then
    base=python:3.11-slim
    if ! docker image inspect "$base" >/dev/null 2>&1 && ! timeout 30 docker pull -q "$base" >/dev/null 2>&1; then
        base=hdpo-sandbox-base:bookworm
        docker image inspect "$base" >/dev/null 2>&1 || ./debian_base.sh "$base"
    fi
fi
mkdir -p .build/wheels
cp requirements.txt .build/wheels/
# shellcheck disable=SC2086
$pip download --quiet --dest .build/wheels --only-binary=:all: --python-version 3.11 --implementation cp \
    -r requirements.txt pip
docker build --network none --build-arg "BASE=$base" --tag "$image" .
