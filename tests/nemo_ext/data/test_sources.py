import pytest

from nemo_ext.data.sources import parse
from nemo_ext.errors import UserError


@pytest.fixture()
def tree(tmp_path, monkeypatch):
    for name in (
        "b/z.txt",
        "b/a.md",
        "b/.hidden.txt",
        "b/.git/x.txt",
        "b/c/m.jsonl.gz",
        "b/c/n.rst",
        "b/pic.png",
        "one.parquet",
        "x:0.5",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"text")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(source):
    return [str(path) for path in source.files]


def test_a_folder_is_read_recursively_in_a_fixed_order(tree):
    assert names(parse("b")[0]) == ["b/a.md", "b/c/m.jsonl.gz", "b/c/n.rst", "b/z.txt"]


def test_globs(tree):
    assert names(parse("b/*.md")[0]) == ["b/a.md"]
    assert names(parse("b/**/*.rst")[0]) == ["b/c/n.rst"]


@pytest.mark.parametrize(
    "data",
    ["[b:0.7,one.parquet:.3]", ["b:0.7", "one.parquet:.3"], [{"b": 0.7}, {"one.parquet": 0.3}], {"b": 0.7, "one.parquet": 0.3}],
)
def test_weights(tree, data):
    assert [(s.name, s.weight) for s in parse(data)] == [("b", 0.7), ("one.parquet", 0.3)]


def test_omegaconf_lists(tree):
    from omegaconf import OmegaConf

    config = OmegaConf.from_dotlist(["data=[b:0.7,one.parquet:0.3]"])
    assert [(s.name, s.weight) for s in parse(config.data)] == [("b", 0.7), ("one.parquet", 0.3)]


def test_kinds_and_names_with_colons(tree):
    hub, docs, file = parse(["hf:wikitext:wikitext-2-raw-v1:2", "python-docs:1", "b/z.txt:1e-1"])
    assert (hub.kind, hub.name, hub.weight) == ("hub", "hf:wikitext:wikitext-2-raw-v1", 2.0)
    assert (docs.kind, docs.weight, file.weight) == ("python-docs", 1.0, 0.1)


def test_a_data_set_folder(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "d")
    assert parse(str(tmp_path / "d"))[0].kind == "dataset"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("b/*.csv", "nothing matches"),
        ("b/*.png", "no match is of a known type"),
        ("b/pic.png", "unknown type"),
        ("x:0.5", "x:0.5: unknown type"),
        ("[b:0.7,one.parquet]", "one.parquet has no weight"),
        ("[b:0,one.parquet:1]", "must be positive"),
        ("[b:-1]", "must be positive"),
        ({"b": "much"}, "not a number"),
        ("[]", "data= is empty"),
        ("hf:", "needs a name"),
        (7, "give a name"),
    ],
)
def test_bad_input_is_named(tree, data, says):
    with pytest.raises(UserError, match=".") as error:
        parse(data)
    assert says in str(error.value) and "\n" not in str(error.value)
