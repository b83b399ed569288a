"""The training run on 2 CPU ranks of real DeepSpeed ZeRO-3, against plain references."""

import json


def test_quick(start, quick, tmp_path):
    code, text = start(*quick, "--output_dir", tmp_path / "out").wait()
    print(text)
    assert code == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 6
