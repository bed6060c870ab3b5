import pytest

from nemo_ext.data import stdlib_docs


@pytest.fixture(scope="module")
def docs():
    return dict(stdlib_docs.documents())


def test_size_and_order(docs):
    assert 2_000_000 < sum(map(len, docs.values())) < 20_000_000
    assert list(docs) == sorted(docs, key=lambda title: (title.startswith("module"), title.split(" ", 1)[1].replace(".", "/")))


def test_topics_and_modules_are_there(docs):
    from pydoc_data.topics import topics

    assert docs["topic assert"] == topics["assert"].strip() + "\n"
    document = docs["module textwrap"]
    assert document.startswith("# textwrap\n\nText wrapping and filling.\n")
    assert "## class TextWrapper" in document
    assert "### fill(text, width=70, **kwargs)\n\nFill a single paragraph of text" in document
    assert "### TextWrapper.wrap(self, text)\n\nwrap(text : string) -> [string]" in document


def test_tests_and_tools_are_not(docs):
    assert not [title for title in docs if title.split()[1].split(".")[0] in ("test", "idlelib", "lib2to3", "turtledemo")]
