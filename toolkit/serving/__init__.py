"""Serve a run to other programs and to a web page, by engines that exist: llama.cpp's server, or vLLM.

`python -m toolkit serve pocket`, then http://127.0.0.1:8000/ or OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-")
"""

import json
import secrets
import shlex
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from toolkit import recipe
from toolkit.data.render import load_chat
from toolkit.export.llama import Engine
from toolkit.family import family_of
from toolkit.files import ToolkitError, read_json
from toolkit.serving.engine import BASE, CONTEXT, check, start
from toolkit.training.model import checkpoint_file, checkpoint_path, run_folder

LOOPBACK = ("127.0.0.1", "localhost", "::1")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank accepts (vllm/config/lora.py, MaxLoRARanks)."""


def serve(runs: Sequence[str | Path], *, engine: str = "llama.cpp", host: str = "127.0.0.1", port: int = 8000,
          key: str | None = None, checked: bool = False, say=print, **options) -> None:  # fmt: skip
    """Serve until Ctrl-C. `options` are those of `engine.start`. A host other than this machine needs an API key, and
    gets one when none is given. `checked` first holds what is served against the run. Raises ToolkitError."""
    # whoever reaches the port could use the card
    if host not in LOOPBACK and key is None:
        key = secrets.token_urlsafe(24)
    if engine == "vllm":
        if checked or options.get("base") or options.get("quant") or options.get("source", "adapter") != "adapter":
            raise ToolkitError("vLLM serves adapters beside their base: leave out --base, --check, --from and --quant")
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
    header = f' -H "Authorization: Bearer {engine.key}"' if engine.key else ""
    lines = [
        f"page: {engine.url}/    API: {engine.url}/v1    {engine.context:,} tokens of context    Ctrl-C stops",
        "in the page switch its tools off (+, Tools): it offers them to every model, which changes the prompt",
    ]
    if engine.key:
        lines.append(f"API key, asked for by API and page: {engine.key}")
    for name in (*engine.runs, BASE) if engine.runs else ():
        body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], **engine.lora(name)})
        lines.append(f"{name}: curl {engine.url}/v1/chat/completions{header} -d '{body}'")
    return "\n".join(lines)


def vllm_command(runs: Sequence[str | Path], *, host: str, port: int, key: str | None, context: int) -> list[str]:
    """`vllm serve` with the runs' adapters as LoRA modules beside their base, whose name is `base`.

    Flags as in vLLM's documentation, "LoRA Adapters", "Reasoning Outputs", "Tool Calling"."""
    folders = [run_folder(run).resolve() for run in runs]
    adapter, model = folders[0] / "adapter", recipe.load(folders[0] / "recipe.yaml").model
    config, kind = checkpoint_file(model, "config.json"), load_chat(str(adapter)).kind
    family, template = family_of(config.get("model_type", "")), adapter / "chat_template.jinja"
    rank = max(read_json(folder / "adapter" / "adapter_config.json")["r"] for folder in folders)
    nf4 = model.load_in_4bit and "quantization_config" not in config  # made on load, as the run was trained
    options = {
        "served-model-name": BASE,
        "enable-lora": True,
        "lora-modules": [f"{folder.name}={folder / 'adapter'}" for folder in folders],
        "max-lora-rank": next(most for most in VLLM_RANKS if most >= rank),
        "max-model-len": min(context, config.get("text_config", config).get("max_position_embeddings", context)),
        "chat-template": template if template.is_file() else None,
        "revision": model.revision,
        "quantization": "bitsandbytes" if nf4 else None,
        "reasoning-parser": None if kind == "instruct" else family.reasoning_parser,
        "enable-auto-tool-choice": bool(family.tool_parser),
        "tool-call-parser": family.tool_parser,
        "host": host,
        "port": port,
        "api-key": key,
    }
    words = ["vllm", "serve", checkpoint_path(model)]
    for flag, value in options.items():
        # false, empty and None: a flag that is left out
        if value:
            words += [f"--{flag}", *([] if value is True else value if isinstance(value, list) else [str(value)])]
    return words
