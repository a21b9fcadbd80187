"""Products with packed weights: bandwidth, and ratios to what else there is on the device.

For each shape, format and batch: the time of the kernel (or of the reference where none applies),
the bytes of packed weight and activations that it has to move a second, as a share of a copy's
bandwidth measured in the same run, and its speed over a bfloat16 product and over the libraries'
kernels for the same bits that are installed (torchao, gemlite). Above 1 this one is faster.

On a GPU: CUDA events, the L2 cache flushed before each call, medians of repeats. On the CPU the
candidates take turns under `perf_counter`, with weights in whatever cache they fit.

    python benchmarks/kernels.py [--models llama-3-8b] [--formats int4-g128] [--json PATH]
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from quantization.formats import FORMATS, Packed
from quantization.kernels.operator import kernel_for, packed_linear

MODELS = {  # outputs x inputs: attention's query and output, then the MLP's way up and down
    "smollm2-135m": ((576, 576), (1536, 576), (576, 1536)),
    "qwen2.5-0.5b": ((896, 896), (4864, 896), (896, 4864)),
    "llama-3-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "qwen2.5-32b": ((5120, 5120), (27648, 5120), (5120, 27648)),
}
BATCHES = {"cuda": (1, 4, 16, 256, 2048), "cpu": (1, 4, 16, 256)}
FORMATS_MEASURED = {
    "cuda": ("int4-g128", "int4-g64-asym", "int3-g64", "int8-channel", "fp8-e4m3", "nvfp4",
             "nf4-g64", "squeezellm4"),
    "cpu": ("int4-g128", "int8-channel"),
}  # fmt: skip
L2_BYTES = 2**28  # more than any GPU's
Call = Callable[[], Tensor]


def seconds(calls: dict[str, Call], device: str, repeats: int) -> dict[str, float]:
    """Median seconds of each call, interleaved."""
    for call in calls.values():  # compiles, tunes and repacks
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(_gpu_seconds(call) if device == "cuda" else _cpu_seconds(call))
    return {name: statistics.median(found) for name, found in times.items()}


def _cpu_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_seconds(call: Call) -> float:
    torch.empty(L2_BYTES, dtype=torch.int8, device="cuda").zero_()
    torch.cuda._sleep(2**20)  # the GPU waits until the call is queued: launches aren't timed
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def copy_bandwidth(device: str, repeats: int) -> float:
    """Bytes read and written a second."""
    source = torch.empty(L2_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    taken = seconds({"copy": lambda: target.copy_(source)}, device, repeats)["copy"]
    return 2 * L2_BYTES / taken


def packed_weight(name: str, weight: Tensor) -> Packed:
    """Packed without a search: tables cost minutes to fit at these sizes, and values don't matter."""
    format = FORMATS[name]
    rows = weight[:256].float()
    packed = format.pack(*format.nearest(rows))
    times = -(-len(weight) // len(rows))
    tensors = {
        part: torch.cat([tensor] * times)[: len(weight)] if len(tensor) == len(rows) else tensor
        for part, tensor in packed.tensors.items()
    }
    return Packed(name, tuple(weight.shape), tensors)


def libraries(name: str, weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The libraries' kernels for a format of the same bits, if they are installed and take it."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for library, make in (("torchao", _torchao), ("gemlite", _gemlite)):
        try:
            layer = make(name, weight)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # versions differ in what they take; the row says "-"
            print(f"  {library}: {type(error).__name__}: {str(error)[:80]!r}")
            continue
        if layer is not None:
            found[library] = layer
    return found


def _linear(weight: Tensor) -> torch.nn.Linear:
    rows, columns = weight.shape
    layer = torch.nn.Linear(columns, rows, bias=False, device=weight.device, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def _torchao(name: str, weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    from torchao import quantization as ao

    layer = _linear(weight)
    if name.startswith("int4-g"):
        ao.quantize_(layer, ao.Int4WeightOnlyConfig(group_size=FORMATS[name].columns))
    elif name == "int8-channel":
        ao.quantize_(layer, ao.Int8WeightOnlyConfig())
    elif name == "fp8-e4m3":
        ao.quantize_(layer, ao.Float8WeightOnlyConfig())
    else:
        return None
    return layer


def _gemlite(name: str, weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    from gemlite.helper import A16W4_HQQ_INT, A16W8_INT8

    layer = _linear(weight)
    if name.startswith("int4-g"):
        return A16W4_HQQ_INT(device=str(weight.device), dtype=weight.dtype).from_linear(layer)
    if name == "int8-channel":
        return A16W8_INT8(device=str(weight.device), dtype=weight.dtype).from_linear(layer)
    return None


def measure(
    name: str, weight: Tensor, batches: tuple[int, ...], bandwidth: float, repeats: int
) -> list[dict[str, object]]:
    """A row a batch size."""
    device = weight.device.type
    packed, others = packed_weight(name, weight), libraries(name, weight)
    rows: list[dict[str, object]] = []
    for batch in batches:
        x = torch.randn(batch, weight.shape[1], device=weight.device, dtype=weight.dtype)
        calls: dict[str, Call] = {
            "packed": lambda x=x: packed_linear(x, packed),
            "bf16": lambda x=x: functional.linear(x, weight),
        }
        calls |= {library: lambda x=x, f=layer: f(x) for library, layer in others.items()}
        with torch.inference_mode():
            taken = seconds(calls, device, repeats)
        kernel = kernel_for(name, packed.shape, batch, x.dtype, weight.device)
        moved = packed.nbytes + 2 * batch * sum(packed.shape)
        best = min((taken[library] for library in others), default=None)
        rows.append({
            "format": name, "rows": packed.shape[0], "columns": packed.shape[1], "batch": batch,
            "kernel": kernel.name if kernel else "reference",
            "microseconds": round(taken["packed"] * 1e6, 1),
            "bytes_moved": moved,
            "gigabytes_a_second": round(moved / taken["packed"] / 1e9, 1),
            "share_of_copy": round(moved / taken["packed"] / bandwidth, 3),
            "over_bf16": round(taken["bf16"] / taken["packed"], 3),
            "over_libraries": best and round(best / taken["packed"], 3),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first = list(MODELS) if device == "cuda" else list(MODELS)[:1]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=first)
    parser.add_argument("--formats", nargs="+", default=FORMATS_MEASURED[device])
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES[device])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    bandwidth = copy_bandwidth(device, given.repeats)
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    present = [n for n in ("torchao", "gemlite") if importlib.util.find_spec(n)]
    print(f"libraries to compare with: {', '.join(present) or 'none'}")
    print(f"{device} ({name}), copy {bandwidth / 1e9:.1f} GB/s; ratios above 1: packed is faster")
    print(f"{'format':<16}{'shape':>14}{'batch':>7}{'kernel':>16}{'us':>10}{'GB/s':>9}"
          f"{'of copy':>9}{'/ bf16':>8}{'/ libs':>8}")  # fmt: skip
    results = []
    for shape in dict.fromkeys(shape for model in given.models for shape in MODELS[model]):
        weight = torch.randn(shape, device=device, dtype=torch.bfloat16) / shape[1] ** 0.5
        for format in given.formats:
            if FORMATS[format].refusal(shape) is not None:
                continue
            for row in measure(format, weight, given.batches, bandwidth, given.repeats):
                results.append(row)
                libs = row["over_libraries"]
                print(f"{format:<16}{f'{shape[0]} x {shape[1]}':>14}{row['batch']:>7}"
                      f"{row['kernel']:>16}{row['microseconds']:>10}{row['gigabytes_a_second']:>9}"
                      f"{row['share_of_copy']:>9}{row['over_bf16']:>8}{libs or '-':>8}")  # fmt: skip
    if given.json:
        summary = {
            "device": f"{device} ({name})", "torch": torch.__version__,
            "copy_gigabytes_a_second": round(bandwidth / 1e9, 1), "products": results,
        }  # fmt: skip
        given.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
