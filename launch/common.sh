# Sourced by the scripts beside it; nothing here changes the folder that the user stands in, so relative paths are the user's.
#   launch: the folder of these scripts, in a checkout or in an installed package
#   python: PYTHON, or the checkout's .venv, or the environment the package is installed in, or the active one
# Call it with -P: the folder one stands in must not shadow Python's own modules.
launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
home="$(dirname "$launch")"
if [ -d "$home/src/hdpo" ]; then
    export PYTHONPATH="$home/src${PYTHONPATH:+:$PYTHONPATH}"
    own="$home/.venv/bin/python"
else
    own="$(cd "$home/../../../.." && pwd)/bin/python"     # PREFIX/lib/pythonX/site-packages/hdpo
fi
if [ ! -x "$own" ]; then own="$(command -v python || command -v python3 || echo python3)"; fi
python="${PYTHON:-$own}"
if [ "$PWD" = "$home" ]; then launch=launch; fi            # shorter in logs and process lists
