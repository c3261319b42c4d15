"""An assistant of Gemma 4 as drafter: it drafts from what the target computed on the way, and is drawn like any model.

transformers takes the likeliest token of each step and says that it drew it, which biases what is sampled. Here a token is
drawn from the very distribution that the rule is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from specdec_engine.core.cycle_types import Draft, Sampling, Verdict
from specdec_engine.core.randomness import Randomness
from specdec_engine.core.transfer import upload
from specdec_engine.drafters.base import DraftSetup, ModelInfo, empty_draft
from specdec_engine.drafters.token_choice import DraftChoice, TextSampler, draft_numbers, masked
from specdec_engine.errors import PairIncompatible, UsageError, first_line
from specdec_engine.models.assistant_files import load_assistant
from specdec_engine.models.draft_files import read_draft
from specdec_engine.runtime import Runtime
from specdec_engine.runtime.assistant import Assistant
from specdec_engine.runtime.generic import GenericRuntime
from specdec_engine.system.memory import ran_out


class AssistantDrafter:
    """An assistant on a target that runs on transformers' forward."""

    def __init__(self, assistant: Assistant, setup: DraftSetup, name: str) -> None:
        self.name = name
        self._assistant, self._setup = assistant, setup

    def another(self, target: Runtime) -> AssistantDrafter:
        """See `Repeatable`."""
        assert isinstance(target, GenericRuntime)
        return AssistantDrafter(self._assistant.another(target), self._setup, self.name)

    def begin(self, prompt: Sequence[int]) -> None:
        """Do nothing: it keeps nothing of a text."""

    def propose(self, context: Sequence[int], k: int, sampling: Sampling, random: Randomness) -> Draft:
        """Draft as `Drafter.propose` says; nothing where the target's state of the token before the newest is not kept: after
        a single token, and far back in a text."""
        device = self._setup.device
        if not self._assistant.ready(len(context)):
            return empty_draft(device, self.name)
        u, temperature = draft_numbers(random, sampling, len(context), k, self._setup.vocab, device)
        stop = self._setup.draft_limits.early_stop_on(device, self.name)
        choice = DraftChoice(sampling, self._setup.vocab, device.type == "cpu", confident=stop is not None)
        with masked(choice, self._setup.grammar, device) as sampler:
            drawn = self._assistant.unroll(context[-1], len(context), u, temperature, sampler, stop)
        return Draft(drawn.tokens, drawn.rows, self.name, drawn.raw)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Do nothing: nothing of a draft is kept."""

    def acceptance_along(
        self, context: Sequence[int], p: Sequence[float], k: int, sampling: Sampling
    ) -> list[list[float]]:
        """See `AcceptanceAlong`; at each place as far as the text goes."""
        begin, rows = len(context) - len(p), list[list[float]]()
        for at in range(begin, len(context)):
            said = TextSampler(context[at : at + k], p[at - begin :], sampling)
            if self._assistant.ready(at):
                steps = torch.zeros(min(k, len(context) - at), device=self._setup.device)
                self._assistant.unroll(context[at - 1], at, steps, steps[0], said, said.stop)
            rows.append(said.chances)
        return rows


def build(argument: str, setup: DraftSetup) -> AssistantDrafter:
    """`assistant:NAME`: a folder or a hub id. Raises PairIncompatible for another target than it was made for."""
    path = setup.find(argument)
    draft = read_draft(path)
    if draft is None or draft.kind != "assistant":
        raise UsageError(f"{path} holds no assistant of Gemma 4", "give another model by its name alone")
    draft.check(setup.tokenizer, setup.name, setup.vocab)
    if setup.draft_quantize in ("int8", "int4"):
        raise UsageError(
            f"the assistant {argument} cannot be packed: it runs on transformers' forward", "leave out --draft-quantize"
        )
    model, target = (
        load_assistant(draft),
        setup.target(),
    )  # the smaller first: its damage costs no large model's loading
    if not isinstance(target, GenericRuntime):
        raise PairIncompatible(
            f"an assistant of Gemma 4 needs the generic runtime, and the target runs on {target.name}",
            "add --runtime generic, or choose another draft",
        )
    draft.check_width(int(target.model.config.get_text_config().hidden_size))
    assistant = _tried(
        model.to(setup.device, target.model.dtype), target, f"the assistant {argument} does not fit {setup.name}"
    )
    setup.models[argument] = ModelInfo(
        name=argument,
        model_type=draft.config["model_type"],
        parameters=model.num_parameters(),
        vocab=setup.vocab,
        context=target.limit,
        runtime=target.name,
        dtype=str(model.dtype).removeprefix("torch."),
        weights=str(model.dtype).removeprefix("torch."),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        token_bytes=0,
    )
    return AssistantDrafter(assistant, setup, argument)


def _tried(model: Any, target: GenericRuntime, what: str) -> Assistant:
    """Draft a token after two: what does not go together is found out before a run. Raises PairIncompatible."""
    try:
        assistant = Assistant(model, target)
        target.rollback(0)
        target.forward(upload(torch.tensor([1, 2]), target.device) % target.vocab, 1)
        number = torch.zeros(1, device=target.device)
        assistant.unroll(1, 3, number, number[0], DraftChoice(Sampling(), target.vocab, confident=False), None)
        target.rollback(0)
    except Exception as error:  # in as many ways as there are lines in a stranger's forward
        if ran_out(error):
            raise
        raise PairIncompatible(f"{what}: {first_line(error)}", "choose the target that it was made for") from error
    return assistant
