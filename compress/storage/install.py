"""Put packed modules into a model: empty ones by the specs of its config, or one layer with its tensors."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from paredown.compress.errors import PareError, did_you_mean
from paredown.compress.storage.kinds import kind_of
from paredown.compress.storage.modules import PackedConv1D, PackedExperts, PackedLinear
from paredown.compress.storage.spec import IN_JSON, LAYOUTS, Spec


def read_specs(modules: Mapping[str, Any]) -> dict[str, Spec]:
    """The specs in a config, by weight name. Raises PareError, naming the weight, for a spec that no weight can have."""
    specs = {name: Spec.from_json(name, raw) for name, raw in modules.items()}
    for name, spec in specs.items():
        _check_spec(name, spec)
    return specs


def install(model: nn.Module, modules: Mapping[str, Spec]) -> None:
    """Replace layers and fused parameters of `model` by packed modules, on the same device.

    `modules` are specs by full name: of the layer (linear, conv1d) or of the parameter (experts). The new weights are
    uninitialised: load them afterwards. Biases keep their values. Raises PareError, naming the weight, for a spec that
    does not fit the model; the model is then unchanged.
    """
    tied = _tied(model)
    planned = [(name, spec, *_place(model, name, spec, tied)) for name, spec in modules.items()]
    for _name, spec, parent, leaf in planned:
        new = _build(getattr(parent, leaf), spec)
        parent._parameters.pop(leaf, None)  # a parameter's name cannot be given to a module
        setattr(parent, leaf, new)


def packed_layer(old: nn.Module, spec: Spec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> nn.Module:
    """A packed layer with these tensors and bias (out,), to replace `old` (a Linear or Conv1D). None: the bias of `old`."""
    module = _build(old, spec)
    for name, tensor in tensors.items():
        if name in module._buffers:
            module._buffers[name] = tensor
        else:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module


def _place(model: nn.Module, name: str, spec: Spec, tied: set[str]) -> tuple[nn.Module, str]:
    """The module that holds the layer or parameter `name`, and the attribute there. Makes all checks of `install`."""
    _check_spec(name, spec)
    path, _, leaf = name.rpartition(".")
    try:
        parent = model.get_submodule(path)
        target = getattr(parent, leaf)
    except AttributeError as error:
        known = [n for n, _ in model.named_modules()] + [n for n, _ in model.named_parameters()]
        raise PareError(
            f"packed weight {name!r}: {type(model).__name__} has no layer or parameter of this name."
            f"{did_you_mean(name, known)} config.json and the model class are not of the same model."
        ) from error
    layout, shape = spec.layout, spec.shape
    experts = LAYOUTS[layout] == 3
    if experts:
        actual = _experts_shape(target, spec) if isinstance(target, nn.Parameter) else None
    elif layout == "linear":
        actual = tuple(target.weight.shape) if isinstance(target, nn.Linear) else None
    else:
        actual = tuple(target.weight.shape[::-1]) if type(target).__name__ == "Conv1D" else None
    if actual is None:
        raise PareError(
            f"packed weight {name!r}: layout {layout!r} cannot take the place of a {type(target).__name__}. "
            "The layout and the model class do not belong together."
        )
    if actual != shape:
        raise PareError(f"packed weight {name!r}: the spec's shape is {list(shape)}, the model's {list(actual)}.")
    if (name if experts else f"{name}.weight") in tied:
        raise PareError(
            f"packed weight {name!r} is shared with another layer (tied), which would lose it. "
            "Leave it out, or untie the model with tie_word_embeddings=False."
        )
    return parent, leaf


def _experts_shape(parameter: nn.Parameter, spec: Spec) -> tuple[int, ...]:  # (experts, out, in)
    """The shape of a parameter of fused experts as a spec gives it; a matrix holds their rows one after another."""
    shape, experts = tuple(parameter.shape), spec.shape[0]
    if len(shape) == 2 and experts and shape[0] % experts == 0:
        shape = (experts, shape[0] // experts, shape[1])
    return (shape[0], *shape[:0:-1]) if spec.layout == "experts_in_out" else shape


def _check_spec(name: str, spec: Spec) -> None:
    """Raises PareError, naming the weight, for an unknown kind and for counts that are missing or impossible."""
    try:
        kind = kind_of(spec.kind)
    except PareError as error:
        raise PareError(f"packed weight {name!r}: {error}") from error
    if missing := [IN_JSON[name] for name in kind.asks if name not in spec.counts]:
        raise PareError(f"packed weight {name!r}: its spec lacks {', '.join(missing)}.")
    try:
        kind.sizes(spec)
    except ValueError as error:
        raise PareError(f"packed weight {name!r}: {error}") from error


def _build(old: nn.Module | nn.Parameter, spec: Spec) -> PackedLinear | PackedConv1D | PackedExperts:
    if isinstance(old, nn.Parameter):
        return PackedExperts(spec, old.device, old.dtype, stacked=old.dim() == 2)
    weight, bias = cast(Tensor, old.weight), cast(nn.Parameter | None, old.bias)
    added = bias is None and spec.bias
    cls = PackedLinear if spec.layout == "linear" else PackedConv1D
    module = cls(spec, added, weight.device, weight.dtype)
    if not added:
        module.bias = bias
    # such as Falcon's `x @ weight.T + bias`
    own_forward = isinstance(old, nn.Linear) and type(old).forward is not nn.Linear.forward
    if own_forward and not kind_of(spec.kind).chain:
        module.own_forward = type(old).forward
    return module.train(old.training)


def _tied(model: nn.Module) -> set[str]:
    """Names of parameters that several layers share."""
    keys: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {*keys.keys(), *keys.values()}
