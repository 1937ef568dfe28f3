"""What a step will take, as the pacer asks: from a probe of this machine, or from the steps themselves."""

from __future__ import annotations

from typing import Protocol

from setpoint.engine.speculation.verify_cost import VerifyCost
from setpoint.engine.step_cost import Residuals, StepCost, StepShape


class PaceCost(Protocol):
    """Seconds of steps, refined by each one that was measured."""

    @property
    def is_known(self) -> bool: ...

    def seconds(self, shape: StepShape) -> float: ...

    def observe(self, shape: StepShape, seconds: float) -> None: ...


class ProbedCost:
    """A probe's model, and how far the steps of now lie from it."""

    is_known = True

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._residuals = Residuals()

    def seconds(self, shape: StepShape) -> float:
        return self._cost.seconds(shape) * self._residuals.factor(shape)

    def observe(self, shape: StepShape, seconds: float) -> None:
        self._residuals.observe(shape, self._cost.seconds(shape), seconds)


class LearnedCost:
    """By tokens alone, from the first step on: sizes that never ran are thought dear, so budgets grow step by step."""

    def __init__(self) -> None:
        self._cost = VerifyCost()

    @property
    def is_known(self) -> bool:
        return self._cost.is_known

    def seconds(self, shape: StepShape) -> float:
        return self._cost.seconds(shape.tokens)

    def observe(self, shape: StepShape, seconds: float) -> None:
        self._cost.learn(shape.tokens, seconds)
