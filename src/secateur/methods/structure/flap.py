"""FLAP: units go whose output hardly fluctuates, and the output bias takes over their mean.

"Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, arXiv:2312.11983. Read in its code:
the metric is how much each input fluctuates times the squared norm of its output column (WIFV); the removed mean becomes
the output bias, W_R μ_R. Recalled: the claim.

What differs, or is ours: the variance is that of all tokens, where the code adds up, sequence by sequence, distances from
the mean so far; a head's score is the sum of its columns', where the code sums their squares; the same number of units goes
in every block unless `allocation: flap_search` standardises scores and compares them over all blocks, as FLAP does. The mean
is lost where the output matrix has no bias, and the receipt says so: the code gives the model biases, but the configuration
of Llama (`mlp_bias`, `attention_bias`) can say them only for all matrices of a kind in all blocks, and others have no word
for them; no parameters are added here. Of dimensions of queries and keys inside heads the keys of the tokens stand for the
output matrix, and nothing takes over a mean.
"""

from secateur.network.anatomy import COLUMN_AXES
from secateur.registry import Context, Cut, Moments, Units, method


@method(
    "flap",
    kind="structure",
    paper="arXiv:2312.11983",
    claim="without retraining better than LLM-Pruner and Wanda-sp on LLaMA (recalled)",
    when="after training",
    speedup="universal",
    axes=(*COLUMN_AXES, "head_dims", "expert_neurons"),
    criterion="activation",
    schedule="one-shot",
)
def flap(units: Units, moments: Moments, context: Context, *, compensate: bool = True) -> Cut:
    """Keeps the units whose activations fluctuate most, weighted by their output columns.

    Args:
        compensate: put the mean of what is removed into the output bias, where there is one.
    """
    output, bias = units.output, units.output_bias
    scores = units.per_unit(moments.variance * output.square().sum(0)).sum(1)
    kept = units.best(scores).kept
    if not compensate or bias is None:
        if compensate and units.axis != "head_dims" and len(kept) < units.count:
            context.note("removed mean", "lost: the output matrix has no bias that could take it over")
        return Cut(kept)
    gone = moments.mean.clone()
    gone[units.columns(kept)] = 0
    return Cut(kept, None, bias + output @ gone)
