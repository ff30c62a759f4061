"""Which of several results are worth having: those that no other beats in both of two figures."""

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, ascending, of the points that no other point dominates; of both figures less is better.

    A point dominates another if it is nowhere worse and somewhere better. Equal points do not dominate each other, so all of
    them are on the front, or none is. Comparisons are exact: nothing is rounded, infinities are numbers like others.

    Raises ValueError for a figure that is not a number: whoever asks leaves out what was not measured.
    """
    if any(figure != figure for point in points for figure in point):
        raise ValueError("a point with a figure that is not a number has no place among others")
    front, best = [], None
    # by the first figure, then by the second: what comes later can be dominated by what came before alone
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if best is None or points[index][1] < best[1] or points[index] == best:
            front.append(index)
            best = points[index]
    return sorted(front)
