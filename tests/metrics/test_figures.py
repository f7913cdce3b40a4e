import pytest

from sae_lens_atm.metrics.figures import FIGURES, NEEDS, figure


@pytest.mark.parametrize("name", FIGURES)
def test_a_definition_is_one_sentence(name):
    meaning = FIGURES[name].meaning
    assert meaning[0].isupper()
    assert meaning.endswith(".")
    assert ". " not in meaning


def test_labels_and_definitions_are_distinct():
    for values in ([f.label for f in FIGURES.values()], [f.meaning for f in FIGURES.values()]):
        assert len(set(values)) == len(values)


def test_needs_are_of_figures_that_exist():
    assert set(NEEDS) <= set(FIGURES)


def test_an_unknown_figure_has_defaults():
    assert figure("odd_extra") == ("odd extra", 0, "", 3)
