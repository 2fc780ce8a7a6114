"""The harness: who takes part, what is refused, what is written and shown."""

from __future__ import annotations

import math
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import geco_fast as gf
from geco_fast import ops, reference
from geco_fast.bench import limits, modules, report, results
from geco_fast.bench.baselines import coupling
from geco_fast.bench.entrants import BOTH, FORWARD, OperatorProblem
from geco_fast.bench.limits import LEAST, Limits, Work, measure_limits, operator_work
from geco_fast.bench.memory import peak_bytes
from geco_fast.bench.paired import Effort, TooSlow, WrongResult, compare, pair, patience, sides
from geco_fast.bench.results import ResultFile, Row
from geco_fast.bench.rivals import Rival, bench_cases, like_operator, operator_rivals
from geco_fast.testing.cases import GECO_UPDATE, LSTM_GATES, Case

QUICK = Effort(pairs=3, slice_s=1e-4, seconds=1.0)
CASE = next(case for case in LSTM_GATES if case.name == "several-threads")
ROW = Row(
    operator="lstm_gates",
    case="lstm_gates-image",
    direction=BOTH,
    rival="compile",
    threads=1,
    instruction_set="avx512",
    pairs=21,
    ours_ms=2.0,
    rival_ms=5.0,
    ratio=2.5,
    ratio_low=2.25,
    ratio_high=2.75,
    ours_peak_bytes=1_500_000,
    rival_peak_bytes=3_000_000,
    least_bytes=1e6,
    least_operations=1e6,
    copy_bytes_per_s=1e9,
    fma_operations_per_s=1e11,
)
SELF = replace(ROW, rival="self", rival_ms=2.0, ratio=1.0, ratio_low=0.98, ratio_high=1.02)


@pytest.fixture(autouse=True)
def _quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COPIED_BYTES", 2**20)


def problem_with(case: Case = CASE, **rivals: Rival) -> OperatorProblem:
    problem = OperatorProblem(case)
    problem.rivals = {"eager": problem.rivals["eager"], **rivals}
    return problem


def half_wrong(gates: torch.Tensor, c: torch.Tensor, **options: object) -> tuple:
    h, c_next = reference.lstm_gates(gates, c, **options)
    return h, c_next * 1.001


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_used_again() -> None:
    program = """
import resource, torch
from geco_fast.bench.memory import keep_freed_memory
keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = []
for _ in range(9):
    before = faults()
    torch.ones(1 << 24)
    counts.append(faults() - before)
print(*counts)
"""
    printed = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    first, *_, last = map(int, printed.split())
    assert last < first / 10


@pytest.mark.parametrize(
    ("operator", "names"),
    [
        ("equilibrium_map", {"chunked products"}),
        ("geco_update", {"by hand"}),
        ("lncc", {"MONAI", "FireANTs", "neurite"}),
        ("pncc", {"box filters", "box filters, compiled"}),
    ],
)
def test_rivals_of_an_operator(operator: str, names: set[str]) -> None:
    for case in bench_cases(operator):
        assert set(operator_rivals(case)) == names
        assert set(operator_rivals(case, "cuda")) == names | {"triton"}


def test_every_rival_gets_a_row_in_each_direction() -> None:
    rows = compare(problem_with(), effort=QUICK)
    assert [(row.direction, row.rival) for row in rows] == [
        (direction, rival) for direction in (FORWARD, BOTH) for rival in ("eager", "self")
    ]
    for row in rows:
        assert row.pairs >= 3
        assert row.ratio_low <= row.ratio <= row.ratio_high
        assert row.ours_peak_bytes > 0
        assert row.limit is not None


def test_a_rival_that_fails_has_a_row_that_says_so() -> None:
    def missing(case: Case) -> object:
        import not_a_library  # noqa: F401

        raise AssertionError

    def broken(case: Case) -> object:
        def call(**tensors: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("it broke\nin two lines")

        return call

    problem = problem_with(
        missing=Rival(missing),
        broken=Rival(broken),
        wrong=Rival(like_operator(half_wrong)),
        rough=Rival(like_operator(half_wrong), tolerance=0.01),
        other=Rival(like_operator(half_wrong), tolerance=math.inf, note="scaled"),
    )
    rows = {row.rival: row for row in compare(problem, effort=QUICK) if row.direction == FORWARD}
    assert rows["missing"].unavailable.startswith("not installed")
    assert rows["broken"].unavailable == "RuntimeError: it broke"
    assert "exceeds" in rows["wrong"].unavailable
    assert all(rows[name].ratio is None for name in ("missing", "broken", "wrong"))
    assert all(rows[name].ratio is not None for name in ("eager", "self", "rough", "other"))
    assert rows["other"].note == "scaled"


def test_a_wrong_result_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(gates: torch.Tensor, c: torch.Tensor) -> tuple:
        return half_wrong(gates, c)

    monkeypatch.setattr(ops, "lstm_gates", wrong)
    with pytest.raises(WrongResult, match="lstm_gates-several-threads"):
        compare(problem_with(), effort=QUICK)


def test_ours_failing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**tensors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(ops, "lstm_gates", broken)
    with pytest.raises(RuntimeError, match="broken"):
        compare(problem_with(), effort=QUICK)


def test_state_goes_on_from_call_to_call() -> None:
    case = next(case for case in GECO_UPDATE if case.name == "batch")
    entrant = OperatorProblem(case).build("ours")
    step = entrant.step(FORWARD)
    before = step.keywords["step"].clone()
    for _ in range(3):
        step()
    assert step.keywords["step"] == before + 3
    assert compare(problem_with(case), effort=QUICK)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    rows = compare(problem_with(), rivals=["self"], threads=2, effort=QUICK)
    assert {row.threads for row in rows} == {2}
    assert torch.get_num_threads() == before


def test_pairs_are_fewer_where_calls_are_long() -> None:
    import time

    side = lambda: time.sleep(0.01)  # noqa: E731
    assert len(pair(side, side, Effort(pairs=50, slice_s=0.01, seconds=0.2))) < 20
    with pytest.raises(TooSlow):
        pair(side, side, Effort(seconds=0.001))
    with pytest.raises(TooSlow, match="first call"), patience(0.01):
        time.sleep(5)


def test_peak_is_that_of_torchs_allocator() -> None:
    def step() -> torch.Tensor:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(1 << 21, dtype=torch.uint8)
        del first, second
        return torch.empty(1 << 10, dtype=torch.uint8)

    assert peak_bytes(step) == (1 << 20) + (1 << 21)


def test_limits() -> None:
    measured = measure_limits(1)
    assert measured.bytes_per_s > 0
    assert measured.operations_per_s is None or measured.operations_per_s > 0
    fixed = Limits(1e9, 1e11)
    assert fixed.seconds(Work(1e6, 1e6)) == 1e-3
    assert fixed.bound(Work(1e6, 1e6)) == "memory"
    assert fixed.bound(Work(1e6, 1e12)) == "arithmetic"
    assert ROW.limit == (0.5, "memory")


def test_least_work_of_every_benchmarked_operator_is_known() -> None:
    assert {case.operator for case in bench_cases()} <= set(LEAST)
    for case in bench_cases():
        forward, both = operator_work(case, False), operator_work(case, True)
        assert 0 < forward.bytes < both.bytes
    case = Case("lstm_gates", "", {"gates": (2, 4, 5), "c": (2, 1, 5)})
    assert operator_work(case, True).bytes == 19 * 10 * 4


def test_module_problems_agree_with_their_plain_form() -> None:
    case = replace(modules._coupling("tanh", features=6), inputs=lambda: (torch.randn(64, 6),))
    rows = compare(modules.ModuleProblem(case), rivals=["eager", "self"], effort=QUICK)
    assert all(row.ratio is not None for row in rows)
    assert {row.operator for row in rows} == {"AffineCoupling"}
    assert rows[0].least_operations == 2 * 64 * (3 * 512 + 512 * 512 + 512 * 6)


def test_training_problem() -> None:
    (case,) = (case for case in modules.MODULES if case.module == "GECO")
    rows = compare(modules.ModuleProblem(case), rivals=["eager"], effort=QUICK)
    assert [(row.direction, row.unavailable) for row in rows] == [(BOTH, "")]


@pytest.mark.parametrize("scale_map", coupling.RIVALS)
def test_flow_libraries_hold_our_weights(scale_map: str) -> None:
    """Where they are installed, and compute our function."""
    problem = modules.ModuleProblem(modules._coupling(scale_map))
    layer, (x,) = problem._ours(), problem._inputs()
    y, log_det = layer(x)
    for name, rival in coupling.RIVALS[scale_map].items():
        try:
            theirs = rival.build(layer)
        except ImportError:
            continue
        got, got_log_det = theirs(x)
        if rival.tolerance != math.inf:
            torch.testing.assert_close(got, y, msg=name)
            torch.testing.assert_close(got_log_det, log_det, msg=name)


def test_rows_replace_those_of_the_same_comparison(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.json"
    assert results.read(path) == ResultFile([], [])
    eager = replace(ROW, rival="eager")
    first = ResultFile([], []).merged({"commit": "a"}, [ROW, eager])
    second = first.merged({"commit": "b"}, [replace(ROW, ratio=3.0)])
    assert [(row.rival, row.ratio, row.run) for row in second.rows] == [
        ("compile", 3.0, 1),
        ("eager", 2.5, 0),
    ]
    third = second.merged({"commit": "c"}, [eager])
    assert [run["commit"] for run in third.runs] == ["b", "c"]
    results.write(path, third)
    assert results.read(path) == third


def test_limits_of_a_run_are_its_best() -> None:
    slow = replace(ROW, copy_bytes_per_s=5e8, fma_operations_per_s=None)
    two = replace(ROW, threads=2, copy_bytes_per_s=3e9)
    rows = results.with_run_limits([slow, ROW, two])
    assert [row.copy_bytes_per_s for row in rows] == [1e9, 1e9, 3e9]
    assert [row.fma_operations_per_s for row in rows] == [1e11] * 3


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.1, 1.3, "faster"), (0.9, 1.1, "even"), (0.7, 0.9, "slower")],
)
def test_verdict(low: float, high: float, verdict: str) -> None:
    row = replace(ROW, ratio=(low + high) / 2, ratio_low=low, ratio_high=high)
    assert row.verdict == verdict
    assert f" {verdict} (" in report.markdown([row])


def test_table() -> None:
    lost = replace(ROW, rival="eager", ratio=0.5, ratio_low=0.4, ratio_high=0.6, note="lean")
    empty = dict.fromkeys(("ours_ms", "rival_ms", "ratio", "ratio_low", "ratio_high"))
    gone = replace(ROW, rival="library", unavailable="not installed", **empty)
    text = report.markdown([ROW, lost, gone, SELF])
    start = "| lstm_gates-image | forward+backward | 1 |"
    assert text.splitlines()[2:] == [
        f"{start} compile | 2 | 5 | 2.50 faster (2.25 to 2.75) | 0.98 to 1.02 | 0.50 memory "
        "| 1.5 MB / 3 MB |",
        f"{start} eager | 2 | 5 | 0.50 slower (0.40 to 0.60) | 0.98 to 1.02 | 0.50 memory "
        "| 1.5 MB / 3 MB |",
        f"{start} library |  |  | not measured: not installed | 0.98 to 1.02 |  |  |",
        "",
        "- eager: lean",
    ]
    assert "| self |" in report.markdown([SELF])


def test_headline_is_the_best_rival() -> None:
    eager = replace(ROW, rival="eager", ratio=4.0)
    two = replace(ROW, threads=2, ratio=1.0)
    forward = replace(ROW, direction=FORWARD, ratio=1.0)
    assert report.headline([eager, ROW, SELF, two, forward]) == [ROW]


def test_documents_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = "before\n<!-- results: one.json lstm_gates -->\nold\n<!-- end of results -->\nafter\n"
    assert report.NONE_YET in report.rendered(text)
    run = {
        **dict.fromkeys(("command", "commit", "processor", "python", "torch", "geco_fast"), "x"),
        "cores": 2,
        "instruction_sets": ["avx2"],
        "peers": {"zuko": "1.6"},
    }
    results.write(tmp_path / "one.json", ResultFile([run], [ROW, SELF]))
    once = report.rendered(text)
    assert once.startswith("before\n<!--")
    assert once.endswith("<!-- end of results -->\nafter\n")
    assert report.markdown([ROW, SELF]) in once
    assert "old" not in once
    assert report.rendered(once) == once
    shown = report.rendered(text.replace("lstm_gates", "machine"))
    assert "zuko 1.6" in shown
    assert "copies 1.0 GB/s, 100 GFLOP/s of avx512 multiply-adds" in shown
    shown = report.rendered(text.replace("lstm_gates", "headline"))
    assert "2.50 faster" in shown
    assert "forward" not in shown


def test_chart_is_the_same_file_each_time(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, case="lost", ratio=0.5, ratio_low=0.4, ratio_high=0.6)]
    paths = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in paths:
        report.draw(rows, path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert report.description(rows) in first.decode()
    report.draw([], tmp_path / "empty.svg")


def test_plain_nvp_vae_is_the_same_function() -> None:
    (case,) = (case for case in modules.MODULES if case.module == "NVPVAE")
    small = {"hidden_channels": 4, "encoder_features": 8, "hidden_features": (8,)}
    case = replace(
        case,
        make=lambda: modules._Loss(
            gf.nn.NVPVAE((1, 9, 8), couplings=3, latent_features=5, **small)
        ),
        inputs=lambda: (torch.rand(4, 1, 9, 8), torch.randn(4, 5)),
    )
    problem = modules.ModuleProblem(case)
    for side in ("ours", "eager"):
        (got,) = problem.build(side).results(0, BOTH).gradients
        (exact,) = problem.expected(0)[1].gradients
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


def test_convolutional_cells_hold_our_weights() -> None:
    problem = modules.ModuleProblem(modules._cell(3, 4, batch=2))
    ready, out = sides(problem, ["eager", "conv-lstm", "flax"], QUICK)
    assert {"ours", "eager"} <= set(ready)
    assert all(reason.startswith("not installed") for reason in out.values()), out


def test_peers_are_pinned() -> None:
    pinned = (report.ROOT / "constraints.txt").read_text().splitlines()
    assert set(results.PEERS) <= {line.partition("==")[0] for line in pinned}
