"""Serve a run to other programs and to a web page, by llama.cpp's server.

`python -m toolkit serve pocket`, then http://127.0.0.1:8000/ or OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-")
"""

import dataclasses
import json
import re
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.export.llama import Engine
from toolkit.files import Say, ToolkitError
from toolkit.serving import guard
from toolkit.serving.engine import BASE, start


def serve(
    runs: Sequence[str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    say: Say = print,
    **options: Any,
) -> None:
    """Serve until Ctrl-C. `options` are those of `engine.start`. A host other than this machine needs an API key, and
    gets one when none is given. Raises ToolkitError."""
    served = public(runs, host, port, checked_key(host, key, say), say, options)
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
    if key and not re.fullmatch("[!-~]+", key):
        raise ToolkitError("--api-key: expected letters, digits and signs without spaces, as a header can carry it")
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
    except BaseException:  # Ctrl-C while the model loads too: the port must be free again
        listener.close()
        raise
    return dataclasses.replace(engine, url=guard.opened(engine, listener), key=None)


def welcome(engine: Engine) -> str:
    """What a person needs once the server is up: addresses, how to choose between runs and base, how to stop."""
    lines = [f"page: {engine.url}/    API: {engine.url}/v1    {engine.context:,} tokens of context    Ctrl-C stops"]
    header = ""
    if engine.key:
        header = f' -H "Authorization: Bearer {engine.key}"'
        lines.append(f"API key, asked for by API and page: {engine.key}")
    if engine.runs:
        for name in (*engine.runs, BASE):
            body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], **engine.lora(name)})
            lines.append(f"{name}: curl {engine.url}/v1/chat/completions{header} -d '{body}'")
        lines.append('"scale" is how much of the adapter is added: 0 is the base, 1 the run; others work too')
    return "\n".join(lines)
