"""What pruning weights costs a small mixture of experts, and whether MoE-Pruner's gates help, over calibration seeds.

    python benchmarks/moe_quality.py --calibration wikitext2/validation.txt --text wikitext2/test.txt \\
        [--steps 400] [--seeds 3] [--patterns 0.5 2:4] [--only wanda ...] [--model DIRECTORY]

No pretrained mixture is small enough to come with a package, so one is trained here first: Mixtral's architecture, 4
experts of which 2 are chosen, reading bytes, on the text that is then calibrated on. It is small and has seen little
text: the order of methods on it proves nothing about Mixtral-8x7B. Loss and perplexity are per byte, in float32. --model
keeps it: an existing one is not trained again.
"""

import argparse
import math
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from common import show, write_ids
from secateur.evaluation import Tokens, perplexity, read_text
from secateur.network.source import load
from weights_quality import run, told

METHODS = ("magnitude", "wanda", "moe_pruner", "sparsegpt")
CONTEXT, BATCH, RATE, WARM = 256, 8, 3e-3, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True, help="also what the model is trained on")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=CONTEXT)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--model", type=Path, help="where the trained model lies, or is to lie")
    options = parser.parse_args()
    options.window = CONTEXT
    learned, text = _bytes(options.calibration), _bytes(options.text)
    with tempfile.TemporaryDirectory() as folder:
        directory = options.model or Path(folder) / "model"
        if not (directory / "config.json").exists():
            train(learned.ids, options.steps, options.hidden, options.blocks).save_pretrained(directory)
        module, _ = load(directory)
        dense = perplexity(module, text, window=CONTEXT, windows=options.windows).perplexity
        count = sum(parameter.numel() for parameter in module.parameters())
        print(
            f"{count:,} parameters; on {options.text.name} a perplexity of {dense:.3f} per byte, where the frequency of "
            f"bytes alone gives {math.exp(_entropy(text.ids)):.3f}; {_told_routes(module, text.ids)}",
            flush=True,
        )
        ids = write_ids(Path(folder) / "ids.json", [learned.ids])
        for pattern in options.patterns:
            rows = []
            for name in options.only:
                step = {name: {"pattern": pattern}}
                one = partial(run, module, text, ids, options, step=step)
                runs = [one(seed=seed) for seed in range(1 if name == "magnitude" else options.seeds)]
                print(f"{pattern}, {name}: " + told(runs, ", "), flush=True)
                rows.append((name, len(runs), *told(runs).split("|")))
            show(
                f"a Mixtral of {count:,} parameters at {pattern}, {options.samples} x {options.length} calibration bytes, "
                f"first {options.windows} windows of {options.text.name}; dense {dense:.3f}; medians and ranges",
                ("method", "seeds", "perplexity", "error %", "held-out error %", "seconds"),
                rows,
            )


def train(ids: Tensor, steps: int, hidden: int, blocks: int) -> nn.Module:
    """A mixture that predicts these bytes; its experts are balanced by the architecture's own loss."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=None,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
    )
    model = MixtralForCausalLM(config).train()
    learner = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        learner, lambda step: min((step + 1) / WARM, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    drawn, began = torch.Generator().manual_seed(0), time.time()
    for step in range(steps):
        starts = torch.randint(len(ids) - CONTEXT, (BATCH,), generator=drawn)
        batch = torch.stack([ids[start : start + CONTEXT] for start in starts.tolist()])
        logits = (found := model(batch)).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        (loss + config.router_aux_loss_coef * found.aux_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        learner.step()
        schedule.step()
        learner.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.3f} nats per byte, {time.time() - began:.0f} s", flush=True)
    model.config.output_router_logits = False
    return model.eval()


def _bytes(path: Path) -> Tokens:
    content = read_text(path).encode()
    return Tokens(torch.frombuffer(bytearray(content), dtype=torch.uint8).long(), path.name)


def _entropy(ids: Tensor) -> float:
    """Nats per byte of a text whose bytes are drawn by their frequency alone."""
    shares = torch.bincount(ids).double() / len(ids)
    return float(-(shares * shares.clamp_min(1e-30).log()).sum())


@torch.no_grad()
def _told_routes(module: nn.Module, ids: Tensor) -> str:
    """How tokens are divided: gates that are all alike would make MoE-Pruner another name for Wanda."""
    scores = module(ids[: 16 * CONTEXT].view(16, CONTEXT), output_router_logits=True).router_logits
    best = torch.stack([each.softmax(-1).topk(2).values for each in scores])
    gates = (best / best.sum(-1, keepdim=True))[..., 0]
    chosen = torch.stack([torch.bincount(each.topk(2).indices.flatten(), minlength=4) for each in scores]).double()
    shares = chosen / chosen.sum(-1, keepdim=True)
    return (
        f"the larger of two gates is {gates.mean():.2f} in the mean ({gates.quantile(0.1):.2f} to {gates.quantile(0.9):.2f} "
        f"in four fifths), and experts get {shares.min():.0%} to {shares.max():.0%} of the tokens of their block"
    )


if __name__ == "__main__":
    main()
