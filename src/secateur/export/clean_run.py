"""Runs in a process of its own: opens one model with one loader, as someone without Secateur would.

Reads one JSON object from standard input: {"loader", "location", "ids", "words", "tokens", "threads", "answer", "trust"};
answers with one line of JSON: {"version", "note", "speed", "ids", "written"}, or {"missing"} where the loader is not
installed, or {"error"}. What was computed goes to the file `answer`: "logits" (tokens, vocabulary) of the tokens asked for,
or "scores" (steps, vocabulary), log-probabilities of the steps of greedy generation, NaN where a loader tells only some.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

# log-probabilities asked of llama.cpp for each step: every one of a small vocabulary, the likeliest of a large one
_TOLD = 2000


class _NoSecateur(MetaPathFinder):
    """Makes Secateur impossible to import here: what loads only with its help has not loaded."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name.split(".")[0] == "secateur":
            raise ModuleNotFoundError("this process must do without secateur")
        return


def with_transformers(asked: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers
    from safetensors.torch import save_file

    torch.set_num_threads(asked["threads"])
    extra = {"gguf_file": Path(asked["location"]).name} if asked["location"].endswith(".gguf") else {}
    place = str(Path(asked["location"]).parent) if extra else asked["location"]
    loader: Any = transformers.AutoModelForCausalLM
    model, loading = loader.from_pretrained(
        place, dtype=torch.float32, trust_remote_code=asked["trust"], output_loading_info=True, **extra
    )
    # transformers fills what it does not find with random numbers and only warns; here that is a failure
    for what in ("missing_keys", "mismatched_keys"):
        if loading[what]:
            raise RuntimeError(f"transformers reports {what.replace('_', ' ')}: {sorted(map(str, loading[what]))[:3]}")
    ids = torch.tensor([asked["ids"]])
    with torch.inference_mode():
        logits = model.eval()(ids).logits[0]
        start = time.perf_counter()
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=asked["tokens"], min_new_tokens=asked["tokens"],
            do_sample=False, pad_token_id=0,
        )[0, ids.shape[1] :]  # fmt: skip
        speed = len(made) / (time.perf_counter() - start)
    save_file({"logits": logits.float().contiguous()}, asked["answer"])
    return {"speed": speed, "written": made.tolist()}


def with_safetensors(asked: dict[str, Any]) -> dict[str, Any]:
    """Every tensor of every file, read whole."""
    from safetensors import safe_open

    count = 0
    for path in sorted(Path(asked["location"]).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:  # numpy has no bfloat16
            for name in file.keys():
                file.get_tensor(name).clone()  # what is mapped is read only when it is touched
                count += 1
    if not count:
        raise RuntimeError("there is no safetensors file")
    return {"note": f"{count} tensors"}


def with_gguf(asked: dict[str, Any]) -> dict[str, Any]:
    import gguf

    reader = gguf.GGUFReader(asked["location"])
    return {"note": f"{len(reader.tensors)} tensors"}


def with_onnxruntime(asked: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import onnxruntime
    from safetensors.numpy import save_file

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = asked["threads"]
    session = onnxruntime.InferenceSession(
        str(Path(asked["location"]) / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    ids, name = list(asked["ids"]), session.get_inputs()[0].name

    def run(rows: list[list[int]]) -> Any:
        return session.run(None, {name: np.array(rows, dtype=np.int64)})[0]

    logits = run([ids])[0]
    # another length and another batch than the graph was traced with: what was fixed by mistake shows
    for rows in ([ids[:1]], [ids[:5], ids[:5], ids[:5]]):
        difference = np.abs(run(rows)[-1] - logits[: len(rows[0])]).max()
        if not difference <= 1e-3 * max(1, np.abs(logits).max()):
            raise RuntimeError(f"the logits of {len(rows)}x{len(rows[0])} tokens differ by {difference:.2g}")
    made, start = list[int](), time.perf_counter()
    for _ in range(asked["tokens"]):
        made.append(int(run([ids + made])[0, -1].argmax()))
    speed = len(made) / (time.perf_counter() - start)
    save_file({"logits": np.ascontiguousarray(logits, dtype=np.float32)}, asked["answer"])
    return {"speed": speed, "written": made, "note": "without a KV cache"}


def with_llama_cpp(asked: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp through xllamacpp, whose server takes token ids and tells log-probabilities."""
    import numpy as np
    import xllamacpp
    from safetensors.numpy import save_file

    given = xllamacpp.CommonParams()
    given.model.path = asked["location"]
    given.n_ctx = len(asked["ids"]) + asked["tokens"] + 32
    given.n_parallel, given.n_gpu_layers, given.fit_params, given.warmup, given.verbosity = 1, 0, False, False, -1
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = asked["threads"]
    # half-precision caches are what is usual; for a comparison they would hide everything else
    given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(given)

    def split(text: str, special: bool) -> list[int]:
        body = json.dumps({"content": text, "add_special": special}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/tokenize", data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: list[int] = json.load(answer)["tokens"]
        return found

    def told(request: dict[str, Any]) -> dict[str, Any]:
        answer: Any = server.handle_completions({"temperature": 0.0, "ignore_eos": True, **request})
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        if "choices" not in answer:
            raise RuntimeError(str(answer.get("error", answer))[:300])
        return dict(answer)

    # The server keeps back tokens that end inside a character, with all it knows of them. The scores it tells are those
    # before any bias, so one plain letter is forced at every step and the likeliest token taken from the scores.
    letter = split("a", False)[-1]
    ids, written, scores = list(asked["ids"]), list[int](), []
    for _ in range(min(asked["tokens"], 8)):
        step = told({"prompt": ids + written, "n_predict": 1, "n_probs": _TOLD, "logit_bias": [[letter, 1000.0]]})
        [content] = step["choices"][0]["logprobs"]["content"]
        row = {entry["id"]: entry["logprob"] for entry in content["top_logprobs"]}
        scores.append(row)
        written.append(max(row, key=row.__getitem__))
    table = np.full((len(scores), 1 + max(max(row) for row in scores)), np.nan, dtype=np.float32)
    for place, row in enumerate(scores):
        table[place, list(row)] = list(row.values())
    save_file({"scores": table}, asked["answer"])
    plain = told({"prompt": ids, "n_predict": asked["tokens"]})
    result = {"speed": plain["timings"]["predicted_per_second"], "written": written}
    if asked.get("words") is not None:
        result["ids"] = split(asked["words"], True)
    return result


def with_secateur(asked: dict[str, Any]) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file

    from secateur.network.source import load, open_model

    torch.set_num_threads(asked["threads"])
    source = open_model(asked["location"], trust_remote_code=asked["trust"])
    model, _ = load(asked["location"], trust_remote_code=asked["trust"])
    with torch.inference_mode():
        logits = model(torch.tensor([asked["ids"]])).logits[0]
    save_file({"logits": logits.float().contiguous()}, asked["answer"])
    return {"note": f"{len(source.anatomy.blocks)} blocks recognised"}


# what each loader needs installed, and how it is used; None: a loader that is only looked for
LOADERS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]] | None]] = {
    "transformers": ("transformers", with_transformers),
    "safetensors": ("safetensors", with_safetensors),
    "gguf": ("gguf", with_gguf),
    "llama.cpp": ("xllamacpp", with_llama_cpp),
    "onnxruntime": ("onnxruntime", with_onnxruntime),
    "secateur": ("secateur", with_secateur),
    "vllm": ("vllm", None),
    "sglang": ("sglang", None),
    "exllamav3": ("exllamav3", None),
}


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    package, use = LOADERS[asked["loader"]]
    if importlib.util.find_spec(package) is None:
        return {"missing": package}
    result = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        result["version"] = importlib.metadata.version(package)
    if use is None:
        return {**result, "note": "installed, but not tried by this version of Secateur"}
    try:
        return {**result, **use(asked)}
    except Exception as error:  # whatever stops a user from loading it is the answer
        return {**result, "error": f"{type(error).__name__}: {str(error).strip()[:500]}"}


def main() -> None:
    asked = json.load(sys.stdin)
    # libraries write where they like; the answer has a channel of its own
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if asked["loader"] != "secateur":
        sys.meta_path.insert(0, _NoSecateur())
    channel.write(json.dumps(answer(asked)) + "\n")
    channel.flush()
    os._exit(0)  # a server's threads would keep the process


if __name__ == "__main__":
    main()
