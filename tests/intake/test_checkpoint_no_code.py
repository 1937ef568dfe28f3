"""No code from a model directory (LD-4) and no pickle (LD-5): an audit hook watches a whole load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import TINY_MODELS, write_directory, write_gguf

WATCH = """
import json, sys
from pathlib import Path
from setpoint.loaders.checkpoint import open_checkpoint

def load(path):
    checkpoint = open_checkpoint(path)
    for name in checkpoint.tensor_names():
        checkpoint.tensor(name)
    checkpoint.generation, checkpoint.tokenizer, checkpoint.chat_template, checkpoint.digest()
    checkpoint.close()

trusted, watched = map(Path, sys.argv[1:])
load(trusted)  # what is imported lazily is imported now
events, watching = [], True
FORBIDDEN = ("exec", "compile", "import", "marshal.", "pickle.", "socket.", "subprocess.", "os.exec", "os.system",
             "os.posix_spawn", "os.fork", "ctypes.", "code.")

def hook(event, arguments):
    if not watching:
        return
    if event.startswith(FORBIDDEN):
        events.append(event)
    if event == "open":
        events.append(Path(str(arguments[0])).name)

sys.addaudithook(hook)
load(watched)
watching = False
print(json.dumps({"events": events, "modules": sorted(name for name in sys.modules if "torch" in name)}))
"""

EVIL = "raise SystemExit('code from the model directory was executed')\n"


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_nothing_in_a_model_directory_is_executed(kind: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS["llama"]
    trusted, hostile = write_directory(tiny, tmp_path / "trusted"), write_directory(tiny, tmp_path / "hostile")
    config = json.loads((hostile / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    config["trust_remote_code"] = True
    (hostile / "config.json").write_text(json.dumps(config))
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil", "__init__", "sitecustomize", "json"):
        (hostile / f"{name}.py").write_text(EVIL)
    (hostile / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (hostile / "evil.pth").write_text("import modeling_evil\n")
    watched = [trusted, hostile]
    if kind == "gguf":
        watched = [write_gguf(tiny, directory / "model.gguf") for directory in watched]
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *map(str, watched)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["modules"] == []
    expected = {"model.gguf"} if kind == "gguf" else {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"
    }  # fmt: skip
    assert set(seen["events"]) == expected
