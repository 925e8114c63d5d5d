"""MLflow's pages, as a person sees them in a browser: a real sweep and a real grid.

Screenshots go to $NFLAB_SCREENSHOTS if it is set, else to a temporary folder, whose path is
printed.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from playwright.sync_api import Locator, Page, expect, sync_playwright

from tests.conftest import Recorded
from tests.records import family
from tests.servers import MlflowServer

CHROMIUM = shutil.which("chromium")

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

PATIENCE_MS = 60_000
"""How long a page may take on a busy machine before it counts as broken."""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="there is no chromium: apt-get install -y --no-install-recommends chromium",
)


class Site:
    """MLflow's server over the store of a sweep called `small` and a grid."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.client = MlflowClient(address)

    def experiment_id(self, experiment: str) -> str:
        found = self.client.get_experiment_by_name(experiment)
        assert found is not None
        return str(found.experiment_id)

    def runs(self, experiment: str) -> tuple[Run, list[Run]]:
        """The parent and its children, in the order of their names."""
        return family(self.address, experiment)


@pytest.fixture(scope="module")
def site(recorded: Recorded) -> Iterator[Site]:
    """The session's small sweep and small grid in MLflow's server."""
    with MlflowServer(recorded.folder, store=recorded.uri) as server:
        yield Site(server.uri)


@pytest.fixture(scope="module")
def page(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page of a browser that has never been used."""
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=CHROMIUM,
            headless=True,
            args=FLAGS,
            viewport={"width": 1600, "height": 1000},
        )
        context.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        # An assistant opens over a third of the first page; a person closes it once.
        context.add_init_script(
            "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');"
            "localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');"
        )
        yield context.pages[0]
        context.close()


@pytest.fixture(scope="module")
def screenshot(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], None]:
    """Writes what the page shows as a PNG file of this name."""
    given = os.environ.get("NFLAB_SCREENSHOTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str) -> None:
        path = folder / f"{name}.png"
        page.screenshot(path=path)
        print(f"screenshot: {path}")

    return write


def open_page(page: Page, site: Site, route: str) -> None:
    """Opens a page of MLflow anew."""
    page.goto("about:blank")  # else only what follows the # changes, and nothing is loaded
    page.goto(f"{site.address}/#/{route}")


def open_view(page: Page, site: Site, experiment: str) -> None:
    """Follows the link in an experiment's description to all its runs, in columns."""
    open_page(page, site, f"experiments/{site.experiment_id(experiment)}/runs")
    link = page.get_by_role("link", name="All runs with their settings and results")
    address = link.get_attribute("href")
    assert address is not None
    open_page(page, site, address.partition("#/")[2])
    expect(header(page, "metrics.`test_top1`")).to_be_visible()


def header(page: Page, key: str) -> Locator:
    """The head of a column of the table of runs."""
    return page.locator(f'.ag-header-cell[col-id="{key}"]')


def row(page: Page, name: str) -> Locator:
    """The row of a run in the table."""
    return page.locator(".ag-row").filter(has=page.get_by_role("link", name=name, exact=True))


def expect_column(page: Page, key: str, expected: list[str]) -> None:
    """Waits until a column of the table of runs says this, from top to bottom."""
    page.wait_for_function(
        """([key, expected]) => {
            const cells = [...document.querySelectorAll(`.ag-cell[col-id="${key}"]`)];
            const row = cell => Number(cell.closest(".ag-row").getAttribute("row-index"));
            const said = cells.sort((a, b) => row(a) - row(b)).map(cell => cell.innerText.trim());
            return said.join() == expected.join();
        }""",
        arg=[key, expected],
    )


def expect_loaded(images: Locator, count: int) -> None:
    """Waits until so many images are shown, and none of them is an empty frame."""
    expect(images).to_have_count(count)
    for image in images.all():
        expect(image).to_have_js_property("complete", True)
        assert image.evaluate("image => image.naturalWidth") > 0


def test_the_list_of_experiments_says_what_each_asks(
    page: Page, site: Site, screenshot: Callable[[str], None]
) -> None:
    open_page(page, site, "experiments")
    for name, asked in (
        ("agc_sweep", "Which clipping, batch size"),
        ("clipping_vs_batch_size", "How does clipping carry"),
    ):
        line = page.get_by_role("row").filter(has=page.get_by_role("link", name=name, exact=True))
        expect(line).to_contain_text(asked)
    screenshot("experiments")


def test_a_sweep_opens_to_its_trials(
    page: Page, site: Site, screenshot: Callable[[str], None]
) -> None:
    _, trials = site.runs("agc_sweep")
    assert [str(run.info.run_name)[:4] for run in trials] == ["001 ", "002 ", "003 ", "004 "]
    open_view(page, site, "agc_sweep")
    row(page, "small").get_by_role("button").first.click()
    for run in trials:
        expect(page.get_by_role("link", name=str(run.info.run_name), exact=True)).to_be_visible()
    expect_column(page, "params.`kind`", ["sweep", *["trial"] * 4])
    screenshot("sweep")


@pytest.mark.parametrize(
    ("experiment", "key"),
    [
        ("agc_sweep", "params.`trial`"),
        ("agc_sweep", "metrics.`test_top1`"),
        ("clipping_vs_batch_size", "params.`cell`"),
        ("clipping_vs_batch_size", "params.`seed`"),
    ],
)
def test_columns_sort_runs(
    page: Page, site: Site, screenshot: Callable[[str], None], experiment: str, key: str
) -> None:
    kind, name = key.replace("`", "").split(".")
    parent, children = site.runs(experiment)
    known = [getattr(run.data, kind)[name] for run in children if name in getattr(run.data, kind)]
    if name in getattr(parent.data, kind):
        known.append(getattr(parent.data, kind)[name])
    missing = ["-"] * (len(children) + 1 - len(known))
    open_view(page, site, experiment)
    for reverse in (True, False):
        header(page, key).click()
        said = [str(value) for value in sorted(known, reverse=reverse)]
        expect_column(page, key, [*said, *missing])
    screenshot(f"{experiment}_by_{name}")


def test_runs_are_compared(page: Page, site: Site, screenshot: Callable[[str], None]) -> None:
    _, cells = site.runs("clipping_vs_batch_size")
    names = [str(run.info.run_name) for run in cells[:3]]
    open_view(page, site, "clipping_vs_batch_size")
    row(page, "clipping_vs_batch_size").get_by_role("button").first.click()
    for name in names:
        row(page, name).get_by_role("checkbox").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_role("heading", name="Comparing 3 Runs from 1 Experiment")).to_be_visible()
    for name in names:
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    screenshot("comparison")


@pytest.mark.parametrize(
    ("experiment", "figures"),
    [
        ("agc_sweep", ["top1.png", "learning_curves.png", "importances.png"]),
        ("clipping_vs_batch_size", ["clipping_vs_batch_size.png"]),
    ],
)
def test_a_parent_says_what_was_asked_and_found_with_the_figures(
    page: Page,
    site: Site,
    screenshot: Callable[[str], None],
    experiment: str,
    figures: list[str],
) -> None:
    parent, children = site.runs(experiment)
    route = f"experiments/{site.experiment_id(experiment)}/runs/{parent.info.run_id}"
    open_page(page, site, route)
    page.get_by_text("Show more", exact=True).click()
    note = page.locator("main")
    finished = [run for run in children if run.data.tags["outcome"] == "finished"]
    best = max(finished, key=lambda run: run.data.metrics["val_top1"])
    expect(note).to_contain_text("of dm_nf_resnet_digits on digits (1071 training images)")
    if experiment == "agc_sweep":
        expect(note).to_contain_text("4 trials")
        expect(note).to_contain_text(f"{best.info.run_name} with validation top-1")
        expect(note).to_contain_text(f"test top-1 {best.data.metrics['test_top1']:.2f} %")
        expect(note).to_contain_text(f"{len(finished)} finished")
    else:
        expect(note).to_contain_text("6 cells")
        expect(note).to_contain_text("batch size (128, 64); clipping (none, 0.08)")
        expect(note).to_contain_text("at the smallest batch (64) clipping matters little")
    for figure in figures:
        expect_loaded(note.locator(f'img[src*="path={figure}"]'), 1)
    page.get_by_text("Asked:").scroll_into_view_if_needed()
    screenshot(f"{experiment}_parent")


def test_a_figure_among_the_artifacts_is_shown(
    page: Page, site: Site, screenshot: Callable[[str], None]
) -> None:
    parent, _ = site.runs("agc_sweep")
    route = f"experiments/{site.experiment_id('agc_sweep')}/runs/{parent.info.run_id}/artifacts"
    open_page(page, site, route)
    page.get_by_text("top1.png", exact=True).first.click()
    expect_loaded(page.get_by_role("img", name="top1.png"), 1)
    screenshot("figure")


def test_the_dataset_of_a_sweep_is_shown(
    page: Page, site: Site, screenshot: Callable[[str], None]
) -> None:
    parent, _ = site.runs("agc_sweep")
    fingerprint = parent.data.tags["dataset_fingerprint"]
    open_page(
        page, site, f"experiments/{site.experiment_id('agc_sweep')}/runs/{parent.info.run_id}"
    )
    page.get_by_text(f"digits ({fingerprint})").first.click()
    expect(page.get_by_text("train images").first).to_be_visible()
    screenshot("dataset")


def best_run(runs: list[Run]) -> Run:
    """Of those that finished the one with the highest validation top-1, the first of equals."""
    finished = [run for run in runs if run.data.tags["outcome"] == "finished"]
    return max(finished, key=lambda run: run.data.metrics["val_top1"])


def test_the_best_of_a_sweep_and_of_a_grid_are_registered_and_the_better_is_marked(
    page: Page, site: Site, screenshot: Callable[[str], None]
) -> None:
    best = [best_run(site.runs(name)[1]) for name in ("agc_sweep", "clipping_vs_batch_size")]
    marked = best_run(best)
    for version, run in enumerate(best, 1):
        open_page(page, site, f"models/nflab-digits/versions/{version}")
        expect(page.get_by_text(str(run.info.run_name)).first).to_be_visible()
        top1 = f"{run.data.metrics['val_top1']:.4f}"
        expect(page.get_by_text(top1).first).to_be_visible()
        expect(page.get_by_text("@ best")).to_have_count(1 if run is marked else 0)
        screenshot(f"model_{version}")
