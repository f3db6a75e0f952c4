"""Named places in a model, found by structure: where activations are read, replaced, or folded.

| name | activation |
|---|---|
| `embedding` | output of the token embedding |
| `norm1.{i}` | what attention `i` reads: output of the norm before it |
| `attention.{i}` | what attention `i` adds to the residual stream (before a post-norm, if any) |
| `norm2.{i}` | what the MLP `i` reads: output of the norm before it |
| `value.{i}` | input of the MLP's down projection: coefficients of its value vectors |
| `mlp.{i}` | what the MLP `i` adds to the residual stream (before a post-norm, if any) |
| `residual.{i}` | output of block `i` |
| `norm.final` | output of the norm after the last block |

A site lists `readers`, linear modules that are the only consumers of the activation, and `writer`,
the linear module whose output is the activation; a map at the site can be folded into either,
exactly. Both stay empty wherever the structure is not known for sure (shared weights, experts,
adapters, unfamiliar children), and so does `writer` while the module is in training mode with
dropout in it: what dropout follows the writer, the site sees and the fold does not. In post-norm
models (BERT) the norms also feed the residual stream and have no readers; there
`norm1.{i}` is the output of the previous block's last norm. `find_sites` never runs the model.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from concept_erasure.errors import FormatError, SiteNotFoundError

__all__ = [
    "Site",
    "Space",
    "as_out_in",
    "base_of",
    "find_sites",
    "fingerprint",
    "hook",
    "model_id",
    "resolve",
    "width_at",
]

_ATTENTION = ("self_attn", "self_attention", "attention", "attn")
_MLP = ("mlp", "feed_forward", "ffn")
_NORM1 = ("input_layernorm", "ln_1", "self_attn_layer_norm", "ln_attn", "attention_norm", "norm1")
_NORM2 = ("pre_feedforward_layernorm", "ln_2", "ln_mlp", "ffn_norm", "norm2", "final_layer_norm")
_POST_NORMS = (
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    "post_self_attn_layernorm",
    "post_mlp_layernorm",
)
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f")
_INNER_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
_ATTENTION_READERS = frozenset(
    (
        "q_proj",
        "k_proj",
        "v_proj",
        "qkv_proj",
        "query",
        "key",
        "value",
        "c_attn",
        "query_key_value",
        "Wqkv",
        "q_lin",
        "k_lin",
        "v_lin",
        "wq",
        "wk",
        "wv",
    )
)
_ATTENTION_WRITERS = frozenset(("o_proj", "out_proj", "c_proj", "dense", "out_lin", "wo"))
_MLP_READERS = frozenset(
    (
        "gate_proj",
        "up_proj",
        "gate_up_proj",
        "c_fc",
        "fc_in",
        "fc1",
        "dense_h_to_4h",
        "w1",
        "w3",
        "lin1",
    )
)
_MLP_WRITERS = frozenset(("down_proj", "c_proj", "fc_out", "fc2", "dense_4h_to_h", "w2", "lin2"))
_HEADS = ("lm_head", "embed_out")
_OTHER_TOWERS = ("vision", "visual", "audio", "image", "speech")


@dataclass(frozen=True)
class Site:
    """A named place in a model.

    Attributes:
        name: as in the table of this module, or the module path.
        module: path of the module hooked.
        kind: `embedding`, `norm1`, `attention`, `norm2`, `value`, `mlp`, `residual`, `norm` or
            `module`.
        when: whether the activation is the module's input or its output.
        readers: paths of the linear modules that alone consume the activation; fold `W <- W P`.
        writer: path of the linear module whose output it is; fold `W <- P W`. `None` while dropout
            is active there; call `model.eval()` before folding.
    """

    name: str
    module: str
    kind: str
    when: Literal["input", "output"] = "output"
    readers: tuple[str, ...] = ()
    writer: str | None = None


@dataclass(frozen=True)
class Space:
    """Where representations come from; an eraser fitted on them belongs there and nowhere else.

    Attributes:
        model: identifier of the model.
        fingerprint: of its weights, see `fingerprint`.
        site: name of the site.
        tokens: `last`, `first`, `mean` or `all`.
        width: d.
    """

    model: str
    fingerprint: str
    site: str
    tokens: str
    width: int

    def to_dict(self) -> dict[str, str | int]:
        """Return the fields as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Space:
        """Return the space written by `to_dict`.

        Raises:
            FormatError: a field is missing, unknown or of the wrong type.
        """
        kinds = {"model": str, "fingerprint": str, "site": str, "tokens": str, "width": int}
        if set(values) != set(kinds):
            raise FormatError(f"a space has the fields {sorted(kinds)}; got {sorted(values)}")
        for key, kind in kinds.items():
            if not isinstance(values[key], kind):
                raise FormatError(f"space.{key} must be {kind.__name__}; got {values[key]!r}")
        return cls(**dict(values))


@dataclass(frozen=True)
class _Part:
    """An attention or MLP: what is hooked, what reads its input, what writes its output."""

    module: str
    readers: tuple[str, ...]
    writer: str | None
    down: str | None


def _child(module: nn.Module, names: Sequence[str]) -> str | None:
    children = dict(module.named_children())
    return next((name for name in names if name in children), None)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def as_out_in(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the weight of a linear module as (out, in), or such a weight as the module stores it.

    GPT-2's `Conv1D` stores (in, out), all others (out, in); going and coming back are the same step.
    """
    return weight if isinstance(module, nn.Linear) else weight.T


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _features(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a linear module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    out, inner = as_out_in(module, cast("Tensor", module.weight)).shape
    return int(inner), int(out)


def _shared(model: nn.Module) -> frozenset[int]:
    """Return ids of parameters held by more than one module, or by a module in two places."""
    seen: set[int] = set()
    twice: set[int] = set()
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return frozenset(twice)


def _blocks(model: nn.Module) -> str:
    """Return the path of the longest list of transformer blocks, text towers first."""
    found: list[tuple[bool, int, str]] = []
    for path, module in model.named_modules():
        full = isinstance(module, nn.ModuleList) and len(module) > 0
        if full and _child(module[0], _ATTENTION) is not None:
            text = not any(word in path.lower() for word in _OTHER_TOWERS)
            found.append((text, len(module), path))
    if not found:
        raise SiteNotFoundError(
            f"{type(model).__name__} has no list of transformer blocks (a ModuleList whose members "
            f"have one of {', '.join(_ATTENTION)}); name sites by module path instead"
        )
    return max(found, key=lambda item: (item[0], item[1]))[2]


def _part(
    model: nn.Module,
    path: str,
    reads: frozenset[str],
    writes: frozenset[str],
    shared: frozenset[int],
) -> _Part:
    """Describe an attention or MLP; readers and writer are empty unless every piece is known."""
    readers: list[str] = []
    writers: list[str] = []
    known = True
    for inner, module in model.get_submodule(path).named_modules(prefix=path):
        last = inner.rsplit(".", 1)[-1]
        own = [p for p in module._parameters.values() if p is not None]
        if _is_linear(module) and last in reads:
            readers.append(inner)
        elif _is_linear(module) and last in writes:
            writers.append(inner)
        elif own and not (_is_norm(module) and last in _INNER_NORMS):
            known = False
        if any(id(p) in shared for p in own):
            known = False
    known = known and len(writers) == 1 and bool(readers)
    drops = _drops(model.get_submodule(path))
    down = writers[0] if len(writers) == 1 else None
    if down and "residual" in inspect.signature(model.get_submodule(path).forward).parameters:
        path, drops = down, False  # Bloom adds the residual stream inside the module
    if not known:
        return _Part(path, (), None, down)
    return _Part(path, tuple(readers), None if drops else down, down)


def _drops(module: nn.Module) -> bool:
    """Say whether dropout is active somewhere in a module."""
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
    return any(isinstance(m, kinds) and m.training and m.p > 0 for m in module.modules())


def _loose_mlp(model: nn.Module, block: str, shared: frozenset[int]) -> _Part | None:
    """Describe an MLP whose two linear modules lie directly in the block (OPT)."""
    module = model.get_submodule(block)
    if _child(module, ("fc1",)) is None or _child(module, ("fc2",)) is None:
        return None
    up, down = f"{block}.fc1", f"{block}.fc2"
    own = [p for path in (up, down) for p in model.get_submodule(path).parameters()]
    if any(id(p) in shared for p in own):
        return _Part(down, (), None, down)
    return _Part(down, (up,), down, down)


def _strange(block: nn.Module) -> bool:
    """Say whether a block has trained children other than those whose wiring is known."""
    known = {*_ATTENTION, *_MLP, *_NORM1, *_NORM2, *_POST_NORMS, "fc1", "fc2"}
    known |= {"crossattention", "ln_cross_attn"}  # GPT-2: with its own norm
    own = any(p is not None for p in block._parameters.values())
    return own or any(
        name not in known and next(child.parameters(), None) is not None
        for name, child in block.named_children()
    )


def _pre_norm_block(
    model: nn.Module, block: str, i: int, shared: frozenset[int]
) -> dict[str, Site]:
    module = model.get_submodule(block)
    attention_name, mlp_name = _child(module, _ATTENTION), _child(module, _MLP)
    attention = mlp = None
    if attention_name is not None:
        path = f"{block}.{attention_name}"
        attention = _part(model, path, _ATTENTION_READERS, _ATTENTION_WRITERS, shared)
    if mlp_name is not None:
        mlp = _part(model, f"{block}.{mlp_name}", _MLP_READERS, _MLP_WRITERS, shared)
    else:
        mlp = _loose_mlp(model, block, shared)
    norm1, norm2 = _child(module, _NORM1), _child(module, _NORM2)
    if norm1 is not None and norm2 is None and _child(module, _POST_NORMS[1:2]) is None:
        norm2 = _child(module, _POST_NORMS[:1])  # Llama: its norm before the MLP
    reads1 = attention.readers if attention else ()
    reads2 = mlp.readers if mlp else ()
    if norm2 is None:  # one norm read by both (GPT-J, Phi, Falcon)
        one = sum(_is_norm(child) for child in module.children()) == 1
        reads1 = (*reads1, *reads2) if one and reads1 and reads2 else ()
    config = getattr(model, "config", None)
    if _strange(module) or getattr(config, "do_layer_norm_before", True) is False:
        reads1 = reads2 = ()
    width = _width(model)
    reads1, reads2 = (
        r if all(_features(model.get_submodule(p))[0] == width for p in r) else ()
        for r in (reads1, reads2)
    )
    sites: dict[str, Site] = {}
    if norm1 is not None:
        _add(sites, Site(f"norm1.{i}", f"{block}.{norm1}", "norm1", readers=reads1))
    _add_part(sites, "attention", i, attention)
    if norm2 is not None:
        _add(sites, Site(f"norm2.{i}", f"{block}.{norm2}", "norm2", readers=reads2))
    _add_part(sites, "mlp", i, mlp)
    return sites


def _post_norm_block(
    model: nn.Module, block: str, i: int, before: str | None, shared: frozenset[int]
) -> dict[str, Site]:
    """BERT: `attention.output.{dense, LayerNorm}` and `output.{dense, LayerNorm}`."""

    def simple(path: str) -> _Part:
        own = model.get_submodule(path).parameters()
        free = not any(id(p) in shared for p in own) and _is_linear(model.get_submodule(path))
        return _Part(path, (), path if free else None, path)

    sites: dict[str, Site] = {}
    if before is not None:
        _add(sites, Site(f"norm1.{i}", before, "norm1"))
    _add_part(sites, "attention", i, simple(f"{block}.attention.output.dense"))
    _add(sites, Site(f"norm2.{i}", f"{block}.attention.output.LayerNorm", "norm2"))
    _add_part(sites, "mlp", i, simple(f"{block}.output.dense"))
    return sites


def _add(sites: dict[str, Site], site: Site) -> None:
    sites[site.name] = site


def _add_part(sites: dict[str, Site], kind: str, i: int, part: _Part | None) -> None:
    if part is None:
        return
    if kind == "mlp" and part.down is not None:
        readers = (part.down,) if part.writer is not None or part.readers else ()
        _add(sites, Site(f"value.{i}", part.down, "value", "input", readers))
    _add(sites, Site(f"{kind}.{i}", part.module, kind, writer=part.writer))


def _is_post_norm(block: nn.Module) -> bool:
    paths = (
        "attention.output.dense",
        "attention.output.LayerNorm",
        "output.dense",
        "output.LayerNorm",
    )
    names = {name for name, _ in block.named_modules()}
    return all(path in names for path in paths)


def _embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_input_embeddings", None)
    if getter is None:
        return None
    try:
        module = getter()
    except NotImplementedError:
        return None
    return module if isinstance(module, nn.Module) else None


def _width(model: nn.Module) -> int:
    """Return the width of the residual stream; -1 when the model does not say."""
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None) or config
    return int(getattr(text, "hidden_size", -1))


def _final(
    model: nn.Module, blocks: str, shared: frozenset[int], last_norm: str | None
) -> Site | None:
    if last_norm is not None:
        return Site("norm.final", last_norm, "norm")
    parent_path = blocks.rpartition(".")[0]
    name = _child(model.get_submodule(parent_path), _FINAL_NORMS)
    if name is None:
        return None
    path = f"{parent_path}.{name}" if parent_path else name
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    readers: tuple[str, ...] = ()
    if isinstance(head, nn.Module) and _is_linear(head):
        head_path = next(p for p, m in model.named_modules() if m is head)
        tied = any(id(p) in shared for p in head.parameters())
        known = head_path.rsplit(".", 1)[-1] in _HEADS
        if known and not tied and _features(head)[0] == _width(model):
            readers = (head_path,)
    return Site("norm.final", path, "norm", readers=readers)


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Return the named sites of a transformer, in the order in which a forward pass meets them.

    Args:
        model: a Hugging Face model, with or without a head. It is not run.

    Raises:
        SiteNotFoundError: no list of transformer blocks was found.
    """
    blocks = _blocks(model)
    shared = _shared(model)
    sites: dict[str, Site] = {}
    embedding = _embedding(model)
    if embedding is not None:
        path = next((p for p, m in model.named_modules() if m is embedding), None)
        if path is not None:
            _add(sites, Site("embedding", path, "embedding"))
    members = model.get_submodule(blocks)
    parent = blocks.rpartition(".")[0].rpartition(".")[0]  # BERT: `bert` of `bert.encoder.layer`
    before: str | None = f"{parent}.embeddings.LayerNorm".lstrip(".")
    if before not in {path for path, _ in model.named_modules()}:
        before = None
    last_norm: str | None = None
    for name, block in members.named_children():
        path = f"{blocks}.{name}"
        if _is_post_norm(block):
            sites |= _post_norm_block(model, path, int(name), before, shared)
            before = last_norm = f"{path}.output.LayerNorm"
        else:
            sites |= _pre_norm_block(model, path, int(name), shared)
        _add(sites, Site(f"residual.{name}", path, "residual"))
    final = _final(model, blocks, shared, last_norm)
    if final is not None:
        _add(sites, final)
    return sites


def resolve(model: nn.Module, patterns: str | Sequence[str]) -> list[Site]:
    """Return the sites that names, patterns or module paths stand for.

    Args:
        model: the model.
        patterns: site names (`residual.3`), shell patterns over them (`norm?.*`), or module paths
            and patterns over those (`model.layers.*.mlp`), which stand for the module's output.
            A linear module that shares no weight is the writer of its own output.

    Returns:
        Each site once, in the order of the patterns, and of the forward pass within a pattern.

    Raises:
        SiteNotFoundError: a pattern matches nothing, none was given, or a name stands for a module
            that is never run (a `ModuleList`) or gives no hidden states (rotary embeddings).
        TypeError: a pattern is not a string.
    """
    wanted = _wanted(patterns)
    try:
        sites = find_sites(model)
    except SiteNotFoundError:
        sites = {}
    modules = [path for path, _ in model.named_modules() if path]
    found: dict[str, Site] = {}
    for pattern in wanted:
        exact = [sites[pattern]] if pattern in sites else []
        hits = exact or [s for n, s in sites.items() if fnmatch.fnmatchcase(n, pattern)]
        if not hits:
            hits = _by_path(model, pattern, modules, sites)
        if not hits:
            near = difflib.get_close_matches(pattern, [*sites, *modules], n=5, cutoff=0.0)
            raise SiteNotFoundError(
                f"{type(model).__name__} has no site {pattern!r}; nearest: {', '.join(near)}"
            )
        found |= {site.name: site for site in hits}
    return list(found.values())


def _wanted(patterns: str | Sequence[str]) -> list[str]:
    if isinstance(patterns, str):
        return [patterns]
    known = isinstance(patterns, Iterable) and not isinstance(patterns, bytes | Tensor)
    wanted: list[Any] = list(patterns) if known else [patterns]
    strange = [pattern for pattern in wanted if not isinstance(pattern, str)]
    if strange or not known:
        raise TypeError(
            "sites must be a name, pattern or module path, or a list of them, such as 'residual.0'; "
            f"got {strange[0] if strange else patterns!r}"
        )
    if not wanted:
        raise SiteNotFoundError("no site was asked for; give a name such as 'residual.0'")
    return wanted


def _by_path(
    model: nn.Module, pattern: str, modules: Sequence[str], sites: Mapping[str, Site]
) -> list[Site]:
    """Return the outputs of the modules a path or pattern names, leaving out those without one."""
    paths = [p for p in modules if p == pattern]
    paths = paths or [p for p in modules if fnmatch.fnmatchcase(p, pattern)]
    useless = {path: _useless(model.get_submodule(path)) for path in paths}
    useful = [path for path, reason in useless.items() if reason is None]
    shared = _shared(model) if useful else frozenset()
    hits = [Site(p, p, "module", writer=_own_writer(model, p, shared)) for p in useful]
    if useless and not hits:
        path, reason = next(iter(useless.items()))
        raise SiteNotFoundError(_advice(model, path, f"{reason}", sites))
    return hits


def _own_writer(model: nn.Module, path: str, shared: frozenset[int]) -> str | None:
    """Return the path if it is a plain linear module that shares no parameter, whose output it writes."""
    module = model.get_submodule(path)
    plain = not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward
    free = not any(id(p) in shared for p in module.parameters())
    return path if _is_linear(module) and plain and free else None


def _useless(module: nn.Module) -> str | None:
    """Say why a module has no activation to work on; `None` when it may have one."""
    if getattr(module.forward, "__func__", None) is nn.Module.forward:
        return f"{type(module).__name__} only holds other modules and is never run"
    if "rotary" in type(module).__name__.lower():
        return f"{type(module).__name__} gives angles of positions, not hidden states"
    return None


def _advice(model: nn.Module, path: str, reason: str, sites: Mapping[str, Site]) -> str:
    """Return the message about a module without an activation, naming up to five places nearby."""
    modules = [p for p, module in model.named_modules() if p and _useless(module) is None]
    inside = [s for s in sites.values() if s.module.startswith(f"{path}.")]
    near = [s.name for s in sorted(inside, key=lambda s: s.module.count("."))][:5]
    near = near or [p for p in modules if p.startswith(f"{path}.")][:5]
    near = near or difflib.get_close_matches(path, [*sites, *modules], n=5, cutoff=0.0)
    return f"nothing can be done at {path!r}: {reason}; nearest: {', '.join(near)}"


def hook(model: nn.Module, site: Site, fn: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call `fn` on the activation of a site at every forward pass.

    Args:
        model: the model.
        site: where.
        fn: gets the activation, usually (batch, tokens, d). A returned tensor takes its place
            (other members of a tuple output stay), `None` leaves it alone.

    Returns:
        The handle; `remove()` ends it.

    Raises:
        SiteNotFoundError: the module does not exist, is never run, or (in the forward pass) its
            activation is not a floating-point tensor.
    """
    module = _module(model, site)
    reason = _useless(module)
    if reason is not None:
        try:
            sites = find_sites(model)
        except SiteNotFoundError:
            sites = {}
        raise SiteNotFoundError(_advice(model, site.module, reason, sites))
    if site.when == "input":

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if args:
                new = fn(_tensor(args[0], site))
                return None if new is None else ((new, *args[1:]), kwargs)
            key = next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None)
            new = fn(_tensor(kwargs.get(key) if key else None, site))
            return None if new is None or key is None else (args, {**kwargs, key: new})

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, __: tuple[Any, ...], output: object) -> object:
        if isinstance(output, tuple | list):
            new = fn(_tensor(output[0] if output else None, site))
            if new is None:
                return None
            made = [new, *output[1:]]
            return type(output)(*made) if hasattr(output, "_fields") else type(output)(made)
        return fn(_tensor(output, site))

    return module.register_forward_hook(after)


def width_at(model: nn.Module, site: Site) -> int | None:
    """Return the width d of a site without running the model; `None` when it cannot be told.

    Raises:
        SiteNotFoundError: the module does not exist.
    """
    module = _module(model, site)
    if site.when == "input":
        return _features(module)[0] if _is_linear(module) else None
    if site.writer is not None:
        return _features(model.get_submodule(site.writer))[1]
    if _is_linear(module):
        return _features(module)[1]
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    weight = getattr(module, "weight", None)
    if _is_norm(module) and isinstance(weight, Tensor):
        return int(weight.shape[-1])
    width = _width(model)
    return width if width > 0 and site.kind in {"residual", "attention", "mlp"} else None


def _module(model: nn.Module, site: Site) -> nn.Module:
    try:
        return model.get_submodule(site.module)
    except AttributeError as error:
        raise SiteNotFoundError(
            f"{type(model).__name__} has no module {site.module!r} for site {site.name!r}"
        ) from error


def _tensor(value: object, site: Site) -> Tensor:
    if not isinstance(value, Tensor):
        raise SiteNotFoundError(
            f"the {site.when} of {site.module!r} (site {site.name!r}) is not a tensor but "
            f"{type(value).__name__}; choose a module inside it"
        )
    if not value.is_floating_point():
        raise SiteNotFoundError(
            f"the {site.when} of {site.module!r} (site {site.name!r}) holds {value.dtype} values, "
            "not hidden states; choose a site such as 'residual.0'"
        )
    return value


def model_id(model: nn.Module) -> str:
    """Return the model's name in its configuration, or its class name."""
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", "") or type(model).__name__)


def base_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the path and the module of a model without its heads and wrappers.

    All views of one model (with a head, without, with adapters around it) have the same base;
    a module that says nothing of a `base_model` inside it is its own, at path `""`.
    """
    path, inner = "", model
    while True:
        base = getattr(inner, "base_model", None)
        if not isinstance(base, nn.Module) or base is inner:
            return path, inner
        step = next((p for p, module in inner.named_modules() if module is base), "")
        if not step:
            return path, inner
        path, inner = f"{path}.{step}" if path else step, base


def fingerprint(model: nn.Module) -> str:
    """Return a cheap sha256 of a model: names, shapes and 16 values of every parameter.

    Values are compared in bfloat16, so that one checkpoint loaded in float32 and in bfloat16 is the
    same model; an edit below that precision, or between the values read, is not seen. Parameters
    are taken in the order of their names, wherever they lie, so that the devices do not matter;
    those off-loaded to the meta device have no values to read. The head is left out: hidden states
    do not depend on it, and one checkpoint is one model with or without it.
    """
    _, inner = base_of(model)
    digest = hashlib.sha256()
    pieces: list[Tensor] = []
    for name, parameter in sorted(inner.named_parameters(), key=lambda item: item[0]):
        digest.update(f"{name}:{tuple(parameter.shape)};".encode())
        if parameter.device.type == "meta" or parameter.numel() == 0:
            continue
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // 16)
        pieces.append(flat[::step][:16].to(torch.bfloat16))
    for values in _fetch(pieces):
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _fetch(pieces: Sequence[Tensor]) -> list[Tensor]:
    """Return vectors on the CPU in float32, in their order; one transfer a device. Sharded ones are gathered."""
    pieces = [piece.full_tensor() if hasattr(piece, "full_tensor") else piece for piece in pieces]
    by_device: dict[torch.device, list[int]] = {}
    for i, piece in enumerate(pieces):
        by_device.setdefault(piece.device, []).append(i)
    fetched = list(pieces)
    for places in by_device.values():
        joined = torch.cat([pieces[i] for i in places]).float().cpu()
        parts = joined.split([len(pieces[i]) for i in places])
        for i, part in zip(places, parts, strict=True):
            fetched[i] = part
    return fetched
