"""llmcompressor on a model directory: runs in an environment of its own, which has llmcompressor and not Secateur.

    PEER_PYTHON benchmarks/peer_llmcompressor.py MODEL IDS.json --pattern 0.5 --report REPORT.json [--save DIRECTORY]

Prunes all linear layers inside the blocks, in float32, calibrated on the lists of token ids of IDS.json, in their order.
Writes what its oneshot() took and which versions ran to REPORT.json, and the model, uncompressed, to DIRECTORY.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("--method", choices=("sparsegpt", "wanda"), default="sparsegpt")
    parser.add_argument("--pattern", default="0.5", help="a fraction, or N:M")
    parser.add_argument("--batch", type=int, default=1, help="sequences that go through a block together")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    sequences = json.loads(options.ids.read_text())
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(ids) for ids in sequences]})
    kept, grouped, of = options.pattern.partition(":")
    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[options.method](
        sparsity=1 - int(kept) / int(of) if grouped else float(options.pattern),
        mask_structure=options.pattern if grouped else "0:0",
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )
    began, used = time.perf_counter(), time.process_time()
    model = oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(options.model),
        dataset=data,
        recipe=modifier,
        batch_size=options.batch,
        num_calibration_samples=len(sequences),
        max_seq_length=max(map(len, sequences)),
        shuffle_calibration_samples=False,
    )
    took = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - used}
    layers = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    zeros, weights = (sum(int(count(layer)) for layer in layers) for count in (_zeros, torch.numel))
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")}
    report = {**took, "threads": torch.get_num_threads(), "sparsity": zeros / weights, "versions": versions}
    options.report.write_text(json.dumps(report, indent=1))
    if options.save:
        model.save_pretrained(options.save, save_compressed=False)


def _zeros(weight: torch.Tensor) -> int:
    return weight.numel() - int(weight.count_nonzero())


if __name__ == "__main__":
    main()
