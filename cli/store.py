"""`motet store`: list, check, repair and convert feature stores."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from .options import Commands, add_drop, add_json


def add_store(commands: Commands) -> None:
    """Add `motet store` and its actions."""
    store = commands.add_parser(
        "store",
        help="list, check, repair, export and import stores of features",
        description="List, check, repair, export and import stores of features, which motet tile "
        "writes.",
    )
    actions = store.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, text: str, run: Callable[[argparse.Namespace], int], *, several=False):
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name != "import":
            action.add_argument("store", type=Path, metavar="COHORT", help="folder of the store")
        if several or name == "show":
            action.add_argument(
                "slides",
                nargs="*" if several else None,
                metavar="SLIDE",
                help="key or name of a slide" + " (default: all slides)" * several,
            )
        action.set_defaults(run=run)
        return action

    add_json(add("ls", "list the slides, also those that failed", _store_ls))
    add_json(add("show", "show the metadata of a slide", _store_show))
    add_json(add("verify", "read and check every byte; exit code 1 if one is wrong", _store_verify))
    add_json(
        add(
            "repair",
            "remove what verify condemns, so that motet tile or import makes it anew; exit code 1 "
            "if a problem is left",
            _store_repair,
        )
    )
    export = add("export", "write features to files of other tools", _store_export, several=True)
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    export.add_argument(
        "--format", choices=("npz", "h5", "pt"), default="npz",
        help="npz (numpy), h5 (TRIDENT) or pt (CLAM) (default: npz)",
    )  # fmt: skip
    export.add_argument(
        "--encoder", help="encoder of the features (needed if the store has several)"
    )
    add_drop(export, "leave out patches with these flags: pen, blur, or both")
    import_ = add("import", "import features of TRIDENT or CLAM", _store_import)
    import_.add_argument(
        "paths", nargs="+", type=Path, metavar="FILE|DIR", help=".h5, .pt or .npz files"
    )
    import_.add_argument(
        "--out", type=Path, required=True, metavar="COHORT", help="folder of the store"
    )
    import_.add_argument("--encoder", required=True, metavar="NAME", help="encoder of the features")
    import_.add_argument(
        "--coords", type=Path, metavar="DIR", help="folder of .h5 files with coordinates"
    )


def _store_ls(options: argparse.Namespace) -> int:
    from ..io import FeatureStore
    from . import store_text

    store = FeatureStore(options.store)
    print(json.dumps(store_text.rows(store)) if options.json else store_text.table(store))
    return 0


def _store_show(options: argparse.Namespace) -> int:
    from ..io import FeatureStore
    from . import store_text

    store = FeatureStore(options.store)
    if options.json:
        print(json.dumps(store_text.details(store, options.slides)))
    else:
        print(store_text.details_text(store, options.slides))
    return 0


def _store_verify(options: argparse.Namespace) -> int:
    from ..io import FeatureStore
    from . import store_text

    store = FeatureStore(options.store)
    problems = store.verify()
    if options.json:
        print(json.dumps([problem._asdict() for problem in problems]))
    else:
        print(store_text.problems_text(store, problems))
    return 1 if problems else 0


def _store_repair(options: argparse.Namespace) -> int:
    from ..io import FeatureStore
    from . import store_text

    store = FeatureStore(options.store)
    repairs = store.repair()
    if options.json:
        print(json.dumps([repair._asdict() for repair in repairs]))
    else:
        print(store_text.repairs_text(store, repairs))
    return 0 if all(repair.repaired for repair in repairs) else 1


def _store_export(options: argparse.Namespace) -> int:
    from ..io import FeatureStore
    from ..io.store.foreign import export

    store = FeatureStore(options.store, options.encoder)
    names = options.slides or list(store)
    for name in names:
        export(store, name, options.out, options.format, options.drop)
    print(f"{len(names)} slides: {options.out}")
    return 0


def _store_import(options: argparse.Namespace) -> int:
    from ..io import import_features

    store = import_features(
        options.paths, options.out, encoder=options.encoder, coords=options.coords
    )
    failed = store.failed
    for note in failed.values():
        print(f"{note.get('path')}: {note.get('message')}", file=sys.stderr)
    print(f"{len(store)} slides, {len(failed)} failed: {options.out}")
    return 3 if failed else 0
