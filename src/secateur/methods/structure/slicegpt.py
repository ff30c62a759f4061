"""SliceGPT: the residual stream of each block turned to its principal components, and the last of these deleted.

Ashkboos and others, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", ICLR 2024, arXiv:2401.15024.

An RMSNorm without scale commutes with a rotation, so scales move into the matrices that read the norm (W ← W diag γ), and
in front of every attention and every feed-forward the stream may have an orthogonal basis Q of its own: that of the
eigenvectors of C = Σ xᵀx, x the output of the norm on calibration tokens, in float64. Rows and columns of all but the d
largest go: embeddings become E Q, readers W Q, writers Q'ᵀ W in the basis Q' of the next place, and the stream passes beside
each part by the matrix Q[:, :d]ᵀ Q'[:, :d]. Statistics come from behind what has been sliced before, the second norm's of a
block from behind its sliced attention. Norms go on dividing by all h channels, here by a constant √(h/d) in their scales,
with which d/h of their epsilon counts. Embedding and head of a tied model are two matrices afterwards.

A LayerNorm becomes an RMSNorm first: what it subtracts, the mean, goes from all that is added to the stream (embeddings and
output matrices W ← M W, M = 1 - 11ᵀ/h), and its bias β into the biases of the matrices behind it, b ← b + W β, of which
those that had none get one, the head's too. Attention and feed-forward side by side read one stream: they share one basis,
and one matrix passes both.

No configuration of an ordinary model has matrices beside parts, so the result brings a file of code
(`network/modelling_file.py`), which also says other norms, further biases, and how wide the stream is where the
configuration ties that to the heads. Matrices beside parts hold d² numbers each, two in a block or one, by which less is
saved than `ratio` says; a small model whose head shared the embedding may come out larger than it was, which the receipt
counts and warns of. With rotation=one all places share one basis, the principal components of what all norms are given
together: no matrices, an ordinary model; that is no published method, and only for RMSNorms.

Different from the paper: d is rounded to the nearest multiple of 8, not down; with rotation=one the first four tokens of a
sequence do not count (calibration.skip; in the published form all do). Different from its code: a token counts by its
direction, as the paper says, not by its size; the last block and the head are sliced like all others, because no block of an
architecture gives a wider stream than it is given; no damping, which moves no eigenvector; no further random rotation of
what stays, which changes nothing before quantization. Its code was read to compare how LayerNorms and parallel blocks are
treated (alike), not run. Not built: norms behind what they norm (the smallest OPT but one), between embedding and blocks
(BLOOM) or on both sides of a part (Gemma 2), around which the stream cannot be turned; mixtures of experts.
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from secateur.registry import Context, Network, Plan, Ratio, SlicedStream, StreamMoment, Units, method
from secateur.tensor.directions import principal_directions, random_directions


@method(
    "slicegpt",
    kind="structure",
    paper="arXiv:2401.15024",
    claim="25 % of the parameters of LLaMA-2-70B, OPT-66B and Phi-2 go, and 99 %, 99 % and 90 % of their zero-shot "
    "performance stay",
    when="after training",
    speedup="universal",
    criterion=("spectrum", "random"),
    schedule="one-shot",
    comparison="global",
    axes=("channels",),
    uneven=True,
    only={"stream": {"rotation": "each"}, "moment": {"rotation": "one"}},
)
def slicegpt(
    network: Network[Units],
    stream: SlicedStream | None,
    moment: StreamMoment | None,
    context: Context,
    *,
    ratio: Ratio = 0.2,
    rotation: Literal["each", "one"] = "each",
    basis: Literal["pca", "random"] = "pca",
    multiple_of: Annotated[int, Field(ge=1)] = 8,
) -> Plan:
    """Turns the residual stream to its principal components in front of every norm, and drops the last ones.

    Args:
        ratio: fraction of the stream's directions removed, 0 ≤ ratio < 1; with 0 it is only rotated.
        rotation: each, the published method: a basis in front of each attention and each feed-forward, with matrices beside
            them (needs a file of code); or one basis for the whole network, without (an ordinary model; RMSNorm alone).
        basis: pca, or the same random one everywhere to see what the principal components are worth.
        multiple_of: directions kept are rounded to the nearest multiple of this where the ratio allows it, and to what the
            configuration can say.
    """
    keep = network.channels(ratio, multiple_of, turned=stream is not None)

    def kept(seen: StreamMoment) -> Tensor:
        if basis == "pca":
            return principal_directions(seen.matrix)[:, :keep]
        return random_directions(network.hidden, context.generator("basis"))[:, :keep]

    if moment is not None:
        one = kept(moment)
        context.note("energy kept", round(moment.share(one), 6))
        return Plan(basis=one)
    assert stream is not None, "one of them is asked for"
    for _, seen in stream.moments():
        stream.keep(kept(seen))
    shares = [stream.bases.share(place) for place in range(stream.bases.places)]
    context.note("energy kept", round(sum(shares) / len(shares), 6))
    context.note("least energy kept", round(min(shares), 6))
    return Plan(bases=stream.bases)
