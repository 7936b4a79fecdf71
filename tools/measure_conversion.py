"""How much memory a conversion takes: a random Mixtral of the given size, imported, exported and verified.

    python tools/measure_conversion.py --gb 4 --shards 8 --work /tmp/mixtral

Each step is a process of its own; what counts is its largest resident memory above that of an interpreter which has
imported the same modules. Pages of mapped files are counted too. Needs three times the size on disk.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_engine.host.console import run_program  # noqa: E402

WIDTH, HIDDEN, EXPERTS, VOCABULARY = 14336 // 4, 1024, 8, 32000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the model in bf16 (default 4)")
    parser.add_argument("--shards", type=int, default=8, help="files that it lies in (default 8)")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    options = parser.parse_args(arguments)
    if options.work.exists() and any(options.work.iterdir()):
        parser.error(f"--work {options.work} is not empty")
    hf, checkpoint, back = (options.work / name for name in ("hf", "checkpoint", "back"))
    size = write_model(hf, options.gb, options.shards)
    base = peak(
        ["-c", "import tools.convert_hf, moe_engine.checkpoint.hf.export, moe_engine.checkpoint.hf.to_checkpoint"]
    )[0]
    largest = max(path.stat().st_size for path in hf.glob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB in {options.shards} files of at most {largest / 1e9:.2f} GB; interpreter {base:.2f} GB")
    for name, *more in (
        ("import", "--hf", hf, "--out", checkpoint),
        ("export", "--checkpoint", checkpoint, "--out", back, "--shard-gb", largest / 1e9),
        ("verify", "--hf", back, "--checkpoint", checkpoint),
    ):
        memory, seconds = peak(["tools/convert_hf.py", name, *map(str, more)])
        print(f"{name}  {memory - base:.2f} GB above the interpreter, {seconds:.0f} s")
    return 0


def write_model(folder: Path, gigabytes: float, shards: int) -> int:
    """A Mixtral with weights that are numbers, not noise from a generator: fast to make, and no two tensors alike."""
    import torch

    from moe_engine.checkpoint.hf.places import places
    from moe_engine.checkpoint.shard import Entry, stream_shard
    from moe_engine.config import Model
    from moe_engine.config.hf import model_to_hf
    from moe_engine.config.hf.families.mixtral import TENSORS
    from moe_engine.config.sizes import parameter_counts
    from moe_engine.config.weights import weight_shapes

    def model(layers: int) -> Model:
        return Model(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=layers,
            num_attention_heads=16, num_key_value_heads=8, num_local_experts=EXPERTS, rope_theta=1e6,
        )  # fmt: skip

    one, two = parameter_counts(model(1)).total, parameter_counts(model(2)).total
    chosen = model(max(1, round((gigabytes * 1e9 / 2 - one) / (two - one)) + 1))
    where = places(TENSORS["per-expert"], weight_shapes(chosen))
    entries = {name: Entry(torch.bfloat16, place.shape) for name, place in where.items()}
    total = sum(entry.nbytes for entry in entries.values())
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    done = 0
    for name, entry in entries.items():
        weight_map[name] = f"model-{min(done * shards // total, shards - 1) + 1:05d}-of-{shards:05d}.safetensors"
        done += entry.nbytes

    def tensor_of(name: str) -> torch.Tensor:
        count = torch.Size(entries[name].shape).numel()
        words = torch.arange(count, dtype=torch.int64).mul_(2654435761).add_(hash(name)).to(torch.int16)
        return words.bitwise_and_(0x3FFF).view(torch.bfloat16).view(entries[name].shape)

    for file in sorted(set(weight_map.values())):
        mine = {name: entries[name] for name in entries if weight_map[name] == file}
        stream_shard(folder / file, mine, tensor_of, {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(model_to_hf(chosen, "mixtral", "bfloat16", 5, {})))
    return total


def peak(command: list[str]) -> tuple[float, float]:
    """Largest resident memory of a Python process, in GB, and its seconds; it must end well."""
    code = "import atexit,sys,runpy;atexit.register(lambda: print(open('/proc/self/status').read(), file=sys.stderr));"
    run = f"sys.argv={command!r};runpy.run_path(sys.argv[0], run_name='__main__')"
    run = command[1] if command[0] == "-c" else run
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code + run], cwd=ROOT, capture_output=True, text=True, check=True)
    found = re.findall(r"VmHWM:\s+(\d+) kB", done.stderr)
    return int(found[-1]) * 1024 / 1e9, time.perf_counter() - start


if __name__ == "__main__":
    run_program(main)
