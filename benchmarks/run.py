"""Runs the benchmarks, and writes what their results say into the READMEs, here and above, and into charts/.

    python benchmarks/run.py                     # everything, on the CPU: about an hour and a half
    python benchmarks/run.py read decoder_step   # these programs
    python benchmarks/run.py --device cuda       # what a GPU is for, its checks of correctness among it
    python benchmarks/run.py --render            # only the READMEs and the charts, from the JSON at hand

Every program runs in a process of its own, one after the other, and keeps its figures in results/. In a README
a block between `<!-- RESULT: PROGRAM.FUNCTION -->` and `<!-- end -->` is what that function makes of
results/RESULT.json: no figure stands there by hand. A program that fails is named at the end; the others go on.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
from measure import RESULTS

HERE = Path(__file__).parent
READMES = {HERE / "README.md": "", HERE.parent / "README.md": f"{HERE.name}/"}  # and the way from it to here
BLOCK = re.compile(r"(<!-- (\w+): (\w+)\.(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# By name: the arguments of each of its runs. Those of the second table know `--device cuda`.
ON_CPU: dict[str, list[list[str]]] = {
    "read": [[], ["--codec", "zstd"], ["--codec", "blosc"]],
    "read_cold": [[]],
    "write": [[]],
    "opening": [[]],
    "startup": [[]],
    "codec_table": [[]],
    "decoder_step": [[]],
    "encoder": [[]],
    "embedding": [[]],
    "cached_vs_end_to_end": [[]],
    "growth": [[]],
    "memory_plan": [[]],
}
ON_GPU: dict[str, list[list[str]]] = {
    name: [["--device", "cuda"]] for name in ("encoder", "decoder_step", "embedding", "cached_vs_end_to_end", "growth")
}
# Asked for by name: they need real images, --data or $SAMCACHE_TEST_DATA, and minutes to hours.
WITH_DATA: dict[str, list[list[str]]] = {
    "real_sets": [[]],
    "adaptation": [[]],
    "nano": [["score"]],
    "hq": [[]],
    "levels": [[]],
}


def run(programs: dict[str, list[list[str]]]) -> list[str]:
    """Run all of them; what failed, as commands."""
    failed = []
    for name, runs in programs.items():
        for arguments in runs:
            command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
            said = " ".join([name, *arguments])
            print(f"== {said}", flush=True)
            started = time.perf_counter()
            if subprocess.run(command).returncode:
                failed.append(said)
            print(f"== {said}: {time.perf_counter() - started:.0f} s", flush=True)
    return failed


def render(text: str, way: str = "", results: Path = RESULTS) -> str:
    """A README's text with every block made anew from the results at hand; `way` leads to this folder."""

    def fill(block: re.Match) -> str:
        begin, name, program, function, end = block.groups()
        path = results / f"{name}.json"
        if not path.exists():
            return f"{begin}\nNot measured{' on GPU' if name.endswith('_cuda') else ''}.\n\n{end}"
        result = json.loads(path.read_text())
        module = importlib.import_module(program)
        parts = [getattr(module, function)(result).strip()]
        if function == "render" and hasattr(module, "draw"):
            parts.append(f"![{name}]({way}charts/{name}.svg)")
        return "\n\n".join([begin.rstrip(), *parts, describe(name, result["machine"], way), end])

    return BLOCK.sub(fill, text)


def describe(name: str, machine: dict, way: str) -> str:
    """Where a result was made."""
    versions = machine["versions"]
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['processor']}"
    told = ", ".join([where, f"Python {machine['python']}", *(f"{key} {versions[key]}" for key in ("torch", "zarr"))])
    return f"<sub>[{name}.json]({way}results/{name}.json): {told}; commit {machine['commit']}, {machine['date']}.</sub>"


def draw_charts(text: str, folder: Path = HERE / "charts", results: Path = RESULTS) -> None:
    """The chart of every result in the README whose program can draw one, as SVG; the same for the same figures."""
    matplotlib.rcParams.update({"svg.hashsalt": "samcache", "font.family": "DejaVu Sans", "font.size": 9})
    for _, name, program, function, _ in BLOCK.findall(text):
        draw = getattr(importlib.import_module(program), "draw", None)
        if function == "render" and draw and (results / f"{name}.json").exists():
            folder.mkdir(exist_ok=True)
            figure = draw(json.loads((results / f"{name}.json").read_text()))
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=", ".join(ON_CPU | WITH_DATA))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    options = parser.parse_args()
    known = ON_GPU if options.device == "cuda" else ON_CPU | WITH_DATA
    if unknown := [name for name in options.programs if name not in known]:
        parser.error(f"{', '.join(unknown)}: no such program on {options.device}; there are {', '.join(known)}")
    asked = options.programs or (ON_GPU if options.device == "cuda" else ON_CPU)
    failed = [] if options.render else run({name: known[name] for name in asked})
    for readme, way in READMES.items():
        readme.write_text(render(readme.read_text(), way))
        draw_charts(readme.read_text())
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
