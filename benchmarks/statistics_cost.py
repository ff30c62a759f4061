"""What it costs to collect the statistics of several methods in one pass, against the most demanding one alone.

    python benchmarks/statistics_cost.py --calibration wikitext2/validation.txt [--rounds 3] [--blocks 30]

SmolLM2-135M, float32. Timed, for each block: the pass of all calibration tokens up to the block's last matrix, with the
collecting, interleaved between the sets of statistics. Passing hidden states on to the next block is not timed: it is the
same for all. The union is compared with the largest of the methods' own times, and with their sum, which is what separate
passes would take.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from common import SMOLLM2, plain_model, show, text_ids
from secateur.calibration.collector import Collector, Enough
from secateur.calibration.propagation import Propagation
from secateur.calibration.samples import Samples
from secateur.network.source import Source, open_model
from secateur.network.stream import put_parameter
from secateur.network.verify import stored
from secateur.registry import find
from secateur.solving import Solver
from secateur.targets import chosen

METHODS = ("wanda", "sparsegpt", "apt", "admm", "dsnot")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, help="only the first ones")
    options = parser.parse_args()
    windows = text_ids(options.calibration).ids.split(options.length)[: options.samples]
    asked = {name: statistics(name) for name in options.methods}
    sets = {"the pass alone": set[str](), **asked, "union": set[str]().union(*asked.values())}
    with tempfile.TemporaryDirectory() as folder:
        source = open_model(plain_model(Path(folder) / "model"))
        seconds = timed(source, Samples(list(windows), [], "text"), sets, options.rounds, options.blocks, Path(folder))
    worst = max(seconds[name] for name in asked)
    rows = [
        (name, ", ".join(sorted(wanted)) or "nothing", f"{seconds[name]:.2f} s", f"{seconds[name] / worst:.2f}x")
        for name, wanted in sets.items()
    ]
    total = sum(seconds[name] for name in asked)
    rows.append(("one pass for each method", "", f"{total:.2f} s", f"{total / worst:.2f}x"))
    show(
        f"{SMOLLM2}, {options.blocks or len(source.anatomy.blocks)} blocks, {options.samples} x {options.length} tokens, "
        f"fastest of {options.rounds} rounds for each block, {torch.get_num_threads()} threads",
        ("collected for", "sums", "time", "of the most demanding"),
        rows,
    )


def statistics(name: str) -> set[str]:
    """What a method with its defaults asks for of a matrix's inputs, masks of other methods included."""
    method = find(name)
    kinds = Solver.of(method, method.validate({})).statistics
    return {part for kind in kinds for part in kind.wants}  # type: ignore[attr-defined]


@torch.no_grad()
def timed(
    source: Source, samples: Samples, sets: dict[str, set[str]], rounds: int, blocks: int | None, folder: Path
) -> dict[str, float]:
    """Seconds for each set, summed over blocks; of a block the fastest round counts, since load only adds."""
    refs = chosen(source, None)
    widest = max(max(ref.rows, ref.columns) for found in refs.values() for ref in found)
    propagation = Propagation(source, samples, folder, torch.float32, widest=widest)
    propagation.capture(stored(source))
    seconds = dict.fromkeys(sets, 0.0)
    for block in source.anatomy.blocks[:blocks]:
        parameters = {name: source.parameter(name).float().clone() for name in block.parameters}
        for name, tensor in parameters.items():
            put_parameter(source.skeleton, name, torch.nn.Parameter(tensor, requires_grad=False))
        fastest = dict.fromkeys(sets, float("inf"))
        for turn in range(rounds):
            for name in list(sets)[:: -1 if turn % 2 else 1]:
                collector = Collector(refs[block.index], parameters, sets[name], None, propagation.batches)
                began = time.perf_counter()
                propagation.run(block.index, around=partial(collector.watching, to_the_end=False), enough=Enough)
                collector.results()
                fastest[name] = min(fastest[name], time.perf_counter() - began)
        propagation.run(block.index, write=True)
        propagation.forget(block.index)
        for name in block.parameters:
            put_parameter(source.skeleton, name, torch.nn.Parameter(parameters[name].to("meta"), requires_grad=False))
        seconds = {name: seconds[name] + fastest[name] for name in sets}
        print(
            f"block {block.index}: " + ", ".join(f"{name} {took:.2f} s" for name, took in fastest.items()), flush=True
        )
    return seconds


if __name__ == "__main__":
    main()
