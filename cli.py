"""The command `motet`."""

import argparse
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from .recipes import Recipe
    from .runs import Run


class Check(NamedTuple):
    """One line of `motet doctor`."""

    name: str
    state: str
    """ok, missing or off."""
    detail: str
    cure: str = ""
    needed: bool = False
    """Whether motet does not work without it."""


# Distribution and the oldest version that motet works with, as in pyproject.toml.
REQUIRED = (
    ("numpy", "2"),
    ("pandas", "2.2"),
    ("safetensors", "0.5"),
    ("scikit-learn", "1.6"),
    ("scikit-survival", "0.24"),
    ("scipy", "1.14"),
    ("matplotlib", "3.9"),
    ("tqdm", "4.66"),
    ("filelock", "3.16"),
    ("pyarrow", "18"),
    ("pydantic", "2.10"),
    ("PyYAML", "6"),
    ("zarr", "3.1"),
    ("lightning", "2.6"),
    ("torch", "2.10"),
)
# Distribution, what is not there without it, and the cure.
WSI = "pip install 'motet[wsi]'"
OPTIONAL = (
    ("POT", "for heads merged by optimal transport", "pip install POT"),
    ("tifffile", "for slides in TIFF, and the checks before other readers", WSI),
    ("imagecodecs", "for compressed TIFF", WSI),
    ("openslide-python", "for slides of scanners' own formats", WSI),
    ("scikit-image", "for tissue masks", WSI),
    ("h5py", "for features of TRIDENT and CLAM", WSI),
    (
        "cucim-cu13",
        "for tiles 8 times as fast as OpenSlide's; on Linux",
        "with a GPU: pip install 'motet[cucim]'; without: pip install --no-deps cucim-cu13 and "
        "pip install click lazy-loader",
    ),
    ("ray", "for tiling on a Ray cluster", "pip install 'motet[ray]'"),
    ("transformers", "for encoders hf:...", "pip install 'motet[encoders]'"),
    ("timm", "for encoders timm:...", "pip install 'motet[encoders]'"),
    ("torchvision", "for encoders torchvision:...", "the build that fits your torch: "
     "https://pytorch.org/get-started"),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    if options.command == "doctor":
        return _doctor(as_json=options.json)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        again = "; the same command goes on where it stopped" if hasattr(options, "out") else ""
        print(f"motet {options.command}: interrupted{again}", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        # Bad input: the loaders, checks and models say in one line what is wrong with it.
        message = " ".join(str(error).split())
        print(f"motet {options.command}: {message}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="motet", description="Fuse biomedical modalities in one latent: HEALNet and MM-Lego."
    )
    parser.add_argument("--version", action="version", version=f"motet {_version('motet')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train both systems on real patients, with a report")
    _out(demo, "where to write tables and pictures", default=Path("runs/demo"))
    demo.set_defaults(run=_demo)

    tile = commands.add_parser(
        "tile",
        help="cut slides into patches, embed them, and store the features",
        description="Cut slides into patches, embed those of tissue, and store the features "
        "(docs/tiling.md). The same command again goes on where it stopped; commands at the same "
        "time share the work. Exit code 3: some slides failed.",
    )
    tile.add_argument(
        "slides", nargs="+", metavar="SLIDES",
        help="files, folders, or lists (.txt; .csv with a column path)",
    )  # fmt: skip
    _out(tile, "folder of the store")
    tile.add_argument(
        "--encoder", required=True,
        help="stain-stats (built in), torchvision:resnet50, timm:NAME, hf:REPO or folder, "
        "export:FILE.pt2, or MODULE:CALLABLE (docs/encoders.md)",
    )  # fmt: skip
    resolution = tile.add_mutually_exclusive_group(required=True)
    resolution.add_argument("--mpp", type=float, metavar="UM", help="micrometres per patch pixel")
    resolution.add_argument("--mag", type=float, metavar="X", help="the same as --mpp 10/X")
    resolution.add_argument(
        "--downsample", type=float, metavar="F", help="level-0 pixels per patch pixel"
    )
    tile.add_argument("--tile-px", type=int, default=256, metavar="N", help="(default: 256)")
    tile.add_argument(
        "--border", default="drop", choices=("drop", "shift", "pad"),
        help="the slide's right and lower rim (default: drop)",
    )  # fmt: skip
    tile.add_argument(
        "--min-tissue", type=float, default=0.1, metavar="SHARE",
        help="of a patch, for it to be kept (default: 0.1)",
    )  # fmt: skip
    tile.add_argument("--masks", type=Path, metavar="DIR", help="STEM.geojson or .png to use")
    tile.add_argument(
        "--slide-mpp", metavar="UM|CSV",
        help="resolution of slides whose files do not say it: a number, or columns slide, mpp",
    )  # fmt: skip
    tile.add_argument(
        "--missing-mpp", default="fail", choices=("fail", "skip"),
        help="what becomes of a slide whose resolution is not known (default: fail)",
    )  # fmt: skip
    tile.add_argument(
        "--reader", default="auto", choices=("auto", "cucim", "openslide", "tifffile", "pillow")
    )
    tile.add_argument(
        "--max-damaged", type=float, default=0.5, metavar="SHARE",
        help="of the patches, above which a slide fails (default: 0.5)",
    )  # fmt: skip
    tile.add_argument("--device", default="auto", help="of the encoder (default: auto)")
    tile.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    tile.add_argument("--weights", type=Path, metavar="FILE", help="of the encoder")
    tile.add_argument("--compile", action="store_true", help="compile the encoder")
    tile.add_argument("--batch", type=int, default=64, metavar="N", help="(default: 64)")
    tile.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes, a GPU each (default: 1)"
    )
    tile.add_argument("--shard", metavar="I/N", help="only the I-th of N parts, I from 0")
    tile.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster: auto, local or an address")
    tile.add_argument("--no-report", action="store_true", help="no pictures and tables of slides")
    _json(tile)
    tile.set_defaults(run=_tile)

    train = commands.add_parser(
        "train",
        help="train a model on every split of a cohort, and evaluate it out of fold",
        description="Train a model on every split of a cohort, and evaluate it out of fold. The "
        "same command again continues a run that was stopped.",
    )
    train.add_argument(
        "cohort", help="a YAML file, or the name of a shipped cohort (docs/cohorts.md)"
    )
    train.add_argument(
        "--model",
        required=True,
        help="healnet; lego, a LegoBlock per modality and their merge; or a baseline: cox, rsf "
        "(survival), logistic, forest (classes)",
    )
    _out(train, "the run folder")
    _data(train)
    train.add_argument(
        "--modalities", type=_names, metavar="A,B", help="those to use (default: all)"
    )
    train.add_argument(
        "--splits", type=int, default=5, metavar="N", help="number of splits (default: 5)"
    )
    train.add_argument(
        "--test", type=float, default=0.15, metavar="SHARE",
        help="share of the patients tested in each split; 1 / N tests everyone (default: 0.15)",
    )  # fmt: skip
    train.add_argument(
        "--validation", type=float, default=0.15, metavar="SHARE",
        help="share of the patients that training stops on (default: 0.15)",
    )  # fmt: skip
    train.add_argument("--seed", type=int, default=0, help="of splits, weights and dropout")
    _set(train)
    _json(train)
    train.set_defaults(run=_train)

    merge = commands.add_parser(
        "merge",
        help="join trained LegoBlocks with no training",
        description="Join trained LegoBlocks with no training (MM-Lego, Eq. 4). A recipe is a YAML "
        "file that names blocks, their weights, method, phase and head (docs/legomerge.md): blocks "
        "that are model files give a folder with model.safetensors, run folders give a run folder. "
        "RUN ... is short for all blocks of some runs at equal weights. A card, README.md, says "
        "what was merged.",
    )
    merge.add_argument(
        "parts", nargs="+", type=Path, metavar="RECIPE|RUN", help="a YAML file, or runs of blocks"
    )
    _out(merge, "the new folder")
    _data(merge)
    merge.add_argument(
        "--method", help="with RUN ...: harmonic, mean, sum or product (default: harmonic)"
    )
    merge.add_argument("--head", help="with RUN ...: slerp, linear or ot (default: slerp)")
    _json(merge)
    merge.set_defaults(run=_merge)

    fuse = commands.add_parser("fuse", help="join trained LegoBlocks and fine-tune them")
    fuse.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs of LegoBlocks")
    _out(fuse, "the new run folder")
    _data(fuse)
    fuse.add_argument("--head", default="slerp", help="slerp, linear or ot (default: slerp)")
    _json(fuse)
    fuse.add_argument("--mode", default="weave", help="weave or stack (default: weave)")
    _set(fuse)
    fuse.set_defaults(run=_fuse)

    evaluate = commands.add_parser(
        "evaluate", help="metrics of finished runs, and paired comparisons with the first"
    )
    evaluate.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    evaluate.add_argument("--draws", type=int, default=1000, help="bootstrap samples")
    _json(evaluate)
    evaluate.set_defaults(run=_evaluate)

    predict = commands.add_parser("predict", help="predict patients with the models of a run")
    predict.add_argument("trained", type=Path, metavar="RUN", help="a finished run")
    predict.add_argument("cohort", help="a YAML file of the patients; needs no outcome")
    predict.add_argument("--out", type=Path, required=True, metavar="CSV", help="where to write")
    _data(predict)
    predict.set_defaults(run=_predict)

    _store(commands.add_parser("store", help="look at, check and convert stores of features"))

    bench = commands.add_parser(
        "bench",
        help="time HEALNet on this machine, beside the literal equation and the machine's limits",
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is)")
    bench.add_argument("--dtype", choices=("fp32", "bf16"), help="(default: both)")
    bench.add_argument("--threads", type=int, metavar="N", help="of torch (default: its own)")
    bench.add_argument("--quick", action="store_true", help="sizes that only show that it works")
    bench.add_argument(
        "--json", metavar="FILE", help="write the figures too; - prints them instead of the table"
    )
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser("doctor", help="say what is built, what is missing, and the cure")
    _json(doctor)
    return parser


def _store(store: argparse.ArgumentParser) -> None:
    actions = store.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, text: str, run: Callable[[argparse.Namespace], int], *, several=False):
        action = actions.add_parser(name, help=text, description=text.capitalize() + ".")
        if name != "import":
            action.add_argument("store", type=Path, metavar="COHORT", help="the store's folder")
        if several or name == "show":
            action.add_argument(
                "slides", nargs="*" if several else None, metavar="SLIDE", help="key or name"
            )
        action.set_defaults(run=run)
        return action

    _json(add("ls", "list the slides, failed ones too", _store_ls))
    _json(add("show", "say what is known of a slide", _store_show))
    _json(add("verify", "read every byte; exit code 1 if anything is wrong", _store_verify))
    export = add("export", "write slides to files of other tools", _store_export, several=True)
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    export.add_argument(
        "--format", choices=("npz", "h5", "pt"), default="npz",
        help="numpy, TRIDENT's layout, or CLAM's (default: npz)",
    )  # fmt: skip
    export.add_argument("--encoder", help="whose features (may be left out if there is one)")
    taken = add("import", "take over features of TRIDENT or CLAM", _store_import)
    taken.add_argument("paths", nargs="+", type=Path, metavar="FILE|DIR", help=".h5, .pt or .npz")
    taken.add_argument("--out", type=Path, required=True, metavar="COHORT", help="the store")
    taken.add_argument("--encoder", required=True, metavar="NAME", help="what made the features")
    taken.add_argument("--coords", type=Path, metavar="DIR", help=".h5 files of coordinates")


def _out(parser: argparse.ArgumentParser, text: str, default: Path | None = None) -> None:
    note = "" if default is None else " (default: %(default)s)"
    parser.add_argument(
        "--out", type=Path, default=default, required=default is None, metavar="DIR",
        help=text + note,
    )  # fmt: skip


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, metavar="DIR",
        help="folder of the cohort's files (default: beside the YAML, then $MOTET_DATA)",
    )  # fmt: skip


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
        help="a setting of the model, its training or its goal; may be repeated (docs/training.md)",
    )  # fmt: skip


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _changes(settings: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE settings; values are YAML, so numbers, true, null."""
    import yaml

    changes = {}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator:
            raise ValueError(f"--set: expected NAME=VALUE, got {setting!r}")
        try:
            changes[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"--set: cannot read {setting!r}") from error
        # YAML takes 1e-3 for text.
        with suppress(TypeError, ValueError):
            if isinstance(changes[name], str):
                changes[name] = float(changes[name])
    return changes


def _demo(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    from .demo import main as run_demo

    return run_demo(options.out)


def _tile(options: argparse.Namespace) -> int:
    import time

    from . import tile
    from .io import tile_slides

    started = time.perf_counter()
    passed = ("encoder", "mpp", "mag", "downsample", "tile_px", "border", "min_tissue", "masks",
              "missing_mpp", "reader", "max_damaged", "device", "precision", "weights", "compile",
              "batch", "workers", "ray")  # fmt: skip
    progress = tile.Progress()
    with closing(progress):
        tiled = tile_slides(
            options.slides,
            options.out,
            slide_mpp=tile.read_slide_mpp(options.slide_mpp) if options.slide_mpp else None,
            shard=tile.read_shard(options.shard) if options.shard else None,
            progress=progress,
            **{name: getattr(options, name) for name in passed},
        )
    seconds = time.perf_counter() - started
    if not options.no_report:
        from .io.quality import write_report

        write_report(options.out)
    if options.json:
        print(json.dumps({**tiled._asdict(), "seconds": seconds, "out": str(options.out)}))
    else:
        print(tile.last_line(tiled, options.out, seconds))
    return 3 if tiled.failed else 0


def _bench(options: argparse.Namespace) -> int:
    from .bench import main as run_bench

    return run_bench(
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        quick=options.quick,
        json_to=options.json,
    )


def _train(options: argparse.Namespace) -> int:
    from . import experiments
    from .io import load_cohort

    cohort = load_cohort(options.cohort, data=options.data)
    run = experiments.train_run(
        cohort,
        experiments.source_of(cohort, options.cohort, options.data),
        options.model,
        options.out,
        modalities=options.modalities,
        changes=_changes(options.changes),
        splits=experiments.Splits(options.splits, options.test, options.validation, options.seed),
    )
    return _show([run], as_json=options.json)


def _merge(options: argparse.Namespace) -> int:
    from . import recipes
    from .fusion.training import rank

    recipe = _recipe(options)
    merged = recipes.merge(recipe, options.out, data=options.data)
    if not isinstance(merged, Path):
        return _show([merged], as_json=options.json)
    if rank() == 0:
        weights = recipe.options()["weights"]
        said = f"{' and '.join(weights)} merged: {merged}"
        print(json.dumps({"model": str(merged), "weights": weights}) if options.json else said)
    return 0


def _recipe(options: argparse.Namespace) -> "Recipe":
    from . import recipes

    yaml = (".yaml", ".yml")
    files = [p for p in options.parts if p.is_file() or (p.suffix in yaml and not p.is_dir())]
    if not files:
        method, head = options.method or "harmonic", options.head or "slerp"
        return recipes.of_command(options.parts, method=method, head=head)
    if len(options.parts) > 1:
        raise ValueError(
            f"expected one recipe or run folders, got {len(options.parts)} paths, "
            f"{str(files[0])!r} among them"
        )
    for name in ("method", "head"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: expected it in the recipe, got {getattr(options, name)!r}")
    return recipes.read(files[0])


def _fuse(options: argparse.Namespace) -> int:
    from . import experiments

    runs = experiments.blocks_of(options.runs)
    cohort, source = experiments.cohort_of(runs[0], options.data)
    run = experiments.fuse_runs(
        runs, options.out, cohort=cohort, source=source, changes=_changes(options.changes),
        mode=options.mode, head=options.head,
    )  # fmt: skip
    return _show([run], as_json=options.json)


def _evaluate(options: argparse.Namespace) -> int:
    from .runs import Run

    if options.draws < 100:
        raise ValueError(f"--draws: expected at least 100, got {options.draws}")

    return _show(
        [Run.finished(path) for path in options.runs], as_json=options.json, draws=options.draws
    )


def _predict(options: argparse.Namespace) -> int:
    from . import experiments
    from ._atomic import write_text
    from .io import load_cohort
    from .runs import Run

    _check_csv(options.out)
    run = Run.finished(options.trained)
    cohort = load_cohort(options.cohort, data=options.data, outcome=False)
    table = experiments.predict(run, cohort)
    write_text(options.out, table.to_csv(index=False))
    seen = sum(folds > 0 for folds in table["seen"])
    note = f"; {seen} of them were trained on" if seen else ""
    print(f"{len(table)} patients predicted{note}: {options.out}")
    return 0


def _store_ls(options: argparse.Namespace) -> int:
    from .io import FeatureStore, listing

    store = FeatureStore(options.store)
    print(json.dumps(listing.rows(store)) if options.json else listing.table(store))
    return 0


def _store_show(options: argparse.Namespace) -> int:
    from .io import FeatureStore, listing

    store = FeatureStore(options.store)
    if options.json:
        print(json.dumps(listing.details(store, options.slides)))
    else:
        print(listing.details_text(store, options.slides))
    return 0


def _store_verify(options: argparse.Namespace) -> int:
    from .io import FeatureStore, listing

    store = FeatureStore(options.store)
    found = store.verify()
    if options.json:
        print(json.dumps([problem._asdict() for problem in found]))
    else:
        print(listing.problems_text(store, found))
    return 1 if found else 0


def _store_export(options: argparse.Namespace) -> int:
    from .io import FeatureStore
    from .io.foreign import export

    store = FeatureStore(options.store, options.encoder)
    names = options.slides or list(store)
    for name in names:
        export(store, name, options.out, options.format)
    print(f"{len(names)} slides: {options.out}")
    return 0


def _store_import(options: argparse.Namespace) -> int:
    from .io import import_features

    store = import_features(
        options.paths, options.out, encoder=options.encoder, coords=options.coords
    )
    failed = store.failed
    for note in failed.values():
        print(f"{note.get('path')}: {note.get('message')}", file=sys.stderr)
    print(f"{len(store)} slides, {len(failed)} failed: {options.out}")
    return 3 if failed else 0


def _check_csv(path: Path) -> None:
    """Raise unless predictions can go there: nothing but earlier predictions is overwritten."""
    if path.is_dir() or not path.name:
        raise ValueError(f"--out: expected a file, got the folder {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"--out: no folder {str(path.parent)!r}")
    if not path.exists():
        return
    mine = b"patient,modalities,seen,"
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(mine)) == mine:
                return
    raise ValueError(f"--out: {str(path)!r} is there, and holds no predictions of motet's")


def _show(runs: Sequence["Run"], *, as_json: bool, draws: int | None = None) -> int:
    """Print the metrics of runs; those on disk unless other bootstrap draws are asked for."""
    from . import experiments, report
    from .fusion.training import rank

    if rank():
        return 0
    results = [
        (
            run,
            experiments.read_metrics(run)
            if draws is None
            else experiments.evaluate_run(run, draws=draws),
        )
        for run in runs
    ]
    drawn = {} if draws is None else {"draws": draws}
    comparisons = [experiments.compare_runs(run, runs[0], **drawn) for run in runs[1:]]
    print(report.as_json(results, comparisons) if as_json else report.table(results, comparisons))
    return 0


def _doctor(*, as_json: bool) -> int:
    checks = _checks()
    if as_json:
        print(json.dumps([check._asdict() for check in checks], indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{check.name:{width}}  {check.state:8}{check.detail}")
            if check.cure:
                print(f"{'':{width}}  {'':8}cure: {check.cure}")
    return 1 if any(check.state == "missing" and check.needed for check in checks) else 0


def _checks() -> list[Check]:
    """Look at what motet needs and what makes it faster."""
    checks = [
        Check("motet", "ok", f"{_version('motet')} in {Path(__file__).parent}"),
        Check("python", "ok", f"{platform.python_version()}, {os.cpu_count()} cores"),
    ]
    for package, floor in REQUIRED:
        found = _version(package)
        cure = f"pip install '{package}>={floor}'"
        if not found:
            checks.append(Check(package, "missing", "not installed", cure, needed=True))
        elif _numbers(found) < _numbers(floor):
            checks.append(Check(package, "missing", f"{found} is older than {floor}", cure, True))
        else:
            checks.append(Check(package, "ok", found))
    try:
        torch = import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        cure = "reinstall torch: https://pytorch.org/get-started"
        return [*checks, Check("torch import", "missing", str(error), cure, needed=True)]
    checks += [_native_check(), _gpu_check(torch), _triton_check(torch)]
    return [*checks, *(_optional_check(*optional) for optional in OPTIONAL)]


def _optional_check(package: str, purpose: str, cure: str) -> Check:
    found = _version(package)
    return Check(package, "ok", found) if found else Check(package, "off", purpose, cure)


def _native_check() -> Check:
    from .io import resample
    from .kernels import native

    reason = native.status() or resample.status()
    if not reason:
        return Check("C++ modules", "ok", "motet.kernels._C, motet.io._C")
    compiler = next((c for c in ("c++", "g++", "clang++", "cl") if shutil.which(c)), None)
    cure = native.CURE if compiler is None else f"run pip with -v to see why {compiler} failed"
    slower = f"torch and numpy compute instead, slower ({reason})"
    return Check("C++ modules", "missing", slower, cure)


def _gpu_check(torch) -> Check:
    if torch.cuda.is_available():
        return Check("GPU", "ok", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    if torch.version.cuda is None:
        built = "this torch is built for CPUs"
        return Check("GPU", "off", built, "with an NVIDIA GPU: https://pytorch.org/get-started")
    return Check("GPU", "off", f"torch is built for CUDA {torch.version.cuda}, no device found")


def _triton_check(torch) -> Check:
    found = _version("triton")
    if found and _numbers(found) >= (3, 6):
        return Check("triton", "ok", found)
    why = f"{found} is older than 3.6" if found else "not installed"
    if not torch.cuda.is_available():
        return Check("triton", "off", f"{why}; the kernels are for GPUs")
    return Check(
        "triton", "missing", f"{why}; attention runs in torch, slower", "pip install triton"
    )


def _numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 13, 0) of 2.13.0+cpu."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
