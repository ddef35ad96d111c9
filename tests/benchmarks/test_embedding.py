"""The embedding benchmark in miniature."""

import torch


def test_every_contender_embeds_and_the_result_is_told(program, tmp_path):
    benchmark = program("embedding")
    source = benchmark.write_photographs(tmp_path, 3, 64, 48)
    case = benchmark.measure("tiny", source, rounds=1, batch_size=2, threads=0, device=torch.device("cpu"))
    assert case["share"].keys() == benchmark.CONTENDERS.keys()
    assert case["seconds"].keys() == {"bare", *benchmark.CONTENDERS}
    parts = benchmark.measure_parts(source, torch.device("cpu"))
    assert all(ms >= 0 for ms in parts.values())
    case |= {"size": "64x48", "share": {"fp16": 0.96, "int8": 0.94, "fp16_fast": 0.97, "fp16_beside": 0.9}}
    other = case | {"model": "nano", "share": {"fp16": 0.9, "int8": 0.9, "fp16_fast": 0.9, "fp16_beside": 0.9}}
    text = benchmark.render({"cases": [case, other], "parts_ms": {"64x48": parts}})
    assert "(96.0%)" in text
    assert "beside the encoder |" in text
    assert "with tiny, 64x48; not with nano, 64x48." in text
    assert "quantise, checksum, write int8" in text
