"""How lm-eval is run here: on a loaded module, in silence, without the network, foreign templates in a sandbox.

lm-eval and the datasets library are imported inside, so that nobody who asks no task needs or waits for them.
"""

import io
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.context import Advance
from secateur.evaluation.forward import finite


def without_bars(build: Any, **options: Any) -> None:
    """Calls what shows bars that lm-eval has no setting for."""
    with redirect_stderr(io.StringIO()):
        build(**options)


def language_model(module: PreTrainedModel, tokenizer: Any, bar: Advance, spec: str) -> Any:
    """The module as lm-eval sees models. Its tokenizer is a copy, since lm-eval gives it a token for padding."""
    from lm_eval.models.huggingface import HFLM

    class Loaded(HFLM):
        def _model_call(self, inps: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            logits = finite(super()._model_call(inps, *arguments, **options), f"the task {spec}")
            bar.advance(len(inps))
            return logits

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            found = super().generate_until(requests, disable_tqdm=True)
            bar.advance(len(requests))
            return found

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **options: Any) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

    return Loaded(pretrained=module, tokenizer=deepcopy(tokenizer), batch_size=1)


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval warns of its own plans, and the datasets library shows bars; both are wanted only by those who ask for all."""
    names = ("lm_eval", "datasets")
    levels = {name: logging.getLogger(name).level for name in names}
    wanted = logging.getLogger().getEffectiveLevel() <= logging.INFO
    import datasets

    hidden = datasets.utils.are_progress_bars_disabled()
    try:
        if not wanted:
            for name in names:
                logging.getLogger(name).setLevel(logging.ERROR)
            datasets.utils.disable_progress_bars()
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if not hidden:
            datasets.utils.enable_progress_bars()


@contextmanager
def offline() -> Iterator[None]:
    """Nothing is asked of the hub: even a local file would be counted there."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextmanager
def sandboxed() -> Iterator[None]:
    """lm-eval renders templates in an environment in which they reach all of Python; a definition is to be data.

    It has no setting for that, so its environment is exchanged meanwhile for jinja's own sandbox with the same filters.
    """
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    plain = utils.env
    safe = SandboxedEnvironment(
        loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline
    )
    safe.filters |= plain.filters
    utils.env = safe
    try:
        yield
    finally:
        utils.env = plain


@contextmanager
def seeded() -> Iterator[None]:
    """lm-eval's own seeds, for tasks that draw; the streams of whoever calls are put back."""
    import numpy
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        numpy.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
