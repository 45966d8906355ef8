"""Profiles: what an inference engine computes in integers, as far as export and recipes have to know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """The habits of one engine.

    Attributes:
        name: as users give it.
        symmetric_only: zero points other than 0 are refused, and so are unsigned activations.
        narrow_by_clip: a grid narrower than its integer type is exact by a Clip; without, the lowest level of a narrow
            int8 grid, -127, may saturate one step lower.
        unsigned: activations are uint8, and so are weights beyond 7 bits. ONNX Runtime fuses int8 activations on some
            processors only, and on those without VNNI sums of uint8 times int8 saturate at 16 bits, silently; uint8
            times uint8, and 7-bit weights, are exact on all.
        merges_pairs: two grids in a row are merged into one with other results, unless something stands between them.
        linear_as_gemm: linear layers are Gemm, by a Reshape if they must, since MatMul + Add would become a float Gemm.
    """

    name: str
    symmetric_only: bool = False
    narrow_by_clip: bool = True
    unsigned: bool = False
    merges_pairs: bool = False
    linear_as_gemm: bool = False


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("onnxruntime", unsigned=True, merges_pairs=True, linear_as_gemm=True),
        Profile("openvino"),
        Profile("tensorrt", symmetric_only=True, narrow_by_clip=False),
        Profile("executorch", narrow_by_clip=False),
    )
}


def profile_named(name: object) -> Profile:
    """The profile of a name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in PROFILES:
        raise ValueError(f"expected `profile` to be one of {', '.join(PROFILES)}, but got {name!r}")
    return PROFILES[name]
