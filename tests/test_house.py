"""The floors of the house: a room imports only from below, and some libraries have one keeper."""

import ast
from pathlib import Path

import sam_cache

PACKAGE = Path(sam_cache.__file__).parent
FLOORS = {
    "cli": 5, "__main__": 5, "recipe": 5,
    "stages": 4,
    "config": 3, "batches": 3,
    "store": 2, "data": 2, "model": 2, "training": 2, "evaluation": 2, "pictures": 2,
    "types": 1, "errors": 1, "ranks": 1, "durable": 1, "quantisation": 1, "__init__": 0,
}  # fmt: skip
ABOVE_ITS_NEIGHBOUR = {("cli", "recipe"), ("__main__", "cli")}
KEEPERS = {
    "typer": {"cli"},
    "pydantic": {"config"},
    "zarr": {"store"}, "numcodecs": {"store"},
    "segment_anything": {"model"}, "segment_anything_hq": {"model"},
    "accelerate": {"training"},
    "faster_coco_eval": {"evaluation"},
    "matplotlib": {"pictures"},
    "cv2": {"data", "evaluation", "pictures"},
    "pycocotools": {"data", "evaluation"},
}  # fmt: skip


def imports_of(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def violations(package: Path) -> list[str]:
    found = []
    for file in sorted(package.rglob("*.py")):
        room = file.relative_to(package).parts[0].removesuffix(".py")
        for name in imports_of(file):
            top, *rest = name.split(".")
            if top == "sam_cache":
                other = rest[0] if rest[0] in FLOORS else "__init__"
                allowed = FLOORS[other] < FLOORS[room] or other == room or (room, other) in ABOVE_ITS_NEIGHBOUR
                if not allowed:
                    found.append(f"{file.relative_to(package)} imports {name}: {other} is not below {room}")
            elif top in KEEPERS and room not in KEEPERS[top]:
                found.append(f"{file.relative_to(package)} imports {name}: {KEEPERS[top]} keeps {top} to itself")
    return found


def test_rooms_import_only_from_below():
    assert violations(PACKAGE) == []


def test_a_violation_would_be_seen(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "bad.py").write_text(
        "import cv2\nfrom sam_cache.model import Top\nfrom sam_cache import cli\n"
    )
    assert len(violations(tmp_path)) == 3


def test_files_stay_short():
    long = {str(file): lines for file in PACKAGE.rglob("*.py") if (lines := len(file.read_text().splitlines())) > 320}
    assert long == {}
