from pathlib import Path

from PIL import Image

from tests.conftest import Script


def test_draws_a_column_for_each_network(script: Script, tmp_path: Path) -> None:
    names = ["dm_nf_resnet_digits", "preact_resnet_digits"]
    done = script(
        "signal_propagation.py", *names, "--image-size", "16", "--out", "figure.png", cold=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*(f"{n}: 3 blocks" for n in names), "Figure: figure.png"]
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.size == (2 * 660, 1080)


def test_a_wrong_name_and_a_small_image_are_one_sentence(script: Script) -> None:
    for arguments, message in (
        (["dm_nfnet_f9"], "did you mean dm_nfnet_f"),
        (["dm_nfnet_f0", "--image-size", "16"], "fewer than the network's stride of 32"),
    ):
        done = script("signal_propagation.py", *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
