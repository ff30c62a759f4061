"""How long until something happens, where some were only watched for a while: Kaplan and Meier's estimate.

Kaplan and Meier, "Nonparametric Estimation from Incomplete Observations", JASA 1958. In exact fractions, so that a quantile
never hangs on how a sum was rounded.
"""

from collections.abc import Sequence
from fractions import Fraction


def survival_curve(lasted: Sequence[int], happened: Sequence[bool]) -> list[Fraction]:
    """[S(0), S(1), ...] with S(t) the share that outlasts t steps, as far as somebody was watched; S(0) is 1.

    Args:
        lasted: whole steps that each one outlasted.
        happened: whether it happened in the step after those; False for one that was not watched any longer.
    """
    curve = [Fraction(1)]
    for step in range(1, max((last + hit for last, hit in zip(lasted, happened, strict=True)), default=0) + 1):
        # who was not watched any longer says nothing about this step
        watched = sum(last + hit >= step for last, hit in zip(lasted, happened, strict=True))
        hits = sum(hit and last + 1 == step for last, hit in zip(lasted, happened, strict=True))
        curve.append(curve[-1] * (1 - Fraction(hits, watched)))
    return curve


def survival_quantile(curve: Sequence[Fraction], share: float | Fraction) -> int | None:
    """The smallest number of steps that at least `share` do not outlast by one; None where fewer ever came so far.

    Without censoring: the smallest value v for which a `share` of all values is at most v. 0 < share ≤ 1; floats are taken
    as they are written (0.9 is nine tenths).
    """
    wanted = 1 - Fraction(str(share))
    return next((step - 1 for step, left in enumerate(curve) if step and left <= wanted), None)


def restricted_mean(curve: Sequence[Fraction]) -> float:
    """The mean of min(steps outlasted, watched steps): the area under the curve."""
    return float(sum(curve[1:], Fraction(0)))
