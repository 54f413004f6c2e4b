"""Entry point for launchers: accelerate launch --config_file launch/accelerate/zero3.yaml launch/train_sft.py --config ..."""
import sys

from hdpo.cli import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
