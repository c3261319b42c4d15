"""Where models go and what they will take there, on machines with GPUs, whose facts are made up."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from torch.nn.attention.bias import CausalBias
from transformers import LlamaConfig

from specdec_engine.adaptive.limits import DraftLimits
from specdec_engine.core.transfer import upload
from specdec_engine.drafters import build_drafter
from specdec_engine.errors import OutOfMemory, UsageError
from specdec_engine.models import loading, placement
from specdec_engine.models.loading import find_model
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import _verifier
from specdec_engine.runtime.arithmetic import Matrices, choose
from specdec_engine.runtime.attention import causal_of
from specdec_engine.runtime.decoder import Decoder
from specdec_engine.runtime.graphs import room_for
from specdec_engine.runtime.ops import TORCH
from specdec_engine.runtime.shape import Unsupported, shape_of
from specdec_engine.runtime.weights import Entry
from specdec_engine.system import devices
from specdec_engine.system.devices import idle_gpu, pick_device
from specdec_engine.system.memory import ran_out
from specdec_engine.verify.rules import RULES
from tests.fakes import VOCAB, StateWeights, byte_tokenizer, host, lean, save_head_draft, tiny_llama
from tests.tape import TapeRecorder

CUDA, META = torch.device("cuda:0"), torch.device("meta")


@pytest.mark.parametrize("quantize", ["auto", "light", "none"])
def test_a_gguf_on_a_gpu_is_reckoned_dense(quantize):
    """As it is kept there: packed it would take a third."""
    config, size = LlamaConfig(), (4096, 4096)
    entry = Entry("Q4_0", size, 0, prod(size) // 32 * 18)
    found = {f"model.layers.{i}.mlp.up_proj.weight": entry for i in range(10)}
    options = LoadOptions(quantize=quantize)
    arithmetic = choose(Matrices(1, 1, packed=True, lean=True), "bfloat16", quantize, CUDA)
    need = placement.need_of(Path("x.gguf"), found, config, shape_of(config), arithmetic, CUDA, options, str)
    assert need.weights == 10 * prod(size) * 2


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("runs", ["lean", "generic"])
def test_no_cache_is_reckoned_longer_than_the_model_reads(device, runs):
    """`-n 999999` was refused for 24 GiB of cache, of a model that reads 8,192 tokens."""
    config = LlamaConfig(max_position_embeddings=64, num_hidden_layers=2)
    found = {"model.norm.weight": Entry("F32", (4096,), 0, 4 * 4096)}
    arithmetic = choose(Matrices(1, 1, packed=False, lean=True), "float32", "none", torch.device(device))
    shape = shape_of(config) if runs == "lean" else Unsupported("it is not ours")
    caches = [
        placement.need_of(
            Path("x.gguf"), found, config, shape, arithmetic, torch.device(device), LoadOptions(tokens=tokens), str
        ).cache
        for tokens in (64, 65, 10**6)
    ]
    assert caches[0] == caches[1] == caches[2] > 0


def test_a_tied_head_on_a_gpu_is_the_table_of_embeddings():
    """Stored in float32 and computed in bfloat16, they were two tensors."""
    model = tiny_llama(tie_word_embeddings=True)
    decoder = Decoder(shape_of(model.config), StateWeights(model), torch.bfloat16, META, "none")
    assert decoder.embedding.table.dtype == torch.bfloat16
    assert decoder.head._weight is decoder.embedding.table


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_head_is_not_packed_for_a_gpu(tmp_path, form):
    """It was, and its first draft ended in a RuntimeError. Of the target only what the refusal reads is there."""
    target = lean(tiny_llama(), dtype=torch.bfloat16)
    folder = save_head_draft(tmp_path / "head", tiny_llama(), byte_tokenizer())
    about = host(VOCAB, target=lambda: target, tokenizer=byte_tokenizer(), draft_quantize=form)
    with pytest.raises(UsageError, match=f"cannot be packed to {form} on cuda:0 in dtype bfloat16"):
        build_drafter(f"head:{folder}", replace(about, device=CUDA))


def test_memory_that_runs_out_is_recognised_by_type_and_by_words():
    failure = getattr(torch, "AcceleratorError", RuntimeError)
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        failure("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999999999 bytes"),
    ):
        assert ran_out(error)
    assert not ran_out(failure("CUDA error: an illegal memory access was encountered"))
    assert not ran_out(ValueError("out of memory"))


def test_a_gpus_own_words_for_too_little_memory_end_a_load_cleanly(checkpoint, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(loading, "Decoder", refuse)
    with pytest.raises(OutOfMemory, match="out of memory while loading"):
        find_model(str(checkpoint), LoadOptions()).load()


def test_auto_tries_a_card_before_it_takes_it(monkeypatch):
    """A card that this torch has no kernels for is listed as any other, and allocates as any other."""

    def compute(device):
        if device.type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nhow to debug it")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_compute", compute)
    assert pick_device("auto") == torch.device("cpu")
    assert idle_gpu(pick_device("auto")).endswith("no kernel image is available for execution on the device")
    with pytest.raises(UsageError, match="'cuda' cannot be used here"):
        pick_device("cuda")
    monkeypatch.setattr(devices, "_compute", lambda device: None)
    assert pick_device("auto") == torch.device("cuda")
    assert idle_gpu(torch.device("cuda")) is idle_gpu(torch.device("cpu")) is None


def test_a_target_is_placed_beside_its_draft(checkpoint, monkeypatch):
    """It fits one of two cards as long as its draft is not there: then it goes over both, and not onto the full one."""
    found = find_model(str(checkpoint), LoadOptions(dtype="float32"))
    placed = list[object]()
    monkeypatch.setattr(loading.Candidate, "_lean", lambda self, shape: placed.append(self.device))
    monkeypatch.setattr(loading.Candidate, "_generic", lambda self, placement, why: placed.append((placement, why)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for taken in (0, 1):
        monkeypatch.setattr(placement, "free_bytes", lambda device, taken=taken: found.need.total - taken)
        replace(found, device=CUDA).load()
    assert placed == [CUDA, ("auto", "it is spread over devices")]


def test_a_target_is_recorded_apart_from_its_judges_and_with_room_for_the_run(checkpoint, monkeypatch):
    """A cache that grows drops its owner's recordings, and a run of the usual length makes none grow."""
    monkeypatch.setattr(loading, "CudaRecorder", lambda device: TapeRecorder())
    candidate = find_model(str(checkpoint), LoadOptions(dtype="float32", tokens=300))
    decoder = Decoder(candidate.shape, candidate._weights(), torch.float32, torch.device("cpu"), "none", TORCH)
    runtime, why = candidate._graphs(decoder)
    assert why == ""
    assert runtime.capacity == room_for(300, runtime.limit)
    assert _verifier(RULES["token"], runtime)._recorder is not runtime.recorder


class Elsewhere:
    """A tensor that is to be copied, and how."""

    nbytes = 8

    def to(self, device, non_blocking=False):
        return non_blocking

    def pin_memory(self):
        return self


def test_only_cuda_copies_while_the_host_goes_on():
    """Apple's GPUs read the host's memory later, whoever has it by then."""
    assert [upload(Elsewhere(), torch.device(kind)) for kind in ("cpu", "mps", "cuda")] == [False, False, True]


def test_a_draft_on_a_gpu_is_not_looked_at_token_by_token():
    limits = DraftLimits()
    limits.controller = FakeController()
    assert limits.early_stop_on(torch.device("cpu"), "small") is not None
    assert limits.early_stop_on(CUDA, "small") is None


class FakeController:
    def early_stop(self, source):
        return lambda sure: False


def test_rows_in_order_need_no_mask_and_others_one_each():
    """8k rows of a prompt need none of 128 MB, and cuDNN may know no plan for a row that is spread over several."""
    decoder = lean(tiny_llama(max_position_embeddings=1024), ops=TORCH).decoder
    cache, positions = decoder.new_cache(512), torch.arange(40)
    assert decoder.begin(positions, cache, 512, start=0)._masks == {}
    assert isinstance(causal_of(40, 140, CUDA), CausalBias)
    (mask,) = decoder.begin(positions[:4], cache, 512)._masks.values()
    assert mask.shape[0] == 4 * 2  # heads that share keys
    assert mask.stride(0) != 0
