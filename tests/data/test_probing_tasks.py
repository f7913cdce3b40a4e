import pytest

from sae_lens_atm.data import probing_tasks
from sae_lens_atm.data.probing_tasks import check_installed, choose_tasks, read_task, task_names
from sae_lens_atm.errors import SettingsError
from tests.probing_package import NAMES, ROWS, install, texts


@pytest.fixture
def names(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    yield install(tmp_path, monkeypatch)
    task_names.cache_clear()


def test_tasks_are_the_binary_ones_in_order(names):
    assert task_names() == names == NAMES


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [("all", [0, 1, 2]), (1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (9, [0, 1, 2])],
)
def test_a_number_of_tasks_is_evenly_spaced(names, wanted, chosen):
    assert choose_tasks(wanted) == [names[i] for i in chosen]


def test_names_of_tasks_are_checked(names):
    assert choose_tasks([names[2], names[0]]) == [names[2], names[0]]
    with pytest.raises(SettingsError, match="no task '1_evn', did you mean '1_even'"):
        choose_tasks([names[0], "1_evn"])


@pytest.mark.usefixtures("names")
def test_labels_are_0_and_1_whatever_the_file_has():
    for name, words in zip(NAMES, (("w50", "w51"), ("w52", "w53"), ("w54", "w55")), strict=True):
        task = read_task(name)
        assert task.texts == texts(words)
        assert task.labels.tolist() == [i % 2 for i in range(ROWS)]


@pytest.mark.parametrize("module", ["sae_probes", "sklearn"])
def test_what_is_not_installed_is_one_line(monkeypatch, module):
    found = probing_tasks.find_spec
    monkeypatch.setattr(
        probing_tasks, "find_spec", lambda name: None if name == module else found(name)
    )
    with pytest.raises(SettingsError, match=r"sae_probes needs .*pip install .*\[probes\]") as got:
        check_installed()
    assert "\n" not in str(got.value)
    with pytest.raises(SettingsError):
        choose_tasks(3)


def test_the_tasks_of_the_real_package():
    pytest.importorskip("sklearn")
    try:
        check_installed()
    except SettingsError as error:
        pytest.skip(str(error))
    task_names.cache_clear()
    assert len(choose_tasks("all")) == 113
    assert choose_tasks(16)[:2] == ["5_hist_fig_ismale", "26_headline_isfrontpage"]
    task = read_task("118_us_state_CA")
    assert len(task.texts) == len(task.labels) == 2 * task.labels.sum() == 1000
