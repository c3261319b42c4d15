"""The way a GPU goes through a model, on a CPU: what it computes, and in how many kernels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specdec_engine.models.draft_files import head_weights, read_draft
from specdec_engine.runtime.blocks import _ops_for as ops_for
from specdec_engine.runtime.decoder import Decoder, Embedding
from specdec_engine.runtime.head import Features, HeadForward, head_shape
from specdec_engine.runtime.head_runtime import HeadRuntime
from specdec_engine.runtime.ops import TORCH
from specdec_engine.runtime.shape import shape_of
from tests.fakes import CPU, StateWeights, byte_tokenizer, lean, save_head_draft, tiny_llama
from tests.models.test_architectures import build

CONFIG = {"max_position_embeddings": 1024}


class Kernels(TorchDispatchMode):
    """Counts what computes something: views share their source's memory."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (list, tuple)) else out
        view = func.is_view and first.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
        self.counts[str(func)] += not view
        return out


def kernels_a_layer(n):
    """What a third layer adds."""
    counts = []
    for layers in (2, 3):
        runtime = lean(tiny_llama(layers=layers, **CONFIG), dtype=torch.bfloat16, ops=TORCH)
        cache, positions = runtime.decoder.new_cache(512), torch.arange(n) + 100
        with Kernels() as seen:
            runtime.decoder(torch.arange(n), positions, cache, 512, 1)
        counts.append(seen.counts)
    return counts[1] - counts[0]


@pytest.mark.parametrize(("n", "most"), [(1, 17), (5, 19), (200, 18)])
def test_a_layer_is_few_kernels(n, most):
    """Four matrices, attention, and as little as can be besides; oneDNN's own layout makes copies that a GPU does not."""
    counts = kernels_a_layer(n)
    counts -= Counter({"aten.cat.default": counts["aten.cat.default"]})
    assert counts.total() <= most, counts


@pytest.mark.parametrize("start", [None, 100], ids=["", "in order"])
@pytest.mark.parametrize("n", [1, 7, 16, 17, 150])
@pytest.mark.parametrize("window", [None, 40, 300])
def test_known_or_not_where_a_pass_begins_the_same_is_seen(n, start, window):
    """With a mask over a span that is wider than need be, or without any, on rows that are grouped by keys or not."""
    model = build("MistralConfig", {"sliding_window": window})
    tokens = torch.randint(0, 97, (100 + n,), generator=torch.Generator().manual_seed(n))
    decoder = Decoder(shape_of(model.config), StateWeights(model), torch.float32, CPU, "none", TORCH)
    cache = decoder.new_cache(300)
    for at, begin in ((slice(0, 100), 0), (slice(100, 100 + n), start)):
        positions = torch.arange(100 + n)[at]
        logits = decoder(tokens[at], positions, cache, 256 if begin is None else 300, n, None, begin)
    with torch.inference_mode():
        expected = model(tokens[None], use_cache=False).logits[0, -n:]
    assert torch.allclose(logits, expected, atol=1e-3)


def test_without_a_card_or_a_compiler_torchs_operations_do_as_well():
    found = ops_for(shape_of(tiny_llama().config), torch.bfloat16, torch.device("cuda"))
    assert found.remark.startswith("our own kernels do not run here: ")
    assert replace(found, remark="") == TORCH


def test_a_head_drafts_on_a_gpu_as_on_a_cpu(tmp_path):
    model = tiny_llama()
    draft = read_draft(save_head_draft(tmp_path / "head", model, byte_tokenizer()))
    table = model.get_output_embeddings().weight.detach()
    embedding = Embedding(model.get_input_embeddings().weight.detach())
    said = []
    for ops in (None, TORCH):
        args = (
            head_shape(draft.config),
            head_weights(draft),
            embedding,
            table[draft.ids],
            torch.float32,
            CPU,
            "none",
            ops,
        )
        forward = HeadForward(*args)
        runtime = HeadRuntime(forward, 16)
        features = torch.randn(30, 2, 32, generator=torch.Generator().manual_seed(0))
        runtime.forward(features[:25], torch.arange(25))
        with torch.inference_mode():
            said.append(runtime._step(Features(features[25:]), torch.arange(25, 30)))
    for mine, theirs in zip(*said, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)
