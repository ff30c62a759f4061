"""Statistics without any data: how neurons respond to tokens that the vocabulary's own order makes likely.

Tokenizers that merge by frequency number their vocabulary roughly by it, so Zipf's law over the row index of the embedding
stands in for a corpus. Nothing is read but the checkpoint; where a vocabulary is not ordered by frequency, this prior is
wrong, and what stands on it is worth less. One that begins with special tokens and bytes (LLaMA-2's first 259 entries) gets
those drawn most, and so fits less too.

OFFSET, EXPONENT and PER_NEURON were chosen on one model only, SmolLM2-135M, by perplexity on WikiText-2's validation text;
that Zipf's law does better than uniform drawing was first seen on three windows of the test text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import RunError
from secateur.files import read_tensors, write_tensors
from secateur.network.source import Source
from secateur.network.stream import observe
from secateur.network.verify import stored

OFFSET, EXPONENT = 10.0, 1.2  # Zipf-Mandelbrot: p(row r) is proportional to (r + OFFSET) ** -EXPONENT
LENGTH = 64  # tokens of a sequence; they are independent, and only give attention something to mix
PER_NEURON = 4  # tokens for each neuron of the widest layer: fewer, and a refit learns the sample
MOST_TOKENS = 16384  # bounds memory and time; layers wider than 4096 neurons get fewer than PER_NEURON for each


@dataclass(frozen=True)
class SyntheticGram:
    """Second moment of one layer's neurons, a = the input of its output matrix, in the dense network.

    Args:
        matrix: (m, m) mean of a aᵀ over the tokens, float32, not centred.
        mean: (m,) mean of a.
        tokens: how many tokens were drawn.
    """

    matrix: Tensor
    mean: Tensor
    tokens: int

    @staticmethod
    def bytes(units: int) -> int:
        """What is kept of a layer of `units` neurons."""
        return 4 * units * (units + 1)

    @classmethod
    def read(cls, path: Path) -> "SyntheticGram":
        tensors, _ = read_tensors(path)
        return cls(tensors["matrix"], tensors["mean"], int(tensors["tokens"]))

    def write(self, path: Path) -> None:
        write_tensors(path, {"matrix": self.matrix, "mean": self.mean, "tokens": torch.tensor(self.tokens)})


def zipf_tokens(vocabulary: int, count: int, generator: torch.Generator, length: int = LENGTH) -> Tensor:
    """(sequences, length) token ids drawn independently by Zipf's law over the vocabulary's order; about `count` of them."""
    prior = (torch.arange(vocabulary, dtype=torch.float64) + OFFSET) ** -EXPONENT
    sequences = -(-count // length)
    return torch.multinomial(prior, sequences * length, replacement=True, generator=generator).view(sequences, length)


def synthetic_grams(
    source: Source, generator: torch.Generator, keep: Callable[[int, SyntheticGram], None], length: int = LENGTH
) -> None:
    """Runs the dense network once on drawn tokens, one block in memory; `keep` is given each block's statistic.

    The hidden states of all tokens are held (tokens · h numbers) and, in one block at a time, its neurons' (tokens · m).

    Raises RunError naming the block in which a response is not finite.
    """
    layers = {block.index: block.feed_forward for block in source.anatomy.blocks if block.feed_forward}
    widest = max(layer.units for layer in layers.values())
    positions = getattr(source.config.get_text_config(), "max_position_embeddings", None) or length
    count = min(PER_NEURON * widest, MOST_TOKENS)
    ids = zipf_tokens(source.anatomy.vocabulary, count, generator, min(length, positions))

    def learn(block: int, inputs: Tensor) -> None:
        responses = inputs.reshape(-1, inputs.shape[-1])
        gram = SyntheticGram(responses.T @ responses / len(responses), responses.mean(dim=0), len(responses))
        if not bool(torch.isfinite(gram.matrix).all()):
            raise RunError(
                f"the neurons of block {block} respond with non-finite values to drawn tokens, so nothing can be said of "
                "them; use a method that reads weights alone, such as prunenet."
            )
        keep(block, gram)

    watched = {layer.down.parameter.rpartition(".")[0]: index for index, layer in layers.items()}
    observe(source.skeleton, source.anatomy, stored(source), ids, watched, learn)
