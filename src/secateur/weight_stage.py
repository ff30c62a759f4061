"""A step that zeroes or changes single weights: block by block, statistics first where the method asks for some."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secateur.calibration.gradients import learn_gradients, pretend_gradients, read_gradients
from secateur.calibration.passes import Passes, Rows
from secateur.calibration.samples import LENGTH, Calibration, Samples, collect_samples
from secateur.calibration.statistics import UNSEEN, Statistics
from secateur.context import Context, barrier, give_back_memory, processes
from secateur.errors import RequestError, RunError
from secateur.files import read_tensors, write_json, write_tensors
from secateur.network.anatomy import Block
from secateur.network.masks import FOLDER, PackedMask, read_mask_file, write_masks
from secateur.network.matrices import MatrixRef, put, view
from secateur.network.source import open_model
from secateur.network.store import resized_config, stored_dtype
from secateur.network.stream import Fetch, Piece, put_parameter
from secateur.network.verify import stored
from secateur.network.views import Mask, Update, Weight
from secateur.solving import Solver, relative_error, zero_where_removed
from secateur.stage import Stage
from secateur.targets import budgets, chosen
from secateur.tensor.patterns import Budget
from secateur.workspace import Journal


@dataclass
class WeightStage(Stage):
    """A step whose method sees one matrix at a time."""

    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        self.solver = Solver.of(self.step.registered, self.step.parameters)
        self.refs: dict[int, list[MatrixRef]] = chosen(self.source, self.step.parameters["targets"])
        self.matrices: dict[str, dict[str, Any]] = {}
        self._budgets: dict[str, Budget] = {}
        self._passes: Passes | None = None
        self._done: set[int] = set()

    def apply(self, module: nn.Module) -> None:
        self._prepare()
        said = []
        for block in self.source.anatomy.blocks:
            said.append(self._do(block))
            for name, tensor in read_tensors(self._changes(block.index))[0].items():
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
            # of these blocks alone: unpacked, all masks would take as many bytes as there are weights
            masks: dict[str, Tensor] = {}
            for block in {ref.block for ref in found}:
                masks |= read_mask_file(self._masks() / f"{block}.safetensors")
            for ref in found:
                gone = ~masks[ref.name]
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
        self._budgets = budgets(self.source, self.step, self.refs, self._context("allocation"), self.state, self.device)
        blocks = self.source.anatomy.blocks
        first = blocks[0] if self.solver.statistics else blocks[min(self.refs)]
        if self.solver.gradients:
            # what they are does not matter here; nothing is known of how long they take
            shapes = {
                ref.parameter: self.source.skeleton.get_parameter(ref.parameter).shape for ref in self.refs.get(0, [])
            }
            pretend_gradients(self.state / "gradients", first.index, shapes)
        if not self.solver.statistics:
            return self._timed(first) * len(self.refs)
        # with one batch of tokens and with two: what both share is solving, which does not grow with the tokens
        positions = getattr(self.source.config.get_text_config(), "max_position_embeddings", None) or LENGTH
        length = min(self.calibration.length or LENGTH, positions)
        count = self.calibration.count + self.calibration.held_out_count
        ids = torch.randint(
            self.source.anatomy.vocabulary, (count, length), generator=self._context("tokens").generator()
        )
        total = len(self._passes_of(Samples(list(ids), [], "random")).batches)
        took = []
        for batches in (1, 2):
            self._passes = self._passes_of(Samples(list(ids[: max(1, batches * count // total)]), [], "random"))
            shutil.rmtree(self._passes.folder, ignore_errors=True)  # hidden states of the last try
            self._passes.capture()
            took.append(self._timed(first))
        each = max(took[1] - took[0], 0.0)
        return (max(took[0] - each, 0.0) + each * total) * len(blocks)

    def _timed(self, block: Block) -> float:
        begun = time.time()
        self._do(block)
        return time.time() - begun

    def decided(self) -> dict[str, Any]:
        return {"matrices": self.matrices}

    def config(self) -> dict[str, Any]:
        return resized_config(self.source, {})

    def _leave(self) -> None:
        removed, of = (sum(entry[key] for entry in self.matrices.values()) for key in ("removed", "of"))
        kept = {name: {key: entry[key] for key in ("removed", "of")} for name, entry in self.matrices.items()}
        if self.artifacts is not None:
            write_json(self.artifacts / "sparsity.json", {"removed": removed, "of": of, "matrices": kept})

    def _prepare(self) -> None:
        self._done = {entry["block"] for entry in Journal(self.state).entries() if "block" in entry}
        allocation = self._context("allocation")
        self._budgets = budgets(self.source, self.step, self.refs, allocation, self.state, self.device)
        self.notes |= allocation.notes
        self.warnings += allocation.warnings
        if self.solver.calibrated:
            samples = self._samples()
            self.notes["calibration"] = samples.describe()
            if self.solver.gradients:
                learn_gradients(self.source, samples, self.refs, self.state / "gradients", self.device, self.progress)
            if self.solver.statistics:
                self._passes = self._passes_of(samples)
                next_block = min(set(range(len(self.source.anatomy.blocks))) - self._done, default=None)
                if self._done and next_block is not None and not self._passes.ready(next_block):
                    raise RequestError(
                        "this run was begun with another number of processes; go on with as many, or say --restart."
                    )
        barrier()  # everybody has read the journal before anybody adds to it

    def _conclude(self, entries: Sequence[Mapping[str, Any]]) -> None:
        super()._conclude(entries)
        for entry in entries:
            self.matrices.update(entry.get("matrices", {}))
        # in the network's order, whichever process did which
        names = (ref.name for block in self.refs.values() for ref in block)
        self.matrices = {name: self.matrices[name] for name in names if name in self.matrices}
        errors = {
            key: [entry[key] for entry in self.matrices.values() if entry.get(key) is not None]
            for key in ("calibration_error", "held_out_error")
        }
        self.notes.update(
            {f"mean {key.replace('_', ' ')}": sum(all_) / len(all_) for key, all_ in errors.items() if all_}
        )
        self.warnings.append(self.step.registered.caution)
        unseen = sum(bool(entry.get("unseen")) for entry in self.matrices.values())
        if unseen:
            self.warnings.append(
                f"{unseen} of {len(self.matrices)} matrices saw no calibration token (experts that no token was sent to): "
                "they were pruned by magnitude; calibrate on more text."
            )

    def _is_mine(self, piece: Piece) -> bool:
        # with statistics all processes walk through all blocks together, each with its share of the tokens
        return self._passes is not None or super()._is_mine(piece)

    def _write(self, piece: Piece, name: str, journal: Journal) -> dict[str, Any] | None:
        together, target = self._passes is not None, self.target / name
        writes = not together or processes()[0] == 0
        for index in piece.blocks:
            lost = writes and index in self._done and not self._changes(index).exists() and not target.exists()
            if lost and together:
                raise RunError(f"{name} or what it is made of was removed meanwhile; start again with --restart.")
            if index not in self._done or lost:
                said = self._do(self.source.anatomy.blocks[index])
                if together:
                    barrier()  # the hidden states of every process are written
                if writes:
                    journal.add({"block": index, **said})
                self._done.add(index)
                if together:
                    barrier()
                self._forget(index)
        if not writes:
            return None
        if not target.exists():
            tensors = self.source.read(piece.keys)
            for index in piece.blocks:
                for parameter, tensor in read_tensors(self._changes(index))[0].items():
                    tensors.update(self.source.take_apart(parameter, tensor, tensors))
            write_tensors(target, {key: self._cast(key, tensor) for key, tensor in tensors.items()}, {"format": "pt"})
        for index in piece.blocks:
            self._changes(index).unlink(missing_ok=True)
        infos = {key: self.source.tensors[key] for key in piece.keys}
        sizes = {
            key: torch.Size(info.shape).numel() * stored_dtype(self.source, self.dtype, info.dtype).itemsize
            for key, info in infos.items()
        }
        return {"tensors": sizes}

    def _do(self, block: Block) -> dict[str, Any]:
        """Statistics, solving and propagation of one block; leaves its changed parameters and masks in files.

        Returns: what the journal is to hold.
        """
        refs = self.refs.get(block.index, [])
        names = {ref.parameter for ref in refs}
        said: dict[str, dict[str, Any]] = {}
        masks: dict[str, PackedMask] = {}
        warnings: list[str] = []
        if self._passes is not None:
            self._passes.capture()
        with self._loaded(block, names) as (working, precise):

            def settle(ref: MatrixRef, statistics: Statistics, rows: Rows) -> None:
                context = self._context(f"block-{block.index}")
                base = precise.get(ref.parameter, working[ref.parameter])
                found, said[ref.name] = self._solve(number[ref.name], ref, base, statistics, rows, context)
                masks[ref.name] = PackedMask.of(found.kept)
                self._put(ref, base, found)
                if ref.parameter in precise:
                    put(ref, working[ref.parameter], view(ref, base))
                warnings.extend(sentence for sentence in context.warnings if sentence not in warnings)

            number = {ref.name: place for place, ref in enumerate(refs)}
            if self._passes is None:
                for ref in refs:
                    settle(ref, UNSEEN, lambda name, held_out: None)
            else:
                self._passes.through(block, refs, working, settle)
        if missing := [ref.name for ref in refs if ref.name not in said]:
            raise RequestError(
                f"no product with {missing[0]} was seen when its block ran, so nothing is known of its inputs; name other "
                "matrices in `targets`, or use a method that needs no text."
            )
        for name in set(working) - names:
            del working[name]
        # one at a time, so that a block is not held twice
        changed = {
            name: (precise.pop(name) if name in precise else working.pop(name)).to(self._written(name))
            for name in sorted(names)
        }
        if processes()[0] == 0 or self._passes is None:
            write_masks(self._masks() / f"{block.index}.safetensors", masks)
            write_tensors(self._changes(block.index), changed)
        working.clear()
        changed.clear()
        give_back_memory()
        return {"matrices": said, "warnings": warnings}

    @contextmanager
    def _loaded(self, block: Block, names: set[str]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """A block's parameters in its modules, to be run and changed.

        Yields: the working parameters, and those of `names` as they are stored where working ones are less precise.
        """
        compute = getattr(torch, self.calibration.dtype) if self._passes else torch.float32
        working: dict[str, Tensor] = {}
        precise: dict[str, Tensor] = {}
        # one at a time, because a file stays mapped as long as a tensor of it lives
        for name in block.parameters if self._passes else sorted(names):
            tensor = self.source.parameter(name).to(self.device)
            if name in names and torch.promote_types(compute, tensor.dtype) != compute:
                precise[name] = tensor.clone()
            # a copy, because some are changed in place and a live model's are not ours
            working[name] = tensor.to(compute, copy=True) if tensor.is_floating_point() else tensor.clone()
            del tensor
        model = self.source.skeleton
        empty = {name: model.get_parameter(name) for name in working}
        try:
            for name, tensor in working.items():
                put_parameter(model, name, nn.Parameter(tensor, requires_grad=False))
            yield working, precise
        finally:
            for name, parameter in empty.items():
                put_parameter(model, name, parameter)

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
        where = view(ref, base)
        if isinstance(found, Update):
            where.copy_(found.matrix)
        else:
            where.masked_fill_(~found.kept, 0)
        where.copy_(self._cast(ref.name, where, self._written(ref.parameter)))
        # after the cast, because that is what counts
        if not zero_where_removed(where, found.kept):
            raise RunError(f"{ref.name}: weights that were to be removed are not zero; report this.")

    def _written(self, name: str) -> torch.dtype:
        """The dtype in which a parameter is written."""
        return stored_dtype(self.source, self.dtype, self.source.tensors[self.source.stored_keys(name)[0]].dtype)

    def _passes_of(self, samples: Samples) -> Passes:
        kinds = self.solver.statistics
        return Passes(self.source, samples, self.calibration, kinds, self.refs, self.state, self.device)

    def _samples(self) -> Samples:
        """The calibration tokens: collected by the first process once, then read from the state."""
        path, name = self.state / "samples.safetensors", self.state / "samples.json"
        if processes()[0] == 0 and not name.exists():
            context = self._context("samples")
            samples = collect_samples(
                self.source, self.calibration, context.generator("samples"), self.seed, progress=self.progress
            )
            write_tensors(path, samples.tensors())
            write_json(name, samples.name)
        barrier()
        return Samples.from_tensors(read_tensors(path)[0], json.loads(name.read_text()))

    def _masks(self) -> Path:
        return (self.artifacts or self.state) / FOLDER

    def _changes(self, block: int) -> Path:
        return self.state / "changes" / f"{block}.safetensors"

    def _forget(self, block: int) -> None:
        if self._passes is not None:
            self._passes.forget(block)
