"""A target and a drafter, loaded together and ready to decode: the library's front door."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal

import torch

from specdec_engine.adaptive.controller import AutoK
from specdec_engine.adaptive.limits import DraftLimits
from specdec_engine.batch.best_k import BestK
from specdec_engine.batch.together import Begin, Lane, decode_together
from specdec_engine.conditions import environment_of, info_of, machine_notes, now_on, remarks_on, target_notes
from specdec_engine.constrain.matching import Matching
from specdec_engine.constrain.wanted import Grammar
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.randomness import KeyedRandomness
from specdec_engine.decoding.control import Controls
from specdec_engine.decoding.following import followed, followed_together
from specdec_engine.decoding.loop import Run, decode, forget, start
from specdec_engine.decoding.stopping import Stop
from specdec_engine.drafters import build_drafter
from specdec_engine.drafters.base import Drafter, DraftSetup, LoadedDraft, RunGrammar, another
from specdec_engine.errors import PairIncompatible, UsageError
from specdec_engine.models.chat import Turn, chat_ids, raw_ids, special_in, stop_id, turn_ids
from specdec_engine.models.draft_files import found_draft, read_draft
from specdec_engine.models.kinds import mask_of
from specdec_engine.models.loading import Candidate, Loaded, find_model
from specdec_engine.models.options import LoadOptions
from specdec_engine.models.translation import translation_for
from specdec_engine.record.events import Event, Started
from specdec_engine.runtime import Runtime
from specdec_engine.runtime.arithmetic import most_threads
from specdec_engine.runtime.graphs import GraphRuntime
from specdec_engine.runtime.shape import Shape
from specdec_engine.runtime.target import ModelTarget
from specdec_engine.system.devices import pick_device
from specdec_engine.system.machine import usable_cores
from specdec_engine.system.threads import FollowedThreads, initial_threads, set_threads, use_fewer_threads
from specdec_engine.verify.processors import Asked, changed
from specdec_engine.verify.rules import RULES, AcceptanceRule, SyntheticRule
from specdec_engine.verify.verifier import Verifier, verifier_for


@dataclass(frozen=True, slots=True)
class Pair:
    """A loaded pair. Decoding keeps its state in the pair's two caches, so one run at a time."""

    target: ModelTarget
    drafter: Drafter
    verifiers: Mapping[str, Verifier]
    """By rule."""
    auto: AutoK
    draft_limits: DraftLimits
    tokenizer: Any
    stop_ids: frozenset[int]
    asked: Asked
    """What the target's generation config does to logits; part of its distribution here."""
    environment: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())
    """What a user should know about this pair, in sentences."""
    run_grammar: RunGrammar = field(default_factory=RunGrammar)
    """What drafters see of the run's grammar."""
    remarks: tuple[str, ...] = field(default=())
    """What a curious user may want to know: which runtimes were taken, and why not a faster one."""

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(
        self,
        prompt: str,
        *,
        chat: bool | None = None,
        system: str | None = None,
        history: Sequence[tuple[str, str]] = (),
        template: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt's token ids; as a user's turn where the tokenizer has a chat template, unless `chat` is False. history:
        the turns before it, user and assistant; without a template they come as they are. template: what the chat template
        is told beside them, for example {"enable_thinking": False}.

        Raises UsageError for an empty prompt, and for a chat, a system prompt or a `template` without a chat template.
        """
        if not prompt.strip():
            raise UsageError("the prompt is empty", 'for example: specdec generate "Explain how a lighthouse works."')
        chat = self.has_chat_template if chat is None else chat
        if not self.has_chat_template and (chat or system):
            raise UsageError("this tokenizer has no chat template", "use --raw, and no --system")
        if system and not chat:
            raise UsageError("a system prompt needs the chat template", "leave out --raw or --system")
        if template and not chat:
            raise UsageError("what a chat template is told needs one", "leave out --raw, or what it is told")
        if chat:
            return chat_ids(self.tokenizer, prompt, system, history, template)
        whole = "\n\n".join([*(text for turn in history for text in turn), prompt])
        return raw_ids(self.tokenizer, whole)

    def encode_turns(self, turns: Sequence[Turn], template: Mapping[str, Any] | None = None) -> list[int]:
        """A conversation's token ids, its last turn the user's; see `models.chat.turn_ids`. Raises UsageError without a chat
        template, and for one that fails or leaves words out."""
        if not self.has_chat_template:
            raise UsageError("this tokenizer has no chat template", "specdec generate goes on with a text")
        return turn_ids(self.tokenizer, turns, template)

    def marks_in(self, prompt: str, chat: bool | None = None) -> str:
        """What a user should know of the special tokens typed into a prompt, in a sentence; empty for none."""
        typed = [m for m in special_in(self.tokenizer, prompt) if m != getattr(self.tokenizer, "bos_token", None)]
        chat = self.has_chat_template if chat is None else chat
        how = "as text, as the prompt has them" if chat else "as the marks that they are"
        return f"special tokens in the prompt ({', '.join(typed)}) are sent {how}" if typed else ""

    def controls(
        self,
        k: int | Literal["auto"] = "auto",
        sampling: Sampling | None = None,
        draft_temperature: float | None = None,
    ) -> Controls:
        """For the next `decode`; with `auto`, k follows what the pair's runs have shown."""
        return Controls(self.auto if k == "auto" else k, sampling, draft_temperature)

    def asking(
        self,
        *,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        min_tokens: int = 0,
        ignore_eos: bool = False,
    ) -> Pair:
        """The same with penalties of one's own in the place of its config's; they are part of the target's distribution, and
        every rule stays lossless. ignore_eos: an end token ends no run. Raises UsageError for values out of bounds."""
        names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        named = zip(names, (repetition_penalty, presence_penalty, frequency_penalty), strict=True)
        vocab = self.target.runtime.vocab
        asked = changed(self.asked, {n: v for n, v in named if v is not None}, logit_bias or {}, vocab)
        if min_tokens:
            asked = replace(asked, min_new_tokens=min_tokens, ends=tuple(i for i in self.stop_ids if i < vocab))
        stop_ids = frozenset[int]() if ignore_eos else self.stop_ids
        return replace(self, asked=asked, stop_ids=stop_ids)

    def synthetic(self, chance: float) -> Pair:
        """The same with a rule, `synthetic`, that accepts at this chance; what it emits is not the target's."""
        verifier = _verifier(SyntheticRule(chance), self.target.runtime)
        return replace(self, verifiers={**self.verifiers, "synthetic": verifier})

    def forget(self) -> None:
        """Have the next run read all of its prompt, also what it has in common with the last one's text."""
        forget(self.target, self.drafter)

    def decode(
        self,
        prompt: Sequence[int],
        *,
        k: int | Literal["auto"] = "auto",
        sampling: Sampling | None = None,
        rule: str = "token",
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        seed: int | None = None,
        controls: Controls | None = None,
        grammar: Grammar | None = None,
    ) -> Iterator[Event]:
        """The events of one run (`specdec_engine.decoding.loop.decode`). Without a seed a fresh one is drawn; Started has it.
        What the prompt has in common with the last run's text, from the first token on, is not read again.

        `controls` takes the place of k and sampling for a caller that turns them while the run goes on. grammar: what the
        answer follows (`specdec_engine.constrain.wanted`). Raises UsageError where this target cannot follow it.
        """
        if rule not in self.verifiers:
            raise UsageError(f"the rule {rule!r} is not known", f"one of {', '.join(self.verifiers)}")
        seed = secrets.randbits(32) if seed is None else seed
        if controls is None:
            controls = self.controls(k, sampling)
        matching = self.run_grammar.matching = None if grammar is None else self.matching(grammar)
        self.draft_limits.controller = controls.auto
        # Always: it may be switched on in the middle of the run.
        self.auto.begin(seed, tokenwise=rule == "token", context=len(prompt))
        if controls.auto is not None:
            controls.adapt(controls.auto)  # k as it is now: what an earlier run with this seed has taught is forgotten
        events = decode(
            self.target,
            self.drafter,
            prompt,
            controls=controls,
            stop=self._stop(max_tokens, stop),
            asked=self.asked,
            random=KeyedRandomness(seed),
            verifier=self.verifiers[rule],
            tokenizer=self.tokenizer,
            environment=now_on(self.environment),
            grammar=matching,
        )
        return events if self.target.followed is None else followed(events, self.target.followed)

    def _stop(self, max_tokens: int, stop: Sequence[str]) -> Stop:
        marks = {text: i for text in stop if (i := stop_id(self.tokenizer, text)) is not None}
        strings = tuple(text for text in dict.fromkeys(stop) if text not in marks)
        return Stop(max_tokens, self.stop_ids | set(marks.values()), strings, tuple(marks))

    def decode_together(
        self,
        prompts: Iterable[Callable[[], Sequence[int]]],
        batch: int,
        *,
        k: int | Literal["auto"] = "auto",
        sampling: Sampling | None = None,
        rule: str = "token",
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        seeds: Sequence[int],
        grammar: Grammar | None = None,
    ) -> Iterator[tuple[int, Event]]:
        """The events of one run for each prompt, with its number, up to `batch` of them in one pass of the target
        (`specdec_engine.batch.together`). Alone, with its own seed of `seeds` and the same k, each says the same, but for
        rounding.

        prompts: each gives its ids when its turn comes. A prompt that cannot be run is Failed, and the others go on. With k
        `auto` the number of drafted tokens is what is fastest for so many texts. Raises UsageError for a draft that there is
        only once, and OutOfMemory.
        """
        if rule not in self.verifiers:
            raise UsageError(f"the rule {rule!r} is not known", f"one of {', '.join(self.verifiers)}")
        ends, controlled = self._stop(max_tokens, stop), Controls(3 if k == "auto" else k, sampling)
        lanes = self._lanes(batch, controlled.settings.k, sampling)
        self.draft_limits.controller = self.run_grammar.matching = None

        def beginning(number: int, ids: Callable[[], Sequence[int]]) -> Begin:
            def begin(lane: Lane) -> tuple[Run, Started]:
                return start(
                    lane.target,
                    lane.drafter,
                    ids(),
                    controls=lane.controls,
                    stop=ends,
                    random=KeyedRandomness(seeds[number]),
                    verifier=self.verifiers[rule],
                    tokenizer=self.tokenizer,
                    environment=now_on(self.environment),
                    asked=self.asked,
                    grammar=None if grammar is None else self.matching(grammar),
                )

            return begin

        begins = (beginning(number, ids) for number, ids in enumerate(prompts))
        events = decode_together(lanes, begins, BestK() if k == "auto" else k)
        return events if self.target.followed is None else followed_together(events, self.target.followed)

    def _lanes(self, batch: int, k: int, sampling: Sampling | None) -> list[Lane]:
        """The first is the pair itself."""
        lanes = [Lane(self.target, self.drafter, Controls(k, sampling))]
        for _ in range(batch - 1):
            runtime = self.target.runtime.another()
            drafter = another(self.drafter, runtime)
            target = ModelTarget(runtime, self.target.name, self.target.followed)
            lanes.append(Lane(target, drafter, Controls(k, sampling)))
        return lanes

    def matching(self, grammar: Grammar) -> Matching:
        """A text that has yet to begin. Raises UsageError where this target cannot follow the grammar."""
        return Matching(grammar, self.tokenizer, self.target.runtime.vocab, self.stop_ids, self.target.device)


def load_pair(target: str = "builtin", draft: str | None = None, options: LoadOptions | None = None) -> Pair:
    """Load a target and a drafter by name.

    target: `builtin`, a folder, a `.gguf` file or a hub id. draft: the same, or `ngram`, `none`, or several joined by
    commas (`drafters.build_drafter`); None for the best of those that need not be named. Raises the errors of
    `find_model`, and PairIncompatible where tokenizers differ.
    """
    return Loader(target, options).pair(draft)


class Loader:
    """Pairs of one target; they share its weights, its cache, and those of drafts that they have in common, so they take
    turns. All models are checked before any weights are loaded."""

    def __init__(self, target: str, options: LoadOptions | None = None) -> None:
        """Raises the errors of `find_model`."""
        self.options = options or LoadOptions()
        set_threads(self.options.threads, pick_device(self.options.device))  # first: forms are measured on so many
        self.found = find_model(target, self.options)
        if self.options.threads in ("auto", "follow"):
            use_fewer_threads(self.found.arithmetic.threads)
        if read_draft(self.found.path) is not None:
            raise UsageError(f"{target} is a draft, made for another target", "give it to --draft")
        self.target = cache(self.found.load)
        self.find_draft = cache(lambda name: find_model(name, self.options.for_draft()))
        self.draft = cache(lambda name: self.find_draft(name).load())

    @cached_property
    def followed(self) -> FollowedThreads | None:
        """Threads of all pairs, where they are to be followed and the target's bits do not hang on them."""
        if self.options.threads != "follow" or self.found.device.type != "cpu" or self.target().kernels != "own":
            return None
        crowded = initial_threads() < usable_cores()
        return FollowedThreads(max(torch.get_num_threads(), most_threads()) if crowded else torch.get_num_threads())

    def check_drafts(self) -> None:
        """Look whether the target can test drafts at all. Raises PairIncompatible."""
        if self.found.plain_only:
            raise PairIncompatible(
                self.found.plain_only, f"specdec generate -t {self.found.name} --draft none decodes it"
            )

    def pair(self, draft: str | None = None) -> Pair:
        """As `load_pair` makes it."""
        return _paired(self, draft)


def _paired(models: Loader, draft: str | None) -> Pair:
    found, target = models.found, models.found.name
    drafts = dict[str, Loaded]()
    notes = [*machine_notes(models.options.threads, models.options.device, models.found.device)]
    if draft is None and found.plain_only:
        notes.append(f"decoded without a draft: {found.plain_only}")
    draft = _default_draft(found) if draft is None else draft
    if draft != "none":
        models.check_drafts()

    def load_draft(name: str) -> LoadedDraft:
        small = models.find_draft(name)
        if small.plain_only:
            raise PairIncompatible(small.plain_only, "choose another draft")
        made = read_draft(small.path)
        if made is not None:
            made.check(found.tokenizer, target, found.vocab)
        translation, note = (None, "") if made is not None else translation_for(found, small)
        notes.extend(filter(None, [note]))
        drafts[name] = models.draft(name)
        setup.models[name] = replace(info_of(drafts[name]), by_text=translation is not None)
        return LoadedDraft(
            drafts[name].runtime, None if made is None else made.ids, translation, mask_of(small.config, name)
        )

    setup = DraftSetup(
        name=target,
        tokenizer=found.tokenizer,
        vocab=found.vocab,
        device=found.device,
        load_draft=load_draft,
        target=lambda: models.target().runtime,
        output_rows=found.output_rows,
        draft_quantize=models.options.draft_quantize,
        find=lambda name: found_draft(name, models.options),
        checkpoint=found.path,
        notes=notes,
    )
    # The drafter first: what is wrong with it comes out before the larger model's weights are read.
    drafter = build_drafter(draft, setup)
    loaded = models.target()
    if loaded.runtime.vocab != found.vocab:
        raise PairIncompatible(
            f"{target} has {loaded.runtime.vocab} logits where its config says {found.vocab}", "choose another target"
        )
    for model in (loaded, *drafts.values()):
        made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if model.runtime.limit != made_for:
            notes.append(
                f"{model.name} is used up to {model.runtime.limit} tokens: beyond that, LongRoPE changes all positions"
            )
    notes += target_notes(loaded, draft)
    return Pair(
        target=ModelTarget(loaded.runtime, target, models.followed),
        drafter=drafter,
        verifiers={name: _verifier(rule, loaded.runtime) for name, rule in RULES.items()},
        auto=AutoK(),
        draft_limits=setup.draft_limits,
        run_grammar=setup.grammar,
        tokenizer=loaded.tokenizer,
        stop_ids=loaded.stop_ids,
        asked=loaded.asked,
        environment=environment_of(loaded, setup.models),
        notes=tuple(notes),
        remarks=remarks_on(loaded, setup.models, drafts),
    )


def _verifier(rule: AcceptanceRule, target: Runtime) -> Verifier:
    """Recorded where the target is; apart from it, which forgets its recordings when its cache grows."""
    return verifier_for(rule, target.device, target.recorder.another() if isinstance(target, GraphRuntime) else None)


def _default_draft(target: Candidate) -> str:
    """A lookup, which fits every target that can go back; behind it, for the built-in one, the head that was made for it
    (`benchmarks/README.md` compares them), where the target runs on our own forward."""
    if target.plain_only:
        return "none"
    return "ngram,builtin" if target.name == "builtin" and isinstance(target.shape, Shape) else "ngram"
