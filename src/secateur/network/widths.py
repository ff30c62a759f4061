"""How many units a layer keeps at a ratio."""

from secateur.errors import RequestError


def round_width(units: int, ratio: float, multiple_of: int = 1) -> int:
    """Returns the number of units to keep.

    units: units that the layer has.
    ratio: fraction of them removed, 0 ≤ ratio < 1.
    multiple_of: the kept width is the multiple of this that lies nearest to (1 - ratio)·units (the larger one when two
        are equally near). Kernels and GGUF blocks want round widths.

    With multiple_of 1, and where no multiple serves (the layer is narrower than the multiple, or rounding would keep every
    unit of a layer that was to shrink), the width is int((1 - ratio)·units), the published PruneNet rule.

    Raises RequestError when the ratio lies outside [0, 1), when multiple_of is below 1, and when no unit is left.
    """
    if not 0 <= ratio < 1:
        raise RequestError(f"ratio is {ratio}; it is the fraction removed and must satisfy 0 <= ratio < 1.")
    if multiple_of < 1:
        raise RequestError(f"multiple_of is {multiple_of}; it must be at least 1 (1 means: do not round).")
    if ratio == 0:
        return units
    # The exact product can fall a hair below a whole number in binary (0.9·10 from 1 - 0.1 is safe, 0.3·10 is not),
    # which would lose one unit; nothing as coarse as 1e-9 units is meant by a user's ratio.
    plain = int((1 - ratio) * units + 1e-9)
    if plain < 1:
        raise RequestError(f"A ratio of {ratio} leaves none of {units} units; ask for less than {1 - 1 / units:.4f}.")
    rounded = int((1 - ratio) * units / multiple_of + 0.5) * multiple_of
    return rounded if multiple_of > 1 and 0 < rounded < units else plain
