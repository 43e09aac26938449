"""Compiles every GPU kernel ahead of time and prints what came out as JSON; run in a process that does not interpret.

``python gate.py``: Triton kernels for each architecture with the block sizes that the package launches, and the CUDA
C++ files by nvcc, where there is one, for its warnings; NVRTC, which CuPy calls, compiles them for all in the tests. No
GPU is needed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Of a block; those beside `ARCHITECTURES` for the kernels alone whose tiles depend on the device."""
SOURCES = ("peaks/peaks.cu", "segment/label.cu", "gpu_common/gram.cu", "gpu_common/svm.cu", "knn/refine.cu")

_POINTERS = {"f16": "*fp16", "bf16": "*bf16", "f32": "*fp32", "f64": "*fp64"}
_ONE = {"f16": (90,), "bf16": (80,), "f64": (90,)}
_TENSOR_CORES = {90: "wgmma.mma_async", 100: "tcgen05.mma"}  # "mma.sync" on all others


def cases() -> list[dict]:
    """Each kernel with the argument types and constants of a launch: name, kernel, types, constants, options."""
    import torch
    import triton

    from ttt4as_fast.kernels.bilinear import gpu as bilinear
    from ttt4as_fast.kernels.coreset import gpu as coreset
    from ttt4as_fast.kernels.gpu_common import probe, svm
    from ttt4as_fast.kernels.knn import gpu as knn
    from ttt4as_fast.kernels.segment import gpu_stages as stages

    found = []

    def add(
        name: str,
        kernel,
        types: dict,
        constants: dict,
        tensor_cores: bool = False,
        plain: tuple = (),
        architectures: tuple = (),
        **options,
    ) -> None:
        """One case; sizes in `plain` are not known to be multiples of 16."""
        found.append(
            {
                "name": name,
                "kernel": kernel,
                "types": types,
                "constants": constants,
                "tensor_cores": tensor_cores,
                "plain": plain,
                "architectures": architectures,
                "options": options,
            }
        )

    def typed(kernel, **kinds: str) -> dict:
        """Types of all arguments: pointers as given, every other one an int32 multiple of 16 (as real sizes are)."""
        return {name: kinds.get(name, "i32") for name in kernel.arg_names}

    def axes(weight: str) -> dict:
        """Types of the interpolation tables; those that a kernel does not take are passed over."""
        names = {f"{axis}_{field}_ptr": "*i32" for axis in ("row", "col") for field in ("lower", "start")}
        return names | {"row_weight_ptr": weight, "col_weight_ptr": weight}

    add("probe", probe._count, typed(probe._count, x_ptr="*i32"), {"BLOCK": 32})
    for dtype, pointer in _POINTERS.items():
        kind = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}[dtype]
        weight = "*fp64" if dtype == "f64" else "*fp32"
        tables = axes(weight)
        for last in (False, True):
            block_c, block_w = bilinear.upsample_blocks(1024, 224, last)
            unit = {"x_c": 1, "y_c": 1} if last else {"x_w": 1, "y_w": 1}
            add(
                f"upsample-{'nhwc' if last else 'nchw'}-{dtype}",
                bilinear.upsample_kernel,
                typed(bilinear.upsample_kernel, x_ptr=pointer, y_ptr=pointer, **tables),
                {"BLOCK_C": block_c, "BLOCK_W": block_w, "CHANNELS_LAST": last, **unit},
            )
        add(
            f"sample-{dtype}",
            bilinear.sample_kernel,
            typed(
                bilinear.sample_kernel,
                x_ptr=pointer,
                y_ptr=weight,
                row_ptr="*i64",
                col_ptr="*i64",
                **tables,
            ),
            {"x_w": 1, "BLOCK_N": 16, "BLOCK_C": 64},
        )
        for query in (False, True):
            add(
                f"knn-prepare-{'query' if query else 'bank'}-{dtype}",
                knn.prepare_kernel,
                typed(
                    knn.prepare_kernel,
                    x_ptr=pointer,
                    centre_ptr="*fp32",
                    low_ptr="*fp16",
                    facts_ptr="*fp64",
                    largest_ptr="*fp64",
                ),
                {"x_d": 1, "UNIT": 8, "QUERY": query, "BLOCK_D": 1024, "WHOLE": True},
                plain=("dim", "x_n"),
                num_warps=knn.prepare_warps(kind),
            )
        few, many = 1, knn.MANY_QUERIES
        every = [(1, few), (9, few), (knn.MAX_K, few), (1, many), (16, many)]
        for k, queries in every if dtype == "f32" else [(9, few)]:
            size = max(2, triton.next_power_of_2(k))
            warps = knn.refine_warps(queries, size)  # the longest list needs the most registers: on every architecture
            add(
                f"knn-refine-k{k}-{'' if warps == 4 else 'many-'}{dtype}",
                knn.refine_kernel,
                typed(
                    knn.refine_kernel,
                    q_ptr=pointer,
                    b_ptr=pointer,
                    least_ptr="*i32",
                    second_ptr="*i32",
                    facts_ptr="*fp64",
                    distance_ptr="*fp32",
                    index_ptr="*i64",
                ),
                {"q_d": 1, "b_d": 1, "UNIT": 8, "LIST": size, "SQUARED": False}
                | knn.refine_blocks(size, 512, 1024, kind, warps),
                plain=("dim", "q_n", "b_n"),
                architectures=() if k == knn.MAX_K else _ONE.get(dtype, (90,)),
                num_warps=warps,
                maxnreg=knn.REFINE_REGISTERS,
            )
        accumulator = "*fp64" if dtype == "f64" else "*fp32"
        # 344 channels: multiples of 8 that the compiler does not see
        for columns in (0, coreset._SKETCH):
            add(
                f"coreset-{'sketched-' if columns else ''}{dtype}",
                coreset.pick_kernel,
                typed(
                    coreset.pick_kernel,
                    x_ptr=pointer,
                    sketch_ptr="*fp32" if columns else accumulator,
                    margin_ptr="*fp32" if columns else accumulator,
                    list_ptr="*i32" if columns else "*i64",
                    nearest_ptr=accumulator,
                    picks_ptr="*i64",
                    far_ptr=accumulator,
                    far_row_ptr="*i32",
                    previous_ptr=accumulator,
                    previous_row_ptr="*i32",
                ),
                {
                    "x_d": 1,
                    "UNIT": 8,
                    "PROGRAMS": 660,
                    "SPAN": 1024,
                    "BLOCK_N": coreset.block_n_of(kind),
                    "BLOCK_D": coreset._BLOCK_D,
                    "SKETCH": columns,
                    "BLOCK_S": coreset._BLOCK_S,
                },
                plain=("n", "dim", "x_n"),
                **coreset.options_of(kind),
            )
        cells, block_c = stages.decision_blocks(1024)
        for last in (False, True):
            add(
                f"segment-decision-{'nhwc' if last else 'nchw'}-{dtype}",
                stages.decision_kernel,
                typed(
                    stages.decision_kernel,
                    x_ptr=pointer,
                    weights_ptr="*fp32",
                    report_ptr="*fp64",
                    status_ptr="*i32",
                    low_ptr="*fp32",
                ),
                {"BLOCK_P": cells, "BLOCK_C": block_c, "CHANNELS_LAST": last, "x_c" if last else "x_p": 1},
            )
        add(
            f"segment-basis-{dtype}",
            stages.basis_kernel,
            typed(
                stages.basis_kernel,
                x_ptr=pointer,
                basis_ptr="*fp32",
                points_ptr="*i32",
                cells_ptr="*i32",
                counts_ptr="*i32",
                status_ptr="*i32",
                **axes("*fp32"),
            ),
            {"x_p": 1, "BLOCK_M": 16, "BLOCK_C": 64},
            plain=("h", "w"),
        )
    add(
        "segment-upsample-threshold",
        stages.upsample_threshold_kernel,
        typed(
            stages.upsample_threshold_kernel,
            low_ptr="*fp32",
            status_ptr="*i32",
            decision_ptr="*fp32",
            mask_ptr="*i1",
            code_ptr="*i8",
            **axes("*fp32"),
        ),
        {"BLOCK": 1024},
        plain=("h", "w"),
    )
    add(
        "svm-weights",
        svm.weights_kernel,
        typed(
            svm.weights_kernel,
            basis_ptr="*fp32",
            beta_ptr="*fp64",
            counts_ptr="*i32",
            status_ptr="*i32",
            weights_ptr="*fp32",
        ),
        dict(zip(("BLOCK_M", "BLOCK_C"), svm.WEIGHTS_BLOCKS, strict=True)),
    )
    floats = {"facts_ptr": "*fp64", "norm_ptr": "*fp32"}
    packed = {"least_ptr": "*i32", "second_ptr": "*i32"}
    add(
        "knn-reduce-product",
        knn.reduce_product_kernel,
        typed(knn.reduce_product_kernel, product_ptr="*fp32", **floats, **packed),
        {"BLOCK_Q": 16, "BLOCK_N": 256},
    )
    for architecture in SHARED_LIMIT:
        capability = architecture // 10, architecture % 10
        with mock.patch("torch.cuda.get_device_capability", lambda device, found=capability: found):
            block_q, block_n, block_d, warps, stages = knn.tile_of.__wrapped__(torch.device("cuda"))
        constants = {"BLOCK_Q": block_q, "BLOCK_N": block_n, "BLOCK_D": block_d, "SWIZZLE": 8}
        kernel, tensors = knn.propose_kernel, {"q_ptr": "*fp16", "b_ptr": "*fp16"}
        if architecture >= 90:
            kernel, constants = knn.propose_persistent_kernel, constants | {"PROGRAMS": 132}
            tensors = {"q": f"tensordesc<fp16[{block_q}, {block_d}]>", "b": f"tensordesc<fp16[{block_n}, {block_d}]>"}
        types = typed(kernel, **tensors, **floats, **packed)
        options = {"num_warps": warps, "num_stages": stages}
        add("knn-propose", kernel, types, constants, True, architectures=(architecture,), **options)
    return found


def compile_triton(case: dict, architecture: int) -> dict:
    """One kernel for one architecture: shared memory, registers, stack, and which matrix instructions it holds."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ttt4as_fast.kernels.gpu_common import FUSED

    constants, options = case["constants"], case["options"] | FUSED
    kernel = case["kernel"]
    signature = {name: "constexpr" if name in constants else kind for name, kind in case["types"].items()}
    places = {name: (kernel.arg_names.index(name),) for name in signature}
    free = (*(kernel.do_not_specialize or ()), *case["plain"])
    attributes = {
        places[name]: [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if not kind.startswith(("constexpr", "tensordesc")) and name not in free
    }
    source = ASTSource(kernel, signature, {places[name]: value for name, value in constants.items()}, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = built.asm["ptx"]
    return {
        "shared": built.metadata.shared,
        **resources(built.asm["cubin"]),
        "tensor_cores": [name for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if name in ptx],
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v(?:4\.b32|2\.b64)", ptx)),
        "wanted": _TENSOR_CORES.get(architecture, "mma.sync") if case["tensor_cores"] else None,
    }


def resources(cubin: bytes) -> dict:
    """Registers, stack frame and local memory of a cubin's only kernel."""
    (found,) = resources_of(cubin).values()
    return {name: found[name] for name in ("registers", "stack", "local")}


def resources_of(cubin: bytes) -> dict[str, dict]:
    """Registers, stack frame, local and static shared memory of a cubin's kernels, as ``cuobjdump`` states them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {}
    for name, report in re.findall(r"Function (\w+):\s*(.*?)(?=Function |\Z)", text, re.S):
        numbers = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report))
        names = {"registers": "REG", "stack": "STACK", "local": "LOCAL", "shared": "SHARED"}
        found[name] = {ours: int(numbers[theirs]) for ours, theirs in names.items()}
    return found


def compile_cuda(file: str, architecture: int) -> dict:
    """One CUDA C++ file by nvcc, whose warnings are errors."""
    from ttt4as_fast.kernels.gpu_common import cuda

    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder) / "unit.cu"
        unit.write_text(cuda.source(file), encoding="utf-8")
        arch = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
        command = ["nvcc", "-std=c++17", "-Werror", "all-warnings", *arch, "-cubin", "-o", f"{folder}/unit.cubin"]
        done = subprocess.run([*command, str(unit)], capture_output=True, text=True)
    return {"error": done.stderr} if done.returncode else {}


def main() -> None:
    """Print ``{"triton": {name: {arch: facts}}, "cuda": {file: facts}}``."""
    report: dict = {"triton": {}, "cuda": {}}
    for case in cases():
        facts = report["triton"].setdefault(case["name"], {})
        # float32 for every architecture; the other dtypes, which differ in their loads alone, for one each.
        for architecture in case["architectures"] or _ONE.get(case["name"].split("-")[-1], ARCHITECTURES):
            try:
                facts[architecture] = compile_triton(case, architecture)
            except Exception as error:
                facts[architecture] = {"error": f"{type(error).__name__}: {error}"}
    if shutil.which("nvcc"):
        report["cuda"] = {file: compile_cuda(file, 90) for file in SOURCES}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
