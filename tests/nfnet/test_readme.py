"""The README's example of the library runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_readmes_example_trains_saves_reloads_and_fine_tunes(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    check = "\nimport sys\nassert 'ray' not in sys.modules and 'nflab' not in sys.modules\n"
    done = subprocess.run(
        [sys.executable, "-c", code + check],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    top1 = re.search(r"unseen images of 5 to 9: ([\d.]+) %", done.stdout)
    assert top1
    assert float(top1[1]) > 80
    assert (tmp_path / "digits.onnx").exists()
