"""What an attention is built from: one frozen value, from code, a mapping, or a TOML or JSON file. Needs no torch."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import attrs

from .checks import MOST_POSITIONS, an_int, copied_plainly, did_you_mean, keep_number, nearest, one_of, positive_int
from .context_parallel import ContextParallel
from .errors import ConfigError
from .geometry import Geometry
from .limits import Limits
from .pattern import Full, Pattern
from .structure import NamesChecked, check_keys, from_mapping, keys_of

if TYPE_CHECKING:
    import torch

# From the most to the least precise.
DTYPES: Final = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
_TORCHS_OTHER_NAMES: Final = {"double": "float64", "float": "float32", "half": "float16"}

_MOST_HEADS: Final = 1 << 16  # the pattern says of each what it sees
_MOST_HEAD_DIM: Final = 1 << 20  # beyond what any backend takes, and floats hold what is counted of it
_DEVICE: Final = re.compile(r"[a-z][a-z0-9_]*(:\d+)?")
# What people coming from torchscale or from a flat configuration pass here; it is the pattern's.
_DILATED_FIELDS: Final = {
    "segment_length": "segment_lengths",
    "segment_lengths": "segment_lengths",
    "dilated_ratio": "dilation_rates",
    "dilation_rate": "dilation_rates",
    "dilation_rates": "dilation_rates",
}
# What belongs elsewhere: arguments of torch's own attention, of `explain` and of a call.
_ELSEWHERE: Final = {
    "enable_gqa": "grouped queries are said by num_kv_heads, the heads of key and value",
    "attn_mask": "who attends to whom is the pattern; padding is said at the call, by key_padding_mask or cu_seqlens",
    "key_padding_mask": "it is given at the call; varlen=True says beforehand that calls will bring one",
    "cu_seqlens": "they are given at the call; varlen=True says beforehand that calls will bring them",
    "embed_dim": "it takes head_dim, which is embed_dim // num_heads",
    "arch": "explain(..., arch=...) judges for a card that is not here; an attention is built for its device",
}

_MASKS: Final = ("attn_mask", "attention_mask", "attn_bias", "mask", "bias", "block_mask")  # as others call it
_OF_CALLS: Final = ("return_lse", "q_offset", "kv_offset", "key_padding_mask", "cu_seqlens")  # besides three tensors


def _torch_name(value: str | torch.dtype | torch.device | None) -> object:
    """`torch.float32` -> "float32", `torch.device("cuda", 0)` -> "cuda:0"; None and anything else as they are."""
    is_torch = type(value).__module__.partition(".")[0] == "torch" or isinstance(value, str)
    return str(value).removeprefix("torch.") if is_torch else value


def _dtype_name(value: str | torch.dtype) -> object:
    """Also torch's other names of a dtype: `"half"` as `torch.half`."""
    name = _torch_name(value)
    return _TORCHS_OTHER_NAMES.get(name, name) if isinstance(name, str) else name


def _copied(value: object) -> object:
    """Mappings are copied, so that the caller's later changes do not reach a frozen config; numpy's values plainly."""
    return copied_plainly(value) if isinstance(value, Mapping) else value


def _boolean(_: object, attribute: attrs.Attribute[bool], value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{attribute.name} must be True or False, got {value!r} ({type(value).__name__})")


def _number(instance: object, attribute: attrs.Attribute[Any], value: object) -> float:
    number = keep_number(instance, attribute, value)
    if number is None:
        raise ConfigError(f"{attribute.name} must be a number, got {value!r} ({type(value).__name__})")
    try:
        return float(number)
    except OverflowError:  # an integer beyond all floats
        return math.inf if number > 0 else -math.inf


def _scale(instance: object, attribute: attrs.Attribute[float | None], value: object) -> None:
    if value is None:
        return
    number = _number(instance, attribute, value)
    if not math.isfinite(number) or number == 0:
        raise ConfigError(f"scale must be finite and not 0 (default 1/sqrt(head_dim)), got {value!r}")


def _probability(instance: object, attribute: attrs.Attribute[float], value: object) -> None:
    if not 0 <= _number(instance, attribute, value) < 1:
        raise ConfigError(f"{attribute.name} must be at least 0 and below 1, got {value!r}")


def _device(_: object, attribute: attrs.Attribute[str | None], value: object) -> None:
    if value is None or (isinstance(value, str) and _DEVICE.fullmatch(value)):
        return
    raise ConfigError(f"device must be 'type' or 'type:index' such as 'cpu' or 'cuda:0', got {value!r}")


def _backend_name(_: object, attribute: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"backend must be 'auto' or the name of a backend, got {value!r} ({type(value).__name__})")


def _options(_: object, attribute: attrs.Attribute[dict[str, Any]], value: object) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"backend_options must map backend names to their options, got {value!r}")
    for name, options in value.items():
        is_named = isinstance(name, str) and isinstance(options, Mapping) and all(isinstance(o, str) for o in options)
        if not is_named:
            raise ConfigError(f"backend_options[{name!r}] must map option names to values, got {options!r}")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"backend_options must hold plain values, which files and plans can keep: {error}") from error


def _pattern(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if isinstance(value, Pattern):
        return
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"pattern must be a pattern such as Full() or a mapping with 'kind', got {value!r} ({type(value).__name__})"
        )
    if not isinstance(value.get("kind"), str):
        raise ConfigError(f"a pattern mapping needs 'kind', the pattern's name, got {dict(value)!r}")


def _limits(_: object, attribute: attrs.Attribute[Limits] | None, value: object) -> None:
    if not isinstance(value, Limits):
        raise ConfigError(f"limits must be a Limits value or, in a file, a table; got {value!r}")


def _context_parallel(_: object, attribute: attrs.Attribute[ContextParallel | None] | None, value: object) -> None:
    if value is not None and not isinstance(value, ContextParallel):
        raise ConfigError(
            f"context_parallel must be None, a ContextParallel(size=...) or, in a file, a table; got {value!r}"
        )


@attrs.frozen(kw_only=True)
class AttentionConfig(NamesChecked):
    """Everything that determines an attention before it is built.

    Attributes:
        num_heads: query heads.
        head_dim: width of a head, of queries, keys and values alike.
        num_kv_heads: key-value heads; num_heads must be a multiple of it. None: as many as query heads.
        pattern: who attends to whom; in files a mapping with `kind`, which the registry resolves.
        is_causal: no query sees a key at a later position.
        scale: factor on q·k; None: 1/sqrt(head_dim).
        dropout_p: probability of dropping a counted occurrence while training. Most fused kernels round it to 256ths,
            not to 0 or 1, and scale what is kept by what it is rounded to.
        dtype: one of `DTYPES`, or a torch dtype.
        device: "type" or "type:index", or a torch device. None: torch's default device when it is built.
        tensor_layout: "bshd" for (batch, seq_len, heads, head_dim), "bhsd" for (batch, heads, seq_len, head_dim).
        seq_len: length that the choice is made for, where it is known; other lengths stay usable. Of the whole
            sequence, where ranks share it.
        varlen: calls will hold sequences of several lengths (`key_padding_mask`, `cu_seqlens`). They are computed
            without it too; with it a backend that takes none is refused at once, not at the call, and `auto` prefers
            the fused kernels, which compute all of them together, also for what others compute faster one by one.
        requires_grad: the attention will be differentiated.
        deterministic: the same bits on every run, forward and backward.
        activation_checkpointing: keep no intermediate of the attention for backward but its inputs.
        backend: a backend's name, which is used or refused, or "auto", which chooses.
        backend_options: options by backend name, judged by the backend.
        context_parallel: how many ranks share a sequence; None: one has it all.
        limits: bounds on memory.

    Raises:
        ConfigError: for a value that no backend could honour, with the allowed one.
    """

    num_heads: int = attrs.field(validator=an_int(1, _MOST_HEADS))
    head_dim: int = attrs.field(validator=an_int(1, _MOST_HEAD_DIM))
    num_kv_heads: int | None = attrs.field(default=None, validator=attrs.validators.optional(positive_int))
    pattern: Pattern | Mapping[str, Any] = attrs.field(factory=Full, converter=_copied, validator=_pattern, hash=False)
    is_causal: bool = attrs.field(default=False, validator=_boolean)
    scale: float | None = attrs.field(default=None, validator=_scale)
    dropout_p: float = attrs.field(default=0.0, validator=_probability)
    dtype: str = attrs.field(default="float32", converter=_dtype_name, validator=one_of(*DTYPES))
    device: str | None = attrs.field(default=None, converter=_torch_name, validator=_device)
    tensor_layout: str = attrs.field(default="bshd", validator=one_of("bshd", "bhsd"))
    seq_len: int | None = attrs.field(default=None, validator=attrs.validators.optional(an_int(1, MOST_POSITIONS)))
    varlen: bool = attrs.field(default=False, validator=_boolean)
    requires_grad: bool = attrs.field(default=True, validator=_boolean)
    deterministic: bool = attrs.field(default=False, validator=_boolean)
    activation_checkpointing: bool = attrs.field(default=False, validator=_boolean)
    backend: str = attrs.field(default="auto", validator=_backend_name)
    backend_options: Mapping[str, Mapping[str, Any]] = attrs.field(
        factory=dict, converter=_copied, validator=_options, hash=False
    )
    context_parallel: ContextParallel | None = attrs.field(default=None, validator=_context_parallel)
    limits: Limits = attrs.field(factory=Limits, validator=_limits)

    def __attrs_post_init__(self) -> None:
        if self.num_heads % self.kv_heads:
            divisors = ", ".join(str(n) for n in range(1, self.num_heads + 1) if self.num_heads % n == 0)
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.kv_heads}; "
                f"{self.num_heads} heads can share {divisors} key-value heads"
            )
        if isinstance(self.pattern, Pattern):
            self.pattern.validate(self.num_heads, self.kv_heads)
        if self.varlen and self.context_parallel is not None:
            raise ConfigError(
                "varlen=True with context_parallel: ranks share one sequence, not several; leave out one of the two"
            )
        if self.dropout_p and self.context_parallel is not None:
            raise ConfigError(
                f"dropout_p={self.dropout_p:g} with context_parallel: no attention that ranks share drops weights; "
                "leave out one of the two"
            )
        if self.ring_size > 1 and self.seq_len is not None and self.seq_len % self.ring_size:
            raise ConfigError(
                f"seq_len must be a multiple of context_parallel.size, got {self.seq_len} and {self.ring_size}; "
                f"the next multiple is {-(-self.seq_len // self.ring_size) * self.ring_size}"
            )

    @classmethod
    def _check_names(cls, fields: Mapping[str, object]) -> None:
        check_fields(fields)

    @property
    def ring_size(self) -> int:
        """Ranks that share a sequence, as a number in either case."""
        return 1 if self.context_parallel is None else self.context_parallel.size

    @property
    def kv_heads(self) -> int:
        """Key-value heads, as a number in either case."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def softmax_scale(self) -> float:
        """The factor on q·k, as a number in either case."""
        return 1.0 / math.sqrt(self.head_dim) if self.scale is None else float(self.scale)

    def geometry(
        self, q_len: int, kv_len: int | None = None, *, q_offset: int | None = None, kv_offset: int = 0
    ) -> Geometry:
        """That of a call with its heads and causality: of one sequence, unless there are other keys or offsets."""
        keys = q_len if kv_len is None else kv_len
        return Geometry(
            q_len=q_len,
            kv_len=keys,
            num_heads=self.num_heads,
            num_kv_heads=self.kv_heads,
            is_causal=self.is_causal,
            q_offset=keys - q_len if q_offset is None else q_offset,
            kv_offset=kv_offset,
        )

    @property
    def one_token(self) -> Geometry:
        """That of a single token: where it matters how a pattern is lowered, and no length does."""
        return self.geometry(1)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> AttentionConfig:
        """The config that `mapping` describes, names and values as for the class; `limits` may be a mapping too.

        A pattern that is a mapping stays one until an attention is built, for plugins bring the kinds:
        `dilated_attention.resolve_pattern(config.pattern)` is the pattern.

        Raises:
            ConfigError: for an unknown key, naming the nearest right one, a missing key, or a value not allowed.
        """
        if isinstance(mapping, Mapping):
            check_fields(mapping)
            for name, check in (("limits", _limits), ("context_parallel", _context_parallel)):
                if name in mapping and not isinstance(mapping[name], Mapping):
                    check(None, None, mapping[name])  # which names the field, where `from_mapping` knows the class
        return from_mapping(cls, mapping, name="the attention config")

    @classmethod
    def from_file(cls, path: str | Path) -> AttentionConfig:
        """The config in a TOML or JSON file, told apart by its suffix, with the names of the class at the top level.

        Raises:
            ConfigError: for a file that is missing, of another kind or malformed, and as `from_dict`.
        """
        return cls.from_dict(read_mapping(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for JSON; `from_dict` reads it again, with the pattern as its mapping."""
        fields = attrs.asdict(self, recurse=False)
        pattern = self.pattern.to_dict() if isinstance(self.pattern, Pattern) else _copied(self.pattern)
        return fields | {
            "pattern": pattern,
            "backend_options": {name: _copied(options) for name, options in self.backend_options.items()},
            "context_parallel": None if self.context_parallel is None else attrs.asdict(self.context_parallel),
            "limits": attrs.asdict(self.limits),
        }


def refuse_arguments(given: Iterable[str]) -> NoReturn:
    """Raise `TypeError` for arguments that a call does not take, naming where the first of them belongs."""
    name, fields = next(iter(given)), keys_of(AttentionConfig)
    near = nearest(name, (*_OF_CALLS, *fields))
    if name in _MASKS:
        why = f": {_ELSEWHERE['attn_mask']}"
    elif near in fields:
        why = f": that is fixed when an attention is built, by build_attention({near}=...)"
    elif name in _ELSEWHERE:
        why = f": {_ELSEWHERE[name]}"
    else:
        why = f"{did_you_mean(name, _OF_CALLS)}: it takes {', '.join(_OF_CALLS)}"
    raise TypeError(f"a call of an attention has no {name!r}{why}")


def check_fields(mapping: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a key that is no field of `AttentionConfig`, naming where it belongs.

    The arguments of other implementations' dilated attention are told that they are the pattern's, those of torch's
    attention and of calls what takes their place.
    """
    for key in mapping:
        if key in _DILATED_FIELDS:
            raise ConfigError(
                f"the attention config has no {key!r} (did you mean {_DILATED_FIELDS[key]!r} of the pattern? "
                "pattern=Dilated(segment_lengths=(...), dilation_rates=(...)))"
            )
        if key in _ELSEWHERE:
            raise ConfigError(f"the attention config has no {key!r}: {_ELSEWHERE[key]}")
    check_keys(mapping, keys_of(AttentionConfig), name="the attention config")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose own reader keeps the last of two equal names and says nothing; TOML's refuses them."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {twice!r} twice")
    return table


def named_values(texts: Iterable[str], *, flag: str) -> dict[str, Any]:
    """Names and values of `name=value`, the values in TOML's notation; what is none is a string.

    Raises:
        ConfigError: without a name or =, for a name that is given twice, or a number or list in another notation.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"{flag} must be name=value, got {text!r}")
        if name in found:
            raise ConfigError(f"{flag} {name} is given twice; give it once")
        try:
            found[name] = tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError) as error:  # also integers of thousands of digits, and lists without end
            if not isinstance(error, tomllib.TOMLDecodeError) or value[:1] in tuple("[{\"'") or _are_numbers(value):
                shown = repr(value if len(value) <= 80 else f"{value[:77]}...")
                raise ConfigError(f"{flag} {name}: values are TOML: 0.1, [8, 0]; got {shown}: {error}") from error
            found[name] = value
    return found


def _are_numbers(text: str) -> bool:
    """Whether people would read `.1` or `8,0` as numbers, which TOML does not."""
    try:
        return all(any(map(str.isdigit, part)) and math.isfinite(float(part)) for part in text.split(","))
    except ValueError:
        return False


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The top-level table of a TOML or JSON file.

    Raises:
        ConfigError: for a file that cannot be read, has another suffix, or is malformed; the message says where.
    """
    path = Path(path)
    if path.suffix.lower() not in (".toml", ".json"):
        raise ConfigError(f"a config file ends in .toml or .json, got {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"the config file {str(path)!r} is not UTF-8 text: {error.reason}") from error
    except (OSError, ValueError) as error:  # also a name that no file can have
        cause = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the config file {str(path)!r}: {cause}") from error
    try:
        parsed = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text, object_pairs_hook=_table)
    except (ValueError, RecursionError) as error:  # tomllib's and json's decode errors, and tables in tables in tables
        raise ConfigError(f"the config file {str(path)!r} is malformed: {error}") from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"the config file {str(path)!r} must hold a table of names, got a {type(parsed).__name__}")
    return parsed
