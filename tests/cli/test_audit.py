"""The audit finds what is biased, and passes what is not."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from specdec_engine.audit.run import Audit, audit, audit_two, sentence
from specdec_engine.audit.sources import Said
from specdec_engine.audit.statistics import Cells, combined, p_value, p_value_of_two, power_of, tail, toward
from specdec_engine.verify import rules
from tests.fakes import byte_tokenizer
from tests.gemma import save_assistant, tiny_gemma

P = np.array([0.4, 0.3, 0.15, 0.1, 0.05])


@pytest.mark.parametrize(("x", "freedom"), [(0.0, 3), (1.5, 1), (11.0, 4), (80.0, 20)])
def test_the_tail_is_chi_squareds(x, freedom):
    assert tail(x, freedom) == pytest.approx(stats.chi2.sf(x, freedom), rel=1e-9)


def test_of_sound_draws_p_values_are_spread_evenly():
    """A p-value below 0.05 comes one time in twenty, and Fisher's of four of them too."""
    chance = np.random.default_rng(1)
    cells = Cells.of(P, 300)
    one = [p_value(chance.multinomial(300, cells.p), cells.p) for _ in range(2000)]
    four = [combined(one[i : i + 4]) for i in range(0, 2000, 4)]
    two = [p_value_of_two(chance.multinomial(300, P), chance.multinomial(300, P)) for _ in range(1000)]
    for values in (one, four, two):
        assert np.mean(np.array(values) < 0.05) == pytest.approx(0.05, abs=0.025)
        assert np.mean(values) == pytest.approx(0.5, abs=0.05)


def test_more_draws_find_smaller_faults():
    found = []
    for n, share in ((100, 0.1), (100, 0.5), (4000, 0.1)):
        cells = Cells.of(P, n)
        found.append(power_of([(cells, np.append(toward(P, 0, share), 0.0), n)]))
    assert found[0] < 0.2 < 0.9 < min(found[1:])


@pytest.mark.parametrize("n", [40, 400, 10_000])
def test_cells_take_in_all_tokens(n):
    p = np.random.default_rng(0).dirichlet(np.full(1000, 0.1))
    cells = Cells.of(p, n)
    assert cells.p.sum() == pytest.approx(1.0)
    assert (cells.p * n)[:-1].min(initial=5.0) >= 5.0
    draws = np.random.default_rng(1).choice(1000, n, p=p)
    assert cells.counts(list(draws)).sum() == n


class Drawn:
    """An engine that says a first token of P, and a second of another distribution."""

    name, first_place = "drawn", 0

    def __init__(self, p, first_place=0):
        self.p, self.first_place = p, first_place

    def sample(self, prompt, times, seed, done):
        chance = np.random.default_rng(seed)
        return [Said((int(chance.choice(5, p=self.p)), int(chance.choice(5, p=self.p)))) for _ in range(times)]


def exactly(prompt, said):
    return P


def looked(p, samples=1500, seed=3):
    return audit(Drawn(p), "the target", exactly, [[1], [2]], samples, seed, lambda: None)


def test_what_is_sound_passes_and_what_is_shifted_does_not():
    assert looked(P).verdict == "lossless"
    assert looked(P, samples=60).verdict == "undecided"
    found = looked(toward(P, 1, 0.15))
    assert found.verdict == "biased"
    assert found.p_value < 1e-6
    assert found.control < 1e-3
    assert "biased" in sentence(found)


def test_sound_engines_are_called_biased_once_in_a_thousand():
    assert sum(looked(P, samples=80, seed=seed).verdict == "biased" for seed in range(60)) <= 1


@pytest.mark.parametrize(("p", "verdict"), [(P, "lossless"), (toward(P, 1, 0.2), "biased")])
def test_a_server_beside_another_one_at_its_second_token(p, verdict):
    found = audit_two(Drawn(p, 1), Drawn(P, 1), [[1], [2], [3]], 5000, 5, lambda: None)
    assert found.verdict == verdict
    assert {place.place for place in found.places} == {1}


# -- real pairs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def audited(specdec, checkpoint):
    def call(*more, samples=150):
        typed = (
            "audit",
            "-t",
            checkpoint,
            "--dtype",
            "float32",
            "--temperature",
            "0.15",
            "--samples",
            samples,
            "--format",
            "json",
        )
        result = specdec(*typed, *more)
        return result.code, json.loads(result.out)

    return call


@pytest.mark.parametrize("rule", ["token", "block"])
def test_our_own_pair_passes(audited, rule):
    code, found = audited("-d", "self:1", "--rule", rule)
    assert code == 0
    assert found["schema"] == "specdec.audit/1"
    assert found["verdict"] == "lossless"
    assert found["control_p_value"] < 1e-3
    assert found.keys() >= {"verdict", "p_value", "power", "tests"}
    assert any(test["drafted"] for test in found["tests"])


def test_plain_decoding_passes(audited):
    code, found = audited("-d", "none")
    assert (code, found["verdict"] == "biased") == (0, False)
    assert found["tests"]


def test_a_planted_bias_is_found(audited, monkeypatch):
    """After a rejection a draw from p, as one may write it by mistake."""
    sound = rules.apply_token_rule

    def careless(inputs, u):
        found = sound(inputs, u)
        return replace(found, final=inputs.p[found.accepted])

    monkeypatch.setattr(rules, "apply_token_rule", careless)
    code, found = audited("-d", "self:1")
    assert (code, found["verdict"]) == (6, "biased")


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_transformers_own_decoding_can_be_looked_at(audited, draft):
    code, found = audited("-d", draft, "--peer", "transformers", samples=60)
    assert code == 0
    assert found["source"].startswith("transformers")


def test_transformers_biased_way_with_assistants_of_gemma_is_found_and_ours_is_not_biased(specdec, tmp_path):
    """It takes the likeliest token of each step and says that it drew it."""
    tiny_gemma(shared=2).save_pretrained(tmp_path / "target")
    byte_tokenizer().save_pretrained(tmp_path / "target")
    pair = ("-t", tmp_path / "target", "-d", save_assistant(tmp_path / "assistant", std=0.02), "--dtype", "float32")
    verdicts = {}
    for peer in ((), ("--peer", "transformers")):
        result = specdec("audit", *pair, *peer, "--temperature", "0.8", "--samples", "300", "--format", "json")
        verdicts[peer] = (result.code, json.loads(result.out)["verdict"])
    assert verdicts == {(): (0, "lossless"), ("--peer", "transformers"): (6, "biased")}


@pytest.mark.parametrize(
    "typed",
    [
        ("--temperature", "0"),
        ("--plain", "http://x:1"),
        ("--attach", "http://x:1", "-d", "ngram"),
        ("--attach", "http://x:1"),
        ("--samples", "3"),
    ],
)
def test_what_makes_no_sense_is_refused(specdec, typed):
    assert specdec("audit", *typed).code == 2


def test_a_verdict_is_said_in_one_sentence():
    found = Audit("specdec", "org/t", "undecided", 0.4, 0.2, "x", (), 0.1)
    assert "too few" in sentence(found)
