"""The figures of README and docs, each by one command."""
