"""One sequence over several ranks: what each operator needs of the tokens before its own, and how ranks exchange it."""
