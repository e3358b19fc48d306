"""The parts of the programme in order, the commands of each, and their sizes on a GPU and in a rehearsal."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from paredown.evaluation.benchmarks.gpu import figures
from paredown.evaluation.benchmarks.gpu.programme import Part, Step
from paredown.evaluation.reference import model_path
from paredown.kernels.dispatch import cache_file

BENCHMARKS, KERNELS = "evaluation/BENCHMARKS.md", "kernels/BENCHMARKS.md"


@dataclass(frozen=True)
class Sizes:
    """Arguments of the commands, where a GPU and a rehearsal differ."""

    shape: str
    ceilings: str
    selftest: str
    sanitizer: str
    kernels: str
    devices: str
    footprint: str
    recipes: dict[str, float]  # each with its share of the part's time
    decode: str
    batches: tuple[str, ...]
    compress: str  # of a model that is to be recovered
    recover: str
    served: str  # the shape of the model in vLLM
    serving: str
    prefix: tuple[str, ...]  # of every command, before the name of its module


ON_A_GPU = Sizes(
    shape="llama-3-8b",
    ceilings="--size 8192 --megabytes 1024",
    selftest="",
    sanitizer="--small",
    kernels="",
    devices="",
    footprint=f"--sequences 32 --length 2048 --threads {os.cpu_count()}",
    recipes={"sparsegpt-2of4": 3.0, "wanda-2of4": 2.0, "paredown-lowrank-80": 4.0},
    decode="--context 512 --decode 64 --repeats 5",
    batches=("1 8 32",),  # at once: making both models takes longer than timing them
    compress="--set calibration.sequences=16",
    recover="",
    served="llama-1b",
    serving="",
    prefix=(sys.executable, "-m"),
)
IN_MINIATURE = Sizes(
    shape="tiny",
    ceilings="--size 64 --megabytes 1 --repeats 2",
    selftest="--small --jobs 1",  # the operators need CUDA graphs
    sanitizer="--small --jobs 1",
    kernels="--dtype float16",  # the interpreter truncates bfloat16
    devices="--shape tiny --sequences 4 --windows 4 --length 64",
    footprint="--sequences 4 --length 64 --windows 4 --threads 1",
    recipes={"paredown-lowrank-80": 4.0},
    decode="--context 16 --decode 4 --repeats 1",
    batches=("1 2",),
    compress="--set calibration.sequences=4 --set calibration.length=64 --eval-windows 2",
    recover='--set recover=[{"distill":{"tokens":512,"length":64,"heldout":2}}] --set evaluate.windows=2',
    served="tiny",
    serving="--batch 1 2 --prompt 16 --tokens 4 --repeats 1",
    prefix=(sys.executable, "-m", "paredown.evaluation.benchmarks.gpu.rehearsal"),
)


@dataclass(frozen=True)
class Setting:
    """Where the programme runs: the device as torch calls it and its name, the folder of results, one for large files, and
    the environment of its processes."""

    sizes: Sizes
    device: str
    name: str
    out: Path
    work: Path
    environment: Mapping[str, str]

    def command(self, module: str, arguments: str, share: float = 1.0) -> Step:
        return Step((*self.sizes.prefix, f"paredown.{module}", *arguments.split()), share)

    def benchmark(self, module: str, arguments: str, share: float = 1.0) -> Step:
        return self.command(f"evaluation.benchmarks.{module}", f"--device {self.device} {arguments}", share)


def device(run: Setting) -> Part:
    steps = (run.benchmark("ceilings", run.sizes.ceilings),)
    goes_to = f"the first lines of {KERNELS} and {BENCHMARKS}"
    return Part("device", "The device and its ceilings", steps, figures.ceilings, 5, 20, goes_to=goes_to)


def selftest(run: Setting) -> Part:
    steps = (run.command("kernels.selftest", run.sizes.selftest),)
    return Part("selftest", "Every kernel against float64", steps, figures.selftest, 30, 60, goes_to=KERNELS)


def kernels(run: Setting) -> Part:
    """Writes the dispatch table where the later parts look for it. What has a bar comes first."""
    table = run.out / "kernels" / cache_file(run.name).name
    table.parent.mkdir(parents=True, exist_ok=True)
    only = {"sparse24 model": 2.0, "lowrank pifa sparse24_lowrank bitmap": 1.0}
    steps = tuple(
        run.command("kernels.benchmark", f"--only {ops} --write {table} {run.sizes.kernels}", share)
        for ops, share in only.items()
    )
    goes_to = f"{KERNELS}, and the table {table.name} to kernels/tables"
    return Part("kernels", "Decode kernels at their bars", steps, figures.kernels, 18, 40, goes_to=goes_to)


def devices(run: Setting) -> Part:
    steps = (run.benchmark("devices", run.sizes.devices),)
    return Part("devices", "The device compresses as the CPU does", steps, figures.devices, 16, 40, goes_to=BENCHMARKS)


def whole(run: Setting) -> Part:
    same = f"--work {run.work} --shape {run.sizes.shape} {run.sizes.footprint}"
    steps = (
        run.benchmark("footprint", f"--make {same}", 2.0),
        *(
            run.benchmark("footprint", f"--recipe {recipe} {same}", share)
            for recipe, share in run.sizes.recipes.items()
        ),
    )
    return Part("whole", "A whole model compressed", steps, figures.footprints, 34, 30, goes_to=BENCHMARKS)


def solvers(run: Setting) -> Part:
    of_block = f"--shape {run.sizes.shape}"
    factoring = f"--repeats 1 {of_block} --precision"
    steps = (
        run.benchmark("solvers", of_block),
        *(run.benchmark("factorizers", f"{factoring} {precision}") for precision in ("float64", "float32")),
    )
    title = "One block: SparseGPT's sweep, where its time goes, and factoring"
    return Part("solvers", title, steps, figures.solvers, 8, 15, goes_to=BENCHMARKS)


def decode(run: Setting) -> Part:
    same = f"--shape {run.sizes.shape} --json {run.sizes.decode}"
    steps = (
        *(run.benchmark("decode", f"{same} --batch {batches}", 2.0) for batches in run.sizes.batches),
        run.benchmark("decode", f"{same} --batch 1 --kind pifa"),
    )
    return Part("decode", "Decoding a whole model, and its energy", steps, figures.decoding, 24, 40, goes_to=KERNELS)


def sanitizer(run: Setting) -> Part:
    steps = (run.command("kernels.selftest", f"--sanitize {run.sizes.sanitizer}"),)
    found = shutil.which("compute-sanitizer", path=run.environment.get("PATH"))
    absent = "" if found else "compute-sanitizer is not on PATH: it comes with the CUDA toolkit"
    return Part("sanitizer", "Small shapes under compute-sanitizer", steps, figures.sanitizer, 14, 60, absent, KERNELS)


def recover(run: Setting) -> Part:
    """Two minutes of the command `recover`, on the bundled model at 2:4."""
    pruned, teacher = run.work / f"recover-{os.getpid()}", model_path()
    of, to = f"{teacher} -r sparsegpt-2of4 {run.sizes.compress}", f"--teacher {teacher} -r recover-distill"
    steps = (
        run.command("commands.app", f"compress {of} -o {pruned} --device {run.device}"),
        run.command(
            "commands.app",
            f"recover {pruned} {to} -o {pruned}-recovered --device {run.device} {run.sizes.recover}",
            4.0,
        ),
    )
    return Part("recover", "Recovery of a pruned model", steps, figures.recovery, 16, 120, "", BENCHMARKS)


def serve(run: Setting) -> Part:
    """A model of its own in vLLM: the whole one would take the time of all parts to load twice."""
    folder, shape = run.work / "serve", run.sizes.served
    steps = (
        run.benchmark("footprint", f"--work {folder} --shape {shape} --recipe magnitude-2of4 {run.sizes.footprint}"),
        run.command("evaluation.benchmarks.serving", f"{folder / 'compressed'} {run.sizes.serving}", 4.0),
    )
    absent = "" if find_spec("vllm") else "vLLM is not installed: pip install 'paredown[serve]'"
    return Part("serve", "A packed model in vLLM", steps, figures.serving, 16, 120, absent, BENCHMARKS)


# in the order in which they answer most for the time that they take
PROGRAMME: dict[str, Callable[[Setting], Part]] = {
    part.__name__: part
    for part in (device, selftest, kernels, devices, whole, solvers, decode, sanitizer, recover, serve)
}
