"""Choosing: capabilities against requests, every refusal kept, near misses that hold, names that do not exist."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention import (
    AttentionPlan,
    ConfigError,
    ContextParallel,
    Dilated,
    Full,
    Learned,
    Local,
    NoBackendError,
    Pattern,
    Random,
    build_attention,
    explain,
)
from dilated_attention.core.plan import BackendRow
from dilated_attention.registry import BackendSpec, Range, hookimpl
from dilated_attention.registry.capabilities import covers, plain, unmet_requirements, words_of
from dilated_attention.registry.discovery import Registry, default_registry
from dilated_attention.registry.plugins import Source

from .distributions import CAPABILITIES, install_backend

_numbers = itertools.count()
Discover = Callable[..., Registry]


@pytest.fixture
def discover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Discover:
    """Install backends into a folder of this test and discover them along with our own."""
    default_registry()  # the process's own, which must not see them

    def install(**backends: Any) -> Registry:
        for name, options in backends.items():
            install_backend(tmp_path, f"dist-{next(_numbers)}", backend=name, **options)
        monkeypatch.syspath_prepend(str(tmp_path))
        return Registry.discover({})

    return install


def row(plan: AttentionPlan, name: str) -> BackendRow:
    (found,) = [row for row in plan.rows if row.name == name]
    return found


def codes(plan: AttentionPlan, name: str) -> set[str]:
    return {refusal.code for refusal in row(plan, name).refusals}


def with_spec(**fields: Any) -> Registry:
    """Our backends and one more, whose manifest is all that there is of it."""
    spec = BackendSpec(**{"name": "toy", "target": "no_such_module:Toy", "capabilities": CAPABILITIES} | fields)

    class Plugin:
        @hookimpl
        def dilated_attention_backends(self) -> list[BackendSpec]:
            return [spec]

    return Registry.discover({}, [Source(name="toy", distribution="toys", version="2.0", load=Plugin)])


def asked(registry: Registry, **fields: Any) -> AttentionPlan:
    return explain({"num_heads": 8, "head_dim": 64} | fields, registry=registry)


def test_every_axis_that_is_not_covered_is_a_refusal_of_its_own() -> None:
    plan = asked(
        with_spec(),
        num_kv_heads=2,
        head_dim=48,
        dtype="float16",
        dropout_p=0.1,
        deterministic=True,
        is_causal=True,
        pattern=Full(),
    )
    assert plan.backend is None
    assert codes(plan, "toy") == {"gqa", "head_dims", "dtypes", "dropout", "deterministic"}
    texts = {str(refusal) for refusal in row(plan, "toy").refusals}
    assert "head_dims: needs head_dim=48, has 32, 64" in texts
    assert "dtypes: needs float16, has float32" in texts
    assert "gqa: needs 8 query heads on 2 key-value heads, has none declared" in texts
    assert "deterministic: needs a deterministic forward and backward, has none declared" in texts


def test_a_kernel_for_layouts_gets_only_those_that_it_declares() -> None:
    registry = with_spec(capabilities=CAPABILITIES | {"layouts": ["branch"]})
    assert "layouts" not in codes(asked(registry, pattern=Dilated((64,), (2,))), "toy")
    plan = asked(registry, pattern=Dilated((64,), (2,)) + Local(8))
    assert "layouts: needs block, branch, has branch" in {str(refusal) for refusal in row(plan, "toy").refusals}
    assert row(plan, "toy").near_miss is None


def test_block_sizes_narrow_only_the_kernels_for_layouts_that_name_them() -> None:
    whole = CAPABILITIES | {"layouts": ["branch", "block"], "weights": True, "per_head": True}
    declared = with_spec(capabilities=whole | {"block_sizes": (64, 128)})
    pattern: Pattern
    for pattern in (Random(2, 64), Local(8), Dilated((24,), (2,)), Dilated((24,), (2,)) | Random(2, 64)):
        assert not codes(asked(declared, pattern=pattern), "toy")  # by default blocks are of 128
    for pattern in (Random(2, 24), Random(2, 24) | Random(2, 64), Dilated((24,), (2,)) + Random(2, 24)):
        assert codes(asked(declared, pattern=pattern), "toy") == {"block_sizes"}
    (refusal,) = row(asked(declared, pattern=Random(2, 24)), "toy").refusals
    assert str(refusal) == (
        "block_sizes: needs blocks of 24 tokens (random pattern), has 64, 128; "
        "take a pattern of such blocks, or another backend"
    )
    asking = asked(declared, pattern=Learned(24, 2), backend="toy")
    assert codes(asking, "toy") == {"block_sizes", "dynamic_tables"}
    for any_size in (whole, CAPABILITIES | {"block_sizes": (64,)}):  # core computes the blocks of dense kernels
        assert not codes(asked(with_spec(capabilities=any_size), pattern=Random(2, 24)), "toy")


def test_architectures_narrow_only_the_specs_that_name_them() -> None:
    here = asked(with_spec()).device["arch"]
    assert codes(asked(with_spec(capabilities=CAPABILITIES | {"arch": ["sm_90"]})), "toy") == {"arch"}
    assert not codes(asked(with_spec(capabilities=CAPABILITIES | {"arch": [here]})), "toy")


@pytest.mark.parametrize(
    ("declared", "needed", "covered"),
    [
        (True, "anything", True),
        (True, ("forward", "backward"), True),
        (False, True, False),
        (None, True, False),
        ((), "cpu", False),
        (("cpu", "cuda"), "cuda", True),
        ("cuda", "cud", False),
        ({"forward"}, ("forward", "backward"), False),
        ({"forward", "backward"}, ("forward", "backward"), True),
        (Range(8, 256, 8), 64, True),
        (Range(8, 256, 8), 60, False),
        (Range(8, 256, 8), 264, False),
        ((64, 128), 64, True),
        (1, True, False),
        ({"branch": 3}, "branch", True),
    ],
)
def test_what_covers_what(declared: object, needed: object, covered: bool) -> None:
    assert covers(declared, needed) is covered


def test_capabilities_in_words_and_in_json() -> None:
    assert words_of({"b", "a"}) == "a, b"
    assert words_of(Range(8, 256, 8)) == "8..256, multiples of 8"
    assert words_of(True) == "yes"
    declared = {"r": Range(1, 2), "s": frozenset({"y", "x"}), "t": (1, 2), "n": None}
    assert json.loads(json.dumps(plain(declared))) == {
        "r": {"min": 1, "max": 2, "multiple_of": 1},
        "s": ["x", "y"],
        "t": [1, 2],
        "n": None,
    }


def test_what_is_not_installed_is_named_with_the_line_that_installs_it() -> None:
    plan = asked(with_spec(requires=("no-such-library>=1.2", "attrs>=20", "attrs<1")), backend="toy")
    refusals = {refusal.required: refusal for refusal in row(plan, "toy").refusals}
    assert refusals.keys() == {"no-such-library>=1.2", "attrs<1"}
    assert refusals["no-such-library>=1.2"].remedy == "pip install 'no-such-library>=1.2'"
    assert refusals["attrs<1"].actual == f"attrs {attrs.__version__}"
    near = row(plan, "toy").near_miss
    assert near is not None
    assert (near.changes, near.install, near.verified) == ({}, ("no-such-library>=1.2", "attrs<1"), False)


def test_requirements_of_other_systems_count_as_met() -> None:
    assert list(unmet_requirements(["no-such-library; sys_platform == 'plan9'"])) == []
    ((text, found),) = unmet_requirements(["not a requirement !"])
    assert text == "not a requirement !"
    assert "cannot be read" in found


def test_near_misses_are_the_smallest_changes(discover: Discover) -> None:
    registry = discover(toy={})

    def near(**fields: Any) -> dict[str, Any]:
        found = row(asked(registry, **fields), "toy").near_miss
        assert found is not None
        assert found.verified
        return found.changes

    assert near(dtype="bfloat16") == {"dtype": "float32"}
    assert near(deterministic=True) == {"deterministic": False}
    assert near(dropout_p=0.5) == {"dropout_p": 0.0}
    assert near(varlen=True) == {"varlen": False}
    assert near(num_kv_heads=2) == {"num_kv_heads": 8}
    assert near(head_dim=48) == {"head_dim": 64}
    assert near(head_dim=100) == {"head_dim": 64}
    assert near(device="cuda:7" if not torch.cuda.is_available() else "meta") == {"device": "cpu"}
    assert near(dtype="float64", dropout_p=0.5) == {"dropout_p": 0.0, "dtype": "float32"}
    assert near(dtype="float64", dropout_p=0.5, num_kv_heads=1).keys() == {"dropout_p", "dtype", "num_kv_heads"}
    four = row(asked(registry, dtype="float64", dropout_p=0.5, num_kv_heads=1, head_dim=8), "toy")
    assert four.near_miss is None


def test_a_kernel_for_blocks_is_asked_for_weights_and_tables_by_head_only_where_there_are_some() -> None:
    def refused(layouts: tuple[str, ...], pattern: Pattern) -> set[str]:
        registry = with_spec(capabilities=CAPABILITIES | {"layouts": layouts})
        return codes(asked(registry, pattern=pattern), "toy") - {"not_installed"}

    twice, drawn = Local(4) + Local(2), Random(blocks_per_row=2, block_size=16)
    assert refused(("block",), Local(4)) == set()
    assert refused(("block",), twice) == {"weights"}
    assert refused(("block",), drawn) == {"per_head"}
    assert refused(("block",), Dilated((8,), (2,))) == {"layouts"}
    assert refused(("branch", "block"), Local(4) + Dilated((8, 8), (2, 2))) == set()
    assert refused(("dense",), twice + drawn) == set()


def test_a_near_miss_asks_the_backend_too(discover: Discover) -> None:
    code = """
    from dilated_attention.registry import Refusal
    class Toy:
        def refusals(self, request):
            if request.config.head_dim == 64 and request.config.requires_grad:
                yield Refusal("backward", "a backward for head_dim 64", "one for head_dim 32")
            if request.config.head_dim == 32 and request.config.dtype == "float32":
                yield Refusal("workspace", "room for float32", "room for float16")
        def pin(self, request):
            return "toy"
    """
    capabilities = CAPABILITIES | {"dtypes": ["float32", "float16"]}
    registry = discover(toy={"code": code, "capabilities": capabilities})
    plan = asked(registry)
    assert codes(plan, "toy") == {"backward"}
    assert str(row(plan, "toy").near_miss) == "would be usable with requires_grad=False"
    # Changing the dtype alone satisfies the manifest; only the backend knows that this is not enough.
    both = row(asked(registry, dtype="bfloat16"), "toy").near_miss
    assert both is not None
    assert both.changes == {"requires_grad": False, "dtype": "float32"}
    # What the backend itself says may be mended on any axis, also where no change bears the name of its refusal.
    own = asked(registry, head_dim=32)
    assert codes(own, "toy") == {"workspace"}
    assert str(row(own, "toy").near_miss) == "would be usable with dtype=float16"


def test_a_device_that_is_not_here_is_said_to_be_a_guess() -> None:
    plan = asked(with_spec(capabilities=CAPABILITIES | {"device_types": ["npu"], "arch": ["npu_3"]}))
    assert codes(plan, "toy") == {"device_types"}
    assert (
        str(row(plan, "toy").near_miss) == "could be usable with device=npu (by its manifest; it cannot be asked here)"
    )


@settings(max_examples=40, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {
            "head_dim": st.sampled_from([16, 24, 64, 300]),
            "num_kv_heads": st.sampled_from([None, 2]),
            "dtype": st.sampled_from(["float64", "float32", "bfloat16", "float8_e5m2"]),
            "dropout_p": st.sampled_from([0.0, 0.1]),
            "deterministic": st.booleans(),
            "is_causal": st.booleans(),
            "seq_len": st.sampled_from([None, 64, 20_000]),
        }
    )
)
def test_a_verified_near_miss_holds_when_it_is_followed(fields: dict[str, Any]) -> None:
    """Followed to the letter, a near miss makes its backend usable, and no single part of a pair does."""
    registry = Registry.discover({})
    for refused in asked(registry, **fields).rows:
        if refused.near_miss is None or not refused.near_miss.verified:
            continue
        changes = refused.near_miss.changes
        assert row(asked(registry, **fields | changes), refused.name).status in ("chosen", "usable")
        if len(changes) > 1:
            for name, value in changes.items():
                assert row(asked(registry, **fields | {name: value}), refused.name).status == "refused"


def test_the_best_ranked_is_chosen_and_the_others_are_usable(discover: Discover) -> None:
    registry = discover(fast={"priority": 60}, slow={"priority": -5})
    plan = asked(registry)
    assert [(row.name, row.status) for row in plan.rows if row.status != "refused"] == [
        ("fast", "chosen"),
        ("sdpa", "usable"),
        ("slow", "usable"),
        ("math", "usable"),
        ("reference", "usable"),
    ]


def test_a_backend_asked_for_by_name_never_falls_back() -> None:
    assert build_attention(num_heads=8, head_dim=64, backend="sdpa").plan.backend == "sdpa"
    with pytest.raises(NoBackendError) as caught:
        build_attention(num_heads=8, head_dim=300, backend="sdpa")
    text = str(caught.value)
    assert text.startswith("backend 'sdpa' does not fit, and was asked for by name")
    assert "head_dims: needs head_dim=300, has 1..256" in text
    assert "-> would be usable with head_dim=256" in text
    assert "reference  usable" in text


def test_reference_is_refused_where_its_mask_does_not_fit() -> None:
    plan = explain(num_heads=2, head_dim=16, dropout_p=0.1, seq_len=100_000, backend="reference")
    assert plan.backend is None
    assert codes(plan, "reference") == {"reference_mask_bytes"}


def test_a_plan_survives_json(discover: Discover) -> None:
    registry = discover(toy={"priority": 60})
    plan = asked(registry, pattern=Dilated((64, 128), (1, 2)), seq_len=300, dropout_p=0.1, dtype="float64")
    again = AttentionPlan.from_json(plan.to_json())
    assert again == plan
    older = json.loads(plan.to_json())
    for each in older["rows"]:
        del each["slow"], each["blocks_by_core"]  # which plans of older releases have not
    assert [row.slow for row in AttentionPlan.from_json(json.dumps(older)).rows] == [""] * len(plan.rows)
    assert again.explain() == plan.explain()
    assert row(again, "toy").near_miss is not None
    for text, said in (("{", "JSON"), ("[]", "mapping"), ('{"backnd": 1}', "did you mean 'backend'")):
        with pytest.raises(ConfigError, match=said):
            AttentionPlan.from_json(text)


def test_the_plan_knows_the_layout_where_it_knows_the_length() -> None:
    plan = explain(num_heads=4, head_dim=16, pattern=Dilated((64, 128), (1, 2)), seq_len=256)
    # Four full segments of 64, and in two segments of 128 every second position, per head.
    pairs = 4 * (4 * 64 * 64 + 2 * 64 * 64)
    assert plan.layout.kinds == ("branch",)
    assert plan.layout.pairs == pairs
    assert plan.layout.flops == 4 * 16 * pairs
    assert plan.layout.distinct_pairs is not None
    assert plan.layout.distinct_pairs < pairs
    assert plan.layout.digest is not None
    unknown = explain(num_heads=4, head_dim=16, pattern=Random(2)).layout
    assert (unknown.kinds, unknown.digest) == (("block",), None)


def test_the_plan_says_which_kernels_need_no_table() -> None:
    fields: dict[str, Any] = {"num_heads": 4, "head_dim": 16, "seq_len": 256}
    dilated = Dilated((64, 128), (1, 2))
    for pattern, kinds, none in (
        (Local(3), ("block",), ("band",)),
        (dilated + Local(3), ("block", "branch"), ("band", "branch")),
        (dilated + Random(2, 8), ("block", "branch"), ("block", "branch")),
        (dilated, ("branch",), ("branch",)),
    ):
        table, dense = (explain(pattern=pattern, backend=name, **fields).layout for name in ("reference", "sdpa"))
        assert (table.kinds, dense.kinds) == (kinds, none)
        assert table.nbytes is not None
        assert dense.nbytes is not None
        assert (dense.nbytes < table.nbytes) is (kinds != none)
        assert attrs.evolve(dense, kinds=kinds, nbytes=table.nbytes) == table
    text = explain(pattern=Local(3), backend="sdpa", **fields).explain()
    assert "  layout  windows and rectangles, " in text
    ring = explain(pattern=Local(3), backend="sdpa", context_parallel=ContextParallel(size=2), **fields)
    assert ring.layout.kinds == ("block",)


def test_explain_is_plain_text_with_every_reason_on_its_own_line(discover: Discover) -> None:
    plan = asked(discover(toy={}), dtype="float64", dropout_p=0.25, seq_len=16_384, is_causal=True)
    lines = plan.explain().splitlines()
    assert lines[0] == "sdpa (aten flash for CPU, dropout by matrix products) chosen; torch.compile: opaque"
    assert lines[1].startswith(
        "  for     causal full attention over 16,384 tokens: 8 heads, head_dim 64, float64 on cpu"
    )
    place = next(i for i, line in enumerate(lines) if line.startswith("toy "))
    assert lines[place + 1 : place + 4] == [
        "    dtypes: needs float64, has float32",
        "    dropout: needs dropout_p=0.25, has none declared",
        "    -> would be usable with dropout_p=0.0 and dtype=float32",
    ]
    assert "\x1b" not in plan.explain()
