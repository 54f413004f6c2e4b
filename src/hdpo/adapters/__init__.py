"""One vendor, one file: vLLM, DeepSpeed, accelerate, transformers, the OpenAI client, TensorBoard, wandb, PEFT.

Uses `ranks`, `packing` and `state`, never the loops. Whatever a vendor does oddly is said and ended here.
Start with `engines.py` for rollouts, `deepspeed_policy.py` for training.
"""
