"""An assistant of Gemma 4 on its target: a small model that attends to the target's own keys and values.

A step takes the embedding of the newest token and the state before it, first the target's and then its own. It has no cache,
and reads nothing again: its queries look at what two layers of the target keep, from one position, that of the newest token
which the run has (transformers, `SinglePositionMultiTokenCandidateGenerator`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec_engine.core.transfer import upload
from specdec_engine.runtime import DraftTokens, SampledToken, StopDrafting, TokenSampler
from specdec_engine.runtime.context_limit import kv_size, layer_configs
from specdec_engine.runtime.generic import GenericRuntime
from specdec_engine.runtime.shape import Unsupported


class Assistant:
    """The model beside its target's runtime."""

    def __init__(self, model: Any, target: GenericRuntime) -> None:
        """Raises Unsupported for a target that has no such layers as it reads."""
        self.model, self._target = model, target
        self._states, self._kept = target.keep_last(), target.keys_and_values
        self._layers = layers_read(model.config.get_text_config(), target.model.config.get_text_config())
        self._embed = target.model.get_input_embeddings()

    def another(self, target: GenericRuntime) -> Assistant:
        """The same model beside another cache of its target."""
        return Assistant(self.model, target)

    def ready(self, length: int) -> bool:
        """Say whether a draft can follow a text of so many tokens, all of which the target has read but for the newest."""
        return 1 < length <= self._target.cached + 1

    @torch.inference_mode()
    def unroll(
        self, newest: int, length: int, u: Tensor, temperature: Tensor, sampler: TokenSampler, stop: StopDrafting | None
    ) -> DraftTokens:
        """Draft as `Runtime.unroll` does, after the newest token of a text of so many; see `ready`."""
        device = self._target.device
        state, token = self._states.between(length - 2, length - 1), upload(torch.tensor([newest]), device)
        read = {kind: self._kept.of_layer(layer, length - 1) for kind, layer in self._layers.items()}
        position = upload(torch.tensor([[length - 1]]), device)
        sampled = list[SampledToken]()
        for number in u:
            embedded = self._embed(token)[None]
            found = self.model(
                inputs_embeds=torch.cat([embedded, state[None].to(embedded.device)], -1),
                position_ids=position,
                shared_kv_states=read,
            )
            state = found.last_hidden_state[0]
            sampled.append(sampler(found.logits[0], number, temperature))
            token = sampled[-1].token
            if stop is not None and stop(sampled[-1].sure):
                break
        return DraftTokens.of(sampled, [one.token for one in sampled])


def layers_read(ours: Any, target: Any) -> dict[str, int]:
    """Find for each kind of attention the target's last layer that keeps keys and values of its own, by the two text configs.
    Raises Unsupported where there is none, and where its heads are not those that the assistant reads."""
    own = int(target.num_hidden_layers) - int(getattr(target, "num_kv_shared_layers", 0) or 0)
    kinds, found = list(getattr(target, "layer_types", None) or ())[:own], dict[str, int]()
    for kind, layer in zip(ours.layer_types, layer_configs(ours), strict=True):
        said = kind.replace("_", " ")
        if kind not in kinds:
            raise Unsupported(f"the target has no layers of {said}")
        found[kind] = own - 1 - kinds[::-1].index(kind)
        (heads, size), read = kv_size(layer_configs(target)[found[kind]]), kv_size(layer)
        if (heads, size) != read:
            raise Unsupported(
                f"the target's {said} keeps {heads} heads of {size} numbers, and it reads {read[0]} of {read[1]}"
            )
    return found
