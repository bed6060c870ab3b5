"""Fixtures of the tests of deploy/. They stand in a module of a name of its own, which tests import too."""

from served_models import ask, baseline, engine, reference, served, tiny, transformers_imports  # noqa: F401
