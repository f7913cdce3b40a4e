"""Buffers that keep their dtype when a module is cast or loaded."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import override


class ExactBuffers(nn.Module):
    """A module whose buffers named in ``exact_buffers`` keep their dtype in casts.

    Without it, ``sae.to(torch.bfloat16)`` rounds statistics, thresholds and step counts.
    """

    exact_buffers: ClassVar[tuple[str, ...]] = ()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers.get(name) for name in self.exact_buffers}
        result = super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return result

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Give each buffer its own dtype. SAELens calls this, after a cast to the SAE's dtype."""
        super().process_state_dict_for_loading(state_dict)  # pyright: ignore
        for name, buffer in self.named_buffers():
            if name in state_dict:
                state_dict[name] = state_dict[name].to(buffer.dtype)
