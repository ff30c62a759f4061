"""FLAP: units go whose output hardly fluctuates, and the output bias takes over their mean.

"Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, arXiv:2312.11983. Recalled, not
read for this: the metric is the variance of each input over tokens times the squared norm of its output
column (WIFV), and the removed mean is added to the output bias, b + W_R μ_R. OURS: the same number of units in every block
unless `allocation: flap_search` standardises scores and compares them over all blocks, as FLAP does; and where
the output matrix has no bias the mean is lost, because the configuration of such a model has no place for one (FLAP
patches the model instead). A head's score is the sum of its columns'. Of dimensions of queries and keys inside heads the
keys of the tokens stand for the output matrix, and nothing takes over a mean.
"""

from secateur.network.anatomy import COLUMN_AXES
from secateur.registry import Cut, Moments, Units, method


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
def flap(units: Units, moments: Moments, *, compensate: bool = True) -> Cut:
    """Keeps the units whose activations fluctuate most, weighted by their output columns.

    Args:
        compensate: put the mean of what is removed into the output bias, where there is one.
    """
    output, bias = units.output, units.output_bias
    scores = units.per_unit(moments.variance * output.square().sum(0)).sum(1)
    kept = units.best(scores).kept
    if not compensate or bias is None:
        return Cut(kept)
    gone = moments.mean.clone()
    gone[units.columns(kept)] = 0
    return Cut(kept, None, bias + output @ gone)
