"""Runs in a process of its own: loads a model with plain transformers, reads a few tokens, prints its memory as JSON.

Argument: one JSON object with location, gguf (file name or null), tokens, dtype, threads, trust_remote_code. Nothing of
Secateur is imported: what it measures is what a user's own process will need.
"""

import json
import resource
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def peak() -> int:
    """The highest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux hands ru_maxrss of the parent on through fork and exec; VmHWM belongs to this program alone.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def main() -> None:
    """Prints {"baseline": bytes before loading, "peak": bytes at the highest, "tokens": how many were read}."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    baseline = peak()
    options = {"gguf_file": request["gguf"]} if request["gguf"] else {}
    model = AutoModelForCausalLM.from_pretrained(
        request["location"],
        dtype=getattr(torch, request["dtype"]),
        trust_remote_code=request["trust_remote_code"],
        **options,
    )
    model.eval()
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or request["tokens"]
    tokens = min(request["tokens"], limit)
    with torch.inference_mode():
        model(torch.arange(tokens)[None] % config.vocab_size)
    print(json.dumps({"baseline": baseline, "peak": peak(), "tokens": tokens}))


if __name__ == "__main__":
    main()
