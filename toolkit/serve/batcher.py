"""Answers requests with a loaded model: those that wait together are generated together, each streamed on its own.

batcher = Batcher(model, tokenizer, names={"pocket": "default", "base": None}); batcher.start(job)
"""

import contextlib
import secrets
import sys
import threading
import time
import traceback

import numpy as np

from toolkit.generate import _pad, end_tokens, inference, sampler
from toolkit.serve.request import Job, Piece, Refused
from toolkit.serve.splitter import Splitter

ROWS = 16
"""Requests generated together at most."""
TOKENS = 8192
"""Prompts and replies of a batch at most, padding included: for an 8B model they take 1.2 GB (fit.py's KV cache)."""
GATHER = 0.01
"""Seconds an idle model waits for company after a request came."""


class Batcher:
    """One model, one thread that generates. `names`: what a request may ask for → the PEFT adapter, None for none."""

    def __init__(self, model, tokenizer, names: dict[str, str | None], waiting: int = 64):
        self.model, self.tokenizer, self.adapters = model, tokenizer, names
        self.names, self.waiting = list(names), waiting
        self.context = model.config.max_position_embeddings
        self.ends = end_tokens(model, tokenizer)
        self._adapted = any(names.values())
        self._queue: list[Job] = []
        self._news = threading.Condition()
        self._tokenizing = threading.Lock()  # fast tokenizers refuse to be used by two threads at once
        threading.Thread(target=self._work, daemon=True, name="generate").start()

    def start(self, job: Job) -> None:
        """Queues a job. Raises Refused: 404 unknown model, 400 for a prompt that does not fit, 429 for a full queue."""
        if (job.ask.model or self.names[0]) not in self.adapters:
            raise Refused(
                f"model {job.ask.model!r}: expected {' or '.join(self.names)}", 404, "model_not_found", "model"
            )
        self._tokenize(job)
        with self._news:
            if len(self._queue) >= self.waiting:
                raise Refused(f"{self.waiting} requests are waiting already: try again in a moment", 429, "queue_full")
            self._queue.append(job)
            self._news.notify()

    def _tokenize(self, job: Job) -> None:
        import jinja2

        ask = job.ask
        try:
            text = self.tokenizer.apply_chat_template(
                ask.messages, tools=ask.tools, tokenize=False, add_generation_prompt=True, enable_thinking=ask.thinking
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise Refused(
                f"the model's chat template cannot show these messages: {error}", 400, None, "messages"
            ) from error
        with self._tokenizing:
            job.ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        job.opened = text.rstrip().endswith("<think>")
        room = self.context - len(job.ids)
        if room < 1:
            message = f"the prompt has {len(job.ids)} tokens, the model was loaded for {self.context}"
            raise Refused(message, 400, "context_length_exceeded", "messages")
        job.limit = min(ask.max_tokens, room)

    def _work(self) -> None:
        """The thread: a batch that fails is told so, and the next one begins."""
        while True:
            jobs = self._next()
            try:
                self._answer(jobs)
            except Exception:  # a request that fails must not take the server down
                traceback.print_exc(file=sys.stderr)
                failure = Refused("the model failed on this request; the server's log says why", 500, "server_error")
                for job in jobs:
                    job.emit(Piece("error", error=failure))

    def _next(self) -> list[Job]:
        """The oldest request, and those behind it that can share its batch; refuses what has waited too long."""
        with self._news:
            while not self._queue:
                self._news.wait()
        time.sleep(GATHER)
        with self._news:
            waiting, self._queue = self._queue, []
            jobs: list[Job] = []
            for job in waiting:
                if job.over():
                    job.emit(Piece("error", error=Refused("waited too long for its turn: try again", 503, "timeout")))
                elif len(jobs) < ROWS and self._fits(job, jobs):
                    jobs.append(job)
                else:
                    self._queue.append(job)
        return jobs

    def _fits(self, job: Job, jobs: list[Job]) -> bool:
        """Same adapter and truncation, within TOKENS; and padding must not take room from the longest reply."""
        group = [*jobs, job]
        longest = max(len(j.ids) for j in group) + max(j.limit for j in group)
        kinds = {(j.ask.model or self.names[0], j.ask.values["top_k"], j.ask.values["min_p"]) for j in group}
        alone = len(group) == 1 or len(group) * longest <= max(TOKENS, self.context)
        return len(kinds) == 1 and longest <= self.context and alone

    def _answer(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        outlet = Outlet(jobs, self.tokenizer, self.ends)
        steps = max(job.limit for job in jobs)
        with inference(self.model, self.tokenizer), self._wearing(self.adapters[jobs[0].ask.model or self.names[0]]):
            self.model.generate(
                **_pad(self.model, self.tokenizer, [job.ids for job in jobs]),
                max_new_tokens=steps,
                do_sample=False,
                use_cache=True,
                eos_token_id=self.ends,
                pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=[_chooser(jobs, steps)],
                stopping_criteria=[outlet.done],
                streamer=outlet,
            )

    def _wearing(self, adapter: str | None) -> contextlib.AbstractContextManager:
        if not self._adapted:
            return contextlib.nullcontext()
        if adapter is None:
            return self.model.disable_adapter()
        self.model.set_adapter(adapter, inference_mode=True)
        return contextlib.nullcontext()


def _chooser(jobs: list[Job], steps: int):
    """Every row by its own temperature and top-p, from a stream of its own: a seed gives the same reply in any batch."""
    import torch

    values = [job.ask.values for job in jobs]
    greedy = [v["temperature"] == 0 for v in values]
    temperature = [1.0 if g else v["temperature"] for g, v in zip(greedy, values, strict=True)]
    top_p = [
        1e-9 if g else v["top_p"] for g, v in zip(greedy, values, strict=True)
    ]  # so little holds the top token only
    seeds = [secrets.randbits(63) if job.ask.seed is None else job.ask.seed for job in jobs]
    drawn = np.stack([np.random.Generator(np.random.Philox(seed)).random(steps) for seed in seeds])
    shared = {"top_k": values[0]["top_k"], "min_p": values[0]["min_p"]}
    own = {"temperature": torch.tensor(temperature)[:, None], "top_p": torch.tensor(top_p)[:, None]}
    chosen = None

    def choose(input_ids, scores):
        nonlocal chosen
        if chosen is None:
            on_device = {name: column.to(scores.device) for name, column in own.items()}
            chosen = sampler({**shared, **on_device}, np.minimum(drawn, 1 - 2.0**-24))
        return chosen(input_ids, scores)

    return choose


class Outlet:
    """The streamer of a batch: takes each step's tokens apart by row, and knows which rows are done."""

    def __init__(self, jobs: list[Job], tokenizer, ends: list[int]):
        self.rows = [_Row(job, tokenizer, ends) for job in jobs]
        self._prompt = True

    def put(self, tokens) -> None:
        if self._prompt:  # generate() hands over the prompt first
            self._prompt = False
            return
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.put(token)

    def end(self) -> None:
        for row in self.rows:
            row.finish("length")

    def done(self, input_ids, _scores):
        import torch

        return torch.tensor([row.finished for row in self.rows], device=input_ids.device)


class _Row:
    def __init__(self, job: Job, tokenizer, ends: list[int]):
        from tokenizers.decoders import DecodeStream

        self.job, self.ends, self.finished = job, ends, False
        self.splitter = Splitter(job.opened, bool(job.ask.tools), job.ask.stop)
        self.backend, self.stream = tokenizer.backend_tokenizer, DecodeStream(skip_special_tokens=False)
        self.tokens = self.reasoning = 0
        self.called = False

    def put(self, token: int) -> None:
        if self.finished:
            return
        self.tokens += 1
        if token in self.ends:
            self.finish("stop")
            return
        text = self.stream.step(self.backend, token)  # None while a character is not whole yet
        self._emit(self.splitter.feed(text or ""))
        self.reasoning += self.splitter.state == "reasoning"
        if self.splitter.stopped:
            self.finish("stop")
        elif self.tokens >= self.job.limit or self.job.over():
            self.finish("length")

    def finish(self, why: str) -> None:
        if self.finished:
            return
        self.finished = True
        self._emit(self.splitter.close())
        usage = {
            "prompt_tokens": len(self.job.ids),
            "completion_tokens": self.tokens,
            "reasoning_tokens": self.reasoning,
        }
        self.job.emit(Piece("end", finish="tool_calls" if self.called and why == "stop" else why, usage=usage))

    def _emit(self, parts: list[tuple[str, str]]) -> None:
        for kind, text in parts:
            self.called = self.called or kind == "tool_call"
            self.job.emit(Piece(kind, text))
