"""The one file that knows every part: from a config to an engine that runs."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from setpoint import __version__
from setpoint.config import (
    EngineConfig,
    ModelFacts,
    Reason,
    SpeculativeConfig,
    cache_directory,
    resolve,
    this_machine,
)
from setpoint.engine.engine import Engine, Event
from setpoint.engine.plan import RunnerInfo
from setpoint.engine.scheduler import Scheduler, SchedulerLimits
from setpoint.engine.slo import HeldSla
from setpoint.engine.speculation.draft_model import DraftModel
from setpoint.engine.speculation.drafter import Drafter
from setpoint.engine.speculation.prompt_lookup import PromptLookup
from setpoint.engine.speculation.recurring_text import Texts
from setpoint.engine.speculation.speculator import Speculator
from setpoint.engine.speculation.suffix import CorpusSuffix, SessionSuffix
from setpoint.engine.step_cost import StepCost
from setpoint.errors import ConfigError, ModelError, RequestError
from setpoint.grammar.compiler import GrammarCompiler
from setpoint.loaders.checkpoint import Checkpoint, open_checkpoint
from setpoint.loaders.download import Progress, silent
from setpoint.loaders.hub import resolve_model
from setpoint.models import build_model
from setpoint.models.spec import Model
from setpoint.text.chat_template import ChatTemplate
from setpoint.text.processes import SandboxStartError
from setpoint.text.sandbox import TemplateSandbox
from setpoint.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from setpoint.engine.lower_tiers import LowerTiers
    from setpoint.runtime.cpu.runner import CpuRunner
    from setpoint.runtime.cpu.weight_cache import WeightCache


log = logging.getLogger("setpoint.kv")


def models_directory() -> Path:
    """Where `setpoint models` keeps what it downloads."""
    return cache_directory() / "models"


def weight_cache(limit_bytes: int = 0) -> WeightCache:
    """Where repacked weights are kept."""
    from setpoint.runtime.cpu.weight_cache import WeightCache

    return WeightCache(cache_directory() / "packed", limit_bytes)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A checkpoint, opened and understood; no weights in memory yet."""

    path: Path
    checkpoint: Checkpoint
    model: Model
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None


@dataclass(slots=True)
class Assembly:
    """An engine (not started) with what a front end needs beside it."""

    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    grammars: GrammarCompiler
    model: Model
    config: EngineConfig
    reasons: list[Reason]
    model_name: str
    isa: str  # of the kernels that were chosen
    weight_bytes: int  # read by every step; more where a row wants more than its most likely token
    cache_info: dict[str, str]  # of the KV cache, under the names of vLLM's metric
    phases: dict[str, float] = field(default_factory=dict)  # start-up phase -> seconds


def model_facts(model: Model, weight_bytes: int = 0) -> ModelFacts:
    from setpoint.runtime.cpu.step_memory import step_bytes_per_token

    layers = model.layers.layers
    values = sum(2 * layer.attention.kv_heads * layer.attention.head_dim for layer in layers)
    vectors = sum(2 * layer.attention.kv_heads for layer in layers)
    return ModelFacts(model.max_position, values, vectors, weight_bytes, step_bytes_per_token(model))


def load_model(name: str, *, progress: Progress = silent) -> LoadedModel:
    """Find the files of `name` (downloading them when needed), read the config, build tokenizer and template."""
    opened = _open_model(name, progress, chats=True)
    return LoadedModel(opened.path, opened.checkpoint, opened.model, *_load_text(opened))


@dataclass(frozen=True, slots=True)
class _OpenedModel:
    path: Path
    checkpoint: Checkpoint
    model: Model
    sandbox: TemplateSandbox | None  # its process starts while other things are done; None to start when first used


def _open_model(name: str, progress: Progress, chats: bool) -> _OpenedModel:
    path = resolve_model(name, models_directory(), progress=progress)
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint.config)
    sandbox = _started_sandbox() if chats and checkpoint.chat_template is not None else None
    return _OpenedModel(path, checkpoint, model, sandbox)


def _started_sandbox() -> TemplateSandbox:
    sandbox = TemplateSandbox()
    with contextlib.suppress(SandboxStartError):  # tried again, and told, when the template is compiled
        sandbox.start()
    return sandbox


def _load_text(opened: _OpenedModel) -> tuple[Tokenizer, ChatTemplate | None]:
    source, eos_token_ids = opened.checkpoint.tokenizer, opened.checkpoint.generation.eos_token_ids
    tokenizer = load_tokenizer(source, eos_token_ids=eos_token_ids)
    if len(tokenizer) > opened.model.vocab_size + 1024:
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the model {opened.model.vocab_size}")
    return tokenizer, _chat_template(opened.checkpoint, tokenizer, opened.sandbox)


def _chat_template(
    checkpoint: Checkpoint, tokenizer: Tokenizer, sandbox: TemplateSandbox | None
) -> ChatTemplate | None:
    if checkpoint.chat_template is None:
        return None

    def text(token_id: int | None) -> str:
        return (tokenizer.id_to_token(token_id) or "") if token_id is not None else ""

    generation = checkpoint.generation
    eos = generation.eos_token_ids[0] if generation.eos_token_ids else None
    bos_token, eos_token = text(generation.bos_token_id), text(eos)
    template = ChatTemplate(checkpoint.chat_template, bos_token=bos_token, eos_token=eos_token, sandbox=sandbox)
    if sandbox is not None:
        template.compile()
    return template


def build_engine(
    config: EngineConfig,
    deliver: Callable[[list[Event]], None],
    *,
    progress: Progress = silent,
    phase: Callable[[str], None] = lambda name: None,
    chats: bool = True,
    held: HeldSla | None = None,
    find_cost: Callable[[str], StepCost | None] = lambda fingerprint: None,
) -> Assembly:
    """Everything between a config and `engine.start()`. `phase` is told what begins, for people who wait.

    With `held`, steps are paced; `find_cost` knows what they cost if a probe measured them, or else it is learnt.
    Without `chats` the chat template is compiled when it is first used, not now: a process less beside the start.
    """
    with _collector_paused():
        return _build_engine(config, deliver, progress, phase, chats, held, find_cost)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """A model makes a hundred thousand objects that stay: looking through them meanwhile takes a tenth of a start."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _build_engine(
    config: EngineConfig,
    deliver: Callable[[list[Event]], None],
    progress: Progress,
    phase: Callable[[str], None],
    chats: bool,
    held: HeldSla | None,
    find_cost: Callable[[str], StepCost | None],
) -> Assembly:
    phases: dict[str, float] = {}
    clock = time.monotonic

    phase("opening the model")
    began = clock()
    opened = _open_model(config.model, progress, chats)
    resolved, reasons = resolve(config, this_machine(), model_facts(opened.model, opened.checkpoint.num_bytes))
    speculation = SpeculativeConfig.parse(resolved.speculative_config)
    resolved, draft_model = _open_draft_model(speculation, resolved, opened, progress)
    phases["open"] = clock() - began

    phase("loading weights")
    began = clock()
    with contextlib.ExitStack() as unfinished:  # closes what was opened when something after it fails
        runner = _make_runner(opened, resolved)
        unfinished.callback(runner.close)
        phases["lower"] = clock() - began
        began = clock()
        tokenizer, chat_template = _load_text(opened)  # the weights come in meanwhile
        phases["tokenizer"] = clock() - began
        began = clock()
        runner.wait_for_weights()
        phases["cached weights" if runner.loading.cached else "weights"] = clock() - began
        lower = _lower_tiers(resolved, runner)
        if lower is not None and lower.disk is not None:
            unfinished.callback(lower.disk.close, 0.0)
        speculator = _make_speculator(speculation, draft_model, opened.checkpoint.num_bytes)
        if speculator is not None:
            unfinished.callback(speculator.close)
        scheduler = Scheduler(
            runner.info,
            scheduler_limits(resolved),
            enable_prefix_caching=resolved.enable_prefix_caching,
            seed=resolved.seed,
            speculator=speculator,
            lower=lower,
            held=held,
            step_cost=None if held is None else find_cost(_step_fingerprint(opened, resolved)),
        )
        engine = Engine(scheduler, runner, deliver)
        unfinished.pop_all()
    return Assembly(
        engine=engine,
        tokenizer=tokenizer,
        chat_template=chat_template,
        grammars=GrammarCompiler(tokenizer, runner.info.vocab_size),
        model=opened.model,
        config=resolved,
        reasons=reasons,
        model_name=config.model,
        isa=runner.isa,
        weight_bytes=runner.step_bytes,
        cache_info={
            "block_size": str(runner.info.block_size),
            "num_gpu_blocks": str(sum(group.num_blocks for group in runner.info.kv_groups)),
        },
        phases=phases,
    )


def scheduler_limits(config: EngineConfig) -> SchedulerLimits:
    """What the knobs say a scheduler may do."""
    speculation = SpeculativeConfig.parse(config.speculative_config)
    return SchedulerLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_drafts=0 if speculation.method == "off" else speculation.num_speculative_tokens,
        max_num_queued_reqs=config.max_num_queued_reqs,
        max_num_queued_tokens=config.max_num_queued_tokens,
        session_ttl_s=config.session_ttl,
        session_share=config.session_share,
    )


@dataclass(frozen=True, slots=True)
class _DraftModel:
    """A model that guesses for another one, opened and checked, and its share of the KV memory."""

    opened: _OpenedModel
    config: EngineConfig
    weight_bytes: int


def _open_draft_model(
    config: SpeculativeConfig, resolved: EngineConfig, target: _OpenedModel, progress: Progress
) -> tuple[EngineConfig, _DraftModel | None]:
    """The draft model, if there is one, and the target's config with what is left of the KV memory."""
    if config.model is None:
        return resolved, None
    opened = _open_model(config.model, progress, chats=False)
    if opened.model.vocab_size != target.model.vocab_size or not _same_tokens(opened, target):
        raise ConfigError("--speculative-config: the draft model has another vocabulary than the model")
    assert resolved.kv_cache_memory_bytes is not None
    assert resolved.max_model_len is not None
    own, theirs = (model_facts(one.model).kv_bytes_per_token(resolved.kv_cache_dtype) for one in (target, opened))
    memory = resolved.kv_cache_memory_bytes * theirs // (own + theirs)
    context = min(resolved.max_model_len, opened.model.max_position)
    draft = replace(resolved, model=config.model, kv_cache_memory_bytes=memory, max_model_len=context)
    left = resolved.kv_cache_memory_bytes - memory
    if min(left // own, memory // theirs) < resolved.max_model_len:
        raise ConfigError(
            "the KV cache is too small for two models; raise --kv-cache-memory-bytes or lower --max-model-len"
        )
    return replace(resolved, kv_cache_memory_bytes=left), _DraftModel(opened, draft, opened.checkpoint.num_bytes)


def _same_tokens(one: _OpenedModel, other: _OpenedModel) -> bool:
    first, second = (load_tokenizer(opened.checkpoint.tokenizer) for opened in (one, other))
    return len(first) == len(second) and all(first.id_to_token(i) == second.id_to_token(i) for i in range(len(first)))


def _make_speculator(config: SpeculativeConfig, draft: _DraftModel | None, weight_bytes: int) -> Speculator | None:
    from setpoint._native import RecurringText, TextFollower

    texts = Texts(RecurringText, TextFollower)
    drafters: list[Drafter] = []
    if config.method in ("auto", "suffix"):
        drafters += [SessionSuffix(texts), CorpusSuffix(texts)]
    if config.method == "prompt-lookup":
        drafters.append(PromptLookup())
    model = None
    if draft is not None:
        runner = _make_runner(draft.opened, draft.config)
        try:
            runner.wait_for_weights()
        except BaseException:
            runner.close()
            raise
        model = DraftModel(runner, runner.info, cost_share=min(draft.weight_bytes / max(weight_bytes, 1), 1.0))
    return Speculator(drafters, model) if drafters or model is not None else None


def _make_runner(opened: _OpenedModel, resolved: EngineConfig) -> CpuRunner:
    from setpoint.runtime.cpu.runner import CpuRunner

    assert resolved.max_model_len is not None
    assert resolved.num_threads is not None
    assert resolved.kv_cache_memory_bytes is not None
    return CpuRunner(
        opened.model,
        opened.checkpoint,
        dtype=resolved.dtype,
        kv_dtype=resolved.kv_cache_dtype,
        num_threads=resolved.num_threads,
        isa=resolved.isa,
        max_model_len=resolved.max_model_len,
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        kv_cache_memory_bytes=resolved.kv_cache_memory_bytes,
        weight_cache=weight_cache(resolved.weight_cache_bytes),
    )


def _lower_tiers(config: EngineConfig, runner: CpuRunner) -> LowerTiers | None:
    """What keeps KV blocks beside the pool. A disk that cannot be used is one warning. Raises ConfigError."""
    if not config.enable_prefix_caching or not (config.kv_host_bytes or config.kv_disk_path):
        return None
    from setpoint.engine.disk_store import DiskStore, open_directory
    from setpoint.engine.disk_tier import DiskTier
    from setpoint.engine.lower_tiers import LowerTiers

    disk, secret = None, None
    if config.kv_disk_path is not None:
        path = Path(config.kv_disk_path).expanduser()
        try:
            secret = open_directory(path)
        except OSError as error:
            log.warning("the KV cache is not kept on disk: %s", error.strerror)
        else:
            files = DiskStore(path, secret, runner.kv_fingerprint(), config.kv_disk_bytes)
            disk = DiskTier(files, [group.block_bytes for group in runner.info.kv_groups])
    return LowerTiers(runner.info, host_bytes=config.kv_host_bytes, disk=disk, secret=secret)


@dataclass(frozen=True, slots=True)
class Survey:
    """A model and a config, understood and not loaded: what an engine of them would be."""

    config: EngineConfig  # resolved
    info: RunnerInfo
    limits: SchedulerLimits
    weight_bytes: int  # of the files
    kv_token_bytes: int
    step_bytes: int  # that a step of the largest size works in
    available_bytes: int  # of memory, before any of this
    fingerprint: str  # of what the time of a step depends on, besides the machine


def survey(config: EngineConfig, *, progress: Progress = silent) -> Survey:
    """What `build_engine` would build. Raises what it would raise before it loads weights."""
    return _survey(_open_model(config.model, progress, chats=False), config)


def open_runner(
    config: EngineConfig, *, progress: Progress = silent, phase: Callable[[str], None] = lambda name: None
) -> tuple[CpuRunner, Survey]:
    """The backend alone, with its weights, for measurements. Whoever asks for it closes it."""
    phase("opening the model")
    opened = _open_model(config.model, progress, chats=False)
    surveyed = _survey(opened, config)
    phase("loading weights")
    runner = _make_runner(opened, surveyed.config)
    try:
        runner.wait_for_weights()
    except BaseException:
        runner.close()
        raise
    return runner, surveyed


def _step_fingerprint(opened: _OpenedModel, resolved: EngineConfig) -> str:
    """Of what the time of a step depends on, besides the machine."""
    from setpoint.runtime.cpu.runner import fingerprint

    of_model = fingerprint(opened.model, opened.checkpoint, resolved.dtype, resolved.kv_cache_dtype)
    parts = (__version__, of_model, resolved.num_threads, resolved.isa)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _survey(opened: _OpenedModel, config: EngineConfig) -> Survey:
    from setpoint.runtime.cpu.kv_layout import BLOCK_TOKENS, divide, group_shapes

    facts, machine = model_facts(opened.model, opened.checkpoint.num_bytes), this_machine()
    resolved, _ = resolve(config, machine, facts)
    assert resolved.max_model_len is not None
    assert resolved.kv_cache_memory_bytes is not None
    kv_dtype, budget = resolved.kv_cache_dtype, resolved.max_num_batched_tokens
    shapes = group_shapes(opened.model, kv_dtype, resolved.max_model_len, budget)
    groups = divide(shapes, resolved.kv_cache_memory_bytes, resolved.max_num_seqs)
    return Survey(
        config=resolved,
        info=RunnerInfo(opened.model.vocab_size, resolved.max_model_len, groups, BLOCK_TOKENS),
        limits=scheduler_limits(resolved),
        weight_bytes=opened.checkpoint.num_bytes,
        kv_token_bytes=facts.kv_bytes_per_token(kv_dtype),
        step_bytes=facts.step_bytes_per_token * budget,
        available_bytes=machine.available_memory_bytes,
        fingerprint=_step_fingerprint(opened, resolved),
    )


def require_chat_template(assembly: Assembly) -> ChatTemplate:
    if assembly.chat_template is None:
        raise RequestError(
            "this model has no chat template; use plain completions", param="messages", reason="not_supported"
        )
    return assembly.chat_template
