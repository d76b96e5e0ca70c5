"""No network is ever asked for: slides to predictions, with local weights and sockets forbidden."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .slides import make_pyramid

# Each process of Python imports this module first. Sockets within this machine are allowed.
FORBID = """
import os, sys

def forbid(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        target = arguments[0]
    elif event in ("socket.connect", "socket.sendto"):
        target = arguments[1]
        if isinstance(target, (str, bytes)):  # a path of this machine
            return
    else:
        return
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(f"{event} {target} {sys.argv}\\n")
    raise OSError(101, "Network is unreachable")

sys.addaudithook(forbid)
"""
COHORT = """\
name: slides
patient: patient
tables: {t: {file: t.csv}}
outcome: {table: t, time: time, unit: days, event: event}
modalities:
  wsi: {bags: store, encoder: stain-stats, keys: {table: t, column: slide}}
  age: {table: t, columns: [age]}
"""

# Saves a small model of transformers with random weights; run apart, as transformers imports a
# package `kernels`, and the tests have the folder of this name in their path.
MODEL = """
import sys, transformers
config = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32,
    patch_size=8,
)
transformers.ViTModel(config).save_pretrained(sys.argv[1])
size = {"height": 32, "width": 32}
transformers.ViTImageProcessor(size=size).save_pretrained(sys.argv[1])
"""

# Runs commands in one process, which saves the time of imports; workers are processes as ever.
COMMANDS = """
import json, sys
from motet import cli
for command in json.loads(sys.argv[1]):
    assert cli.main(command) == 0, command
"""


@pytest.fixture
def forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the log of what asks for the network, which fails in all processes begun later."""
    (tmp_path / "forbid").mkdir()
    (tmp_path / "forbid" / "sitecustomize.py").write_text(FORBID)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "forbid"), prepend=os.pathsep)
    monkeypatch.setenv("NETWORK_LOG", str(tmp_path / "network.log"))
    # The caches of models are empty, and no variable asks the libraries to work offline.
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "network.log"


def python(*arguments: object, code: int = 0) -> str:
    """Run Python, away from the checkout; return what it printed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_way_from_slides_to_predictions(tmp_path: Path, forbidden: Path) -> None:
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    python("-c", "import socket; socket.create_connection(('192.0.2.1', 80))", code=1)
    assert forbidden.read_text().startswith("socket."), "the hook works"
    forbidden.unlink()
    python("-c", MODEL, tmp_path / "vit")
    slides, store, run, cohort = (
        str(tmp_path / name) for name in ("slides", "store", "run", "cohort.yaml")
    )
    Path(slides).mkdir()
    for i in range(6):
        make_pyramid(f"{slides}/{i}.tif", size=(400, 300), factors=(1,), seed=i)
    rows = [f"{i},{3 + 7 * i % 30},{int(i % 3 > 0)},{i % 6}.tif,{40 + 3 * i}" for i in range(30)]
    (tmp_path / "t.csv").write_text("\n".join(["patient,time,event,slide,age", *rows, ""]))
    Path(cohort).write_text(COHORT)
    tile = ["tile", slides, "--out", store, "--downsample", "2", "--tile-px", "32", "--encoder"]
    train = ["train", cohort, "--model", "healnet", "--out", run, "--splits", "2"]
    for setting in ("epochs=1", "num_latents=2", "latent_dim=4"):
        train += ["--set", setting]
    commands = [
        [*tile, "stain-stats"], [*tile, f"hf:{tmp_path / 'vit'}"], ["store", "verify", store],
        train, ["predict", run, cohort, "--out", str(tmp_path / "predictions.csv")],
    ]  # fmt: skip
    out = python("-c", COMMANDS, json.dumps(commands))
    assert out.count("6 slides: 6 done") == 2
    assert (tmp_path / "predictions.csv").exists()
    assert not forbidden.exists(), forbidden.read_text()
