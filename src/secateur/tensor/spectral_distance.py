"""The distance between a layer's spectrum and that of a selection of its rows, for many selections of many layers."""

import torch
from torch import Tensor

from secateur.tensor.spectra import (
    WIDE,
    exact_dtype,
    fast_dtype,
    gram,
    gram_of_kept,
    ks_distance,
    ks_distance_at,
    ks_nodes,
    single_suffices,
    singular_values_of_gram,
    smaller_side,
)

KEPT_GRAMS = 96 * 2**20  # bytes that the whole Gram matrices of all layers may take for being kept


class SpectralDistance:
    """Kolmogorov–Smirnov distance between the singular values of W and of W[S]; remembers what belongs to a layer.

    layers: how many layers will be asked for. fast: after one exact evaluation of a layer, count eigenvalues at the
    nodes found there instead of computing all of them (spectra.ks_distance_at; above the exact distance by rounding only).
    What is remembered of a layer is O(h) numbers; its h x h Gram matrix too where all layers' fit in KEPT_GRAMS.
    """

    def __init__(self, layers: int, fast: bool = False) -> None:
        self.fast = fast
        self._layers = layers
        self._facts: dict[int, dict[str, Tensor]] = {}
        self._grams: dict[int, Tensor] = {}

    def __call__(self, layer: int, weight: Tensor, kept: Tensor) -> float:
        """Returns the distance for weight (m, h) of `layer` and sorted indices kept (k,), the same k for a layer."""
        rank = min(weight.shape)
        if layer not in self._facts:
            tall = smaller_side(weight.to(fast_dtype(rank) if self.fast else exact_dtype(rank)))
            self._facts[layer] = {"values": singular_values_of_gram(gram(tall))}
        facts = self._facts[layer]
        exact = torch.float32 if single_suffices(facts["values"]) else exact_dtype(rank)
        weight = weight.to(fast_dtype(rank) if self.fast else exact)
        whole = self._whole_gram(layer, weight)
        wide = len(kept) < weight.shape[1]
        matrix = gram(smaller_side(weight[kept])) if wide else gram_of_kept(weight, kept, whole)
        if "nodes" in facts:
            return ks_distance_at(facts["nodes"], facts["values"], matrix, matrix.shape[0])
        values = singular_values_of_gram(matrix)
        if self.fast:
            # One count is a step of 1/h: a narrow layer needs several nodes to come near the maximum, a wide one not.
            facts["nodes"] = ks_nodes(facts["values"], values, 5 if rank <= WIDE else 1)
        return ks_distance(facts["values"], values)

    def _whole_gram(self, layer: int, weight: Tensor) -> Tensor | None:
        rows, columns = weight.shape
        # By the sizes alone and never by what happens to be in memory: two ways of summing differ in the last bit.
        if rows < columns or self._layers * columns**2 * max(weight.element_size(), 4) > KEPT_GRAMS:
            return None
        if layer not in self._grams:
            self._grams[layer] = gram(weight)
        return self._grams[layer]

    def facts(self, layer: int) -> dict[str, Tensor]:
        """Returns what has to be kept of a layer to go on elsewhere or later: "values" (h,) and "nodes" (c,)."""
        return self._facts.get(layer, {})

    def learn(self, facts: dict[int, dict[str, Tensor]]) -> None:
        """Takes over, by layer, what `facts` returned in other processes."""
        self._facts.update(facts)

    def state(self) -> dict[str, Tensor]:
        """Returns the facts of all layers as flat tensors, "spectrum.layer.name"."""
        return {
            f"spectrum.{layer}.{name}": tensor
            for layer, facts in sorted(self._facts.items())
            for name, tensor in facts.items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Puts back what `state` returned; other keys are ignored."""
        for key, tensor in state.items():
            if key.startswith("spectrum."):
                _, layer, name = key.split(".")
                self._facts.setdefault(int(layer), {})[name] = tensor
