"""Entry point for launchers: accelerate launch --config_file launch/accelerate/zero3.yaml launch/train_rl.py --config ..."""
import sys

from hdpo.cli import main

if __name__ == "__main__":
    sys.exit(main(["rl", *sys.argv[1:]]))
