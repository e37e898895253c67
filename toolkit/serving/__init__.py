"""Serve a run to other programs and to a web page, by engines that exist: llama.cpp's server, or vLLM.

`python -m toolkit serve pocket`, then http://127.0.0.1:8000/ or OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-")
"""

import dataclasses
import json
import re
import secrets
import shlex
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit import recipe
from toolkit.data.render import load_chat
from toolkit.export.llama import Engine
from toolkit.family import family_of
from toolkit.files import ToolkitError, read_json
from toolkit.serving import guard
from toolkit.serving.engine import BASE, CONTEXT, Say, check, start
from toolkit.training.model import checkpoint_file, checkpoint_path, run_folder

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank accepts (vllm/config/lora.py, MaxLoRARanks)."""
FOR_LLAMA = {"source": "adapter", "quant": None, "base": False, "scale": 1.0}
"""Options that vLLM has nothing for, with the values that ask for nothing."""


def serve(runs: Sequence[str | Path], *, engine: str = "llama.cpp", host: str = "127.0.0.1", port: int = 8000,
          key: str | None = None, checked: bool = False, say: Say = print, **options: Any) -> None:  # fmt: skip
    """Serve until Ctrl-C. `options` are those of `engine.start`. A host other than this machine needs an API key, and
    gets one when none is given. `checked` first holds what is served against the run. Raises ToolkitError."""
    key = checked_key(host, key, say)
    if engine == "vllm":
        if checked or any(options.get(name, nothing) != nothing for name, nothing in FOR_LLAMA.items()):
            raise ToolkitError(
                "vLLM serves adapters beside their base: leave out --base, --check, --from, --quant, --scale"
            )
        context = options.get("context", CONTEXT)
        run_vllm(vllm_command(runs, host=host, port=port, key=key, context=context), say)
        return
    served = public(runs, host, port, key, say, options)
    for run in runs if checked else ():
        measured = check(run, served, options.get("quant"))
        say("checked against the run: " + ", ".join(f"{name} KL {m['mean']:.1g}" for name, m in measured.items()))
    say(welcome(served))
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        say("stopped")


def checked_key(host: str, key: str | None, say: Say) -> str | None:
    """The API key that requests must bring; None for anybody on this machine. Raises ToolkitError."""
    if not host.strip():
        raise ToolkitError("--host is empty, which would be every network of this machine: name one, e.g. 127.0.0.1")
    if key is not None and not key.strip():
        # `--api-key "$KEY"` of a variable that is not set asks for a key and must not open the server
        say("--api-key is empty, as if it were not there: is a variable not set?")
        key = None
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise ToolkitError(
            "--api-key: expected letters, digits and signs without spaces, as an HTTP header can carry it"
        )
    # whoever reaches the port could use the card
    return key or (None if host in guard.LOOPBACK else secrets.token_urlsafe(24))


def public(
    runs: Sequence[str | Path], host: str, port: int, key: str | None, say: Say, options: dict[str, Any]
) -> Engine:
    """The engine at the address that others use: with a key llama.cpp's own, without one that of the guard before it."""
    if key:
        return start(runs, host=host, port=port, key=key, say=say, **options)
    # a port that is taken is known before a model is loaded
    listener = guard.listening_socket(host, port)
    try:
        engine = start(runs, say=say, **options)
    except BaseException:
        listener.close()
        raise
    return dataclasses.replace(engine, url=guard.opened(engine, listener), key=None)


def welcome(engine: Engine) -> str:
    """What a person needs once the server is up: addresses, how to choose between runs and base, how to stop."""
    header = f' -H "Authorization: Bearer {engine.key}"' if engine.key else ""
    lines = [f"page: {engine.url}/    API: {engine.url}/v1    {engine.context:,} tokens of context    Ctrl-C stops"]
    if engine.key:
        lines.append(f"API key, asked for by API and page: {engine.key}")
    for name in (*engine.runs, BASE) if engine.runs else ():
        body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], **engine.lora(name)})
        lines.append(f"{name}: curl {engine.url}/v1/chat/completions{header} -d '{body}'")
    if engine.runs:
        lines.append(
            '"scale" is how much of the adapter is added: 0 is the base, 1 the run, and between them works too'
        )
    return "\n".join(lines)


def run_vllm(command: list[str], say: Say) -> None:
    """Start vLLM where it is installed, else print its command."""
    if shutil.which("vllm") is None:
        say(f"vLLM is not installed here. Where it is (pip install vllm), run:\n\n{shlex.join(command)}")
        return
    say(shlex.join(command))
    subprocess.run(command, check=False)


def vllm_command(runs: Sequence[str | Path], *, host: str, port: int, key: str | None, context: int) -> list[str]:
    """`vllm serve` with the runs' adapters as LoRA modules beside their base, whose name is `base`.

    Flags as in vLLM's documentation, "LoRA Adapters", "Reasoning Outputs", "Tool Calling"."""
    folders = [run_folder(run).resolve() for run in runs]
    adapter = folders[0] / "adapter"
    model = recipe.load(folders[0] / "recipe.yaml").model
    config = checkpoint_file(model, "config.json")
    family = family_of(config.get("model_type", ""))
    template = adapter / "chat_template.jinja"
    rank = max(read_json(folder / "adapter" / "adapter_config.json")["r"] for folder in folders)
    longest = config.get("text_config", config).get("max_position_embeddings", context)
    words = ["vllm", "serve", checkpoint_path(model), "--served-model-name", BASE, "--enable-lora", "--lora-modules"]
    words += [f"{folder.name}={folder / 'adapter'}" for folder in folders]
    words += ["--max-lora-rank", str(next(most for most in VLLM_RANKS if most >= rank))]
    words += ["--max-model-len", str(min(context, longest))]
    if template.is_file():
        words += ["--chat-template", str(template)]
    if model.revision:
        words += ["--revision", model.revision]
    # made on load, as the run was trained; a checkpoint in 4-bit says so itself
    if model.load_in_4bit and "quantization_config" not in config:
        words += ["--quantization", "bitsandbytes"]
    if family.reasoning_parser and load_chat(str(adapter)).kind != "instruct":
        words += ["--reasoning-parser", family.reasoning_parser]
    if family.tool_parser:
        words += ["--enable-auto-tool-choice", "--tool-call-parser", family.tool_parser]
    words += ["--host", host, "--port", str(port)]
    if key:
        words += ["--api-key", key]
    return words
