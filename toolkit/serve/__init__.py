"""Serve a run to other programs and to a web page, by engines that exist: llama.cpp's server, or vLLM.

`python -m toolkit serve pocket`, then http://127.0.0.1:8000/ or OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-")
"""

import secrets
import shlex
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from toolkit.family import family_of
from toolkit.files import POCKET, find, read_json
from toolkit.model import run_folder
from toolkit.render import load_chat
from toolkit.serve.engine import BASE, CONTEXT, Engine, check, start

LOOPBACK = ("127.0.0.1", "localhost", "::1")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank accepts (vllm/config/lora.py, MaxLoRARanks)."""


def serve(runs: Sequence[str | Path], *, engine: str = "llama.cpp", host: str = "127.0.0.1", port: int = 8000,
          key: str | None = None, checked: bool = False, say=print, **options) -> None:  # fmt: skip
    """Serve until Ctrl-C. `options` are those of `engine.start`. A host other than this machine needs an API key, and
    gets one when none is given. `checked` first holds what is served against the run. Raises ToolkitError."""
    if host not in LOOPBACK and key is None:
        key = secrets.token_urlsafe(24)
    if engine == "vllm":
        command = vllm_command(runs, host=host, port=port, key=key, context=options.get("context", CONTEXT))
        if shutil.which("vllm") is None:
            say(f"vLLM is not installed here. Where it is (pip install vllm), run:\n\n{shlex.join(command)}")
            return
        say(shlex.join(command))
        subprocess.run(command, check=False)
        return
    served = start(runs, host=host, port=port, key=key, say=say, **options)
    for run in runs if checked else ():
        measured = check(run, served, options.get("quant"))
        say("checked against the run: " + ", ".join(f"{name} KL {m['mean']:.1g}" for name, m in measured.items()))
    say(welcome(served))
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        say("stopped")


def welcome(engine: Engine) -> str:
    """What a person needs once the server is up: addresses, how to choose between runs and base, how to stop."""
    address = f"{engine.url}/v1/chat/completions"
    header = f' -H "Authorization: Bearer {engine.key}"' if engine.key else ""
    lines = [
        f"page: {engine.url}/    API: {engine.url}/v1    {engine.context:,} tokens of context    Ctrl-C stops",
        "in the page switch its tools off (+, Tools): it offers them to every model, which changes the prompt",
    ]
    if engine.key:
        lines.append(f"API key, asked for by API and page: {engine.key}")
    for i, name in enumerate([*engine.runs, *[BASE] * bool(engine.runs)]):
        scale = f'{{"id": {i}, "scale": 1}}' if name != BASE else '{"id": 0, "scale": 0}'
        body = f'{{"messages": [{{"role": "user", "content": "Hi"}}], "lora": [{scale}]}}'
        lines.append(f"{name}{' (the default)' if i == 0 else ''}: curl {address}{header} -d '{body}'")
    return "\n".join(lines)


def vllm_command(runs: Sequence[str | Path], *, host: str, port: int, key: str | None, context: int) -> list[str]:
    """`vllm serve` with the runs' adapters as LoRA modules beside their base, whose name is `base`.

    Flags as in vLLM's documentation, "LoRA Adapters", "Reasoning Outputs", "Tool Calling"."""
    from transformers import AutoConfig

    folders = [run_folder(run).resolve() for run in runs]
    adapter, model = folders[0] / "adapter", read_json(folders[0] / "manifest.json")["model"]
    name = str(POCKET if model["name"] == "pocket" else find(model["name"]) or model["name"])
    config = AutoConfig.from_pretrained(name, revision=model.get("revision"))
    family, chat = family_of(config.model_type), load_chat(str(adapter))
    rank = max(read_json(folder / "adapter" / "adapter_config.json")["r"] for folder in folders)
    words = ["vllm", "serve", name, "--served-model-name", BASE, "--enable-lora"]
    words += ["--lora-modules", *[f"{folder.name}={folder / 'adapter'}" for folder in folders]]
    words += ["--max-lora-rank", str(next(r for r in VLLM_RANKS if r >= rank)), "--max-model-len", str(context)]
    words += (
        ["--chat-template", str(adapter / "chat_template.jinja")] if (adapter / "chat_template.jinja").is_file() else []
    )
    words += ["--revision", model["revision"]] if model.get("revision") else []
    if model.get("load_in_4bit") and not getattr(config, "quantization_config", None):
        words += ["--quantization", "bitsandbytes"]  # NF4 on load, as the run was trained
    if family.reasoning_parser and chat.kind in ("hybrid", "thinking_only"):
        words += ["--reasoning-parser", family.reasoning_parser]
    if family.tool_parser:
        words += ["--enable-auto-tool-choice", "--tool-call-parser", family.tool_parser]
    words += ["--host", host, "--port", str(port)]
    return words + (["--api-key", key] if key else [])
