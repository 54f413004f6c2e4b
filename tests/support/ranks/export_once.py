"""Usage: export_once.py MODEL FOLDER [FOLDER ...]    Save MODEL as a run does, without training it."""
import sys
from pathlib import Path

from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy
from hdpo.config import ModelConfig, OptimConfig

if __name__ == "__main__":
    policy = DeepSpeedPolicy(ModelConfig(path=sys.argv[1], dtype="float32"), OptimConfig(), None, seed=0)
    Path(sys.argv[2]).mkdir()
    policy.export_model(Path(sys.argv[2]))()
    policy.close()
