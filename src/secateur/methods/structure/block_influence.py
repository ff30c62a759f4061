"""ShortGPT: the blocks that turn the hidden states least are redundant.

Men and others, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv:2403.03853. Block
influence BI_i = 1 − E[xᵀy / (|x| |y|)] over calibration tokens, x before and y behind block i; the lowest go at once.
"""

from secateur.registry import Blocks, Flow, Kept, method


@method(
    "block_influence",
    kind="structure",
    paper="arXiv:2403.03853",
    claim="removing layers alone significantly outperforms earlier pruning of large language models",
    when="after training",
    speedup="universal",
    criterion="similarity",
    schedule="one-shot",
)
def block_influence(blocks: Blocks, flow: Flow) -> Kept:
    """Removes the blocks whose output points most nearly where their input does, by the mean cosine of tokens."""
    return blocks.without_lowest(dict(enumerate((1 - flow.cosine).tolist())))
