"""Tuning on a virtual world whose truth is known: what wins, what never may, what is refused, what is written down."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from setpoint.cli.tune import parse_budget
from setpoint.config import EngineConfig
from setpoint.errors import ConfigError
from setpoint.tune.measure import RequestLog, Run, Window
from setpoint.tune.recipe import Recipe, RecipeError, mismatches, parse_recipe, read_recipe, write_recipe
from setpoint.tune.search.certify import TermCertificate, certificate, decide, probit_slope
from setpoint.tune.search.outcome import lines, recipe_of
from setpoint.tune.search.page import tune_page
from setpoint.tune.search.proof import STRESSES
from setpoint.tune.search.race import paired_interval, race
from setpoint.tune.search.space import DEFAULT, Setting, candidates, coordinates, scattered, shortlist, space
from setpoint.tune.search.study import Study, StudyError
from setpoint.tune.search.trial import Ask, Observation, Share, check_sla, observe
from setpoint.tune.search.tuned import Tuned
from setpoint.tune.search.tuner import Job, TooNoisyError, Tuner, check_budget
from setpoint.tune.search.virtual_world import World
from setpoint.tune.sla import Sla

DIMENSIONS = space(EngineConfig(model="any"))
BEST = (("max_num_seqs", 16),)


def hill(setting: Setting) -> float:
    """1 at the default, 1.6 at its top, with a region that crashes."""
    chosen = dict(setting)
    seqs, tokens = chosen.get("max_num_seqs", 64), chosen.get("max_num_batched_tokens", 512)
    if seqs == 256 and tokens >= 1024:
        return 0.0
    return 1.6 * math.exp(-math.log(1.6) * (math.log2(seqs / 16) / 2) ** 2 - 0.02 * math.log2(tokens / 512) ** 2)


def tuned(world: World, *, predicts: bool = True, study: Study | None = None, budget_s: float = 600.0) -> Tuned:
    predict = (lambda setting: math.log(max(world.capacity(setting), 0.01))) if predicts else None
    return Tuner(Job(DIMENSIONS, budget_s, predict), world.measure, study or Study(None, {})).run()


def test_the_space_comes_from_the_knobs() -> None:
    assert {d.knob for d in DIMENSIONS} == {"max_num_seqs", "max_num_batched_tokens", "speculative_config"}
    fixed = space(EngineConfig(model="any", max_num_seqs=7))
    assert "max_num_seqs" not in {d.knob for d in fixed}
    found = candidates(DIMENSIONS, 60)
    assert len(found) == 7 * 7 * 4 - 1
    found = candidates(DIMENSIONS, 30)
    assert DEFAULT not in found
    assert len(set(found)) == len(found)
    assert set(coordinates(DIMENSIONS)) <= set(found)
    assert len(list(scattered(DIMENSIONS, 30))) == 30
    for setting in found:
        EngineConfig(model="any", **dict(setting))


def test_the_shortlist_keeps_what_the_model_cannot_tell_apart() -> None:
    scored = [(BEST, 1.0), ((("max_num_seqs", 8),), 0.95), ((("max_num_seqs", 4),), 0.5)]
    assert shortlist(scored, 5, 0.012) == [BEST, (("max_num_seqs", 8),)]
    assert shortlist(scored, 1, 0.02) == [BEST]


def test_a_planted_optimum_is_found_and_certified() -> None:
    found = [tuned(World(hill, 0.02, seed)) for seed in range(10)]
    chosen = [one.decision.chosen for one in found]
    regrets = [1 - hill(one.setting) / 1.6 if one is not None else 1.0 for one in chosen]
    assert sum(regret <= 0.03 for regret in regrets) >= 8
    assert any(one.decision.verdict == "certified" for one in found)
    for one in found:
        assert one.spent_s <= 600.0
        if one.decision.verdict == "certified":
            assert one.decision.chosen is not None
            assert one.decision.chosen.gain is not None
            assert one.decision.chosen.gain.low > 0.02


def test_equal_settings_never_or_hardly_ever_win() -> None:
    verdicts = [tuned(World(lambda setting: 1.0, 0.03, seed), predicts=False).decision.verdict for seed in range(60)]
    assert verdicts.count("certified") <= 6  # 5 % of 60 and the chance of three more
    assert verdicts.count("default") >= 40


def test_a_noisy_machine_is_refused() -> None:
    with pytest.raises(TooNoisyError, match="too noisy"):
        tuned(World(hill, 0.4, 1))


def test_an_sla_that_cannot_be_met_is_told_with_its_term() -> None:
    found = tuned(World(lambda setting: 1e-4, 0.02, 1))
    assert found.decision.verdict == "not met"
    assert found.decision.chosen is None
    assert "ttft.p95" in found.decision.why


def test_failures_and_worse_settings_leave_the_race() -> None:
    world = World(lambda s: {1: 1.5, 2: 0.0, 3: 0.6}.get(dict(s).get("x", 0), 1.0), 0.02, 1)
    settings = [(("x", value),) for value in (1, 2, 3)]
    result = race(settings, world.measure, load=1.0, first_s=10.0, noise=0.02, has_time=lambda seconds: True, keep=1)
    assert result.ranked == ((("x", 1),),)
    reasons = {racer.setting: racer.out for racer in result.racers}
    assert reasons[(("x", 2),)].startswith("failed")
    assert "not better" in reasons[(("x", 3),)]


def test_the_noise_between_runs_widens_a_paired_interval() -> None:
    quiet, loud = (paired_interval([0.1, 0.11, 0.09, 0.1], 1, noise) for noise in (0.0, 0.05))
    assert quiet.low > 0.05
    assert loud.low < 0 < loud.high


def seen(met: float, n: float = 200, state: str = "ok") -> Observation:
    shares = {"ttft.p95<1ms": Share(met, n, n, 0.95)}
    return Observation(state, 1.0, "why", int(n), 10.0, met / n, 0.01, (0.1,) * 8, shares)  # type: ignore[arg-type]


def test_what_is_not_shown_is_not_certified() -> None:
    mine, default = [seen(198)] * 5, [seen(150), seen(151), seen(149), seen(152), seen(148)]
    good = certificate(BEST, 1.0, mine, default, slope=4.0)
    assert good.holds
    assert decide([good], None).verdict == "certified"
    tie = certificate(BEST, 1.0, mine, mine, slope=4.0)
    own = certificate(DEFAULT, 1.0, mine, slope=4.0)
    assert decide([tie], own).verdict == "default"
    failing = certificate(DEFAULT, 1.0, [seen(185)] * 5, slope=4.0)
    held = decide([tie], failing)
    assert held.verdict == "holds"
    assert held.chosen is not None
    assert held.chosen.setting == BEST
    few = certificate(DEFAULT, 1.0, [seen(39, 40)], slope=4.0)
    assert decide([], few).verdict == "insufficient"
    assert "more requests" in decide([], few).why
    bad = certificate(DEFAULT, 1.0, [seen(100)] * 5, slope=4.0)
    assert decide([], bad).verdict == "not met"
    one_lost = certificate(BEST, 1.0, [*mine[:4], seen(0, state="invalid")], default, slope=4.0)
    assert one_lost.holds
    assert one_lost.is_gain
    assert one_lost.runs == 4
    failed = certificate(BEST, 1.0, [*mine[:4], seen(0, state="failed")], default, slope=4.0)
    assert not failed.holds
    broken = certificate(BEST, 1.0, [*mine[:3], *[seen(198, state="invalid")] * 2], default, slope=4.0)
    assert not broken.holds
    assert decide([broken], None).verdict == "invalid"
    assert not TermCertificate("t", 1, 20, 20, 0.2, 0.05).holds


def test_the_slope_of_the_probit() -> None:
    world = World(lambda setting: 1.0, 0.0, 1, common_noise=0.0)
    points = [
        (load, world.measure(Ask("s", DEFAULT, load, "tune", i, 60))) for i, load in enumerate((0.9, 1.0, 1.1, 1.2))
    ]
    assert probit_slope(points) == pytest.approx(6.0, rel=0.2)
    assert probit_slope(points[:1]) == 4.0


def test_a_run_becomes_an_observation() -> None:
    logs = [
        RequestLog(i, float(i), float(i), "ok", ((i + 0.1, 1), (i + 0.1 + 0.01 * (1 + i % 2), 1)), i + 0.2, 4, 0, 2, 2)
        for i in range(20)
    ]
    logs.append(RequestLog(20, 20.0, 20.0, "timeout"))
    run = Run(tuple(logs), Window(0.0, 20.0), 21)
    found = observe(run, Sla.parse("ttft.p90<200ms,tpot.p50<15ms"), 3.0)
    assert found.state == "ok"
    assert found.requests == 21
    assert found.shares["ttft.p90<200ms"].met == 20
    assert found.shares["tpot.p50<15ms"].met == 10
    assert found.margin[0] == "tpot.p50<15ms"
    assert len(found.scores) == 8
    assert observe(replace(run, is_cut_short=True), Sla.parse("ttft.p90<200ms"), 1.0).state == "invalid"


@pytest.mark.parametrize("sla", ["ttft.mean<1s", "itl.p99<1ms", "ttft.max<1s"])
def test_terms_that_no_share_certifies_are_refused(sla: str) -> None:
    with pytest.raises(ConfigError, match="certifies"):
        check_sla(Sla.parse(sla))


def test_a_study_goes_on_where_it_ended(tmp_path: Path) -> None:
    path, world = tmp_path / "s.jsonl", World(hill, 0.02, 3)
    whole = tuned(world, study=Study(path, {"a": 1}))
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[: len(rows) // 2]) + '{"torn')
    asked = []

    def measure(ask: Ask) -> Observation:
        asked.append(ask)
        return world.measure(ask)

    predict = lambda setting: math.log(max(hill(setting), 0.01))  # noqa: E731
    again = Tuner(Job(DIMENSIONS, 600.0, predict), measure, Study(path, {"a": 1}, resume=True)).run()
    assert len(asked) == len(rows) - len(rows) // 2
    assert again.decision == whole.decision
    assert path.read_text().splitlines(keepends=True) == rows
    with pytest.raises(StudyError, match="another tuning"):
        Study(path, {"a": 2}, resume=True)
    with pytest.raises(StudyError, match="--resume"):
        Study(path, {"a": 1})
    path.write_text(rows[0] + "[]\n")
    with pytest.raises(StudyError, match="line 2"):
        Study(path, {"a": 1}, resume=True)


def recipe() -> Recipe:
    found = tuned(World(hill, 0.02, 1))
    made = recipe_of(
        found,
        sla="ttft.p95<1ms",
        model={"name": "m", "sha256": "a" * 64},
        machine={"fingerprint": "b" * 64, "cpu": "c"},
        provenance={"engine": "0", "given": {}},
    )
    assert made is not None
    return made


def test_a_recipe_is_read_as_it_was_written_and_nothing_else(tmp_path: Path) -> None:
    made, path = recipe(), tmp_path / "recipe.toml"
    write_recipe(made, path)
    again = read_recipe(path)
    assert again.document == made.document
    assert mismatches(again, machine="b" * 64, model="a" * 64) == []
    assert len(mismatches(again, machine="c" * 64, model="d" * 64)) == 2
    path.write_text(path.read_text().replace("rate_rps", "rate_rpm", 1))
    with pytest.raises(RecipeError, match="content_sha256"):
        read_recipe(path)
    path.write_text("recipe = ")
    with pytest.raises(RecipeError, match="TOML"):
        read_recipe(path)


def test_a_certified_setting_is_also_seen_where_it_was_not_tuned() -> None:
    study = Study(None, {})
    found = tuned(World(hill, 0.02, 1), study=study, budget_s=3600.0)
    assert found.decision.verdict == "certified"
    chosen = found.decision.chosen
    assert chosen is not None
    assert [one.what for one in found.stressed] == [what for what, _, _ in STRESSES]
    asked = {(ask.part, round(ask.load / chosen.load, 6)) for ask, _ in study.lines if ask.stage == "stress"}
    assert asked == {("holdout", 1.2), ("longer", 1.0), ("burstier", 1.0)}
    assert "with lengths +20 %" in "\n".join(lines(found))


def test_the_envelope_has_the_default_below_what_was_chosen() -> None:
    found = tuned(World(hill, 0.02, 1), budget_s=3600.0)
    made = recipe_of(found, sla="ttft.p95<1ms", model={}, machine={}, provenance={})
    assert made is not None
    assert found.default is not None
    assert found.default.holds
    assert [row["set"] for row in made.envelope] == [{}, dict(made.knobs)]
    assert made.envelope[0]["up_to_rps"] < made.envelope[1]["up_to_rps"]
    assert len(made.evidence["stressed"]) == 3


def test_without_a_shown_gain_the_default_is_certified_by_the_same_runs() -> None:
    study = Study(None, {})
    found = tuned(World(lambda setting: 1.0, 0.02, 5), predicts=False, study=study)
    assert found.decision.verdict == "default"
    assert found.default is not None
    assert found.decision.chosen is found.default
    assert found.default.runs == 5


def test_the_page_tells_all_and_needs_no_network() -> None:
    study = Study(None, {})
    found = tuned(World(hill, 0.02, 1), study=study)
    page = tune_page(found, study, {"command": "setpoint tune <m>"})
    assert page.count("<svg") == 3
    assert "certified" in page
    assert "setpoint tune &lt;m&gt;" in page
    assert "failed" not in page or "crashed" in page
    assert page.count("load ") >= len(study.lines)
    assert "src=" not in page
    assert "<script" not in page


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("recipe", 2, "version"),
        ("sla", 3, "sla"),
        ("knobs", [], "knobs"),
        ("model", {"sha256": "x"}, "model.sha256"),
        ("extra", 1, "extra"),
        ("machine", None, "machine"),
    ],
)
def test_a_recipe_is_refused_by_field(field: str, value: object, told: str) -> None:
    found = {**recipe().document, field: value}
    if value is None:
        del found[field]
    with pytest.raises(RecipeError, match=told):
        parse_recipe(found)


@pytest.mark.parametrize(("knobs", "told"), [({"dtype": "f32"}, "dtype"), ({"max_num_seqs": "8"}, "max_num_seqs")])
def test_a_recipe_sets_hot_knobs_only(knobs: dict[str, object], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        parse_recipe(replace(recipe(), knobs=knobs).document)


def test_budgets() -> None:
    assert parse_budget("10m") == 600
    assert parse_budget("1.5h") == 5400
    for text in ("10", "m", "-1s", "1e9s"):
        with pytest.raises(ConfigError, match="--budget"):
            parse_budget(text)
    with pytest.raises(ConfigError, match="--budget"):
        check_budget(5)
