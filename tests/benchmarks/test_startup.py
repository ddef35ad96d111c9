"""benchmarks/startup.py in miniature; what it does in fresh processes is done in this one, which has its imports."""

import json


def test_everything_is_measured_and_shown(program, tmp_path, monkeypatch):
    startup = program("startup")
    monkeypatch.setattr(startup, "COMMANDS", {"samcache --help": ["-m", "sam_cache", "--help"]})
    assistance = startup.measure_help(rounds=1)

    def in_this_process(_, *options):
        given = dict(zip(options[::2], options[1::2], strict=True))
        if "--open" in given:
            return json.dumps(startup.open_annotations(given["--open"], given["--by"]))
        return json.dumps(startup.take_first_batch(given["--first-batch"]))

    monkeypatch.setattr(startup, "python", in_this_process)
    annotations = startup.measure_annotations(0.0005, tmp_path)
    batch = startup.measure_first_batch(200, 2, 1, tmp_path)
    assert assistance["imported"] == []
    assert annotations["not_measured"] == {}
    assert annotations["opened"]["samcache"]["images"] == 50
    assert annotations["opened"]["pycocotools"]["objects"] == 635
    assert (batch["prompts"], batch["objects"], batch["rows"]) == (16, 400, 200)
    shown = startup.render({"help": assistance, "annotations": annotations, "first_batch": batch})
    assert "none of torch" in shown
    assert "200 rows with 400 objects" in shown
