"""The SIMT emulator finds every seeded bug, and the device building blocks are right under it and compile as CUDA."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from simt import toolchain
from simt.toolchain import ADDRESS, INITCHECK, PLAIN, REPOSITORY, SIMT, THREAD, UCONTEXT, Flavour

ORDERS = ("forward", "reverse", "random")

# Bug, the flavour whose detector finds it, and what its report says.
SEEDED_BUGS = [
    ("out_of_bounds_vector_tail", ADDRESS, "heap-buffer-overflow"),
    ("misaligned_vector", ADDRESS, "misaligned address"),
    ("shared_array_overrun", ADDRESS, "use-after-poison"),
    ("missing_barrier", THREAD, "data race"),
    ("missing_warp_barrier", THREAD, "data race"),
    ("missing_grid_barrier", THREAD, "data race"),
    ("missing_release_fence", THREAD, "data race"),
    ("release_fence_before_write", THREAD, "data race"),
    ("missing_acquire_fence", THREAD, "data race"),
    ("plain_read_of_atomic_counter", THREAD, "data race"),
    ("uninitialised_shared_memory", INITCHECK, "reads uninitialised shared memory"),
    ("divergent_barrier", PLAIN, "__syncthreads"),
    ("divergent_barrier_sites", PLAIN, "wait at another one"),
    ("early_exit_before_ballot", PLAIN, "__ballot_sync"),
    ("shuffle_outside_mask", PLAIN, "which is not in mask"),
    ("deadlock", PLAIN, "deadlock"),
    ("mismatched_collectives", PLAIN, "meets another collective"),
    ("too_much_shared_memory", PLAIN, "of which a block has 49152"),
    ("bad_launch_shape", PLAIN, "error code"),
    ("empty_grid", PLAIN, "error code"),
    ("grid_barrier_in_ordinary_launch", PLAIN, "not launched as cooperative"),
    ("cooperative_grid_too_large", PLAIN, "error code"),
]


def executable(stem: str, flavour: Flavour) -> Path:
    reason = toolchain.missing_runtime(flavour)
    if reason is not None:
        pytest.skip(reason)
    return toolchain.build_executable((SIMT / f"{stem}.cpp",), flavour)


def test_a_changed_header_is_compiled_again(tmp_path: Path) -> None:
    reason = toolchain.missing_runtime(PLAIN)
    if reason is not None:
        pytest.skip(reason)
    source = tmp_path / "answer.cpp"
    source.write_text('#include <cstdio>\n#include "answer.h"\nint main() { std::puts(ANSWER); }\n')
    for answer in ("yes", "no", "yes"):
        (tmp_path / "answer.h").write_text(f'#define ANSWER "{answer}"\n')
        toolchain.build_executable.cache_clear()
        assert toolchain.run(toolchain.build_executable((source,))).stdout == f"{answer}\n"


FLAVOURS = [PLAIN, UCONTEXT, ADDRESS, THREAD, INITCHECK]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("bug", "flavour", "report"), [pytest.param(*case, id=f"{case[0]}-{case[1].name}") for case in SEEDED_BUGS]
)
def test_seeded_bug_is_caught(bug: str, flavour: Flavour, report: str, order: str) -> None:
    result = toolchain.run(executable("seeded_bugs", flavour), bug, order)
    assert result.returncode != 0
    assert report in result.stdout + result.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("flavour", FLAVOURS, ids=lambda flavour: flavour.name)
def test_right_twins_of_the_seeded_bugs_pass_every_detector(flavour: Flavour, order: str) -> None:
    result = toolchain.run(executable("seeded_bugs", flavour), "correct", order)
    assert (result.stdout, result.stderr, result.returncode) == ("ok\n", "", 0)


@pytest.mark.parametrize("bug", ["missing_release_fence", "missing_acquire_fence", "uninitialised_shared_memory"])
def test_seeded_bug_shows_in_no_result(bug: str) -> None:
    """Why detectors are needed: these give the right result in every order."""
    for order in ORDERS:
        assert toolchain.run(executable("seeded_bugs", PLAIN), bug, order).stdout == "ok\n"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("flavour", FLAVOURS, ids=lambda flavour: flavour.name)
def test_device_pieces_over_sizes_and_alignments(flavour: Flavour, order: str) -> None:
    program = executable("device_pieces_sweep", flavour)
    result = toolchain.run(program, "few" if flavour is THREAD else "all", order)
    assert (result.stdout, result.stderr, result.returncode) == ("ok\n", "", 0)


@pytest.fixture(scope="module")
def built_module() -> ModuleType:
    reason = toolchain.missing_runtime(PLAIN)
    if reason is not None:
        pytest.skip(reason)
    return toolchain.build_module(SIMT / "device_pieces.cpp")


@pytest.fixture
def pieces(built_module: ModuleType) -> ModuleType:
    built_module.configure()
    return built_module


def tree_sum(values: np.ndarray) -> np.generic:
    """The butterfly of warp_reduce: lane i and lane i xor distance, distance halving."""
    while values.size > 1:
        half = values.size // 2
        values = values[:half] + values[half:]
    return values[0]


def block_sum(values: np.ndarray) -> np.generic:
    warps = np.zeros(32, values.dtype)
    for warp in range(values.size // 32):
        warps[warp] = tree_sum(values[32 * warp : 32 * warp + 32])
    return tree_sum(warps)


def grid_sum(values: np.ndarray) -> np.generic:
    """In channel_reduce.cuh's order: slices of vectors, each thread's elements one after the other, then the trees."""
    threads, vector = 256, 16 // values.itemsize
    units = -(-values.size // vector)
    length = max(1, -(-units // min(max(units // (8 * threads), 1), 1024)))
    slices = padded(values, length * vector).reshape(-1, length * vector)
    sums = [block_sum(thread_sums(padded(part, threads * vector), threads, vector)) for part in slices]
    return block_sum(thread_sums(padded(np.array(sums), threads), threads, 1))


def padded(values: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(values, (0, -values.size % multiple))


def thread_sums(values: np.ndarray, threads: int, vector: int) -> np.ndarray:
    of_threads = values.reshape(-1, threads, vector).transpose(1, 0, 2).reshape(threads, -1)
    return np.add.accumulate(of_threads, axis=1)[:, -1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threads", [32, 64, 96, 256, 1024])
def test_block_reduce_gives_every_thread_the_same_bits(pieces: ModuleType, threads: int, dtype: type) -> None:
    x = np.random.default_rng(threads).normal(size=threads).astype(dtype)
    expected = (x.min(), x.max(), block_sum(x))
    for order in ORDERS:
        pieces.configure(order, seed=1)
        assert set(pieces.reduce_block(x)) == {expected}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 31, 32, 33, 511, 512, 513, 4095, 4096, 4097, 16_385, 50_000])
def test_grid_reduction_depends_on_neither_grid_nor_order(pieces: ModuleType, size: int, dtype: type) -> None:
    x = np.random.default_rng(size).normal(size=size).astype(dtype)
    expected = (x.min(), x.max(), grid_sum(x))
    for order in ORDERS:
        for seed, concurrent_blocks in ((1, 1), (2, 3), (3, 8)):
            pieces.configure(order, seed=seed, concurrent_blocks=concurrent_blocks)
            assert pieces.reduce(x) == expected


def test_empty_reduction_is_the_identity(pieces: ModuleType) -> None:
    assert pieces.reduce(np.zeros(0, np.float32)) == (np.inf, -np.inf, 0)


@pytest.mark.parametrize("position", [0, 31, 32, 127, 128, 600, 4096, 9000, 16_384])
def test_min_max_propagates_nan(pieces: ModuleType, position: int) -> None:
    x = np.arange(16_385, dtype=np.float32)
    x[position] = np.nan
    minimum, maximum, _ = pieces.reduce(x)
    assert np.isnan(minimum)
    assert np.isnan(maximum)


@pytest.mark.parametrize("order", ORDERS)
def test_cooperative_grid_meets_at_the_grid_barrier(pieces: ModuleType, order: str) -> None:
    pieces.configure(order, seed=3)
    x = np.ones(1000, np.float32)
    assert (pieces.add_total(x, 4) == 1001).all()


def test_cooperative_grid_is_limited_by_the_device(pieces: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="too many blocks in cooperative launch"):
        pieces.add_total(np.ones(1000, np.float32), 5)
    pieces.configure(multiprocessors=5, blocks_per_multiprocessor=1)
    assert (pieces.add_total(np.ones(1000, np.float32), 5) == 1001).all()


def test_grid_stride_grid_fits_the_work_and_the_device(pieces: ModuleType) -> None:
    pieces.configure(multiprocessors=3, blocks_per_multiprocessor=4)
    assert [pieces.blocks_for(items, 64) for items in (1, 64, 65, 768, 769, 1 << 40)] == [1, 1, 2, 12, 12, 12]


def test_refused_launch_returns_its_error_and_leaves_none(pieces: ModuleType) -> None:
    assert pieces.refused_launch() == ("cudaErrorInvalidConfiguration", "cudaSuccess")


@pytest.mark.parametrize("order", ORDERS)
def test_warp_operations_as_documented_by_cuda(pieces: ModuleType, order: str) -> None:
    pieces.configure(order, seed=5)
    ballot = sum(1 << lane for lane in range(0, 32, 3))
    np.testing.assert_array_equal(pieces.warp_operations(), [np.arange(32) ^ 9, np.full(32, ballot)])


@pytest.mark.parametrize("order", ORDERS)
def test_atomics_over_a_three_dimensional_grid(pieces: ModuleType, order: str) -> None:
    pieces.configure(order, seed=7, concurrent_blocks=2)
    threads = 3 * 2 * 2 * 4 * 3 * 2
    assert pieces.atomic_operations() == [threads * (threads - 1) // 2, 511, 1, 1, threads % 10]


def test_device_pieces_compile_as_cuda(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    source = tmp_path / "device_pieces.cu"
    source.write_text('#include "device_pieces.cuh"\n')
    command = [
        *(nvcc, "-std=c++17", "-c", str(source), "-o", str(source.with_suffix(".o"))),
        *("-gencode=arch=compute_75,code=sm_75", "-gencode=arch=compute_100,code=sm_100"),
        *(f"-I{SIMT}", f"-I{REPOSITORY / 'csrc'}"),
        *("--fmad=false", "-Xptxas=-warn-spills,-warn-lmem-usage,-Werror", "-Werror=all-warnings"),
        "-Xcompiler=-Wall,-Wextra,-Werror",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
