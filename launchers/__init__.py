"""The one command, and what it needs: grammar, plan, preparation, executors."""
