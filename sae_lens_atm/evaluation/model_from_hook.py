"""A language model that runs from a hook on, with other activations at the hook.

The lower layers run once for the original activations. They are skipped in further passes.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn

from sae_lens_atm.evaluation.next_token_loss import Unembedding

_CHECKED = 8  # tokens
_LAYER_OUTPUT = "hook_resid_post"  # TransformerLens' name of the output of a layer


class FullPass(NamedTuple):
    """A pass of the whole model. The activations are on the CPU."""

    activation: Tensor
    """At the hook."""
    device: torch.device
    """Where the model has it."""
    below: Tensor | None
    """Output of the last layer that further passes skip; None if it is `activation`, or no layer is
    skipped."""
    rest: tuple[Any, ...] | None
    """What this layer returns besides; None if it returns a tensor."""
    attended: Tensor | None
    """TransformerLens' mask of padding; None if there is none."""


class _AtUnembedding(Exception):
    """Ends a forward pass before the unembedding."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class ModelFromHook:
    """Runs a model of SAELens, a HookedTransformer or a transformers model in a HookedProxyLM.

    Every pass is SAELens' own call with all tokens. So masks and positions are those of the full
    pass. For the time of a further pass, the lower layers return their stored output.

    Args:
        model: the model.
        hook_name: the hook.
        model_kwargs: more arguments of the forward pass.

    Raises:
        ValueError, AttributeError: the model is built in another way.
    """

    def __init__(self, model: Any, hook_name: str, model_kwargs: dict[str, Any]) -> None:
        self._model, self._hook_name, self._kwargs = model, hook_name, model_kwargs
        is_transformers = isinstance(model, HookedProxyLM)
        self._last, self.unembedding = _unembedding(model.model if is_transformers else model)
        layers, index, inside = _layer_of(model.model if is_transformers else model, hook_name)
        self._replaces_layer = inside == ("" if is_transformers else _LAYER_OUTPUT)
        self._skipped = layers[: index + 1] if self._replaces_layer else layers[:index]
        self._masked = None if is_transformers else layers[0] if layers else model.blocks[0]

    def full_pass(self, tokens: Tensor) -> tuple[FullPass, Tensor]:
        """Return the activations of a pass of the whole model, and the last hidden states."""
        seen: dict[str, Any] = {"below": None, "rest": None, "attended": None}

        def see_activation(activation: Tensor, hook: Any) -> None:  # noqa: ARG001
            seen.update(activation=_copy(activation), device=activation.device)

        def see_output(_module: Any, _inputs: Any, output: Any) -> None:
            below, *rest = output if isinstance(output, tuple) else (output,)
            seen["below"] = None if self._replaces_layer else _copy(below)
            seen["rest"] = tuple(rest) if isinstance(output, tuple) else None

        def see_mask(_module: Any, _inputs: Any, kwargs: dict[str, Any]) -> None:
            seen["attended"] = kwargs.get("attention_mask")

        with ExitStack() as undo:
            if self._skipped:
                undo.callback(self._skipped[-1].register_forward_hook(see_output).remove)
            if self._masked is not None:
                handle = self._masked.register_forward_pre_hook(see_mask, with_kwargs=True)
                undo.callback(handle.remove)
            hidden = self._last_hidden(tokens, see_activation)
        return FullPass(**seen), hidden

    def replaced(self, tokens: Tensor, full: FullPass, activation: Tensor) -> Tensor:
        """Return the last hidden states with another activation at the hook.

        Args:
            tokens: the tokens of the full pass.
            full: the full pass.
            activation: the activation, in the shape of that of the full pass.
        """
        activation = activation.to(full.device)
        below = activation if full.below is None else full.below.to(full.device, copy=True)
        output = below if full.rest is None else (below, *full.rest)

        def replace(_activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            return activation

        with _without_computing(self._skipped, output):
            return self._last_hidden(tokens, replace)

    @torch.no_grad()
    def is_exact(self, tokens: Tensor) -> bool:
        """Return whether a further pass gives the logits of a full pass, on a few tokens.

        It does not if a layer reads more than the output of the layer below, or if the model
        changes the logits in a way that is not known here.
        """
        tokens = tokens[:1, :_CHECKED]
        try:
            full, _ = self.full_pass(tokens)
            changed = full.activation / 2
            found = self.unembedding.logits(self.replaced(tokens, full, changed))
        except Exception:  # the code of the model may expect anything of its layers
            return False

        def change(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            return changed.to(activation.device)

        expected: Tensor = self._run(tokens, change)
        tolerance = torch.finfo(expected.dtype).eps ** 0.5
        error = (found - expected.to(found)).abs().max()
        return bool(error <= tolerance * expected.abs().max())

    def _last_hidden(self, tokens: Tensor, at_hook: Callable[..., Any]) -> Tensor:
        handle = self._last.register_forward_pre_hook(_stop)
        try:
            self._run(tokens, at_hook)
        except _AtUnembedding as end:
            return end.hidden
        finally:
            handle.remove()
        raise RuntimeError("the model has not called its unembedding")

    def _run(self, tokens: Tensor, at_hook: Callable[..., Any]) -> Any:
        hooks = [(self._hook_name, at_hook)]
        return self._model.run_with_hooks(
            tokens, return_type="logits", fwd_hooks=hooks, **self._kwargs
        )


def model_from_hook(
    model: Any, hook_name: str, model_kwargs: dict[str, Any], tokens: Tensor
) -> ModelFromHook | None:
    """Return the model as it runs from a hook on, or None if that would not be exact.

    Args:
        model: the model.
        hook_name: the hook.
        model_kwargs: more arguments of the forward pass.
        tokens: tokens to try it on, shape ``(prompts, context)``.
    """
    try:
        from_hook = ModelFromHook(model, hook_name, model_kwargs)
    except (AttributeError, ValueError):
        return None
    return from_hook if from_hook.is_exact(tokens) else None


def _stop(_module: Any, inputs: tuple[Any, ...]) -> NoReturn:
    raise _AtUnembedding(inputs[0])


def _copy(tensor: Tensor) -> Tensor:
    # Later layers may change it in place.
    return tensor.detach().to("cpu", copy=True)


@contextmanager
def _without_computing(layers: Sequence[nn.Module], output: Any) -> Generator[None]:
    """Let layers return an output. Their attributes, which the model may read, stay."""

    def forward(*_: Any, **__: Any) -> Any:
        return output

    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            vars(layer)["forward"] = forward
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = own


def _layer_of(root: nn.Module, hook_name: str) -> tuple[list[nn.Module], int, str]:
    """Return the list of layers that a hook is in, the index of its layer, and its name inside.

    The list is empty if the hook is in no list.
    """
    module: Any = root
    parts = hook_name.split(".")
    for place, part in enumerate(parts):
        if isinstance(module, nn.ModuleList) and part.isdigit():
            return list(module), int(part), ".".join(parts[place + 1 :])
        module = getattr(module, part, None)
    return [], 0, hook_name


def _unembedding(model: Any) -> tuple[nn.Module, Unembedding]:
    """Return the module that makes the logits, and its weights.

    Raises:
        ValueError: the model has none that is known here.
    """
    if hasattr(model, "unembed"):  # TransformerLens
        cap = model.cfg.output_logits_soft_cap
        last, weight, bias = model.unembed, model.unembed.W_U.T, model.unembed.b_U
        return last, Unembedding(weight, bias, cap if cap and cap > 0 else None)
    last = model.get_output_embeddings()
    if not isinstance(last, nn.Linear):
        raise ValueError(f"the output embeddings are {type(last).__name__}, and not Linear")
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return last, Unembedding(last.weight, last.bias, cap)
