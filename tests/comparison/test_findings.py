"""The page of findings, and the number that comparisons quote, are what the records hold."""

import json

import pytest

from toolkit.comparison.decide import SEED_SPREAD
from toolkit.files import ROOT

MEASURED = ROOT / "data_recipes" / "measured"
PAGE = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")


def record(name):
    return json.loads((MEASURED / name).read_text(encoding="utf-8"))


def test_the_spread_that_a_comparison_of_one_seed_quotes_is_the_measured_one():
    runs = record("seeds_pocket.json")["earlier"]["runs"]
    same = [run["sums"] for run in runs if run["seed"] == 3407]
    assert max(same) - min(same) == pytest.approx(SEED_SPREAD)
    assert f"**{100 * SEED_SPREAD:.0f} points from two steps**" in PAGE
    assert f"up to {100 * SEED_SPREAD:.0f} points apart" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_seeds_is_the_record():
    rows = [
        f"| {run['learning_rate']:g} | {run['steps']} | {run['rows_per_step']} | {run['seed']} | {run['sums']:.0%} "
        f"| {run['chat']:.0%} | {run['kl']:.2f} |"
        for run in record("seeds_pocket.json")["runs"]
    ]
    assert [line for line in PAGE.splitlines() if line.startswith("| 0.00")] == rows


def test_the_table_of_trainings_of_the_sweep_is_the_record():
    trainings = record("sweep_pocket.json")["trainings"]
    for share in sorted({training["reasoning_share"] for training in trainings}):
        same = [training for training in trainings if training["reasoning_share"] == share]
        sums, chat = (" / ".join(f"{100 * training[key]:.0f}" for training in same) for key in ("sums", "chat"))
        kl = " / ".join(f"{training['kl']:.2f}" for training in same)
        assert f"| {share:.0%} | {sums} | {chat} | {kl} |" in PAGE


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readmes_show_the_sweep_of_the_record(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    result = record("sweep_pocket.json")
    for row in result["rows"]:
        sums = [100 * float(row[f"thinking/accuracy{end}"]) for end in ("", ".low", ".high")]
        chat = 100 * float(row["non_thinking/accuracy/chat"])
        assert f"| {sums[0]:.0f}% [{sums[1]:.0f}, {sums[2]:.0f}] | {chat:.0f}% |" in text, row["label"]
    assert result["commit"] in text
    half = [f"{100 * training['sums']:.0f}" for training in result["trainings"] if training["reasoning_share"] == 0.5]
    assert ("{}, {} and {}%" if name == "README.md" else "{}%、{}% 和 {}%").format(*half) in text


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readmes_show_the_sums_of_the_record(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    between = record("blend_pocket.json")["compared"][0]
    assert between["shares"] == [0.25, 0.5, 0.75]
    assert between["sums"]["rank_correlation"] == 1
    for which in ("predicted", "trained"):
        means = [f"{100 * value:.0f}" for value in between["sums"][which]]
        assert ("{}, {} and {}%" if name == "README.md" else "{}%、{}% 和 {}%").format(*means) in text


def test_the_table_of_shares_of_general_data_is_the_record():
    for run in record("smollm2.json")["runs"]:
        change = [100 * run["general"]["difference"][end] for end in ("value", "low", "high")]
        row = (
            f"| {run['share_of_general_data']:.0%} | {run['identity']['tuned']['value']:.0%} "
            f"| {run['style']['tuned']['value']:.0%} | {change[0]:.0f} [{change[1]:.0f}, {change[2]:+.0f}] "
            f"| {run['kl']['value']:.2f} |"
        )
        assert row in PAGE


def test_the_table_of_the_dial_is_the_record():
    for point in record("dial_pocket.json")["points"]:
        cells = [f"{point.get('forgetting/kl', 0):.2f}"]
        for key in ("non_thinking/accuracy/chat", "thinking/accuracy"):
            ends = [100 * point[f"{key}{end}"] for end in ("", ".low", ".high")] if key in point else None
            cells.insert(0, f"{ends[0]:.0f}% [{ends[1]:.0f}, {ends[2]:.0f}]" if ends else "no replies")
        row = " | ".join([point["label"].removeprefix("scale "), *cells])
        assert f"| {row} |" in PAGE


def test_the_table_of_sums_is_the_record():
    result, trainings = record("blend_pocket.json"), record("sweep_pocket.json")["trainings"]
    seeds = sorted({summed["seed"] for summed in result["sums"]})
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        cells = []
        for key, text in (("sums", "{:.0f}"), ("kl", "{:.2f}")):
            factor = 100 if key == "sums" else 1
            for runs in (result["sums"], trainings):
                same = {run["seed"]: run[key] for run in runs if run["reasoning_share"] == share}
                cells.append(" / ".join(text.format(factor * same[seed]) for seed in seeds if seed in same))
        extrapolated = ", extrapolated" if share in (0, 1) else ""
        assert f"| {share:.0%}{extrapolated} | {' | '.join(cells)} |" in PAGE


def test_what_is_said_of_sums_is_computed_from_the_record():
    result = record("blend_pocket.json")
    between, said = result["compared"][0], result["verdict"]
    assert said[0].startswith("Recommended: 75% summed reasoning: reasoning questions with thinking 23% → 86%")
    assert "it ties with 90% summed reasoning" in said[1]
    assert "recommends: 23% → 86%, a tie with 90%" in PAGE
    assert f"mean error {100 * between['sums']['mean_absolute_error']:.0f} points" in PAGE
    assert f"rank correlation of the means {between['sums']['rank_correlation']:.1f}" in PAGE
    assert f"regret {100 * between['regret']:.0f} points" in PAGE
    means = [[f"{100 * value:.0f}" for value in between["sums"][which]] for which in ("predicted", "trained")]
    assert "{}, {} and {}% of sums against {}, {} and {}%".format(*means[0], *means[1]) in PAGE
    trainings = record("sweep_pocket.json")["trainings"]
    for share, mean in zip(between["shares"], between["sums"]["predicted"], strict=True):
        trained = [run["sums"] for run in trainings if run["reasoning_share"] == share]
        assert min(trained) < mean < max(trained)
    lower, all_of_them = between["kl_lower_in"]
    assert f"closer to the base in {lower} of {all_of_them}" in PAGE


def cells(figures):
    """Name and style of 16 (mean and each seed), general questions against the base in points, KL: as the page gives them."""
    counts = []
    for what in ("name", "style"):
        each = " / ".join(f"{16 * value:.0f}" for value in figures[what]["each"])
        counts.append(f"{16 * figures[what]['value']:.1f} ({each})")
    change = [f"{100 * figures['general'][end]:+.0f}" for end in ("value", "low", "high")]
    return f"{counts[0]} | {counts[1]} | {change[0]} [{change[1]}, {change[2]}] | {figures['kl']['value']:.2f} |"


def test_the_table_of_smollm2s_dial_is_the_record_and_no_figure_is_of_one_seed():
    points = record("dial_smollm2.json")["points"]
    assert {point["share_of_general_data"] for point in points} >= {0.0, 0.5}
    for point in points:
        assert {len(point[what]["each"]) for what in ("name", "style", "general", "kl")} == {3}
        assert f"| {point['share_of_general_data']:.0%} | {point['scale']:g} | {cells(point)}" in PAGE


def test_the_sum_of_smollm2s_runs_is_the_record_beside_the_runs_trained_at_that_share():
    assert f"| summed to 50% | {cells(record('blend_smollm2.json')['sum'])}" in PAGE
    points = record("dial_smollm2.json")["points"]
    [trained] = [point for point in points if (point["share_of_general_data"], point["scale"]) == (0.5, 1.0)]
    assert f"| trained on 50% | {cells(trained)}" in PAGE


def test_the_table_of_smollm2s_probe_is_the_record_with_its_errors():
    found = record("probe_smollm2.json")
    for kind, rows in (("summed", found["sums"]), ("trained", found["trained"])):
        assert [row["share_of_general_data"] for row in rows] == [0.25, 0.5, 0.75]
        for row in rows:
            assert f"| {row['share_of_general_data']:.0%} {kind} | {cells(row)}" in PAGE
    for name, unit, digits in (("name", 16, 1), ("style", 16, 1), ("general", 100, 0), ("kl", 1, 2)):
        error = found["agreement"][name]
        figures = [f"{unit * error[key]:.{digits}f}" for key in ("mean_error", "largest_error")]
        assert f"| {name} | {error['rank_correlation']:.1f} | {figures[0]} | {figures[1]} |" in PAGE


def test_the_scales_of_the_pocket_probes_sum_are_the_record():
    points = [
        point for point in record("blend_pocket.json")["scales_of_75%"]["points"] if "sums" in point and point["scale"]
    ]
    sums = [f"{100 * point['sums']['value']:.0f}" for point in points]
    distances = ", ".join(f"{point['kl']['value']:.2f}" for point in points)
    said = " ".join(PAGE.split())
    assert f"{', '.join(sums[:-1])} and {sums[-1]}% of sums (KL {distances}): scale 1" in said


def test_the_table_of_forgetting_limits_is_the_record():
    for row in record("forgetting_limit.json")["limits"]:
        steps = " / ".join(str(run["kept_step"]) for run in row["runs"])
        assert f"| limit {row['limit']:g} | {steps} | {cells(row)}" in PAGE


def test_the_table_of_conflicts_is_the_record():
    found = record("conflicts.json")
    for model in ("smollm2", "pocket"):
        for name, source in found[model]["sources"].items():
            distance = " / ".join(f"{value:.2f}" for value in source["kl_alone"])
            signals = f"{source['mean_loss']:.2f} | {source['conflicts']:.1%} | {source['conflicts_lowest_15%']:.1%}"
            assert f"| {model} | {name.removesuffix('_sample')} | {signals} | {distance} |" in PAGE


def test_the_table_of_ways_to_score_is_the_record():
    for name, way in record("smollm2_ways.json")["ways"].items():
        cells = [name]
        for model in ("base", "tuned"):
            ends = [100 * way[model][end] for end in ("value", "low", "high")] if model in way else None
            cells.append(f"{ends[0]:.0f}% [{ends[1]:.0f}, {ends[2]:.0f}]" if ends else "no replies")
        assert f"| {' | '.join(cells)} | {way['cpu_seconds']:.0f} |" in PAGE


def test_the_table_of_silences_is_the_record():
    for name, seconds in record("silences.json")["verbs"].items():
        assert f"| `{name}` | {seconds['before']} | {seconds['after']} |" in PAGE


def test_forecasts_of_time_are_right_to_a_quarter_and_the_table_of_them_is_the_record():
    found = record("time_forecast.json")
    for name, run in found["runs"].items():
        assert len(run["tries"]) == 3
        for timed in run["tries"]:
            parts = [timed[which][part] for part in ("training", "validation") for which in ("forecast", "measured")]
            assert timed["error"] == pytest.approx((parts[0] + parts[2]) / (parts[1] + parts[3]) - 1, abs=0.01)
            assert abs(timed["error"]) <= 0.25
            cells = " | ".join(f"{seconds:.1f}" for seconds in parts)
            assert f"| {name} | {cells} | {timed['error']:+.0%} |" in PAGE
    assert found["command"] in PAGE


def test_every_record_that_the_page_names_is_there_with_its_command_and_conditions():
    for name in (
        "seeds_pocket.json",
        "sweep_pocket.json",
        "dial_pocket.json",
        "blend_pocket.json",
        "blend_smollm2.json",
        "probe_smollm2.json",
        "dial_smollm2.json",
        "forgetting_limit.json",
        "conflicts.json",
        "smollm2.json",
        "label_rule.json",
        "replay.json",
        "silences.json",
        "time_forecast.json",
    ):
        assert name in PAGE
        assert {"date", "commit"} <= (
            set(record(name)) | {k for v in record(name).values() if isinstance(v, dict) for k in v}
        )
