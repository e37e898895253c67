"""Tokens per second of a served run under several clients: `python -m tests.tools.bench.serve http://127.0.0.1:8000 --seconds 180`.

print(load("http://127.0.0.1:8000", clients=8, seconds=60))
"""

import argparse
import json
import threading
import time

import httpx

from tests.tools.bench.start import processor
from toolkit.training.folder import commit


def load(url: str, clients: int = 8, seconds: float = 180) -> dict:
    """{"tokens_per_second", "replies", "failed", …} of clients that each ask a sum, wait for the whole reply, and ask again."""
    tokens, failed, until = [], [], time.monotonic() + seconds

    def client(number: int) -> None:
        with httpx.Client(base_url=url, timeout=300) as http:
            while time.monotonic() < until:
                asked = [{"role": "user", "content": f"What is {10 + len(tokens) % 80} + {11 + number}?"}]
                body = {"model": "", "messages": asked, "max_tokens": 256, "seed": number}
                try:
                    tokens.append(http.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"])
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    failed.append(repr(error)[:200])

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    return {
        "clients": clients,
        "seconds": round(took, 1),
        "replies": len(tokens),
        "failed": len(failed),
        "tokens_per_second": round(sum(tokens) / took, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.bench.serve", description=__doc__)
    parser.add_argument("urls", nargs="+", help="servers, measured one after the other")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=180)
    args = parser.parse_args()
    where = {"cpu": processor(), "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    runs = [{"url": url} | load(url, clients, args.seconds) for clients in args.clients for url in args.urls]
    print(json.dumps(where | {"runs": runs}, indent=1))


if __name__ == "__main__":
    main()
