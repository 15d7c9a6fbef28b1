from dilated_attention.registry import BackendSpec, PatternSpec, Range, hookimpl


@hookimpl
def dilated_attention_backends() -> list[BackendSpec]:
    able = {"device_types": ["cpu"], "dtypes": ["float64", "float32"], "head_dims": Range(1, 128), "layouts": ["dense"]}
    able |= dict.fromkeys(["causal", "backward", "lse", "offsets", "unequal_lengths", "varlen"], True)
    return [BackendSpec(name="toy", target="toy_attention.kernel:Toy", priority=-50, capabilities=able)]


@hookimpl
def dilated_attention_patterns() -> list[PatternSpec]:
    return [PatternSpec(kind="log_sparse", target="toy_attention.pattern:LogSparse")]
