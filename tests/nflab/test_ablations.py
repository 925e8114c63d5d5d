"""What ablations say, against results whose answers are known beforehand."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nflab.analysis import augmentation, clipping, layers, learning_rate
from nflab.analysis.findings import groups, software, summarise, twin
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import as_text, flat

PARTS = ("stem", "stage1", "stage2", "stage3", "head")


def row(test: float, val: float | None = None, **settings: Any) -> dict[str, Any]:
    """A cell's row, as MLflow gives it: parameters are text."""
    params = {**flat(Config()), **settings}
    return {
        **{name: as_text(value) for name, value in params.items()},
        "val_top1": test if val is None else val,
        "test_top1": test,
        "outcome": "finished",
        "cell": repr(sorted(settings.items())),
    }


def figure_2(results: dict[tuple[int, float | None], float]) -> pd.DataFrame:
    """Rows of two seeds, half a point above and below each result; the twin always has 95."""
    rows = []
    for seed, shift in ((0, 0.5), (1, -0.5)):
        for (size, c), top1 in results.items():
            rows.append(row(top1 + shift, batch_size=size, clipping=c, seed=seed))
        for size in {size for size, _ in results}:
            twins = {"model": "preact_resnet_digits", "clipping": None}
            rows.append(row(95, batch_size=size, seed=seed, **twins))
    return pd.DataFrame(rows)


AS_PAPER: dict[tuple[int, float | None], float] = {
    **{(16, None): 97.0, (16, 0.04): 96.0, (16, 0.08): 97.5, (16, 0.16): 98.0},
    **{(64, None): 60.0, (64, 0.04): 96.0, (64, 0.08): 97.0, (64, 0.16): 90.0},
    **{(128, None): 10.0, (128, 0.04): 95.0, (128, 0.08): 93.9, (128, 0.16): 30.0},
}


def holds(results: dict[tuple[int, float | None], float]) -> list[bool]:
    found = clipping.analyse(figure_2(results), "made up")
    return [line.startswith("holds") for line in found.text]


def test_the_papers_findings_hold_where_they_do() -> None:
    found = clipping.analyse(figure_2(AS_PAPER), "made up")
    assert [line.split(":")[0] for line in found.text] == ["holds"] * 3
    assert "no clipping reaches 97.0 %, the best clipping (0.16) 98.0 %" in found.text[0]
    assert "no clipping reaches 10.0 %, the best clipping (0.04) 95.0 %" in found.text[1]
    assert "0.16 at 16, 0.08 at 64, 0.04 at 128" in found.text[2]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({(16, None): 94.9}, [False, True, True]),
        ({(16, None): 95.0}, [True, True, True]),
        ({(128, None): 55.1}, [True, False, True]),
        ({(128, None): 55.0}, [True, True, True]),
        ({(128, 0.16): 94.5}, [True, True, False]),  # 128 would stand what 64 does not
        ({(64, 0.08): 94.9, (128, 0.08): 94.1}, [True, True, False]),
    ],
)
def test_each_statement_fails_by_itself(
    change: dict[tuple[int, float | None], float], expected: list[bool]
) -> None:
    assert holds({**AS_PAPER, **change}) == expected


def test_clipping_is_chosen_on_validation_and_shown_on_test() -> None:
    rows = figure_2(AS_PAPER)
    chosen = (rows.batch_size == "128") & (rows.clipping == "0.08")
    rows.loc[chosen, "val_top1"] = 99.0
    found = clipping.analyse(rows, "made up")
    assert "the best clipping (0.08) 93.9 %" in found.text[1]


def test_a_missing_or_failed_cell_is_counted_and_never_taken_for_a_result() -> None:
    rows = figure_2(AS_PAPER)
    chosen = (rows.batch_size == "128") & (rows.clipping == "none") & (rows.seed == "1")
    chosen &= rows.model == "dm_nf_resnet_digits"
    rows.loc[chosen, ["outcome", "test_top1", "val_top1"]] = ["failed", np.nan, 99.0]
    table = clipping.analyse(rows, "made up").table
    (found,) = (
        table[(table.batch_size == 128) & np.isinf(table.clipping)]
        .query("network == 'NF'")
        .itertuples()
    )
    assert (found.seeds, found.unfinished, found.diverged) == (1, 1, 0)
    said = clipping.analyse(rows, "made up").text
    assert [line.split(":")[0] for line in said] == ["cannot be told"] * 3 + ["holds"]
    assert said[0].endswith("have no result: clipping none at 128")
    assert (found.val_mean, found.test_mean) == (10.5, 10.5)


def test_without_any_result_the_findings_do_not_hold() -> None:
    rows = figure_2(AS_PAPER).assign(outcome="failed", test_top1=np.nan, val_top1=np.nan)
    assert not any(line.startswith("holds") for line in clipping.analyse(rows, "made up").text)


def test_a_cell_of_its_own_hides_no_finding() -> None:
    more = row(90, clipping=0.02, batch_size=16)
    rows = pd.concat([figure_2(AS_PAPER), pd.DataFrame([more])], ignore_index=True)
    found = clipping.analyse(rows, "made up").text
    assert found[1:] == clipping.analyse(figure_2(AS_PAPER), "made up").text
    assert found[0].startswith("cannot be told: what needs runs that have no result: clipping 0.02")


def test_one_batch_size_tells_nothing_of_batch_sizes() -> None:
    rows = figure_2(AS_PAPER)
    (said,) = clipping.analyse(rows[rows.batch_size == "16"], "made up").text
    assert said.startswith("cannot be told: there is one batch size only, 16: no clipping reaches")


def test_a_diverged_run_counts_as_nothing_classified() -> None:
    rows = pd.DataFrame([row(90, seed=0), row(80, seed=1)])
    rows.loc[1, "outcome"] = "diverged"
    (found,) = summarise(rows, ("batch_size",)).itertuples()
    assert (found.seeds, found.diverged, found.test_mean, found.val_mean) == (2, 1, 45.0, 45.0)
    assert (found.test_low, found.test_high) == (0, 100)  # no accuracy lies beyond
    near = pd.DataFrame([row(50, seed=0), row(51, seed=1)])
    (close,) = summarise(near, ("batch_size",)).itertuples()
    # Student's t of one degree of freedom at 95 % is 12.706; the half-width is t * std / sqrt(2).
    half = 12.706 * np.std([50, 51], ddof=1) / np.sqrt(2)
    assert close.test_high == pytest.approx(50.5 + half, rel=1e-3)


def test_cells_that_differ_in_more_than_what_varies_never_mix() -> None:
    rows = pd.DataFrame(
        [
            *(row(90, clipping=c, seed=s) for c in (None, 0.1) for s in (0, 1)),
            row(95, model="preact_resnet_digits", clipping=None),
            *(row(80, clipping=c, epochs=7) for c in (None, 0.1)),
            row(99, clipping=0.1, dataset="digits:0-4"),
        ]
    )
    rows["dataset_fingerprint"] = "a"
    moved = {"num_workers": "2", "name": "x", "storage": "y", "diagnostics": "True"}
    rows.loc[1, list(moved)] = list(moved.values())
    found = groups(rows, clipping.VARIED)
    assert [(len(group), common["epochs"]) for common, group in found] == [
        (5, "40"),
        (2, "7"),
        (1, "40"),
    ]


def test_cells_that_compute_the_same_are_of_one_group() -> None:
    rows = pd.DataFrame(
        [
            row(90, augmentation_layers=2),
            row(91, augmentation_layers=4, sam_fraction=0.5, partners="fresh"),
            row(92, clipping=None, unclipped=()),
            row(93, clipping=0.1, unclipped=("head",)),
            row(94, augmentation_level=1, augmentation_layers=2),
            row(95, augmentation_level=1, augmentation_layers=3),
            row(96, mixup=True),
            row(97, mixup=True, seed=1),
        ]
    )
    # From before there was this setting: pairs were drawn otherwise.
    rows.loc[[0, 6], "partners"] = None
    assert [len(group) for _, group in groups(rows, clipping.VARIED)] == [4, 1, 1, 1, 1]


def test_a_cell_that_reads_no_setting_compares_with_each_of_its_values() -> None:
    both = (("dm_nf_resnet_digits", 0.16), ("preact_resnet_digits", None))
    rows = pd.DataFrame(
        [
            row(90, model=model, clipping=c, augmentation_level=level, augmentation_layers=layers)
            for model, c in both
            for level, layers in ((0, 3), (5, 3), (5, 1))
        ]
        + [row(80, dataset="digits:0-4", augmentation_layers=3)]  # of no such cell
    )
    found = groups(rows, augmentation.VARIED)
    assert [
        (
            common["augmentation_layers"],
            sorted(zip(group.model, group.augmentation_level, strict=True)),
        )
        for common, group in found
    ] == [
        (layers, sorted((model, level) for model, _ in both for level in ("0", "5")))
        for layers in ("3", "1")
    ] + [("4", [("dm_nf_resnet_digits", "0")])]


def test_results_of_other_software_are_counted() -> None:
    rows = pd.DataFrame([row(90, seed=seed) for seed in range(4)])
    own = {"code_fingerprint": "a", "torch": "2.11.0"}
    assert software(rows, own) == software(rows) == []  # nothing is known
    rows["code_fingerprint"], rows["torch"] = ["a", "b", "c", "b"], ["2.11.0", None, "2.10.0", None]
    rows.loc[3, "outcome"] = "failed"
    assert software(rows, own) == [
        "2 of 3 results are of other versions of the code",
        "1 of 3 results are of other versions of torch",
    ]
    assert software(rows) == [
        "3 results of 3 versions of the code",
        "3 results of 2 versions of torch (2.10.0, 2.11.0)",
    ]
    assert software(rows[:1], own) == []


def every_subset(noise: float) -> pd.DataFrame:
    """The head costs 5 points, the stem nothing, each stage gives 10; give or take some noise."""
    rng = np.random.default_rng(0)

    def top1(clipped: frozenset[str]) -> float:
        stages = sum(part.startswith("stage") for part in clipped)
        return 60.0 - 5 * ("head" in clipped) + 10 * stages + noise * rng.standard_normal()

    return pd.DataFrame(
        row(top1(subset), unclipped=tuple(p for p in PARTS if p not in subset), seed=seed)
        for seed in range(4)
        for subset in layers.every_subset(PARTS)
    )


def test_what_clipping_each_part_gives() -> None:
    rows = every_subset(noise=0.1)
    assert len(rows) == 4 * 2**5
    found = layers.analyse(rows, "made up")
    head, stem, *stages = found.text
    assert head.startswith("never clip the final linear layer: holds;")
    assert "4 seeds" in head
    assert stem.startswith("the first convolution may go unclipped: holds;")
    assert [line.split(";")[0] for line in stages] == [
        f"stage{n} must be clipped: holds" for n in (1, 2, 3)
    ]
    assert found.table.clipped.iloc[0] in ("stem+stage1+stage2+stage3", "stage1+stage2+stage3")
    assert layers.ranked(rows)[0]["unclipped"] in (("head",), ("stem", "head"))


def test_noise_is_no_finding_and_the_contrary_is_said() -> None:
    found = layers.analyse(every_subset(noise=100.0), "made up")
    assert all(": cannot be told;" in line for line in found.text)
    turned = every_subset(noise=0.1)
    turned["test_top1"] = 100 - turned.test_top1
    judged = [line.split(";")[0].split(": ")[1] for line in layers.analyse(turned, "x").text]
    assert judged == ["does not hold", "holds", *["does not hold"] * 3]


def test_one_seed_is_no_sample_however_many_pairs_it_has() -> None:
    rows = every_subset(noise=1.0)
    found = layers.analyse(rows[rows.seed == "0"], "made up")
    assert all("in one seed, which proves nothing" in line for line in found.text)


def test_subsets_are_read_and_ordered() -> None:
    subsets = layers.every_subset(PARTS)
    assert len(set(subsets)) == 32
    assert subsets[0] == {"stem", "stage1", "stage2", "stage3"}
    assert layers.read_subset("none", PARTS) == frozenset()
    assert layers.read_subset("stem+head", PARTS) == {"stem", "head"}
    with pytest.raises(ConfigError, match="unknown part 'stage9'"):
        layers.read_subset("stem+stage9", PARTS)
    assert layers.parts_of("dm_nf_resnet_digits") == PARTS
    assert layers.parts_of("dm_nfnet_f0") == ("stem", *(f"stage{n}" for n in range(1, 5)), "head")


def test_the_ladder_and_the_curve_of_augmentation() -> None:
    networks = [
        {"model": "dm_nf_resnet_digits", "clipping": 0.16},
        {"model": "preact_resnet_digits", "clipping": None},
    ]
    cells = augmentation.settings(networks, (0, 5, 10), 5, (0, 1))
    # Four steps and two further levels, two networks, two seeds.
    assert len({str(cell) for cell in cells}) == len(cells) == 6 * 2 * 2

    def top1(cell: dict[str, Any]) -> float:
        level = cell["augmentation_level"]
        return 90.0 + cell["mixup"] - 2 * cell["cutmix"] - abs(level - 5) + cell["seed"] / 10

    found = augmentation.analyse(pd.DataFrame(row(top1(c), **c) for c in cells), "made up")
    assert any(
        line.startswith("NF above batch norm, RandAugment of level 5 with MixUp + CutMix: +0.00")
        for line in found.text
    )
    ladder = [line for line in found.text if line.startswith("NF: + MixUp")]
    assert len(ladder) == 1
    for gain in ("+ MixUp +1.00", "+ RandAugment +5.00", "+ CutMix -2.00"):
        assert gain in ladder[0]
    assert any(line.startswith("NF: RandAugment of level 5 does best") for line in found.text)


def test_other_clippings_are_other_groups_with_the_same_twin() -> None:
    networks = [
        {"model": "dm_nf_resnet_digits", "clipping": 0.16},
        {"model": "dm_nf_resnet_digits", "clipping": 0.01},
        {"model": "preact_resnet_digits", "clipping": None},
    ]
    rows = pd.DataFrame(
        row(95.0 if cell["clipping"] == 0.16 else 15.0, **cell)
        for cell in augmentation.settings(networks, (0,), 4, (0,))
    )
    found = groups(rows, augmentation.VARIED)
    assert [(common["clipping"], len(group)) for common, group in found] == [
        ("0.16", 8),
        ("0.01", 8),
    ]
    means = [augmentation.analyse(group, "x").table.test_mean.max() for _, group in found]
    assert means == [95.0, 15.0]


def test_twins() -> None:
    assert twin("dm_nf_resnet50") == "preact_resnet50"
    with pytest.raises(ConfigError, match="no batch-normalised twin"):
        twin("dm_nfnet_f0")


@pytest.mark.parametrize(
    ("module", "rows"),
    [(clipping, figure_2(AS_PAPER)), (clipping, figure_2(AS_PAPER).assign(outcome="failed"))],
)
def test_figures_are_drawn_of_any_rows(module: Any, rows: pd.DataFrame, tmp_path: Path) -> None:
    for name, draw in module.analyse(rows, "made up").drawings.items():
        draw(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG"


def over_rates(results: dict[str, list[float]], size: int = 128) -> pd.DataFrame:
    """Rows of one seed: what each line reaches at the base rates 0.4, 0.8 and 1.6."""
    lines: dict[str, dict[str, Any]] = {
        "none": {"clipping": None},
        "agc": {"clipping": 0.08},
        "twin": {"model": "preact_resnet_digits", "clipping": None},
    }
    return pd.DataFrame(
        row(top1, batch_size=size, base_learning_rate=rate, seed=0, **lines[line])
        for line, reached in results.items()
        for rate, top1 in zip((0.4, 0.8, 1.6), reached, strict=True)
    )


def test_rates_are_compared_each_at_its_best() -> None:
    found = learning_rate.analyse(
        over_rates({"none": [80, 85, 10], "agc": [90, 94, 93], "twin": [88, 91, 95]}), "made up"
    )
    assert found.text == [
        "batch 128, each at its best base rate: batch norm 95.0 % (at 1.6), "
        "clipping 0.08 94.0 % (at 0.8), no clipping 85.0 % (at 0.8)",
        "batch 128: without clipping the network learns up to a base rate of 0.8; at its best rate "
        "it is 9.0 points below that with clipping",
    ]
    assert len(found.table) == 9


def test_a_rate_is_chosen_on_validation_and_shown_on_test() -> None:
    rows = over_rates({"none": [80, 85, 10], "agc": [90, 94, 93]})
    rows.loc[rows.clipping == "0.08", "val_top1"] = [97, 95, 96]
    text = " ".join(learning_rate.analyse(rows, "made up").text)
    assert "clipping 0.08 90.0 % (at 0.4)" in text
    assert "5.0 points below" in text


def test_a_rate_at_which_training_diverges_is_none_at_which_it_learns() -> None:
    rows = over_rates({"none": [80, 85, 99], "agc": [90, 94, 93]})
    rows.loc[(rows.clipping == "none") & (rows.base_learning_rate == "1.6"), "outcome"] = "diverged"
    assert "learns up to a base rate of 0.8" in learning_rate.analyse(rows, "made up").text[1]


def test_rates_are_drawn_a_panel_for_each_batch_size(tmp_path: Path) -> None:
    rows = pd.concat(
        over_rates({"none": [80, 85, 10], "agc": [90, 94, 93], "twin": [88, 91, 95]}, size)
        for size in (16, 128)
    )
    drawn = []
    original = Figure.subplots

    def spy(self: Figure, *args: Any, **named: Any) -> Any:
        drawn.append(original(self, *args, **named))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "subplots", spy)
        found = learning_rate.analyse(rows, "made up")
        found.drawings["learning_rate"](tmp_path / "a.png")
    (panels,) = drawn
    assert [axes.get_title() for axes in panels[0]] == ["batch 16", "batch 128"]
    labels = [line.get_label() for line in panels[0][1].get_lines()]
    assert sorted(labels) == ["NF, clipping 0.08", "NF, no clipping", "batch norm"]
    none = next(a for a in panels[0][1].get_lines() if a.get_label() == "NF, no clipping")
    assert none.get_xdata().tolist() == [0.4, 0.8, 1.6]
    assert none.get_ydata().tolist() == [80, 85, 10]


def test_the_cells_of_the_learning_rate_are_three_lines_at_each_batch_size() -> None:
    cells = learning_rate.settings("dm_nf_resnet_digits", {16: 0.32, 128: 0.08}, (1.6, 0.8), [0])
    assert len(cells) == 2 * 2 * 3
    assert [cell["batch_size"] for cell in cells] == [128] * 6 + [16] * 6  # the most telling first
    at = {(c["batch_size"], c["clipping"]) for c in cells if c["model"] == "dm_nf_resnet_digits"}
    assert at == {(16, None), (16, 0.32), (128, None), (128, 0.08)}
