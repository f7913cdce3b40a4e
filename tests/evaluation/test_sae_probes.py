import numpy as np
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from scipy import stats

from sae_lens_atm.evaluation.sae_probes import probe_sae
from sae_lens_atm.evaluation.task_store import SaeProbesConfig, TaskActivations
from sae_lens_atm.metrics.sparse_probing import probe_scores

D_IN = 6


class Store:
    """Two tasks: the class moves one of the inputs, 4 on the first task and 2 on the second."""

    def __init__(self, k):
        self.tasks, self.cfg = ["a", "b"], SaeProbesConfig(k=k, seed=0)
        rng = np.random.default_rng(0)
        self._found = {}
        for task, moved in (("a", 4), ("b", 2)):
            labels = rng.permutation(np.arange(900) % 2)
            x = rng.standard_normal((900, D_IN))
            x[:, moved] += 1.5 * labels
            x = torch.tensor(x, dtype=torch.float32)
            self._found[task] = TaskActivations(x[:600], labels[:600], x[600:], labels[600:])

    def read(self, task):
        return self._found[task]

    def raw_scores(self, task):
        return probe_scores(*self._found[task], "l2", 0)


@pytest.fixture(autouse=True)
def _sklearn():
    pytest.importorskip("sklearn")


@pytest.fixture
def sae():
    """Its latents are the inputs where these are above -10."""
    sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_IN, device="cpu"))
    sae.W_enc.data = sae.W_dec.data = torch.eye(D_IN)
    sae.b_enc.data.fill_(10)
    return sae


def test_one_latent_has_the_auc_of_its_input(sae):
    store = Store([1])
    found = probe_sae(sae, store)
    for i, (task, moved) in enumerate((("a", 4), ("b", 2))):
        x, labels = store.read(task).test[:, moved].numpy(), store.read(task).test_labels
        ranks = stats.mannwhitneyu(x[labels == 1], x[labels == 0]).statistic
        area = ranks / ((labels == 1).sum() * (labels == 0).sum())
        assert found.by_task["probe_auc_k1"][i] == pytest.approx(area, abs=1e-3)
    assert found.figures["probe_auc_k1"] == pytest.approx(np.mean(found.by_task["probe_auc_k1"]))


def test_figures_and_intervals_are_of_auc_and_accuracy(sae):
    found = probe_sae(sae, Store([1, 2]))
    names = {f"probe_{score}_{on}" for score in ("auc", "accuracy") for on in ("k1", "k2", "raw")}
    assert found.figures.keys() == found.intervals.keys() == names
    for name, (low, high) in found.intervals.items():
        assert low <= found.figures[name] <= high
    assert found.by_task.keys() == names | {"probe_f1_k1", "probe_f1_k2", "probe_f1_raw"}


def test_more_latents_than_there_are(sae):
    found = probe_sae(sae, Store([D_IN + 5])).figures
    # All latents are all inputs: only the penalty differs from the model's own probe.
    assert found["probe_auc_k11"] == pytest.approx(found["probe_auc_raw"], abs=0.02)


def test_the_state_of_the_sae_does_not_change(sae):
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    probe_sae(sae, Store([2]))
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_it_can_be_stopped_before_a_task(sae):
    seen = []

    def stop(done, every):
        seen.append((done, every))
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe_sae(sae, Store([1]), stop)
    assert seen == [(0, 2), (1, 2)]
