"""Run under a launcher: the held-out loss of demonstrations by the ZeRO-3 policy. Prints a JSON line on rank 0.

Usage: held_out_loss.py SETTING...      data.val names the rows
"""
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from hdpo.adapters.chat_format import open_chat
from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy
from hdpo.compose.policy import build_packing
from hdpo.config.file import load_config
from hdpo.data.tasks import read_demonstrations
from hdpo.train.held_out import HeldOut
from hdpo.train.sft import encode


def main() -> None:
    config = load_config(None, sys.argv[1:], environment={})
    chat = open_chat(config.model)
    policy = DeepSpeedPolicy(config.model, config.optim, chat.image_token_id, seed=0)
    rows = read_demonstrations(config.data.val, chat, config.data, config.eval.rows, max_tokens=600)
    with ThreadPoolExecutor(2) as threads:
        loss = HeldOut(config, policy, rows, partial(encode, chat), build_packing(config, chat), threads).loss()
    losses = policy.world.gather(loss)
    if policy.world.is_main:
        print("RESULT " + json.dumps({"losses": losses, "rows": len(rows)}))
    policy.close()


if __name__ == "__main__":
    main()
