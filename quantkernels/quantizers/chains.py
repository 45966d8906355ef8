"""Which batch norms are followed by one activation alone, and which layer comes alone in front of them.

In an nn.Sequential that follows from the order. Elsewhere a run on sample input shows it: every use of a batch norm's
result is then seen, by a layer or by any function of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from quantkernels.nn.batch_norm import NORMS
from quantkernels.quantizers.config import user_class

_PRODUCERS = (nn.modules.conv._ConvNd, nn.Linear)

# What asks a tensor about itself uses none of its values.
_QUESTIONS = frozenset({"__get__", "size", "dim", "is_floating_point", "numel", "__len__", "__repr__"})


@dataclass(eq=False)
class Chain:
    """A batch norm with what stands around it.

    Attributes:
        norm: the batch norm.
        producer: the convolution or linear layer whose result it alone takes; None where there is none.
        activation: the layer that alone takes its result; None where there is none.
        reason: why there is no activation, for those who look for it.
        ran: whether a run has shown it.
    """

    norm: nn.Module
    producer: nn.Module | None = None
    activation: nn.Module | None = None
    reason: str = "what follows it is not known: it stands in no nn.Sequential, and no dummy_input was given"
    ran: bool = False


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The layers that are a batch norm of torch's, each once."""
    return [module for module in model.modules() if user_class(module) in NORMS]


def chains_of_order(model: nn.Module) -> dict[nn.Module, Chain]:
    """The chain of every batch norm of `model`, from the order of the nn.Sequentials alone."""
    chains = {norm: Chain(norm) for norm in batch_norms(model)}
    places = _places(model)
    for container in model.modules():
        if not isinstance(container, nn.Sequential) or user_class(container).forward is not nn.Sequential.forward:
            continue
        children = list(container)
        for before, norm, after in zip([None, *children], children, [*children[1:], None], strict=False):
            chain = chains.get(norm)
            if chain is None:
                continue
            if places[norm] > 1:
                chain.reason = "it is used in several places"
                continue
            chain.activation = after
            chain.reason = "nothing follows it in its nn.Sequential" if after is None else ""
            if before is not None and isinstance(before, _PRODUCERS) and places[before] == 1:
                chain.producer = before
    return chains


def chains_of_run(model: nn.Module, run: Callable[[], object]) -> dict[nn.Module, Chain]:
    """The same from what is seen while `run` runs the model, in whatever way that computes."""
    watch = _Watch(model)
    with watch:
        result = run()
    watch.use(result, None)
    return {norm: watch.chain(norm) for norm in batch_norms(model)}


def _places(model: nn.Module) -> dict[nn.Module, int]:
    """In how many places each module stands."""
    places: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        places[module] = places.get(module, 0) + 1
    return places


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


class _Watch(TorchFunctionMode):
    """Follows the results of batch norms, and of what may stand in front of them, to their uses.

    A use is the layer that takes a tensor as an argument, or None where anything else does. What happens inside such a
    layer is its own affair.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._followed = {m for m in model.modules() if user_class(m) in NORMS or isinstance(m, _PRODUCERS)}
        self._takers = {m for m in model.modules() if not any(True for _ in m.children())}
        self._results: dict[int, tuple[Tensor, nn.Module]] = {}  # the tensor too: its id stays its own
        self._uses: dict[nn.Module, list[nn.Module | None]] = {module: [] for module in self._followed}
        self._calls: dict[nn.Module, int] = dict.fromkeys(self._followed, 0)
        self._inside = 0
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        for module in self._takers:
            self._handles.append(module.register_forward_pre_hook(self._enter_layer, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave_layer, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside == 0 and getattr(func, "__name__", "") not in _QUESTIONS:
            self.use((args, kwargs), None)
        result = func(*args, **(kwargs or {}))
        if self._inside == 0:
            self._changed(result)
        return result

    def _changed(self, result: Any) -> None:
        """What is made in place of the tensors in `result` is a result of its own."""
        for tensor in _tensors(result):
            self._results.pop(id(tensor), None)

    def use(self, values: Any, taker: nn.Module | None) -> None:
        """Notes that `taker` takes the tensors among `values`."""
        for tensor in _tensors(values):
            known = self._results.get(id(tensor))
            if known is not None:
                self._uses[known[1]].append(taker)

    def _enter_layer(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._inside == 0:
            self.use((args, kwargs), module)
        self._inside += 1

    def _leave_layer(self, module: nn.Module, args: Any, result: Any) -> None:
        self._inside -= 1
        if self._inside > 0:
            return
        self._changed(result)
        if module in self._followed and isinstance(result, Tensor):
            self._results[id(result)] = (result, module)
            self._calls[module] += 1

    def chain(self, norm: nn.Module) -> Chain:
        """What was seen around `norm`."""
        producers = [m for m, uses in self._uses.items() if isinstance(m, _PRODUCERS) and norm in uses]
        producer = producers[0] if len(producers) == 1 and self._takes_all(norm, producers[0]) else None
        calls, takers = self._calls[norm], self._uses[norm]
        if calls == 0:
            return Chain(norm, producer, None, "it did not run on dummy_input")
        if len(set(takers)) > 1 or len(takers) > calls:
            return Chain(norm, producer, None, "its result is used more than once", True)
        if not takers or takers[0] is None:
            return Chain(norm, producer, None, "what takes its result is no layer", True)
        return Chain(norm, producer, takers[0], "", True)

    def _takes_all(self, norm: nn.Module, producer: nn.Module) -> bool:
        return self._uses[producer] == [norm] * self._calls[producer] and self._calls[producer] == self._calls[norm]
