"""Entry point for launchers: accelerate launch --config_file launch/accelerate/zero3.yaml launch/evaluate.py --config ..."""
import sys

from hdpo.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
