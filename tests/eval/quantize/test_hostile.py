"""`rowint8 quantize` on mutated sources and options: every run writes a whole checkpoint, or says why not in one line.

Each case is made from its number, so a failure can be run again. ROWINT8_FUZZ_SECONDS is how long to try.
"""

import json
import os
import random
import shutil
import signal
import struct
import time

import pytest
import torch

from rowint8.eval.cli import app as command
from tests.eval.quantize.harness import UP, assert_holds, edit_tensors, places, write_original

SECONDS = float(os.environ.get("ROWINT8_FUZZ_SECONDS", "8"))
FEWEST_CASES = 20
VALUES = [
    None,
    True,
    0,
    -1,
    1,
    3,
    10**7,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "../../etc/passwd",
    "[/bold]",
    "a\nb",
    [],
    {},
    [[[[1]]]],
    {"a": {"b": None}},
    [None, "x", 7],
]
CONFIG_KEYS = ["rope_scaling", "quantization_config", "auto_map", "layer_types", "num_labels", "text_config", "dtype"]
NAMES = [
    "out",
    "o u t",
    "[bold]out[/bold]",
    "[/]",
    "é",
    "n" * 255,
    "n" * 256,
    "new/out",
    "model",
    "model/in",
    ".",
    "-",
    "\udcff",
]
IGNORES = [f"{UP[:-7]}{kind}_proj" for kind in ("gate", "up", "down")] + [
    "re:.*down_proj",
    "re:.*mlp",
    "re:",
    "re:(",
    "*",
]


def changed(rng, value):
    """A JSON value with one part replaced, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        value = dict(value)
        key = rng.choice([*value, *CONFIG_KEYS])
        if rng.random() < 0.15:
            value.pop(key, None)
        else:
            value[key] = changed(rng, value.get(key))
        return value
    if isinstance(value, list) and value and rng.random() < 0.5:
        place = rng.randrange(len(value))
        return [*value[:place], changed(rng, value[place]), *value[place + 1 :]]
    return rng.choice(VALUES)


def mutate_json(rng, folder):
    path = rng.choice(sorted(folder.glob("*.json")))
    text = path.read_text()
    for _ in range(rng.choice([1, 1, 2, 5])):
        text = json.dumps(changed(rng, json.loads(text)))
    path.write_bytes(spoiled(rng, text.encode()) if rng.random() < 0.2 else text.encode())


def spoiled(rng, data):
    """Bytes with some changed, cut off or repeated."""
    data, place = bytearray(data), rng.randrange(max(1, len(data)))
    match rng.randrange(3):
        case 0:
            return bytes(data[:place])
        case 1:
            return bytes(data[:place] + data[max(0, place - 40) :])
    for _ in range(rng.choice([1, 3, 20])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def mutate_header(rng, folder):
    """Changes the JSON header of a file of tensors, its length or its bytes."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + size], data[8 + size :]
    header = json.dumps(changed(rng, json.loads(header))).encode() if rng.random() < 0.5 else spoiled(rng, header)
    size = len(header) if rng.random() < 0.8 else rng.choice([0, 1, 2**40, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", size) + header + (rest if rng.random() < 0.8 else spoiled(rng, rest)))


def mutate_tensors(rng, folder):
    name, path = rng.choice(sorted(places(folder).items()))

    def change(tensors):
        tensor = tensors.pop(name)
        other = rng.choice([f"{name}_scale", "extra", name, name, name, "model.layers.7.mlp.up_proj.weight", ""])
        made = [
            tensor,
            tensor[:1],
            tensor.half(),
            tensor.double(),
            tensor.to(torch.int8),
            tensor * float("nan"),
            tensor[None],
        ]
        tensors[other] = rng.choice(made).contiguous()

    edit_tensors(path, change)


def mutate_files(rng, folder):
    """A file becomes a folder, a pipe, a link, an empty file, or moves."""
    path = rng.choice(sorted(folder.iterdir()))
    path.unlink()
    match rng.randrange(6):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(rng.choice(["/etc/passwd", "/dev/zero", "config.json", path.name, "/nowhere"]))
        case 3:
            path.touch()
        case 4:
            (folder / f"{path.name}.bin").touch()


def mutate_nothing(rng, folder):
    pass


MUTATIONS = (mutate_json, mutate_json, mutate_header, mutate_tensors, mutate_files, mutate_nothing)


def make_case(rng, folder):
    """Spoils the folder; the name of OUT and the options."""
    mutation = rng.choice(MUTATIONS)
    mutation(rng, folder)
    name = "out" if mutation is not mutate_nothing else rng.choice(NAMES)
    options = [f"--ignore={rng.choice(IGNORES)}" for _ in range(rng.choice([0, 0, 1, 2]))]
    if rng.random() < 0.1:
        options += rng.choice(
            [["--format=int4"], ["--method=gptq"], ["--ignore"], ["--calibration=x"], ["[/x]"], ["--nonsense"]]
        )
    return name, options


def run(arguments, monkeypatch):
    """The exit status of the command, in this process."""
    monkeypatch.setattr("sys.argv", ["rowint8", "quantize", *arguments])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        command.main()
    except SystemExit as stop:
        return stop.code or 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    return 0


def check(number, original, place, monkeypatch, capfd):
    rng = random.Random(number)
    folder = shutil.copytree(original, place / "model")
    name, options = make_case(rng, folder)
    before = {path: path.lstat().st_mtime_ns for path in place.rglob("*") if not path.is_dir()}
    start = time.monotonic()
    status = run([str(folder), *options, "--", f"{place}/{name}"], monkeypatch)
    said = capfd.readouterr().err
    assert time.monotonic() - start < 30
    if status == 0:
        assert_holds(place / name, folder)
        return True
    after = {path: path.lstat().st_mtime_ns for path in place.rglob("*") if not path.is_dir()}
    assert after == before, "a run that fails writes nothing"
    assert "Traceback" not in said
    if status == 1:
        assert said.startswith("rowint8: ")
        assert said.count("\n") == 1 + name.count("\n"), said
    else:
        assert status == 2
        assert "Error" in said
    return False


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_original(tmp_path_factory.mktemp("original") / "model")


def test_mutated_sources_and_options(original, tmp_path, monkeypatch, capfd):
    end, number, written = time.monotonic() + SECONDS, 0, 0
    monkeypatch.chdir(tmp_path)
    while number < FEWEST_CASES or time.monotonic() < end:
        place = tmp_path / str(number)
        place.mkdir()
        try:
            written += check(number, original, place, monkeypatch, capfd)
        except BaseException as error:
            error.add_note(f"case {number}") if hasattr(error, "add_note") else print(f"case {number}")
            raise
        shutil.rmtree(place)
        number += 1
    assert written > number / 50, "hardly a case is written, so little is seen of what is"
