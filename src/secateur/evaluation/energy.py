"""Energy from the counters that Linux shows for processors with RAPL (running average power limit).

`/sys/class/powercap/intel-rapl:N/energy_uj` counts microjoules of one package and begins again at `max_energy_range_uj`;
`intel-rapl:N:M` is a part of it, of which "dram" alone is not in the package's own count. AMD shows the same files. Since
2020 only root may read them unless the administrator says otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

COUNTERS = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """One counter. file: of microjoules. span: microjoules after which it begins again at 0."""

    name: str
    file: Path
    span: int

    def read(self) -> int:
        return int(self.file.read_text())


class Meter:
    """The counters of all packages and of memory beside them, as this process may read them."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = tuple(counters)

    @classmethod
    def find(cls, folder: Path = COUNTERS) -> "Meter | None":
        """The counters in `folder`; None where there are none that may be read."""
        found = []
        for zone in sorted(folder.glob("intel-rapl:*")):
            try:
                name = (zone / "name").read_text().strip()
                counter = Counter(name, zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()))
                counter.read()
            except (OSError, ValueError):
                continue  # not there, or not for us
            inside = zone.name.count(":") > 1
            # "psys" is the whole board, packages included
            if name == "dram" if inside else name.startswith("package"):
                found.append(counter)
        return cls(found) if found else None

    @property
    def names(self) -> tuple[str, ...]:
        """Of what is counted, such as ("package-0", "dram")."""
        return tuple(counter.name for counter in self._counters)

    def read(self) -> tuple[int, ...]:
        """Microjoules of each counter, for `joules`."""
        return tuple(counter.read() for counter in self._counters)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """What was taken between two readings, if no counter went round more than once."""
        spent = (
            (last - first) % (counter.span + 1)
            for counter, first, last in zip(self._counters, before, after, strict=True)
        )
        return sum(spent) / 1e6
