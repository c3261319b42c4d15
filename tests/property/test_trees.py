"""A tree in one pass: each token's logits are those of its path alone, and what is kept goes on as a chain."""

from __future__ import annotations

import random

import pytest
import torch

from specdec_engine.core.trees import depths
from specdec_engine.runtime import native
from tests.fakes import graph, lean, tiny_llama

FORMS = {
    "float32": lambda: lean(tiny_llama(layers=3)),
    "bfloat16": lambda: lean(tiny_llama(layers=3), dtype=torch.bfloat16),
    "packed": lambda: lean(tiny_llama(layers=3), quantize="int8", kernels=native.kernels()),
    "dense": lambda: lean(tiny_llama(layers=3), quantize="none", kernels=native.kernels()),
    "recorded": lambda: graph(tiny_llama(layers=3)),
}


def path_to(parents, place):
    return [] if place < 0 else [*path_to(parents, parents[place]), place]


def random_tree(dice, n):
    return tuple(dice.randrange(-1, i) if i else -1 for i in range(n))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("torchs", [False, True], ids=["own kernels", "torch"])
def test_a_trees_logits_are_those_of_its_paths(form, torchs, monkeypatch):
    ours = form in ("packed", "dense")
    if ours and (torchs or native.kernels() is None):
        pytest.skip("these run on our own kernels alone")
    if torchs:
        monkeypatch.setattr(native, "kernels", lambda: None)
    dice, runtime, alone = random.Random(4), FORMS[form](), FORMS[form]()
    runtime.tap((0, 2))
    alone.tap((0, 2))
    # Sums of torch's begin at other places in a tree; ours do not, so that a branch says to the letter what a chain says.
    close = dict.fromkeys(("rtol", "atol"), 0.0 if ours else {"bfloat16": 0.06}.get(form, 1e-4))
    context = [dice.randrange(200) for _ in range(dice.choice([20, 126]))]
    runtime.forward(torch.tensor(context[:-1]), 1)
    for n in (1, 2, 7, 12, 20, 62, 5, 5, 5):
        parents, tokens = random_tree(dice, n), [dice.randrange(200) for _ in range(n)]
        before = len(context) - 1
        logits = runtime.forward_tree(torch.tensor([context[-1], *tokens]), parents)
        places = dice.sample(range(-1, n), min(n + 1, 6))
        for place in places:
            text = [*context, *(tokens[i] for i in path_to(parents, place))]
            alone.rollback(0)
            expected = alone.forward(torch.tensor(text), 1)[0]
            assert torch.allclose(logits[place + 1].float(), expected.float(), **close)
        path = path_to(parents, dice.randrange(-1, n))
        runtime.keep(path)
        assert runtime.cached == before + 1 + len(path)
        context += [*(tokens[i] for i in path), dice.randrange(200)]
        alone.rollback(0)
        alone.forward(torch.tensor(context[:-1]), 1)
        assert torch.allclose(
            runtime.features(0, runtime.cached).float(), alone.features(0, alone.cached).float(), **close
        )
        assert max(depths(parents)) >= 1


def test_a_chain_as_a_tree_has_the_bits_of_the_chain():
    """So that where no side branch wins, trees say what chains say, to the letter."""
    for form in ("float32", "bfloat16"):
        runtimes = [FORMS[form](), FORMS[form]()]
        for runtime in runtimes:
            runtime.forward(torch.arange(5, 135), 1)
        tokens = torch.tensor([9, 4, 7, 7, 1])
        tree = runtimes[0].forward_tree(torch.cat([tokens, torch.tensor([50, 60])]), (-1, 0, 1, 2, -1, 0))
        assert torch.equal(tree[:5], runtimes[1].forward(tokens, 5))


def test_windows_and_caps_take_no_trees():
    """What a row sees is then told by places, and a tree's are not its positions."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for net in (
        MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=16)),
        Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)),
    ):
        assert not lean(net.eval()).trees
    assert lean(tiny_llama()).trees
