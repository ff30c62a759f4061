"""Runs in a process of its own: opens models with plain transformers, as someone without Secateur would.

Reads one JSON object per line from standard input: {"location", "gguf", "ids", "dtype", "threads", "trust_remote_code",
"logits", "decode"}; loads the model, runs it on `ids`, writes the logits to the file `logits` when one is named, goes on
with `decode` tokens where it has a cache, and answers each with one line of JSON: {"class", "parameters", "baseline",
"peak", "phases"}, or {"error"}. "phases" has the peak of each phase ("loading", "prefill", "decode") where the system can
tell them apart.
"""

import contextlib
import json
import os
import resource
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class _NoSecateur(MetaPathFinder):
    """Makes Secateur impossible to import here: what loads only with its help has not loaded."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name.split(".")[0] == "secateur":
            raise ModuleNotFoundError("this process must do without secateur")
        return


def peak() -> int:
    """The highest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux hands ru_maxrss of the parent on through fork and exec; VmHWM belongs to this program alone.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def begin_phase() -> bool:
    """Lets `peak` count from here on; False where the system cannot."""
    try:
        # Linux: sets the high-water mark back to what is resident now
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def answer(request: dict[str, Any]) -> dict[str, Any]:
    # imported here, after main() has set the guard, so that nothing can slip in before it
    import torch
    import transformers
    from safetensors.torch import save_file

    torch.set_num_threads(request["threads"])
    baseline = peak()
    phases: dict[str, int] = {}
    apart = begin_phase() if request.get("decode") is not None else False
    options = {"gguf_file": request["gguf"]} if request.get("gguf") else {}
    config = transformers.AutoConfig.from_pretrained(
        request["location"], trust_remote_code=request["trust_remote_code"], **options
    )
    architecture = (config.architectures or [""])[0]
    loader: Any = getattr(transformers, architecture, transformers.AutoModelForCausalLM)
    model, loading = loader.from_pretrained(
        request["location"],
        dtype=getattr(torch, request["dtype"]),
        trust_remote_code=request["trust_remote_code"],
        output_loading_info=True,
        **options,
    )
    # transformers fills what it does not find with random numbers and only warns; here that is a failure
    for what in ("missing_keys", "mismatched_keys"):
        if loading[what]:
            return {"error": f"transformers reports {what.replace('_', ' ')}: {sorted(map(str, loading[what]))[:3]}"}
    highest = max(baseline, peak())
    if apart:
        phases["loading"] = peak()
        apart = begin_phase()
    with torch.inference_mode():
        out = model.eval()(torch.tensor(request["ids"]))
    highest = max(highest, peak())
    logits, cache = out.logits, getattr(out, "past_key_values", None)
    if request.get("logits"):
        save_file({"logits": logits.float().contiguous()}, request["logits"])
    if apart:
        phases["prefill"] = peak()
        last = logits[:, -1:].argmax(-1)
        del out, logits  # they would count as decoding's
        if request["decode"] and cache is not None and begin_phase():
            with torch.inference_mode():
                for _ in range(request["decode"]):
                    out = model(last, past_key_values=cache, use_cache=True)
                    cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
            phases["decode"] = peak()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    answered = {"class": type(model).__name__, "parameters": parameters, "baseline": baseline}
    return {**answered, "peak": max(highest, peak()), "phases": phases}


def main() -> None:
    sys.meta_path.insert(0, _NoSecateur())
    # now, while whoever started this is still at work; where it fails, the answer says why
    with contextlib.suppress(Exception):
        import torch  # noqa: F401
        import transformers  # noqa: F401
    for line in sys.stdin:
        try:
            result = answer(json.loads(line))
        except Exception as error:  # whatever stops a user from loading it is the answer
            result = {"error": f"{type(error).__name__}: {str(error).strip()[:500]}"}
        print(json.dumps(result), flush=True)
    os._exit(0)  # taking torch down in order takes longer than some models do


if __name__ == "__main__":
    main()
