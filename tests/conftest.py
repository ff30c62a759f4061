"""Models made once and shared: tiny ones in every worker, one clean process for all reloads."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # where transformers copies code that models bring

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import tiny
from secateur.network.verify import CleanProcess

# one thread per worker: bytes are promised at an equal number of threads, and workers share the machine
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _modules() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a tiny architecture, written once; options as `tiny.save` takes them. Tests must not change it."""
    made: dict[tuple, Path] = {}

    def get(name: str, **options: object) -> Path:
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("models") / name
            tiny.save(name, made[key], **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def clean() -> Iterator[CleanProcess]:
    """A process without Secateur that loads one result after another."""
    with CleanProcess() as process:
        yield process


@pytest.fixture
def shared_clean(clean: CleanProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands check their results in the session's clean process too, instead of starting one each."""
    monkeypatch.setattr("secateur.network.verify.CleanProcess", lambda: nullcontext(clean))
