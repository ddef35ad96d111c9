"""Peak memory of opening a file as large as lvis_v1_train.json and converting every object of it.

    python tests/data/measure_lvis.py            # 1.27 million annotations, 1.1 GB
    python tests/data/measure_lvis.py --scale 0.0125

Writes the file, with the fields and lengths of the real one, to a temporary folder, opens it in a
fresh process, prints the measurement as JSON, and deletes the file.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMAGES, ANNOTATIONS, CATEGORIES = 100_170, 1_270_141, 1_203  # of lvis_v1_train.json


def write_annotations(file: Path, scale: float) -> None:
    """A file in the shape of LVIS v1; at scale 1 it has the length of the real one too."""
    random.seed(0)
    images, annotations = round(IMAGES * scale), round(ANNOTATIONS * scale)
    polygons = [_draw_polygon() for _ in range(500)]
    with file.open("w") as stream:
        stream.write('{"info": {"description": "generated"}, "annotations": [')
        for number in range(annotations):
            polygon, box = random.choice(polygons)
            stream.write(
                f'{", " if number else ""}{{"area": {box[2] * box[3] * 0.7:.2f}, "id": {number + 1}, '
                f'"segmentation": [{polygon}], "image_id": {random.randrange(images) * 5 + 9}, "bbox": {box}, '
                f'"category_id": {random.randrange(CATEGORIES) + 1}}}'
            )
        stream.write('], "images": [')
        for number in range(images):
            url = f"http://images.cocodataset.org/train2017/{number:012d}.jpg"
            record = {"date_captured": "2013-11-15 02:41:42", "neg_category_ids": [68, 921, 26, 189, 762]}
            record |= {"id": number * 5 + 9, "license": 4, "height": 480, "width": 640, "coco_url": url}
            record |= {"flickr_url": "http://farm8.staticflickr.com/7187/6967031859_5f08387bde_z.jpg"}
            record |= {"not_exhaustive_category_ids": [1, 2]}
            stream.write((", " if number else "") + json.dumps(record))
        categories = [
            {"id": c + 1, "name": f"thing{c}", "frequency": "f", "synset": f"thing{c}.n.01", "def": "x" * 60}
            for c in range(CATEGORIES)
        ]
        stream.write(f'], "licenses": [], "categories": {json.dumps(categories)}}}')


def _draw_polygon() -> tuple[str, list[float]]:
    """A wobbly outline with as many points as LVIS's have on average, and its box."""
    points, radius = random.randrange(8, 86), random.uniform(8, 60)
    x, y = random.uniform(60, 580), random.uniform(60, 420)
    angles = [2 * math.pi * i / points for i in range(points)]
    polygon = [
        round(center + radius * random.uniform(0.9, 1.1) * turn(angle), 2)
        for angle in angles
        for center, turn in ((x, math.cos), (y, math.sin))
    ]
    return json.dumps(polygon), [
        round(x - radius, 2),
        round(y - radius, 2),
        round(2 * radius, 2),
        round(2 * radius, 2),
    ]


def peak_bytes() -> int:
    """Of this process image; getrusage would also count what the parent held when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure(file: Path) -> dict[str, float]:
    from sam_cache.data.lvis import open_lvis

    before, start = peak_bytes(), time.perf_counter()
    dataset = open_lvis(None, None, file.parent, file, None)
    opened = time.perf_counter()
    objects = sum(len(dataset.objects(number)) for number in range(len(dataset.images)))
    return {
        "file_bytes": file.stat().st_size,
        "images": len(dataset.images),
        "objects": objects,
        "problems": len(dataset.problems),
        "peak_bytes": peak_bytes(),
        "growth_bytes": peak_bytes() - before,
        "open_seconds": round(opened - start, 1),
        "objects_seconds": round(time.perf_counter() - opened, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--file", type=Path, help="measure this file instead")
    arguments = parser.parse_args()
    if arguments.file:
        print(json.dumps(measure(arguments.file)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "lvis_v1_train.json"
            write_annotations(file, arguments.scale)
            subprocess.run([sys.executable, __file__, "--file", file], check=True)
