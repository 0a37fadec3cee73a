"""What CPU backends are expected to take: the counts, the record, the fit, and the command that makes the record."""

import gc
import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexjag as fj
from flexjag.algebra.facts import attended, extent
from flexjag.algebra.masks import Not
from flexjag.backends import costs
from flexjag.backends.choose import expected_seconds, refusal
from flexjag.bench import main
from flexjag.bench.tuning import calibrate

MASKS = [
    fj.Full(),
    fj.Causal(),
    fj.Window(5, 0),
    fj.Window(5, 3),
    fj.Prefix(4),
    fj.Chunked(8),
    fj.Causal() & fj.Window(5, 5),
    fj.Window(5, 0) | fj.Prefix(4),
    ~fj.Causal(),
]


@given(st.sampled_from(MASKS), st.integers(16, 60))
def test_estimates_against_the_dense_mask(mask: fj.Mask, n: int) -> None:
    """What a row in the middle attends is never underestimated by half, nor overestimated but for opaque masks."""
    dense = fj.plan(fj.Jagged.from_lengths(torch.zeros(n), [n]), mask=mask).to_dense()
    mean = float(dense.sum(1).double().mean())
    estimate = attended(mask, n)
    assert 0.5 * mean <= estimate <= n
    if not isinstance(mask, Not):
        assert estimate <= 2 * mean + 1
    where = dense.int()
    first, last = where.argmax(1), n - 1 - where.flip(1).argmax(1)
    assert extent(mask, n) >= 0.5 * float((last - first + 1)[dense.any(1)].double().mean())


def test_the_record_has_a_line_for_each_way() -> None:
    """And no line is free: a call that costs nothing would always be chosen."""
    ways = {
        "segments, whole",
        "segments, runs",
        "segments, shared bias",
        "segments, pointwise",
        "tiled",
        "tiled, pointwise",
        "cpp, softmax",
        "cpp, pointwise",
        "cpp, stick-breaking",
    }
    assert set(costs.record()) == {f"{way}, {what}" for way in ways for what in ("forward", "training")}
    for line in costs.record().values():
        assert min(line) >= 0
        assert line.per_score > 0


def test_the_record_says_where_it_was_made_and_how_well_it_chooses() -> None:
    found = json.loads(costs.PATH.read_text())
    assert found["environment"]["cpu"]
    assert found["environment"]["torch"]
    assert {case["length"] for case in found["cases"]} == set(calibrate.LENGTHS)
    assert {case["tokens"] for case in found["cases"]} == set(calibrate.TOKENS)
    # What the model leaves out (cache misses, partial tiles) may cost a case half its time, but not more.
    assert max(case["regret"] for case in found["cases"]) <= 1.5


def test_more_work_takes_longer() -> None:
    def seconds(tokens: int, mask: fj.Mask) -> dict[str, float]:
        x = fj.Jagged.from_lengths(torch.zeros(tokens, 2, 16), [tokens // 4] * 4)
        return expected_seconds(fj.plan(x, mask=mask).case(), ["segments", "tiled"])

    for mask in MASKS:
        less, more = seconds(400, mask), seconds(4000, mask)
        assert all(less[backend] < more[backend] for backend in less)


def test_steps_of_one_token_take_what_whole_vectors_and_tiles_of_queries_take() -> None:
    def expected(n: int, backend: str) -> float:
        q = fj.Jagged.from_lengths(torch.zeros(32 * n, 8, 64), [n] * 32)
        k = fj.Jagged.from_lengths(torch.zeros(32 * 300, 2, 64), [300] * 32)
        case = fj.plan(q, k, mask=fj.Causal("end")).case(grad=False)
        return expected_seconds(case, [backend])[backend]

    assert expected(16, "cpp") < 1.2 * expected(1, "cpp")
    assert expected(1, "tiled") > 2 * expected(1, "cpp")


def test_explain_gives_the_expected_times() -> None:
    x = fj.Jagged.from_lengths(torch.zeros(300, 2, 16), [100, 200])
    assert re.search(r" ms expected, (cpp .* ms, )?tiled ", fj.plan(x).explain())


def test_fit_leaves_out_a_negative_coefficient() -> None:
    """What would take -0.1 seconds a call is fitted by tokens and scores alone."""
    works = [costs.Work("w", calls, tokens, scores) for calls, tokens, scores in product((1, 10), (1, 5), (2, 9))]
    line = calibrate.fit(works, [2.0 * w.tokens + 0.5 * w.scores - 0.01 * w.calls for w in works])
    assert line.fixed < 0.1
    assert line.per_call == 0
    assert line.per_token == pytest.approx(2, rel=0.05)
    assert line.per_score == pytest.approx(0.5, rel=0.05)


def test_the_model_is_not_far_from_what_was_measured() -> None:
    """Within a factor of 2, noise and cache misses included; without a term for tokens it was 3.5 off."""
    for case in json.loads(costs.PATH.read_text())["cases"]:
        for way, seconds in case["measured"].items():
            assert 0.5 <= case["expected"][way] / seconds <= 2, (case, way)


def test_calibrate_measures_fits_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(calibrate, "TOKENS", (20, 60))
    monkeypatch.setattr(calibrate, "LENGTHS", (10, 30))
    monkeypatch.setattr(calibrate, "KINDS", [calibrate.KINDS[i] for i in (0, 1, 3, 5, 7)])  # one of each way
    monkeypatch.setattr(gc, "collect", lambda: 0)  # half a second each, after other tests
    path = tmp_path / "costs.json"
    assert main(["calibrate", "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    x = fj.Jagged.from_lengths(torch.zeros(3, 2, 16), [3])
    able = []
    for kind, mask, normalizer in calibrate.KINDS:
        case = fj.plan(x, mask=mask, normalizer=normalizer).case()
        able.append({way for backend, way in calibrate.ways(kind).items() if refusal(backend, case) is None})
    assert set(found["lines"]) == {f"{way}, {what}" for way in set().union(*able) for what in ("forward", "training")}
    assert len(found["cases"]) == sum(map(bool, able)) * 3 * 2
    assert "90th percentile" in capsys.readouterr().out
