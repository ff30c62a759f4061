"""SliceGPT with ONE rotation for the whole network: a baseline, NOT the published method.

Ashkboos and others, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", ICLR 2024, arXiv:2401.15024.
The paper rotates the residual stream of each block to the principal components of its own inputs, deletes the last ones,
and adds a matrix to every shortcut that turns one block's basis into the next one's. No configuration of an ordinary model
has such matrices. Here all blocks share one basis, the principal components of what all norms are given together, so there
are no shortcut matrices and the result is an ordinary model; it must lose more than the published one at an equal width.

As in the paper: scales of norms move into the matrices that read them, and a token counts by its direction (each is divided
by its root mean square); norms go on dividing by all h channels, here by a constant √(h/d) in their scales. Embedding and
head of a tied model are two matrices afterwards. Not taken over: the damping, which moves no eigenvector; statistics from
behind layers that are cut already; widths rounded down to a multiple of 8 (here to the nearest of `multiple_of`); a further
random rotation of what stays, which changes nothing before quantization. The first four tokens of a sequence do not count
(calibration.skip). Only networks with RMSNorm.
"""

from typing import Annotated, Literal

from pydantic import Field

from secateur.network.widths import round_width
from secateur.registry import Context, Network, Plan, Ratio, StreamMoment, Units, method
from secateur.tensor.directions import principal_directions, random_directions


@method(
    "slicegpt",
    kind="structure",
    paper="arXiv:2401.15024",
    claim="none for this baseline with one rotation for all blocks; the paper's, with one for each and matrices in the "
    "shortcuts: 25 % of LLaMA-2-70B goes and 99 % of its zero-shot performance stays",
    when="after training",
    speedup="universal",
    criterion=("spectrum", "random"),
    schedule="one-shot",
    comparison="global",
    axes=("channels",),
)
def slicegpt(
    network: Network[Units],
    moment: StreamMoment,
    context: Context,
    *,
    ratio: Ratio = 0.2,
    basis: Literal["pca", "random"] = "pca",
    multiple_of: Annotated[int, Field(ge=1)] = 8,
) -> Plan:
    """Rotates the residual stream to its principal components, in one basis for all blocks, and drops the last ones.

    Args:
        ratio: fraction of the stream's directions removed, 0 ≤ ratio < 1; with 0 it is only rotated.
        basis: pca, or random to see what the principal components are worth.
        multiple_of: directions kept are rounded to the nearest multiple of this where the ratio allows it.
    """
    keep = round_width(network.hidden, ratio, multiple_of)
    if basis == "pca":
        directions = principal_directions(moment.matrix)
    else:
        directions = random_directions(network.hidden, context.generator("basis"))
    kept = directions[:, :keep]
    share = float((kept * (moment.matrix.double() @ kept)).sum() / moment.matrix.double().trace())
    context.note("energy kept", round(share, 6))
    return Plan(basis=kept)
