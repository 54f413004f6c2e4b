#!/usr/bin/env bash
# Make a base image from Debian packages, for machines that reach no image registry. Needs root and debootstrap.
# Usage: sandbox/debian_base.sh [IMAGE] [SUITE]        the suite must bring Python 3.11 (bookworm does)
set -euo pipefail
image="${1:-hdpo-sandbox-base:bookworm}" suite="${2:-bookworm}"
command -v debootstrap >/dev/null || { echo "debian_base.sh: install debootstrap first (apt-get install debootstrap)" >&2; exit 2; }
root="$(mktemp -d)"
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=python3 "$suite" "$root" ${DEBIAN_MIRROR:-} >&2
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/usr/share/{doc,man,locale,info}/*
# nothing setuid: sessions can't gain privileges anyway, but why offer it
find "$root" -xdev -perm /6000 -type f -exec chmod a-s {} +
tar -C "$root" -c . | docker import - "$image" >&2
echo "$image"
