from contextlib import ExitStack

import pytest
import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig

from sae_lens_atm.training.guard import BadBatchGuard, DeferredUpdates
from sae_lens_atm.training.hooks import CollapseWarning, StepTimer, StopFlag, StopRequest
from sae_lens_atm.training.supervise import Hook, replace_attribute, supervise
from tests.helpers import PRESETS, state_equal


def make_trainer(steps=12, **fields):
    torch.manual_seed(0)
    shape = {"architecture": "atm", "d_in": 8, "d_sae": 24, "k": 3}
    schedule = {"mask_warm_up_steps": 2, "schedule_steps": steps, "parent_start": 0.2}
    atm = {} if "architecture" in fields else schedule
    sae = TrainingSAE.from_dict({**shape, **atm, **fields})
    cfg = SAETrainerConfig(steps * 32, 32, lr=1e-2, lr_end=1e-3, n_batches_for_norm_estimate=3)
    return SAETrainer(cfg, sae, (torch.randn(32, 8) for _ in range(steps + 3)))


def all_hooks(trainer):
    return [
        StepTimer(trainer.sae.device),
        BadBatchGuard(trainer),
        DeferredUpdates(trainer),
        StopRequest(StopFlag()),
        CollapseWarning(trainer),
    ]


def state_of(trainer):
    moments = trainer.optimizer.state_dict()["state"]
    state = {
        **trainer.sae.state_dict(),
        **{f"moment {i}": moment["exp_avg_sq"] for i, moment in moments.items()},
        "silent for": trainer.n_forward_passes_since_fired,
        "fired": trainer.act_freq_scores,
        "counts": torch.tensor([trainer.n_training_samples, trainer.n_frac_active_samples]),
    }
    return {name: tensor.clone() for name, tensor in state.items()}


def attributes(trainer):
    """All that belongs to trainer, SAE and scaler themselves, apart from what training counts."""
    sae = trainer.sae
    hooks = [bool(p._post_accumulate_grad_hooks) for p in sae.parameters()]
    names = [set(vars(thing)) for thing in (trainer, sae, trainer.activation_scaler)]
    return names, hooks, len(trainer.optimizer._optimizer_step_pre_hooks), sae._modules.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_supervised_training_equals_a_plain_one(preset):
    plain = make_trainer(**PRESETS[preset])
    plain.fit()
    supervised = make_trainer(**PRESETS[preset])
    with supervise(supervised, all_hooks(supervised)):
        supervised.fit()
    assert state_equal(state_of(plain), state_of(supervised))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_supervised_training_can_be_compiled(preset):
    torch._dynamo.reset()
    plain = make_trainer(**PRESETS[preset])
    plain.fit()
    compiled = make_trainer(**PRESETS[preset])
    compiled.sae.training_forward_pass = torch.compile(
        compiled.sae.training_forward_pass, backend="eager"
    )
    with supervise(compiled, all_hooks(compiled)):
        compiled.fit()
    for name, tensor in state_of(plain).items():
        torch.testing.assert_close(state_of(compiled)[name], tensor)


@pytest.mark.parametrize("compiled", [False, True])
def test_every_attribute_is_restored_also_after_an_exception(compiled):
    trainer = make_trainer(normalize_activations="expected_average_only_in")
    if compiled:  # SAELens puts the compiled forward pass on the SAE itself
        trainer.sae.training_forward_pass = trainer.sae.training_forward_pass
    before, step, forward = attributes(trainer), trainer.step, trainer.sae.training_forward_pass

    class Failing(Hook):
        def after_step(self, _output):
            raise KeyboardInterrupt

    with supervise(trainer, all_hooks(trainer)):
        assert attributes(trainer) != before
    assert attributes(trainer) == before
    with (
        pytest.raises(KeyboardInterrupt),
        supervise(trainer, [*all_hooks(trainer), Failing()]),
    ):
        trainer.fit()
    assert attributes(trainer) == before
    assert (trainer.step, trainer.sae.training_forward_pass) == (step, forward)


def test_nothing_is_left_if_a_hook_cannot_be_attached():
    trainer = make_trainer()
    before = attributes(trainer)

    class Failing(Hook):
        def attach(self, _undo):
            raise ValueError

    with pytest.raises(ValueError), supervise(trainer, [*all_hooks(trainer), Failing()]):  # noqa: PT011
        pass
    assert attributes(trainer) == before


class Recorder(Hook):
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def _wrapped(self, what, function):
        def wrapper(*args):
            self.calls.append(f"{what} {self.name}")
            return function(*args)

        return wrapper

    def wrap_step(self, step):
        return self._wrapped("step", step)

    def wrap_forward(self, forward):
        return self._wrapped("forward", forward)

    def wrap_batches(self, batches):
        self.calls.append(f"batches {self.name}")
        return batches

    def wrap_save(self, save):
        return self._wrapped("save", save)

    def between_steps(self):
        self.calls.append(f"between {self.name}")

    def before_update(self):
        self.calls.append(f"update {self.name}")

    def after_step(self, _output):
        self.calls.append(f"after {self.name}")

    def on_checkpoint(self, folder):
        (folder / self.name).touch()


def test_the_first_hook_is_the_innermost(tmp_path):
    trainer, calls = make_trainer(1, normalize_activations="expected_average_only_in"), []
    with supervise(trainer, [Recorder("a", calls), Recorder("b", calls)]):
        trainer.fit()
        steps = list(calls)
        calls.clear()
        trainer.save_checkpoint("last", tmp_path)
    assert steps == [
        *("batches a", "batches b", "between a", "between b", "step b", "step a"),
        *("forward b", "forward a", "update a", "update b", "after a", "after b"),
    ]
    assert calls == ["save b", "save a"]
    assert {"a", "b", "cfg.json", "trainer_state.pt"} <= {
        p.name for p in (tmp_path / "last").iterdir()
    }


def test_replace_attribute_restores_methods_attributes_and_modules():
    sae = make_trainer().sae
    sae.own = 1
    before, activation = dict(vars(sae)), sae.activation_fn
    with ExitStack() as undo:
        replace_attribute(sae, "own", 2, undo)
        replace_attribute(sae, "own", 3, undo)
        replace_attribute(sae, "encode", None, undo)
        replace_attribute(sae, "activation_fn", torch.nn.ReLU(), undo)
        assert (sae.own, sae.encode) == (3, None)
        assert isinstance(sae.activation_fn, torch.nn.ReLU)
    assert vars(sae) == before
    assert sae.activation_fn is activation
