import pytest

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.yaml_files import apply_overrides, read_yaml, shipped_config


def message_of(function, *args):
    with pytest.raises(SettingsError) as caught:
        function(*args)
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "file.yaml"
        path.write_text(text)
        return path

    return write


def test_a_key_that_is_set_twice_is_an_error(file):
    path = file("lr: 2\nsae: {k: 1}\nlr: 1\n")
    assert message_of(read_yaml, path) == f"{path}: lr is set twice, in lines 1 and 3"


@pytest.mark.parametrize("key", ["1", "null", "? ", "yes", "[1]"])
def test_a_key_that_is_no_text_is_an_error(file, key):
    path = file(f"lr: 2\nsae:\n  {key}: 1\n" if key != "? " else "lr: 2\n\n? \n: 3\n")
    assert (
        message_of(read_yaml, path) == f"{path}: the key in line 3 must be text, put it in quotes"
    )


def test_a_merged_key_may_be_set_again(file):
    path = file("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert read_yaml(path)["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize("content", ["a: [", "- 1", "\x00", "", "{[1]: 2}", "2001-99-99"])
def test_a_file_that_holds_no_mapping(file, content):
    path = file(content)
    message = message_of(read_yaml, path)
    assert str(path) in message
    assert "\n" not in message


def test_a_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "missing.yaml"
    assert message_of(read_yaml, path) == f"cannot read {path}: No such file or directory"


def test_overrides_make_a_copy_and_new_branches():
    content = {"sae": {"k": 1}}
    assert apply_overrides(content, ["sae.k=2", "logger.run_name=x"]) == {
        "sae": {"k": 2},
        "logger": {"run_name": "x"},
    }
    assert content == {"sae": {"k": 1}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nonsense", "--set must be key=value or key.subkey=value, got 'nonsense'"),
        ("=1", "--set must be key=value or key.subkey=value, got '=1'"),
        ("lr=[", "--set 'lr=[': the value is not YAML"),
        ("sae={k: 1, k: 2}", "--set 'sae={k: 1, k: 2}': k is set twice, in lines 1 and 1"),
    ],
)
def test_an_override_that_is_none(override, message):
    assert message_of(apply_overrides, {}, [override]) == message


def test_an_unknown_shipped_config_names_those_that_there_are():
    message = message_of(shipped_config, "nope")
    assert message.startswith("no run file 'nope': give a path or one of compare-")
    assert shipped_config("demo").name == "demo.yaml"
