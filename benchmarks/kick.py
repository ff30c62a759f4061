"""Whether knowledge goes before perplexity shows it: LLM-KICK without a judge, on SmolLM2-135M at several sparsities.

    python benchmarks/kick.py --text wikitext2/test.txt --calibration wikitext2/validation.txt \\
        [--methods wanda magnitude] [--sparsities 0.1 0.2 0.3 0.4 0.5] [--limit 100] [--texts 4] [--no-generated]

Float32, unstructured, one draw of calibration tokens. Scores are those of `secateur evaluate --kick`; (m) means matching: at
most 5 % below the dense model. Perplexity on the first windows of 1024 tokens; it is called risen from 10 % on.
"""

import argparse
import tempfile
import time
from pathlib import Path

import secateur
from common import SMOLLM2, show, text_ids, write_ids
from secateur.evaluation import Kick, examine_dense, kick, perplexity, read_facts
from secateur.network.source import load
from secateur.recipe import Recipe

RISEN = 0.1
TASKS = ("closed book", "closed book, generated", "open book", "open book, generated", "summarisation", "instructions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["wanda", "magnitude"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--limit", type=int, help="how many facts; default all")
    parser.add_argument("--texts", type=int, help="how many passages, and how many instructions; default all")
    parser.add_argument("--generated", action=argparse.BooleanOptionalAction, default=True, help="greedy answers too")
    parser.add_argument("--facts", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=SMOLLM2)
    options = parser.parse_args()
    module, words = load(options.model)
    text = text_ids(options.text, options.model)
    before = perplexity(module, text, window=1024, windows=options.windows).perplexity
    facts = read_facts(options.facts, options.limit)
    dense = examine_dense(module, words, facts, limit=options.texts, generated=options.generated)
    known = ", ".join(f"{task} {sum(hits) / len(hits):.3f}" for task, hits in dense.answered.items())
    print(f"dense: perplexity {before:.3f}, {known}", flush=True)
    rows, verdicts = [], []
    with tempfile.TemporaryDirectory() as folder:
        ids = write_ids(Path(folder) / "ids.json", [text_ids(options.calibration, options.model).ids])
        calibration = {"data": str(ids), "samples": options.samples, "length": options.length}
        for method in options.methods:
            found: list[tuple[float, float, Kick]] = []
            for sparsity in sorted(options.sparsities):
                began = time.perf_counter()
                recipe = {"steps": [{method: {"pattern": sparsity}}], "seed": options.seed, "calibration": calibration}
                cut = secateur.compress(module, recipe=Recipe.parse(recipe)).model
                assert cut is not None
                after = perplexity(cut, text, window=1024, windows=options.windows).perplexity
                scores = kick(cut, words, dense)
                if not rows:
                    whole = [f"{one.reference:.3f}" if (one := scores.score(task)) else "-" for task in TASKS]
                    rows.append(("dense", "", f"{before:.2f}", *whole))
                found.append((sparsity, after / before - 1, scores))
                cells = [_cell(scores, task) for task in TASKS]
                rows.append((method, sparsity, f"{after:.2f} ({100 * (after / before - 1):+.1f} %)", *cells))
                print(
                    f"{method} {sparsity}: {after:.3f}, {', '.join(cells)}, {time.perf_counter() - began:.0f} s",
                    flush=True,
                )
            verdicts.append(f"{method}: {_verdict(found)}")
    asked = dense.facts
    show(
        f"{options.model}, {len(asked.items)} of {asked.of} facts ({asked.name}), first {options.windows} windows of "
        f"{options.text.name}; (m): matching",
        ("method", "sparsity", "perplexity", *TASKS),
        rows,
    )
    print("\n".join(verdicts))


def _cell(scores: Kick, task: str) -> str:
    score = scores.score(task)
    return "-" if score is None else f"{score.value:.3f}" + (" (m)" if score.matching else "")


def _verdict(found: list[tuple[float, float, Kick]]) -> str:
    """What fails first: closed-book knowledge, perplexity, or what needs only the context."""
    first = {
        "perplexity": next((sparsity for sparsity, rise, _ in found if rise > RISEN), None),
        **{
            task: next((at for at, _, scores in found if (one := scores.score(task)) and one.matching is False), None)
            for task in TASKS
        },
    }
    lost, risen = first["closed book"], first["perplexity"]
    ahead = lost is not None and (risen is None or lost < risen)
    told = "; ".join(f"{name} from {at}" if at is not None else f"{name} not" for name, at in first.items())
    return (
        f"closed-book knowledge falls {'before' if ahead else 'no earlier than'} perplexity rises by {100 * RISEN:.0f} % "
        f"(first sparsity that does not match: {told})"
    )


if __name__ == "__main__":
    main()
