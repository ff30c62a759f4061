"""A step that zeroes or changes single weights."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from secateur.block_stage import BlockStage, Loaded, errors
from secateur.calibration.divergence_trials import DivergenceTrials, RehearsedTrials
from secateur.calibration.gradients import learn_gradients, pretend_gradients, read_gradients
from secateur.calibration.passes import Rows
from secateur.calibration.samples import Samples
from secateur.calibration.statistics import GatedNorms, Statistics
from secateur.context import Context, processes
from secateur.errors import RunError
from secateur.files import read_tensors, write_json, write_tensors
from secateur.network.anatomy import Block
from secateur.network.masks import FOLDER, PackedMask, read_mask_file, write_masks
from secateur.network.matrices import MatrixRef, put, view
from secateur.network.source import open_model
from secateur.network.store import resized_config
from secateur.network.stream import Fetch
from secateur.network.verify import stored
from secateur.network.views import Mask, Update, Weight
from secateur.solving import relative_error, zero_where_removed
from secateur.targets import budgets, chosen
from secateur.tensor.casting import narrowed
from secateur.tensor.patterns import Budget, Pattern

ROWS = 256  # of a matrix put in its place at once


@dataclass
class WeightStage(BlockStage):
    """A step whose method sees one matrix at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.matrices: dict[str, dict[str, Any]] = {}
        self._budgets: dict[str, Budget] = {}
        self._masks_of: dict[int, dict[str, PackedMask]] = {}
        self._rehearses = False
        self._rehearsed: RehearsedTrials | None = None

    def _refs(self) -> dict[int, list[MatrixRef]]:
        return chosen(self.source, self.step.parameters["targets"])

    def apply(self, module: nn.Module) -> None:
        self._prepare()
        said = []
        for block in self.source.anatomy.blocks:
            said.append(self._do(block))
            for path in self._changes(block.index):
                for name, tensor in read_tensors(path)[0].items():
                    module.get_parameter(name).data.copy_(tensor)
            self._forget(block.index)
        self._conclude(said)
        self.notes["matrices"] = self.matrices

    def expected(self) -> Fetch:
        """The source's parameters with the masks laid over them; what a method has changed is taken as it was written."""
        refs: dict[str, list[MatrixRef]] = {}
        for ref in (ref for block in self.refs.values() for ref in block):
            refs.setdefault(ref.parameter, []).append(ref)
        written = stored(open_model(self.target, trust_remote_code=self.source.trust_remote_code))
        updated = any(entry["updated"] for entry in self.matrices.values())

        def fetch(names: Sequence[str]) -> Mapping[str, Tensor]:
            # one at a time, because a file stays mapped as long as a tensor of it lives
            tensors = {
                name: self._cast(name, self.source.parameter(name)).to(torch.float32, copy=True) for name in names
            }
            found = [ref for name in names for ref in refs.get(name, ())]
            new = written([name for name in names if name in refs]) if updated else {}
            # of these blocks alone, and unpacked one by one: all masks would take as many bytes as there are weights
            masks: dict[str, PackedMask] = {}
            for block in {ref.block for ref in found}:
                masks |= read_mask_file(self._masks() / f"{block}.safetensors")
            for ref in found:
                gone = ~masks[ref.name].kept()
                if ref.parameter in new:
                    matrix = view(ref, new[ref.parameter])
                    if bool((matrix[gone] != 0).any()):
                        raise RunError(
                            f"{ref.name} was written with weights that were removed; start again with --restart."
                        )
                    put(ref, tensors[ref.parameter], matrix)
                else:
                    view(ref, tensors[ref.parameter]).masked_fill_(gone, 0.0)
            return tensors

        return fetch

    def seconds(self) -> float:
        if self.solver.gradients:
            # what they are does not matter here; nothing is known of how long they take
            first = 0 if self.solver.statistics else min(self.refs)
            shapes = {
                ref.parameter: self.source.skeleton.get_parameter(ref.parameter).shape for ref in self.refs.get(0, [])
            }
            pretend_gradients(self.state / "gradients", first, shapes)
        self._rehearses = True
        one = super().seconds()
        return one + (self._rehearsed.seconds if self._rehearsed else 0.0)

    def decided(self) -> dict[str, Any]:
        return {"matrices": self.matrices}

    def config(self) -> dict[str, Any]:
        return resized_config(self.source, {})

    def superseded(self) -> None:
        shutil.rmtree(self._masks(), ignore_errors=True)
        self.warnings.append("the masks of this step were not kept, because a later step has cut their matrices.")

    def _leave(self) -> None:
        removed, of = (sum(entry[key] for entry in self.matrices.values()) for key in ("removed", "of"))
        kept = {name: {key: entry[key] for key in ("removed", "of")} for name, entry in self.matrices.items()}
        if self.artifacts is not None:
            write_json(self.artifacts / "sparsity.json", {"removed": removed, "of": of, "matrices": kept})

    def _decide(self) -> None:
        allocation = self._context("allocation")
        self._budgets = budgets(
            self.source, self.step, self.refs, allocation, self.state, self.device, lambda: self._trials(allocation)
        )
        self.notes |= allocation.notes
        self.warnings += allocation.warnings

    def _trials(self, context: Context) -> DivergenceTrials:
        """What an allocation tries, by this step's method where that reads no more of inputs than sums of columns."""
        cheap = not self.solver.gradients and not any(
            {"gram", "cross"} & kind.wants  # type: ignore[attr-defined]
            for kind in self.solver.statistics
        )
        pattern = Pattern.parse(self.step.parameters["pattern"])

        def prune(ref: MatrixRef, matrix: Tensor, remove: int, seen: Statistics) -> Tensor:
            weight = Weight(ref.name, ref.block, ref.expert, (ref.rows, ref.columns), lambda: matrix)
            budget = Budget(pattern, remove, (ref.rows, ref.columns))
            # of a matrix that no token has reached, too, nothing is known
            if not cheap or (self.solver.statistics and not seen.tokens):
                return self.solver.fall_back(weight, budget).kept
            return self.solver.solve(weight, budget, seen, None, context).kept

        refs = [ref for block in self.refs.values() for ref in block]
        kinds = self.solver.statistics if cheap else set()
        dtype = self.calibration.dtype
        if self._rehearses:
            nothing = Samples([], [], "nothing")
            self._rehearsed = RehearsedTrials(self.source, nothing, refs, prune, kinds, dtype, self.device)
            return self._rehearsed
        return DivergenceTrials(self.source, self._samples(), refs, prune, kinds, dtype, self.device)

    def _learn(self, samples: Samples) -> None:
        if self.solver.gradients:
            learn_gradients(self.source, samples, self.refs, self.state / "gradients", self.device, self.progress)

    def _settle(
        self, number: int, ref: MatrixRef, loaded: Loaded, seen: Statistics, rows: Rows, context: Context
    ) -> dict[str, Any]:
        base = loaded.base(ref.parameter)
        found, entry = self._solve(number, ref, base, seen, rows, context)
        self._masks_of.setdefault(ref.block, {})[ref.name] = PackedMask.of(found.kept)
        self._put(ref, base, found)
        if ref.parameter in loaded.precise:
            put(ref, loaded.working[ref.parameter], view(ref, base))
        return entry

    def _keep(self, block: Block, loaded: Loaded, write: bool) -> None:
        masks = self._masks_of.pop(block.index, {})
        if not write:
            return
        names = {ref.parameter for ref in self.refs.get(block.index, [])}
        for name in set(loaded.working) - names:
            del loaded.working[name]
        write_masks(self._masks() / f"{block.index}.safetensors", masks)
        # one at a time, each in a file of its own, so that a block is not held twice
        for name, path in zip(sorted(names), self._changes(block.index), strict=True):
            old = loaded.precise.pop(name) if name in loaded.precise else loaded.working.pop(name)
            write_tensors(path, {name: narrowed(old, self._written(name))})
            del old

    def _change(self, blocks: Sequence[Block], tensors: dict[str, Tensor]) -> None:
        for block in blocks:
            for path in self._changes(block.index):
                # not copied: the file stays mapped until the shard is written
                with safe_open(path, framework="pt") as file:
                    for parameter in file.keys():
                        tensors.update(self.source.take_apart(parameter, file.get_tensor(parameter), tensors))

    def _kept(self, block: int) -> bool:
        return all(path.exists() for path in self._changes(block))

    def _drop(self, block: int) -> None:
        shutil.rmtree(self.state / "changes" / str(block), ignore_errors=True)

    def _conclude(self, entries: Sequence[Mapping[str, Any]]) -> None:
        super()._conclude(entries)
        for entry in entries:
            self.matrices.update(entry.get("settled", {}))
        # in the network's order, whichever process did which
        names = (ref.name for block in self.refs.values() for ref in block)
        self.matrices = {name: self.matrices[name] for name in names if name in self.matrices}
        self.notes.update(errors(self.matrices))
        self.warnings.append(self.step.registered.caution)
        if GatedNorms in self.solver.needs and all(ref.expert is None for each in self.refs.values() for ref in each):
            self.warnings.append(
                f"{self.step.method}: none of the pruned matrices belongs to an expert, so no router's gate counts here: "
                "inputs are weighed by their norm alone, as wanda does."
            )
        unseen = sum(bool(entry.get("unseen")) for entry in self.matrices.values())
        if unseen:
            self.warnings.append(
                f"{unseen} of {len(self.matrices)} matrices saw no calibration token (experts that no token was sent to): "
                "they were pruned by magnitude; calibrate on more text."
            )

    def _solve(
        self,
        number: int,
        ref: MatrixRef,
        base: Tensor,
        seen: Statistics,
        rows: Rows,
        context: Context,
    ) -> tuple[Mask | Update, dict[str, Any]]:
        """What becomes of one matrix, and what the receipt says of it. One process solves it, all get the result."""
        rank, world = processes()
        together = self._passes is not None and world > 1
        found: Mask | Update | None = None
        entry: dict[str, Any] = {}
        if not together or number % world == rank:
            weight = Weight(ref.name, ref.block, ref.expert, (ref.rows, ref.columns), lambda: view(ref, base).float())
            budget = self._budgets[ref.name]
            gradients = read_gradients(self.state / "gradients", ref) if self.solver.gradients else None
            entry = {"removed": 0, "of": ref.rows * ref.columns, "updated": False}
            if self.solver.statistics and not seen.tokens:
                found, entry["unseen"] = self.solver.fall_back(weight, budget), True
            else:
                found = self.solver.solve(weight, budget, seen, gradients, context)
            entry |= {
                "removed": found.kept.numel() - int(found.kept.count_nonzero()),
                "updated": isinstance(found, Update),
            }
            for held_out, name in ((False, "calibration_error"), (True, "held_out_error")):
                inputs = rows(ref.name, held_out)
                if inputs is not None:
                    entry[name] = relative_error(inputs, weight.matrix, found)
            if seen.tokens and (dead := seen.dead):
                entry["dead_inputs"] = dead
            if context.notes:
                entry["notes"] = context.notes
        if together:
            found, entry = self._share(found, entry, context, number % world, (ref.rows, ref.columns))
        assert found is not None
        return found, entry

    def _share(
        self, found: Mask | Update | None, entry: dict[str, Any], context: Context, owner: int, shape: tuple[int, int]
    ) -> tuple[Mask | Update, dict[str, Any]]:
        """What the process `owner` found, and what it was warned of, in every process."""
        told: list[Any] = [entry, context.warnings]
        dist.broadcast_object_list(told, owner)
        context.warnings = told[1]
        kept = torch.empty(shape, dtype=torch.uint8) if found is None else found.kept.cpu().to(torch.uint8)
        dist.broadcast(kept, owner)
        if not told[0]["updated"]:
            return Mask(kept.bool().to(self.device)), told[0]
        matrix = found.matrix.cpu().contiguous() if isinstance(found, Update) else torch.empty(shape)
        dist.broadcast(matrix, owner)
        return Update(matrix.to(self.device), kept.bool().to(self.device)), told[0]

    def _put(self, ref: MatrixRef, base: Tensor, found: Mask | Update) -> None:
        """Puts a result in the place of its matrix, rounded as it will be written. Raises RunError when it does not fit."""
        where, dtype = view(ref, base), self._written(ref.parameter)
        matrix = found.matrix if isinstance(found, Update) else where
        # some rows at a time: what is made on the way of a whole wide matrix would be as large as it is
        for part, new, kept in zip(*(each.split(ROWS) for each in (where, matrix, found.kept)), strict=True):
            if isinstance(found, Mask):
                new = new.masked_fill(~kept, 0)
            part.copy_(self._cast(ref.name, new, dtype))
            # after the cast, because that is what counts
            if not zero_where_removed(part, kept):
                raise RunError(f"{ref.name}: weights that were to be removed are not zero; report this.")

    def _masks(self) -> Path:
        return (self.artifacts or self.state) / FOLDER

    def _changes(self, block: int) -> list[Path]:
        """Where what becomes of a block's matrices waits for its shard, in the order of their names."""
        names = sorted({ref.parameter for ref in self.refs.get(block, [])})
        return [self.state / "changes" / str(block) / f"{name}.safetensors" for name in names]
