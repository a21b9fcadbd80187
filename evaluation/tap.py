"""A tap on matrix products: what each site reads and gives, experts and all, without hooks."""

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from quantization.units import Site

WEIGHT_ARGUMENT: dict[Any, int] = {
    torch.nn.functional.linear: 1,
    torch.matmul: 1,
    torch.Tensor.matmul: 1,
    torch.Tensor.__matmul__: 1,
    torch.addmm: 2,
}
"""Where a product's weight stands among its arguments; its input is the argument before."""

Visit = Callable[[Site, int, Tensor, Tensor], None]
"""Called with the site, the expert's index (0 for a plain linear), the input and the output."""


class Tap(TorchFunctionMode):
    """Calls `visit` for every product with a weight of the given sites.

    Weights are recognised by their address, which finds packed experts as well: eager expert
    code multiplies with a slice of the 3-D parameter. Inside the context experts run eagerly.
    """

    def __init__(self, model: Any, sites: Iterable[Site], visit: Visit) -> None:
        super().__init__()
        self._visit = visit
        self._config = model.config
        self._sites: dict[int, tuple[Site, int]] = {}
        parameters = dict(model.named_parameters())
        for site in sites:
            parameter = parameters[site.parameter]
            experts = site.shape[0] if len(site.shape) == 3 else 1
            stride = parameter.numel() // experts * parameter.element_size()
            for expert in range(experts):
                self._sites[parameter.data_ptr() + expert * stride] = site, expert

    def __enter__(self) -> Self:
        # transformers' grouped kernels would hide the products of single experts
        self._experts = getattr(self._config, "_experts_implementation", None)
        if self._experts is not None:
            self._config._experts_implementation = "eager"
        super().__enter__()
        return self

    def __exit__(self, *arguments: object) -> None:
        super().__exit__(*arguments)
        if self._experts is not None:
            self._config._experts_implementation = self._experts

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the function; look at its operands if it is a matrix product."""
        result = function(*args, **(kwargs or {}))
        position = WEIGHT_ARGUMENT.get(function)
        if position is not None and len(args) > position:
            found = self._sites.get(args[position].data_ptr())
            if found:
                self._visit(*found, args[position - 1], result)
        return result
