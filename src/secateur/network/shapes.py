"""How many parameters a network of other uniform widths has, counted from its structure alone."""

from collections.abc import Mapping
from math import prod

from secateur.network.anatomy import CutAxis
from secateur.network.channels import Channels
from secateur.network.source import Source


class Shapes:
    """Counts parameters, tied ones once.

    Args:
        channels: where the channels of the stream lie, None where their number is not to change.
    """

    def __init__(self, source: Source, channels: Channels | None = None) -> None:
        again = {name for group in source.anatomy.tied for name in group[1:]}
        named = source.skeleton.named_parameters(remove_duplicate=False)
        self._sizes = {name: tuple(parameter.shape) for name, parameter in named if name not in again}
        self._channels = channels
        self._groups = [group for block in source.anatomy.blocks for group in block.groups]

    def count(self, widths: Mapping[CutAxis, int]) -> int:
        """Parameters of the network with at most `widths` units of each kind in every block, and as many channels."""
        shapes = {name: list(shape) for name, shape in self._sizes.items()}
        if self._channels is not None and "channels" in widths:
            for name, dims in self._channels.dims.items():
                for dim in dims if name in shapes else ():
                    shapes[name][dim] = widths["channels"]
        for group in self._groups:
            for part in group.slices:
                fewer = group.count - min(group.count, widths.get(group.axis, group.count))
                shapes[part.parameter][part.dim] -= fewer * part.width
        return sum(prod(shape) for shape in shapes.values())
