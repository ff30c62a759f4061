"""Activation times weight, for whole units ("Wanda-sp"): what a unit's columns say, times how large its activations are.

The structured form of Wanda (Sun and others, arXiv:2306.11695) that FLAP (arXiv:2312.11983) and Bonsai use as a baseline
and prior: |W_out,j| · ‖x_j‖ of the output matrix. Which norm of the column is taken differs between codes: the options
below. OURS: for dimensions of queries and keys inside heads, the keys of the tokens stand for the matrix that reads queries,
so that a pair's score is the sum over heads of ‖q_j‖² · ‖k_j‖².
"""

from typing import Literal

from secateur.network.anatomy import COLUMN_AXES, NEURON_AXES
from secateur.registry import Cut, InputNorms, Units, method


@method(
    "wanda_units",
    kind="structure",
    paper="arXiv:2306.11695",
    claim="none for whole units: a baseline of later papers",
    when="after training",
    speedup="universal",
    axes=(*COLUMN_AXES, "head_dims", "expert_neurons"),
    criterion="activation",
    schedule="one-shot",
    refuses=lambda given: (
        "over=mean is of the columns of a head, and a neuron has one; leave it out, or cut heads."
        if given["over"] != "sum" and set(given["axis"]) <= set(NEURON_AXES)
        else None
    ),
)
def wanda_units(
    units: Units, norms: InputNorms, *, norm: Literal["l2", "l1"] = "l2", over: Literal["sum", "mean"] = "sum"
) -> Cut:
    """Keeps the units with the largest activation × output weight.

    Args:
        norm: of each output column: l2 gives, squared, what the output loses if inputs were independent; l1 is Bonsai's
            prior.
        over: how the columns of a head make its score; a neuron has one.
    """
    columns = units.output.norm(dim=0, p=2 if norm == "l2" else 1) * norms.norms
    scores = units.per_unit(columns.square() if norm == "l2" else columns)
    return units.best(scores.sum(1) if over == "sum" else scores.mean(1))
