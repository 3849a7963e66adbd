"""The suite can fail: a backend written from the documents alone passes it, and each broken one is caught by name."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from toy_backend import Toy, balanced

from unilora_core import UniLoraError, project, project_transpose
from unilora_core.testing import Backend, cases, definitions


def bfloat16(x):
    """Rounded to eight bits of mantissa, towards zero."""
    return (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


# ---- broken: each differs from `Toy` in one method ----


class FactorsByName(Toy):
    def join(self, spec, parts):
        return np.concatenate([parts[name] for name in sorted(parts)])


class FactorsColumnByColumn(Toy):
    def join(self, spec, parts):
        return np.concatenate([parts[name].reshape(shape[::-1]).T.ravel() for name, shape in spec.layout.factors])


class ScaleOneOverN(Toy):
    def scale(self, spec, dtype):
        return (1 / np.maximum(self.counts(spec), 1)).astype(dtype)


class ScaleLeftOut(Toy):
    def scale(self, spec, dtype):
        return np.ones(spec.d, dtype)


class ScaleInFloat16(Toy):
    def scale(self, spec, dtype):
        return super().scale(spec, np.float16).astype(dtype)


class ScaleInBfloat16(Toy):
    def scale(self, spec, dtype):
        return bfloat16(super().scale(spec, np.float32)).astype(dtype)


class ScaleRoundedTwice(Toy):
    def scale(self, spec, dtype):
        return (1 / np.sqrt(np.maximum(self.counts(spec), 1).astype(np.float32))).astype(dtype)


class ScaleOfEmptyGroupsInfinite(Toy):
    def scale(self, spec, dtype):
        with np.errstate(divide="ignore"):
            return (1 / np.sqrt(self.counts(spec))).astype(dtype)

    def transpose(self, spec, y):
        with np.errstate(invalid="ignore"):
            return super().transpose(spec, y)


class ScaleOfDOverD(Toy):
    """√(d/D) for all: right only where d divides D."""

    def scale(self, spec, dtype):
        return np.full(spec.d, np.sqrt(spec.d / spec.D), dtype)


class LastGroupOffByOne(Toy):
    def groups(self, spec, start, stop):
        return np.minimum(super().groups(spec, start, stop), max(spec.d - 2, 0)).astype(np.int32)


class LastGroupCountsOneMore(Toy):
    def counts(self, spec):
        return super().counts(spec) + (np.arange(spec.d) == spec.d - 1)


class LastPositionMissing(Toy):
    def join(self, spec, parts):
        theta_D = super().join(spec, parts)
        theta_D[-1:] = 0
        return theta_D


class LastPositionRepeatsTheOneBefore(Toy):
    def groups(self, spec, start, stop):
        groups = super().groups(spec, start, stop).copy()
        if stop == spec.D and stop - start > 1:
            groups[-1] = groups[-2]
        return groups


class PositionsInFloat32(Toy):
    def positions(self, start, stop):
        rounded = super().positions(start, stop).astype(np.float32).astype(np.uint64)
        return np.clip(rounded, np.uint64(start), np.uint64(max(start, stop - 1)))


class PositionsIn32Bits(Toy):
    def positions(self, start, stop):
        return super().positions(start, stop) % np.uint64(2**31)


class GatherInFloat32(Toy):
    def gather(self, table, groups):
        return np.take(table, groups.astype(np.float32).astype(np.int64), mode="clip")


class ScatterInFloat32(Toy):
    def scatter_add(self, spec, y):
        groups = self.of_whole(spec).astype(np.float32).astype(np.int64)
        return np.bincount(groups, y, minlength=spec.d)[: spec.d].astype(y.dtype)


class SeedIn32Bits(Toy):
    def seed(self, spec):
        return spec.seed % 2**32


class GroupsInInt64(Toy):
    def groups(self, spec, start, stop):
        return super().groups(spec, start, stop).astype(np.int64)


class InitInFloat64(Toy):
    def init(self, spec):
        return super().init(spec).astype(np.float64)


class SlicesNotChecked(Toy):
    def groups(self, spec, start, stop):
        return super().groups(spec, max(start, 0), max(start, 0, min(stop, spec.D)) if start < spec.D else start)


class GradientWithoutScale(Toy):
    def gradient(self, spec, x, y):
        return self.scatter_add(spec, y)


class GradientOfTheFactorsAOnly(Toy):
    def gradient(self, spec, x, y):
        kept = np.zeros_like(y)
        for name, at in spec.layout.slices.items():
            kept[at] = y[at] if spec.start == "paper" or name.endswith(".A") else 0
        return self.transpose(spec, kept)


class TransposeDropsDuplicates(Toy):
    def scatter_add(self, spec, y):
        summed = np.zeros(spec.d, y.dtype)
        summed[self.of_whole(spec)] += y
        return summed


class TransposeIsAMean(Toy):
    def scatter_add(self, spec, y):
        return super().scatter_add(spec, y) / np.maximum(self.counts(spec), 1).astype(y.dtype)


class StartIgnored(Toy):
    def factor(self, spec, name, theta, scale, groups):
        return np.take(theta * scale, groups)


class StartAtTheWrongFactors(Toy):
    def factor(self, spec, name, theta, scale, groups):
        return super().factor(spec, name[:-1] + {"A": "B", "B": "A"}.get(name[-1], name[-1]), theta, scale, groups)


class InitOfAnotherGenerator(Toy):
    def init(self, spec):
        return np.random.default_rng(spec.seed).uniform(-spec.bound, spec.bound, spec.d).astype(np.float32)


class ResultInFloat64(Toy):
    def project(self, spec, theta_d):
        return super().project(spec, theta_d).astype(np.float64)


class TransposeInFloat64(Toy):
    def transpose(self, spec, y):
        return super().transpose(spec, y).astype(np.float64)


class ComputesInTheNarrowDtype(Toy):
    def wide(self, x):
        return x.dtype

    def scatter_add(self, spec, y):
        summed = np.zeros(spec.d, y.dtype)
        with np.errstate(over="ignore"):
            np.add.at(summed, self.of_whole(spec), y)
        return summed


class ComputesFloat64InFloat32(Toy):
    def wide(self, x):
        return np.float32


class NanBecomesZero(Toy):
    def project(self, spec, theta_d):
        return super().project(spec, np.nan_to_num(theta_d) if theta_d.dtype.kind == "f" else theta_d)


class NanSpreads(Toy):
    """P as a matrix: 0·NaN is NaN everywhere."""

    def scatter_add(self, spec, y):
        summed = super().scatter_add(spec, y)
        return summed if np.isfinite(summed).all() else np.full_like(summed, np.nan)


class WritesIntoItsArgument(Toy):
    def project(self, spec, theta_d):
        theta_D = super().project(spec, theta_d)
        theta_d *= 2
        return theta_D


class NothingIsChecked(Toy):
    def check(self, x, shape, what):
        pass

    def factor(self, spec, name, theta, scale, groups):
        return super().factor(spec, name, np.resize(theta, spec.d), scale, groups)

    def scatter_add(self, spec, y):
        return super().scatter_add(spec, np.resize(y, spec.D))


class AnotherText(Toy):
    def check(self, x, shape, what):
        try:
            super().check(x, shape, what)
        except UniLoraError as error:
            raise type(error)(f"{what}: bad array") from None


class AnotherError(Toy):
    def check(self, x, shape, what):
        try:
            super().check(x, shape, what)
        except UniLoraError as error:
            raise TypeError(str(error)) from None


class ClassesLikeBalanced(Toy):
    """One grouping for all: neither local nor by factor."""

    def in_classes(self, spec, i):
        return balanced(i, spec.D, spec.d, self.seed(spec))


class ClassesCutEvenly(Toy):
    """As many columns for each class."""

    def classes(self, spec):
        slices = [slices for slices, *_ in super().classes(spec)]
        ends = [spec.d * k // len(slices) for k in range(len(slices) + 1)]
        return list(zip(slices, ends, ends[1:], strict=False))


class UnnormalisedIsNormalised(Toy):
    def scale(self, spec, dtype):
        return (1 / np.sqrt(np.maximum(self.counts(spec), 1))).astype(dtype)


class DenseInFloat16(Toy):
    def dense(self, spec, theta_d):
        return super().dense(spec, theta_d.astype(np.float16)).astype(theta_d.dtype)


class DenseWithoutTheStart(Toy):
    def dense(self, spec, theta_d):
        return super().dense(replace(spec, start="paper"), theta_d)


class DenseOfAnotherSeed(Toy):
    def dense(self, spec, theta_d):
        return super().dense(replace(spec, seed=(spec.seed + 1) % 2**64), theta_d)


class DenseTransposeIsTheInverse(Toy):
    def dense_transpose(self, spec, y):
        return np.linalg.pinv(definitions.matrix(spec)) @ y


class LogitsWithoutGradient(Toy):
    """The choice of vectors is taken for a constant."""

    def gradient(self, spec, x, y):
        found = super().gradient(spec, x, y)
        if spec.grouping == "codebook":
            found[spec.chosen["vectors"] * spec.chosen["length"] :] = 0
        return found


class TransposeOfWhatIsNotLinear(Toy):
    def transpose(self, spec, y):
        return np.zeros(spec.d, y.dtype) if spec.grouping == "codebook" else super().transpose(spec, y)


class CompiledInFloat16(Toy):
    class Rounding:
        def __init__(self, function):
            self.function = function

        def __call__(self, x):
            return self.function(x.astype(np.float16).astype(x.dtype))

        def gradient(self, x, y):
            return self.function.gradient(x, y.astype(np.float16).astype(y.dtype))

    def compile(self, function):
        return self.Rounding(function)


CAUGHT = {
    FactorsByName: ["project_is_P", "bits_of_the_reference", "adjoint", "distances_are_kept"],
    FactorsColumnByColumn: ["project_is_P", "frozen_theta_D", "bits_of_the_reference", "adjoint"],
    ScaleOneOverN: ["P_is_an_isometry", "frozen_theta_D", "project_is_P", "gradient"],
    ScaleLeftOut: ["P_is_an_isometry", "frozen_theta_D", "project_is_P", "gradient"],
    ScaleInFloat16: ["P_is_an_isometry", "frozen_theta_D", "project_is_P", "computed_in_float64"],
    ScaleInBfloat16: ["P_is_an_isometry", "frozen_theta_D", "project_is_P", "computed_in_float64"],
    ScaleRoundedTwice: ["frozen_theta_D", "computed_in_float64"],
    ScaleOfEmptyGroupsInfinite: ["project_transpose_is_P_transposed", "transpose_of_the_reference"],
    ScaleOfDOverD: ["P_is_an_isometry", "frozen_theta_D", "project_is_P"],
    LastGroupOffByOne: ["frozen_groups", "all_frozen_groups", "groups_around_32_bits", "project_is_P"],
    LastGroupCountsOneMore: ["P_is_an_isometry", "frozen_theta_D", "project_is_P", "distances_are_kept"],
    LastPositionMissing: ["project_is_P", "frozen_theta_D", "P_is_an_isometry", "adjoint"],
    LastPositionRepeatsTheOneBefore: ["frozen_groups", "groups_around_32_bits", "slices_make_the_whole"],
    PositionsInFloat32: ["frozen_groups", "groups_around_32_bits", "groups_anywhere"],
    PositionsIn32Bits: ["frozen_groups", "groups_around_32_bits", "groups_anywhere"],
    GatherInFloat32: ["indices_past_2^24"],
    ScatterInFloat32: ["indices_past_2^24"],
    SeedIn32Bits: ["frozen_groups", "frozen_init", "groups_anywhere", "bits_of_the_reference"],
    GroupsInInt64: ["groups_are_int32_in_range", "all_frozen_groups", "an_empty_slice_is_empty"],
    SlicesNotChecked: ["a_slice_outside_is_refused"],
    GradientWithoutScale: ["gradient", "compiled_gradient"],
    GradientOfTheFactorsAOnly: ["gradient", "compiled_gradient"],
    TransposeDropsDuplicates: ["project_transpose_is_P_transposed", "adjoint", "P_is_an_isometry", "gradient"],
    TransposeIsAMean: ["project_transpose_is_P_transposed", "adjoint", "P_is_an_isometry", "gradient"],
    StartIgnored: ["identity_start_has_B_zero", "identity_start_moves_as_the_paper_start", "frozen_theta_D"],
    StartAtTheWrongFactors: ["identity_start_has_B_zero", "identity_start_moves_as_the_paper_start", "frozen_theta_D"],
    InitOfAnotherGenerator: ["frozen_init", "frozen_theta_D", "bits_of_the_reference"],
    InitInFloat64: ["frozen_init"],
    ResultInFloat64: ["dtype_and_device_are_kept", "project_is_P", "frozen_theta_D"],
    TransposeInFloat64: ["dtype_and_device_are_kept", "project_transpose_is_P_transposed", "gradient"],
    ComputesInTheNarrowDtype: ["computed_in_float32"],
    ComputesFloat64InFloat32: ["computed_in_float64", "adjoint"],
    NanBecomesZero: ["non_finite_numbers_stay_in_their_group"],
    NanSpreads: ["non_finite_numbers_stay_in_their_group"],
    WritesIntoItsArgument: ["inputs_are_left_as_they_were"],
    NothingIsChecked: ["project_refuses", "project_transpose_refuses"],
    AnotherText: ["project_refuses", "project_transpose_refuses"],
    AnotherError: ["project_refuses", "project_transpose_refuses"],
    ClassesLikeBalanced: ["map_groups", "map_project", "map_transpose", "map_gradient", "frozen_groups"],
    ClassesCutEvenly: ["map_groups", "map_project", "frozen_theta_D"],
    UnnormalisedIsNormalised: ["map_project", "map_transpose", "map_gradient", "map_computed_in_float32"],
    DenseInFloat16: ["map_project", "frozen_theta_D"],
    DenseWithoutTheStart: ["map_project", "frozen_theta_D"],
    DenseOfAnotherSeed: ["map_project", "frozen_theta_D"],
    DenseTransposeIsTheInverse: ["map_transpose", "map_gradient"],
    LogitsWithoutGradient: ["map_gradient"],
    TransposeOfWhatIsNotLinear: ["map_transpose"],
    CompiledInFloat16: ["compiled_map", "compiled_project", "compiled_project_transpose", "compiled_gradient"],
}
"""Broken backend → checks that catch it, the most telling first."""


def check_of(case):
    return case.name.partition("-")[0]


def complaint(toy, check):
    """What the first failing case of this check says; None where all of them pass."""
    of_check = [case for case in cases(toy().backend()) if check_of(case) == check]
    assert of_check, f"the suite has no {check}"
    for case in of_check:
        try:
            case()
        except AssertionError as error:
            return str(error)
    return None


@pytest.mark.parametrize("case", cases(Toy().backend()), ids=str)
def test_a_backend_written_from_the_documents_passes(case):
    case()


@pytest.mark.parametrize(
    ("toy", "check"),
    [(toy, check) for toy, checks in CAUGHT.items() for check in checks],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_broken_backend_is_caught(toy, check):
    assert complaint(toy, check)


def test_every_broken_backend_is_tried():
    assert set(Toy.__subclasses__()) == set(CAUGHT)


def test_every_check_catches_something():
    assert {check for checks in CAUGHT.values() for check in checks} == {check_of(c) for c in cases(Toy().backend())}


def test_the_text_says_what_differs():
    text = complaint(LastPositionMissing, "project_is_P")
    assert text.startswith("project, balanced, start = paper, D = 411, d = 1, seed = 3, position 410: expected ")
    assert text.endswith(", got 0.0 (1 of 411 positions differ)")
    assert "expected float16, got float64" in complaint(ResultInFloat64, "dtype_and_device_are_kept")
    text = complaint(AnotherError, "project_refuses")
    assert text.startswith("project: theta_d as (49,) float32: expected ValuesError, got TypeError")


def test_a_wrong_dtype_of_right_values_is_named():
    assert complaint(GroupsInInt64, "all_frozen_groups").endswith(": dtype: expected int32, got int64")
    assert complaint(InitInFloat64, "frozen_init").endswith(": dtype: expected float32, got float64")
    assert complaint(ResultInFloat64, "frozen_theta_D").endswith(": dtype: expected float32, got float64")


def test_an_array_on_another_device_is_caught():
    """array-api-strict has devices that differ by name only."""
    strict = pytest.importorskip("array_api_strict")
    host, device = strict.Device("CPU_DEVICE"), strict.Device("device1")
    right = Backend(
        "strict",
        strict,
        device=device,
        project_transpose=lambda spec: lambda y: project_transpose(spec, y.to_device(host)).to_device(device),
        asnumpy=lambda array: np.asarray(array.to_device(host)),
    )
    moved = replace(right, project=lambda spec: lambda theta_d: project(spec, theta_d.to_device(host)))
    misplaced = replace(right, groups=lambda spec, start, stop: spec.groups(start, stop, xp=strict))

    def run(backend, name):
        next(case for case in cases(backend) if case.name == name)()

    for name in ("dtype_and_device_are_kept-float32-identity", "groups_are_int32_in_range-balanced"):
        run(right, name)
    with pytest.raises(AssertionError, match=r"device: expected .*device1.*, got .*CPU_DEVICE"):
        run(moved, "dtype_and_device_are_kept-float32-identity")
    with pytest.raises(AssertionError, match=r"device: expected .*device1.*, got .*CPU_DEVICE"):
        run(misplaced, "groups_are_int32_in_range-balanced")


# ---- the list of cases ----


def test_what_a_backend_cannot_do_is_not_among_its_cases():
    full = Toy().backend()
    names = {check_of(case) for case in cases(full)}
    without = {check_of(case) for case in cases(replace(full, pullback=None, compile=None, dtypes=("float32",)))}
    assert names - without == {
        "compiled_gradient",
        "compiled_map",
        "compiled_project",
        "compiled_project_transpose",
        "computed_in_float32",
        "computed_in_float64",
        "gradient",
        "map_computed_in_float32",
        "map_gradient",
    }
    few = {case.name.split("-")[1] for case in cases(replace(full, maps=("local",))) if case.name.startswith("map_")}
    assert few == {"local"}


def test_the_core_is_what_a_bare_namespace_gets():
    bare = cases(Backend("bare", np, compile=lambda function: function))
    assert "compiled_groups" in {check_of(case) for case in bare}


def test_names_are_unique_and_stable():
    names = [str(case) for case in cases(Toy().backend())]
    assert len(set(names)) == len(names)
    assert names == [str(case) for case in cases(Toy().backend())]
    assert "Toy-frozen_theta_D-balanced-2304-42" in names


def test_without_hypothesis_it_says_what_to_install():
    program = "import sys; sys.modules['hypothesis'] = None; import unilora_core.testing"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.rstrip().endswith(
        'ImportError: unilora_core.testing needs hypothesis: pip install "unilora[testing]"'
    )
