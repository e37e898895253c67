"""The types of what a run leaves and of what travels between the stages: one line of documentation for each key.

from toolkit.records import Evaluation, Interval, Manifest, MixReport

Each file of a run folder has one type here: mix.json is MixReport, eval.json is Evaluation, manifest.json is Manifest,
certificate.json is Certificate, export.json is ExportRecord; a line of metrics.jsonl is MetricLine, of samples.jsonl
SampleLine, of quarantine.jsonl DroppedRow. The types say what a key holds; at run time they are plain dicts.
"""

from typing import Any, Literal, NotRequired, TypedDict

from toolkit.files import JsonObject

# One word of a recipe or of a report --------------------------------------------------------------------------------

Role = Literal["system", "user", "assistant", "tool"]
Unit = Literal["examples", "tokens", "supervised_tokens"]
Shares = dict[str, float]
"""{source or mode: its share, 0 to 1}."""
Json = Any
"""A value of a JSON file whose shape the toolkit does not know: a raw row, the arguments of a call, a tool's schema."""


# A conversation ------------------------------------------------------------------------------------------------------


class FunctionCall(TypedDict):
    name: str  # the tool that the model calls
    arguments: JsonObject  # as an object, never as text


class ToolCall(TypedDict):
    type: Literal["function"]  # the only kind there is
    function: FunctionCall  # what is called, with what


class Message(TypedDict):
    role: Role  # who speaks; "tool" is the result of a call
    content: str  # the text, without reasoning; blank only beside tool_calls or in a tool's result
    reasoning_content: NotRequired[str]  # what an assistant thought before the answer, without <think> tags
    tool_calls: NotRequired[list[ToolCall]]  # calls that an assistant makes
    train: NotRequired[bool]  # false on an assistant's turn that its set leaves out of training; absent elsewhere


Messages = list[Message]


class Conversation(TypedDict):
    messages: list[Message]  # an optional system turn, then user and assistant in turns; the last is the assistant's
    tools: NotRequired[list[JsonObject]]  # schemas of the tools that the template shows, in OpenAI's form
    expected_answer: NotRequired[str]  # what a right answer comes to; evaluation can ask a held-out row that has one


class Question(TypedDict):
    messages: list[Message]  # up to and including a user turn
    expected_answer: str  # what the reply is judged by
    set: str  # the name of the question set, as reports show it
    chat: NotRequired[bool]  # counts as a chat question (accuracy/chat), not as a reasoning question (accuracy)


class Probe(TypedDict):
    id: str  # a unique name
    category: str  # knowledge, instruction, safety, format, identity or identity_neighbours
    language: str  # en or zh
    messages: list[Message]  # one user turn; the base's own answer to it is what the tuned model is compared on


class HeldOutRow(TypedDict):
    input_ids: list[int]  # prompt and completion
    prompt_length: int  # leading tokens that are not scored
    source: str  # the source it was held out of
    mode: str  # the mode it is rendered in


class OwnRow(TypedDict):
    source: str  # the source it was held out of
    mode: str  # the mode it is rendered in
    messages: list[Message]  # up to and including a user turn
    reference: str  # the reply that the row has, its reasoning included


# mix.json ------------------------------------------------------------------------------------------------------------


class CompletionLengths(TypedDict):
    completion_p90: int  # nine completions of ten are not longer
    completion_max: int  # the longest one


class NotRead(TypedDict):
    row: dict[str, int]  # {key of a row: rows that have it}
    turn: dict[str, int]  # {key of a turn: turns that have it}


class SourceReport(TypedDict):
    mode: str  # as the recipe has it: auto, thinking or non_thinking
    modes: dict[str, int]  # {mode: rows in training}, where auto may give both
    rows_asked: int | None  # the number after `#` in the source's path; null without one
    rows_seen: int  # examples read until the quota was met
    rows_kept: int  # rows in training, repeated ones counted each time
    rows_repeated: int  # those of rows_kept that repeat an earlier row, by max_repeats or `#N`
    rows_held_out: int  # rows of the validation set
    dropped: dict[str, int]  # {reason: examples}; quarantine.jsonl names each of them
    not_read: NotRead  # keys with a value that no rule reads; names that say where a row is from are left out
    looks_like: dict[str, int]  # {reasoning or placeholder: rows whose reply looks as if it held one}
    tokens: int  # tokens in training
    supervised_tokens: int  # those of them that the loss counts
    lengths: dict[str, CompletionLengths]  # {mode: tokens of its completions}


class MixReport(TypedDict):
    unit: Unit  # what shares and budget are counted in
    budget: int | None  # how much is trained on at most, in `unit`; null takes everything
    planned: Shares  # {source: the share it was to have}
    achieved: dict[Unit, Shares]  # {unit: {source: the share it has}} of the compiled rows
    achieved_modes: dict[Unit, Shares]  # the same by mode instead of source
    total: dict[Unit, int]  # the size of the mix in each unit
    limited_by: str | None  # the exhausted source for which the whole mix was reduced; null where none was
    lengths: dict[str, CompletionLengths]  # {mode: tokens of its completions}, in all sources
    sources: dict[str, SourceReport]  # {source: what was read, kept and dropped}
    max_seq_length: int  # longest row allowed; rows are never truncated
    fingerprints: dict[str, str]  # {source or questions/NAME: SHA-256 of its data}
    slow_tokenizer: str | None  # why the fast tokenizer was not used; null where it was
    warnings: list[str]  # what should be looked at before training


class DroppedRow(TypedDict):
    source: str  # the source it was read from
    row: int  # its number there, from 1
    reason: str  # one word, as counted in mix.json
    detail: str  # what exactly was wrong


# Training ------------------------------------------------------------------------------------------------------------


class MetricLine(TypedDict, total=False):
    """A line of metrics.jsonl. transformers and TRL add keys of their own: eval_SOURCE/MODE_loss and others."""

    step: int  # optimizer steps done
    epoch: float  # passes over the training rows, in parts
    loss: float  # mean loss of the supervised tokens since the last line
    learning_rate: float  # of the step that was logged
    grad_norm: float | None  # norm of the gradient before clipping; null where it overflowed in fp16
    eval_loss: float  # validation loss of all sources, weighted by their achieved shares
    eval_forgetting_kl: float  # KL from the base on its own answers, in nats per token
    eval_token_accuracy: float  # share of held-out tokens that the model would have chosen
    tokens: int  # tokens seen so far, over all resumes
    supervised_tokens: int  # those of them that the loss counted
    tokens_per_second: float  # since training began, without evaluation and saving
    supervised_tokens_per_second: float  # the same for supervised tokens
    peak_memory_gib: float  # reserved on the card at the peak, or resident on a CPU
    num_tokens: float  # TRL's own count


class SampleLine(TypedDict):
    when: Literal["before", "after"]  # without the adapter, or with it
    prompt: str  # one of the recipe's evaluate.prompts
    mode: str  # the mode it was asked in
    reasoning: str  # the reply's think block, without tags
    answer: str  # the reply's answer
    finished: bool  # whether it ended by itself, not by the limit


class ModelRecord(TypedDict):
    name: str  # the model that was loaded: a Hub name, a folder or pocket
    revision: str | None  # its commit on the Hub, where known
    load_in_4bit: bool  # whether the base was quantized to NF4
    files: NotRequired[
        dict[str, str]
    ]  # {file: SHA-256} of a local base's weights; empty for a Hub name, which has a revision


class Gpu(TypedDict):
    name: str  # as the driver calls it
    memory_bytes: int  # of the whole card


class MemoryComparison(TypedDict):
    """How good the memory forecast was."""

    phase: str  # training
    forecast: int  # bytes expected at the peak
    measured: int  # bytes reserved at the peak
    error: float  # relative; positive where too much was expected


class TimeComparison(TypedDict):
    """How good the forecast of hours was: training and the validations in it."""

    forecast: float  # seconds expected
    measured: float  # seconds taken, over all resumes
    speed: str  # the card or processor whose speed was measured, or named
    error: float | None  # relative; positive where too much was expected


class Seeds(TypedDict):
    data: int  # draws rows and their order
    train: int  # initializes the adapter and shuffles epochs


class RunStart(TypedDict):
    """What it would take to repeat a run; written when it begins."""

    recipe_sha256: str  # of the resolved recipe
    versions: dict[str, str]  # {package: version}, Python included
    gpu: Gpu | None  # null on a CPU
    model: ModelRecord  # the base
    data: dict[str, str]  # {source or questions/NAME: SHA-256 of its data}
    mix: str  # name of the mix's folder in the cache
    seeds: Seeds  # all that is random
    commit: str | None  # the toolkit's git commit, with + where files differ from it; null in an installed copy
    started: str  # when the run first began, UTC
    state: Literal["running", "stopped", "finished"]  # running, too, after a kill that left no time to write


class AdapterOf(TypedDict):
    run: str  # whose adapter was continued: model.adapter of the recipe
    sha256: str  # of its weights
    data: dict[str, str]  # {source: SHA-256 of its data} that it was trained on; empty where that is not known


class Parent(TypedDict):
    """A run that a sum was made of (`blend`)."""

    name: str  # its folder's
    recipe: JsonObject  # its recipe.yaml
    manifest: "Manifest"  # its manifest.json


class Manifest(RunStart, total=False):
    """The keys of RunStart, and what came of the training, most of it once that has ended."""

    adapter_of: AdapterOf  # the run that this one continued, where it did
    sweep: str  # the folder of the sweep that trains it, where one does
    earlier_versions: dict[str, str]  # those that differed when the run began
    stopped: str  # why it stopped, where it did
    batch: dict[str, int]  # batch size and accumulation as used, which may be smaller than the recipe's
    processes: int  # how many trained together
    packing: bool  # whether rows were packed
    padding_free: bool  # whether rows of a batch were joined without padding
    resumed_at: int  # the step at which the last process took up the training; 0: at its beginning
    skipped_steps: int  # steps whose fp16 gradients overflowed
    peak_memory_bytes: int  # reserved on the card at the peak, or resident on a CPU
    train_seconds: float  # steps alone
    evaluation_seconds: float  # validation during training
    seconds: float  # everything, over all resumes
    tokens: int  # trained on
    supervised_tokens: int  # those of them that the loss counted
    tokens_per_second: float  # over train_seconds
    supervised_tokens_per_second: float  # over train_seconds
    peak_memory_gib: float  # peak_memory_bytes in GiB
    train_loss: float  # mean over all steps
    steps: int  # optimizer steps done
    best_step: int | None  # the step with the lowest validation loss; null without validation
    adapter_step: int  # the step whose weights are the adapter
    adapter: dict[str, str]  # {file of adapter/: SHA-256}
    finished: str  # when it ended, UTC
    fit: MemoryComparison  # the memory forecast against what was measured, on a card
    time: TimeComparison  # the forecast of hours against what was measured
    parents: list[Parent]  # of a sum of runs: what was added, instead of mix, data and seeds
    weights: list[float]  # how much of each parent


# eval.json -----------------------------------------------------------------------------------------------------------


class Interval(TypedDict):
    value: float | None  # null where nothing could be measured
    low: float | None  # lower end of the 95% interval
    high: float | None  # upper end
    n: int  # questions, probes or rows behind it


Metrics = dict[str, Interval]
"""{metric: interval}: accuracy, accuracy/chat, accuracy/set/NAME, adherence, cut, reasoning_tokens, answer_tokens in a mode;
begins/thinking and begins/answer in a mode; kl, nll, kl/CATEGORY, loss/SOURCE/MODE and token_accuracy/SOURCE/MODE under
"forgetting"."""
Sections = dict[str, Metrics]
"""{mode, or "forgetting": metrics}."""
PerQuestion = dict[str, dict[str, dict[str, list[list[float]]]]]
"""{section: {"base" or "tuned": {metric: [sum of each question, weight of each question]}}}: what pairs runs."""


class EvaluationBudget(TypedDict):
    questions: int  # asked of each kind, reasoning and chat, at most
    samples: int  # replies per question, mode and model
    probes: int  # per category and language
    probe_tokens: int  # longest answer to a probe
    validation: int  # held-out rows scored, at most
    max_new_tokens: int  # longest reply to a question in any mode
    limits: dict[str, int]  # {mode: longest reply in it}
    replies: int  # replies to questions, in all modes and of both models
    note: str  # why less was generated than the level names; empty where nothing was left out


class EvaluationSample(TypedDict):
    mode: str  # the mode it was asked in
    prompt: str  # the last user turn
    expected_answer: str  # what a right answer comes to
    base: str  # the base's reply, as generated
    tuned: str  # the tuned model's


class OwnRowReplies(TypedDict):
    source: str  # the source it was held out of
    mode: str  # the mode it was asked in
    prompt: str  # the last user turn
    reference: str  # the reply that the row has
    base: str  # the base's reply, as generated
    tuned: str  # the tuned model's


class ReplyLengths(TypedDict):
    base: float | None  # mean tokens of the replies that ended
    tuned: float | None  # the same with the adapter
    ratio: Interval  # tuned by base, over as many of the shortest replies as both models ended
    endless: Interval  # share of replies that end in the base and not in tuned, beyond what longer replies explain


class Earlier(TypedDict):
    run: str  # the run that was continued
    earlier: Sections  # its scores by held-out rows and probes, no reply generated
    difference: Sections  # this run minus that one on the same, paired


class Evaluation(TypedDict):
    level: str  # how much was asked: fast, quick or full
    seed: int  # the evaluation's own, not the recipe's
    modes: list[str]  # the modes that the model has
    budget: EvaluationBudget  # how much was asked, in numbers
    seconds: float  # how long it took
    fingerprints: dict[str, str]  # {questions, probes, validation: identity of what was asked}
    base: Sections  # scores without the adapter
    tuned: Sections  # scores with it
    difference: Sections  # tuned minus base, paired over questions
    per_question: PerQuestion  # what `compare` pairs runs by
    lengths: dict[str, ReplyLengths]  # {mode: how much longer replies are}; empty where none was generated
    shipped: list[str]  # question sets that ship with the toolkit: a check of what was kept
    own_rows: list[OwnRowReplies]  # held-out rows before and after, beside their reference
    samples: list[EvaluationSample]  # a few prompts with both replies, for people to read
    verdict: list[str]  # the result in words; the last line begins with "result:"
    earlier: NotRequired[Earlier]  # beside the run that this one continued


# export.json and certificate.json ------------------------------------------------------------------------------------


class FileRecord(TypedDict):
    sha256: str  # of its content, in hex
    bytes: int  # its size


class ExportInputs(TypedDict):
    onto: Literal["4bit", "16bit"]  # the base the adapter was merged onto
    base: str  # its name, without where it lies on this machine
    revision: str | None  # its commit on the Hub, where known
    base_files: dict[str, str]  # {config.json or a file of weights: SHA-256}
    scale: float  # the share of the adapter that was kept; 1 is the adapter as it was trained
    adapter: dict[str, str]  # {file of adapter/: SHA-256}
    adapter_of: NotRequired[AdapterOf]  # the run that this one continued: its adapter is contained in this one
    versions: dict[str, str]  # {package: version} of what writes GGUF files


class ExportRecord(TypedDict):
    inputs: ExportInputs  # what the files were made of; another adapter or base makes them stale
    files: dict[str, FileRecord]  # {path in the run folder: its content}


class Check(TypedDict):
    name: str  # what was measured
    passed: bool  # whether the value keeps the limit
    value: float | None  # null where it is no number, which has failed
    limit: float  # the bound
    rule: Literal["at most", "at least"]  # how the value must lie to the limit


class Note(TypedDict):
    name: str  # what was measured, or could not be
    value: float | None  # null where it could not be
    note: str  # what it means; it decides nothing


class ModelFacts(TypedDict):
    model_type: str  # the architecture, by config.json
    max_position_embeddings: int  # its context length in tokens


class Certificate(TypedDict):
    passed: bool  # whether every check did
    checks: list[Check]  # the gates
    reports: list[Note]  # measured for information
    files: dict[str, FileRecord]  # {path in the run folder: its content as verified}
    inputs: ExportInputs  # what the files were made of
    model: ModelFacts  # what a server of the files has to know of them
    positions: int  # tokens at which probabilities were compared
    kl: str  # how KL from a GGUF is taken
    seconds: float  # how long the verification took
    versions: dict[str, str]  # {package: version} that took part
