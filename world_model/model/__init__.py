"""The world model: its config, tokens, draft and transformer, joined into the verbs of the contract."""
