"""The table of prices, and its renewal by `make prices`."""

import functools
import http.server
import importlib
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from nflab.cluster import prices
from tests.conftest import ROOT

CAPABILITY = {
    **{"K520": 3.0, "K80": 3.7, "M60": 5.2, "V100": 7.0},
    **{"T4": 7.5, "A100": 8.0, "A10G": 8.6, "L4": 8.9, "L40S": 8.9, "H100": 9.0},
}
"""Of AWS's GPUs, from https://developer.nvidia.com/cuda-gpus; newer ones have more."""

CATALOG = ROOT / "tests" / "stored" / "skypilot_aws_vms.csv"
"""Lines of SkyPilot's catalog of AWS's prices as they stand there (skypilot-org/skypilot-catalog,
catalogs/v8/aws/vms.csv, commit 00148f2): what AWS asked for these machines."""

BEFORE = """\
# What machines cost.
# disk: 0.08
# As of long ago: elsewhere
region,instance_type,vcpus,gpus,gpu,usd_per_hour,spot_usd_per_hour
us-east-1,g5.2xlarge,8,1,A10G,1.3,0.6
us-east-1,g5.48xlarge,192,8,A10G,16.288,5.867
us-east-1,g6f.2xlarge,8,0.25,L4,0.475,0.17
us-east-1,gone.large,2,0,,0.5,
us-east-1,m7i.large,2,0,,0.1008,
# And below.
"""


class Renewal:
    """`cluster/prices.py` on a table and a launcher file of a test."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        patch.syspath_prepend(str(ROOT / "cluster"))
        self._script, self._patch = importlib.import_module("prices"), patch
        self.too_old: set[str] = self._script.TOO_OLD
        self.table, self.launcher = folder / "prices.csv", folder / "launcher.yaml"
        patch.setattr(self._script, "TABLE", self.table)
        self.table.write_text(BEFORE)
        self.write(yaml.safe_load((ROOT / "cluster" / "gpu.yaml").read_text()))

    def write(self, content: dict[str, Any]) -> None:
        self.launcher.write_text(yaml.safe_dump(content))

    def renew(self, source: Path | str = CATALOG) -> list[str]:
        """The table's lines afterwards."""
        self._patch.setattr(sys, "argv", ["prices.py", str(self.launcher), str(source)])
        self._script.main()
        return self.table.read_text().splitlines()


@pytest.fixture
def renewal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Renewal:
    return Renewal(tmp_path, monkeypatch)


def test_every_gpu_of_the_table_is_one_that_the_pinned_torch_can_use(renewal: Renewal) -> None:
    gpus = {
        row["gpu"].split()[0].split("-")[0]
        for row in prices._table(prices.TABLE, "instance_type").values()
        if row["gpu"]
    }
    assert gpus
    old = {gpu for gpu, capability in CAPABILITY.items() if capability < 7.5}
    assert gpus & old == set()
    assert renewal.too_old == old


def test_the_stored_lines_say_what_the_table_says(renewal: Renewal) -> None:
    """By the rule that the table in use was made by."""
    renewal.table.write_text(prices.TABLE.read_text())
    renewal.renew()
    renewed = [line.split(",") for line in renewal.table.read_text().splitlines()]
    before = [line.split(",") for line in prices.TABLE.read_text().splitlines()]
    for name in ("g5.2xlarge", "g5.48xlarge", "p4d.24xlarge", "p4de.24xlarge", "p5.48xlarge"):
        ((*_, price, spot),) = [fields for fields in renewed if fields[1:2] == [name]]
        assert [(price, spot)] == [(f[5], f[6]) for f in before if f[1:2] == [name]]


def test_a_renewal_keeps_what_the_catalog_lacks_and_tells_what_changed(
    renewal: Renewal, capsys: pytest.CaptureFixture[str]
) -> None:
    *comments, as_of, header = renewal.renew()[:5]
    assert comments == ["# What machines cost.", "# disk: 0.08", "# And below."]
    assert as_of.startswith("# As of 2")
    assert as_of.endswith(f": {CATALOG}; older, for it lacks them: us-east-1 gone.large")
    assert header == BEFORE.splitlines()[3]
    assert renewal.table.read_text().splitlines()[5:] == [
        "us-east-1,g5.2xlarge,8,1,A10G,1.212,0.504",
        "us-east-1,g5.48xlarge,192,8,A10G,16.288,5.867",
        "us-east-1,g6f.2xlarge,8,0.25,L4,0.475,0.173",
        "us-east-1,p4d.24xlarge,96,8,A100,21.957642,8.000",
        "us-east-1,p4de.24xlarge,96,8,A100-80GB,27.44705,9.312",
        "us-east-1,p5.48xlarge,192,8,H100,55.04,21.154",
        "us-east-1,gone.large,2,0,,0.5,",
        "us-east-1,m7i.large,2,0,,0.1008,0.039",
    ]
    added = [f"added: us-east-1 {p}.24xlarge" for p in ("p4d", "p4de")]
    assert capsys.readouterr().out.splitlines() == [
        "moved: us-east-1 g5.2xlarge spot, 0.6 -> 0.504 USD an hour",
        f"{added[0]}, 21.957642 USD an hour",
        f"{added[0]} spot, 8.000 USD an hour",
        f"{added[1]}, 27.44705 USD an hour",
        f"{added[1]} spot, 9.312 USD an hour",
        "added: us-east-1 p5.48xlarge, 55.04 USD an hour",
        "added: us-east-1 p5.48xlarge spot, 21.154 USD an hour",
        "added: us-east-1 m7i.large spot, 0.039 USD an hour",
        "gone from the catalog, kept as it was: us-east-1 gone.large",
        f"{renewal.table}: 8 machines; older prices: 1",
    ]
    once = renewal.table.read_text()
    renewal.renew()
    assert renewal.table.read_text() == once
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_price_that_no_zone_has_is_kept(renewal: Renewal) -> None:
    text = CATALOG.read_text().replace(",0.1008,", ",,")
    for spot in "0.169700 0.193100 0.177200 0.156100".split():
        text = text.replace(f",0.475,{spot},", ",0.475,,")
    source = renewal.table.with_name("catalog.csv")
    source.write_text(text)
    lines = renewal.renew(source)
    assert "us-east-1,g6f.2xlarge,8,0.25,L4,0.475,0.17" in lines
    (as_of,) = (line for line in lines if line.startswith("# As of"))
    assert as_of.endswith(": us-east-1 g6f.2xlarge spot, us-east-1 gone.large, us-east-1 m7i.large")


def test_the_launcher_file_adds_its_region_and_its_machines_without_gpus(renewal: Renewal) -> None:
    content = yaml.safe_load((ROOT / "cluster" / "gpu.yaml").read_text())
    content["provider"]["region"] = "eu-central-1"
    content["available_node_types"]["head"]["node_config"]["InstanceType"] = "m7i.xlarge"
    renewal.write(content)
    lines = renewal.renew()
    assert lines[5:7] == [
        "eu-central-1,g5.2xlarge,8,1,A10G,1.5156,0.630",
        "eu-central-1,m7i.xlarge,4,0,,0.2415,0.130",
    ]
    assert "us-east-1,m7i.xlarge,4,0,,0.2016,0.085" in lines
    renewal.launcher.write_text((ROOT / "cluster" / "onprem.yaml").read_text())
    assert renewal.renew()[5:] == lines[5:]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: "", "has no column AcceleratorCount"),
        (lambda text: '<a href="x">,"y" z\n', "is damaged after line 0"),
        (lambda text: "<html><body>404: Not Found</body></html>\n", "has no column AcceleratorCo"),
        (lambda text: text.replace(",Arch\n", ",Processor\n"), "has no column Arch"),
        (lambda text: text[: len(text) // 2], "is damaged after line "),
        (lambda text: text.replace("\nm7i.large,", "\nm7i.large,,"), "another number of fields"),
        (
            lambda text: text.replace("1.212,0.521800", "1.212,nan"),
            "tells 'nan' as SpotPrice of g5",
        ),
        (lambda text: text.replace(",1.212,", ",free,"), "tells 'free' as Price of g5.2xlarge"),
        (lambda text: text.replace(",us-east-1,", ",us-east-9,"), "has no machine of"),
    ],
)
def test_a_damaged_catalog_leaves_the_table(
    renewal: Renewal, damage: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = renewal.table.with_name("catalog.csv")
    source.write_text(damage(CATALOG.read_text()))
    with pytest.raises(SystemExit) as ended:
        renewal.renew(source)
    (sentence,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and told in sentence and sentence.endswith("as they were")
    assert renewal.table.read_text() == BEFORE
    assert {path.name for path in renewal.table.parent.iterdir()} == {
        "catalog.csv",
        "launcher.yaml",
        "prices.csv",
    }


@pytest.mark.parametrize(
    ("source", "told"),
    [("no/such.csv", "No such file"), ("http://127.0.0.1/vms.csv", "neither an https address")],
)
def test_a_catalog_that_cannot_be_read_leaves_the_table(
    renewal: Renewal, source: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        renewal.renew(source)
    (sentence,) = capsys.readouterr().err.splitlines()
    assert source in sentence and told in sentence
    assert renewal.table.read_text() == BEFORE


class _Cut(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; of `cut.csv` half of what it promises."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        content = source.read()
        outputfile.write(content[: len(content) // 2] if "cut" in self.path else content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A folder over HTTPS, with a certificate in it."""
    certificate = folder / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    made = ["-addext", "subjectAltName=DNS:localhost", "-keyout", certificate, "-out", certificate]
    subprocess.run([*make.split(), *made], check=True, capture_output=True)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Cut, directory=str(folder))
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"https://localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_it_is_downloaded_and_half_a_download_is_refused(renewal: Renewal, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    for name in ("vms.csv", "cut.csv"):
        (folder / name).write_bytes(CATALOG.read_bytes())
    code = f"import prices, pathlib; prices.TABLE = pathlib.Path({str(renewal.table)!r}); "
    code += "prices.main()"
    with served(folder) as address:
        env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        env["SSL_CERT_FILE"] = str(folder / "certificate.pem")
        for name, told in (("cut.csv", "IncompleteRead"), ("none.csv", "404"), ("vms.csv", "")):
            assert renewal.table.read_text() == BEFORE
            done = subprocess.run(
                [sys.executable, "-c", code, str(renewal.launcher), f"{address}/{name}"],
                cwd=ROOT / "cluster",
                env=env,
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.returncode, told in done.stderr) == (2 if told else 0, True), done.stderr
            assert len(done.stderr.splitlines()) == bool(told)
    assert "/vms.csv; older" in renewal.table.read_text()
