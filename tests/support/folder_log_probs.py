"""Usage: folder_log_probs.py FOLDER    Print the version of transformers and log-probs of fixed tokens, with an image where the
model sees. Imports torch and transformers alone, so that it runs under any version of them."""
import json
import sys

import torch
import transformers

if __name__ == "__main__":
    folder = sys.argv[1]
    config = transformers.AutoConfig.from_pretrained(folder)
    sees = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(10, 210).remainder(200)[None]
    inputs = {}
    if sees:
        ids = torch.cat([ids, torch.tensor([[config.vision_start_token_id, *[config.image_token_id] * 4,
                                             config.vision_end_token_id, 65, 66]])], 1)
        patch = config.vision_config.patch_size
        inputs = {"pixel_values": torch.linspace(-1, 1, 16 * 3 * 2 * patch * patch).view(16, -1),
                  "image_grid_thw": torch.tensor([[1, 4, 4]])}
        if transformers.__version__ >= "5":
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0, :-1].double()
    found = (logits - logits.logsumexp(-1, keepdim=True)).gather(-1, ids[0, 1:, None])[:, 0]
    print("RESULT " + json.dumps({"version": transformers.__version__, "log_probs": found.tolist()}))
