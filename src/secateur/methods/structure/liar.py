"""LIAR: after any choice of units, the kept output weights are rewritten so that the output stays what it was.

"Reconstruct the Pruned Model without Any Retraining", arXiv:2407.13331: least-squares matrices interpolate the removed
inputs from the kept ones. Its full text and code were not available; from its abstract and a public summary is that kept
weights and biases are rewritten linearly. Re-derived are the equations: Q = argmin ‖X_R − X_K Q‖² + ‖Λ^½ Q‖²,
W'_K = W_K + W_R Qᵀ, and with centred inputs b' = b + W_R (μ_R − Qᵀ μ_K). OURS: the ridge Λ stands on Q, so that more of it
shrinks towards plain removal, and is relative to each kept input's own energy, because a mean ridge is decided by a few
massive inputs; inputs come through the already repaired blocks. Where there is no output bias the inputs are not centred.
"""

from typing import Annotated

import torch
from pydantic import Field

from secateur.network.anatomy import COLUMN_AXES
from secateur.registry import Cut, Gram, Moments, Units, UnitsFrom, method
from secateur.tensor.interpolation import interpolate


@method(
    "liar",
    kind="structure",
    paper="arXiv:2407.13331",
    claim="BERT keeps 98 % of its accuracy with half of its parameters removed, in minutes",
    when="after training",
    speedup="universal",
    axes=(*COLUMN_AXES, "expert_neurons"),
    criterion="another method's",
    schedule="one-shot",
    refuses=lambda given: (
        "fold merges units instead of choosing some, and its merging would be lost; use fold alone."
        if given["by"] is not None and given["by"].method.name == "fold"
        else None
    ),
)
def liar(
    units: Units,
    gram: Gram,
    moments: Moments,
    *,
    ridge: Annotated[float, Field(ge=0)] = 0.1,
    by: UnitsFrom = "wanda_units",
) -> Cut:
    """Lets the units that another method keeps take over what the others did, as far as they can tell it.

    Args:
        ridge: relative to the energy of each kept input; more keeps the weights closer to plain removal.
        by: the method that chooses the units.
    """
    kept: torch.Tensor = by
    output, bias = units.output, units.output_bias
    columns = units.columns(kept)
    mean = moments.mean if bias is not None else None
    new, shift = interpolate(gram.matrix / gram.tokens, output, columns, ridge, mean)
    return Cut(kept, new, None if bias is None else bias + shift)
