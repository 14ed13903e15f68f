"""The programs in ``examples/`` do what they say."""

from examples import demo, patch_pipeline


def test_demo(capsys):
    assert demo.main(["--model", "tiny", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for words in ("torch ", "ResnetBlock2D", "replaced by resnet_block", "eager", "fastsd", "fastsd.patch(pipe)"):
        assert words in printed


def test_demo_of_an_unknown_model(capsys):
    assert demo.main(["--model", "sd99", "--device", "cpu"]) == 2
    assert "sd99" in capsys.readouterr().err


def test_patch_pipeline(capsys):
    patch_pipeline.main()
    printed = capsys.readouterr().out
    assert "replaced by resnet_block" in printed
    assert "bitwise the first one: True" in printed
