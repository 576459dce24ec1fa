"""The conformance command on one schedule, and that it would notice: a slipped solver, a lost refusal."""

import inspect
import math

import pytest

from diffusion_core.guidance import CFG, Converted, Guide
from diffusion_core.pair import mix, unmix
from diffusion_core.renoise import Renoise
from diffusion_core.schedule import VP, Linear
from diffusion_core.solver import FRAMES, FirstOrder, Heun, Solver
from diffusion_core.target import EPS, X0, Target
from diffusion_core.two_conditions import TwoConditions
from tests.conformance import guides, landings, moments, orders
from tests.conformance.examine import examine
from tests.conformance.page import page, summary
from tests.core.oracle import Gaussian, perfect
from tests.core.paths import SOLVERS


class Slipped(Solver):
    """Heun's method in frame X0 but for one slip: the two ends do not count alike."""

    def hold(self, denoise, x, leg, memory, fresh):
        pair = denoise(x, leg.level)
        there = denoise(mix(pair, leg.to.row), leg.to)
        frame = FRAMES[X0()]
        return unmix(x, leg.level.row, 0.6 * mix(pair, frame) + 0.4 * mix(there, frame), frame), memory

    def order_on(self, schedule):
        return 2


class Overstated(FirstOrder):
    """A solver that claims more than it does."""

    def order_on(self, schedule):
        return 2


@pytest.fixture(scope="module")
def cells():
    return examine("linear")


def test_everything_conforms_on_one_schedule(cells):
    assert [cell.name for cell in cells if not cell.ok] == []
    assert len({cell.name for cell in cells}) == len(cells)
    product = {(cell.row, cell.column) for cell in cells if cell.table == "solvers"}
    assert product >= {(solver, column) for solver in SOLVERS for column in (*Target.kinds(), "order")}


def test_what_has_no_answer_is_shown_as_refused(cells):
    refused = {(cell.row, cell.column) for cell in cells if cell.refused and cell.table == "solvers"}
    assert {("DDIM, Euler", "eps"), ("DDIM, Euler", "score"), ("Heun (EDM)", "v")} <= refused
    assert not {("DDIM, Euler", "v"), ("iPNDM", "x0"), ("DPM-Solver++(2S)", "flow")} & refused
    text = page(cells, "here")
    assert "| DDIM, Euler | 1 | 1.00 |  | 1e-08 | refused | 1e-08 | 1e-08 | 1e-08 | refused | 1e-08 |" in text
    assert "target 'eps' cannot be inverted at t = 1 of schedule 'linear'" in text and "missed**" not in text


@pytest.mark.parametrize("wrong", [Slipped(), Overstated()], ids=["slipped", "overstated"])
def test_a_wrong_solver_is_shown_as_failed(cells, wrong):
    (order,) = orders.cells("linear", Linear(), {"wrong": wrong})
    assert not order.ok and order.measured == pytest.approx(1, abs=0.1)
    text = page([*cells, order], "here")
    assert f"| wrong | 2 | **{order.measured:.2f} missed** |" in text
    assert summary([*cells, order])[2:] == ["1", f"wrong: {order.measured:.2f} of 2"]


def test_a_network_that_says_something_else_is_shown_as_failed(monkeypatch):
    monkeypatch.setattr(landings, "perfect", lambda law, *rest, **more: perfect(Gaussian(), *rest, **more))
    found = list(landings.cells("vp", VP(), {"DDIM, Euler": FirstOrder()}))
    assert len(found) == len(Target.kinds()) and not any(cell.ok for cell in found)


@pytest.mark.parametrize(("name", "schedule"), [("vp", Linear()), ("linear", VP())], ids=["too many", "too few"])
def test_a_refusal_in_the_wrong_place_is_a_failure(name, schedule):
    """Pure noise under the name of a schedule that keeps a signal, and the other way about."""
    found = {cell.column: cell for cell in landings.cells(name, schedule, {"Heun (EDM)": Heun(EPS())})}
    assert not found["v"].ok and found["v"].measured == math.inf


def test_a_guide_off_its_formula_is_shown_as_failed(monkeypatch):
    monkeypatch.setitem(guides.CASES, "CFG", guides.CASES["CFG"]._replace(build=lambda reader: CFG(reader, 2.999)))
    assert [cell.row for cell in guides.cells("vp", VP()) if not cell.ok] == ["CFG"]


def test_every_guide_and_every_renoise_rule_is_held_to_a_formula():
    def below(family):
        return {family}.union(*(below(sub) for sub in family.__subclasses__()))

    made = {type(case.build(perfect(guides.LAW, VP(), "v"))) for case in guides.CASES.values()}
    ours = {guide for guide in below(Guide) if guide.__module__.startswith("diffusion_core")}
    assert {guide for guide in ours if not inspect.isabstract(guide)} == made | {TwoConditions, Converted}
    tried = {type(renoise) for _, renoise, _ in moments.CONVERGE.values()}
    assert tried | {moments.Full, moments.Learned} == set(Renoise.kinds().values())
