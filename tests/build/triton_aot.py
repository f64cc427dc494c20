"""Compile every Triton kernel with every shipped configuration ahead of time, and report its resources.

Run as a program (not under the interpreter): prints one JSON line a kernel. `test_triton_aot.py` reads them.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nnfast.activation import kernels as activation
from nnfast.attention import kernels as attention
from nnfast.conv_bn_act import kernels as conv_bn_act
from nnfast.convolution import kernels as convolution
from nnfast.core.tuning import (
    CONV_CONFIGS,
    CONV_INPUT_WIDEST,
    CONV_WEIGHT_CONFIGS,
    ROTARY_HEAD,
    ConvConfig,
    attention_config,
    norm_rows_config,
    pointwise_config,
    rotary_config,
    rows_config,
    strided_rows_config,
)
from nnfast.focal_loss import kernels as focal_loss

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = [name for name, target in TARGETS.items() if target.backend == "cuda"]
ELEMENT_SIZES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}


Case = tuple[str, Any, dict[str, str], dict[str, Any], int, dict[str, Any]]
"""Of a kernel: name, function, types of its arguments, its constants, warps, other options."""


def cases() -> Iterator[Case]:
    """Every kernel with every configuration."""
    for dtype, size in ELEMENT_SIZES.items():
        yield from activation_cases(dtype, size)
        yield from sigmoid_cases(dtype, size)
        yield from rotary_cases(dtype, size)
        if dtype != "fp16":  # launched as bf16
            yield from softmax_cases(dtype, size)
            yield from batch_norm_cases(dtype, size)
            yield from convolution_cases(dtype, size)


def activation_cases(dtype: str, size: int) -> Iterator[Case]:
    """Both activations, both directions."""
    config = pointwise_config(size)
    for name in ("silu", "mish"):
        constants = {"ACTIVATION": name, "BLOCK": config.block}
        for direction, pointers in (
            ("forward", ("x_ptr", "y_ptr")),
            ("backward", ("grad_ptr", "x_ptr", "out_ptr")),
        ):
            types = {**dict.fromkeys(pointers, f"*{dtype}"), "size": "i64"}
            kernel = getattr(activation, f"{direction}_kernel")
            yield f"{name} {direction} {dtype}", kernel, types, constants, config.num_warps, {}


def sigmoid_cases(dtype: str, size: int) -> Iterator[Case]:
    """Sigmoid focal loss, both directions."""
    config = pointwise_config(size, heavy=True)
    scalars = {"alpha": "fp64", "gamma": "fp64", "size": "i64"}
    for direction, pointers in (
        ("forward", ("x_ptr", "target_ptr", "out_ptr")),
        ("backward", ("grad_ptr", "x_ptr", "target_ptr", "out_ptr")),
    ):
        types = {**dict.fromkeys(pointers, f"*{dtype}"), **scalars}
        kernel = getattr(focal_loss, f"sigmoid_{direction}_kernel")
        yield f"sigmoid {direction} {dtype}", kernel, types, {"BLOCK": config.block}, config.num_warps, {}


def rotary_cases(dtype: str, size: int) -> Iterator[Case]:
    """Rotary embedding of heads of 64, by halves and by neighbours, and of half a head of 128."""
    wide = "fp64" if dtype == "fp64" else "fp32"
    for pairs, rest, interleaved in ((32, 0, False), (32, 0, True), (32, 64, False)):
        config = rotary_config(pairs, size)
        constants = {"HALF": pairs, "REST": rest, "INTERLEAVED": interleaved}
        constants |= {"ROWS": config.rows, "BLOCK": config.block, "BLOCK_REST": max(rest, 1)}
        types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "cos_ptr": f"*{wide}", "sin_ptr": f"*{wide}"}
        types |= dict.fromkeys(("rows", "second", "third"), "i64")
        strides = (f"{x}_{place}" for x in ("x", "y", "cos", "sin") for place in ("first", "second", "third"))
        types |= dict.fromkeys(strides, "i64:16")
        name = f"rotary {'neighbours' if interleaved else 'halves'} {2 * pairs} of {2 * pairs + rest} {dtype}"
        yield name, attention.rotary_kernel, types, constants, config.num_warps, {}


def softmax_cases(dtype: str, size: int) -> Iterator[Case]:
    """Softmax focal loss: every configuration; spatial where rows share a tile."""
    wide = "fp64" if dtype == "fp64" else "fp32"
    for direction in ("forward", "backward"):
        kernel = getattr(focal_loss, f"softmax_{direction}_kernel")
        for spatial, alpha in ((False, True), (True, False)):
            lengths = [1 << n for n in reversed(range(18))]
            if spatial:
                configs = {strided_rows_config(length, size): length for length in lengths}
            else:
                configs = {rows_config(length, size, direction == "forward"): length for length in lengths}
            for config, classes in configs.items():
                if direction == "forward":
                    types = {"x_ptr": f"*{dtype}", "target_ptr": "*i64", "alpha_ptr": f"*{wide}"}
                    types |= {"loss_ptr": f"*{wide}", "gamma": "fp64"}
                else:
                    types = {"grad_ptr": f"*{wide}", "x_ptr": f"*{dtype}", "target_ptr": "*i64"}
                    types |= {"out_ptr": f"*{dtype}", "grad_step": "i64"}
                types |= {"slopes_ptr": f"*{wide}"}
                types |= dict.fromkeys(("rows", "classes", "all_rows", "ignore_index"), "i64")
                constants = {"SPATIAL": spatial, "ROWS": config.rows, "BLOCK": config.block}
                if direction == "forward" and not alpha:
                    del types["alpha_ptr"]
                    constants["alpha_ptr"] = None
                if direction == "forward":
                    constants["LOOP"] = classes > config.block
                layout = "spatial" if spatial else "rows"
                name = f"softmax {direction} {layout} {config.rows}x{config.block} {dtype}"
                yield name, kernel, types, constants, config.num_warps, focal_loss.ASSERT


BATCH_NORMS = {"mask": {"ACT": 2}, "two": {"ACT": 4}}
"""A residual and a mask; two batch norms. Each with an activation of its own."""

LENGTHS = ["rows", "columns", "channels", "rows_a_split", "partials"]


def batch_norm_cases(dtype: str, size: int) -> Iterator[Case]:
    """Batch norm + residual + activation: both layouts, narrow and whole rows, and what is merged."""
    wide = "fp64" if dtype == "fp64" else "fp32"
    lengths = {name: "i64:16" if name == "columns" else "i64" for name in LENGTHS}

    def case(kernel: str, layout: str, columns: int, constants: dict[str, Any], what: str = "") -> Case:
        function = getattr(conv_bn_act, f"{kernel}_kernel")
        config = norm_rows_config(columns, size, heavy=kernel == "sums")
        constants = {**constants, "INNERMOST": layout == "innermost", "ROWS": config.rows}
        constants["COLUMNS"] = config.block
        types = {}
        for name in function.arg_names:
            if name.endswith("_ptr") and name not in constants:
                as_x = ("x_ptr", "y_ptr", "grad_ptr", "dx_ptr", "dz_ptr", "residual_ptr", "dresidual_ptr")
                types[name] = f"*{dtype}" if name in as_x else "*u8" if name == "mask_ptr" else f"*{wide}"
            elif name in lengths:
                types[name] = lengths[name]
            elif name.islower() and name not in constants:
                types[name] = "fp64"
        name = f"batch_norm {kernel} {layout} {config.rows}x{config.block} {what} {dtype}"
        return name, function, types, constants, config.num_warps, {}

    for layout in ("innermost", "contiguous"):
        for columns in (64, 1 << 16):
            yield case("statistics", layout, columns, {})
            for kernel in ("forward", "sums", "backward"):
                for what, constants in BATCH_NORMS.items():
                    if what == "mask" and (layout == "innermost") != (columns == 64):
                        continue
                    arguments = getattr(conv_bn_act, f"{kernel}_kernel").arg_names
                    left_out = [n for n in arguments if what != "two" and n.startswith("residual_")]
                    if what == "mask" and kernel == "forward":
                        left_out.remove("residual_ptr")
                    if what == "two":
                        left_out += ["dz_ptr"]
                    else:
                        left_out += ["dresidual_ptr", "sum_dz_residual_xhat_ptr"]
                    if what != "mask":
                        left_out += ["mask_ptr"]
                    given = constants | {n: None for n in left_out if n.endswith("_ptr") and n in arguments}
                    yield case(kernel, layout, columns, given, what)

    merge = conv_bn_act.MERGE
    constants = {"INNERMOST": True, "PARTIALS": merge.rows, "CHANNELS": merge.block}
    types = {f"{n}_ptr": f"*{wide}" for n in ("partial", "mean", "var")}
    types |= {"x_ptr": f"*{dtype}"} | dict.fromkeys(("columns", "channels", "partials"), "i64")
    yield f"batch_norm merge {dtype}", conv_bn_act.merge_kernel, types, constants, merge.num_warps, {}
    pointers = ("running_mean", "running_var", "mean", "var", "offset")
    types = {f"{n}_ptr": f"*{dtype if n.startswith('running') else wide}" for n in pointers}
    types |= {"correction": "fp64", "momentum": "fp64", "channels": "i64"}
    yield f"batch_norm update {dtype}", conv_bn_act.update_kernel, types, {"CHANNELS": 256}, 4, {}


ATTENTION_KERNELS = ("forward", "grad_q", "grad_kv", "grad_bias")
PLAIN = ("padding", "left", "right")
"""What a call with plain scores may have."""
TERMS = (
    ("right", "padding", "mask", "bias"),
    ("right", "slopes", "cap"),
    ("right", "padding", "seed"),
)
"""Calls with others. What has all of them at once may spill a little."""
ROTARY = {
    "forward": (("right", "halves"), ("right", "halves", "keys"), ("right", "neighbours", "keys")),
    "grad_q": (("right", "halves"), ("right", "neighbours")),
    "grad_kv": (("right", "halves"), ("right", "neighbours")),
}
"""Calls with rotary embedding of all features; keys: forward turns these too. In half types."""
OPTIONAL = {"cap", *PLAIN, *itertools.chain(*TERMS)}
ALL_TERMS = os.environ.get("NNFAST_AOT_ALL") == "1"
"""Every configuration with each of TERMS, not with one of them in turn."""


HEADS = {"bf16": (64, 128, 256), "fp32": (64, 256), "tf32": (256,), "fp64": (64, 256)}
"""Head sizes compiled; what is not among them is launched as the next, and float16 as bfloat16."""


def attention_builds() -> Iterator[tuple[Case, str]]:
    """Attention: each configuration for plain scores, and for each kernel and target one with terms.

    Wide types have one configuration for all targets, and go to these in turn.
    """
    turn, terms = itertools.cycle(TARGETS), itertools.cycle(TERMS)
    for dtype, kernel in itertools.product(HEADS, ATTENTION_KERNELS):
        for place, head in enumerate(HEADS[dtype]):
            for number, target in enumerate(TARGETS if dtype == "bf16" else [next(turn)]):
                if dtype == "tf32" and target == "gfx942":
                    continue
                descriptors = dtype == "bf16" and target in ("sm_90", "sm_100")
                one = dtype != "bf16" or number % 3 == place
                variants = TERMS if ALL_TERMS else [next(terms)] if one else []
                if dtype == "bf16" and kernel != "grad_bias":
                    turning = ROTARY[kernel] if head <= ROTARY_HEAD else ()
                    turning = turning if ALL_TERMS else turning[number % len(ROTARY[kernel]) :][:1]
                    variants = [("left", "right"), *turning, *variants]
                for features in variants:
                    yield attention_case(kernel, target, dtype, head, features, descriptors), target


def attention_case(
    kernel: str, target: str, dtype: str, head: int, features: tuple[str, ...], descriptors: bool
) -> Case:
    """A kernel of attention as launched for a call with these features; descriptors: if it can."""
    function = getattr(attention, f"{kernel}_kernel")
    element, wide = ("fp32" if dtype == "tf32" else dtype), ("fp64" if dtype == "fp64" else "fp32")
    block_d = 1 << (head - 1).bit_length()
    rotary = {"halves", "neighbours", "keys"} & set(features)
    plain = set(features) - rotary <= set(PLAIN)
    launched = f"turning_{kernel}" if "keys" in rotary else kernel
    config = attention_config(launched, target, ELEMENT_SIZES[element], block_d, plain)
    constants: dict[str, Any] = {"D": head, "DV": head, "BLOCK_D": block_d, "BLOCK_DV": block_d}
    constants |= {name.upper(): name in features for name in ("cap", "left", "right")}
    constants |= {"PRECISION": "tf32" if dtype == "tf32" else "ieee"}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    if kernel == "forward":
        constants |= {"RAW": plain, "TURN_K": "keys" in rotary}
    if kernel != "grad_bias":
        constants |= {"HALF": head // 2 if rotary else 0, "INTERLEAVED": "neighbours" in rotary}
    if "DESCRIPTOR" in function.arg_names:
        constants["DESCRIPTOR"] = descriptors
    of = {"mask": "*u8", "padding": "*u8", "bounds": "*i32", "slopes": f"*{wide}", "seed": "*i64"}
    if dtype == "fp64":
        of |= dict.fromkeys(("mask", "padding"), "*i64")
    of |= dict.fromkeys(("lse", "level", "delta", "partial", "cos", "sin"), f"*{wide}")
    optional = {"bounds": "padding", "grad_bias": "bias"}
    left_out = set() if rotary else {"cos", "sin"}
    types = {}
    for name in function.arg_names:
        argument = name.removesuffix("_ptr")
        if name in constants:
            continue
        if name.endswith("_ptr"):
            feature = optional.get(argument, argument)
            if argument in left_out or (feature in OPTIONAL and feature not in features):
                constants[name] = None
            else:
                types[name] = of.get(argument, f"*{element}")
        elif name in ("mask_k", "bias_k", "padding_k", "grad_bias_k"):
            constants[name] = 1
        elif name in ("enlarge", "scale", "cap", "product_scale"):
            types[name] = "fp64"
        else:
            types[name] = (
                "i64"
                if name == "threshold"
                else "i32:16"
                if name[-2:] in ("_n", "_h", "_m") and name[:2] != "of" and name[:4] != "over"
                else "i32"
            )
    if constants.get("DESCRIPTOR"):
        rows, looped = (
            (config.block_m, ("q", "grad")) if kernel == "grad_kv" else (config.block_n, ("k", "v"))
        )
        types |= {f"{x}_ptr": f"tensordesc<{element}[1,1,{rows},{block_d}]>" for x in looped}
    kind = "plain" if plain else "terms"
    having = "+".join(features)
    name = f"attention {kernel} {kind} {head} {config.block_m}x{config.block_n} {having} {dtype}"
    return name, function, types, constants, config.num_warps, {"num_stages": config.num_stages}


CONVOLUTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "forward bias residual": ("forward", {"ACT": 1, "PROLOGUE": 0, "left_out": "prologue partial work"}),
    "forward prologue statistics": ("forward", {"ACT": 0, "PROLOGUE": 1, "left_out": "bias residual work"}),
    "forward split": ("forward", {"ACT": 0, "PROLOGUE": 0, "left_out": "prologue bias residual partial"}),
    "forward flat": ("forward", {"ACT": 0, "PROLOGUE": 0, "left_out": "prologue bias residual work"}),
    "input_gradient mask": (
        "input_gradient",
        {"ACT": 1, "PROLOGUE": 0, "left_out": "prologue partial x work"},
    ),
    "input_gradient prologue": ("input_gradient", {"ACT": 0, "PROLOGUE": 4, "left_out": "y added work"}),
    "input_gradient split": (
        "input_gradient",
        {"ACT": 0, "PROLOGUE": 0, "left_out": "prologue partial x y added"},
    ),
    "weight_gradient mask": ("weight_gradient", {"ACT": 1, "PROLOGUE": 0, "left_out": "prologue"}),
    "weight_gradient prologue": ("weight_gradient", {"ACT": 0, "PROLOGUE": 1, "left_out": "y bias_partial"}),
    "finish": ("finish", {"ACT": 1, "left_out": ""}),
    "finish_input_gradient": ("finish_input_gradient", {"PROLOGUE": 4, "left_out": "added"}),
}
"""Kernel and constants of what is compiled, and the pointers that are not given.

Of lengths nothing is known but that channels are multiples of 16.
"""

POINTWISE = {"images": 1, "height": 1, "out_height": 1, "pad_height": 0, "pad_width": 0}
"""Lengths of 1x1 convolutions; a 1 is compiled in."""


def convolution_cases(dtype: str, size: int) -> Iterator[Case]:
    """Convolutions of 3x3 with every configuration; what differs little between them with the first alone."""
    for what, (kernel, _) in CONVOLUTIONS.items():
        pairs = [("ieee", config) for config in _convolution_configs(what, kernel, size)]
        if dtype == "fp32" and what in ("forward prologue statistics", "input_gradient prologue"):
            pairs += [("tf32", config) for _, config in pairs]
        elif dtype == "fp32" and kernel == "weight_gradient":
            pairs += [("tf32", pairs[0][1])]
        for precision, config in pairs:
            yield convolution_case(what, dtype, config, precision)


def convolution_builds() -> Iterator[tuple[Case, str]]:
    """Those that the copy engine feeds: each configuration, kernel and epilogue, and of 1x1 a part."""
    for target in ("sm_90", "sm_100"):
        for what, (kernel, _) in CONVOLUTIONS.items():
            if "finish" in kernel or what == "forward flat":
                continue
            for i, config in enumerate(_convolution_configs(what, kernel, 2, boxes=True)):
                pixels = config.depth if kernel == "weight_gradient" else config.rows
                box = ((8, 8), (4, 4), (2, 2), (1, 1))[i]
                yield convolution_case(what, "bf16", config, box=box), target
                if "prologue" in what and i == 0:
                    yield convolution_case(what, "bf16", config, box=(1, pixels), pointwise=True), target


def _convolution_configs(what: str, kernel: str, size: int, boxes: bool = False) -> tuple[ConvConfig, ...]:
    configs = CONV_WEIGHT_CONFIGS[size] if kernel == "weight_gradient" else CONV_CONFIGS[size]
    configs = tuple(c for c in configs if not boxes or c.depth == 64)
    if kernel == "input_gradient":
        configs = tuple(c for c in configs if c.columns <= CONV_INPUT_WIDEST)
    one = "finish" in kernel or what.split()[-1] in ("split", "flat")
    return configs[-1:] if one else configs


def convolution_case(
    what: str,
    dtype: str,
    config: ConvConfig,
    precision: str = "ieee",
    box: tuple[int, int] = (0, 0),
    pointwise: bool = False,
) -> Case:
    """A kernel as launched for 3x3, or for 1x1; box: height and width of those that descriptors load."""
    wide = "fp64" if dtype == "fp64" else "fp32"
    kernel, given = CONVOLUTIONS[what]
    function = getattr(convolution, f"{kernel}_kernel")
    left_out = given["left_out"].replace("prologue", "center scale shift").split()
    side = 1 if pointwise else 3
    stride = 2 if what == "input_gradient mask" and not box[0] else 1
    known = {"KERNEL_HEIGHT": side, "KERNEL_WIDTH": side, "STRIDE_HEIGHT": stride, "STRIDE_WIDTH": stride}
    known |= {"FLAT": what == "forward flat", "SCALED": False, "PRECISION": precision, "EDGE": True}
    known |= {"ROWS": config.rows, "COLUMNS": config.columns, "DEPTH": config.depth, "GROUP": 8, **given}
    known |= {"BOX_HEIGHT": box[0], "BOX_WIDTH": box[1], **(POINTWISE if pointwise else {})}
    if "finish" in kernel:
        known["COLUMNS"] = 32
    known |= {f"{name}_ptr": None for name in left_out}
    constants = {name: value for name, value in known.items() if name in function.arg_names}
    types = {}
    for name in function.arg_names:
        narrow = ("x", "weight", "residual", "y", "grad", "added", "dx")
        if name.endswith("_ptr"):
            types[name] = f"*{dtype if name.removesuffix('_ptr') in narrow else wide}"
        elif name.islower():
            aligned = name.endswith("channels")
            types[name] = "fp64" if "slope" in name else "i32:16" if aligned else "i32"
    if box[0]:
        types |= _descriptors(kernel, dtype, config, box)
    types = {name: value for name, value in types.items() if name not in constants}
    tile = f"{config.rows}x{config.columns}x{config.depth}"
    boxes = f"boxes {box[0]}x{box[1]} " if box[0] else ""
    name = f"convolution {what} {boxes}{tile} {precision} {dtype}"
    return name, function, types, constants, config.num_warps, {"num_stages": config.num_stages}


def _descriptors(kernel: str, dtype: str, config: ConvConfig, box: tuple[int, int]) -> dict[str, str]:
    """Types of what descriptors load."""

    def image(pixels: int, channels: int) -> str:
        return f"tensordesc<{dtype}[{pixels // (box[0] * box[1])},{box[0]},{box[1]},{channels}]>"

    if kernel == "weight_gradient":
        grad = image(config.depth, config.rows)
        return {"grad_ptr": grad, "y_ptr": grad, "x_ptr": image(config.depth, config.columns)}
    of_image = image(config.rows, config.depth)
    if kernel == "forward":
        return {"x_ptr": of_image, "weight_ptr": f"tensordesc<{dtype}[{config.columns},{config.depth}]>"}
    weight = f"tensordesc<{dtype}[{config.depth},{config.columns}]>"
    return {"grad_ptr": of_image, "y_ptr": of_image, "weight_ptr": weight}


def compile_case(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    options: dict[str, Any],
    target: GPUTarget,
) -> Any:
    """As the launcher compiles it for tensors at 16-byte addresses; lengths that 16 divides are i64:16."""
    given = {**types, **dict.fromkeys(constants, "constexpr")}
    signature = {name: given[name].removesuffix(":16") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if given[name].startswith("*") or given[name].endswith(":16")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    if target.backend == "hip" and "num_stages" in options:
        options = {**options, "num_stages": min(options["num_stages"], 2)}  # as the launcher does
    return triton.compile(source, target, {"num_warps": warps, **options})


def resources(compiled: Any) -> dict[str, Any]:
    """Registers, bytes spilt to local memory, shared memory, and how wide the accesses are."""
    return {"offsets": _offset_bits(compiled.asm["ttir"]), **_machine_code(compiled)}


def _offset_bits(ttir: str) -> int:
    """Bits of the narrowest integers that a pointer is moved by."""
    return min(int(bits) for bits in re.findall(r"tt\.addptr .*, tensor<(?:\d+x)+i(\d+)>", ttir))


def _machine_code(compiled: Any) -> dict[str, Any]:
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        return {
            "registers": int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0]),
            # scalar registers are spilt to lanes of vector registers: memory is private_segment
            "spills": sum(
                map(int, re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text))
            ),
            "shared": compiled.metadata.shared,
            "wide": "global_load_dwordx4" in text and "global_store_dwordx4" in text,
        }
    ptx = compiled.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spills": sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage))),
        "shared": compiled.metadata.shared,
        "tensor_cores": [name for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if name in ptx],
        "copy_engine": "cp.async.bulk.tensor" in ptx,
        "wide": bool(
            re.search(r"ld\.global\.v[24]\.b(32|64)", ptx) and re.search(r"st\.global\.v[24]\.b(32|64)", ptx)
        ),
    }


@functools.cache
def builds() -> list[tuple[Case, str]]:
    """Cases and their targets.

    Some have a case for every block size: the first and the last go to all targets, those between, which
    have as much to do for a thread, to AMD's and to one of NVIDIA's in turn.
    """
    found: list[tuple[Case, str]] = []
    for _, group in itertools.groupby(cases(), lambda case: re.sub(r"\d+(x\d+)+", "", case[0])):
        sizes = list(group)
        for i, case in enumerate(sizes):
            one = NVIDIA[i % len(NVIDIA)]
            targets = TARGETS if case in (sizes[0], sizes[-1]) else (one, "gfx942")
            found += [(case, target) for target in targets]
    return found + list(attention_builds()) + list(convolution_builds())


def report(place: int) -> dict[str, Any]:
    """What becomes of one of the builds."""
    (name, *case), target = builds()[place]
    compiled = compile_case(*case, TARGETS[target])
    return {"case": name, "target": target, "warps": case[-2], **resources(compiled)}


def main() -> None:
    """Print a JSON line for every kernel, configuration and target."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        for found in pool.imap(report, range(len(builds())), chunksize=4):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
