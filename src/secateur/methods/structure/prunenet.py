"""PruneNet: a policy that sees weights only learns which feed-forward neurons a network can lose.

Sengupta and others, "You Only Prune Once: Designing Calibration-Free Model Compression With Policy Learning",
ICLR 2025, arXiv:2501.15296. State: the first feed-forward matrix W (m, h) of a layer. Action: the k rows S that stay.
Reward: 1 / KS(σ(W), σ(W[S])), the Kolmogorov–Smirnov distance of the singular values. One policy serves all layers.

mode="reference" is the published procedure (LCS2-IIITD/PruneNet), including what it leaves to chance and to overflow:
its rewards are all positive and there is no baseline, so the logits grow until log(1 - sigmoid) is infinite and the
gradient undefined. Such steps are skipped, as its gradient scaler does, and counted. Given the same A, b, r and u,
scores and samples equal those of the published module to 1e-5 (run beside ours, float32). Its float16 autocast is not
taken over, and widths are rounded to multiple_of.

mode="stable" (default) is OURS, not the paper's: rows are standardised, z = X v / √h from v = 0; rows are drawn by
Gumbel-top-k, whose exact log-probability in logit space gives the policy gradient; each layer has its own running-mean
baseline and the advantages of an episode are brought to unit size; Adam steps in layer order; the last policy chooses
by deterministic top-k. It lowers the KS distance, which the reference mode hardly moves.

In both, the policy's two linear maps act as one vector (secateur.tensor.policy) and spectra come from Gram matrices
(secateur.tensor.spectra). A lower KS distance need not mean a lower perplexity, see benchmarks/.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from secateur.errors import RequestError, RunError
from secateur.files import read_tensors
from secateur.network.widths import round_width
from secateur.registry import Context, Cut, Network, Neurons, Plan, Ratio, method
from secateur.tensor.policy import Policy, published_draw, top_k
from secateur.tensor.policy_learning import PublishedLearner, StableLearner
from secateur.tensor.spectra import WIDE
from secateur.tensor.spectral_distance import SpectralDistance

Episodes = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


@method(
    "prunenet",
    kind="structure",
    paper="arXiv:2501.15296",
    claim="LLaMA-2-7B loses 30 % of its feed-forward neurons in 15 minutes, keeping over 80 % of zero-shot performance",
    when="after training",
    speedup="universal",
    criterion="reinforcement learning",
    schedule="one-shot",
    comparison="layer",
    axes=("neurons",),
)
def prunenet(
    network: Network[Neurons],
    context: Context,
    *,
    ratio: Ratio = 0.2,
    mode: Literal["stable", "reference"] = "stable",
    reward: Literal["exact", "fast"] = "exact",
    episodes: Episodes = 20,
    learning_rate: Positive | None = None,
    discount: Positive = 0.99,
    policy: Path | None = None,
    ratios: list[Ratio] | None = None,
    multiple_of: Annotated[int, Field(ge=1)] = 32,
) -> Plan:
    """Cuts the feed-forward neurons that a policy, learned from the weights' spectra, gives the lowest scores.

    Args:
        ratio: fraction of the feed-forward neurons removed in every layer.
        mode: "stable" is our numerically sound variant, "reference" the published procedure; widths are rounded in
            both, and multiple_of=1 gives the published width.
        reward: "exact" computes every singular value, "fast" counts them at the place that decides (a lower
            bound, but for rounding).
        episodes: rounds of sampling all layers and updating the policy.
        learning_rate: of AdamW in reference mode (1e-3), of Adam in stable mode (0.05).
        discount: the reward of layer l counts discount^l.
        policy: file of a policy trained before; nothing is trained. Any ratio, any model of equal hidden size; `mode`
            says how it chooses: deterministically (stable) or by sampling (reference).
        ratios: one ratio for each feed-forward layer, instead of `ratio`.
        multiple_of: kept widths are rounded to the nearest multiple of this where the ratio allows it; 1 for none.
    """
    if ratios is not None and len(ratios) != len(network):
        raise RequestError(f"ratios holds {len(ratios)} numbers, but the network has {len(network)} layers to cut.")
    wanted = [ratio] * len(network) if ratios is None else ratios
    widths = [round_width(units.count, share, multiple_of) for units, share in zip(network, wanted, strict=True)]
    cut = [layer for layer, units in enumerate(network) if widths[layer] < units.count]
    if not cut:
        context.note("prunenet", "ratio 0: nothing to cut, nothing trained")
        return Plan({})
    distance = SpectralDistance(len(network), fast=reward == "fast")
    hidden = network[cut[0]].hidden
    task = _Task(network, context, cut, widths, distance, discount)
    if policy is not None:
        chosen = _read_policy(policy, hidden)
        context.note("policy", f"read from {policy.name}, not trained here")
    elif mode == "stable":
        learner = StableLearner(hidden, 0.05 if learning_rate is None else learning_rate)
        chosen = _train(task, learner, episodes)
    else:
        if len({network[layer].count for layer in cut}) > 1:
            raise RequestError("mode=reference needs layers of equal width, as published; mode=stable does not.")
        rate, generator = 1e-3 if learning_rate is None else learning_rate, context.generator("policy")
        published = PublishedLearner(network[cut[0]].count, hidden, rate, generator)
        chosen = _train(task, published, episodes)
    context.note("mode", mode)
    kept, distances = {}, {}
    with context.progress("choosing neurons", len(cut)) as bar:
        for position in context.mine(len(cut)):
            layer = cut[position]
            weight = network[layer].first
            z = chosen.scores(weight)
            if mode == "stable":
                kept[layer] = top_k(z, widths[layer])
            else:
                kept[layer] = _finite(layer, published_draw, z, widths[layer], context.generator("prune", layer))
            if policy is None:
                distances[layer] = distance(layer, weight, kept[layer])
            bar.advance()
    if policy is None:
        context.note("ks", {"reward": reward, "per layer": list(context.gather(distances).values())})
    return Plan(
        {(network[layer].block, "neurons"): Cut(selection) for layer, selection in context.gather(kept).items()}
    )


class _Task(NamedTuple):
    """What both ways of training share. cut: layers that lose neurons. widths: neurons each layer keeps."""

    network: Network[Neurons]
    context: Context
    cut: list[int]
    widths: list[int]
    distance: SpectralDistance
    discount: float


Results = dict[int, tuple[float, Tensor, Tensor]]  # by layer: KS distance, rows kept, what the learner wants back


def _train(task: _Task, learner: StableLearner | PublishedLearner, episodes: int) -> Policy:
    """Episodes of sampling every layer with one policy, then updating it in layer order; resumes where it stopped."""
    context, history = task.context, list[dict[str, float]]()
    if (saved := context.load("training")) is not None:
        tensors, meta = saved
        history = meta["history"]
        learner.restore(tensors, meta["learner"])
        task.distance.restore(tensors)
    with context.progress("training the policy", episodes) as bar:
        bar.advance(len(history))
        for episode in range(len(history), episodes):

            def sample(layer: int, episode: int = episode) -> tuple[tuple[float, Tensor, Tensor], dict[str, Tensor]]:
                weight, generator = task.network[layer].first, context.generator("sample", episode, layer)
                kept, told = _finite(layer, learner.draw, weight, task.widths[layer], generator)
                return (task.distance(layer, weight, kept), kept, told), task.distance.facts(layer)

            mine = [task.cut[position] for position in context.mine(len(task.cut))]
            shared = context.gather(context.each(sample, mine, small=task.network[task.cut[0]].hidden <= WIDE))
            results: Results = {layer: result for layer, (result, _) in shared.items()}
            task.distance.learn({layer: facts for layer, (_, facts) in shared.items()})
            entry = {"ks": sum(ks for ks, _, _ in results.values()) / len(results)}
            if isinstance(learner, StableLearner):
                earned = {layer: (_reward(ks), told) for layer, (ks, _, told) in results.items()}
                learner.update(earned, task.discount)
            else:
                entry["skipped"] = _update_published(task, learner, episode, results)
            history.append(entry)
            tensors, meta = learner.state()
            context.save("training", tensors | task.distance.state(), {"history": history, "learner": meta})
            bar.advance()
    policy, tensors = learner.result()
    if isinstance(learner, PublishedLearner) and history:
        skipped, updates = int(sum(entry["skipped"] for entry in history)), len(history) * len(task.cut)
        context.note("skipped updates", f"{skipped} of {updates}: gradient not finite")
        if skipped == updates:
            raise RunError("no update had a finite gradient: the published logits saturate; use mode=stable.")
    context.note("training", history)
    mode, units = "stable" if policy.standardised else "reference", task.network[task.cut[0]].count
    meta = {"mode": mode, "hidden": len(policy.v), "units": units, "standardised": policy.standardised}
    context.artifact("policy", tensors, meta)
    return policy


def _update_published(task: _Task, learner: PublishedLearner, episode: int, results: Results) -> int:
    """One AdamW step a layer, with a fresh forward; the layer's owner computes its gradient. Returns steps skipped."""
    context, skipped = task.context, 0
    for position, layer in enumerate(task.cut):
        message = torch.empty(task.network[layer].hidden + 1)
        if context.owner(position) == context.rank:
            (ks, kept, _), generator = results[layer], context.generator("update", episode, layer)
            discounted = task.discount**layer * _reward(ks)
            message = learner.message(task.network[layer].first, kept, discounted, generator)
        skipped += not learner.step(context.broadcast(message, context.owner(position)))
    learner.remember(sum(_reward(ks) for ks, _, _ in results.values()))
    return skipped


def _reward(ks: float) -> float:
    return 1 / ks if ks > 0 else 99999.0


def _finite(layer: int, function: Callable, *arguments: Any) -> Any:
    """function(*arguments), where a numerical failure is told with the layer's name and what to do."""
    try:
        return function(*arguments)
    except FloatingPointError as error:
        raise RunError(f"layer {layer}: {error}; use mode=stable, or another seed.") from error


def _read_policy(path: Path, hidden: int) -> Policy:
    """Reads the artifact of a finished run. Raises RequestError when it is no policy or of another hidden size."""
    try:
        tensors, _ = read_tensors(path)
        found = Policy(tensors["v"].float(), tensors["c"].float(), bool(tensors["standardised"]))
    except Exception as error:
        raise RequestError(f"{path} is not a policy that Secateur wrote (policy.safetensors): {error}.") from error
    if len(found.v) != hidden:
        raise RequestError(f"the policy {path.name} is for hidden size {len(found.v)}, but the network has {hidden}.")
    return found
