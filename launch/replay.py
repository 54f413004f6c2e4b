"""Entry point for launchers: accelerate launch --config_file launch/accelerate/zero3.yaml launch/replay.py RUN --step N"""
import sys

from hdpo.cli import main

if __name__ == "__main__":
    sys.exit(main(["replay", *sys.argv[1:]]))
