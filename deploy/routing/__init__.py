"""Several versions of a model behind one address: the table of versions, their health, and how requests are passed on."""
