"""Serving: an OpenAI-compatible server, the load that measures one, and the builders of other runtimes' engines."""
